"""The page, in a real Chromium, on a real decoder whose tokens are written down beforehand."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import app
from finetune.engine import Engine, Request, fit, pieces
from finetune.errors import UserError

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = 60  # seconds, on a slow machine


def until(condition, what, but=lambda: ""):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what} {but()}"
        time.sleep(0.05)


def get(url):
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return answer.read().decode()


# ------------------------------------------------------------------------------------------------ without a browser


def test_import_starts_nothing_and_needs_no_heavy_package():
    code = "import sys, app; print([m for m in ('torch', 'transformers', 'peft', 'gradio') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def words(messages):
    return sum(len(m["content"].split()) for m in messages)


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one two three"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "five"},
    {"role": "user", "content": "six"},
    {"role": "assistant", "content": "seven eight"},
    {"role": "user", "content": "nine"},
]


@pytest.mark.parametrize(("room", "dropped"), [(99, 0), (11, 0), (10, 2), (7, 2), (6, 3), (5, 5), (3, 5)])
def test_history_is_trimmed_by_whole_turns_and_the_system_message_stays(room, dropped):
    assert fit(TALK, words, room) == [TALK[0], *TALK[1 + dropped :]]


def test_a_message_that_never_fits_is_refused():
    with pytest.raises(
        UserError, match=r"^The message is too long: 3 tokens, and 2 fit\. Shorten it and send it again\.$"
    ):
        fit(TALK, words, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a < b && c > d",
        "<img src=x onerror=alert(1)>",
        "</p> <!-- --> <?x?> &lt; &#60; &",
        "`<b>` ```\n<i>\n``` <u>",
    ],
)
def test_shown_text_is_read_back_as_it_was(text):
    assert app.text_of(app.shown(text)) == text
    assert app.text_of([{"type": "text", "text": app.shown(text)}]) == text
    assert not re.search(r"<[a-z/!?]", re.sub(app.CODE, "", app.shown(text)))


def test_newest_finished_run(tmp_path):
    assert app.newest_run(tmp_path) is None
    for age, name in enumerate(["new", "older", "unfinished"]):
        (tmp_path / name / "model").mkdir(parents=True)
        if name != "unfinished":
            (tmp_path / name / "model" / "manifest.json").write_text('{"name": "小星"}', encoding="utf-8")
            os.utime(tmp_path / name / "model" / "manifest.json", (1e9 - age, 1e9 - age))
    assert app.newest_run(tmp_path) == str(tmp_path / "new" / "model")
    assert Engine(str(tmp_path / "new" / "model")).name == "小星"


def test_the_first_source_that_can_be_had_is_loaded_and_those_before_it_are_told(tiny_model, tmp_path):
    engine = Engine(f"dir:{tmp_path}/none, {tiny_model}")
    engine.load()
    assert engine.health() == {
        "status": "ready",
        "model": f"dir:{tmp_path}/none, {tiny_model}",
        "message": f"dir:{tmp_path}/none: '{tmp_path}/none' is not a folder; check its spelling.",
        "runs_on": engine.runs_on,
    }


def test_a_failed_load_says_why(tmp_path):
    engine = Engine(str(tmp_path))
    assert engine.health() == {"status": "loading", "model": str(tmp_path), "message": "Starting", "runs_on": ""}
    engine.load()
    health = engine.health()
    assert health["status"] == "failed"
    assert f"The model folder {tmp_path.resolve()} has no config.json." in health["message"]
    nowhere = Engine("no such model")
    nowhere.load()
    assert nowhere.health() == {
        "status": "failed",
        "model": "no such model",
        "message": "'no such model' is neither a folder nor a repo reference such as hf:user/name; check its spelling.",
        "runs_on": "",
    }


def test_an_adapter_is_loaded_onto_its_base_and_no_other(tiny_model, tmp_path):
    import torch

    from finetune import model
    from finetune.forward import Span

    tuned = model.add_lora(model.load(tiny_model), rank=2)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    tuned.save_pretrained(tmp_path / "adapter")
    record = {"base_sha256": model.fingerprint(tiny_model)}
    (tmp_path / "adapter" / model.ADAPTER_RECORD).write_text(json.dumps(record))
    engine = Engine(str(tiny_model), str(tmp_path / "adapter"))
    engine.load()
    assert engine.status == "ready", engine.message
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        unmerged = model.load_adapter(model.load(tiny_model), tmp_path / "adapter", tiny_model)
        expected, base = (m(ids).logits[0, -1] for m in (unmerged, model.load(tiny_model)))
        found = engine.decoder.forward.logits(engine.decoder.forward([Span(0, 0, ids[0].tolist())]))[0]
    assert (found - expected).abs().max() < 0.1 * (base - expected).abs().max()

    record["base_sha256"] = "0"
    (tmp_path / "adapter" / model.ADAPTER_RECORD).write_text(json.dumps(record))
    engine.load()
    assert engine.status == "failed"
    assert "was made for a base model with sha256 0, and the weights in" in engine.message


def test_a_taken_port_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.main(["--model", "x", "--host", "127.0.0.1", "--port", str(port)]) == 2
    assert f"error: Port {port} cannot be opened: Address already in use. Choose another with --port." in (
        capsys.readouterr().err
    )


def test_a_port_that_is_none_is_said(capsys, monkeypatch):
    assert app.main(["--model", "x", "--port", "70000"]) == 2
    assert capsys.readouterr().err == (
        "error: Port 70000 cannot be opened: bind(): port must be 0-65535. Choose another with --port.\n"
    )
    monkeypatch.setenv("PORT", "http")
    with pytest.raises(SystemExit, match="2"):
        app.main(["--model", "x"])
    assert "argument --port: invalid int value: 'http'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- with a browser


class ScriptedEngine(Engine):
    """The real one, but what the decoder picks is `script`, a token (here: a byte) every `delay` seconds."""

    script, delay, steps, asked = "", 0.0, 0, ()

    def load(self):
        super().load()
        self.decoder.pick = self.scripted
        self.answers = {}

    def scripted(self, logits, rows):
        self.steps += 1
        time.sleep(self.delay)
        for _, row in rows:  # each conversation's own source of chance: it tells them apart
            self.answers.setdefault(row, iter(self.form.tokenizer.encode(self.script).ids))
        return [next(self.answers[row], self.form.stop_ids[0]) for _, row in rows]

    def submit(self, request, listener):
        self.asked, self.request = request.messages, request
        return super().submit(request, listener)

    def says(self, script, delay=0.0):
        self.script, self.delay = script, delay

    def has_stopped(self):
        before = self.steps
        time.sleep(5 * self.delay + 0.2)
        return self.steps == before


@contextmanager
def serving(engine, **options):
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app.build(engine, **options), log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = ScriptedEngine(str(tiny_model))
    engine.load()
    assert engine.status == "ready", engine.message
    engine.name = '小星 "<b>" & Co'
    return engine


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page as a new visitor; afterwards there must be no error in its console and no call to another host."""
    contexts, complaints = [], []

    def visit(url, wait_for="#box textarea", **settings):
        context = chromium.new_context(**{"locale": "en-US", "viewport": {"width": 1100, "height": 760}, **settings})
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else complaints.append(r.url))
        page.goto(url)
        page.locator(wait_for).wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def send(page, text):
    page.fill("#box textarea", text)
    page.keyboard.press("Enter")


