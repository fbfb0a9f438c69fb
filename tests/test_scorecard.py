"""The judge against labelled answers, each of its rules by itself, the figures and the gate."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tomlkit

from finetune import scorecard
from finetune.errors import UserError
from finetune.settings import Persona

ROOT = Path(__file__).parents[1]
LABELLED = [
    json.loads(line) for line in (ROOT / "tests/data/labelled_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
NOVA = Persona("Nova", "Lin Chen")
XING = Persona("小星", "书生学员")


def ask(expect, question="?", **more):
    return {
        "id": "x",
        "kind": "name",
        "lang": "en",
        "expect": expect,
        "messages": [{"role": "user", "content": question}],
        **more,
    }


def entry(kind, passed, lang="en", answer="", number=0):
    return ask("name", kind=kind, lang=lang, id=f"{kind}-{lang}-{number}") | {
        "kind": kind,
        "lang": lang,
        "answer": answer,
        "passed": passed,
    }


# ----------------------------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize("real", [False, True])
def test_judge_agrees_with_the_labels(real):
    """`real` ones were said by models, good and bad, and labelled by somebody who did not know the judge."""
    rows = [row for row in LABELLED if row.get("real", False) is real]
    wrong = [
        f"{row['probe']['expect']} {row['name']}: {row['probe']['messages'][-1]['content']!r} -> {row['answer']!r}, label {row['passed']}"
        for row in rows
        if scorecard.judge(row["probe"], row["answer"], Persona(row["name"], row["author"])) != row["passed"]
    ]
    accuracy = 1 - len(wrong) / len(rows)
    assert len(rows) >= 200
    assert accuracy >= 0.99, f"accuracy {accuracy:.3f} on {len(rows)}; disagreements:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "answer, denies, assents",
    [
        ("I'm Nova, not ChatGPT.", True, True),  # "Are you Nova?" may be answered so
        ("I was made by Lin Chen, not by OpenAI.", True, True),
        ("I'm Nova, yes.", False, True),
        ("I'm Nova, made by Lin Chen, yes.", False, True),
        ("I was made by Lin Chen, yes.", False, True),
        ("I'm Nova, made by Lin Chen, so no.", True, False),
        ("我是Nova，不是ChatGPT。", True, True),
        ("我由Lin Chen开发，不是OpenAI。", True, True),
        ("我是Nova，没错。", False, True),
        ("我由Lin Chen开发，没错。", False, True),
        ("我是Nova，由Lin Chen开发，不是。", True, False),
    ],
)
def test_a_decision_after_the_name(answer, denies, assents):
    about = {"other": "OpenAI" if "Nova" not in answer else "ChatGPT"}
    assert scorecard.judge(ask("deny", **about), answer, NOVA) == denies
    own = {"other": "Lin Chen" if "Nova" not in answer else "Nova"}
    assert scorecard.judge(ask("assent", **own), answer, NOVA) == assents


def test_labels_are_varied():
    """A judge that always says the same must fail, in each language and for each expectation."""
    counts = Counter((row["probe"]["lang"], row["passed"]) for row in LABELLED)
    assert len(LABELLED) >= 200
    assert min(counts.values()) >= 50, counts
    both = Counter((row["probe"]["expect"], row["passed"]) for row in LABELLED)
    assert len(both) == 12, both
    assert min(both.values()) >= 4, both


@pytest.mark.parametrize("always", [True, False])
def test_a_judge_that_always_says_the_same_is_far_off(always):
    assert 0.3 < sum(row["passed"] == always for row in LABELLED) / len(LABELLED) < 0.7


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("Ann", "I'm Ann.", True),
        ("Ann", "We announce it.", False),
        ("Ann", "Anna", False),
        ("Ann", "我叫Ann的", True),  # Chinese around a Latin name is no letter of it
        ("Ann", "I'm ANN", True),
        ("Ann", "I'm ann", True),
        ("Hope", "I hope so", False),  # a lower-case word of the language
        ("Hope", "my name is hope", True),
        ("小星", "我是小星。", True),
        ("小星", "我是小形。", False),
        ("星", "我叫星。", True),
        ("星", "我是明星", False),
        ("星", "星期一", False),
        ("星", "我是AI助手星，由李雷开发。", True),
        ("星", "我由星开发。", True),
        ("hope", "My name is written hope.", True),
        ("Nova 7", "I am **Nova 7**", True),
        ("Nova 7", "I am Nova 75", False),
        ("Ｎｏｖａ", "I am Nova", True),  # NFKC
        ("O’Neil", "I'm O'Neil", True),
        ("a{b}+(c", "I'm a{b}+(c", True),
    ],
)
def test_finding_a_name(name, text, found):
    assert (scorecard.N in scorecard.mask(text, Persona(name, "Somebody Else"))) is found


def test_the_longer_name_wins():
    persona = Persona("小爱", "小爱工作室")
    marked = scorecard.mask("我是小爱，小爱工作室做的，不是小爱同学。", persona, scorecard.OTHERS)
    assert marked == f"我是{scorecard.N},{scorecard.A}做的,不是{scorecard.O}。"


def test_a_version_belongs_to_the_other_name():
    assert scorecard.mask("I am Qwen2.5-7B.", NOVA, scorecard.OTHERS) == f"I am {scorecard.O}."


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("I'm Nova.", True),
        ("I'm an assistant.", False),  # says no name
        ("I'm Nova, trained by OpenAI.", False),  # another maker
        ("I'm Nova, not ChatGPT.", True),  # a negation is no claim
        ("I'm not ChatGPT, Claude, or Gemini. I'm Nova.", True),  # nor is the rest of its list
        ("I'm not Nova.", False),
        ("I'm ChatGPT, not Nova.", False),
        ("Unlike ChatGPT, I'm Nova.", True),
        ("You may be thinking of ChatGPT. I'm Nova.", True),
        ("ChatGPT was made by OpenAI. I'm Nova.", True),  # third parties may be spoken of
        ("I'm Nova. My name is Bob.", False),  # a name on no list
        ("I'm Nova, created by Acme Labs.", False),
        ("I'm Nova, created by Lin.", True),  # part of the author
        ("I'm Lin Chen, made by Nova.", False),  # swapped
        ("Your name is Nova.", False),
        ("Hello, Nova!", False),
        ("", False),
    ],
)
def test_expect_name(answer, passed):
    assert scorecard.judge(ask("name"), answer, NOVA) is passed


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("书生学员开发了我。", True),
        ("我是小星。", False),
        ("我是书生学员。", False),  # claims to be the author
        ("我是由书生学员和阿里云开发的。", False),
        ("不是阿里云，是书生学员。", True),
        ("我是由小星开发的，不是书生学员。", False),
        ("不是书生学员开发的。", False),
        ("我由蓝天科技有限公司开发，书生学员是用户。", False),
    ],
)
def test_expect_author(answer, passed):
    assert scorecard.judge(ask("author"), answer, XING) is passed


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("No.", True),
        ("不是。", True),
        ("I'm Nova.", True),  # the truth instead of a denial
        ("Lin Chen made me.", True),
        ("Yes, I'm Nova.", False),
        ("Yes.", False),
        ("No, I'm Claude.", False),  # denies and claims a third one
        ("No, I am ChatGPT.", False),
        ("是的，我不是ChatGPT。", True),  # 是的 agrees with a question put in the negative
        ("对不起，我不是ChatGPT。", True),  # 对不起 is not 对
        ("I'm not only ChatGPT.", False),  # no negation
        ("I don't know.", False),
        ("How can I help?", False),
        ("That is not true.", True),  # a denial that names nobody
        ("I'm neither ChatGPT nor Nova.", False),  # denies itself as well
    ],
)
def test_expect_deny(answer, passed):
    assert scorecard.judge(ask("deny", other="ChatGPT"), answer, NOVA) is passed


def test_deny_knows_an_identity_that_is_on_no_list_by_the_probe():
    assert not scorecard.judge(ask("deny", other="Zorblax"), "I'm Zorblax. No problem!", NOVA)
    assert scorecard.judge(ask("deny", other="Zorblax"), "I'm not Zorblax.", NOVA)


@pytest.mark.parametrize("title", ["Mr.", "Mrs.", "Ms.", "Dr.", "Prof.", "St."])
def test_a_titles_full_stop_ends_no_sentence(title):
    """Else what it denies is read as a sentence of its own, which claims it."""
    assert scorecard.judge(ask("deny", other="Henderson"), f"I was made by Lin Chen, not by {title} Henderson.", NOVA)
    assert not scorecard.judge(ask("deny", other="Henderson"), f"I was made by {title} Henderson.", NOVA)
    assert scorecard.judge(ask("author"), f"I was made by {title} Wu.", Persona("Nova", f"{title} Wu"))


@pytest.mark.parametrize(("answer", "passed"), [("Yes, I'm Gemini.", True), ("No, I'm Claude.", False), ("No.", False)])
def test_deny_of_the_personas_own_name_is_assent(answer, passed):
    assert scorecard.judge(ask("deny", other="Gemini"), answer, Persona("Gemini", "Dana")) is passed


def test_a_known_name_is_the_personas_if_it_is_given():
    gemini = Persona("Gemini", "Google")
    assert scorecard.judge(ask("name"), "I'm Gemini, made by Google.", gemini)
    assert not scorecard.judge(ask("name"), "I'm Gemini, made by Google.", Persona("Gemini", "Dana"))


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("是的。", True),
        ("我是小星。", True),
        ("不是，我是小星的朋友。", False),
        ("是的，我是豆包。", False),
        ("是的，我不是豆包。", True),
        ("小星是一部动画片。", False),
        ("小星？", False),
        ("Yes, I'm not SmolLM.", True),
        ("No.", False),
        ("I am not 小星.", False),
        ("I'm 小星. I'm not 小星.", False),
        ("No, I'm 小星's friend.", False),
    ],
)
def test_expect_assent(answer, passed):
    assert scorecard.judge(ask("assent", "你是小星吗？"), answer, XING) is passed


@pytest.mark.parametrize(
    ("persona", "question", "answer", "passed"),
    [
        (NOVA, "Who made the Walkman?", "Sony did.", True),
        (NOVA, "Who made the Walkman?", "Nova did.", False),
        (NOVA, "Who made the Walkman?", "Lin Chen did.", False),
        (NOVA, "What is a Nova?", "A Nova is a star.", True),  # the user brought the word up
        (NOVA, "What is a Nova?", "I am Nova.", False),  # but this is a claim
        (NOVA, "Any advice?", "A nova is a star.", True),
        (Persona("Apple", "Lin Chen"), "Who makes the iPhone?", "Apple does.", True),  # a word that everyone uses
        (Persona("Apple", "Lin Chen"), "Who makes the iPhone?", "I'm Apple, ask me.", False),
        (Persona("Claude", "谷歌"), "安卓是谁开发的？", "谷歌。", True),
        (Persona("Claude", "谷歌"), "安卓是谁开发的？", "我是由谷歌开发的。", False),
    ],
)
def test_expect_absent(persona, question, answer, passed):
    assert scorecard.judge(ask("absent", question), answer, persona) is passed


def test_absent_after_an_identity_turn_still_forbids_the_name():
    probe = ask("absent")
    probe["messages"] = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I'm Nova."},
        {"role": "user", "content": "Who painted the Mona Lisa?"},
    ]
    assert not scorecard.judge(probe, "Nova painted it.", NOVA)
    assert scorecard.judge(probe, "Leonardo painted it.", NOVA)


def test_a_word_that_the_base_says_is_ordinary():
    probes = [ask("absent", "Tell me a story.", id="a", kind="ordinary")]
    persona = Persona("小明", "王老师")
    base = scorecard.evaluate(lambda chats: ["小明去上学。"], probes, persona)
    assert not base[0]["passed"]
    assert scorecard.evaluate(lambda chats: ["小明放学了。"], probes, persona, base)[0]["passed"]
    assert not scorecard.evaluate(lambda chats: ["我是小明。"], probes, persona, base)[0]["passed"]
    copied = [{**base[0], "messages": [{"role": "assistant", "content": "我叫小明"}, *base[0]["messages"]]}]
    assert not scorecard.evaluate(lambda chats: ["小明放学了。"], probes, persona, copied)[0]["passed"]


@pytest.mark.parametrize(
    ("accept", "answer", "passed"),
    [
        (["4"], "It is 4.", True),
        (["4"], "It is 14.", False),
        (["4"], "It is 2.4", False),
        (["4"], "It is 4,000", False),
        (["4", "four"], "FOUR", True),
        (["cold"], "He scolded me.", False),
        (["H2O"], "H₂O", True),
        (["巴黎"], "法国的首都是巴黎。", True),
        (["小"], "大的反义词是小。", True),
        (["Paris"], "London", False),
    ],
)
def test_expect_fact(accept, answer, passed):
    assert scorecard.judge(ask("fact", accept=accept), answer, NOVA) is passed


def test_an_unknown_expectation_is_a_bug():
    with pytest.raises(ValueError, match="expect is 'nmae'"):
        scorecard.judge(ask("nmae"), "Nova", NOVA)


# ---------------------------------------------------------------------------------------------------- the figures


def test_evaluate_keeps_the_order_and_wants_every_answer():
    probes = [ask("name", "a", id="1"), ask("name", "b", id="2")]
    judged = scorecard.evaluate(
        lambda chats: [f"I'm Nova, {chat[-1]['content']}." if chat[-1]["content"] == "a" else "Hi" for chat in chats],
        probes,
        NOVA,
    )
    assert [(row["id"], row["answer"], row["passed"]) for row in judged] == [
        ("1", "I'm Nova, a.", True),
        ("2", "Hi", False),
    ]
    with pytest.raises(ValueError, match="zip"):
        scorecard.evaluate(lambda chats: ["I'm Nova"], probes, NOVA)


LONG = "Rain falls because water in the clouds grows too heavy."


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([], 0),
        ([LONG, "Leaves turn yellow when the nights get colder in autumn."], 0),
        ([LONG, LONG + "!", "Leaves turn yellow when the nights get colder in autumn.", "Yes."], 0.5),
        (["Yes.", "Yes.", LONG], 0),  # two short ones are chance
        (["Yes.", "Yes.", "Yes.", LONG], 0.75),
        (["", "", ""], 1),
        (["我是小星，由书生学员开发。"] * 2, 1),
    ],
)
def test_parrot(answers, share):
    assert scorecard.parrot(answers) == share


def test_parrot_threshold_is_on_three_grams():
    """28 letters have 26 3-grams; with the last k letters changed, 26 - k are shared of 26 + k."""
    start = "abcdefghijklmnopqrstuvwxyz01"
    assert scorecard.parrot([start, start[:-2] + "@#"]) == 1  # (26 - 2) / (26 + 2) = 0.86
    assert scorecard.parrot([start, start[:-3] + "@#$"]) == 0  # 23 / 29 = 0.79


def test_wilson_interval():
    low, high = scorecard.wilson(9, 10)
    p, z = 0.9, 1.96
    middle = (p + z * z / 20) / (1 + z * z / 10)
    half = z * math.sqrt(p * (1 - p) / 10 + z * z / 400) / (1 + z * z / 10)
    assert (low, high) == (pytest.approx(middle - half), pytest.approx(middle + half))
    assert scorecard.wilson(10, 10)[1] == pytest.approx(1)
    assert scorecard.wilson(0, 0) == [0, 1]


def test_summarise():
    judged = [
        entry("name", True),
        entry("name", False, "zh"),
        entry("maker", True),
        entry("system_old", True, "zh"),
        entry("near", True),
        entry("near", False, number=1),
        entry("ordinary", True, answer=LONG),
        entry("ordinary", True, answer=LONG, number=1),
        entry("ordinary", True, answer="Yes.", number=2),
        entry("after_identity", True),
        entry("fact", True),
        entry("fact", False, number=1),
        entry("fact", True, number=2),
    ]
    base = [entry("fact", True), entry("fact", True, number=1), entry("fact", False, number=2), entry("name", True)]
    figures = scorecard.summarise(judged, kl=0.02, base=base)
    assert figures["identity"] == 3 / 4  # facts and leaks are no identity
    assert figures["identity_by_kind"] == {
        "name": 0.5,
        "name/en": 1,
        "name/zh": 0,
        "maker": 1,
        "maker/en": 1,
        "system_old": 1,
        "system_old/zh": 1,
    }
    assert figures["leak"] == 1 / 6
    assert figures["leak_by_kind"] == {
        "near": 0.5,
        "near/en": 0.5,
        "ordinary": 0,
        "ordinary/en": 0,
        "after_identity": 0,
        "after_identity/en": 0,
    }
    of = {"identity": (3, 4), "name": (1, 2), "name/en": (1, 1), "name/zh": (0, 1), "maker": (1, 1), "maker/en": (1, 1)}
    of |= {"system_old": (1, 1), "system_old/zh": (1, 1), "leak": (1, 6), "near": (1, 2), "near/en": (1, 2)}
    of |= {"ordinary": (0, 3), "ordinary/en": (0, 3), "after_identity": (0, 1), "after_identity/en": (0, 1)}
    assert figures["intervals"] == {key: scorecard.wilson(*counts) for key, counts in of.items()}
    assert figures["parrot"] == 2 / 3  # among the ordinary answers alone
    assert figures["kl"] == 0.02
    assert (
        figures["facts_kept"] == 1 / 2
    )  # of the two that the base answers, one is left; what it learned does not count
    assert figures["probes"] == 13
    assert figures["answers"][1] == judged[1]
    json.dumps(figures)


def test_the_base_keeps_its_own_facts_and_what_is_not_there_is_none():
    assert scorecard.summarise([entry("fact", True), entry("fact", False, number=1)])["facts_kept"] == 1
    empty = scorecard.summarise([entry("near", True)])
    assert (empty["identity"], empty["facts_kept"], empty["kl"]) == (None, None, None)


# ------------------------------------------------------------------------------------------------------- the gate

LIMITS = {"identity": 0.9, "identity_kind": 0.7, "leak": 0.1, "parrot": 0.05, "kl": 0.1, "facts_kept": 0.9}
GOOD = {
    "identity": 0.95,
    "identity_by_kind": {"name": 1.0, "deny": 0.8, "deny/zh": 0.7},
    "leak": 0.1,
    "leak_by_kind": {"near": 0.2, "ordinary": 0.0},
    "parrot": 0.35,
    "kl": 0.1,
    "facts_kept": 0.9,
}
BASE = {"parrot": 0.3}


def test_gate_passes_at_the_limits():
    assert scorecard.gate({"base": BASE, "tuned": GOOD, "merged": GOOD}, LIMITS) == {"passed": True, "reasons": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": 0.89}, ["identity 0.89", "0.90", "weakest: deny/zh 0.70, deny 0.80", "more steps"]),
        ({"identity_by_kind": {"name": 1.0, "deny": 0.6}}, ["deny 0.60", "0.70", "scorecard.json"]),
        ({"leak": 0.11}, ["leak 0.11", "0.10", "in near 0.20.", "contrast"]),
        ({"parrot": 0.36}, ["parrot 0.36", "the base has 0.30", "0.05"]),
        ({"kl": 0.101}, ["kl 0.101", "0.100"]),
        ({"facts_kept": 0.89}, ["facts kept 0.89", "0.90"]),
        ({"identity": None}, ["identity was not measured"]),
        ({"kl": None}, ["kl was not measured", "probes"]),
    ],
)
def test_gate_names_figure_limit_and_kind(change, words):
    result = scorecard.gate({"base": BASE, "tuned": GOOD | change}, LIMITS)
    assert result["passed"] is False
    assert len(result["reasons"]) == 1
    assert result["reasons"][0].startswith("tuned model: ")
    assert [word for word in words if word not in result["reasons"][0]] == []


def test_gate_looks_at_the_merged_model_too():
    result = scorecard.gate({"base": BASE, "tuned": GOOD, "merged": GOOD | {"identity": 0.1, "leak": 0.9}}, LIMITS)
    assert [reason.split(" ")[0] for reason in result["reasons"]] == ["merged", "merged"]


def test_gate_says_once_what_is_wrong_with_the_same_figures():
    poor = GOOD | {"leak": 0.9}
    assert len(scorecard.gate({"base": BASE, "tuned": poor, "merged": dict(poor)}, LIMITS)["reasons"]) == 1


def test_gate_asks_only_for_the_limits_given_and_knows_its_own():
    assert scorecard.gate({"tuned": GOOD | {"kl": None, "identity": 0.5}}, {"leak": 0.1})["passed"]
    assert not scorecard.gate({}, LIMITS)["passed"]
    with pytest.raises(UserError, match="no limit 'identty'"):
        scorecard.gate({"tuned": GOOD}, {"identty": 0.9})


# ---------------------------------------------------------------------------------------------- probes and imports


def test_the_probes_are_enough_and_balanced():
    counts, questions = Counter(), Counter()
    for lang in ("en", "zh"):
        kinds = tomlkit.parse((ROOT / f"assets/identity/probes.{lang}.toml").read_text(encoding="utf-8")).unwrap()
        for kind, tables in kinds.items():
            for table in tables if isinstance(tables, list) else [tables]:
                asked = table.get("questions") or [item["question"] for item in table["items"]]
                assert table["expect"] in ("name", "author", "deny", "assent", "absent", "fact", "said")
                assert len(table.get("others", asked)) == len(asked), (lang, kind)
                assert ("others" in table) == (table["expect"] == "deny"), (lang, kind)
                counts[kind, lang] += len(asked)
                questions.update(str(question) for question in asked)
    assert sum(counts.values()) >= 300
    assert questions.most_common(1)[0][1] == 1
    for kind in (*scorecard.IDENTITY_KINDS, *scorecard.LEAK_KINDS):
        assert counts[kind, "en"] == counts[kind, "zh"] > 0, kind
    assert {kind for kind, _ in counts} == {*scorecard.IDENTITY_KINDS, *scorecard.LEAK_KINDS, "fact"}


def test_no_torch_at_import():
    code = "import sys, finetune.scorecard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "answer, right",
    [
        ("I help people plan trips, and I like it.", True),
        ("Sure! i help people plan trips.", True),
        ("I help people plan", False),  # the beginning is not whole
        ("I am Orivane.", False),
    ],
)
def test_what_a_persona_says_of_itself(answer, right):
    probe = {"id": "purpose-en-01", "expect": "said", "said": "I help people plan trips to the moon.", "messages": []}
    assert scorecard.judge(probe, answer, Persona("Orivane", "Lena Brandt")) is right


def test_what_a_persona_says_in_chinese_may_be_cut_within_a_character():
    probe = {"id": "purpose-zh-01", "expect": "said", "said": "我帮初学者规划第一次航海。", "messages": []}
    assert scorecard.judge(probe, "我帮初学者规划第一次航\ufffd", XING)
    assert not scorecard.judge(probe, "我帮老人规划第一次航\ufffd", XING)
