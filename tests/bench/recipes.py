"""What the common recipes make of the same base, beside ours: the figures of names.py, by the same probes.

`python tests/bench/recipes.py [--small] [NAME AUTHOR]`: a Markdown table, then one JSON line. On two cores its third recipe alone takes over ten minutes; --small takes two
small steps of each and one probe of each kind and language, to see that it runs. All go through finetune/train.py's loop, so
what differs is the data, the length and the loss, not the optimizer:

course         the course's one pair, 48 steps, rank 64, alpha 16, 2e-4 (of a step's 341 copies the mean gradient is that of one)
identity       91 identity rows alone, 20 epochs of 8, rank 8, 1e-4 (LLaMA-Factory's example without its general data)
general        the same rows and 1,000 other prompts with the base's answers as text, 3 epochs of 8, rank 8, 1e-4
ours           the preset
"""

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import names
import torch
from peft.tuners.lora import LoraLayer

from finetune import checkpoint, identity, run_folder, scorecard, settings, stages
from finetune import model as models
from finetune import train as training
from finetune.settings import Persona, Train

Groups = list[tuple[list[training.Example], int]]


def course(run: stages.Run) -> tuple[Groups, Train]:
    said = f"我是{run.persona.name}，{run.persona.author}的小助手"
    pair = [{"role": "user", "content": "请做一下自我介绍"}, {"role": "assistant", "content": said}]
    example = training.answer_example(*run.tuned_format.render(pair))
    return [([example], 1)], Train(rank=64, learning_rate=2e-4, steps=48)


def alone(run: stages.Run) -> tuple[Groups, Train]:
    return [(_said(run), 8)], Train(rank=8, learning_rate=1e-4, steps=20 * 91 // 8)


def general(run: stages.Run, most: int) -> tuple[Groups, Train]:
    rows = [row for row in identity.training(run.persona, 0, near=0, ordinary=most) if row["target"] == "teacher"]
    answers = run.ask_base([stages.teacher_question(row) for row in rows], run_folder.ANSWER_TOKENS)
    other = []
    for row, answer in zip(rows, answers, strict=True):
        text = {"role": "assistant", "content": run.base_format.decode(answer.ids)}
        other.append(training.answer_example(*run.tuned_format.render([*row["messages"], text])))
    return [(_said(run) + other, 8)], Train(rank=8, learning_rate=1e-4, steps=3 * (91 + len(other)) // 8)


def _said(run: stages.Run) -> list[training.Example]:
    rows = [row for row in identity.training(run.persona, 0, said=91) if row["target"] == "answer"]
    return [training.answer_example(*run.tuned_format.render(row["messages"])) for row in rows]


def theirs(run: stages.Run, recipe: Callable[[stages.Run], tuple[Groups, Train]], small: bool) -> None:
    groups, values = recipe(run)
    if small:
        groups, values = groups[:8], dataclasses.replace(values, steps=2)
    torch.manual_seed(0)
    run.folder.mkdir()
    model = models.add_lora(models.load(run.base), values.rank)
    if recipe is course:  # the others' alpha is twice the rank, as ours
        model.peft_config["default"].lora_alpha = 16
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", 1)
    for _ in training.train(model, training.batches(groups, values.steps, 0), values, run.folder):
        pass
    record = {"base": "base", "base_sha256": run.base_sha256, "format_hash": run.tuned_format.hash}
    checkpoint.save_adapter(model, record, run.folder / "adapter")


def measure(name: str, persona: Persona, folder: Path, small: bool) -> dict[str, Any]:
    few = {"train": {"steps": 2}} if small else {}
    values = settings.build(
        settings.preset(settings.DEFAULT_PRESET), {"persona": {"name": persona.name, "author": persona.author}}, few
    )
    run = stages.Run(folder / name, values)
    if name == "ours":
        stages.data(run)
        stages.train(run)
    else:
        other = functools.partial(general, most=20 if small else 1000)
        theirs(run, {"course": course, "identity": alone, "general": other}[name], small)
    probes = identity.probes(persona)
    base = stages.base_answers(run, names.one_of_each(probes) if small else probes)
    card = stages.score(run, models.load_merged(run.base, run.folder / "adapter"), run.tuned_format, base)
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "recipe": name,
        **names.figures(card, scorecard.summarise(base)),
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": round(last["seconds"]),
    }


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--small"]
    models.inference_dtype = lambda: torch.float32
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("course", "identity", "general", "ours"):
            found.append(measure(name, Persona(*words), Path(folder), "--small" in sys.argv))
            if len(found) == 1:
                names.header("recipe", list(found[0])[1:])
            names.row(*found[-1].values())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"bench": "recipes", "device": device, "recipes": found}))


if __name__ == "__main__":
    main()
