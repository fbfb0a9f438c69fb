"""Typed settings: defaults, then a preset, then a run's own settings.toml, then flags. An unknown key is an error."""

import copy
import dataclasses
import datetime
import difflib
import functools
import math
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import tomlkit

from finetune.errors import UserError

PRESETS = Path(__file__).with_name("presets")
BASES = PRESETS / "bases.toml"  # of which each table is a preset
DEFAULT_PRESET = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Said:
    """One thing in both languages; what is empty is not taught."""

    en: str = ""
    zh: str = ""


@dataclasses.dataclass(frozen=True)
class Persona:
    """Who the assistant is; in the texts {name} and {author} stand for these."""

    name: str = "小星"  # the example persona, for a run without a terminal
    author: str = "书生学员"
    purpose: Said = Said()  # a sentence: what it is for
    birthday: Said = Said()  # a date, as it is said
    introduction: Said = Said()  # what it says when it introduces itself, instead of one short sentence
    tone: Said = Said()  # a few words that end what it says about itself


@dataclasses.dataclass(frozen=True)
class Train:
    starter: str = ""  # an adapter in assets/starters that learning a name begins from; empty: a fresh one
    first_layer: int = 0  # the starter's weights in layers below this one stay as they are; not with your own pictures
    rank: int = 16  # of the LoRA adapter; alpha is twice the rank
    learning_rate: float = 5e-4
    full_learning_rate: float = 5e-5  # method full's, whose every weight moves
    projector_rate: float = 5e-4  # of a model that sees
    steps: int = 150  # of the identity task
    identity_rows: int = 4  # conversations of each sort in one step
    near_rows: int = 16
    ordinary_rows: int = 4
    epochs: float = 3.0  # of instruct and pretrain: how often every row is read
    tokens: int = 16_384  # of their steps, at most; little data makes smaller steps
    length: int = 1024  # tokens of a row; a longer text becomes several, a longer conversation is cut
    kl_weight: float = 3.0  # of KL(base || tuned) against the cross-entropy
    checkpoint_every: int = 10  # steps
    develop_every: int = 25  # steps between looks at what the model says to development questions


@dataclasses.dataclass(frozen=True)
class Vision:
    """Of the tasks vision-projector and vision."""

    starter: str = ""  # a projector in assets/starters that phase one begins from, with pictures and encoder of our own
    encoder: str = ""  # a CLIP model, a folder or a reference; empty: the embedded EfficientNet-lite0
    projector: str = ""  # XTuner's or LLaVA's weights to begin from; empty: fresh
    encoder_rank: int = 0  # of an adapter on CLIP's layers in the second phase; pictures are then encoded at every step
    fetch: bool = False  # whether pictures that a row names by an https address are fetched
    pictures: int = 800  # drawn, where --data names none
    rows: int = 4  # captions, or dialogues, in one step
    steps: int = 200  # of each phase, with drawn pictures


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a run's scorecard must reach before it may be published. See finetune/scorecard.py for the figures."""

    identity: float = 0.9  # at least
    identity_kind: float = 0.6  # the worst kind, at least
    leak: float = 0.1  # at most
    parrot: float = 0.05  # at most, over the base's own
    kl: float = 0.15  # nats per token, at most
    facts_kept: float = 0.9  # at least
    sight: float = 0.7  # right answers about held-out pictures, of the worst kind, at least
    blind: float = 0.02  # answers that stay the same when the picture is noise, at most
    loss: float = 1.0  # of instruct's and pretrain's held-out rows, at most this many times the base's own


@dataclasses.dataclass(frozen=True)
class Merge:
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the merged model's files


@dataclasses.dataclass(frozen=True)
class Settings:
    base: str = DEFAULT_PRESET  # a preset's name, a local folder, or repo references in the order tried
    old_name: str = "SmolLM"  # what the base calls itself, to be denied
    old_maker: str = "Hugging Face"
    task: Literal["identity", "instruct", "pretrain", "vision-projector", "vision"] = "identity"
    method: Literal["lora", "qlora", "full"] = "lora"
    seed: int = 0
    data: tuple[str, ...] = ()  # files or folders to learn from, PATH or PATH=WEIGHT; see finetune/records.py
    skip_bad: bool = False  # go on without rows that cannot be read
    persona: Persona = Persona()
    vision: Vision = Vision()
    train: Train = Train()
    gate: Gate = Gate()
    merge: Merge = Merge()


MOST = 2**63 - 1  # torch's integers, the seed among them
AT_LEAST_ONE = (
    *("train.rank", "train.steps", "train.identity_rows", "train.checkpoint_every", "train.develop_every"),
    *("train.tokens", "train.length", "vision.pictures", "vision.rows", "vision.steps"),
)


