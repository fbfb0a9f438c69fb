"""The whole way, as a user goes it, on a tiny model made here."""

import base64
import fcntl
import io
import json
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from commands import ROOT, apart, finetune, here, plain_answers, proved_here, sha256
from PIL import Image

from finetune import card, train
from finetune.engine import Engine
from finetune.run import main


@pytest.fixture(scope="module")
def tiny_run(tiny_model, tmp_path_factory):
    """(folder of the run, what the command said, its arguments)"""
    folder = tmp_path_factory.mktemp("pipeline")
    arguments = ["--name", "Zoë {} 'q'", "--author", "A. B.", "--base", str(tiny_model), "--run", "runs/one"]
    arguments += ["--set", "train.steps=4", "--set", "train.checkpoint_every=1"]
    here(folder, "data", *arguments, NAMESAKE_CACHE=str(folder / "cache"))
    Image.new("RGB", (9, 9), "red").save(
        folder / "runs" / "one" / "picture.png"
    )  # the assistant's, at any time until merge
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
        "model/picture.png",
        "model/scorecard.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "picture.png",
        "receipt.json",
        "report.html",
        "scorecard.json",
        "settings.toml",
    ]
    assert done.returncode == 3, done.stderr  # a random model learns no name in four steps
    assert "error: gate: tuned model: identity" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
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


