"""The tasks that learn from a user's own rows: pretrain (texts) and instruct (conversations).

Rows -> a data folder with training rows, held-out rows and probes; training rows -> the examples of each step; and what a
model makes of the held-out rows and the probes.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.chat_format import ChatFormat
from finetune.errors import UserError

BATCH = 256  # rows that are tokenized together
HELD_OUT = 32  # rows at most, and at most a twentieth of all
STEPS = 60  # about so many a run has, at least, as long as a step has MIN_TOKENS
MIN_TOKENS = 1024
KINDS = ("recall", "reply")  # of probes: what the training texts say; whether a conversation is answered
PROBES = 16  # of each kind
RECALL_PROMPT, RECALL_ANSWER = (16, 96), 8  # tokens of a training text that are given; that must follow word for word
REPLY_TOKENS = 96  # within which an answer must have ended


def prepare(rows: Iterable[dict[str, Any]], task: str, form: ChatFormat, length: int, seed: int, folder: Path) -> None:
    """Write train.jsonl, heldout.jsonl and probes.jsonl; each row with "tokens", how many a step will read of it. A text
    becomes passages of at most `length` tokens. Held-out rows are chosen by their content: none is trained on as well."""
    everything = folder / "all.jsonl"
    with everything.open("w", encoding="utf-8") as file:
        rows = own_rows(rows, task)
        while some := list(itertools.islice(rows, BATCH)):
            for part in pieces(some, task, form, length):
                file.write(json.dumps(part, ensure_ascii=False) + "\n")
    chosen, count, smallest = set(), 0, []
    with everything.open("rb") as lines:
        for count, line in enumerate(lines, 1):  # noqa: B007
            key = _key(line, seed)
            if len(smallest) < HELD_OUT or key < smallest[-1]:
                at = bisect.bisect_left(smallest, key)
                if smallest[at : at + 1] != [key]:
                    smallest.insert(at, key)
                    del smallest[HELD_OUT:]
    chosen = set(smallest[: max(1, min(HELD_OUT, count // 20))])
    kept, held, source = 0, [], random.Random(seed)
    sample: list[dict] = []  # of the training rows, each as likely as any other (reservoir)
    with everything.open("rb") as lines, (folder / "train.jsonl").open("wb") as train:
        for line in lines:
            row = json.loads(line)
            if _key(line, seed) in chosen:
                held.append({"task": task, **row})
                continue
            kept += 1
            train.write(line)
            if len(sample) < PROBES:
                sample.append(row)
            elif (at := source.randrange(kept)) < PROBES:
                sample[at] = row
    everything.unlink()
    if not kept:
        raise UserError(
            f"--data has {len(chosen)} different rows that can be learned from, and some are held out to measure by: give more."
        )
    held = list({json.dumps(row): row for row in held}.values())  # rows with a weight come several times
    probes = recall_probes(sample, form, seed) if task == "pretrain" else reply_probes(held)
    for name, values in (("heldout.jsonl", held), ("probes.jsonl", probes)):
        (folder / name).write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")


def _key(line: bytes, seed: int) -> bytes:
    return hashlib.sha256(b"%d/" % seed + line).digest()[:12]


def own_rows(rows: Iterable[dict[str, Any]], task: str) -> Iterator[dict[str, Any]]:
    """The rows. Raises UserError for one of the other task."""
    for row in rows:
        if (task == "pretrain") != ("text" in row):
            other, what = ("instruct", "a conversation") if task == "pretrain" else ("pretrain", "a text")
            raise UserError(
                f"{row.get('place', 'A row')} is {what}; --task {task} does not learn these: use --task {other}."
            )
        yield row


def pieces(rows: Sequence[dict[str, Any]], task: str, form: ChatFormat, length: int) -> Iterator[dict[str, Any]]:
    """Rows as they are trained."""
    if task == "instruct":
        messages = [row["messages"] for row in rows]
        for said, (ids, mask) in zip(messages, form.render_all(messages, supervise="all"), strict=True):
            if any(mask[:length]):  # else its question alone is longer than a row
                yield {"messages": said, "tokens": min(length, len(ids))}
        return
    for row in rows:
        texts = list(passages(row["text"], form, length - 2))  # beside the control tokens at both ends
        for text in texts:
            passage = {"text": text, "ends": text is texts[-1]}
            yield {**passage, "tokens": len(document(passage, form)[:length])}


def passages(text: str, form: ChatFormat, length: int) -> Iterator[str]:
    """The text in pieces of at most about `length` tokens, cut at line ends where there are any."""
    piece, size, lines = "", 0, text.splitlines(keepends=True)
    for line, encoded in zip(lines, form.encode_all(lines), strict=True):
        offsets = encoded.offsets
        if piece and size + len(offsets) > length:
            yield piece
            piece, size = "", 0
        while len(offsets) > length:  # a line that is longer than a passage
            cut = offsets[length][0] or len(line)
            yield line[:cut]
            line = line[cut:]
            offsets = form.encode(line).offsets
        piece += line
        size += len(offsets)
    if piece.strip():
        yield piece


def document(passage: dict[str, Any], form: ChatFormat) -> list[int]:
    return form.document(passage["text"], ends=passage["ends"])


def encode(row: dict[str, Any], form: ChatFormat, length: int) -> tuple[list[int], list[int]]:
    """A row's ids and which of them are supervised: all of a text, of a conversation every answer."""
    if "text" in row:
        ids = document(row, form)[:length]
        return ids, [1] * len(ids)
    ids, mask = form.render(row["messages"], supervise="all")
    return ids[:length], mask[:length]


