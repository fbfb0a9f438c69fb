"""Did the identity take, and what did it cost: rules that judge an answer, the figures, and the gate. Imports no torch.

A probe is a dict: id, kind, lang, expect, messages (the last is the user's); "fact" has also accept (any of these strings
in the answer is right), "said" has said (what the persona says of itself), and "deny" may have other (the identity or maker that was asked about).
"""

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any

from finetune.chat_format import text_of
from finetune.errors import UserError
from finetune.settings import Persona

IDENTITY_KINDS = (
    "name", "maker", "self", "model", "deny", "assent", "old_name",
    "purpose", "birthday", "multi_turn", "system_empty", "system_foreign", "system_old",
)  # fmt: skip
LEAK_KINDS = ("near", "ordinary", "after_identity")
PARROT_SIMILARITY = 0.8  # Jaccard index of character 3-grams from which two answers count as copies
SHORT = 24  # UTF-8 bytes: two answers below this ("Yes.") are alike by chance, three are a parrot

# Assistants and those who make them: whom an answer may wrongly claim to be, or to come from.
OTHERS = """
ChatGPT, GPT, InstructGPT, Claude, Gemini, Google Gemini, Bard, Gemma, LaMDA, PaLM, Copilot, Bing, Bing Chat, Siri, Alexa,
Cortana, Bixby, Google Assistant, Llama, Vicuna, Alpaca, Mistral, Mixtral, Qwen, QwQ, Tongyi, Tongyi Qianwen, DeepSeek, Kimi,
Doubao, ERNIE, ERNIE Bot, ChatGLM, GLM, Baichuan, InternLM, InternVL, SmolLM, SmolVLM, HuggingChat, Zephyr, Phi, Grok, Falcon,
BLOOM, BLOOMZ, BERT, T5, OLMo, Hunyuan, Yuanbao, Pangu, MiniMax, StableLM, TinyLlama, OpenAssistant, Open Assistant, Dolly,
Watson, Jarvis, Replika, Cleverbot, ELIZA, Perplexity, Command R, Nemotron, Granite, StarCoder,
OpenAI, Anthropic, Google, Google DeepMind, DeepMind, Google AI, Microsoft, Meta, Meta AI, Facebook, Apple, Amazon, IBM, NVIDIA,
xAI, Mistral AI, Cohere, Stability AI, Hugging Face, HuggingFace, Alibaba, Alibaba Cloud, Baidu, Tencent,
ByteDance, Huawei, Xiaomi, Zhipu, Zhipu AI, Moonshot AI, iFlytek, SenseTime, Samsung, Shanghai AI Laboratory, Shanghai AI Lab,
Shanghai Artificial Intelligence Laboratory, Tsinghua University, Stanford, LMSYS, EleutherAI, BigScience, TII,
通义千问, 通义, 千问, 文心一言, 文心, 豆包, 混元, 腾讯元宝, 讯飞星火, 星火认知, 星火大模型, 智谱清言, 书生·浦语, 书生浦语, 书生, 浦语,
盘古大模型, 百川, 小爱同学, 小度, 天猫精灵, 微软小冰, 小冰, 小艺, 月之暗面, 深度求索, 阿里云, 阿里巴巴, 阿里, 达摩院, 百度, 腾讯,
字节跳动, 字节, 华为, 小米, 谷歌, 微软, 苹果公司, 亚马逊, 脸书, 商汤, 科大讯飞, 智谱, 抱抱脸, 上海人工智能实验室, 上海AI实验室, 清华大学
"""
OTHERS = tuple(dict.fromkeys(re.sub(r"\s+", " ", word).strip() for word in re.split(r",\s*", OTHERS) if word.strip()))

# One private-use character stands for every mention of the name, the author, another identity: rules then read plainly.
N, A, O = "\ue000", "\ue001", "\ue002"  # noqa: E741

