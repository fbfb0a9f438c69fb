"""The preset's figures for ten names and authors that no starter saw: `python tests/bench/names.py [NAMES] [SEEDS]`

The first NAMES of them (10), each with SEEDS seeds (1), by the scorecard's probes: a line a run on stderr, then one JSON line with
every run, and of each figure the worst name's mean over its seeds.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from finetune import settings, stages

NAMES = (
    ("小星", "书生学员"),
    ("Orivane", "Lena Brandt"),
    ("阿拾", "顾北辰"),
    ("Apple", "Tom Baker"),
    ("小明", "红杉科技"),
    ("R2-K9", "J. Ødegård"),
    ("小Q助手2号", "深圳AI兴趣小组"),
    ("Gemini", "Nadia Petrova"),
    ("星", "李雷"),
    ("Max the Helpful Study Buddy", "Westbrook High School"),
)
HIGHER, LOWER = ("identity", "worst_kind", "multi_turn", "facts_kept"), ("leak", "parrot", "kl", "seconds")


def measure(name: str, author: str, seed: int, folder: Path) -> dict[str, Any]:
    own = {"persona": {"name": name, "author": author}, "seed": seed}
    run = stages.Run(folder / f"{name}-{seed}", settings.build(settings.preset(settings.DEFAULT_PRESET), own))
    stages.data(run)
    began = time.perf_counter()
    stages.train(run)
    seconds = time.perf_counter() - began
    stages.evaluate(run)
    card = run.read("scorecard.json")["tuned"]
    kinds = {kind: share for kind, share in card["identity_by_kind"].items() if "/" in kind}
    figures = {figure: card[figure] for figure in ("identity", "leak", "parrot", "kl", "facts_kept")}
    figures |= {"worst_kind": min(kinds.values()), "multi_turn": card["identity_by_kind"]["multi_turn"]}
    weak = {kind: round(share, 2) for kind, share in kinds.items() if share < 0.8}
    leaks = {kind: round(share, 2) for kind, share in card["leak_by_kind"].items() if "/" in kind and share}
    rounded = {figure: round(value, 3) for figure, value in figures.items()}
    return {
        "name": name,
        "author": author,
        "seed": seed,
        **rounded,
        "seconds": round(seconds),
        "weak": weak,
        "leaks": leaks,
    }


def main() -> None:
    names, seeds = map(int, [*sys.argv[1:], *("10", "1")[len(sys.argv) - 1 :]])
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, author in NAMES[:names]:
            for seed in range(seeds):
                runs.append(measure(name, author, seed, Path(folder)))
                print(json.dumps(runs[-1], ensure_ascii=False), file=sys.stderr, flush=True)

    def means(figure: str) -> list[float]:
        return [sum(r[figure] for r in runs if r["name"] == name) / seeds for name, _ in NAMES[:names]]

    worst = {figure: min(means(figure)) for figure in HIGHER} | {figure: max(means(figure)) for figure in LOWER}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"bench": "names", "device": device, "worst": worst, "runs": runs}, ensure_ascii=False))


if __name__ == "__main__":
    main()
