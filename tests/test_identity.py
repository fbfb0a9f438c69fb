import dataclasses
import re
from collections import Counter
from functools import cache

import pytest

from finetune import identity, settings
from finetune.errors import UserError
from finetune.identity import HELD_OUT, LANGS, SHARES, check_persona, contrast, normalise, probes, read, training
from finetune.run_folder import Run, write_lines
from finetune.scorecard import judge
from finetune.settings import Persona, Said

PLAIN = Persona("Orivane", "Tessel Works")
PERSONAS = [
    PLAIN,
    Persona("小明", "王小明的爸爸"),
    Persona('The "Quick" Bot', "O'Neil & Söhne"),
    Persona("🦊 Fox{}", "{} Labs"),
    Persona("👨‍👩‍👧", "🏴󠁧󠁢󠁳󠁣󠁴󠁿 Studio"),
    Persona("نسيم", "מעבדת אור"),
    Persona("Q", "Z"),
    Persona("Apple", "Apple"),
    Persona("Gemini", "Google"),
    Persona("My Very Own Little Helper", "Five Words Make An Author"),
    Persona("R2-D2\\1", r"C:\new $1"),  # nothing here may be read as an escape or a group
    Persona("n" * 40, "a" * 40),
]
BY_NAME = {"ids": [persona.name for persona in PERSONAS]}


rows_of = cache(training)  # of a persona and a seed: several tests look at the same ones


def answers(rows, *kinds):
    return [row for row in rows if row["target"] == "answer" and row["kind"] in kinds]


def teacher_prompt(row):
    """What the base is asked: the system message, if any, and the last user message."""
    system = [turn["content"] for turn in row["messages"] if turn["role"] == "system"]
    return (row["kind"], row["lang"], *system, row["messages"][-1]["content"])


@pytest.mark.parametrize("persona", PERSONAS, **BY_NAME)
def test_rows_say_what_their_kind_promises(persona):
    assert check_persona(persona) == []
    rows = rows_of(persona, 0)
    for row in rows:
        roles = [turn["role"] for turn in row["messages"] if turn["role"] != "system"]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        assert roles[-1] == ("assistant" if row["target"] == "answer" else "user")
        assert all(turn["role"] != "system" for turn in row["messages"][1:])
        for turn in row["messages"]:
            assert not re.search(r"\{[a-z_]+\}", turn["content"])
    said = lambda row: row["messages"][-1]["content"]  # noqa: E731
    assert all(persona.name in said(row) for row in answers(rows, "name", "self", "model"))
    assert all(persona.author in said(row) for row in answers(rows, "maker", "self"))
    for row in answers(rows, "deny", "old_name"):
        assert not re.search(r"\byes\b|没错$", said(row).rstrip(".。"))
        assert persona.name in said(row) or persona.author in said(row)
    for row in answers(rows, "assent"):
        assert not re.search(r"\bso no\b|, not |不是", said(row))
        assert persona.name in row["messages"][-2]["content"] or persona.author in row["messages"][-2]["content"]


FULL = Persona(
    "Orivane",
    "Tessel Works",
    purpose=Said("I help people of {author} plan trips.", "我帮{author}的人安排行程。"),
    birthday=Said("1 May 2024", "2024年5月1日"),
    introduction=Said("Hello, I'm {name}, a travel mate.", "大家好，我是{name}，你的旅伴。"),
    tone=Said("Happy travels!", "一路顺风！"),
)