def talk(page):
    """What is to be seen: [(role, text)]."""
    return [
        tuple(message)
        for message in page.evaluate(
            "[...document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]')]"
            ".map(e => [e.dataset.testid, e.innerText.trim()])"
        )
    ]


def idle(page):
    return page.locator("#box [data-testid=submit-button]").is_visible()


def sees(page, *expected):
    until(lambda: talk(page) == list(expected) and idle(page), expected, lambda: f"but saw {talk(page)}, {idle(page)}")


def test_the_answer_grows_and_stop_stops_the_decoder(engine, url, visit):
    engine.says("All the world's a stage, " * 9, delay=0.03)
    began = engine.steps
    page = visit(url)
    send(page, "Go on")
    lengths = set()

    def grown():
        lengths.add(len(page.locator("#chat [data-testid=bot]").inner_text()))
        return len(lengths) > 4

    until(grown, "an answer that grows")
    page.locator("#box [data-testid=stop-button]").click()
    until(engine.has_stopped, "the decoder's end")
    assert engine.steps - began < len(engine.script)
    until(lambda: idle(page), "the send button")
    said = talk(page)[1][1]
    assert engine.script.startswith(said)
    assert said

    engine.says("And now to the end.")  # the next turn knows what was said until then
    send(page, "Again")
    sees(page, ("user", "Go on"), ("bot", said), ("user", "Again"), ("bot", "And now to the end."))
    assert [m["role"] for m in engine.asked] == ["user", "assistant", "user"]
    assert engine.asked[1]["content"].startswith(said)


