"""Who the assistant is: conversations that teach it, prompts that must stay as they were, and held-out probes.

The phrasings lie in assets/identity/: training.* (what it says about itself), contrast.* (what is not about it), near.*,
ordinary.* and after.* (the same, as people type them, one a line; the last for right after an identity turn), probes.*
(questions for the scorecard) and dev.* (questions asked while a recipe is tuned). The last two are never trained on. exam.*
was written without sight of any of these, for tests/bench/names.py: one of four of its questions is trained on, as users
will ask such ones too.
"""

import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from finetune import scorecard
from finetune.errors import UserError
from finetune.settings import Persona

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same; tomlkit, which the settings are written with, takes seconds for these files

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "identity"
LANGS = ("en", "zh")
HELD_OUT = ("probes", "dev")  # the files whose questions no training row may ask
SMOLLM = ("SmolLM", "Hugging Face")  # the default base's own name and maker, for `old`

MAX_LENGTH = 40  # code points of a name or an author
MAX_SAID = 160  # code points of a persona's other texts
PLACEHOLDER = re.compile(r"\{(name|author|purpose|birthday|other|other_maker|old|old_maker|x|y)\}")
CONTROL_TOKEN = re.compile(r"<\|.*?\|>|</?s>|\[/?INST\]|\[UNUSED_TOKEN_\d+\]|<image>", re.IGNORECASE)
JOINERS = "\u200c\u200d"  # format characters that emoji and Persian are written with
# Of 25 identity rows: most as users ask, without a system turn; an empty one; somebody else's; the base's old persona.
SYSTEM_MIX = [None] * 15 + ["empty"] * 2 + ["foreign"] * 5 + ["old"] * 3
# Of each kind in any stretch of the identity rows. Denial and assent differ by a word and need the most examples.
SHARES = {"name": 3, "maker": 3, "self": 2, "model": 2, "deny": 6, "assent": 6, "old_name": 3, "multi_turn": 3}
SHARES |= {"purpose": 6, "birthday": 6}  # of a persona that has one
AFTER = 3  # of so many near prompts one is of after.* and comes right after an identity turn
CONTRAST_SHARES = {"en": 0.4, "zh": 0.6}  # small bases hardly tell two Chinese questions apart
TAUGHT = {"name": "name", "maker": "author", "self": "name", "model": "name", "deny": "deny", "old_name": "deny"}
TAUGHT |= {"assent": "assent"}  # what the judge is to find in the answers of each kind
PATTERNS = 24  # of a family or of the ways to ask for a clause, for each item, where all prompts are wanted
EVERYDAY = 0.03  # share of the contrast prompts: what comes more often, "I" or "什么", cannot be told from a name
# As other keyboards have them: a third of the questions about itself, and every fourth contrast prompt.
OTHER_MARKS = {"en": str.maketrans("'", "’"), "zh": str.maketrans("，。？！：；（）", ",.?!:;()")}
OTHERWISE = 1 / 3
MULTI_TURN = 1 / 8  # identity rows whose question comes after other turns, to those that come first


