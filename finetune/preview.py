"""A user's rows before the work: one row's life from the file to the supervised tokens; lengths, what is cut, copies; and
what training on them will take, found by training for a moment."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import random
import re
import tempfile
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune import records, sight, stages, tasks
from finetune.chat_format import ChatFormat, Rendered, text_of
from finetune.embedded import say
from finetune.errors import UserError
from finetune.run_folder import Run, read_lines

SAMPLE, CHARACTERS = 1000, 4_000_000  # rows that are tokenized, and of these so many characters; the others are counted
TOKENS = 400  # that are shown of one row
DATA_URL = re.compile(r"(data:image/[\w.+-]+;base64,[\w+/=]{20})[\w+/=]+")  # the beginning is shown
TRIAL_TOKENS = 2048  # of a step that is tried on a processor
TRIAL_SECONDS = 12.0  # training is tried so long, and two steps at least
GPU_STEPS = 8  # there: the first ones are slow
TRAINED_BYTES = 16  # of a trained weight: itself, its gradient and AdamW's two moments, in float32
# What a run's heap adds to the trial's activations, as passes of ever new lengths leave pieces in it that later ones do not
# fit: 0 to .16 of them by tests/bench/estimate.py on two cores with bfloat16: LoRA and full, rows short and of 1024 tokens.
HOLES = 0.1


# ------------------------------------------------------------------------------------------------------- one datum


def life(form: ChatFormat, row: dict[str, Any]) -> dict[str, Any]:
    """{"place", "raw": JSON, "messages", "text": with control tokens, "tokens": [{"id", "text", "supervised", "control"}],
    "more": tokens beyond those} of a row of records.py or of train.jsonl; a token that ends no character has no text."""
    ids, mask = render(form, [row])[0]
    names = {number: token for token, number in form.control.items()}
    tokens, stream = [], form.stream()
    for number, supervised in zip(ids, mask, strict=True):
        control = number in names
        text = names[number] if control else stream.add(number)
        stream = form.stream() if control else stream
        tokens.append({"id": number, "text": text, "supervised": bool(supervised), "control": control})
    raw = row.get("raw") or {key: value for key, value in row.items() if key not in ("place", "form", "again")}
    return {
        "place": row.get("place", ""),
        "raw": DATA_URL.sub(r"\1…", json.dumps(raw, ensure_ascii=False, indent=1, default=str)),
        "messages": [
            {**m, "content": text_of(m)} for m in row.get("messages") or [{"role": "text", "content": row["text"]}]
        ],
        "text": "".join(token["text"] for token in tokens),
        "tokens": tokens[:TOKENS],
        "more": max(0, len(tokens) - TOKENS),
    }


def render(form: ChatFormat, rows: Sequence[dict[str, Any]]) -> list[Rendered]:
    """Ids and supervised tokens: all of a text, every answer of a conversation, the last one of an identity row."""
    chats = [row for row in rows if "messages" in row]
    last = iter(form.render_all([row["messages"] for row in chats if "target" in row]))
    every = iter(form.render_all([row["messages"] for row in chats if "target" not in row], supervise="all"))
    rendered = []
    for row in rows:
        if "text" in row:
            ids = form.document(row["text"], ends=row.get("ends", True))
            rendered.append(Rendered(ids, [1] * len(ids)))
        else:
            rendered.append(next(last if "target" in row else every))
    return rendered


# ------------------------------------------------------------------------------------------------------- all rows


def survey(form: ChatFormat, rows: Iterable[dict[str, Any]], length: int) -> dict[str, Any]:
    """What there is to say of all rows, each seen once: {"rows", "forms", "copies": rows whose content came before, "tokens",
    "sampled": rows that were tokenized, and of these "lengths": {..}, "long": share longer than `length` tokens, "cut":
    tokens lost by that, "supervised": share; "sample": themselves, "first": row}."""
    source, sample = random.Random(0), []
    forms: Counter[str] = Counter()
    hashes, first, count, characters = array("Q"), None, 0, 0
    for count, row in enumerate(rows, 1):
        first = first or row
        forms[row.get("form", "")] += 1
        content = words(row)
        characters += len(content)
        if not row.get("again"):
            hashes.append(int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big"))
        if len(sample) < SAMPLE:
            sample.append(row)
        elif (at := source.randrange(count)) < SAMPLE:
            sample[at] = row
    source.shuffle(sample)
    sizes = [len(words(row)) for row in sample]
    kept = max(1, sum(1 for size in itertools.accumulate(sizes) if size <= CHARACTERS))
    sample, rendered = sample[:kept], render(form, sample[:kept])
    lengths = np.array([len(row.ids) for row in rendered])
    cut = np.array([max(0, len(r.ids) - length) * ("messages" in row) for r, row in zip(rendered, sample, strict=True)])
    quantiles = dict(
        zip(("least", "median", "most of 20", "most"), np.quantile(lengths, (0, 0.5, 0.95, 1)), strict=True)
    )
    return {
        "rows": count,
        "forms": dict(forms),
        "copies": len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))),
        "sampled": kept,
        "tokens": int((lengths - cut).sum() / sum(sizes[:kept]) * characters),
        "lengths": {name: round(float(value)) for name, value in quantiles.items()},
        "long": float(np.mean(lengths > length)),
        "cut": float(cut.sum() / lengths.sum()),
        "supervised": sum(sum(row.mask) for row in rendered) / int(lengths.sum()),
        "first": first,
        "sample": sample,
    }


def words(row: dict[str, Any]) -> str:
    return row.get("text") or "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])


# -------------------------------------------------------------------------------------------------- time and memory


def estimate(run: Run, rows: Sequence[dict[str, Any]], count: int, tokens: int) -> dict[str, Any]:
    """{"seconds", "tokens_per_s", "steps", "bytes" of memory at most, "gpu": whether of its} for training on `count` rows
    like these of `tokens` in all: measured by training on these for TRIAL_SECONDS, with the run's own loop."""
    from finetune import model as models
    from finetune import train as training

    values, form = run.settings.train, run.tuned_format
    parts = list(tasks.pieces(rows, run.settings.task, form, values.length))
    if not parts:
        raise UserError(
            f"No row of {', '.join(run.settings.data)} has an answer within train.length={values.length} tokens."
        )
    mean, each = sum(part["tokens"] for part in parts) / len(parts), len(parts) / len(rows)
    held = max(1, min(tasks.HELD_OUT, int(count * each) // 20))
    total = max(0.0, tokens - held * mean) * values.epochs
    per_step = min(values.tokens, max(tasks.MIN_TOKENS, int(total) // tasks.STEPS))
    longest = sorted(parts, key=lambda part: -part["tokens"])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    say("Training for a moment, to see how fast it is here ... / 试训练片刻以估计用时……")
    # the loop's own bar would count to what it never reaches
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model = models.load_for_training(run.base, run.settings.method)
        if run.settings.method != "full":
            model = models.add_lora(model, values.rank)
        gpu = model.device.type == "cuda"
        trial, least = (per_step, GPU_STEPS) if gpu else (min(per_step, TRIAL_TOKENS), 2)

        def steps_of(parts: Sequence[dict[str, Any]], tokens: int) -> Iterator[list[Any]]:
            endless = itertools.cycle(parts)
            return _steps((training.answer_example(*tasks.encode(p, form, values.length)) for p in endless), tokens)

        def steps() -> Iterator[list[Any]]:
            began = time.perf_counter()
            for number, step in enumerate(steps_of(longest[:1] + parts, trial)):
                if number >= least and time.perf_counter() - began > TRIAL_SECONDS:
                    break
                yield step
            if not gpu:  # most is held by long passes, when the moments and what short passes left in pieces are there
                yield next(steps_of(longest, TRIAL_TOKENS))

        fixed = psutil.Process().memory_info().rss
        fixed += TRAINED_BYTES * sum(weight.numel() for weight in training.trained(model).values())
        planned = max(1, round(total / per_step))
        still = dataclasses.replace(
            values, steps=planned, learning_rate=0.0, full_learning_rate=0.0, checkpoint_every=10**6
        )
        for _ in training.train(model, steps(), still, Path(folder)):
            pass
        history = read_lines(Path(folder) / "metrics.jsonl")[: None if gpu else -1]  # long rows have another speed
    tokens_at, seconds_at = ([0.0, *(line[key] for line in history)] for key in ("tokens", "seconds"))
    settled = (len(history) + 1) // 2  # before, it warms up; on a GPU layers may be compiled
    rate = (tokens_at[-1] - tokens_at[settled]) / (seconds_at[-1] - seconds_at[settled])
    rest = max(0.0, total - tokens_at[-1]) / rate
    peak = stages.peak_memory()
    return {
        "seconds": float(np.interp(total, tokens_at, seconds_at)) + rest,
        "tokens_per_s": rate,
        "steps": planned,
        "gpu": "gpu" in peak,
        "bytes": peak["gpu"] if gpu else peak["host"] + int(HOLES * max(0, peak["host"] - fixed)),
    }


def _steps(examples: Iterable[Any], tokens: int) -> Iterator[list[Any]]:
    """About so many tokens of examples at a time."""
    step: list[Any] = []
    size = 0
    for example in examples:
        if step and size + len(example.ids) > tokens:
            yield step
            step, size = [], 0
        step.append(example)
        size += len(example.ids)


# ----------------------------------------------------------------------------------------------------------- shown


def facts(run: Run, found: dict[str, Any], taken: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """(English, Chinese, value) of a survey and an estimate."""
    values, lengths = run.settings.train, found["lengths"]
    forms = ", ".join(f"{form or 'rows'} {count:,}" for form, count in found["forms"].items())
    sampled = "" if found["sampled"] == found["rows"] else f" ({found['sampled']:,} rows tokenized)"
    lines = [
        ("rows", "条数", f"{found['rows']:,}: {forms}"),
        ("copies of others", "重复", f"{found['copies']:,}"),
        ("tokens an epoch", "每轮词元", f"{found['tokens']:,}{sampled}"),
        ("tokens a row", "每条词元", ", ".join(f"{name} {value:,}" for name, value in lengths.items())),
        (
            f"longer than {values.length:,} tokens",
            "超长",
            f"{found['long']:.1%} of the rows; conversations lose {found['cut']:.1%} of all tokens",
        ),
        ("supervised", "参与训练的词元", f"{found['supervised']:.1%} of the tokens"),
    ]
    if taken:
        device = "GPU memory" if taken["gpu"] else "memory"
        lines += [
            ("training", "训练用时", f"{clock(taken['seconds'])}: {values.epochs:g} epochs, {taken['steps']:,} steps"),
            ("speed", "速度", f"{taken['tokens_per_s']:,.0f} tokens/s, tried on this machine"),
            (device, "内存", f"{taken['bytes'] / 1e9:.1f} GB at most"),
        ]
    return lines


def examine(run: Run) -> None:
    """Read all of --data, try the training, and show both here and in check.html in the run's folder."""
    from finetune.report import write_page

    values, form = run.settings, run.tuned_format
    rows = tasks.own_rows(records.good_rows(values.data, values.skip_bad, sight.reader(values)), values.task)
    found = survey(form, rows, values.train.length)
    seen = values.task in sight.TASKS  # how long its pictures take is not tried
    lines = facts(run, found, None if seen else estimate(run, found["sample"], found["rows"], found["tokens"]))
    datum = life(form, found["first"])
    show(lines, datum, Console(stderr=True, highlight=False))
    run.folder.mkdir(parents=True, exist_ok=True)
    write_page(run.folder / "check.html", "check.html.jinja", datum=datum, facts=lines, data=values.data)
    say(f"The same to look at in a browser 网页版: {run.folder / 'check.html'}")


def clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def plain(text: str) -> str:
    """Control characters of a text made visible: in a terminal they would be obeyed."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else f"\\x{ord(c):02x}" for c in text
    )


def show(lines: Sequence[tuple[str, str, str]], datum: dict[str, Any], console: Console) -> None:
    """The row's life and the survey in the terminal: supervised tokens green, control tokens magenta."""
    console.rule(Text(f"A datum's life 一条数据的一生: {datum['place']}"))
    for number, (title, body) in enumerate(
        (
            ("raw row 原始数据", Text(plain(datum["raw"]))),
            ("conversation 对话", _conversation(datum)),
            ("text with control tokens, supervised in green 带控制符的文本，绿色参与训练", _tokens(datum, "text")),
            ("ids 词元编号", _tokens(datum, "id")),
        ),
        1,
    ):
        console.print(Text(f"{number}. {title}", style="bold"))
        console.print(body)
    table = Table(show_header=False)
    for english, chinese, value in lines:
        table.add_row(english, chinese, Text(value))
    console.print(table)


def _conversation(datum: dict[str, Any]) -> Text:
    text = Text()
    for message in datum["messages"]:
        text.append(f"{message['role']}: ", "bold").append(plain(text_of(message)) + "\n")
    return text


def _tokens(datum: dict[str, Any], key: str) -> Text:
    text = Text()
    for token in datum["tokens"]:
        colour = "magenta" if token["control"] else "default"
        style = f"bold {'green' if not token['control'] else 'magenta'} underline" if token["supervised"] else colour
        text.append(plain(token[key]) if key == "text" else f"{token[key]} ", style)
    return text.append(f" ... {datum['more']:,} more tokens" if datum["more"] else "")
