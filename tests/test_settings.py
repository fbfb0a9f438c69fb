import dataclasses
import re
from pathlib import Path

import pytest

from finetune import settings
from finetune.errors import UserError
from finetune.settings import Settings

NASTY = [
    "小星",
    'O\'Neil "the 2nd"',
    "{name} {} %s",
    "\\n\\u0041",
    "👩‍🔬",
    "שלום",
    "a = 1 # b",
    "line\nbreak\ttab",
    "'''",
    '"""',
    "é",
]


def problems_of(*layers: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        settings.build(*layers)
    return list(caught.value.problems)


def test_later_layers_win_and_the_rest_is_default():
    built = settings.build(
        {"seed": 1, "train": {"steps": 20, "rank": 8}, "persona": {"name": "A"}},
        {"train": {"steps": 30}, "persona": {"author": "B"}},
        {},
        {"seed": 2},
    )
    train = dataclasses.replace(settings.Train(), steps=30, rank=8)
    assert built == dataclasses.replace(Settings(), seed=2, train=train, persona=settings.Persona("A", "B"))
    assert settings.build() == Settings()


def test_a_whole_number_is_a_number_too():
    built = settings.build({"train": {"kl_weight": 3, "learning_rate": 0}})
    assert (built.train.kl_weight, built.train.learning_rate) == (3.0, 0.0)
    assert type(built.train.kl_weight) is float


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sead": 1}, "Unknown setting sead; did you mean seed?"),
        ({"trian": {"steps": 1}}, "Unknown setting trian; did you mean train?"),
        ({"train": {"stpes": 1}}, "Unknown setting train.stpes; did you mean train.steps?"),
        ({"steps": 1}, "Unknown setting steps; did you mean train.steps?"),  # the section forgotten
        ({"gate": {"learning_rte": 1}}, "Unknown setting gate.learning_rte; did you mean train.learning_rate?"),
        (
            {"xyz": 1},
            "Unknown setting xyz; known here: base, old_name, old_maker, task, method, seed, data, skip_bad, persona, vision, train, gate, merge.",
        ),
        (
            {"persona": {"": 1}},
            "Unknown setting persona.; known here: persona.name, persona.author, persona.purpose, persona.birthday, "
            "persona.introduction, persona.tone.",
        ),
        ({"merge": {"qqqqqqqqq": 1}}, "Unknown setting merge.qqqqqqqqq; known here: merge.dtype."),
        ({"train": 5}, "Setting train is a section: write train.KEY=VALUE."),
        ({"seed": "1"}, "seed is '1'; it must be a whole number."),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number."),
        ({"seed": True}, "seed is True; it must be a whole number."),
        ({"seed": -1}, "seed is -1; it must be at least 0."),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be at most 9223372036854775807."),
        ({"train": {"steps": 0}}, "train.steps is 0; it must be at least 1."),
        ({"train": {"rank": 0}}, "train.rank is 0; it must be at least 1."),
        ({"train": {"checkpoint_every": 0}}, "train.checkpoint_every is 0; it must be at least 1."),
        ({"train": {"identity_rows": 0}}, "train.identity_rows is 0; it must be at least 1."),
        ({"train": {"kl_weight": "3"}}, "train.kl_weight is '3'; it must be a number."),
        ({"train": {"kl_weight": False}}, "train.kl_weight is False; it must be a number."),
        ({"train": {"kl_weight": -0.5}}, "train.kl_weight is -0.5; it must be at least 0."),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate is nan; it must be a finite number."),
        ({"gate": {"kl": float("inf")}}, "gate.kl is inf; it must be a finite number."),
        ({"persona": {"name": 42}}, "persona.name is 42; it must be text, in quotes."),
        ({"persona": {"name": {"first": "A"}}}, "persona.name is {'first': 'A'}; it must be text, in quotes."),
        ({"method": "dora"}, "method is 'dora'; it must be lora or qlora or full."),
        ({"merge": {"dtype": ["float32"]}}, "merge.dtype is ['float32']; it must be float32 or bfloat16 or float16."),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_a_wrong_setting_is_refused_in_words(values, words):
    assert problems_of(values) == [words]


def test_zero_rows_of_contrast_are_allowed():
    assert settings.build({"train": {"near_rows": 0, "ordinary_rows": 0}}).train.near_rows == 0


def test_all_problems_come_at_once_and_what_is_right_is_kept():
    layers = [{"sead": 1, "seed": 3, "train": {"steps": "x", "rank": 4}}, {"method": "dora", "persona": {"name": "N"}}]
    kept, problems = settings.collect(*layers)
    assert problems == problems_of(*layers)
    assert problems == [
        "Unknown setting sead; did you mean seed?",
        "train.steps is 'x'; it must be a whole number.",
        "method is 'dora'; it must be lora or qlora or full.",
    ]
    assert kept == settings.build({"seed": 3, "train": {"rank": 4}, "persona": {"name": "N"}})


def test_every_default_setting_may_be_written_and_keeps_its_type():
    """Each key that settings.toml holds is known, at every level, and its own value is right."""
    assert settings.build(dataclasses.asdict(Settings())) == Settings()


def test_presets_build_and_the_default_one_is_there():
    assert settings.DEFAULT_PRESET in settings.preset_names()
    files = {file.stem for file in settings.PRESETS.iterdir()} - {"bases"}
    assert settings.preset_names() == sorted(files | settings.read_toml(settings.BASES).keys())
    for name in settings.preset_names():
        values = settings.preset(name)
        assert settings.build(values) != Settings()
        assert "persona" not in values


def test_an_unknown_preset_is_refused_in_words():
    with pytest.raises(UserError) as caught:
        settings.preset("smolm2-135m")
    assert str(caught.value) == "There is no preset 'smolm2-135m'; did you mean smollm2-135m-instruct?"
    with pytest.raises(UserError) as caught:
        settings.preset("qqq")
    assert str(caught.value) == f"There is no preset 'qqq'; presets: {', '.join(settings.preset_names())}."


@pytest.mark.parametrize("data", [b"seed = = 1", b"[train\n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_broken_toml_is_refused_in_words(tmp_path, data):
    file = tmp_path / "settings.toml"
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))} is not valid TOML: .+\. Mend or remove it\.$"):
        settings.read_toml(file)