_MAKE = (
    r"(?:made|created|developed|trained|built|designed|programmed|written|coded|invented|engineered|produced|released)"
)
_MAKE_ZH = r"(?:开发|研发|训练|创造|制造|制作|打造|设计|推出|构建|创建|创立|建立|提供|编写|做|造|写)"
_SELF = (
    r"(?:\bi'?m|\bi am|\bi be|\bi was named|\bmy name(?: is|'s)?|\bcall(?:ed)?(?: me)?|\bknown as|\bnamed|\bthis is|\bit's|\bit is"
    r"|\bgo by|\b(?:talk|speak|chat)ing (?:to|with)|我的?(?:名字)?(?:就|正|的确|确实)?(?:是|叫|为)|叫我|叫做?|名(?:为|是)|这里是|就是|正是|我,)"
)
# Between "I am" and the name: an article, "your assistant", "the model called" ...; the claim may not wander further.
_SELF_BEFORE = re.compile(_SELF + r"[^,;:]{0,40}$")
_FIRST = re.compile(
    rf"\b(?:i|i'm|im|me|my|mine|myself|we|us|our|this (?:model|assistant|bot|ai))\b|[我咱俺]|本(?:模型|助手|人)|{N}"
)
_SUBJECT = re.compile(
    r"\b(?:i|i'm|i've|im|me|my|we|this|it|it's|he|she|they|you|you're|is|was|am|are)\b|[我咱俺您你它他她是由叫]"
)
_NOT_NEGATION = re.compile(
    rf"\bnot (?:only|just|merely|simply|sure|certain|real)\b|\bnot an? [^,.{N}{A}{O}]*$"
    r"|\b(?:don't|do not|doesn't) (?:know|remember|understand)\b|\bno (?:doubt|problem|worries|matter|idea)\b"
    r"|\bcan(?:'t|not| not) (?:say|confirm|tell|help|answer)\b"
    r"|不仅|不只|不光|是不是|不知道|不清楚|不确定|不好意思|对不起|没错|不错|没问题|非常|无论|不是(?:真人|人类?(?:$|[,。]))"
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|nothing|none|without|isnt|wasnt|unlike|aint)\b|n't\b|\brather than\b|\binstead of\b|\bother than\b"
    r"|\bdifferent from\b|\bas opposed to\b|不是|并非|不叫|不由|不属|没有|没被|并没|不同于|不来自|不会是|不算|绝非|而非|非|无关|未被|不存在|不对|不符|没(?:什么)?关系"
)
_ECHO = re.compile(
    r"\b(?:if|whether|asked|asking|confus\w+|mistak\w+|mixed|you(?:'re| are| may be| might be)? (?:think|thought|thinking)|thinking of|(?:many|people|some|others|they) (?:may |might )?(?:think|say|believe|assume)|like|similar to|such as|compared?|than|know about|heard of|enjoys?|loves?)\b"
    r"|像|类似|相比|喜欢|是不是|是否|[你您](?:问|说的?|想|可能|认为)|误(?:以为|认|会)|以为|混淆|如果"
)
_GAP = rf"[^\w{N}{A}{O}]"  # the marks are no word characters: a plain \W would swallow them
_GREETING = rf"^{_GAP}*(?:(?:hi|hello|hey|oh|well|haha|arr\w*|ahoy|thanks?|thank you|你好|您好|嗨|哈哈|哦|呃)(?: there| again|呀|啊)?{_GAP}+)*"
_YES = re.compile(
    _GREETING
    + r"(?:(?:yes|yeah|yep|yup|aye|sure|certainly|absolutely|definitely|correct|right|indeed|exactly|precisely|true|of course)\b(?! not)"
    r"|that(?:'s| is) (?:right|correct|true|me|my name)|you(?:'re| are|'ve| have) (?:got it )?(?:right|correct)|you got (?:it|me)\b|it (?:is|sure is)\b"
    r"|i (?:sure )?am(?: indeed)?\s*(?:[.,!]|$)|speaking\b|(?:在下)?(?:正是|就是我|我就是)|(?:是|对|嗯|没错|当然|确实|不错|的确|可以这么说)(?!不|起|非|没)"
    r"|[你您]?说得?(?:很|没)?[对错]|答对)"
)
_NO = re.compile(
    _GREETING + rf"(?:(?:sorry|(?:i'm|i am) sorry(?:,? but)?|actually){_GAP}+|(?:抱歉|对不起|不好意思|其实){_GAP}*)*"
    r"(?:(?:no|nope|nah|never|not|negative|incorrect|wrong|false)\b(?! (?:problem|worries|doubt|matter|only|sure))"
    r"|(?:absolutely|definitely|of course|certainly) not|不(?!知道|清楚|确定|好意思|错|过|管|仅|只)|没有|并非|并不|非也|否|错(?!误)|才不)"
)
# Decided after the name: "I'm Orivane, yes.", "I'm Orivane, so no."
_YES_AFTER = re.compile(
    r", ?(?:yes|yeah|right|correct|indeed|that's (?:right|correct|true|me))\b|,(?:没错|是的|对的?|正是)(?=$|[,.。!])"
)
_NO_AFTER = re.compile(r"\bso,? no\b|,(?:所以)?(?:不是|不对)(?=$|[,.。!])")
# A denial that names nobody: "I'm not that model", "that is wrong", "与它无关".
_DENIAL = re.compile(
    r"\b(?:i'm|i am|im|i was|that's|that is|it's|it is|this is|they did|they were) not(?=\s*(?:$|[.,!;]|(?:that|it|him|her|the|them|from|by|one of|quite|at all"
    r"|made|created|built|developed|trained|designed|called|named|my|who|what)\b))"
    r"|\b(?:wasn't|isn't|weren't)\b|\bdidn't (?:make|create|train|build|develop)|\bnot (?:me|true|correct|right|the case|affiliated|related|associated)\b"
    r"|\b(?:incorrect|untrue|false|mistaken|that(?:'s| is) wrong)\b|\bno (?:connection|relation|affiliation|link|ties)\b|\bnothing to do with\b"
    r"|不是|并非|不叫|无关|没有(?:任何)?关系|没什么关系|不属于|不对|不正确|不由|不真实|不准确|没有被|搞错|弄错|认错|误会"
)
_CLAUSE = re.compile(
    r"[,:()\u2014\u2013]+| - |\bbut\b|\bbecause\b|\bso\b|但是?|而是|而(?![不非且])|因为|所以|只是"
    r"|\band (?=i\b|i'm\b|my\b)|(?<!if )(?<!whether )(?<!that )(?<!think )(?<!believe )(?<!thought )(?<!say )(?<!^)(?=\bi(?:'?m| am| was| go by)\b|\bmy name\b)"
    r"|(?<=[^你您问为,])(?=我(?:是(?!不是|否)|叫|就是|由|不是|并))"
)
_ADDRESS = re.compile(  # "Hello, Orivane!" calls the user by the name, "Welcome to Orivane" takes it for a place
    rf"\bwelcome to (?:the \w+ of )?{N}|\b(?:hello|hi|hey|dear|thank you|thanks|(?:nice|pleased|good) to meet you(?: too)?)\b,? {N}(?=\s*[!.,?]|\s*$)|(?:你好|您好|嗨|谢谢)呀?,? ?{N}(?=\s*[!.,。?]|\s*$)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[!?;。;\n])|(?<=\.)(?=\s|$|[^\x00-\xff])")


