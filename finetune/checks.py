"""Everything that can be found before the work starts, all at once."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from finetune import embedded, identity, records, settings, sight
from finetune.embedded import say
from finetune.errors import Problems, UserError
from finetune.run_folder import STARTERS, Run

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 2_000_000_000  # beside copies of the base's weights: libraries, activations, an adapter's optimizer


def check(run: Run, problems: Problems | None = None) -> None:
    """Everything that can be found before the work starts, all at once, after `problems` found already. Raises UserError."""
    problems = problems or Problems()
    problems.found += task_problems(run)
    problems.found += missing_packages()
    if embedded.is_ready() or run.settings.base != embedded.NAME:
        problems.found += embedded.unwritable()  # the base's answers are kept there
    if run.settings.base == embedded.NAME:
        problems.found += embedded.problems()
        base_bytes = 4 * 134_515_008
    elif problems.found and not os.access(run.settings.base, os.F_OK):
        base_bytes = 0  # it may have to be downloaded: not before the rest is right
    else:
        base_bytes = 0
        with problems.collect():
            from finetune.model import check_folder

            check_folder(run.base)
            _ = run.base_format
            base_bytes = sum(file.stat().st_size for file in run.base.glob("*.safetensors"))
    if run.encoder_rank and not problems.found:
        from finetune.model import own_encoder

        made_of_ours = not run.settings.vision.encoder if run.settings.base == embedded.NAME else own_encoder(run.base)
        if made_of_ours:
            problems.found.append(
                f"vision.encoder_rank is {run.encoder_rank}, and the image encoder without a hub has no layers for an adapter: "
                "leave it 0, or begin both phases with a CLIP model, --set vision.encoder=FOLDER."
            )
    parent = next(p for p in (run.folder.absolute(), *run.folder.absolute().parents) if os.access(p, os.F_OK))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "cannot be written to" if parent.is_dir() else "is not a folder"
        problems.found.append(
            f"The run's folder {run.folder} cannot be made: {parent} {why}; choose another with --run."
        )
    elif (free := shutil.disk_usage(parent).free) < (need := 2 * base_bytes + 200_000_000):
        problems.found.append(
            f"The run's folder {run.folder} needs {need / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free; free some "
            "space or choose another folder with --run."
        )
    problems.found += starter_problems(run, base_bytes > 0 and run.settings.base != embedded.NAME)
    copies = 6 if run.settings.method == "full" else 3
    if (free := psutil.virtual_memory().available) < (need := copies * base_bytes + MEMORY_BYTES):
        problems.found.append(
            f"Finetuning {run.settings.base} needs about {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB is free; close "
            "other programs or choose a smaller --base."
        )
    problems.stop_if_any()


def preset_of(base: str) -> str | None:
    """The preset of a base that is given by its short name, by one that it has on a hub, or as a folder whose record says what
    it is; a model that was made from one has a manifest instead."""
    folder, names = Path(base.removeprefix("dir:")).expanduser(), {embedded.HUB_NAME: embedded.NAME}
    for preset in settings.preset_names():
        names |= dict.fromkeys([preset, *_hub_names(settings.preset(preset)["base"])], preset)
    if not folder.is_dir():
        return next((names[name] for name in _hub_names(base) if name in names), None)
    with contextlib.suppress(OSError, ValueError):
        return names.get(json.loads((folder / embedded.RECORD).read_text(encoding="utf-8")).get("base_model"))
    return None


def _hub_names(references: str) -> list[str]:
    return [re.sub(r"^\w+:", "", ref.strip()).partition("@")[0] for ref in references.split(",")]


def task_problems(run: Run) -> list[str]:
    """What is wrong with the persona or the data files."""
    task, data = run.settings.task, run.settings.data
    if task == "identity":
        wrong = identity.check_persona(run.persona)
        return wrong + (["--data goes with --task instruct or pretrain: identity makes its own rows."] if data else [])
    wrong = identity.check_persona(run.persona) if run.named else []
    if run.settings.task in sight.TASKS:
        if run.settings.method == "full":
            wrong.append(f"--task {task} trains the projector and an adapter: use --method lora or qlora.")
        if not data:  # it draws its own pictures
            return wrong
    if not data:
        return [f"--task {task} learns from your files: name them with --data."]
    problems = Problems()
    with problems.collect():
        records.open_sources(data)
    return wrong + problems.found


def task_of(sources: list[str]) -> str:
    """Which task learns from rows like the first one."""
    with contextlib.suppress(UserError):  # said by `task_problems`
        for row in records.scan(sources):
            if row["pictured"]:
                return "vision"
            if "problem" not in row:
                return "pretrain" if "text" in row else "instruct"
    return "instruct"


def examine(run: Run) -> None:
    """The stage `check`: the machine, everything that stands in the way, and with --data a row's life and what training on
    these rows takes. Raises UserError."""
    from finetune import doctor, preview

    problems = Problems()
    doctor.show(run)
    with problems.collect():
        check(run)
    if run.settings.data:
        with problems.collect():
            if problems.found:  # the rows' own are told with these
                for _ in records.read(run.settings.data, run.settings.skip_bad, sight.reader(run.settings)):
                    pass
            else:
                preview.examine(run)
    problems.found = list(dict.fromkeys(problems.found))  # both say of a file that it is not there
    problems.stop_if_any()


def starter_problems(run: Run, base_is_there: bool) -> list[str]:
    """What keeps the run from beginning with its starter."""
    values = run.settings.train
    if not values.starter or not run.named:
        return []
    folder = STARTERS / values.starter
    if not (folder / "adapter_config.json").is_file():
        there = ", ".join(sorted(folder.name for folder in STARTERS.iterdir()))
        return [f"There is no starter {values.starter!r}, there is {there}; correct train.starter or leave it empty."]
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    if rank != values.rank:
        return [f"The starter {values.starter} has rank {rank} and train.rank is {values.rank}; set train.rank={rank}."]
    made_for = json.loads((folder / "namesake.json").read_text())
    if made_for["base"] in _hub_names(run.settings.base):
        return []  # the same model, in more bits than the embedded one, which it was trained on
    if base_is_there and made_for["base_sha256"] != run.language_sha256:
        return [
            f"The starter {values.starter} was made for {made_for['base']}, and {run.settings.base} is another base; "
            "train without it: --set train.starter=''."
        ]
    return []


def missing_packages() -> list[str]:
    """Requirements that are not installed, in words. Another version than the pinned one is said, not refused."""
    problems = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith(("#", "-")):
            continue
        requirement = Requirement(line.partition(" #")[0])
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"The package {requirement.name} is not installed: run 'pip install -r requirements.txt'.")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            say(
                f"Note: {requirement.name} {version} is installed; this program was tested with {requirement.specifier}."
            )
    return problems
