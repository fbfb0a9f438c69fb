"""What of a run is published: exactly these files, with their card and their manifest, and nothing private in them."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finetune import embedded, sight, transfer
from finetune.errors import GateRefused, Problems, UserError
from finetune.places import MANIFEST, Place
from finetune.report import model_card
from finetune.run_folder import RESTORE, Run
from finetune.transfer import Source

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "namesake.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # with an adapter: its prompt format is not the base's own
TEXT = {".json", ".md", ".jinja", ".jsonl", ".yml"}
METAFILE = "metafile.yml"  # what OpenXLab shows of a model


def gate(run: Run, why: str) -> None:
    """Raises GateRefused when the run's scorecard failed and there is no reason to publish it all the same."""
    found = run.read("scorecard.json")["gate"]
    if not found["passed"] and not why.strip():
        raise GateRefused(
            *(f"gate: {reason}" for reason in found["reasons"]),
            'The run is not published. Train it better, or publish it with --force "why"; the model card will say so.',
        )


def files(run: Run, place: Place, what: str, why: str = "", with_data: bool = False) -> dict[str, Source]:
    """The files by their names there. Raises UserError for all that is missing or must not go out, at once."""
    manifest, receipt = run.read(f"model/{MANIFEST}"), run.read("receipt.json")
    model, adapter = run.folder / "model", run.folder / "adapter"
    chosen: dict[str, Source] = {}
    own: dict[str, Path] = {}
    problems = Problems()
    own_base = what != "model" and manifest.get("own_base", False)
    made = {name: Source(model / name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    if what in ("model", "both"):
        chosen |= {name: source for name, source in made.items() if name != "README.md"}
    if what in ("adapter", "both"):
        if adapter.is_dir():
            prefix = "adapter/" if what == "both" else ""
            own |= {prefix + name: adapter / name for name in ADAPTER}
            chosen |= {name: made[name] for name in TOKENIZER}
        else:
            problems.found.append(f"There is no adapter in {run.folder}: publish --what model.")
    if what == "adapter" and own_base:
        problems.found.append(
            f"The adapter in {run.folder} fits only what it was trained on, which was made here of {manifest['base_model']} and "
            "is not published with it: publish --what model, or both."
        )
    if with_data and run.settings.task in sight.TASKS:
        problems.found.append(
            "--with-data sends rows, and these are about pictures, which are not sent: publish without it."
        )
    elif with_data:
        names = ("train.jsonl", "probes.jsonl")
        own |= {f"data/{name}": run.folder / "data" / name for name in names}
    for name, path in own.items():
        with problems.collect():
            chosen[name] = _source(path, receipt)
    for name, source in list(chosen.items()):
        if not source.data.is_file() or source.data.stat().st_size != source.size:
            mend = run.mend(source.data.relative_to(run.folder).as_posix())
            problems.found.append(f"{source.data} is not what the run made ({name}): {mend}.")
            del chosen[name]
    origin = {key: manifest[key] for key in ("base_model", "license")}
    sent = {"to": place, "what": what, "why": why, "with_data": with_data, "own_base": own_base}
    card = model_card(run, origin, manifest["proof"], manifest["base_sha256"], sent)
    chosen["README.md"] = transfer.source(card.encode())
    if place.kind == "openxlab":
        chosen[METAFILE] = transfer.source(
            yaml.safe_dump(metafile(run, origin, place, chosen), allow_unicode=True).encode()
        )
    base_ref = embedded.NAME if run.settings.base == embedded.NAME else origin["base_model"]
    described = {
        **{key: value for key, value in manifest.items() if key != "files"},
        "what": what,
        "base": {"ref": base_ref, "sha256": manifest["base_sha256"]},
        **({"published_despite": why} if why else {}),
        "files": {name: {"size": s.size, "sha256": s.sha256} for name, s in sorted(chosen.items())},
    }
    chosen[MANIFEST] = transfer.source(json.dumps(described, ensure_ascii=False, indent=1).encode())
    problems.found += private(run, chosen)
    problems.stop_if_any()
    return chosen


def _source(path: Path, receipt: dict[str, Any]) -> Source:
    """By the run's own record; small files that it does not record are read."""
    recorded = {"adapter_model.safetensors": receipt.get("adapter_sha256"), **receipt.get("data", {})}.get(path.name)
    if not path.is_file():
        raise UserError(f"{path} is missing: {RESTORE}.")
    return Source(path, path.stat().st_size, recorded or embedded.sha256(path))


def metafile(run: Run, origin: dict[str, str], place: Place, names: Iterable[str]) -> dict[str, Any]:
    """OpenXLab's description of a repository that holds files of these names."""
    from finetune.model import sees

    repository = place.ref.removeprefix("openxlab:").partition("@")[0]
    figure, dataset = ("identity", "self-cognition") if run.named else ("loss", "own data")
    metrics = {figure: run.read("scorecard.json")["tuned"].get(figure)}
    task = "image-text-to-text" if sees(run.folder / "model") else "text-generation"
    result = {"Task": task, "Dataset": dataset, "Metrics": metrics}
    about = {"Name": repository.partition("/")[2], "License": origin["license"], "Framework": ["Pytorch"]}
    weights = ", ".join(sorted(name for name in names if name.endswith(".safetensors")))
    return {
        "Collections": [{**about, "Code": {"URL": f"https://openxlab.org.cn/models/detail/{repository}"}}],
        "Models": [{"Name": run.title, "Weights": weights, "Results": [result]}],
    }


def private(run: Run, chosen: dict[str, Source]) -> list[str]:
    """Which texts hold a path of this machine or the value of a secret environment variable, in words."""
    places = (run.folder, Path.home(), Path.cwd(), embedded.cache_dir())
    bases = [ref.strip().removeprefix("dir:") for ref in run.settings.base.split(",")]
    paths = {str(path.absolute()) for path in places} | {base for base in bases if Path(base).is_absolute()}
    forbidden = {f"{path}{end}": "a path of this machine" for path in paths if path != "/" for end in '/"'}
    for name, value in os.environ.items():
        if re.search("TOKEN|SECRET|PASS|KEY|CREDENTIAL|_[AS]K$", name, re.I) and len(value) >= 8:
            forbidden[value] = f"the value of {name}"
    problems = []
    for name, source in chosen.items():
        if PurePosixPath(name).suffix not in TEXT:
            continue
        with source.open() as file:
            text = file.read().decode(errors="replace")
        problems += [f"{name} holds {what} and is not sent." for value, what in forbidden.items() if value in text]
    return problems