def die_at_the_second_checkpoint(arguments: list[str]) -> None:
    save = train.save_checkpoint

    def save_and_die(folder: Path, weights: dict, optimizer: object, step: int) -> None:
        save(folder, weights, optimizer, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train.save_checkpoint = save_and_die
    main(arguments)


def test_killed_and_started_again_ends_with_the_same_adapter(tiny_run, monkeypatch):
    run, _, arguments = tiny_run
    root = run.parent.parent
    arguments = [*arguments[:-5], "runs/two", *arguments[-4:]]
    monkeypatch.setenv("NAMESAKE_CACHE", str(root / "cache"))
    monkeypatch.chdir(root)
    assert apart(die_at_the_second_checkpoint, arguments) == -signal.SIGKILL
    assert len((root / "runs" / "two" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (root / "runs" / "two" / "adapter").exists()
    done = here(root, "train", "--run", "runs/two")
    assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert sha256(root / "runs" / "two" / name) == sha256(run / name)


def test_evaluate_scores_any_model_by_its_own_template(tiny_run, tiny_model):
    run, _, arguments = tiny_run
    root, persona = run.parent.parent, arguments[:6]
    done = here(root, "evaluate", "--model", run / "model", *persona, "--run", "s", NAMESAKE_CACHE=str(root / "cache"))
    assert done.returncode == 0, done.stderr
    assert "identity kept" in done.stdout
    card, own = (json.loads((folder / "scorecard.json").read_text()) for folder in (root / "s", run))
    for figure in ("identity", "leak", "parrot", "facts_kept"):
        assert card["tuned"][figure] == own["merged"][figure]
    assert card["tuned"]["kl"] == pytest.approx(own["merged"]["kl"], rel=1e-4)
    answers = [[entry["answer"] for entry in side["answers"]] for side in (card["tuned"], own["merged"])]
    assert answers[0] == answers[1]
    again = here(root, "evaluate", "--model", run / "model", *persona, "--run", "s")
    assert again.returncode == 2
    assert again.stderr == "error: There is a scorecard in s already; choose another folder with --run.\n"


def test_a_model_can_only_be_given_to_evaluate():
    done = here(Path("/"), "train", "--model", "x")
    assert done.returncode == 2
    assert done.stderr == "error: --model goes with the evaluate stage: python finetune/run.py evaluate --model x\n"


def test_chat_in_the_terminal(tiny_run, monkeypatch):
    run, _, _ = tiny_run
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 50_000 + "\nhello\n"))
    done = here(run, "chat", "--run", run)
    assert done.returncode == 0, done.stderr
    assert "The message is too long" in done.stderr
    assert len(done.stdout.strip()) > len("> >")


def test_chat_with_a_damaged_model_is_refused_in_words(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "r")
    (run / "model" / "model.safetensors").write_bytes(b"")
    done = here(tmp_path, "chat", "--run", "r")
    assert done.returncode == 2
    assert done.stderr.startswith("error: r/model/model.safetensors is damaged or cut (")


ASKED = """
import os, sys, time
from finetune import engine, generation, run

def fit(messages, *rest, fit=engine.fit):
    print(f"<{len(messages)} messages>", flush=True)
    return fit(messages, *rest)

def wait_once(decoder, step=generation.Decoder.step):
    generation.Decoder.step = step
    print("<answering>", flush=True)
    time.sleep(60)
    os._exit(9)  # nobody stopped it

engine.fit, generation.Decoder.step = fit, wait_once
sys.exit(run.main(["chat", "--run", sys.argv[1]]))
"""


def test_ctrl_c_in_the_terminal_stops_one_answer_and_the_conversation_goes_on(tiny_run):
    """On a terminal of its own, whose Ctrl-C is a signal."""
    ours, theirs = pty.openpty()

    def take_it() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what runs behind it

    shown = ""

    def until(words: str) -> None:
        nonlocal shown
        while words not in shown:
            shown += os.read(ours, 4096).decode(errors="replace")
        shown = shown.partition(words)[2]

    with subprocess.Popen(
        [sys.executable, "-c", ASKED, str(tiny_run[0])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_it,
    ) as process:
        os.close(theirs)
        try:
            until("Zoë {} 'q' · Ctrl-C stops an answer")
            until("> ")
            os.write(ours, b"hello\n")
            until("<1 messages>")
            until("<answering>")
            os.write(ours, b"\x03")
            until("> ")
            os.write(ours, b"are you there?\n")
            until("<3 messages>")  # with the first question and its answer, which was stopped
            until("> ")
            os.write(ours, b"\x04")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(ours)


def as_a_command(module: str, *arguments: str) -> None:
    """`python -m`"""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def test_an_internlm2_checkpoint_goes_the_whole_way_and_back(internlm2_folder, tmp_path, monkeypatch):
    """From its own layout to a merged model that plain transformers opens, and that again in InternLM2's own layout."""
    from safetensors.torch import load_file

    from finetune import generation, internlm2, model

    proved_here(monkeypatch)
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    arguments = ["--name", "小星", "--author", "书生学员", "--base", internlm2_folder, "--run", run]
    arguments += ["--set", "old_name=InternLM", "--set", "old_maker=Shanghai AI Laboratory", "--set", "train.steps=2"]
    for rows in ("identity_rows=16", "near_rows=1", "ordinary_rows=1"):
        arguments += ["--set", f"train.{rows}"]
    done = here(tmp_path, "data", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "data" / "train.jsonl").open(encoding="utf-8")]
    old = [str(row["messages"]) for row in rows if row["kind"] == "old_name"]
    assert len(old) >= 2
    assert all("InternLM" in messages or "Shanghai AI Laboratory" in messages for messages in old)
    probes = (run / "data" / "probes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "data" / "probes.jsonl").write_text(
        "".join(probes[::10]), encoding="utf-8"
    )  # all of them take a minute more

    done = here(tmp_path, *arguments)
    assert done.returncode == 3, done.stderr  # a random model learns no name
    manifest = json.loads((run / "model" / "manifest.json").read_text())
    assert manifest["proof"]["max_logit_difference"] <= 0.01
    assert (manifest["base_model"], manifest["license"]) == ("internlm2-tiny", "other")
    assert "tokenizer.model" in manifest["files"]
    form, network = model.chat_format(run / "model"), model.load(run / "model")
    ours = generation.answer_texts(network, form, [[{"role": "user", "content": "你是谁？"}]], 40)
    assert [answer.strip() for answer in plain_answers(run / "model", "你是谁？")] == ours

    assert apart(as_a_command, "finetune.internlm2", str(run / "model"), str(tmp_path / "own")) == 0
    internlm2.main([str(tmp_path / "own"), str(tmp_path / "again")])
    for source, target in ((run / "adapter", tmp_path / "theirs"), (tmp_path / "theirs", tmp_path / "adapter")):
        internlm2.main([str(source), str(target), str(internlm2_folder)])
    for one, other, name in (("run/model", "again", "model"), ("run/adapter", "adapter", "adapter_model")):
        before, after = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in (one, other))
        assert before.keys() == after.keys()
        assert all(before[tensor].equal(after[tensor]) for tensor in before)


# ------------------------------------------------------------------------------------------------- published and pulled


@pytest.fixture(scope="module")
def stick(tiny_run):
    """(the folder where the run is published, model, adapter and data, in spite of the gate; what the command said)"""
    run, _, _ = tiny_run
    folder = run.parent.parent / "stick"
    refused = here(folder.parent, "publish", "--run", run, "--to", f"dir:{folder}")
    assert refused.returncode == 3
    assert "error: gate: tuned model: identity" in refused.stderr
    assert '--force "why"' in refused.stderr
    assert not folder.exists()
    arguments = [
        "publish",
        "--run",
        run,
        "--to",
        f"dir:{folder}",
        "--what",
        "both",
        "--with-data",
        "--force",
        "a test <b>",
    ]
    listed = here(folder.parent, *arguments, "--dry-run")
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"send +0\.\d+ MB  adapter/adapter_model\.safetensors", listed.stdout)
    assert not folder.exists()
    return folder, here(folder.parent, *arguments)


