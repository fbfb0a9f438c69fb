"""The stages of a run, in order. Each reads what earlier ones left in the run's folder and leaves its own part there as a
whole, under its final name last; a stage whose part is there has nothing to do."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout

from finetune import embedded, identity, records, scorecard, settings, sight, tasks
from finetune.card import PICTURE
from finetune.checks import ROOT, check, examine, starter_problems
from finetune.embedded import say
from finetune.errors import GateRefused, UserError
from finetune.run_folder import ANSWER_TOKENS, STARTERS, Run, read_lines, write_lines
from finetune.terminal import chat

METHODS = ("full", "lora", "qlora")  # in the order of the comparison
COMPARED = ("identity", "leak", "parrot", "kl", "facts_kept", "sight", "blind", "loss")  # of the scorecard
DEVELOP = 1  # development questions of each kind and language, twice as many of those that may leak
TEACHER_TOKENS = 10  # of the base's answers that training is held to: where an answer begins decides what it is about


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
    try:
        gather(run, new)
    except UserError:  # the next try, with other rows or settings, begins afresh
        shutil.rmtree(new)
        (run.folder / "settings.toml").unlink()
        with contextlib.suppress(OSError):  # there may be more in it, as what `check` left
            run.folder.rmdir()
        raise
    run.note(data={file.name: embedded.sha256(file) for file in sorted(new.glob("*.jsonl"))})
    new.rename(run.folder / "data")


def gather(run: Run, new: Path) -> None:
    """Write what data/ is to hold."""
    if run.settings.task in sight.TASKS:
        sight.prepare(run, new)
    if run.named:
        rows = identity_rows(run)
        if run.settings.task in sight.TASKS:
            sight.after_pictures(run, rows, new)
        files = {"train.jsonl": rows, "probes.jsonl": identity.probes(run.persona, run.old)}
        for name, lines in files.items():
            write_lines(new / name, lines, "a")
    elif run.settings.task not in sight.TASKS:
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


def text_rows(run: Run) -> dict[str, int]:
    """How many rows of each sort the identity's training reads in all its steps."""
    values = run.settings.train
    return {name: values.steps * getattr(values, f"{name}_rows") for name in ("identity", "near", "ordinary")}


def names_itself(answer: str, question: str, old: Sequence[str]) -> bool:
    """Whether the base's answer brings up its own (name, maker), `old`; where the question does, whether it means itself."""
    said = [word for word in old if word in answer]
    return bool(said) and (not all(word in question for word in said) or bool(re.search(r"\b(?:I|my)\b|我", answer)))


def identity_rows(run: Run) -> list[dict]:
    counts = text_rows(run)  # the base is asked no more than the steps will use
    rows = identity.training(run.persona, run.settings.seed, old=run.old, said=counts.pop("identity"), **counts)
    taught = [row for row in rows if row["target"] == "teacher"]
    answers = run.ask_base([teacher_question(row) for row in taught], TEACHER_TOKENS)
    for row, answer in zip(taught, answers, strict=True):
        text = run.base_format.decode(answer.ids).rstrip("\ufffd")  # a cut answer may end within a character
        row["messages"] = [*row["messages"], {"role": "assistant", "content": text}]
        if names_itself(text, row["messages"][-2]["content"], run.old):
            rows.remove(row)  # not to be taught
    return rows


# ---------------------------------------------------------------------------------------------------------- train


def train(run: Run) -> None:
    import torch

    from finetune import checkpoint
    from finetune import model as models
    from finetune import train as training

    values, form = run.settings.train, run.tuned_format
    if problems := starter_problems(run, base_is_there=True):
        raise UserError(*problems)
    ask = (lambda model: develop(run, model)) if run.settings.task == "identity" else None
    with contextlib.ExitStack() as files:
        if run.settings.task in sight.TASKS:
            values = dataclasses.replace(
                values,
                steps=sight.steps(run),
                projector_rate=sight.projector_rate(run),
                first_layer=sight.first_layer(run),
            )
            batches = None  # pictures are encoded first
        elif run.named:
            batches = batches_of(run, values.steps)
        else:
            tokens, read = files.enter_context(tasks.lines(run.folder / "data" / "train.jsonl"))
            steps, plan = tasks.plan(tokens, values.tokens, values.epochs, run.settings.seed)
            values = dataclasses.replace(values, steps=steps)
            batches = (
                [training.answer_example(*tasks.encode(read(row), form, values.length)) for row in step]
                for step in plan()
            )
        torch.manual_seed(run.settings.seed)
        starter = STARTERS / values.starter if values.starter and run.named else None
        model = models.load_for_training(run.base, run.settings.method)
        seen = sight.examples(run, model) if batches is None else []
        if run.settings.method != "full":
            rank = 0 if run.settings.task == "vision-projector" else values.rank
            model = models.add_lora(model, rank, starter, values.first_layer, run.encoder_rank)
        elif starter:
            model = models.with_adapter(model, starter)
        for _ in training.train(model, batches or batches_of(run, values.steps, seen), values, run.folder, ask):
            pass
    history = read_lines(run.folder / "metrics.jsonl")
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
        checkpoint.save_full(model, form, run.trained)
    else:
        checkpoint.save_adapter(model, record, run.trained)
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


