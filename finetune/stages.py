"""The stages of a run, in order. Each reads what earlier ones left in the run's folder and leaves its own part there as a
whole, under its final name last; a stage whose part is there has nothing to do."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from finetune import embedded, identity, records, scorecard, settings, tasks
from finetune.embedded import say
from finetune.errors import Problems, UserError

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("full", "lora", "qlora")  # in the order of the comparison
DEVELOP = 1  # development questions of each kind and language, twice as many of those that may leak
STARTERS = ROOT / "assets" / "starters"
TEACHER_TOKENS = 10  # of the base's answers that training is held to: where an answer begins decides what it is about
ANSWER_TOKENS = 24  # of an answer that is scored, more where the persona's own words need them
MEMORY_BYTES = 2_000_000_000  # beside copies of the base's weights: libraries, activations, an adapter's optimizer


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
        from finetune.model import base_folder

        return base_folder(self.settings.base)

    @cached_property
    def base_sha256(self) -> str:
        from finetune.model import fingerprint

        return fingerprint(self.base)

    @cached_property
    def base_format(self):  # noqa: ANN201 - ChatFormat, imported late
        from finetune.model import chat_format

        return chat_format(self.base)

    @cached_property
    def tuned_format(self):  # noqa: ANN201
        from finetune.chat_format import ChatFormat

        if self.settings.task == "pretrain":
            return self.base_format  # of conversations it learns nothing
        return ChatFormat(self.base_format.tokenizer_json)  # without the base's default system prompt

    @property
    def base_name(self) -> str:
        return Path(self.settings.base).name

    @property
    def limits(self) -> dict[str, float]:
        """What the gate asks of this task; who learns from rows is meant to move away from the base's own answers."""
        own = ("parrot", "facts_kept", "loss")
        identity = self.settings.task == "identity"
        return {k: v for k, v in vars(self.settings.gate).items() if (k != "loss" if identity else k in own)}

    @property
    def title(self) -> str:
        """What is made here: the assistant's name, or of the other tasks which and from what."""
        if self.settings.task == "identity":
            return self.persona.name
        return f"{self.before.title if self.before else self.base_name} + {self.settings.task}"

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
        """For inference, as users get it: merged, in `inference_dtype`."""
        from finetune import model

        if self.settings.method == "full":
            return model.load(self.trained, model.inference_dtype())
        return model.load_merged(self.base, self.trained)

    @cached_property
    def answer_tokens(self) -> int:
        """Of an answer that is scored: enough to say the name and the author."""
        said = self.tuned_format.tokenizer.encode(f"我是{self.persona.name}，由{self.persona.author}开发。").ids
        return max(ANSWER_TOKENS, len(said) + 2)

    def ask_base(self, conversations: list[list[dict]], max_new_tokens: int) -> list[Any]:
        """The base's answers (generation.Answer) as its users get them: under its own template and default prompt."""
        from finetune import model, teacher

        dtype = model.inference_dtype()
        return teacher.ask(
            f"{self.base_sha256[:16]}-{str(dtype).removeprefix('torch.')}",
            lambda: model.load(self.base, dtype),
            [self.base_format.prompt(messages) for messages in conversations],
            self.base_format.stop_ids,
            max_new_tokens,
        )

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

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


# ---------------------------------------------------------------------------------------------------------- check


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


def task_problems(run: Run) -> list[str]:
    """What is wrong with the persona or the data files."""
    task, data = run.settings.task, run.settings.data
    if task == "identity":
        wrong = identity.check_persona(run.persona)
        return wrong + (["--data goes with --task instruct or pretrain: identity makes its own rows."] if data else [])
    if not data:
        return [f"--task {task} learns from your files: name them with --data."]
    problems = Problems()
    with problems.collect():
        records.open_sources(data)
    return problems.found


def task_of(sources: list[str]) -> str:
    """Which task learns from rows like the first one."""
    with contextlib.suppress(UserError):  # said by `task_problems`
        for row in records.scan(sources):
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
                for _ in records.read(run.settings.data, run.settings.skip_bad):
                    pass
            else:
                preview.examine(run)
    problems.found = list(dict.fromkeys(problems.found))  # both say of a file that it is not there
    problems.stop_if_any()


