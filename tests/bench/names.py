"""The preset's figures for ten names and authors that no starter saw: `python tests/bench/names.py [--small] [--exam] [NAMES] [SEEDS]`

The first NAMES of them (10), each with SEEDS seeds (1), by the scorecard's probes, answered in float32. Prints a Markdown table as it
goes: what is asked, a line for each name and seed, the mean, and of each figure the worst name's mean over its seeds; then one JSON
line. The first data stage on an empty cache asks the base, which later ones find there. --exam asks the questions of
assets/identity/exam.* instead, with which starters are compared. --small takes two steps and one probe of each kind and
language, to see that it runs.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from finetune import identity, settings, stages
from finetune import model as models

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
AT_LEAST = {"identity": 0.98, "worst kind": 0.95, "multi_turn": 0.98}
AT_LEAST |= {"system_empty": 0.95, "system_foreign": 0.95, "system_old": 0.95, "facts_kept": 0.98}
AT_MOST = {"near": 0.02, "ordinary": 0, "after_identity": 0.02, "parrot over base": 0.02, "kl": 0.03}
SECONDS = {"data s": 60, "train s": 90, "scorecard s": 90}  # on two cores; the data stage asks the base
ASKED = {key: f"≥ {limit}" for key, limit in AT_LEAST.items()}
ASKED |= {key: f"≤ {limit}" for key, limit in (AT_MOST | SECONDS).items()}


def figures(card: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Of a side of the scorecard all that is asked but the seconds."""
    kinds, leaks = card["identity_by_kind"], card["leak_by_kind"]
    found = {key: card[key] for key in ("identity", "facts_kept", "kl")}
    found |= {key: kinds.get(key) for key in ("multi_turn", "system_empty", "system_foreign", "system_old")}
    found |= {key: leaks[key] for key in ("near", "ordinary", "after_identity")}
    found |= {"worst kind": min(share for kind, share in kinds.items() if "/" in kind)}
    found |= {"parrot over base": card["parrot"] - base["parrot"]}
    return {key: round(found[key] or 0, 3) for key in ASKED if key in found}  # None: the base knows no fact


def one_of_each(probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(probe["kind"], probe["lang"]): probe for probe in probes}.values())


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def header(first: str, columns: Sequence[str]) -> None:
    row(first, *columns)
    row(*["---"] * (1 + len(columns)))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 1)


def measure(name: str, author: str, seed: int, folder: Path, small: bool) -> dict[str, Any]:
    own = {"persona": {"name": name, "author": author}, "seed": seed}
    few = {"train": {"steps": 2}} if small else {}
    run = stages.Run(folder / f"{name}-{seed}", settings.build(settings.preset(settings.DEFAULT_PRESET), own, few))
    seconds = {f"{s.__name__} s": timed(lambda s=s: s(run)) for s in (stages.data, stages.train)}
    seconds["scorecard s"] = timed(lambda: stages.evaluate(run))
    card = run.read("scorecard.json")
    tuned = card["tuned"]
    found = figures(tuned, card["base"]) | seconds
    weak = {k: round(v, 2) for k, v in tuned["identity_by_kind"].items() if "/" in k and v < AT_LEAST["worst kind"]}
    leaks = {k: round(v, 2) for k, v in tuned["leak_by_kind"].items() if "/" in k and v}
    return {"name": name, "author": author, "seed": seed, **{k: found[k] for k in ASKED}, "weak": weak, "leaks": leaks}


def main() -> None:
    small, words = "--small" in sys.argv, [word for word in sys.argv[1:] if not word.startswith("-")]
    names, seeds = map(int, [*words, *(("1", "1") if small else ("10", "1"))[len(words) :]])
    models.inference_dtype = lambda: torch.float32
    if "--exam" in sys.argv:
        ask = identity.probes
        identity.probes = lambda persona, old=identity.SMOLLM, stem="exam": ask(persona, old, stem)
        for key in ("system_empty", "facts_kept"):  # it has none
            del ASKED[key]
    if small:
        probes = identity.probes
        identity.probes = lambda *args, **kwargs: one_of_each(probes(*args, **kwargs))
    header("name, seed", list(ASKED))
    row("asked", *ASKED.values())
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, author in NAMES[:names]:
            for seed in range(seeds):
                runs.append(measure(name, author, seed, Path(folder), small))
                row(f"{name}, {seed}", *(runs[-1][key] for key in ASKED))

    def mean(key: str, some: list[dict[str, Any]]) -> float:
        return round(sum(run[key] for run in some) / len(some), 3)

    means = {key: [mean(key, [r for r in runs if r["name"] == name]) for name, _ in NAMES[:names]] for key in ASKED}
    worst = {key: (min if key in AT_LEAST else max)(of_names) for key, of_names in means.items()}
    row("mean", *(mean(key, runs) for key in ASKED))
    row("worst name", *worst.values())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"bench": "names", "device": device, "worst": worst, "runs": runs}, ensure_ascii=False))


if __name__ == "__main__":
    main()
