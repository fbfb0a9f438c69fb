"""Tasks and methods by the command line: a chain, a comparison."""

import itertools
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from commands import ROOT, apart, command, here, proved_here, sha256

from finetune import identity, model, run, settings, stages
from finetune.run_folder import Run


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory) -> Path:
    """A folder with a book and with dialogues."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (
        f"The bridge number {i} opened in {1800 + 7 * i} beside the mill of miller {i * 13 % 17}." for i in range(60)
    )
    (folder / "book.md").write_text("\n".join(lines))
    said = [
        [{"role": "user", "content": f"{i} and {j}?"}, {"role": "assistant", "content": f"{i + j}."}]
        for i in range(7)
        for j in range(6)
    ]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in said))
    return folder


def test_a_chain_of_tasks_each_by_another_method(tiny_model, own_rows, monkeypatch):
    """Base -> pretrain -> instruct -> identity by one command; then its last run by a command of its own."""
    proved_here(monkeypatch)
    cache = {"NAMESAKE_CACHE": str(own_rows / "cache")}
    last = ["--task", "identity", "--name", "Zed", "--author", "A. B.", "--method", "qlora", "--set", "train.steps=2"]
    shared = ["--set", "train.epochs=2", "--set", "train.length=200"]
    arguments = ["--base", tiny_model, "--run", "runs/c", *shared, "--task", "pretrain", "--data", "book.md"]
    arguments += ["--task", "instruct", "--data", "chat.jsonl", "--method", "full", *last]
    done = here(own_rows, *arguments, **cache)
    assert done.returncode == 3, done.stderr  # a random model learns no name in two steps
    first, second, third = (own_rows / "runs" / name for name in ("c-1-pretrain", "c-2-instruct", "c"))
    cards = [json.loads((run / "scorecard.json").read_text()) for run in (first, second, third)]
    assert [sorted(card["tuned"].get("loss_by_task", {})) for card in cards] == [
        ["pretrain"],
        ["instruct", "pretrain"],
        ["instruct", "pretrain"],
    ]
    for card in cards[:2]:
        assert card["tuned"]["loss"] < card["base"]["loss"]
        assert card["tuned"]["kl"] > 0
        assert card["tuned"]["facts_kept"] is not None
    # what one run leaves is where the next one starts
    for before, after in itertools.pairwise(cards):
        for task, loss in before["tuned"]["loss_by_task"].items():
            assert after["base"]["loss_by_task"][task] == pytest.approx(loss, rel=1e-4)
    assert (first / "adapter").is_dir()
    assert sorted(path.name for path in second.iterdir() if path.is_dir()) == ["data", "model"]  # no adapter
    proof = json.loads((third / "model" / "manifest.json").read_text())["proof"]
    assert proof["max_logit_difference"] <= 0.01  # from the 16-bit base with the adapter
    assert proof["quantisation"]["max_logit_difference"] > proof["max_logit_difference"]
    assert 0 < proof["quantisation"]["kl"] < 10
    report = (third / "report.html").read_text()
    assert "What each step added" in report
    assert all(f"+ {words}" in report for words in ("pretrain (lora)", "instruct (full)", "identity (qlora)"))
    base = "runs/c-2-instruct/model"
    last += shared[2:]  # without the epochs, which are the other tasks'
    again = here(own_rows, "train", "--base", base, "--run", "runs/alone", *last, **cache)
    assert "There is no run in runs/alone yet" in again.stderr
    for stage in ("data", "train"):
        done = here(own_rows, stage, "--base", base, "--run", "runs/alone", *last, **cache)
        assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert sha256(own_rows / "runs" / "alone" / name) == sha256(third / name)


def test_a_gpu_too_small_for_16_bits_answers_in_4(tiny_model, tmp_path, monkeypatch, capsys):
    """There is no GPU here: what it holds is made up, and the 4-bit weights are real."""
    proved_here(monkeypatch)
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "holds", lambda folder, dtype: False)
    few = [p for p in identity.probes(settings.Persona()) if p["id"] in ("name-en-01", "ordinary-en-01")]
    monkeypatch.setattr(identity, "probes", lambda *_, **__: few)
    monkeypatch.setattr(identity, "training", partial(identity.training, said=30, near=20, ordinary=20))
    run = Run(
        tmp_path / "run", settings.build({"base": str(tiny_model), "method": "qlora", "train": {"steps": 2, "rank": 2}})
    )
    for stage in stages.PIPELINE:
        stages.perform(run, stage)
    assert capsys.readouterr().err.count("does not hold the model in 16 bits") == 1
    assert [file.stem[-4:] for file in (tmp_path / "cache" / "teacher").glob("*.safetensors")] == ["-nf4"]
    card = run.read("scorecard.json")
    assert card["four_bit"]
    assert card["merged"] != card["tuned"]  # quantised with the adapter in it, and beside it
    assert run.read("model/manifest.json")["proof"]["max_logit_difference"] <= 0.01
    for file in ("report.html", "model/README.md"):
        assert "All answers are of 4-bit weights" in (run.folder / file).read_text()


def test_of_two_processes_one_does_the_stages_and_both_train(tiny_model, own_rows):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", "0", "--config_file", ROOT / "assets" / "accelerate" / "ddp.yaml"]
    command += [ROOT / "finetune" / "run.py", "--base", tiny_model, "--run", "runs/two"]
    command += ["--task", "instruct", "--data", "chat.jsonl", "--set", "train.epochs=0.3"]
    for limit in ("loss=9", "parrot=1", "facts_kept=0"):  # so that the gate passes whatever was learned
        command += ["--set", f"gate.{limit}"]
    (spy := own_rows / "spy").mkdir()  # which says what is there when the second process ends: it waits for the first
    (spy / "sitecustomize.py").write_text(
        "import atexit, os, pathlib\nif os.environ.get('RANK') == '1':\n"
        "    there = pathlib.Path('runs/two/report.html')\n"
        "    atexit.register(lambda: pathlib.Path('spy/end').write_text(str(there.exists())))\n"
    )
    environment = {**os.environ, "NAMESAKE_CACHE": str(own_rows / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(spy)
    done = subprocess.run(
        list(map(str, command)), cwd=own_rows, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^(\w+): \d+ s$", done.stderr, re.M) == list(stages.PIPELINE)
    assert done.stdout.count("Report 报告: runs/two/report.html") == 1
    assert (spy / "end").read_text() == "True"
    lines = [json.loads(line) for line in (own_rows / "runs" / "two" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


def main(arguments: list[str]) -> None:
    sys.exit(run.main(arguments))


def test_compare_measures_each_method_on_the_same_rows(tiny_model, own_rows, monkeypatch):

    def started(given: list[str], check: bool) -> Mock:
        assert given[:2] == command()
        return Mock(returncode=apart(main, given[2:]))

    monkeypatch.setattr(stages.subprocess, "run", started)
    monkeypatch.setenv("NAMESAKE_CACHE", str(own_rows / "cache"))
    arguments = ["compare", "--base", tiny_model, "--task", "instruct", "--data", "chat.jsonl", "--run", "runs/m"]
    arguments += ["--set", "train.epochs=1"]
    done = here(own_rows, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((own_rows / "runs" / "m" / "compare.json").read_text())["methods"]
    assert [line["method"] for line in found] == ["full", "lora", "qlora"]
    full, lora, qlora = found
    assert full["stored_bytes"] > lora["stored_bytes"] == qlora["stored_bytes"]
    for line in found:
        assert line["peak_memory"] > 100e6
        assert line["tokens_per_s"] > 0
        assert (line["seconds_to_pass"] is not None) == line["passed"]
        assert line["method"] in done.stdout
    rows = {sha256(own_rows / "runs" / "m" / "compare" / line["method"] / "data" / "train.jsonl") for line in found}
    assert rows == {sha256(own_rows / "runs" / "m" / "data" / "train.jsonl")}


def test_problems_of_a_whole_chain_are_told_before_it_starts(tiny_model, tmp_path):
    done = here(
        tmp_path, "--base", tiny_model, "--run", "c", "--task", "pretrain", "--data", "no.md", "--task", "instruct"
    )
    assert done.returncode == 2
    assert "error: --data no.md: there is no such file or folder" in done.stderr
    assert "error: --task instruct learns from your files: name them with --data." in done.stderr
    assert list(tmp_path.iterdir()) == []