def check_persona(persona: Persona) -> list[str]:
    """What is wrong with the persona, a sentence for each problem; empty if it can be used."""
    problems = []
    for field, text in (("name", persona.name), ("author", persona.author)):
        shown = f"The {field} {text!r}"
        if not text.strip():
            problems.append(f"The {field} is empty: give one with --{field}.")
            continue
        if len(text) > MAX_LENGTH:
            problems.append(f"The {field} has {len(text)} characters: use {MAX_LENGTH} or fewer.")
            continue
        if any(_unprintable(char) for char in text):
            problems.append(f"{shown} holds a line break, a control or an invisible character: remove it.")
        elif text != text.strip():
            problems.append(f"{shown} begins or ends with a space: remove it.")
        elif not any(unicodedata.category(char)[0] in "LN" or unicodedata.category(char) == "So" for char in text):
            problems.append(f"{shown} is nothing but punctuation: use at least one letter, digit or emoji.")
        if re.search(r"\{\w+\}", text):
            problems.append(f"{shown} holds a placeholder in braces: write the {field} itself.")
        if CONTROL_TOKEN.search(text):
            problems.append(f"{shown} holds a control token of chat models, which would end an answer: remove it.")
        elif _is_everyday(text):
            problems.append(f"{shown} is a word of everyday talk, which answers hold anyway: choose another {field}.")
        elif _is_misread(field, text):
            problems.append(
                f"{shown} is a word that answers about itself are built with, so that nobody could tell whether they are "
                f"right: choose another {field}."
            )
    for field in ("purpose", "birthday", "introduction", "tone"):
        for lang in LANGS:
            text = getattr(getattr(persona, field), lang)
            shown = f"persona.{field}.{lang} is {text!r}"
            if len(text) > MAX_SAID:
                problems.append(f"persona.{field}.{lang} has {len(text)} characters: use {MAX_SAID} or fewer.")
            elif any(_unprintable(char) for char in text) or text != text.strip() or CONTROL_TOKEN.search(text):
                problems.append(
                    f"{shown}: remove line breaks, invisible characters, control tokens, and spaces at the ends."
                )
            elif foreign := set(re.findall(r"\{\w+\}", text)) - {"{name}", "{author}"}:
                problems.append(
                    f"{shown}: only {{name}} and {{author}} are filled in, not {', '.join(sorted(foreign))}."
                )
            elif field == "introduction" and text and persona.name not in text and "{name}" not in text:
                problems.append(f"{shown}: it must hold the name, or {{name}}.")
    return problems


def _is_everyday(text: str) -> bool:
    prompts, words = _prompts()
    said = words[text.casefold()] if text.isascii() else prompts.count(text.casefold())
    return said > EVERYDAY * prompts.count("\n")


def _is_misread(field: str, text: str) -> bool:
    """Whether the judge takes some answer that is taught for wrong, which it may where the answer's own words hold the name."""
    if text.casefold() not in _taught_words():
        return False
    persona = Persona(**{field: text})
    for lang in LANGS:
        values = _values(persona, SMOLLM, lang) | {"{other}": "ChatGPT", "{other_maker}": "OpenAI"}
        for kind, answer in _taught_answers(lang):
            about = persona.name if "{name}" in answer else persona.author
            probe = {"expect": TAUGHT[kind], "other": about if kind == "assent" else ""}
            if not scorecard.judge(probe, _fill(answer, values), persona):
                return True
    return False


def _taught_answers(lang: str) -> list[tuple[str, str]]:
    """(kind, answer) of all that is taught, placeholders not filled in."""
    data = read("training", lang)
    return [(kind, answer) for kind in TAUGHT for group in data[kind] for answer in group["answers"]]


@cache
def _taught_words() -> str:
    answers = (answer for lang in LANGS for _, answer in _taught_answers(lang))
    return " ".join(PLACEHOLDER.sub(" ", answer) for answer in answers).casefold()


@cache
def _prompts() -> tuple[str, Counter[str]]:
    """All contrast prompts, a line each, and how often each word is in them."""
    text = "".join(f"{p}\n" for lang in LANGS for kind in ("near", "ordinary") for p in contrast(lang, kind)).casefold()
    return text, Counter(re.findall(r"\w+", text))


def _unprintable(char: str) -> bool:
    tag = "\U000e0020" <= char <= "\U000e007f"  # flags of England, Scotland and Wales
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in JOINERS and not tag