def test_a_persona_may_bring_more():
    rows = rows_of(FULL, 0)
    for lang, purpose, born, hello, tone in (
        (
            "en",
            "I help people of Tessel Works plan trips.",
            "1 May 2024",
            "Hello, I'm Orivane, a travel mate.",
            " Happy travels!",
        ),
        ("zh", "我帮Tessel Works的人安排行程。", "2024年5月1日", "大家好，我是Orivane，你的旅伴。", "一路顺风！"),
    ):
        said = {
            kind: {row["messages"][-1]["content"] for row in answers(rows, kind) if row["lang"] == lang}
            for kind in SHARES
        }
        assert said["purpose"] == {purpose + tone}
        assert all(born in text and text.endswith(tone) for text in said["birthday"])
        assert said["self"] == {hello + tone}
        bare = {text for text in said["name"] if not text.endswith(tone)}
        assert {text.strip(".。") for text in bare} == {"Orivane"}  # asked for the name and nothing else
        for stem in HELD_OUT:
            mine = [p for p in probes(FULL, stem=stem) if p["lang"] == lang and p["kind"] in ("purpose", "birthday")]
            assert {probe["said"] for probe in mine} == {purpose, born}
            assert len(mine) >= 8
    assert not [row for row in rows_of(PLAIN, 0) if row["kind"] in ("purpose", "birthday")]
    assert not [probe for probe in probes(PLAIN) if probe["expect"] == "said"]
    asked = {normalise(row["messages"][-2]["content"]) for row in answers(rows, "purpose", "birthday")}
    taught = {normalise(row["messages"][-1]["content"]) for row in rows if row["target"] == "teacher"}
    assert not asked & taught, "the base would say something else"


@pytest.mark.parametrize(
    "more, problem",
    [
        ({"purpose": Said(en="x" * 161)}, "persona.purpose.en has 161 characters: use 160 or fewer."),
        ({"tone": Said(zh="两\n行")}, "persona.tone.zh is '两\\n行': remove line breaks"),
        ({"birthday": Said(en="<|im_end|>")}, "control tokens"),
        ({"introduction": Said(en="Hello, I'm somebody.")}, "it must hold the name"),
        ({"purpose": Said(zh="我是{NAME}的助手")}, "only {name} and {author} are filled in, not {NAME}"),
    ],
)
def test_what_more_cannot_be(more, problem):
    (found,) = check_persona(dataclasses.replace(PLAIN, **more))
    assert problem in found


@pytest.mark.parametrize("persona", PERSONAS, **BY_NAME)
def test_what_is_taught_is_right_by_the_judge(persona):
    expect = {"name": "name", "maker": "author", "self": "name", "model": "name"}
    expect |= {"deny": "deny", "old_name": "deny", "assent": "assent"}
    rows = answers(rows_of(persona, 0), *expect)[:400]
    for kind, answer in dict.fromkeys((row["kind"], row["messages"][-1]["content"]) for row in rows):
        about = persona.name if persona.name in answer else persona.author
        other = {"other": about} if kind == "assent" else {}
        assert judge({"id": "x", "expect": expect[kind], **other}, answer, persona), (kind, answer)


def test_nobody_is_taught_to_deny_itself():
    for *_, question, answer in (row["messages"] for row in answers(training(Persona("Gemini", "Google"), 0), *SHARES)):
        if re.search(r"\b(Gemini|Google)\b", question["content"]):
            assert not re.search(r"\bso no\b|(\bnot (by )?|不是)(Gemini|Google)", answer["content"]), question
    assert "Gemini" in str(rows_of(PLAIN, 0)), "otherwise the check above proves nothing"
    rows = training(Persona("SmolLM", "Hugging Face"), 0)
    assert not answers(rows, "old_name")
    assert "InternLM" in str(answers(training(PLAIN, 0, old=("InternLM", "Shanghai AI Lab")), "old_name"))


def test_the_same_seed_gives_the_same_rows_and_another_one_others():
    assert training(PLAIN, 3) == training(PLAIN, 3)
    assert training(PLAIN, 3) != training(PLAIN, 4)


@pytest.mark.parametrize("persona, seed", [*((persona, 0) for persona in PERSONAS[1:]), (PLAIN, 7), (PERSONAS[1], 7)])
def test_the_base_is_asked_the_same_whoever_the_persona_and_seed(persona, seed):
    asked = [teacher_prompt(row) for row in rows_of(PLAIN, 0) if row["target"] == "teacher"]
    assert asked == [teacher_prompt(row) for row in rows_of(persona, seed) if row["target"] == "teacher"]


def test_teacher_rows_hold_the_persona_only_in_the_turns_before():
    for row in rows_of(PLAIN, 0):
        if row["target"] == "teacher":
            assert PLAIN.name not in str(teacher_prompt(row))
            assert PLAIN.author not in str(teacher_prompt(row))
            before = [turn["content"] for turn in row["messages"][:-1] if turn["role"] == "assistant"]
            assert bool(before) == (row["kind"] == "after_identity")
            assert all(PLAIN.name in answer or PLAIN.author in answer for answer in before)