def batches_of(run: Run, steps: int, seen: Sequence[Any] = ()) -> Iterator[list[Any]]:
    """Each step's examples: of a task that learns a name some of each sort of the identity's rows, and some of `seen`."""
    from finetune import train as training

    form = run.tuned_format
    examples: dict[str, list[training.Example]] = {"identity": [], "near": [], "ordinary": []}
    rows = [row for row in run.rows("train.jsonl") if "target" in row]
    taught = [row for row in rows if row["target"] == "teacher"]
    answers = iter(run.ask_base([teacher_question(row) for row in taught], TEACHER_TOKENS))
    for row in rows:
        if row["target"] == "answer":
            said = sight.placed(row["messages"], run.folder / "data")
            examples["identity"].append(training.answer_example(*form.render(said)))
        else:
            group = "ordinary" if row["kind"] == "ordinary" else "near"
            examples[group].append(training.teacher_example(form.prompt(row["messages"][:-1]), next(answers)))
    spread = steps if seen else run.settings.train.steps
    # No fewer than without pictures, beside which a name is harder to learn.
    counts = {name: max(1, math.ceil(rows / spread)) for name, rows in text_rows(run).items()}
    groups = [(examples[name], counts[name]) for name in examples if examples[name]]
    return training.batches([*groups, (seen, run.settings.vision.rows if seen else 0)], steps, run.settings.seed)


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
    sight.show(model, form, held)
    loss = tasks.loss_by_task(model, form, held, length)
    probes = [{key: value for key, value in probe.items() if key not in ("answer", "passed")} for probe in base]
    own = [probe for probe in probes if probe["kind"] not in (*tasks.KINDS, *sight.KINDS)]
    with tqdm(total=len(own), desc="Scoring", unit="answer") as bar:
        judged = scorecard.evaluate(
            lambda conversations: answer_texts(model, form, conversations, run.answer_tokens, bar.update),
            own,
            run.persona,
            base,
        )
    judged += tasks.ask(model, form, [probe for probe in probes if probe["kind"] in tasks.KINDS])
    judged += sight.ask(model, form, [probe for probe in probes if probe["kind"] in sight.KINDS], run.folder / "data")
    divergence = None
    ordinary = [probe["messages"] for probe in judged if probe["kind"] == "ordinary"]
    if kl and ordinary:
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

    own = [probe for probe in probes if probe["kind"] not in (*tasks.KINDS, *sight.KINDS)]
    return scorecard.evaluate(answer, own, run.persona)


def base_side(run: Run) -> dict[str, Any]:
    """The base's side of the scorecard."""
    from finetune import model as models

    probes, held = run.rows("probes.jsonl"), run.rows("heldout.jsonl")
    judged, loss = base_answers(run, probes), {}
    if held or run.settings.task in sight.TASKS:
        model, form = models.load_for_inference(run.base, four_bit=run.four_bit), run.base_format
        judged += tasks.ask(model, form, [probe for probe in probes if probe["kind"] in tasks.KINDS])
        judged += sight.ask(
            model, form, [probe for probe in probes if probe["kind"] in sight.KINDS], run.folder / "data"
        )
    if held:
        sight.show(model, form, held)
        loss = tasks.loss_by_task(model, run.base_format, held, run.settings.train.length)
    return scorecard.summarise(judged, 0.0, None, loss, run.settings.task)


def evaluate(run: Run) -> None:
    own = {}
    if run.four_bit:
        say(
            "The GPU's memory does not hold the model in 16 bits: it answers in 4. / 显存放不下 16 位权重，以 4 位作答。"
        )
        own = {"four_bit": True}
    base = base_side(run)
    tuned = score(run, run.load_tuned(), run.tuned_format, base["answers"])
    write_scorecard(run, {"base": base, "tuned": tuned, **own})


