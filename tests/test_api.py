"""The API, by the clients that people use: openai, LiteLLM, curl."""

import asyncio
import json
import os
import random
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from test_app import ScriptedEngine, serving, until

from finetune import api
from finetune.engine import Engine, Request, Text, pieces

ROOT = Path(__file__).parent.parent
ASK = [{"role": "user", "content": "Who are you?"}]
KEY = "sesame 芝麻"


@pytest.fixture(scope="module")
def engine(tiny_model):
    """The real one."""
    engine = Engine(str(tiny_model))
    engine.load()
    assert engine.status == "ready", engine.message
    engine.name = "小星"
    yield engine
    engine.inbox.put(None)


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, key="sesame") as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="sesame", max_retries=0)


@pytest.fixture(scope="module")
def script(tiny_model):
    """One that says what it is told to, open to all."""
    engine = ScriptedEngine(str(tiny_model))
    engine.load()
    engine.name = "script"
    with serving(engine, open_api=True) as url:
        engine.client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        engine.url = url
        yield engine
    engine.inbox.put(None)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(api, "PER_MINUTE", 10_000)


def alone(engine, messages, most):
    """The greedy answer, by transformers itself."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(engine.ref)
    prompt = engine.form.prompt(messages)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)[0, len(prompt) :].tolist()
    text = engine.form.stream()
    return "".join(text.add(token) for token in ids if token not in engine.form.stop_ids), len(prompt), len(ids)


# ---------------------------------------------------------------------------------------------------- openai's client


def test_models_and_a_whole_answer(engine, client):
    assert [model.id for model in client.models.list()] == ["小星"]
    answer = client.chat.completions.create(model="小星", messages=ASK, temperature=0, max_tokens=20)
    text, prompt, said = alone(engine, ASK, 20)
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", "小星", 1)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.index) == ("assistant", text, 0)
    assert choice.finish_reason == ("length" if said == 20 else "stop")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, said, prompt + said)


def test_streamed(engine, client):
    asked = {"model": "小星", "messages": ASK, "temperature": 0, "max_completion_tokens": 20, "stream": True}
    chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    text, prompt, said = alone(engine, ASK, 20)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (prompt, said)
    assert all(c.usage is None for c in client.chat.completions.create(**asked))


def test_sampling_the_seed_and_n(client):
    def ask(**options):
        answer = client.chat.completions.create(model="小星", messages=ASK, max_tokens=12, **options)
        return [choice.message.content for choice in answer.choices]

    three = ask(n=3, seed=5, temperature=1.5)
    assert len(set(three)) == 3
    assert ask(n=3, seed=5, temperature=1.5) == three
    assert ask(seed=6, temperature=1.5) == three[1:2]
    assert ask(seed=5, temperature=1.5, top_p=1e-6) == ask(temperature=0)
    asked = {"model": "小星", "messages": ASK, "max_tokens": 12, "n": 3, "seed": 5, "temperature": 1.5}
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


def test_the_next_turn_is_not_computed_again(client):
    talk = [{"role": "user", "content": "a" * 100}]
    answer = client.chat.completions.create(model="小星", messages=talk, temperature=0, max_tokens=5)
    talk += [{"role": "assistant", "content": answer.choices[0].message.content}, {"role": "user", "content": "b"}]
    answer = client.chat.completions.create(model="小星", messages=talk, temperature=0, max_tokens=5)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 100


def test_without_a_key_only_who_names_a_session_goes_on_in_the_cache(script):
    def cached(**options):
        script.says("Yes.")
        answer = script.client.chat.completions.create(model="script", messages=ASK, extra_body=options)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [cached() for _ in range(2)] == [0, 0]
    mine = [cached(prompt_cache_key="a") for _ in range(2)]
    assert mine[0] == 0 < mine[1]
    assert [cached(prompt_cache_key="b"), cached()] == [0, 0]


def test_content_parts_and_the_developers_role(script):
    script.says("Yes.")
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    script.client.chat.completions.create(model="script", messages=talk, extra_body={"logprobs": False, "user": "x"})
    assert script.asked == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a b"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected", "finish"),
    [
        (None, "One, two, three. END of it", "stop"),
        ("END", "One, two, three. ", "stop"),
        (["three", "two"], "One, ", "stop"),
        ([" of us", "!"], "One, two, three. END of it", "stop"),  # it only begins like one
        (["it"], "One, two, three. END of ", "stop"),
    ],
)
def test_stop(script, stop, expected, finish, stream):
    script.says("One, two, three. END of it")
    asked = {"model": "script", "messages": ASK} | ({"stop": stop} if stop else {})
    answer = script.client.chat.completions.create(**asked, stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == finish
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, finish)
    until(lambda: not script.decoder.rows, "the decoder's end")


def test_text_held_back_for_a_stop_is_said_at_the_end():
    text = Text(type("Bytes", (), {"add": lambda self, token: token})(), ("abcd",))
    assert [text.add(token) for token in "xababc"] == ["x", "", "", "ab", "", ""]
    assert text.rest() == "abc"


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "kind", "param", "words"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "The model 'gpt-4' is not here: this server has '小星'."),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "temperature: Input should be less than or equal to 2."),
        ({"top_p": 0}, openai.BadRequestError, "top_p", "top_p: Input should be greater than 0."),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "max_tokens: Input should be greater than or equal to 1."),
        ({"n": 99}, openai.BadRequestError, "n", "n: Input should be less than or equal to 8."),
        ({"messages": []}, openai.BadRequestError, "messages", "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "Input should be"),
        ({"messages": [*ASK, {"role": "system", "content": "x"}]}, openai.BadRequestError, "messages", "only be the first"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty", "does not have this parameter"),
        ({"tools": [{}]}, openai.BadRequestError, "tools", "tools: this server does not have this parameter."),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "temprature: this server does not"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, openai.BadRequestError, "messages", "too long: 20"),
        ({"messages": [{"role": "user", "content": "a" * 40_000}]}, openai.BadRequestError, "messages", "too long: 40000 characters, and 32768 fit"),
        ({"max_tokens": 1020}, openai.BadRequestError, "messages", "1020 are asked for, and the context holds 1024"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_form(client, change, kind, param, words, stream):
    with pytest.raises(kind) as refusal:
        client.chat.completions.create(**{"model": "小星", "messages": ASK, "stream": stream, **change})
    assert words in refusal.value.body["message"]
    assert refusal.value.body["param"] == param
    assert refusal.value.body["type"] == "invalid_request_error"
    if "too long" in words or "context" in words:
        assert refusal.value.code == "context_length_exceeded"


def test_what_is_no_request(url):
    headers = {"Authorization": "Bearer sesame"}
    for content, words in (
        (b"{", "is not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "is not JSON"),  # deeper than Python reads
        (b"x" * 4_000_001, "larger than 4000000"),  # refused when all is read, else the pipe may break
    ):
        answer = httpx.post(url + "/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code in (400, 413)
        assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "method, path", [("POST", "/v1/completions"), ("GET", "/v1/chat/completions"), ("GET", "/v1/")]
)
def test_what_is_not_there_is_said_in_openais_form_too(url, method, path):
    answer = httpx.request(method, url + path)
    message = f"{method} {path} is not here; GET /v1/models and POST /v1/chat/completions are."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "unknown_url"}
    assert (answer.status_code, answer.json()) == (404, {"error": error})


def test_the_key(url, engine):
    for key in ("", "wrong", "sesamee"):
        for path in ("/v1/models", "/v1/chat/completions"):
            method = "GET" if path.endswith("models") else "POST"
            answer = httpx.request(method, url + path, headers={"Authorization": f"Bearer {key}".strip()}, json=None)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    with serving(engine, key=KEY) as other, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=other + "/v1", api_key="sesame", max_retries=0).models.list()


def test_it_is_off_unless_asked_for(engine):
    with serving(engine) as url, pytest.raises(openai.PermissionDeniedError, match=r"The API is off\. .*API_KEY"):
        openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0).models.list()


@pytest.mark.parametrize("file", ["/etc/passwd", str(ROOT / "README.md"), "README.md", "../../../../etc/passwd"])
def test_no_file_of_the_server_is_given_out(url, file):
    secret = (ROOT / file).read_text(encoding="utf-8")[:40]
    for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/"):
        assert secret not in httpx.get(url + route + file).text, route


def test_limits_of_one_address(script, monkeypatch):
    script.says("word " * 100, delay=0.5)
    with ThreadPoolExecutor(api.AT_ONCE) as pool:
        asked = {"model": "script", "messages": ASK, "max_tokens": 40}
        running = [pool.submit(script.client.chat.completions.create, **asked) for _ in range(api.AT_ONCE)]
        until(lambda: len(script.decoder.rows) == api.AT_ONCE, "eight answers at once")
        with pytest.raises(openai.RateLimitError, match="8 answers are being written for you; at most 8 at once"):
            script.client.chat.completions.create(**asked)
        script.delay = 0
        assert len({one.result().choices[0].message.content for one in running}) == 1
    script.says("Yes.")
    monkeypatch.setattr(api, "PER_MINUTE", 0)
    with pytest.raises(openai.RateLimitError, match=r"At most 0 answers a minute; wait \d+ s\.") as refusal:
        script.client.chat.completions.create(**asked)
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 61


def test_who_has_not_asked_for_a_minute_is_forgotten(monkeypatch):
    now, visitors = [0.0], api.Visitors()
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for visitor in "abcb":
        visitors.ask(visitor, 1)
        now[0] += 1
    with visitors.answering("a", 2), visitors.answering("a", 1):
        assert visitors.running == {"a": 3}
    assert visitors.running == {}
    now[0] = 62.5
    visitors.ask("d", 1)
    assert list(visitors.asked) == ["b", "d"]  # b asked again
    monkeypatch.setattr(api, "PER_MINUTE", 1)
    with pytest.raises(api.ApiError):
        visitors.ask("e", 2)  # more than there is in a minute, and none was asked for yet
    with pytest.raises(api.ApiError):
        visitors.ask("d", 1)
    assert {visitor: len(times) for visitor, times in visitors.asked.items()} == {"b": 2, "d": 1}


@pytest.mark.parametrize(
    ("peer", "forwarded", "visitor"),
    [
        ("9.9.9.9", "6.6.6.6", "9.9.9.9"),  # nobody's proxy: what it wrote is not believed
        ("127.0.0.1", "6.6.6.6", "6.6.6.6"),
        ("10.0.0.2", "6.6.6.6, 9.9.9.9", "9.9.9.9"),  # the last one is the proxy's, the first the visitor's own word
        ("127.0.0.1", "6.6.6.6, 9.9.9.9, 10.0.0.2", "9.9.9.9"),  # a proxy behind a proxy
        ("127.0.0.1", "2001:4860::1", "2001:4860::1"),
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("10.0.0.2", "10.0.0.7", "10.0.0.7"),
    ],
)
def test_the_visitors_address_behind_proxies(peer, forwarded, visitor):
    headers = {} if forwarded is None else {"x-forwarded-for": forwarded}
    assert api.address(SimpleNamespace(client=SimpleNamespace(host=peer), headers=headers)) == visitor


def test_who_has_left_is_not_counted_as_waiting(engine, monkeypatch):
    """While the decoder is at a step many can go: whoever comes then has nobody before them."""
    monkeypatch.setattr("finetune.engine.WAITING", 3)
    step, at_a_step, go_on = engine.decoder.step, threading.Event(), threading.Event()

    def slow():
        at_a_step.set()
        assert go_on.wait(30)
        return step()

    monkeypatch.setattr(engine.decoder, "step", slow)
    request = Request(ASK, temperature=0, max_tokens=4, owner=0)
    first = engine.submit(request, lambda piece: None)
    assert at_a_step.wait(30)
    for _ in range(5):
        first.cancel()
    said = []
    second = pieces(engine, request)
    heard = threading.Thread(target=lambda: said.extend(piece.text for piece in second))
    heard.start()
    go_on.set()
    heard.join(30)
    assert "".join(said) == alone(engine, ASK, 4)[0]


def test_a_full_queue_and_a_decoder_that_fails(script, monkeypatch):
    asked = {"model": "script", "messages": ASK}
    monkeypatch.setattr("finetune.engine.WAITING", 0)
    with pytest.raises(openai.InternalServerError, match="0 conversations are waiting already") as refusal:
        script.client.chat.completions.create(**asked)
    assert refusal.value.status_code == 503
    monkeypatch.undo()
    monkeypatch.setattr(script.decoder, "pick", lambda *_: 1 / 0)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="The decoder failed; the server's log says why"):
            script.client.chat.completions.create(**asked, stream=stream)
    monkeypatch.undo()
    script.says("Well again.")
    assert script.client.chat.completions.create(**asked).choices[0].message.content == "Well again."


def test_pages_of_other_hosts(engine):
    ask = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    with serving(engine, key="k", origins=["https://friend.example"]) as url:
        answer = httpx.options(url + "/v1/chat/completions", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        stranger = httpx.options(url + "/v1/chat/completions", headers={**ask, "Origin": "https://foe.example"})
        assert "access-control-allow-origin" not in stranger.headers
    with serving(engine, key="k") as url:
        answer = httpx.options(url + "/v1/chat/completions", headers=ask)
        assert "access-control-allow-origin" not in answer.headers


# ------------------------------------------------------------------------------------- who hangs up, and who is there


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_stops_the_decoder(script, stream):
    script.says("word " * 150, delay=0.1)
    content = json.dumps({"model": "script", "messages": ASK, "stream": stream}).encode()
    host, port = script.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        raw.sendall(head.encode() + content)
        until(lambda: script.decoder.rows and script.decoder.rows[0].ids, "the first tokens")
    before = script.steps
    until(script.has_stopped, "the decoder's end")
    assert script.steps - before < 60
    assert not script.listeners


def test_a_hundred_visitors(engine, url):
    """Each has a question of its own, one in four leaves; nobody gets another one's answer, and nothing is left behind."""
    chance = random.Random(0)
    asks = [[{"role": "user", "content": f"{i} " + "x" * chance.randrange(60)}] for i in range(100)]
    leaves = [chance.random() < 0.25 for _ in asks]
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="sesame", max_retries=0)

    async def visit(messages, leave):
        await asyncio.sleep(chance.random())
        asked = {"model": "小星", "messages": messages, "temperature": 0, "max_tokens": 16, "stream": True}
        text = ""
        async with await client.chat.completions.create(**asked) as chunks:
            async for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                if leave and len(text) > 3:
                    break
        return text

    async def all_of_them():
        return await asyncio.wait_for(asyncio.gather(*map(visit, asks, leaves)), 120)

    answers = asyncio.run(all_of_them())
    form, decoder = engine.form, engine.decoder
    until(lambda: not decoder.rows and not decoder.waiting and not engine.listeners, "the end")
    from finetune.generation import Decoder

    other = Decoder(decoder.forward.model, form.stop_ids, 1024)  # one after the other, alone
    other.forward = decoder.forward
    for messages, leave, answer in zip(asks, leaves, answers, strict=True):
        other.blocks.clear()
        row, text = other.add(form.prompt(messages), 16), form.stream()
        while not row.ids or row.block:
            other.step()
        expected = "".join(text.add(token) for token in row.ids if token not in form.stop_ids)
        assert answer == expected or (leave and expected.startswith(answer) and answer)
    decoder.blocks.clear()  # their keys were written over