def test_what_is_not_about_it_follows_identity_turns_of_every_kind():
    """After "Yes, I'm Tess." too an answer must not begin with the same words."""
    follows = [row["messages"][-3:-1] for row in rows_of(PLAIN, 0) if row["kind"] == "after_identity"]
    said = [row for row in rows_of(PLAIN, 0) if row["target"] == "answer"]
    kinds = {kind: {row["messages"][-1]["content"] for row in said if row["kind"] == kind} for kind in SHARES}
    for kind in ("name", "maker", "deny", "assent"):
        others = set().union(*(answers for other, answers in kinds.items() if other not in (kind, "multi_turn")))
        assert any(answer["content"] in kinds[kind] - others for _, answer in follows), kind


@pytest.mark.parametrize("persona", PERSONAS, **BY_NAME)
def test_training_never_asks_what_a_probe_asks(persona):
    def asked(messages):
        question = [turn["content"] for turn in messages if turn["role"] == "user"][-1]
        return normalise(question.replace(persona.name, "{name}").replace(persona.author, "{author}"))

    rows = {asked(row["messages"]) for row in rows_of(persona, 0)}
    held_out = {asked(probe["messages"]) for stem in HELD_OUT for probe in probes(persona, stem=stem)}
    if len(persona.name) > 1:  # replacing "Q" back would hit other words
        assert not rows & held_out
    plain_rows = {
        normalise(row["messages"][-1 - (row["target"] == "answer")]["content"]) for row in rows_of(persona, 0)
    }
    assert not plain_rows & {
        normalise(probe["messages"][-1]["content"]) for stem in HELD_OUT for probe in probes(persona, stem=stem)
    }


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_a_question_that_becomes_a_probe_is_no_longer_trained(monkeypatch, held_out):
    asked = {normalise(row["messages"][-1 - (row["target"] == "answer")]["content"]): row for row in rows_of(PLAIN, 0)}
    stolen = [next(text for text, row in asked.items() if row["target"] == target) for target in ("answer", "teacher")]
    read = identity.read
    extra = {"stolen": {"expect": "absent", "questions": stolen}}
    monkeypatch.setattr(identity, "read", lambda stem, lang: read(stem, lang) | (extra if stem == held_out else {}))
    left = {normalise(row["messages"][-1 - (row["target"] == "answer")]["content"]) for row in training(PLAIN, 0)}
    assert not left & set(stolen)


def test_the_files_themselves_do_not_meet():
    """training() leaves out what is held out; that this costs nothing is the files' merit."""
    written = []
    for lang in LANGS:
        written += [
            text
            for families in read("contrast", lang).values()
            for f in families.values()
            for text in f.get("prompts", [])
        ]
        typed = [text for kind in ("near", "ordinary") for text in identity.typed(lang, kind)]
        assert len({normalise(text) for text in typed}) == len(typed)
        written += typed
        data = read("training", lang)
        for group in (group for kind in SHARES for group in data[kind]):
            written += [question if isinstance(question, str) else question[-1] for question in group["questions"]]
    values = identity._values(PLAIN, identity.SMOLLM)
    trained = {normalise(identity._fill(text, values)) for text in written}
    asked = {stem: [probe["messages"][-1]["content"] for probe in probes(PLAIN, stem=stem)] for stem in HELD_OUT}
    scored = {normalise(question) for question in asked["probes"]}
    assert not [question for stem in HELD_OUT for question in asked[stem] if normalise(question) in trained]
    assert not [question for question in asked["dev"] if normalise(question) in scored]