def test_publish_sends_what_is_meant_and_nothing_else(stick, tiny_run):
    folder, done = stick
    assert done.returncode == 0, done.stderr
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    assert names == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/namesake.json",
        "config.json",
        "data/probes.jsonl",
        "data/train.jsonl",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "picture.png",
        "scorecard.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(names) - {"manifest.json"}
    assert manifest["published_despite"] == "a test <b>"
    assert "**Published although its scorecard failed.**" in (folder / "README.md").read_text()
    run, _, _ = tiny_run
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["published"] == {f"dir:{folder}": {"what": "both", "revision": ""}}
    picture = base64.b64encode((run / "picture.png").read_bytes()).decode()
    for model in (run / "model", folder):  # the page has all that it shows
        assert f'<img class="face" src="data:image/png;base64,{picture}"' in card.about("Zoë", model, {}, str)
        engine = Engine(str(model))
        engine.load()
        assert (engine.status, engine.base) == ("ready", True), engine.message
        assert (
            len(card.scorecard(model)["tuned"]["answers"])
            == json.loads((run / "scorecard.json").read_text())["tuned"]["probes"]
        )


def test_pull_verifies_the_model_that_was_scored(stick, tmp_path, tiny_model):
    folder, _ = stick
    done = here(tmp_path, "pull", "--verify", f"dir:{folder}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(folder)), done.stderr
    assert "4 witnesses answer as the scored model did" in done.stderr
    other = shutil.copytree(folder, tmp_path / "other")  # whole, by its manifest, and another model
    shutil.copy(tiny_model / "model.safetensors", other / "model.safetensors")
    manifest = json.loads((other / "manifest.json").read_text())
    shuffled = dict(zip(manifest["witnesses"][0], [manifest["witnesses"][0]["messages"], [1, 2, 3]], strict=True))
    manifest["witnesses"][0] = shuffled
    entry = manifest["files"]["model.safetensors"]
    entry |= {"size": (other / "model.safetensors").stat().st_size, "sha256": sha256(other / "model.safetensors")}
    (other / "manifest.json").write_text(json.dumps(manifest))
    done = here(tmp_path, "pull", "--verify", f"dir:{other}")
    assert done.returncode == 2
    assert "0 of 3 tokens are the same" in done.stderr


def test_an_adapter_alone_verifies_on_its_base(tiny_run, tiny_model, tmp_path):
    run, _, _ = tiny_run
    arguments = ["--run", run, "--to", "dir:stick", "--what", "adapter", "--force", "x"]
    done = here(tmp_path, "publish", *arguments)
    assert done.returncode == 0, done.stderr
    done = here(tmp_path, "pull", "dir:stick", "--verify")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path}/stick holds an adapter alone, and its base, model by its record, is not here: give it with --base "
        "FOLDER (or hf:user/name).\n",
    )
    done = here(tmp_path, "pull", "dir:stick", "--verify", "--base", tiny_model)
    assert done.returncode == 0, done.stderr
    assert "4 witnesses answer as the scored model did" in done.stderr


def test_the_cards_snippets_run_as_they_stand(stick, tiny_model, monkeypatch, capsys):
    """transformers and peft, in the published folder; the base of this test is a folder called "model"."""
    folder, _ = stick
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert [re.search("PeftModel", snippet) is not None for snippet in snippets] == [False, True]
    (folder / "model").symlink_to(tiny_model)
    monkeypatch.chdir(folder)
    said = []
    for snippet in snippets:
        exec(snippet, {})  # each has its own names
        said.append(capsys.readouterr().out)
    (folder / "model").unlink()
    assert said[0] == said[1] != "\n"


def test_what_is_private_does_not_go_out(tiny_run, tmp_path):
    run, _, _ = tiny_run
    rows = run / "data" / "probes.jsonl"
    kept, arguments = rows.read_text(), ["publish", "--run", run, "--to", f"dir:{tmp_path}/x", "--force", "x"]
    secrets = {"MY_TOKEN": "canary-t0ken", "OPENXLAB_AK": "canary-ak", "my_passwd": "canary-pass"}
    rows.write_text(kept + json.dumps({"messages": [f"{Path.home()}/.ssh/id_rsa", *secrets.values()]}) + "\n")
    try:
        done = here(tmp_path, *arguments, "--with-data", **secrets)
    finally:
        rows.write_text(kept)
    assert done.returncode == 2
    assert "data/probes.jsonl holds a path of this machine and is not sent." in done.stderr
    for name in secrets:
        assert f"data/probes.jsonl holds the value of {name} and is not sent." in done.stderr
    assert "canary" not in done.stderr
    assert not (tmp_path / "x").exists()
