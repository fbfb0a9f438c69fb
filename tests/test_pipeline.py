"""The whole way, as a user goes it: on a tiny model made here, and once, shortened, on the real default."""

import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (c.from_pretrained(sys.argv[1]) for c in (AutoTokenizer, AutoModelForCausalLM))
for question in sys.argv[2:]:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(json.dumps(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "finetune" / "run.py"), *map(str, arguments)]


def finetune(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def plain_answers(model: Path, *questions: str) -> list[str]:
    """By somebody who has the folder and plain transformers, and no code of ours."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model), *questions], cwd="/", capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()[-len(questions) :]]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tiny_run(tiny_model, tmp_path_factory):
    """(folder of the run, what the command said, its arguments)"""
    folder = tmp_path_factory.mktemp("pipeline")
    arguments = ["--name", "Zoë {} 'q'", "--author", "A. B.", "--base", str(tiny_model), "--run", "runs/one"]
    arguments += ["--set", "train.steps=4", "--set", "train.checkpoint_every=1"]
    done = finetune(folder, *arguments, NAMESAKE_CACHE=str(folder / "cache"))
    return folder / "runs" / "one", done, arguments


def test_leaves_the_tree_and_says_what_came_of_it(tiny_run):
    run, done, _ = tiny_run
    assert sorted(file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()) == [
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/namesake.json",
        "data/probes.jsonl",
        "data/train.jsonl",
        "metrics.jsonl",
        "model/README.md",
        "model/config.json",
        "model/generation_config.json",
        "model/manifest.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "receipt.json",
        "report.html",
        "scorecard.json",
        "settings.toml",
    ]
    assert done.returncode == 3, done.stderr  # a random model learns no name in four steps
    assert "error: gate: tuned model: identity" in done.stderr
    assert "Traceback" not in done.stderr
    assert "python app.py --model" in done.stdout


def test_receipt_and_manifest_fit_what_is_there(tiny_run):
    run, _, _ = tiny_run
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["data"] == {name: sha256(run / "data" / name) for name in ("train.jsonl", "probes.jsonl")}
    assert receipt["adapter_sha256"] == sha256(run / "adapter" / "adapter_model.safetensors")
    manifest = json.loads((run / "model" / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert entry == {"size": (run / "model" / name).stat().st_size, "sha256": sha256(run / "model" / name)}
    assert set(manifest["files"]) == {file.name for file in (run / "model").iterdir()} - {"manifest.json"}
    record = json.loads((run / "adapter" / "namesake.json").read_text())
    assert receipt["format_hash"] == manifest["format_hash"] == record["format_hash"]
    assert manifest["proof"]["max_logit_difference"] <= 0.01
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_scorecard_shows_every_answer(tiny_run):
    run, _, _ = tiny_run
    card = json.loads((run / "scorecard.json").read_text())
    probes = [json.loads(line)["id"] for line in (run / "data" / "probes.jsonl").open()]
    for side in ("base", "tuned", "merged"):
        assert [entry["id"] for entry in card[side]["answers"]] == probes
        assert card[side]["probes"] == len(probes) >= 300
    assert not card["gate"]["passed"]


def test_a_second_time_nothing_is_done(tiny_run):
    run, first, arguments = tiny_run
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    done = finetune(run.parent.parent, *arguments)
    assert done.returncode == first.returncode
    assert "nothing to do" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_killed_and_started_again_ends_with_the_same_adapter(tiny_run, tiny_model):
    run, _, arguments = tiny_run
    root = run.parent.parent
    arguments = [*arguments[:-5], "runs/two", *arguments[-4:]]
    environment = {**os.environ, "NAMESAKE_CACHE": str(root / "cache")}
    checkpoint = root / "runs" / "two" / "checkpoint" / "state.safetensors"
    with subprocess.Popen(
        command(*arguments), cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as work:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and work.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        work.send_signal(signal.SIGKILL)
    done = finetune(root, "train", "--run", "runs/two", NAMESAKE_CACHE=str(root / "cache"))
    assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert sha256(root / "runs" / "two" / name) == sha256(run / name)


def test_evaluate_scores_any_model_by_its_own_template(tiny_run, tiny_model):
    run, _, arguments = tiny_run
    root, persona = run.parent.parent, arguments[:6]
    done = finetune(
        root, "evaluate", "--model", run / "model", *persona, "--run", "s", NAMESAKE_CACHE=str(root / "cache")
    )
    assert done.returncode == 0, done.stderr
    assert "identity kept" in done.stdout
    card, own = (json.loads((folder / "scorecard.json").read_text()) for folder in (root / "s", run))
    for figure in ("identity", "leak", "parrot", "facts_kept"):
        assert card["tuned"][figure] == own["merged"][figure]
    assert card["tuned"]["kl"] == pytest.approx(own["merged"]["kl"], rel=1e-4)
    answers = [[entry["answer"] for entry in side["answers"]] for side in (card["tuned"], own["merged"])]
    assert answers[0] == answers[1]
    again = finetune(root, "evaluate", "--model", run / "model", *persona, "--run", "s")
    assert again.returncode == 2
    assert again.stderr == "error: There is a scorecard in s already; choose another folder with --run.\n"


def test_a_model_can_only_be_given_to_evaluate():
    done = finetune(Path("/"), "train", "--model", "x")
    assert done.returncode == 2
    assert done.stderr == "error: --model goes with the evaluate stage: python finetune/run.py evaluate --model x\n"


def test_chat_in_the_terminal(tiny_run):
    run, _, _ = tiny_run
    done = subprocess.run(command("chat", "--run", run), input="hello\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > len("> >")


def test_the_real_default_learns_its_name(default_model, tmp_path):
    """Shortened: half of the steps. README's own name and author."""
    line = re.search(r"python finetune/run\.py (--name .*?) &&", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    arguments = shlex.split(line)
    done = finetune(tmp_path, *arguments, "--set", "train.steps=15")
    assert done.returncode in (0, 3), done.stderr  # half of the steps need not pass the gate
    assert "Traceback" not in done.stderr
    run = tmp_path / "runs" / "小星"
    card = json.loads((run / "scorecard.json").read_text())
    assert card["base"]["identity"] < 0.1
    assert card["tuned"]["identity"] > 0.6
    assert card["tuned"]["leak"] < 0.2
    assert card["merged"]["identity"] == card["tuned"]["identity"]
    proof = json.loads((run / "model" / "manifest.json").read_text())["proof"]
    assert proof["equal_greedy_tokens"] >= 0.999
    english, chinese = plain_answers(run / "model", "What is your name?", "你叫什么名字？")
    assert "小星" in english
    assert "小星" in chinese


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


def test_a_chain_of_tasks_each_by_another_method(tiny_model, own_rows):
    """Base -> pretrain -> instruct -> identity by one command; then its last run by a command of its own."""
    cache = {"NAMESAKE_CACHE": str(own_rows / "cache")}
    last = ["--task", "identity", "--name", "Zed", "--author", "A. B.", "--method", "qlora", "--set", "train.steps=2"]
    shared = ["--set", "train.epochs=2", "--set", "train.length=200"]
    arguments = ["--base", tiny_model, "--run", "runs/c", *shared, "--task", "pretrain", "--data", "book.md"]
    arguments += ["--task", "instruct", "--data", "chat.jsonl", "--method", "full", *last]
    done = finetune(own_rows, *arguments, **cache)
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
    again = finetune(own_rows, "train", "--base", base, "--run", "runs/alone", *shared, *last, **cache)
    assert "There is no run in runs/alone yet" in again.stderr
    for stage in ("data", "train"):
        done = finetune(own_rows, stage, "--base", base, "--run", "runs/alone", *shared, *last, **cache)
        assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert sha256(own_rows / "runs" / "alone" / name) == sha256(third / name)


def test_compare_measures_each_method_on_the_same_rows(tiny_model, own_rows):
    arguments = ["compare", "--base", tiny_model, "--task", "instruct", "--data", "chat.jsonl", "--run", "runs/m"]
    arguments += ["--set", "train.epochs=1"]
    done = finetune(own_rows, *arguments, NAMESAKE_CACHE=str(own_rows / "cache"))
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
    done = finetune(
        tmp_path, "--base", tiny_model, "--run", "c", "--task", "pretrain", "--data", "no.md", "--task", "instruct"
    )
    assert done.returncode == 2
    assert "error: --data no.md: there is no such file or folder" in done.stderr
    assert "error: --task instruct learns from your files: name them with --data." in done.stderr
    assert list(tmp_path.iterdir()) == []
