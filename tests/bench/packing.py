"""Rendering, filling rows and making model inputs, in tokens a second: prints one JSON line.

`python tests/bench/packing.py [MILLION_CHARACTERS]`. tokenizer: the tokenizer's own batch call on the same turns; render:
ours, with the mask of supervised tokens; ratio: of the two in the same round, the median; fill and pack: conversations
of those tokens into rows of 2048 and those into model inputs; full: the rows' share that is filled.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from finetune import embedded, packing
from finetune.model import chat_format

LENGTH, ROUNDS = 2048, 5


def conversations(characters: int) -> list[list[dict[str, str]]]:
    """Of one to three turns, cut out of what this project says about itself; always the same."""
    root, source = Path(__file__).parents[2], random.Random(0)
    text = "".join(
        file.read_text(encoding="utf-8") for file in [*sorted(root.glob("finetune/*.py")), root / "README.md"]
    )
    found, size = [], 0
    while size < characters:
        messages = []
        for _ in range(source.randint(1, 3)):
            for role, most in (("user", 300), ("assistant", 1200)):
                at = source.randrange(len(text) - most)
                messages.append({"role": role, "content": text[at : at + source.randint(20, most)]})
        found.append(messages)
        size += sum(len(message["content"]) for message in messages)
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main() -> None:
    chats = conversations(int(float(sys.argv[1] if len(sys.argv) > 1 else 4) * 1e6))
    form = chat_format(embedded.folder())
    tokenizer = form.tokenizer
    turns = [f"{message['role']}\n{message['content']}" for messages in chats for message in messages]
    seconds: dict[str, list[float]] = {"tokenizer": [], "render": [], "fill": [], "pack": []}
    for _ in range(ROUNDS):
        spent, _ = timed(lambda: [turn.ids for turn in tokenizer.encode_batch(turns, add_special_tokens=False)])
        seconds["tokenizer"].append(spent)
        spent, rendered = timed(lambda: form.render_all(chats, supervise="all"))
        seconds["render"].append(spent)
        sequences = [row.ids[:LENGTH] for row in rendered]
        spent, rows = timed(lambda sequences=sequences: list(packing.fill(sequences, LENGTH)))
        seconds["fill"].append(spent)
        spent, _ = timed(lambda rows=rows: [packing.pack(row) for row in rows])
        seconds["pack"].append(spent)
    tokens = sum(map(len, sequences))
    both = [fill + pack for fill, pack in zip(seconds["fill"], seconds["pack"], strict=True)]
    ratio = statistics.median(t / r for t, r in zip(seconds["tokenizer"], seconds["render"], strict=True))
    figures = {name: round(tokens / statistics.median(spent)) for name, spent in seconds.items()}
    full = tokens / LENGTH / len(rows)
    print(
        json.dumps(
            {"bench": "packing", "tokens": tokens, **figures, "fill_and_pack": round(tokens / statistics.median(both))}
            | {"render_to_tokenizer": round(ratio, 2), "full": round(full, 4), "threads": torch.get_num_threads()}
        )
    )


if __name__ == "__main__":
    main()