@pytest.mark.parametrize(
    "text, values",
    [
        ("seed=7", {"seed": 7}),
        ("train.steps=20", {"train": {"steps": 20}}),
        (" train.steps = 20 ", {"train": {"steps": 20}}),
        ("train.learning_rate=5e-4", {"train": {"learning_rate": 0.0005}}),
        ("train.kl_weight=-1.5", {"train": {"kl_weight": -1.5}}),
        ("persona.name=小星", {"persona": {"name": "小星"}}),
        ("persona.name=a=b=c", {"persona": {"name": "a=b=c"}}),
        ('persona.name="42"', {"persona": {"name": "42"}}),
        ("persona.name='it\\s'", {"persona": {"name": "it\\s"}}),
        ('persona.name="half', {"persona": {"name": '"half'}}),
        ("persona.name=O'Neil # 2", {"persona": {"name": "O'Neil # 2"}}),
        ("persona.name=", {"persona": {"name": ""}}),
        ("persona.birthday.en=2024-05-01", {"persona": {"birthday": {"en": "2024-05-01"}}}),
        ("persona.name=20 steps", {"persona": {"name": "20 steps"}}),
        ("merge.dtype=bfloat16", {"merge": {"dtype": "bfloat16"}}),
        ("x=true", {"x": True}),
        ("a.b.c.d=1", {"a": {"b": {"c": {"d": 1}}}}),
    ],
)
def test_assignments(text, values):
    parsed = settings.parse_assignment(text)
    assert parsed == values
    while isinstance(parsed, dict):
        parsed, values = next(iter(parsed.values())), next(iter(values.values()))
    assert type(parsed) is type(values)  # True is not 1


@pytest.mark.parametrize("text", ["train.steps", "", "=5", " = "])
def test_what_is_no_assignment_is_refused_in_words(text):
    with pytest.raises(UserError) as caught:
        settings.parse_assignment(text)
    assert str(caught.value) == f"--set {text!r}: write it as section.key=value, for example train.steps=20."


@pytest.mark.parametrize("name", NASTY)
def test_written_settings_come_back_the_same(tmp_path, name):
    file = tmp_path / "settings.toml"
    written = settings.build(
        {"persona": {"name": name, "author": name[::-1]}, "train": {"learning_rate": 1e-7}, "seed": 9}
    )
    settings.write(Settings(), file)
    settings.write(written, file)
    assert settings.build(settings.read_toml(file)) == written
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_write_leaves_the_old_settings(tmp_path, monkeypatch):
    file = tmp_path / "settings.toml"
    settings.write(Settings(), file)
    before = file.read_bytes()

    def killed(self: Path, text: str, encoding: str) -> None:
        with self.open("w", encoding=encoding) as stream:
            stream.write(text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        settings.write(settings.build({"seed": 5}), file)
    assert file.read_bytes() == before


def test_differences_name_key_and_both_values():
    new = settings.build({"seed": 1, "train": {"steps": 20}, "persona": {"name": "小月"}})
    assert settings.differences(Settings(), Settings()) == []
    assert settings.differences(Settings(), new) == [
        "seed is 0, not 1",
        "persona.name is '小星', not '小月'",
        f"train.steps is {Settings().train.steps}, not 20",
    ]