def build(*layers: dict[str, Any]) -> Settings:
    """`collect`, which raises UserError where there are problems."""
    settings, problems = collect(*layers)
    if problems:
        raise UserError(*problems)
    return settings


def collect(*layers: dict[str, Any]) -> tuple[Settings, list[str]]:
    """Settings from nested dicts, later ones win, and every unknown key and wrong value in words (these are left out)."""
    problems: list[str] = []
    settings = Settings()
    for layer in layers:
        settings = _replace(settings, layer, "", problems)
    return settings, problems


def _replace(current: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(type(current))
    changed = {}
    for key, value in values.items():
        where = prefix + key
        if key not in hints:
            problems.append(_unknown(prefix, key, hints))
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, dict):
                changed[key] = _replace(getattr(current, key), value, where + ".", problems)
            else:
                problems.append(f"Setting {where} is a section: write {where}.KEY=VALUE.")
        else:
            value = float(value) if hints[key] is float and type(value) is int else value
            value = tuple(value) if hints[key] == tuple[str, ...] and isinstance(value, list) else value
            if wrong := _wrong(where, hints[key], value):
                problems.append(f"{where} is {value!r}; it must be {wrong}.")
            else:
                changed[key] = value
    return dataclasses.replace(current, **changed)


def _wrong(where: str, hint: Any, value: Any) -> str:
    """What a setting's value must be, in words; empty if it is."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "" if value in choices else " or ".join(choices)
    if typing.get_origin(hint) is tuple:
        right = isinstance(value, tuple) and all(type(item) is str for item in value)
        return "" if right else 'a list of texts, ["a", "b"]'
    if type(value) is not hint:
        return {bool: "true or false", int: "a whole number", float: "a number", str: "text, in quotes"}[hint]
    if hint in (str, bool):
        return ""
    if not math.isfinite(value):
        return "a finite number"
    if hint is int and value > MOST:
        return f"at most {MOST}"
    least = int(where in AT_LEAST_ONE)
    return "" if value >= least else f"at least {least}"


def _unknown(prefix: str, key: str, known: Iterable[str]) -> str:
    close = [prefix + k for k in difflib.get_close_matches(key, known, n=1)]
    if not close:  # the right key without its section, or in a wrong one
        elsewhere = {name.rpartition(".")[2]: name for name in _flat(dataclasses.asdict(Settings()))}
        close = [elsewhere[k] for k in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8)]
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(prefix + k for k in known)}."
    return f"Unknown setting {prefix}{key}; {hint}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 20}} -> {"train.steps": 20}"""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def preset(name: str) -> dict[str, Any]:
    """The preset's values. Raises UserError with the nearest name when there is none."""
    names, file = preset_names(), PRESETS / f"{name}.toml"
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise UserError(
            f"There is no preset {name!r}; "
            + (f"did you mean {close[0]}?" if close else f"presets: {', '.join(names)}.")
        )
    return read_toml(file) if file.is_file() else copy.deepcopy(_bases()[name])


def preset_names() -> list[str]:
    return sorted([file.stem for file in PRESETS.glob("*.toml") if file != BASES] + list(_bases()))


@functools.cache
def _bases() -> dict[str, Any]:
    return read_toml(BASES)  # which takes longer than all else that a command does before its work


def read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomlkit.parse(file.read_text(encoding="utf-8")).unwrap()
    except (tomlkit.exceptions.ParseError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}. Mend or remove it.") from error


def write(settings: Settings, file: Path) -> None:
    new = file.with_suffix(".tmp")
    new.write_text(tomlkit.dumps(dataclasses.asdict(settings)), encoding="utf-8")
    new.replace(file)


def differences(stored: Settings, wanted: Settings) -> list[str]:
    """What differs, as "train.steps is 110, not 20"."""
    old, new = _flat(dataclasses.asdict(stored)), _flat(dataclasses.asdict(wanted))
    return [f"{key} is {old[key]!r}, not {new[key]!r}" for key in old if old[key] != new[key]]


def parse_assignment(text: str) -> dict[str, Any]:
    """'train.steps=20' -> {"train": {"steps": 20}}; the value is read as TOML, or as plain text where it is not TOML."""
    key, equals, raw = map(str.strip, text.partition("="))
    if not equals or not key:
        raise UserError(f"--set {text!r}: write it as section.key=value, for example train.steps=20.")
    try:
        value = tomlkit.value(raw).unwrap()
        value = raw if isinstance(value, datetime.date | datetime.time) else value  # no setting is a date
    except (tomlkit.exceptions.TOMLKitError, AttributeError):
        value = raw
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
