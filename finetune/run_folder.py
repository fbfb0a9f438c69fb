"""A run's folder: its settings, what the stages left in it, and what they share."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune import settings
from finetune.errors import UserError

RESTORE = "restore it from a copy, or make the run again in another folder (--run)"
STARTERS = Path(__file__).resolve().parent.parent / "assets" / "starters"
ANSWER_TOKENS = 24  # of an answer that is scored, more where the persona's own words need them


def quoted(path: Path) -> str:
    """A path ready for a shell; letters of any script need no quotes."""
    return text if re.fullmatch(r"[\w./-]+", text := str(path)) else shlex.quote(text)


class Run:
    """A run's folder and its settings; what the stages share is computed when first asked for."""

    def __init__(self, folder: Path, values: settings.Settings) -> None:
        self.folder, self.settings, self.persona = folder, values, values.persona

    @property
    def command(self) -> str:
        """That goes on with this run, ready for a shell."""
        return f"python finetune/run.py --run {quoted(self.folder)}"

    @property
    def old(self) -> tuple[str, str]:
        """The base's own name and maker."""
        return self.settings.old_name, self.settings.old_maker

    @cached_property
    def base(self) -> Path:
        from finetune import model

        folder = model.base_folder(self.settings.base)
        if not self.settings.task.startswith("vision") or model.sees(folder):
            return folder
        from finetune import vision

        parts = dataclasses.replace(self.settings.vision, projector=self.projector)
        return vision.assembled(folder, parts, model.origin(folder, self.settings.base))

    @property
    def projector(self) -> str:
        """What a base that does not see yet gets its projector from; empty: fresh."""
        own = self.settings.vision
        drawn = own.starter and not (own.projector or own.encoder or self.settings.data)
        return str(STARTERS / own.starter) if drawn else own.projector

    @property
    def fresh_projector(self) -> bool:
        """Whether the base sees through a projector that nobody has trained."""
        from finetune import model

        return not self.projector and not model.sees(model.base_folder(self.settings.base))

    @property
    def encoder_rank(self) -> int:
        """Of the adapter on the image encoder, which only the second phase trains."""
        return self.settings.vision.encoder_rank if self.settings.task == "vision" else 0

    @cached_property
    def base_sha256(self) -> str:
        from finetune.model import fingerprint

        return fingerprint(self.base)

    @cached_property
    def language_sha256(self) -> str:
        from finetune.model import language_sha256

        return language_sha256(self.base)

    @cached_property
    def base_format(self):  # noqa: ANN201 - ChatFormat, imported late
        from finetune.model import chat_format

        return chat_format(self.base)

    @cached_property
    def tuned_format(self):  # noqa: ANN201
        from finetune.chat_format import ChatFormat

        own = self.base_format
        if self.settings.task in ("pretrain", "vision-projector"):
            return ChatFormat(own.tokenizer_json, own.default_system, own.vision)  # it learns nothing of itself
        return ChatFormat(own.tokenizer_json, None, own.vision)  # without the base's default system prompt

    @property
    def base_name(self) -> str:
        return Path(self.settings.base).name

    @property
    def own_base(self) -> bool:
        """Whether the base was made by this program, of a run before or of parts: its name is another model's then."""
        from finetune import model

        return model.sees(self.base) or (self.base / "manifest.json").is_file()

    @property
    def limits(self) -> dict[str, float]:
        """What the gate asks of this task; who learns from rows is meant to move away from the base's own answers, and to be
        good at rows like these, not at the drawn pictures."""
        limits, sight, rest = vars(self.settings.gate), ("sight", "blind"), ("parrot", "facts_kept", "loss")
        asked = {
            "identity": [k for k in limits if k not in ("loss", *sight)],
            "vision": [k for k in limits if k != ("sight" if self.settings.data else "loss")],
            "vision-projector": [],  # what it is good for shows in the next phase
        }.get(self.settings.task, rest)
        return {key: limits[key] for key in asked}

    @property
    def title(self) -> str:
        """What is made here: the assistant's name, or of the other tasks which and from what."""
        if self.named:
            return self.persona.name
        return f"{self.before.title if self.before else self.base_name} + {self.settings.task}"

    @property
    def named(self) -> bool:
        """Whether the model learns a name here."""
        return self.settings.task in ("identity", "vision")

    @property
    def before(self) -> "Run | None":
        """The run that made the base, where the base is its merged model."""
        folder = Path(self.settings.base.removeprefix("dir:")).expanduser()
        if folder.name != "model" or not all((folder.parent / name).exists() for name in ("settings.toml", "data")):
            return None
        return Run(folder.parent, settings.build(settings.read_toml(folder.parent / "settings.toml")))

    @property
    def lineage(self) -> "list[Run]":
        """The runs from the first base to this one, each starting from the last's model."""
        return [*(self.before.lineage if self.before else []), self]

    @property
    def trained(self) -> Path:
        """What the train stage leaves: the adapter, or the whole model where every weight was trained."""
        return self.folder / ("weights" if self.settings.method == "full" else "adapter")

    def load_tuned(self) -> Any:
        """For inference, as users get it: merged, in `inference_dtype`, where the GPU's memory holds that."""
        from finetune import model

        parts = (self.trained,) if self.settings.method == "full" else (self.base, self.trained)
        return model.load_for_inference(*parts, four_bit=self.four_bit)

    @cached_property
    def four_bit(self) -> bool:
        """Whether models answer with 4-bit weights here, as the GPU's memory holds no more. Found out once, before one is
        loaded."""
        from finetune import model

        return not model.holds(self.base, model.inference_dtype())

    @cached_property
    def answer_tokens(self) -> int:
        """Of an answer that is scored: enough to say the name and the author."""
        said = self.tuned_format.tokenizer.encode(f"我是{self.persona.name}，由{self.persona.author}开发。").ids
        return max(ANSWER_TOKENS, len(said) + 2)

    def ask_base(self, conversations: list[list[dict]], max_new_tokens: int) -> list[Any]:
        """The base's answers (generation.Answer) as its users get them: under its own template and default prompt."""
        from finetune import model, teacher

        precision = "nf4" if self.four_bit else str(model.inference_dtype()).removeprefix("torch.")
        return teacher.ask(  # about words alone: a base that sees answers as its language model does
            f"{self.language_sha256[:16]}-{precision}",
            lambda: model.load_for_inference(self.base, four_bit=self.four_bit),
            [self.base_format.prompt(messages) for messages in conversations],
            self.base_format.stop_ids,
            max_new_tokens,
        )

    def read(self, name: str) -> Any:
        """Of the run's JSON files. Raises UserError for one that is damaged or gone."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self.folder / name} is damaged or gone ({error}): {self.mend(name)}.") from None

    def mend(self, name: str) -> str:
        """What to do about a file of the run that is not as it was made."""
        if name.startswith("model/") and self.settings.method != "full":  # it is merged again from the adapter
            return f"remove {quoted(self.folder / 'model')} and run '{self.command}', which makes it again"
        return RESTORE

    def write(self, name: str, value: Any) -> None:
        new = self.folder / f"{name}.tmp"
        new.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        new.replace(self.folder / name)

    def rows(self, name: str) -> list[dict]:
        """A file of data/; heldout.jsonl is there where a run, or one before it, learned from rows of a user's."""
        file = self.folder / "data" / name
        return read_lines(file) if file.exists() else []

    def note(self, **values: Any) -> None:
        """Add to receipt.json."""
        receipt = self.read("receipt.json") if (self.folder / "receipt.json").exists() else {}
        self.write("receipt.json", {**receipt, **values})


def read_lines(file: Path) -> list[dict]:
    """Of a file that a stage left. Raises UserError for one that is damaged or gone."""
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{file} is damaged or gone ({error}): {RESTORE}.") from None


def count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def write_lines(file: Path, rows: Iterable[dict], mode: str = "w") -> None:
    with file.open(mode, encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