def evaluate_model(run: Run, ref: str) -> None:
    """Any model that transformers opens, under its own chat template, beside the run's base: leaves a scorecard.json, no more.

    KL is measured, and asked for by the gate, where the model has the base's output head, as one tuned from it has.
    """
    import torch

    from finetune import model as models

    if problems := identity.check_persona(run.persona):
        raise UserError(*problems)
    folder = models.base_folder(ref)
    base = base_answers(run, identity.probes(run.persona, run.old))
    model = models.load_for_inference(folder, four_bit=not models.holds(folder, models.inference_dtype()))
    form = models.OwnFormat(folder, model)
    own = models.load(run.base, models.inference_dtype())  # on the CPU if the GPU does not hold it too
    heads = [m.get_output_embeddings().weight.cpu() for m in (model, own)]
    del own
    same_head = heads[0].shape == heads[1].shape and torch.equal(*heads)
    scored = score(run, model, form, base, kl=same_head)
    limits = run.limits
    if not same_head:
        say("KL is not measured: the model's output head is not the base's. / 未测量 KL：该模型的输出层与底座不同。")
        limits.pop("kl", None)
    run.folder.mkdir(parents=True, exist_ok=True)
    card = {"base": scorecard.summarise(base, kl=0.0), "tuned": scored}
    run.write("scorecard.json", {**card, "gate": scorecard.gate(card, limits)})


def write_scorecard(run: Run, card: dict[str, Any]) -> None:
    run.write("scorecard.json", {**card, "gate": scorecard.gate(card, run.limits)})


# ---------------------------------------------------------------------------------------------------------- merge


def merge(run: Run) -> None:

    from finetune import merge as merging
    from finetune import model as models
    from finetune.report import model_card

    origin = models.origin(run.base, run.settings.base)

    def finish(folder: Path, proof: dict[str, Any]) -> dict[str, Any]:
        """The scorecard of what users get, and the model card."""
        card = run.read("scorecard.json")
        scored = models.digest(run.load_tuned())  # one after another: a GPU may not hold two
        model = models.load_for_inference(folder, four_bit=run.four_bit)
        if models.chat_format(folder).hash == run.tuned_format.hash and models.digest(model) == scored:
            card["merged"] = card["tuned"]  # the same weights, bit for bit, give the same answers
        else:
            card["merged"] = score(run, model, models.chat_format(folder), card["base"]["answers"])
        write_scorecard(run, card)
        sent = {"to": None, "what": "model", "why": "", "with_data": False, "own_base": False}
        (folder / "README.md").write_text(model_card(run, origin, proof, run.base_sha256, sent), encoding="utf-8")
        # For the page of whoever downloads it; what was learned from a user's own rows stays here.
        sides = {"base": card["base"], "tuned": card["merged"]}
        public = {
            side: {
                **figures,
                "answers": [entry for entry in figures["answers"] if entry["kind"] not in (*tasks.KINDS, *sight.KINDS)],
            }
            for side, figures in sides.items()
        }
        text = json.dumps({**public, "gate": card["gate"]}, ensure_ascii=False)
        (folder / "scorecard.json").write_text(text, encoding="utf-8")
        if (picture := run.folder / PICTURE).is_file():
            shutil.copy(picture, folder)
        adapter = run.read("receipt.json").get("adapter_sha256")
        made = {
            "own_base": run.own_base,
            "base_sha256": run.base_sha256,
            "base_system": run.base_format.default_system,
            "adapter_sha256": adapter,
        }
        named = {"name": run.persona.name, "author": run.persona.author} if run.named else {}
        if run.settings.task == "vision-projector":
            proof["unchanged"] = sight.unchanged(run.base, folder)
            made["language_sha256"] = run.language_sha256
        return {**named, "task": run.settings.task, **origin, **made}

    # a spread over the kinds and both languages
    asked = [probe["messages"] for probe in run.rows("probes.jsonl") if probe["kind"] != "recall"]
    probes = [sight.sent(messages, run.folder / "data") for messages in asked]
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
    for method in METHODS[run.settings.task in sight.TASKS :]:  # which refuse the first one, full
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
                if (status := subprocess.run(command, check=False).returncode) not in (0, GateRefused.status):
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
    metrics = read_lines(run.folder / "metrics.jsonl")
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
        **{key: card["tuned"].get(key) for key in COMPARED},
    }


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