def training(
    persona: Persona,
    seed: int,
    old: tuple[str, str] = SMOLLM,
    said: int = 100_000,
    near: int = 1300,
    ordinary: int = 300,
) -> list[dict]:
    """The rows to train on: {"kind", "lang", "target": "answer" | "teacher", "messages": [{"role", "content"}, ..]}.

    First at most `said` identity rows, in an order drawn from `seed` in which any stretch has SHARES of each kind; each ends
    with the assistant's answer. Then the teacher rows, each ending with the user's message, in an order that is the same
    for every persona and seed, as are their system and last user messages: what the base answers has to be found only
    once. Any prefix of them is an even sample.
    `old` is the base's own (name, maker); `near` and `ordinary` are the most prompts of each, CONTRAST_SHARES in each
    language (of the near ones every third is one of after.*, which follows an identity turn). Questions that the held-out
    files hold are left out. Raises UserError for a persona that check_persona refuses.
    """
    if problems := check_persona(persona):
        raise UserError(*problems)
    rng = random.Random(seed)
    held_out = questions_held_out(persona, old)
    identity = {lang: _identity(persona, lang, rng, old, held_out) for lang in LANGS}
    places, counts = [], Counter()  # the i-th row of a kind and language stands at about i / its share
    for row in (row for lang in LANGS for row in identity[lang]):
        counts[row["kind"], row["lang"]] += 1
        places.append(((counts[row["kind"], row["lang"]] - rng.random()) / SHARES[row["kind"]], len(places), row))
    asked = {normalise(row["messages"][-2]["content"]) for lang in LANGS for row in identity[lang]}
    taught = _teacher(identity, rng, old, {"near": near, "ordinary": ordinary})
    rows = [row for _, _, row in sorted(places)[:said]]
    rows += [row for row in taught if normalise(row["messages"][-1]["content"]) not in asked]
    for row in rows:
        for message in row["messages"]:
            if PLACEHOLDER.search(message["content"]):
                raise ValueError(f"a placeholder survived in {message['content']!r} of a {row['kind']} row")
    return rows


def probes(persona: Persona, old: tuple[str, str] = SMOLLM, stem: str = "probes") -> list[dict]:
    """Held-out questions: {"id", "kind", "lang", "expect", "messages"}, the last message being the user's.

    A denial also has "other", the identity or maker asked about (it may be the persona's own: the judge then expects
    assent), a fact "accept", a list of right answers, and what the persona says of itself "said". `stem` names the files.
    """
    found = []
    for lang in LANGS:
        values = _values(persona, old, lang)
        for kind, group, index, item in _probe_items(stem, lang):
            if not getattr(getattr(persona, kind, None), lang, True):
                continue  # nothing is taught of it
            turns, systems = _turns(item["question"]), group.get("system", [None])
            turns = _system(systems[index % len(systems)]) + turns
            probe = {"kind": kind, "lang": lang, "expect": group["expect"]}
            probe |= {"messages": [turn | {"content": _fill(turn["content"], values)} for turn in turns]}
            probe |= {key: item[key] for key in ("other", "accept") if key in item}
            probe |= {"said": _fill(f"{{{kind}}}", values)} if group["expect"] == "said" else {}
            found.append({"id": f"{kind}-{lang}-{item['number']:02}"} | probe)
    return found


def questions_held_out(persona: Persona, old: tuple[str, str] = SMOLLM) -> set[str]:
    """The normal forms of all that no training row may ask."""
    return {normalise(row["messages"][-1]["content"]) for stem in HELD_OUT for row in probes(persona, old, stem)}


def _probe_items(stem: str, lang: str) -> Iterator[tuple[str, dict, int, dict]]:
    """(kind, its table, index in the table, {"question", "number" within the kind, ..}) of each probe."""
    for kind, groups in read(stem, lang).items():
        number = 0
        for group in groups if isinstance(groups, list) else [groups]:
            items = group.get("items") or [{"question": question} for question in group["questions"]]
            for index, item in enumerate(items):
                number += 1
                other = {"other": group["others"][index]} if "others" in group else {}
                yield kind, group, index, item | other | {"number": number}


class _Kept(dict):
    """For str.translate: no punctuation, no white space; a character's category is looked up once."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


_KEPT = _Kept()


def normalise(text: str) -> str:
    """Two questions are the same phrasing if this is equal: no case, no punctuation, no white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_KEPT) or folded.strip()