# ---------------------------------------------------------------------------------------------------- other clients


def test_litellm(engine, url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its list of prices is not fetched
    import litellm

    asked = {"model": "openai/小星", "api_base": url + "/v1", "api_key": "sesame", "messages": ASK, "temperature": 0}
    text, prompt, _ = alone(engine, ASK, 12)
    answer = litellm.completion(**asked, max_tokens=12)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt)
    chunks = litellm.completion(**asked, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    with pytest.raises(litellm.BadRequestError, match="less than or equal to 2"):
        litellm.completion(**{**asked, "temperature": 3}, num_retries=0)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**asked, "api_key": "wrong"}, num_retries=0)


def test_curl(engine, url):
    body = json.dumps({"model": "小星", "messages": ASK, "temperature": 0, "max_tokens": 12, "stream": True})
    command = ["curl", "-sSN", "--max-time", "60", url + "/v1/chat/completions", "-d", body,
               "-H", "Content-Type: application/json", "-H", "Authorization: Bearer sesame"]  # fmt: skip
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "no_proxy": "*"}
    ).stdout
    events = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    said = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(said) == alone(engine, ASK, 12)[0]


def test_pieces_come_while_the_rest_is_being_decoded(script):
    script.says("One two three four five", delay=0.2)
    chunks = script.client.chat.completions.create(model="script", messages=ASK, stream=True)
    said = "".join(next(chunks).choices[0].delta.content or "" for _ in range(3))
    assert script.decoder.rows  # of twenty more tokens, 0.2 s each
    script.delay = 0
    assert said + "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == script.script