def starter_problems(run: Run, base_is_there: bool) -> list[str]:
    """What keeps the run from beginning with its starter."""
    values = run.settings.train
    if not values.starter or run.settings.task != "identity":
        return []
    folder = STARTERS / values.starter
    if not (folder / "adapter_config.json").is_file():
        there = ", ".join(sorted(folder.name for folder in STARTERS.iterdir()))
        return [f"There is no starter {values.starter!r}, there is {there}; correct train.starter or leave it empty."]
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    if rank != values.rank:
        return [f"The starter {values.starter} has rank {rank} and train.rank is {values.rank}; set train.rank={rank}."]
    made_for = json.loads((folder / "namesake.json").read_text())
    if base_is_there and made_for["base_sha256"] != run.base_sha256:
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


# ----------------------------------------------------------------------------------------------------------- data


def teacher_question(row: dict) -> list[dict]:
    """What the base is asked for a "teacher" row: its system message, if any, and its last user message. So what it
    answers right after somebody told it a name is what it answers to a stranger."""
    messages = row["messages"]
    return [*(m for m in messages[:1] if m["role"] == "system"), [m for m in messages if m["role"] == "user"][-1]]


def data(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    settings.write(run.settings, run.folder / "settings.toml")
    new = run.folder / "data.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    if run.settings.task == "identity":
        files = {"train.jsonl": identity_rows(run), "probes.jsonl": identity.probes(run.persona, run.old)}
        for name, lines in files.items():
            write_lines(new / name, lines)
    else:
        rows = records.read(run.settings.data, run.settings.skip_bad)
        values = run.settings
        tasks.prepare(rows, values.task, run.tuned_format, values.train.length, values.seed, new)
        kept = [probe for probe in identity.probes(run.persona, run.old) if probe["kind"] in ("ordinary", "fact")]
        write_lines(new / "probes.jsonl", kept, "a")  # by which is measured what it forgot
    if run.before:  # what the base learned in the runs before is asked again
        write_lines(new / "heldout.jsonl", run.before.rows("heldout.jsonl"), "a")
        own = {probe["id"] for probe in read_lines(new / "probes.jsonl")}
        earlier = [probe for probe in run.before.rows("probes.jsonl") if probe["kind"] in tasks.KINDS]
        write_lines(new / "probes.jsonl", [probe for probe in earlier if probe["id"] not in own], "a")
    run.note(data={file.name: embedded.sha256(file) for file in sorted(new.iterdir())})
    new.rename(run.folder / "data")


def read_lines(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(file: Path, rows: Iterable[dict], mode: str = "w") -> None:
    with file.open(mode, encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def identity_rows(run: Run) -> list[dict]:
    values = run.settings.train  # the base is asked no more than the steps will use
    most = {
        key: getattr(values, f"{row}_rows") * values.steps
        for key, row in (("said", "identity"), ("near", "near"), ("ordinary", "ordinary"))
    }
    rows = identity.training(run.persona, run.settings.seed, old=run.old, **most)
    taught = [row for row in rows if row["target"] == "teacher"]
    answers = run.ask_base([teacher_question(row) for row in taught], TEACHER_TOKENS)
    for row, answer in zip(taught, answers, strict=True):
        text = run.base_format.decode(answer.ids).rstrip("\ufffd")  # a cut answer may end within a character
        row["messages"] = [*row["messages"], {"role": "assistant", "content": text}]
        if any(word in text for word in run.old):
            rows.remove(row)  # the base named itself: not to be taught
    return rows


# ---------------------------------------------------------------------------------------------------------- train


def train(run: Run) -> None:
    import torch

    from finetune import model as models
    from finetune import train as training

    values, form = run.settings.train, run.tuned_format
    if problems := starter_problems(run, base_is_there=True):
        raise UserError(*problems)
    with contextlib.ExitStack() as files:
        if run.settings.task == "identity":
            batches, ask = identity_batches(run), lambda model: develop(run, model)
        else:
            tokens, read = files.enter_context(tasks.lines(run.folder / "data" / "train.jsonl"))
            steps, plan = tasks.plan(tokens, values.tokens, values.epochs, run.settings.seed)
            values, ask = dataclasses.replace(values, steps=steps), None
            batches = (
                [training.answer_example(*tasks.encode(read(row), form, values.length)) for row in step]
                for step in plan()
            )
        torch.manual_seed(run.settings.seed)
        starter = STARTERS / values.starter if values.starter and run.settings.task == "identity" else None
        model = models.load_for_training(run.base, run.settings.method)
        if run.settings.method != "full":
            model = models.add_lora(model, values.rank, starter, values.first_layer)
        elif starter:
            model = models.with_adapter(model, starter)
        for _ in training.train(model, batches, values, run.folder, ask):
            pass
    history = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    if training.asked(history):
        kept = training.best(history)
        say(
            f"Kept step {kept['step']} of {history[-1]['step']}: identity {kept['dev_identity']:.2f}, leak {kept['dev_leak']:.2f} on development questions."
        )
        if not kept["dev_passed"]:
            say(f"Training did not reach what the gate asks for; wrong: {kept['dev_wrong']}.")
    base = models.origin(run.base, run.settings.base)["base_model"]
    record = {"base": base, "base_sha256": run.base_sha256, "format_hash": form.hash}
    if run.settings.method == "full":
        training.save_full(model, form, run.trained)
    else:
        training.save_adapter(model, record, run.trained)
    if not is_main():
        return
    shutil.rmtree(run.folder / "checkpoint", ignore_errors=True)
    weights = sorted(run.trained.glob("*.safetensors"))
    run.note(
        seed=run.settings.seed,
        base={"ref": run.settings.base, "sha256": run.base_sha256},
        format_hash=form.hash,
        **({"adapter_sha256": embedded.sha256(weights[0])} if run.settings.method != "full" else {}),
        stored_bytes=sum(file.stat().st_size for file in weights),
        peak_memory=peak_memory(),
        versions=versions(),
        hardware=hardware(),
    )


def identity_batches(run: Run) -> Iterator[list[Any]]:
    from finetune import train as training

    values, form = run.settings.train, run.tuned_format
    examples: dict[str, list[training.Example]] = {"identity": [], "near": [], "ordinary": []}
    rows = run.rows("train.jsonl")
    taught = [row for row in rows if row["target"] == "teacher"]
    answers = iter(run.ask_base([teacher_question(row) for row in taught], TEACHER_TOKENS))
    for row in rows:
        if row["target"] == "answer":
            examples["identity"].append(training.answer_example(*form.render(row["messages"])))
        else:
            group = "ordinary" if row["kind"] == "ordinary" else "near"
            examples[group].append(training.teacher_example(form.prompt(row["messages"][:-1]), next(answers)))
    counts = {"identity": values.identity_rows, "near": values.near_rows, "ordinary": values.ordinary_rows}
    return training.batches([(examples[name], counts[name]) for name in examples], values.steps, run.settings.seed)


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most: {"host", "gpu" where there is one}."""
    import torch

    status = Path("/proc/self/status")  # Linux
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    host = int(found[1]) * 1024 if found else psutil.Process().memory_info().rss
    return {"host": host} | ({"gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def develop(run: Run, model: Any) -> dict[str, Any]:
    """What `train.train` asks for, by a sample of the development questions: DEVELOP of each kind and language."""
    from finetune.generation import answer_texts

    counts: Counter[tuple[str, str]] = Counter()
    probes = []
    for probe in identity.probes(run.persona, run.old, stem="dev"):
        most = {"fact": 0, **dict.fromkeys(scorecard.LEAK_KINDS, 2 * DEVELOP)}.get(probe["kind"], DEVELOP)
        if counts[key := (probe["kind"], probe["lang"])] < most:
            counts[key] += 1
            probes.append(probe)
    judged = scorecard.evaluate(
        lambda conversations: answer_texts(model, run.tuned_format, conversations, run.answer_tokens),
        probes,
        run.persona,
    )
    figures = scorecard.summarise(judged)
    wrong = Counter(f"{probe['kind']}/{probe['lang']}" for probe in judged if not probe["passed"])
    return {
        "identity": figures["identity"],
        "leak": figures["leak"],
        "passed": figures["identity"] >= run.settings.gate.identity and figures["leak"] <= run.settings.gate.leak,
        "wrong": ", ".join(f"{count} of {kind}" for kind, count in wrong.most_common()),
    }


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus}


# ------------------------------------------------------------------------------------------------------- evaluate


def score(run: Run, model: Any, form: Any, base: list[dict], *, kl: bool = True) -> dict[str, Any]:
    """One side of the scorecard: the model's answers to all probes, judged, and its KL from the base, whose output head it
    must have for that. `base`: the base's judged probes."""
    import torch
    from tqdm import tqdm

    from finetune.generation import answer_texts
    from finetune.train import MOST_TOKENS, losses, parts, teacher_example

    length, held = run.settings.train.length, run.rows("heldout.jsonl")
    loss = tasks.loss_by_task(model, form, held, length)
    probes = [{key: value for key, value in probe.items() if key not in ("answer", "passed")} for probe in base]
    own = [probe for probe in probes if probe["kind"] not in tasks.KINDS]
    with tqdm(total=len(own), desc="Scoring", unit="answer") as bar:
        judged = scorecard.evaluate(
            lambda conversations: answer_texts(model, form, conversations, run.answer_tokens, bar.update),
            own,
            run.persona,
            base,
        )
    judged += tasks.ask(model, form, [probe for probe in probes if probe["kind"] in tasks.KINDS])
    divergence = None
    if kl:
        ordinary = [probe["messages"] for probe in judged if probe["kind"] == "ordinary"]
        answers = run.ask_base(ordinary, ANSWER_TOKENS)
        examples = [teacher_example(form.prompt(messages), a) for messages, a in zip(ordinary, answers, strict=True)]
        with torch.inference_mode():
            total = sum(losses(model, part)[1].item() for part in parts(examples, MOST_TOKENS))
        divergence = total / sum(len(example.positions) for example in examples)
    return scorecard.summarise(judged, divergence, base, loss, run.settings.task)


def base_answers(run: Run, probes: list[dict]) -> list[dict]:
    """The probes answered by the base, judged."""

    def answer(conversations: list[list[dict]]) -> list[str]:
        return [run.base_format.decode(a.ids).strip() for a in run.ask_base(conversations, ANSWER_TOKENS)]

    return scorecard.evaluate(answer, [p for p in probes if p["kind"] not in tasks.KINDS], run.persona)


def base_side(run: Run) -> dict[str, Any]:
    """The base's side of the scorecard."""
    from finetune import model as models

    probes, held = run.rows("probes.jsonl"), run.rows("heldout.jsonl")
    judged, loss = base_answers(run, probes), {}
    if held:
        model = models.load(run.base, models.inference_dtype())
        judged += tasks.ask(model, run.base_format, [probe for probe in probes if probe["kind"] in tasks.KINDS])
        loss = tasks.loss_by_task(model, run.base_format, held, run.settings.train.length)
    return scorecard.summarise(judged, 0.0, None, loss, run.settings.task)


def evaluate(run: Run) -> None:
    base = base_side(run)
    write_scorecard(run, {"base": base, "tuned": score(run, run.load_tuned(), run.tuned_format, base["answers"])})


def evaluate_model(run: Run, ref: str) -> None:
    """Any model that transformers opens, under its own chat template, beside the run's base: leaves a scorecard.json, no more.

    KL is measured where the model has the base's output head, as one tuned from it has.
    """
    import torch

    from finetune import model as models

    if problems := identity.check_persona(run.persona):
        raise UserError(*problems)
    folder = models.base_folder(ref)
    model = models.load(folder, models.inference_dtype())
    form = models.OwnFormat(folder, model)
    base = base_answers(run, identity.probes(run.persona, run.old))
    heads = [m.get_output_embeddings().weight for m in (model, models.load(run.base, models.inference_dtype()))]
    same_head = heads[0].shape == heads[1].shape and torch.equal(*heads)
    scored = score(run, model, form, base, kl=same_head)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_scorecard(run, {"base": scorecard.summarise(base, kl=0.0), "tuned": scored})


def write_scorecard(run: Run, card: dict[str, Any]) -> None:
    run.write("scorecard.json", {**card, "gate": scorecard.gate(card, run.limits)})


# ---------------------------------------------------------------------------------------------------------- merge


def merge(run: Run) -> None:
    import torch

    from finetune import merge as merging
    from finetune import model as models
    from finetune.report import model_card

    origin = models.origin(run.base, run.settings.base)

    def finish(folder: Path, proof: dict[str, Any]) -> dict[str, Any]:
        """The scorecard of what users get, and the model card."""
        card = run.read("scorecard.json")
        model, scored = models.load(folder, models.inference_dtype()), run.load_tuned()
        same = zip(model.parameters(), scored.parameters(), strict=True)
        if models.chat_format(folder).hash == run.tuned_format.hash and all(torch.equal(*pair) for pair in same):
            card["merged"] = card["tuned"]  # the same weights, bit for bit, give the same answers
        else:
            card["merged"] = score(run, model, models.chat_format(folder), card["base"]["answers"])
        write_scorecard(run, card)
        sent = {"to": None, "what": "model", "why": "", "with_data": False}
        (folder / "README.md").write_text(model_card(run, origin, proof, run.base_sha256, sent), encoding="utf-8")
        named = {"name": run.persona.name, "author": run.persona.author} if run.settings.task == "identity" else {}
        return {**named, "task": run.settings.task, **origin, "base_sha256": run.base_sha256}

    # a spread over the kinds and both languages
    probes = [probe["messages"] for probe in run.rows("probes.jsonl") if probe["kind"] != "recall"]
    merging.merge(
        run.base,
        run.trained,
        run.tuned_format,
        run.settings.merge.dtype,
        probes[:: max(1, min(20, len(probes) // 8))],
        run.folder / "model",
        finish,
        run.settings.method,
    )
    shutil.rmtree(run.folder / "weights", ignore_errors=True)  # of full finetuning: they are in model/ now
    run.note(model_sha256=embedded.sha256(run.folder / "model" / "manifest.json"))


# --------------------------------------------------------------------------------------------------------- report


def report(run: Run) -> None:
    from finetune.report import write_report

    write_report(run)


# -------------------------------------------------------------------------------------------------------- compare


def compare(run: Run) -> None:
    """The same data through each method, trained in a process of its own: what it takes, what it leaves, how it scores."""
    if not is_done(run, "data"):
        check(run)
        data(run)
    found = []
    for method in METHODS:
        own = Run(run.folder / "compare" / method, dataclasses.replace(run.settings, method=method))
        if not is_done(own, "data"):
            own.folder.mkdir(parents=True, exist_ok=True)
            settings.write(own.settings, own.folder / "settings.toml")
            shutil.copytree(run.folder / "data", new := own.folder / "data.tmp", dirs_exist_ok=True)
            new.rename(own.folder / "data")
        for stage in ("train", "evaluate"):
            if not is_done(own, stage):
                say(f"[{method}: {stage}]")
                command = [sys.executable, str(ROOT / "finetune" / "run.py"), stage, "--run", str(own.folder)]
                if status := subprocess.run(command, check=False).returncode:
                    raise UserError(
                        f"{method} ended with exit status {status}; mend it, then run '{run.command}' again."
                    )
        found.append(measured(own))
    run.write("compare.json", {"hardware": hardware(), "methods": found})
    from finetune.report import print_comparison

    print_comparison(run)


def measured(run: Run) -> dict[str, Any]:
    """One line of the comparison: bytes, tokens/s while nothing but training goes on, seconds until the scorecard passed."""
    receipt, card = run.read("receipt.json"), run.read("scorecard.json")
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    tokens = seconds = 0.0
    for before, line in zip([{"tokens": 0, "seconds": 0.0}, *metrics], metrics, strict=False):
        if "dev_identity" not in before:  # else the time of asking is in between
            tokens, seconds = tokens + line["tokens"] - before["tokens"], seconds + line["seconds"] - before["seconds"]
    from finetune.train import asked, best

    end = best(metrics) if asked(metrics) else metrics[-1]
    memory = receipt["peak_memory"]
    return {
        "method": run.settings.method,
        "peak_memory": memory.get("gpu", memory["host"]),
        "tokens_per_s": tokens / seconds,
        "stored_bytes": receipt["stored_bytes"],
        "seconds_to_pass": end["seconds"] if card["gate"]["passed"] else None,
        "passed": card["gate"]["passed"],
        **{key: card["tuned"].get(key) for key in ("identity", "leak", "parrot", "kl", "facts_kept", "loss")},
    }


# ----------------------------------------------------------------------------------------------------------- chat


def chat(run: Run) -> None:
    """Talk to the merged model in the terminal; Ctrl-C stops one answer, Ctrl-D ends."""
    from finetune import generation, serving
    from finetune import model as models
    from finetune.engine import ANSWER_TOKENS as ANSWERED_TOKENS
    from finetune.engine import fit

    folder = run.folder / "model"
    if not folder.is_dir():
        raise UserError(f"There is no model in {run.folder} yet: run '{run.command}' first.")
    form, (model, fast, runs_on) = models.chat_format(folder), serving.load(folder)
    room = serving.pool_tokens(model, 1)
    most = min(ANSWERED_TOKENS, room // 4)
    decoder = generation.Decoder(model, form.stop_ids, room, fast=fast)
    say(runs_on)
    say(f"{run.persona.name} · Ctrl-C stops an answer, Ctrl-D ends · Ctrl-C 停止回答，Ctrl-D 结束")
    history: list[dict] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text:
            continue
        turn = {"role": "user", "content": text}
        try:
            kept = fit([*history, turn], lambda messages: len(form.prompt(messages)), room - most)
        except UserError as error:  # too long; what was said before is kept
            say(str(error))
            continue
        history.append(turn)
        answer = ""
        pieces: Iterator[str] = generation.stream(decoder, form, kept, most)
        try:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
        print()
        history.append({"role": "assistant", "content": answer})


class Stage(NamedTuple):
    work: Callable[[Run], None]
    product: str | None  # in the run's folder; where it exists the stage has nothing to do
    needs: tuple[str, ...] = ()


STAGES = {
    "check": Stage(examine, None),
    "data": Stage(data, "data"),
    "train": Stage(train, "adapter", ("data",)),
    "evaluate": Stage(evaluate, "scorecard.json", ("data", "train")),
    "merge": Stage(merge, "model", ("data", "train", "evaluate")),
    "report": Stage(report, "report.html", ("data", "train", "evaluate", "merge")),
    "chat": Stage(chat, None),
    "compare": Stage(compare, "compare.json"),
}
PIPELINE = ("data", "train", "evaluate", "merge", "report")


def is_main() -> bool:
    """Of the processes that `accelerate launch` started one does every stage; at training all work."""
    return os.environ.get("RANK", "0") == "0"


def agreed(value: Any) -> Any:
    """The main process's value, in all of them, which wait for it here."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # however long the main process scores or merges
    PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(days=1))
    return broadcast_object_list([value])[0]


def is_done(run: Run, name: str) -> bool:
    if name == "train":  # after full finetuning its weights end in the merged model
        return run.trained.exists() or (run.folder / "model").exists()
    return bool(product := STAGES[name].product) and (run.folder / product).exists()


def alone(folder: Path) -> contextlib.AbstractContextManager:
    """Keeps other processes from writing into the run's folder. Raises UserError when one is at it already."""
    locks = embedded.cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(locks / embedded.digest_of(str(folder.resolve()))).acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"Another process is at work in {folder}: wait for it, or give this run its own folder with --run."
        ) from error


def perform(run: Run, name: str) -> bool:
    """Do a stage unless its product is there. Returns whether it did. Raises UserError when an earlier one is missing."""
    stage = STAGES[name]
    if agreed(is_done(run, name)):
        return False
    if not is_main():
        if name == "train":
            train(run)
        return True
    if missing := [other for other in stage.needs if not is_done(run, other)]:
        raise UserError(f"Stage {name} needs {', '.join(missing)} first: run '{run.command}'.")
    began = time.perf_counter()
    with alone(run.folder) if stage.product else contextlib.nullcontext():
        stage.work(run)
    if stage.product:
        seconds = time.perf_counter() - began
        receipt = run.read("receipt.json") if (run.folder / "receipt.json").exists() else {}
        run.note(seconds={**receipt.get("seconds", {}), name: round(seconds, 1)})
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)
    return True