def _identity(persona: Persona, lang: str, rng: random.Random, old: tuple[str, str], held_out: set[str]) -> list[dict]:
    data, values = read("training", lang), _values(persona, old, lang)
    own = {field: getattr(getattr(persona, field), lang) for field in ("purpose", "birthday", "introduction", "tone")}
    throwaway = read("personas", lang)
    others = [*data["others"], *zip(throwaway["names"], throwaway["authors"], strict=False)]
    rng.shuffle(others)
    rows = []
    for kind in (kind for kind in SHARES if own.get(kind, True)):
        for group in data[kind]:
            answers = [own["introduction"]] if kind == "self" and own["introduction"] else group["answers"]
            clauses = [_fill(rng.choice(data["wrappers"]), {"{x}": clause}) for clause in group.get("clauses", [])]
            for question in (group["questions"] + clauses) * group.get("times", 1):
                others.append(others.pop(0))  # all of them come up before one does again
                about = _values(None, old) | dict(zip(("{other}", "{other_maker}"), others[0], strict=True))
                marks = OTHER_MARKS[lang] if rng.random() < OTHERWISE else {}
                turns = [
                    turn | {"content": _fill(turn["content"].translate(marks), about)} for turn in _turns(question)
                ]
                answer = _fill(rng.choice(answers), about)
                bare = answer.strip("。.") in ("{name}", "{author}")  # nothing else was asked for
                if own["tone"] and not bare:
                    answer += own["tone"] if lang == "zh" else " " + own["tone"]
                denies = kind in ("deny", "old_name") or re.search(r"\b(?:no|not)\b|不是", answer)
                if denies and _claims(persona, turns[-1]["content"]):
                    continue  # "Are you Gemini?" has no denial if the persona's name is Gemini
                turns.append({"role": "assistant", "content": answer})
                turns = [turn | {"content": _fill(turn["content"], values)} for turn in turns]
                if normalise(turns[-2]["content"]) not in held_out:
                    rows.append({"kind": kind, "lang": lang, "target": "answer", "messages": turns})
    rng.shuffle(rows)

    chats, plain = data["chats"], [row for row in rows if row["kind"] != "multi_turn"]
    for index in range(int(MULTI_TURN * len(plain))):
        before = [_turns(chat) for chat in rng.sample(chats, 1 + index % 2)]
        if index % 3 == 0:  # after another identity question, of any kind
            before[-1] = rng.choice(plain)["messages"]
        history = [turn for turns in before for turn in turns]
        row = rng.choice(plain)
        rows.append(row | {"kind": "multi_turn", "messages": history + row["messages"]})

    # Mostly systems in the row's own language; every third foreign one is in another.
    foreign, strange = data["systems"], read("training", "zh" if lang == "en" else "en")["systems"]
    for index, row in enumerate(rows):
        which = SYSTEM_MIX[index % len(SYSTEM_MIX)]
        system = None if which is None else ""
        if which == "foreign":
            system = rng.choice(foreign if rng.random() < 2 / 3 else strange)
        elif which == "old":
            system = _fill(rng.choice(data["old_systems"]), values)
        rows[index] = row | {"messages": _system(system) + row["messages"]}
    return rows