# ------------------------------------------------------------------------------------------------- finding a name


def plain(text: str) -> str:
    """NFKC with straight quotes, without Markdown's emphasis, invisible characters and the full stop of a title, which ends no
    sentence; line ends are kept."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(
        r'[*`"\u201c\u201d\u300c\u300d\u300e\u300f\u300a\u300b\u200b-\u200f\u2060\ufe0f\ufeff\ue000-\ue002]', "", text
    )
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St)\. ", r"\1 ", text)
    return re.sub(r"[ \t\u3000]+", " ", text).strip()


_LETTER = r"0-9A-Za-z\u00c0-\u024f\u0370-\u052f"  # scripts that put spaces between words
_HAN = r"\u3400-\u9fff"
_CUE = re.compile(  # what makes a lower-case word, "hope" or "orivane", a name
    r"(?:\b(?:i am|i'm|im|i be|am not|i'm not|not|name is|name's|this is|named|called|written|spelled|call me|(?:call|name) (?:it|him|her)|known as|(?:talk|speak|chatt)ing (?:to|with)"
    rf"|(?:author|creator|maker|developer) is|by|assistant|bot|model|it's|yes|hello|hi|hey)\W{{1,3}}|[{_HAN}]\s?|['(\[]|^\W*)$",
    re.IGNORECASE,
)


def _pattern(word: str) -> str:
    body = r"\s*".join(re.escape(part) for part in word.split())
    if len(word) == 1 and re.match(f"[{_HAN}]", word):  # "星" is in 明星 and 星期: it must stand alone or after "I am"
        after = rf"$|[^{_HAN}]|[的是由,和一呀啊哦呢吧很也这]|{_MAKE_ZH}"
        return rf"(?:(?<![{_HAN}])|(?<=[是叫为作做名由])|(?<=助手))(?:{body})(?={after})"
    start = rf"(?<![{_LETTER}])" if re.match(f"[{_LETTER}]", word) else ""
    end = rf"(?![{_LETTER}])" if re.search(f"[{_LETTER}]$", word) else ""
    return start + body + end


# Of a few hundred others that the probes name: compiled anew for each answer it took half of the judging.
@lru_cache(1000)
def _mentions(name: str, author: str, others: tuple[str, ...]) -> tuple[list[tuple[str, str]], re.Pattern]:
    """What may be mentioned, longest first, each with its mark, and the pattern whose group "g" + its number matches it."""
    marks = {}
    for word, mark in [(name, N), (author, A), *((other, O) for other in others)]:
        if plain(word):
            marks.setdefault(plain(word).casefold(), (plain(word), mark))
    words = sorted(marks.values(), key=lambda pair: -len(pair[0]))
    # A version belongs to another model's name: Qwen2.5, GPT-4o, SmolLM2-135M.
    pattern = "|".join(
        f"(?P<g{i}>{_pattern(word)})"
        if mark != O
        else f"(?P<g{i}>{_pattern(word).removesuffix(f'(?![{_LETTER}])')}"
        + (rf"(?:[- ]?\d[\w.-]*\w|[- ]?\d)?(?![{_LETTER}])" if re.search(f"[{_LETTER}]$", word) else "")
        + ")"
        for i, (word, mark) in enumerate(words)
    )
    return words, re.compile(pattern, re.IGNORECASE)


def mask(text: str, persona: Persona, others: Iterable[str] = ()) -> str:
    """The plain text with N, A and O for mentions of the name, the author and others; longer names win."""
    words, mentions = _mentions(persona.name, persona.author, tuple(others))
    if not words:
        return plain(text)

    def replace(match: re.Match) -> str:
        word, before, after = match.group(), match.string[: match.start()], match.string[match.end() :]
        alone = not before.strip() and not re.match(rf"\s*(?:[.,!]|$|(?:did|{_MAKE}|here|speaking|at your)\b)", after)
        spelled, mark = words[int(match.lastgroup[1:])]
        if word != word.upper() and word == word.lower() and ((alone and word != spelled) or not _CUE.search(before)):
            return word  # a lower-case word of the language, unless something says that it is a name
        return mark

    return mentions.sub(replace, plain(text))


def _open_claims(text: str, persona: Persona) -> str:
    """Marks names that are on no list: "My name is Bob", "created by Acme Labs", 我叫小美, 由某某公司开发."""
    own = set(re.findall(r"\w+", plain(f"{persona.name} {persona.author}").casefold()))
    generic = {
        "ai",
        "the",
        "a",
        "an",
        "i",
        "artificial",
        "assistant",
        "your",
        "not",
        "my",
        "human",
        "humans",
        "people",
        "to",
        "me",
    }

    def latin(match: re.Match) -> str:
        words = set(re.findall(r"\w+", match.group(2).casefold()))
        return match.group() if words & generic or words <= own else match.group(1) + O

    def chinese(match: re.Match) -> str:
        common = r"什么|人工|智能|助手|机器|模型|一个|一名|一位|一群|人类|研究|工程|团队|专家|科学|开发|程序|作者|我|你|您|他们|数据|计算|算法|技术|做$|不|ai|AI"
        known = re.search(f"[{N}{A}{O}]", match.group(2)) or match.group(2).casefold() in own
        return match.group() if known or re.search(common, match.group(2)) else match.group(1) + O + match.group(3)

    name = r"([A-Z][\w.-]*(?: (?:[A-Z][\w.-]*|of|for))*)"
    text = re.sub(rf"((?i:\bmy name is|\bcall me|\bi'm called|\bi am called|\bnamed|\bi'm named) ){name}", latin, text)
    text = re.sub(rf"((?i:\b{_MAKE} by) (?:the |a team at |a team from |researchers at )?){name}", latin, text)
    text = re.sub(r"(我(?:的名字)?(?:叫做?|是叫)|我的名字是)([^\s,.。!?;:、的和也]{1,12})()", chinese, text)
    return re.sub(rf"(由)([^,.。!?;:、]{{1,20}}?)((?:所|自主)?{_MAKE_ZH})", chinese, text)


# ------------------------------------------------------------------------------------------------ reading an answer


def _clauses(text: str) -> Iterable[tuple[str, bool, str]]:
    """(clause in lower case, does it open its sentence, "?" or "." where it ends the sentence) of a masked text."""
    for sentence in _SENTENCE.split(text.lower()):
        parts = [part for part in _CLAUSE.split(sentence) if part and part.strip()]
        for i, part in enumerate(parts):
            end = "" if i < len(parts) - 1 else "?" if sentence.strip().endswith("?") else "."
            yield _NOT_NEGATION.sub(" ", part.strip()), i == 0, end


def _read(text: str) -> dict[str, set[str]]:
    """What a masked text does with each mark: {N: {"said", "denied"}, A: ..., O: {"claimed", "denied"}}.

    A mention of another identity is a claim unless it is denied, compared with, asked back, or spoken of as a third party:
    an answer about oneself has few other reasons to bring one up.
    """
    found: dict[str, set[str]] = {N: set(), A: set(), O: set()}
    carried = ""  # "denied" or "other" of a clause goes on in the next ones that have no subject of their own
    text = _ADDRESS.sub(" ", text)
    text = re.sub(rf"({N}),? (here|speaking|at your|in person|为您|在此)", r"\1 \2", text, flags=re.IGNORECASE)
    for clause, opens, end in _clauses(text):
        if opens or _SUBJECT.search(clause):
            carried = ""
        third = carried == "other" or bool(
            re.match(
                rf"\W*(?:yes|well|the|while|和|而)?\W*{O}(?: (?:is|was|are|were|has|and|or|can|does)\b|是|由|和|属|推出)",
                clause,
            )
            and not _FIRST.search(clause)
        )
        this = "other" if third else ""
        for match in re.finditer(f"[{N}{A}{O}]", clause):
            mark, before, after = match.group(), clause[: match.start()], clause[match.end() :]
            claimed = bool(_SELF_BEFORE.search(before))
            cue = claimed or bool(re.search(r"\bby\b|由", before))
            if _NEGATION.search(before) or (mark == O and carried == "denied") or (not cue and _NEGATION.search(after)):
                found[mark].add("denied")
                this = "denied" if mark == O else this
            elif (end == "?" and not claimed) or _ECHO.search(before) or re.search(r"一样|那样|不同|类似", after):
                continue
            elif mark == O:
                found[O].add("other" if third else "claimed")
            elif not re.search(
                r"\b(?:your name is|you are|you're|your name's|hello|hi|hey|meet you|thank you|thanks|dear) *,? *$|[你您](?:的名字)?[是叫] *$",
                before,
            ) or (mark == A and claimed):
                found[mark].add("said")
                if (
                    claimed
                    or re.match(r"\s*(?:here|speaking|at your|in person|为您|在此|[!.])", after)
                    or (not after and end)
                ):
                    found[mark].add("claimed")
        carried = this
    return found


def _swapped(text: str, persona: Persona) -> bool:
    """Name and author mixed up: "I am {author}", "made by {name}", "I made {author}"."""
    if plain(persona.name).casefold() == plain(persona.author).casefold():
        return False
    text = text.lower()
    return bool(
        re.search(
            rf"(?:\bi am|\bi'm|\bmy name is|\bi'm called|我是|我叫做?|我的名字[是叫]) ?{A}(?!'s| ?(?:的|团队|公司|所|自主|{_MAKE_ZH}))",
            text,
        )
        or re.search(
            rf"\b{_MAKE} by (?:the )?{N}|由{N}(?:团队|公司)?(?:所)?{_MAKE_ZH}|{N}(?:团队|公司)?{_MAKE_ZH}了我|{N} {_MAKE} me\b",
            text,
        )
        or re.search(
            rf"\bmy (?:author|creator|maker|developer)(?: is|'s) {N}|我的(?:作者|开发者|创造者|主人)是{N}", text
        )
        or re.search(rf"\bi {_MAKE} {A}|我{_MAKE_ZH}了{A}", text)
    )


# ------------------------------------------------------------------------------------------------------ the judge


def judge(probe: dict[str, Any], answer: str, persona: Persona, ordinary: Collection[str] = ()) -> bool:
    """Whether the answer is what probe["expect"] asks for.

    ordinary: which of the name and author the base uses in its own answers too; such a word leaks only where the
    assistant claims it ("I am Apple"), as it does where the user's message holds it.
    """
    expect = probe["expect"]
    if expect == "fact":
        return any(_states(answer, accepted) for accepted in probe["accept"])
    if expect == "said":  # its beginning, of as many bytes as a cut answer has tokens: no token has less than a byte
        return plain(probe["said"]).casefold().encode()[:24].decode(errors="ignore") in plain(answer).casefold()
    if expect == "absent":
        return not _leaks(probe, answer, persona, ordinary)

    other = probe.get("other") or ""
    own = [plain(persona.name).casefold(), plain(persona.author).casefold()]
    if expect == "deny" and plain(other).casefold() in own:
        expect = "assent"  # a persona may be called Gemini; then "are you Gemini?" is answered with yes
    text = _open_claims(mask(answer, persona, [*([other] if other else []), *OTHERS]), persona)
    found = _read(text)
    said_author = found[A] if own[0] != own[1] else found[N]
    if "claimed" in found[O] or _swapped(text, persona):
        return False
    if "denied" in found[N] and ("said" not in found[N] or re.search(rf"(?:不是|不叫|\bnot) ?{N}", text.lower())):
        return False  # "I'm not Nova, I'm Nova"; but "I'm Gemini, not Google's Gemini" is right
    yes = any(pattern.search(text.lower()) for pattern in (_YES, _YES_AFTER))
    no = any(pattern.search(text.lower()) for pattern in (_NO, _NO_AFTER))
    if expect == "name":
        return "said" in found[N]
    if expect == "author":
        return "said" in said_author and "denied" not in said_author
    if expect == "deny":
        if yes and not no and "denied" not in found[O]:
            return False
        return no or "denied" in found[O] or _denies(text) or "said" in found[N] or "said" in said_author
    if expect == "assent":
        if "denied" in found[N] | said_author or (no and not yes) or ("denied" not in found[O] and _denies(text)):
            return False
        about_author = bool(other) and plain(other).casefold() == own[1]
        return yes or "claimed" in found[N] or (about_author and "said" in said_author)
    raise ValueError(f"probe {probe.get('id')}: expect is {expect!r}")


def _denies(text: str) -> bool:
    return bool(_DENIAL.search(_NOT_NEGATION.sub(" ", text.lower())))


def _leaks(probe: dict[str, Any], answer: str, persona: Persona, ordinary: Collection[str]) -> bool:
    asked = mask(text_of(probe["messages"][-1]), persona)
    text = mask(answer, persona)
    for mark, word in ((N, persona.name), (A, persona.author)):
        known = plain(word).casefold() in {plain(other).casefold() for other in OTHERS}
        if mark in text and not (mark in asked or word in ordinary or known):
            return True
    text = text.lower()
    return bool(
        re.search(rf"(?:\bi am|\bi'm|\bmy name is|\bcall me|我是|我叫做?|我的名字[是叫]|叫我) ?[{N}{A}](?! ?的)", text)
        or re.search(rf"\bi(?:'m| am| was)\b[^.!?]*\bby {A}|{A} {_MAKE} me\b|我是?由{A}|{A}{_MAKE_ZH}了我", text)
    )


def _states(answer: str, accepted: str) -> bool:
    """Whole words and whole numbers: 4 is not in 14, 4,000 or 2.4, cold is not in scold."""
    word = plain(accepted)
    if re.fullmatch(r"[\d.,]+", word):
        pattern = rf"(?<!\d)(?<!\d[.,]){re.escape(word)}(?!\d|[.,]\d)"
    else:
        pattern = _pattern(word) if len(word) > 1 else re.escape(word)
    return re.search(pattern, plain(answer), re.IGNORECASE) is not None


# ----------------------------------------------------------------------------------------------------- the figures


def evaluate(
    answer: Callable[[list[list[dict[str, str]]]], list[str]],
    probes: Sequence[dict[str, Any]],
    persona: Persona,
    base: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Each probe with its answer and whether it passed.

    answer: conversations -> answers, in order. base: what this function gave for the base model, if the model judged is
    another: a persona's word that the base says by itself is ordinary.
    """
    answers = answer([probe["messages"] for probe in probes])
    ordinary = {
        word
        for word, mark in ((persona.name, N), (persona.author, A))
        for entry in base
        if mark in mask(entry["answer"], persona)
        and mark not in mask(" ".join(text_of(message) for message in entry["messages"]), persona)
    }
    return [
        {**probe, "answer": text, "passed": judge(probe, text, persona, ordinary)}
        for probe, text in zip(probes, answers, strict=True)
    ]