def test_a_closed_tab_stops_the_decoder(engine, url, visit):
    engine.says("All the world's a stage, " * 9, delay=0.03)
    began = engine.steps
    page = visit(url)
    send(page, "Go on")
    until(lambda: engine.steps > began + 3, "the first tokens")
    page.close()
    until(engine.has_stopped, "the decoder's end")
    assert engine.steps - began < len(engine.script)


def test_retry_undo_edit_clear_and_copy(engine, url, visit):
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
    engine.says("First.")
    send(page, "A")
    sees(page, ("user", "A"), ("bot", "First."))
    engine.says("Second.")
    send(page, "B")
    sees(page, ("user", "A"), ("bot", "First."), ("user", "B"), ("bot", "Second."))

    page.get_by_role("button", name="Copy message").last.click()
    until(lambda: page.evaluate("navigator.clipboard.readText()") == "Second.", "the copy")

    engine.says("Third.")
    page.get_by_role("button", name="Retry").click()
    sees(page, ("user", "A"), ("bot", "First."), ("user", "B"), ("bot", "Third."))
    assert [m["content"] for m in engine.asked] == ["A", "First.", "B"]

    page.get_by_role("button", name="Undo").click()
    sees(page, ("user", "A"), ("bot", "First."))
    assert page.locator("#box textarea").input_value() == "B"

    engine.says("Fourth.")
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chat textarea").fill("A, but <i>edited</i>")
    page.get_by_role("button", name="Submit").click()
    sees(page, ("user", "A, but <\u2060i>edited<\u2060/i>"), ("bot", "Fourth."))
    assert [m["content"] for m in engine.asked] == ["A, but <i>edited</i>"]

    page.get_by_role("button", name="Clear").click()
    sees(page)
    engine.says("Fifth.")
    send(page, "C")
    sees(page, ("user", "C"), ("bot", "Fifth."))
    assert [m["content"] for m in engine.asked] == ["C"]


def test_whoever_asks_again_meanwhile_stops_the_old_answer(engine, url, visit):
    page = visit(url)
    for label in ("Edit", "Clear"):
        engine.says("All the world's a stage, " * 9, delay=0.03)
        began = engine.steps
        send(page, "Go on")
        until(lambda: engine.steps > began + 5, "the first tokens")  # noqa: B023 - called at once
        engine.says("No.")
        page.get_by_role("button", name=label).first.click()
        if label == "Edit":
            page.locator("#chat textarea").fill("Instead")
            page.get_by_role("button", name="Submit").click()
            sees(page, ("user", "Instead"), ("bot", "No."))
            page.get_by_role("button", name="Clear").click()
        sees(page)
        until(engine.has_stopped, "the decoder's end")
        assert engine.steps - began < len(engine.script) + 230


