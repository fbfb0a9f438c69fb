"""`--engine`: real servers, transformers serve and llama.cpp's."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing, contextmanager

import openai
import pytest
from test_app import serving, until

from finetune import embedded
from finetune.chat_format import ChatFormat
from finetune.engine import Busy, Engine, Request, pieces
from finetune.errors import UserError
from finetune.model import chat_format
from finetune.remote import Remote
from finetune.words import in_chinese

ASK = [{"role": "user", "content": "Who are you?"}]
LLAMA_CPP = """
import sys, time, xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.hostnames, given.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
given.n_ctx, given.n_parallel, given.cpuparams.n_threads = 2048, 2, 1
server = xllamacpp.Server(given)
sys.stdin.read()  # until the test closes it
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def running(command, port, ready, **env):
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "*", **env},
    )  # fmt: skip

    def answers():
        assert process.poll() is None, process.returncode
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        until(answers, " ".join(command[:3]))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def transformers_serve(tiny_model, tmp_path_factory):
    port, cache = free_port(), tmp_path_factory.mktemp("cache")  # it lists what lies there: nothing
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tiny_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with running(command, port, "/health", HF_HUB_CACHE=str(cache)) as url:
        yield url


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """On the default model's own file."""
    work, port = tmp_path_factory.mktemp("gguf"), free_port()
    with running([sys.executable, "-c", LLAMA_CPP, str(embedded._fetch(work)), str(port)], port, "/health") as url:
        yield url


def remote(url, ref):
    engine = Remote(url, str(ref))
    engine.load()
    assert engine.status == "ready", engine.message
    return engine


def said(engine, **options):
    found = list(pieces(engine, Request(ASK, temperature=0, **options)))
    return "".join(piece.text for piece in found), found[-1]


def test_transformers_serve(transformers_serve, tiny_model):
    engine = remote(transformers_serve + "/v1/", tiny_model)
    assert engine.runs_on.endswith(
        "Its template gives as many ids as this model's own format; which ones, this server does not tell."
    )
    assert in_chinese(engine.runs_on).endswith("具体内容该服务不提供。")
    here = Engine(str(tiny_model))
    here.load()
    text, last = said(engine, max_tokens=12)
    expected, own = said(here, max_tokens=12)
    here.inbox.put(None)
    assert len(text) > 3
    assert text[:4] == expected[:4]  # float16 weights here: a random model's later tokens may differ
    assert last.prompt_tokens == own.prompt_tokens
    with serving(engine, open_api=True) as url:  # our API before theirs
        client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
        asked = {"model": engine.name, "messages": ASK, "temperature": 0, "max_tokens": 12}
        assert client.chat.completions.create(**asked).choices[0].message.content == text
        assert json.load(urllib.request.urlopen(url + "/health"))["runs_on"] == engine.runs_on


def test_another_template_is_said(transformers_serve, tiny_model, tmp_path, capsys):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    form = ChatFormat((other / "tokenizer.json").read_text(), "You are Bob.")
    (other / "chat_template.jinja").unlink(missing_ok=True)
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": form.template}))
    assert chat_format(other).default_system == "You are Bob."
    engine = remote(transformers_serve, tiny_model)
    engine.form = chat_format(other)
    words = engine.compare()
    plain = len(chat_format(tiny_model).prompt([{"role": "user", "content": "Who are you? 你是谁？"}]))
    own = len(form.prompt([{"role": "user", "content": "Who are you? 你是谁？"}]))
    assert words.startswith(f"Its template differs from this model's own format: {plain} ids instead of {own} for")
    assert words.endswith("are written by the server's template, which may cost the name.")  # it takes no ids
    assert f"Note: {words}" in capsys.readouterr().err
    assert in_chinese(f"URL, model x. {words}").endswith("对话由该服务的模板书写，名字可能因此丢失。")
    assert said(engine, max_tokens=4)[0]


def test_llama_cpp_ids_are_compared_one_by_one(llama_cpp, default_model, tmp_path):
    engine = remote(llama_cpp, default_model)
    assert engine.runs_on.endswith("Its template gives the ids of this model's own format.")
    assert in_chinese(engine.runs_on).endswith("其模板与本模型自身的格式一致。")
    assert not engine.sends_ids
    text, last = said(engine, max_tokens=16, stop=("zzz",))
    assert "I" in text.split() or "I'm" in text
    assert (last.finish, last.prompt_tokens) == ("length", len(engine.form.prompt(ASK)))

    # A tuned model has no default system prompt; a server that still writes the base's gets the ids instead.
    tuned = shutil.copytree(default_model, tmp_path / "tuned", ignore=shutil.ignore_patterns("*.safetensors"))
    form = ChatFormat((tuned / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((tuned / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tuned / "chat_template.jinja").unlink(missing_ok=True)
    (tuned / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": form.template}))
    engine = remote(llama_cpp, tuned)
    assert re.search(r"differs .* from id \d+ on; it writes .*named SmolLM", engine.runs_on)
    assert engine.runs_on.endswith("Conversations are sent as ids in its own.")
    assert re.search(
        "其模板与本模型自身的格式不同：.*个起；它写的是 .*对话按模型自身的格式以词元编号发送。$",
        in_chinese(engine.runs_on),
    )
    text, last = said(engine, max_tokens=8)
    assert text
    assert last.prompt_tokens == len(form.prompt(ASK))


def test_stop_closes_the_connection(llama_cpp, default_model):
    engine = remote(llama_cpp, default_model)

    def slots():
        with urllib.request.urlopen(llama_cpp + "/slots") as answer:
            return {slot["id"]: slot for slot in json.load(answer)}

    with closing(pieces(engine, Request(ASK, temperature=0, max_tokens=1500, stop=("zzz",)))) as found:
        next(piece for piece in found if piece.text)
        (used,) = (i for i, slot in slots().items() if slot["is_processing"])
    until(lambda: not slots()[used]["is_processing"], "the server's end")
    assert slots()[used]["next_token"][0]["has_next_token"]  # it has let go of an answer that was not at its end
    until(lambda: engine.running == 0, "our end")


def test_an_engine_that_is_not_there(tiny_model):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    engine = Remote(f"http://user:password@127.0.0.1:{port}/v1", str(tiny_model))
    engine.load()
    assert engine.status == "failed"
    assert re.fullmatch(
        re.escape(f"The engine at {url} cannot be reached: ") + ".*\\. Start it, or correct --engine\\.", engine.message
    )
    with pytest.raises(Busy):
        engine.submit(Request(ASK), print)
    engine.status = "ready"  # it died later
    engine.served = "x"
    with pytest.raises(UserError, match="cannot be reached"):
        list(pieces(engine, Request(ASK)))


def test_what_is_no_engine(tiny_model):
    here = Engine(str(tiny_model))
    with serving(here) as url:  # a page, whose API is off
        engine = Remote(url, None)
        engine.load()
    assert "refused with status 403: The API is off." in engine.message