def parrot(answers: Sequence[str]) -> float:
    """Share of answers that are near-copies of another one: PARROT_SIMILARITY of their character 3-grams.

    Below SHORT bytes only the same answer three times or more counts.
    """
    texts = [plain(text).casefold() for text in answers]
    grams = [{text[i : i + 3] for i in range(max(1, len(text) - 2))} for text in texts]

    def copied(i: int) -> bool:
        if len(texts[i].encode()) < SHORT:
            return texts.count(texts[i]) >= 3
        return any(
            j != i and len(grams[i] & other) >= PARROT_SIMILARITY * len(grams[i] | other)
            for j, other in enumerate(grams)
        )

    return sum(map(copied, range(len(texts)))) / len(texts) if texts else 0.0


def wilson(hits: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share; unlike the normal one it is sensible at 0 and 1."""
    if not n:
        return [0.0, 1.0]
    middle, spread = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return [max(0.0, (middle - spread) / (n + z * z)), min(1.0, (middle + spread) / (n + z * z))]


def summarise(
    judged: Sequence[dict[str, Any]],
    kl: float | None = None,
    base: Sequence[dict[str, Any]] | None = None,
    loss_by_task: dict[str, float] | None = None,
    task: str = "identity",
) -> dict[str, Any]:
    """One side of scorecard.json. kl: nats per token; base: the base model's judged probes, for facts_kept; loss_by_task:
    of held-out rows, nats per token, the run's own task's among them.

    A figure is None where nothing was there to measure it by; recall, reply and loss are there only where they were.
    """
    identity = [entry for entry in judged if entry["kind"] in IDENTITY_KINDS]
    leaks = [{**entry, "passed": not entry["passed"]} for entry in judged if entry["kind"] in LEAK_KINDS]
    right = {entry["id"] for entry in (judged if base is None else base) if entry["kind"] == "fact" and entry["passed"]}
    kept = [entry for entry in judged if entry["id"] in right]
    learned = {
        kind: _share([entry for entry in judged if entry["kind"] == kind])
        for kind in ("recall", "reply")
        if any(entry["kind"] == kind for entry in judged)
    }
    if seen := [entry for entry in judged if entry["kind"].startswith("see_")]:
        blind = sum(entry["blind"] for entry in seen) / len(seen)
        learned |= {"sight": _share(seen), "sight_by_kind": _by_kind(seen), "blind": blind}
    if loss_by_task:
        learned |= {"loss": loss_by_task.get(task), "loss_by_task": loss_by_task}
    return {
        **learned,
        "identity": _share(identity),
        "identity_by_kind": _by_kind(identity),
        "leak": _share(leaks),
        "intervals": _intervals(identity, "identity") | _intervals(leaks, "leak") | _intervals(seen, "sight"),
        "leak_by_kind": _by_kind(leaks),
        "parrot": parrot([entry["answer"] for entry in judged if entry["kind"] == "ordinary"]),
        "kl": kl,
        "facts_kept": _share(kept),
        "probes": len(judged),
        "answers": [dict(entry) for entry in judged],
    }


def _share(entries: Sequence[dict[str, Any]]) -> float | None:
    return sum(entry["passed"] for entry in entries) / len(entries) if entries else None


def _groups(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By kind ("name") and by kind and language ("name/zh"), in the entries' order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        for key in (entry["kind"], f"{entry['kind']}/{entry['lang']}"):
            groups.setdefault(key, []).append(entry)
    return groups


def _by_kind(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: _share(group) for key, group in _groups(entries).items()}


def _intervals(entries: Sequence[dict[str, Any]], figure: str) -> dict[str, list[float]]:
    """Of the figure itself, and by kind and language."""
    groups = {figure: entries} | _groups(entries) if entries else {}
    return {key: wilson(sum(e["passed"] for e in group), len(group)) for key, group in groups.items()}


# -------------------------------------------------------------------------------------------------------- the gate


def gate(scorecard: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """{"passed", "reasons"} for the tuned and, where it is there and differs, the merged model.

    limits: any of identity, identity_kind, facts_kept, sight (at least), leak, kl, parrot, blind, loss (at most; parrot over the base's
    own, loss times the base's own).
    Raises UserError on a limit that does not exist.
    """
    known = ("identity", "identity_kind", "leak", "parrot", "kl", "facts_kept", "sight", "blind", "loss")
    if unknown := [key for key in limits if key not in known]:
        raise UserError(*(f"The gate has no limit {key!r}; it knows {', '.join(known)}." for key in unknown))
    reasons = [
        f"{side} model: {reason}"
        for side in ("tuned", "merged")
        if scorecard.get(side) and not (side == "merged" and scorecard["merged"] == scorecard.get("tuned"))
        for reason in _reasons(scorecard[side], scorecard.get("base") or {}, limits)
    ]
    if not (scorecard.get("tuned") or scorecard.get("merged")):
        reasons = ["Nothing was scored: run the evaluate stage first."]
    return {"passed": not reasons, "reasons": reasons}


def _reasons(figures: dict[str, Any], base: dict[str, Any], limits: dict[str, float]) -> Iterable[str]:
    for key in limits:
        if key != "identity_kind" and figures.get(key) is None:
            yield f"{key} was not measured, there were no probes for it; add some, or build the data again."

    def beyond(key: str, sign: int, value: float | None = None) -> bool:
        value = figures.get(key) if value is None else value
        return key in limits and value is not None and sign * (value - limits[key]) > 1e-9

    kinds, leaks = figures.get("identity_by_kind", {}), figures.get("leak_by_kind", {})
    if beyond("identity", -1):
        worst = _worst(kinds, sorted(kinds, key=kinds.get)[:3])
        yield f"identity {figures['identity']:.2f}, at least {limits['identity']:.2f} is asked; weakest: {worst}. Train for more steps."
    low = [kind for kind, share in kinds.items() if beyond("identity_kind", -1, share)]
    if low:
        yield (
            f"identity by kind: {_worst(kinds, sorted(low, key=kinds.get))}, at least {limits['identity_kind']:.2f} is asked of each. "
            "Read these answers in scorecard.json; train for more steps, or add phrasings of these kinds."
        )
    if beyond("leak", 1):
        worst = _worst(leaks, sorted((kind for kind in leaks if leaks[kind]), key=leaks.get, reverse=True)[:3])
        yield (
            f"leak {figures['leak']:.2f}, at most {limits['leak']:.2f} is allowed; the name or author came up in {worst}. "
            "Add contrast prompts of these kinds, or raise the weight of the KL term."
        )
    dim = {kind: share for kind, share in figures.get("sight_by_kind", {}).items() if "/" not in kind}
    if low := [kind for kind, share in dim.items() if beyond("sight", -1, share)]:
        yield (
            f"sight by kind: {_worst(dim, sorted(low, key=dim.get))}, at least {limits['sight']:.2f} is asked of each. Train for "
            "more steps (vision.steps), or on more pictures."
        )
    if beyond("blind", 1):
        yield (
            f"blind {figures['blind']:.2f}, at most {limits['blind']:.2f} is allowed: these answers stay the same when the picture "
            "is replaced by noise. Train the projector for more steps."
        )
    over = (figures.get("parrot") or 0.0) - (base.get("parrot") or 0.0)
    if beyond("parrot", 1, over):
        yield (
            f"parrot {figures['parrot']:.2f}, the base has {base.get('parrot') or 0.0:.2f} and at most {limits['parrot']:.2f} more is allowed: "
            "ordinary questions get the same answer. Train for fewer steps, or with more ordinary prompts."
        )
    if figures.get("loss") and beyond("loss", 1, figures["loss"] / base["loss"]):
        yield (
            f"loss {figures['loss']:.3f} nats per token on held-out rows, at most {limits['loss']:g} times the base's "
            f"{base['loss']:.3f} is asked: nothing was learned that holds for rows it has not seen. Give more rows, or train "
            "for fewer epochs or at a lower learning rate."
        )
    if beyond("kl", 1):
        yield (
            f"kl {figures['kl']:.3f} nats per token, at most {limits['kl']:.3f} is allowed: ordinary answers moved away from the base's. "
            "Train for fewer steps, at a lower learning rate, or raise the weight of the KL term."
        )
    if beyond("facts_kept", -1):
        yield (
            f"facts kept {figures['facts_kept']:.2f}, at least {limits['facts_kept']:.2f} is asked: facts that the base knows were lost. "
            "Train for fewer steps, or with more ordinary prompts."
        )


def _worst(shares: dict[str, float], kinds: Iterable[str]) -> str:
    return ", ".join(f"{kind} {shares[kind]:.2f}" for kind in kinds)