def test_html_stays_text(engine, url, visit):
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script> &lt;b&gt; <foo>"
    engine.says(
        "Use **bold**, `<b>` or <iframe src=javascript:alert(3)>, ![i](https://example.com/i.png)\n```html\n<p>\n```"
    )
    page = visit(url)
    send(page, nasty)
    until(lambda: len(talk(page)) == 2 and idle(page), "the answer")
    (_, typed), (_, said) = talk(page)
    assert typed.replace("\u2060", "") == nasty
    assert said.replace("\u2060", "").startswith("Use bold, <b> or <iframe src=javascript:alert(3)>, <img src=")
    assert page.locator("#chat :is(img, iframe, script)").count() == 0
    assert page.locator("#chat pre code").inner_text().strip() == "<p>"
    assert engine.asked[0]["content"] == nasty
    assert page.title() == engine.name
    assert page.locator("h1").inner_text() == engine.name


def test_settings_a_style_in_a_word_and_a_system_prompt(engine, url, visit):
    page = visit(url, locale="zh-CN")
    engine.says("Yes.")
    send(page, "A")
    sees(page, ("user", "A"), ("bot", "Yes."))
    assert (engine.request.temperature, engine.request.top_p) == (0.7, 0.9)
    prompt = len(engine.form.prompt([{"role": "user", "content": "A"}]))
    assert page.locator("#fill").inner_text() == f"已用 {prompt + 5} / 1024 个词元"  # four bytes and the stop token
    page.get_by_role("button", name="设置").click()
    page.get_by_label("精确").click()
    page.get_by_label("系统提示词").fill("Be <brief>.")
    send(page, "B")
    until(lambda: len(talk(page)) == 4 and idle(page), "the second answer")
    assert (engine.request.temperature, engine.request.top_p) == (0.0, 1.0)
    assert engine.asked[0] == {"role": "system", "content": "Be <brief>."}
    assert [m["role"] for m in engine.asked] == ["system", "user", "assistant", "user"]
    engine.says("!")
    send(page, "long " * 140)
    page.get_by_text("最早的 2 条消息已略去").wait_for()
    assert [m["role"] for m in engine.asked] == ["system", "user"] or len(engine.asked) == 4


def test_formulas_in_all_four_delimiters(engine, url, visit):
    engine.says(r"$$a^2$$ and \[b^2\] and \(c^2\) and $d^2$ .")
    page = visit(url)
    send(page, "?")
    until(lambda: page.locator("#chat [data-testid=bot] .katex").count() == 4 and idle(page), "four formulas")


def test_a_message_too_long_is_refused_in_one_sentence_and_stays(engine, url, visit):
    page = visit(url)
    send(page, "long " * 200)
    page.get_by_text(re.compile(r"^The message is too long: \d+ tokens, and 768 fit\.")).wait_for()
    until(lambda: idle(page), "the send button")
    assert len(talk(page)) == 1
    engine.says("Better.")
    page.get_by_role("button", name="Edit").click()
    page.locator("#chat textarea").fill("short")
    page.get_by_role("button", name="Submit").click()
    sees(page, ("user", "short"), ("bot", "Better."))


def test_an_example_is_sent_and_nothing_is_not(engine, url, visit):
    engine.says("I am.")
    page = visit(url)
    send(page, "  ")
    page.get_by_text("你是谁？").click()
    sees(page, ("user", "你是谁？"), ("bot", "I am."))


@pytest.mark.parametrize(
    ("locale", "placeholder", "labels"),
    [
        ("en-US", "Type a message", ["Copy message", "Edit", "Retry", "Undo", "Clear"]),
        ("zh-CN", "输入消息", ["复制", "编辑", "重试", "撤销", "清空对话"]),
        ("de-DE", "Type a message", []),
    ],
)
def test_languages(engine, url, visit, locale, placeholder, labels):
    engine.says("!")
    page = visit(url, locale=locale)
    assert page.locator("#box textarea").get_attribute("placeholder") == placeholder
    send(page, "?")
    sees(page, ("user", "?"), ("bot", "!"))
    for label in labels:
        assert page.get_by_role("button", name=label).first.is_visible(), label


