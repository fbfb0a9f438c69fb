"""Whether `check --data` comes true: its estimate beside the training it speaks of, each in a process of its own, for every
method and task. Prints one JSON line.

`python tests/bench/estimate.py [--processor-time] [--rows N] [--characters N] [--base REF] [METHOD/TASK ...]`. ratio: estimated
seconds (bytes) over measured ones. --characters: of an answer or a text, at most; 4000 are a row's 1024 tokens. With
--processor-time seconds are this process's own, which other programs do not change much.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from finetune import preview, records, settings, stages
from finetune import train as training

PAIRS = ("lora/instruct", "lora/pretrain", "qlora/instruct", "full/instruct")


def data(file: Path, task: str, rows: int, characters: int) -> None:
    """Pieces of what this project says about itself; always the same."""
    root, source = Path(__file__).parents[2], random.Random(0)
    text = (root / "README.md").read_text(encoding="utf-8") + (root / "finetune" / "records.py").read_text(
        encoding="utf-8"
    )
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            at = source.randrange(len(text) - 200 - characters)
            asked = text[at : at + source.randint(20, 200)]
            said = text[at + 200 : at + 200 + source.randint(min(50, characters), characters)]
            row = {"text": said} if task == "pretrain" else {"query": asked, "response": said}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(folder: str, base: str, pair: str) -> stages.Run:
    method, task = pair.split("/")
    values = {"base": base, "method": method, "task": task, "data": [f"{folder}/{task}.jsonl"]}
    return stages.Run(Path(folder) / pair.replace("/", "-"), settings.build({**values, "train": {"epochs": 1.0}}))


def expected(processor_time: bool, *words: str) -> dict[str, Any]:
    training.time.perf_counter = time.process_time if processor_time else time.perf_counter
    made = run(*words)
    found = preview.survey(made.tuned_format, records.good_rows(made.settings.data), made.settings.train.length)
    return preview.estimate(made, found["sample"], found["rows"], found["tokens"])


def measured(processor_time: bool, *words: str) -> dict[str, Any]:
    training.time.perf_counter = time.process_time if processor_time else time.perf_counter
    made = run(*words)
    stages.perform(made, "data")
    stages.perform(made, "train")
    last = json.loads((made.folder / "metrics.jsonl").read_text().splitlines()[-1])
    peak = made.read("receipt.json")["peak_memory"]
    return {"seconds": last["seconds"], "tokens": last["tokens"], "bytes": peak.get("gpu", peak["host"])}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("pairs", nargs="*", default=PAIRS)
    flags.add_argument("--processor-time", action="store_true")
    flags.add_argument("--rows", type=int, default=300)
    flags.add_argument("--characters", type=int, default=1200)
    flags.add_argument("--base", default=settings.DEFAULT_PRESET)
    args = flags.parse_args()
    found = {}
    alone = {"max_workers": 1, "mp_context": multiprocessing.get_context("spawn")}
    with tempfile.TemporaryDirectory() as folder:
        for task in ("instruct", "pretrain"):
            data(Path(folder) / f"{task}.jsonl", task, args.rows, args.characters)
        for pair in args.pairs:
            sides = []
            for work in (expected, measured):
                with ProcessPoolExecutor(**alone) as process:
                    sides.append(process.submit(work, args.processor_time, folder, args.base, pair).result())
            mine, true = sides
            found[pair] = {
                "seconds": round(true["seconds"], 1),
                "seconds_ratio": round(mine["seconds"] / true["seconds"], 3),
                "GB": round(true["bytes"] / 1e9, 2),
                "bytes_ratio": round(mine["bytes"] / true["bytes"], 3),
            }
    print(json.dumps({"bench": "estimate", "processor_time": args.processor_time, **stages.hardware(), **found}))


if __name__ == "__main__":
    main()