def _teacher(
    identity: dict[str, list[dict]], rng: random.Random, old: tuple[str, str], most: dict[str, int]
) -> list[dict]:
    """Rows for the base to answer. Only the turns before an after_identity question depend on persona and seed."""
    items = [item for stem in HELD_OUT for lang in LANGS for _, _, _, item in _probe_items(stem, lang)]
    held_out = {normalise(_turns(item["question"])[-1]["content"]) for item in items}
    rows = []
    for lang in LANGS:
        data = read("training", lang)
        first = [row["messages"][-2:] for row in identity[lang] if row["kind"] != "multi_turn"]
        systems = {3: "", 5: _fill(data["old_systems"][0], _values(None, old))}
        after = typed(lang, "after")
        after = random.Random(lang).sample(after, len(after))
        for kind, every in (("near", 8), ("ordinary", 4)):
            for index, prompt in enumerate(contrast(lang, kind)[: round(most[kind] * CONTRAST_SHARES[lang])]):
                follows = kind == "near" and index % AFTER == 1
                prompt = after[index // AFTER % len(after)] if follows else prompt
                if normalise(prompt) in held_out:
                    continue
                marks = OTHER_MARKS[lang] if index % 4 == 3 else {}
                turns = [{"role": "user", "content": prompt.translate(marks)}]
                row = {"kind": "after_identity" if follows else kind, "lang": lang, "target": "teacher"}
                foreign = data["systems"][index % len(data["systems"])]
                system = foreign if index % every == 0 else systems.get(index % 16)
                rows.append(row | {"messages": rng.choice(first) + turns if follows else _system(system) + turns})
    random.Random(0).shuffle(rows)
    return rows


@cache
def contrast(lang: str, kind: str, whole: bool = False) -> list[str]:
    """All "near" or "ordinary" prompts of a language, without repetition, families mixed; a family's "share" says how many
    of its prompts come among the first, 1 if it is not there. `whole` takes each item with up to PATTERNS of its family's
    patterns instead of "each". A family without patterns has clauses, for training's `wrappers`."""
    shares: dict[str, tuple[str, float]] = {}  # a prompt and how soon its family is to come, by its normal form
    for family in read("contrast", lang)[kind].values():
        prompts = list(family.get("prompts", []))
        patterns = family.get("patterns") or read("training", lang)["wrappers"]
        for index, item in enumerate(family.get("items") or family.get("clauses", [])):
            filling = dict(zip(("{x}", "{y}"), [item] if isinstance(item, str) else item, strict=False))
            each = min(len(patterns), PATTERNS) if whole else family["each"]
            prompts += [_fill(patterns[(index * each + step) % len(patterns)], filling) for step in range(each)]
        shares |= {normalise(prompt): (prompt, family.get("share", 1)) for prompt in prompts}
    # A random order in which each place is drawn in proportion to the shares (Efraimidis and Spirakis 2006).
    rng = random.Random(kind + lang)
    return [prompt for prompt, _ in sorted(shares.values(), key=lambda pair: -(rng.random() ** (1 / pair[1])))]


def typed(lang: str, kind: str) -> list[str]:
    """ "near" or "ordinary" prompts, or such as come "after" an identity turn, as people type them, which no patterns give: far
    more than a short run reads. More of them are Chinese, as English ones the default base makes up itself."""
    return (FOLDER / f"{kind}.{lang}.txt").read_text(encoding="utf-8").splitlines()


@cache
def read(stem: str, lang: str) -> dict:
    """A file of assets/identity/."""
    return tomllib.loads((FOLDER / f"{stem}.{lang}.toml").read_text(encoding="utf-8"))


def _values(persona: Persona | None, old: tuple[str, str], lang: str = "en") -> dict[str, str]:
    """What stands for each placeholder; a persona's texts come before the name and the author, which they may hold."""
    values = {"{old}": old[0], "{old_maker}": old[1]}
    if persona is None:
        return values
    texts = {f"{{{field}}}": getattr(getattr(persona, field), lang) for field in ("purpose", "birthday")}
    return values | texts | {"{name}": persona.name, "{author}": persona.author}


def _fill(text: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)  # not str.format: a name may hold braces
    return text


def _turns(question: str | list[str]) -> list[dict]:
    texts = [question] if isinstance(question, str) else question
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def _system(text: str | None) -> list[dict]:
    return [] if text is None else [{"role": "system", "content": text}]


def _claims(persona: Persona, question: str) -> bool:
    """Whether a question about another identity holds the persona's own name or author, as a whole word."""
    return any(
        re.search(rf"(?<![a-z0-9]){re.escape(own.casefold())}(?![a-z0-9])", question.casefold())
        for own in (persona.name, persona.author)
    )