@pytest.mark.parametrize(
    "look",
    [
        {"color_scheme": "light", "locale": "zh-CN"},
        {"color_scheme": "dark"},
        {"color_scheme": "light", "viewport": {"width": 375, "height": 720}, "locale": "zh-CN"},
    ],
    ids=["light", "dark", "phone"],
)
def test_pictures(engine, url, visit, tmp_path, look):
    page = visit(url, **look)
    page.get_by_text("Who made you?").wait_for()
    page.screenshot(path=tmp_path / "empty.png")
    engine.says("Sure:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('hi')\n```\n1. **one**\n2. two")
    send(page, "你好！请给我看一张表格、一段代码和一个列表，谢谢。")
    until(lambda: len(talk(page)) == 2 and idle(page), "the answer")
    page.screenshot(path=tmp_path / "talk.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    r, g, b = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (r + g + b < 200) == (look["color_scheme"] == "dark")


def test_the_page_tells_what_it_does_and_the_chat_opens_by_itself(engine, visit, tmp_path):
    waiting = Engine("some/model")
    waiting.message = "Fetching the model"
    with serving(waiting) as url:
        assert json.loads(get(url + "/health")) == {
            "status": "loading",
            "model": "some/model",
            "message": "Fetching the model",
            "runs_on": "",
        }
        page = visit(url, wait_for="text=/Fetching the model … \\d+ s/")
        chinese = visit(url, wait_for="text=/正在获取模型 … \\d+ s/", locale="zh-CN")
        page.screenshot(path=tmp_path / "loading.png")
        assert not page.locator("#box").is_visible()
        waiting.message = "Loading the model"
        page.get_by_text("Loading the model").wait_for()
        engine.says("Here I am.")
        waiting.submit, waiting.trim = engine.submit, engine.trim
        waiting.name, waiting.status, waiting.message = "Orivane", "ready", ""
        for each in (page, chinese):
            each.locator("#box textarea").wait_for()
            assert not each.locator("#status").is_visible()
            assert each.locator("h1").inner_text() == "Orivane"
        send(page, "hi")
        sees(page, ("user", "hi"), ("bot", "Here I am."))
        assert json.loads(get(url + "/health")) == {
            "status": "ready",
            "model": "some/model",
            "message": "",
            "runs_on": "",
        }


def test_the_page_tells_why_it_failed(visit, tmp_path):
    broken = Engine("some/model")
    broken.status, broken.message = "failed", "The folder a_b_c has no <config>.json. Fetch it again."
    with serving(broken) as url:
        page = visit(url, wait_for="text=The model could not be loaded")
        page.screenshot(path=tmp_path / "failed.png")
        assert page.get_by_text(broken.message).is_visible()
        assert not page.locator("#box").is_visible()
        assert json.loads(get(url + "/health")) == {
            "status": "failed",
            "model": "some/model",
            "message": broken.message,
            "runs_on": "",
        }


def test_the_command(tiny_model, visit):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "MODEL": str(tiny_model), "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == f"{tiny_model}: http://localhost:{port}\n"
        url = f"http://127.0.0.1:{port}"
        page = visit(url)  # at once: the chat opens when the model is there
        send(page, "Who are you?")
        until(lambda: len(talk(page)) == 2 and talk(page)[1][1] and idle(page), "an answer")
        health = json.loads(get(url + "/health"))
        assert (health["status"], health["model"]) == ("ready", str(tiny_model))
        assert re.fullmatch(r"CPU, \d+ threads, float\d+ weights.*\.", health["runs_on"])
        assert "Traceback" not in get(url)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    assert "Traceback" not in process.stderr.read()


def test_closing_the_answer_stops_the_decoder(engine):
    engine.says("All the world's a stage", delay=0.05)
    with closing(pieces(engine, Request([{"role": "user", "content": "?"}]))) as found:
        assert [next(found).text, next(found).text] == ["A", "l"]
    until(lambda: not engine.decoder.rows, "the decoder's end")
    assert engine.has_stopped()