def recall_probes(rows: Sequence[dict[str, Any]], form: ChatFormat, seed: int) -> list[dict[str, Any]]:
    """Beginnings of training texts, with what follows there."""
    probes, source = [], random.Random(seed)
    for row in rows:
        offsets = form.encode(row["text"]).offsets
        first, last = RECALL_PROMPT[0], min(RECALL_PROMPT[1], len(offsets) - RECALL_ANSWER - 1)
        if first > last:
            continue
        cut = source.randint(first, last)
        start, end = offsets[cut][0], offsets[cut + RECALL_ANSWER][0]
        if follows := row["text"][start:end].strip():
            prompt = [{"role": "user", "content": row["text"][:start]}]
            probes.append(_probe("recall", "continuation", prompt, follows))
    return list({probe["id"]: probe for probe in probes}.values())


def reply_probes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out conversations up to their last question."""
    probes = []
    for row in rows[:PROBES]:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        if last:
            answer = row["messages"][last]["content"]
            probes.append(_probe("reply", "an answer that ends", row["messages"][:last], answer))
    return list({probe["id"]: probe for probe in probes}.values())


def _probe(kind: str, expect: str, messages: list[dict[str, str]], answer: str) -> dict[str, Any]:
    """Its id is its content's: later runs that ask it again, of their own base, ask it under the same."""
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:8]
    return {
        "id": f"{kind}-{digest}",
        "kind": kind,
        "lang": "",
        "expect": expect,
        "accept": [answer],
        "messages": messages,
    }


# -------------------------------------------------------------------------------------------------------- training


def plan(tokens: Sequence[int], most: int, epochs: float, seed: int) -> tuple[int, Callable[[], Iterator[list[int]]]]:
    """(steps, what gives each step's rows): `epochs` times over all rows, shuffled anew each time, in steps of at most
    `most` tokens, or the longest row's, that are filled (packing.py); fewer where they would make less than about STEPS."""
    from finetune.packing import fill

    total = int(np.sum(tokens, dtype=np.int64) * epochs)
    most = max(min(most, max(MIN_TOKENS, total // STEPS)), max(tokens))

    def rows() -> Iterator[int]:
        left = total
        for turn in range(math.ceil(epochs)):
            for row in np.random.default_rng([seed, turn]).permutation(len(tokens)).tolist():
                if left > 0:
                    yield row
                left -= int(tokens[row])

    def steps() -> Iterator[list[int]]:
        return fill(rows(), most, size=lambda row: int(tokens[row]))

    return sum(1 for _ in steps()), steps


@contextlib.contextmanager
def lines(file: Path) -> Iterator[tuple[np.ndarray, Callable[[int], dict[str, Any]]]]:
    """(each row's tokens, what reads a row): a large file stays on the disk."""
    offsets, tokens = [0], []
    with file.open("rb") as stream:
        for line in stream:
            offsets.append(offsets[-1] + len(line))
            tokens.append(json.loads(line)["tokens"])
        starts = np.array(offsets)

        def read(row: int) -> dict[str, Any]:
            stream.seek(starts[row])
            return json.loads(stream.readline())

        yield np.array(tokens), read


# ------------------------------------------------------------------------------------------------------- measuring


def ask(model: Any, form: ChatFormat, probes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Probes of these KINDS with the model's answers and whether they are right: the text goes on word for word; the
    answer says something and ends."""
    from finetune.generation import complete

    judged: dict[str, dict[str, Any]] = {}
    for kind, length in (("recall", RECALL_ANSWER + 4), ("reply", REPLY_TOKENS)):
        some = [probe for probe in probes if probe["kind"] == kind]
        prompts = [
            form.document(p["messages"][0]["content"], ends=False) if kind == "recall" else form.prompt(p["messages"])
            for p in some
        ]
        for probe, answer in zip(some, complete(model, prompts, form.stop_ids, length), strict=True):
            text = form.decode(answer.ids).strip()
            ended = len(answer.states) > len(answer.ids)
            right = text.startswith(probe["accept"][0]) if kind == "recall" else bool(text) and ended
            judged[probe["id"]] = {**probe, "answer": text, "passed": right}
    return [judged[probe["id"]] for probe in probes]


def loss_by_task(model: Any, form: ChatFormat, rows: Sequence[dict[str, Any]], length: int) -> dict[str, float]:
    """Cross-entropy of held-out rows, in nats per supervised token, for each task that has some."""
    import torch

    from finetune.train import MOST_TOKENS, answer_example, losses, parts

    found = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        examples = [answer_example(*encode(row, form, length)) for row in rows if row["task"] == task]
        with torch.inference_mode():
            total = sum(losses(model, part)[0].item() for part in parts(examples, MOST_TOKENS))
        found[task] = total / sum(len(example.positions) for example in examples)
    return found