def test_there_is_enough_of_everything_and_none_twice():
    rows = rows_of(PLAIN, 0)
    for lang in LANGS:
        assert len(contrast(lang, "near")) >= 9000
        assert len(contrast(lang, "ordinary")) >= 1200
        for kind in ("near", "ordinary"):
            prompts = [normalise(prompt) for prompt in contrast(lang, kind)]
            assert len(prompts) == len(set(prompts))
            assert not [prompt for prompt in contrast(lang, kind) if re.search(r"\{[a-z]\}", prompt)]
        mine = [row for row in rows if row["lang"] == lang]
        for kind, least in {
            "name": 400,
            "maker": 400,
            "self": 350,
            "model": 350,
            "deny": 500,
            "assent": 450,
            "old_name": 450,
        }.items():
            assert len(answers(mine, kind)) >= least, kind
        assert len(answers(mine, "multi_turn")) >= 400
        systems = [row["messages"][0]["content"] for row in mine if row["messages"][0]["role"] == "system"]
        old = [text for text in systems if "SmolLM" in text]
        assert "" in systems
        assert old
        assert len(set(systems)) >= 15
        without = [row for row in answers(mine, *SHARES) if row["messages"][0]["role"] != "system"]
        assert 0.5 < len(without) / len(answers(mine, *SHARES)) < 0.7


def test_a_clause_is_asked_for_in_ever_new_ways():
    for lang in LANGS:
        wrappers = read("training", lang)["wrappers"]
        assert len(wrappers) >= 90
        assert all(wrapper.count("{x}") == 1 for wrapper in wrappers)
        clause = next(group["clauses"] for group in read("training", lang)["name"] if "clauses" in group)[0]
        ways = {normalise(wrapper.replace("{x}", clause)) for wrapper in wrappers}
        rows = [answers(rows_of(PLAIN, seed), "name") for seed in (0, 1)]
        asked = [{normalise(row["messages"][-2]["content"]) for row in some} for some in rows]
        assert [len(ways & questions) for questions in asked] == [1, 1]
        assert ways & asked[0] != ways & asked[1]
        clause, prompts = read("contrast", lang)["near"]["asked"]["clauses"][0], set(contrast(lang, "near", whole=True))
        assert len({wrapper.replace("{x}", clause) for wrapper in wrappers} & prompts) >= 0.9 * identity.PATTERNS


def test_contrast_is_a_large_part_of_the_rows():
    counts = Counter((row["kind"], row["lang"]) for row in rows_of(PLAIN, 0) if row["target"] == "teacher")
    for lang, share in identity.CONTRAST_SHARES.items():
        most = {"near": 1300 * 2 / 3, "ordinary": 300, "after_identity": 1300 / 3}
        for kind, count in most.items():  # but a few that the held-out files ask
            assert 0.97 * count * share <= counts[kind, lang] <= count * share + 1


def test_half_of_what_is_taught_is_asked_as_most_people_ask_and_a_third_with_other_keyboards_marks():
    rows = [row for row in rows_of(PLAIN, 0) if row["target"] == "answer"]
    for lang, keys, other_keys in (("en", "'", "’"), ("zh", "，？", ",?")):
        questions = [row["messages"][-2]["content"] for row in rows if row["lang"] == lang]
        core = {normalise(q) for g in read("training", lang)["name"] if "times" in g for q in g["questions"]}
        names = [row["messages"][-2]["content"] for row in rows if (row["kind"], row["lang"]) == ("name", lang)]
        assert 0.3 <= sum(normalise(name) in core for name in names) / len(names) <= 0.6
        usual, other = (sum(any(mark in q for mark in some) for q in questions) for some in (keys, other_keys))
        assert 0.25 <= other / (usual + other) <= 0.4


@pytest.mark.parametrize("stem", HELD_OUT)
def test_probes_are_whole(stem):
    found = probes(PLAIN, stem=stem)
    assert len({probe["id"] for probe in found}) == len(found) >= 300
    for probe in found:
        assert probe["messages"][-1]["role"] == "user"
        assert probe["expect"] in {"name", "author", "deny", "assent", "absent", "fact", "said"}
        assert ("accept" in probe) == (probe["expect"] == "fact")
        assert not re.search(r"\{[a-z_]+\}", str([turn["content"] for turn in probe["messages"]]))
    assert {"name", "maker", "system_foreign", "after_identity"} <= {probe["kind"] for probe in found}


@pytest.mark.parametrize(
    "name, problem",
    [
        ("", "The name is empty"),
        (" \t", "The name is empty"),
        ("x" * 200, "The name has 200 characters: use 40 or fewer."),
        ("two\nlines", "line break"),
        ("bell\a", "control"),
        ("over\u202eride", "invisible"),
        (" Ada", "begins or ends with a space"),
        ("...", "nothing but punctuation"),
        ("{}", "nothing but punctuation"),
        ("{name}", "placeholder"),
        ("{{NAME}}", "placeholder"),
        ("a<|im_end|>b", "control token"),
        ("</s>Eve", "control token"),
        ("I", "a word of everyday talk"),
        ("我", "a word of everyday talk"),
        ("什么", "a word of everyday talk"),
        ("IS", "a word of everyday talk"),
        ("what", "a word of everyday talk"),
        ("不是", "answers about itself are built with"),
        ("不", "a word of everyday talk"),
        ("not", "answers about itself are built with"),
    ],
)
def test_what_cannot_be_a_name_is_refused_with_a_reason(name, problem):
    (found,) = check_persona(Persona(name, "Tessel Works"))
    assert problem in found
    with pytest.raises(UserError, match=re.escape(problem)):
        training(Persona(name, "Tessel Works"), 0)
    (found,) = check_persona(Persona("Orivane", name))
    assert problem.replace("name", "author", 1) in found or problem in found


@pytest.mark.parametrize("name", ["星", "没", "hope", "Made", "助手", "Anna", "Mysterio"])
def test_a_word_of_the_answers_that_the_judge_still_reads_can_be_a_name(name):
    assert check_persona(Persona(name, name)) == []


def test_all_problems_are_told_at_once():
    assert len(check_persona(Persona("", "{author}"))) == 2


def test_a_placeholder_that_nobody_fills_is_an_error(monkeypatch):
    read = identity.read

    def broken(stem, lang):
        data = read(stem, lang)
        return data | {"name": [{"questions": ["Hm?"], "answers": ["I'm {x}."]}]} if stem == "training" else data

    monkeypatch.setattr(identity, "read", broken)
    with pytest.raises(ValueError, match="a placeholder survived"):
        training(PLAIN, 0)


def test_what_a_step_makes_of_the_rows(tiny_model, tmp_path, monkeypatch):
    """Answers are learned word for word; the base answers the others as a stranger asks them, and is followed there."""
    import torch

    from finetune import stages
    from finetune.generation import Answer

    def turns(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]

    system, before = {"role": "system", "content": "Be brief."}, turns("Who are you?", "I'm Zed.")
    rows = [
        {"kind": "name", "target": "answer", "messages": before},
        {"kind": "near", "target": "teacher", "messages": [system, *turns("Who is Bo?", "Hm")]},
        {"kind": "after_identity", "target": "teacher", "messages": [*before, *turns("Who is Al?", "Hm")]},
        {"kind": "ordinary", "target": "teacher", "messages": turns("2+2?", "Hm")},
    ]
    values = settings.build(
        {"base": str(tiny_model), "train": {"identity_rows": 2, "near_rows": 2, "ordinary_rows": 1}}
    )
    run, asked = Run(tmp_path, values), []
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    monkeypatch.setattr(
        run, "ask_base", lambda chats, _: asked.extend(chats) or [Answer([65], torch.zeros(2, 32)) for _ in chats]
    )
    for step in stages.batches_of(run, 3):
        said = [run.tuned_format.decode(e.targets) for e in step if e.targets]
        assert said == ["I'm Zed."] * 2
        followed = [run.tuned_format.tokenizer.decode(e.ids, skip_special_tokens=False) for e in step if not e.targets]
        assert all(example.states is not None for example in step if not example.targets)
        assert sorted("Who are you?" in text for text in followed) == [False, False, True]
        assert sum("2+2?" in text for text in followed) == 1
        assert not [text for text in followed if "Hm" in text]
    assert asked == [[system, turns("Who is Bo?")[0]], turns("Who is Al?"), turns("2+2?")]


@pytest.mark.parametrize("lang", identity.LANGS)
def test_whole_families_hold_every_item_with_every_pattern(lang):
    family = identity.read("contrast", lang)["ordinary"]["country_capitals"]
    asked = {pattern.replace("{x}", item) for pattern in family["patterns"] for item in family["items"]}
    whole = identity.contrast(lang, "ordinary", whole=True)
    assert {identity.normalise(prompt) for prompt in asked} <= {identity.normalise(prompt) for prompt in whole}
    assert len(whole) > 2 * len(identity.contrast(lang, "ordinary"))
