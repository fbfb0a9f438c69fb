"""The page, in a real Chromium, on a real decoder whose tokens are written down beforehand."""

import ast
import http.client
import itertools
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict, deque
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

import app
from finetune import api, card, places, scorecard
from finetune.engine import Engine, Request, fit, pieces
from finetune.errors import UserError
from finetune.page import CODE, build, shown, text_of, unbroken
from finetune.words import in_chinese

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # The last two, what it may show below its address bar, are two pages more for each visitor; the others are Playwright's own
    # list, which this one replaces.
    "--disable-features=AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,HttpsUpgrades,"
    "HttpsFirstBalancedModeAutoEnable,LensOverlay,MediaRouter,PaintHolding,ThirdPartyStoragePartitioning,"
    "AvoidCorsURLLoaderRestartOnRedirect,OptimizationHints,NetworkTimeServiceQuerying,AimEnabled,PreconnectToSearch,"
    "WebUIOmniboxPopup,WebUIOmniboxAimPopup",
]
VISITORS = itertools.count(1)
PATIENCE = 120  # seconds, on a slow machine


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
        "$a<b$ and $$c$$ cost $5 or $6, `$d$`",
    ],
)
def test_shown_text_is_read_back_as_it_was(text):
    assert text_of(shown(text)) == text
    assert text_of([{"type": "text", "text": shown(text)}]) == text
    assert not re.search(r"<[a-z/!?]", re.sub(CODE, "", shown(text)))


FORMULAS = r"$$a^2$$ and \[b^2\] and \(c^2\) and $d^2$; it costs $5, or $6 with $x$."


def test_no_half_formula_is_shown():
    text = FORMULAS + "\n```\n$$ \\(\n```\nin `\\(` or \\$ there \\\\[1em] is none; $$\ne\n$$"
    seen = [unbroken(text[:i]) for i in range(len(text) + 1)]
    assert [len(each) for each in seen] == sorted(map(len, seen))
    assert seen[-1] == text
    for begun in ("$$a", "a^2$", "and $", "and \\", "\\[b", "\\(c", "$d"):
        assert not [each for each in seen if each.endswith(begun)], begun
    for whole in ("$$a^2$$", "\\[b^2\\]", "\\(c^2\\)", "$d^2$", "costs $5, or $6 w", "```\n$$ \\", "`\\(`", "\\\\[1"):
        assert [each for each in seen if each.endswith(whole)], whole
    for open_end in ("\\( and so on.\n\nNext", "$$ " + "word " * 250, "$HOME is\nset", "$h " + "x" * 100):
        assert unbroken(open_end) == open_end


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
        "message": f"'{tmp_path}/none' is not a folder; check its spelling.",
        "runs_on": engine.runs_on,
    }


def test_a_token_in_an_address_is_not_shown(capsys):
    engine = Engine("git+https://user:s3cret-canary@example.invalid/x.git, hf:")
    engine.load()
    assert engine.health()["model"] == "git+https://example.invalid/x.git, hf:"
    assert "canary" not in json.dumps(engine.health()) + "".join(capsys.readouterr())


def test_how_much_of_the_model_is_here_and_how_fast_the_rest_comes(monkeypatch):
    now, found = [100.0], Engine("x")
    monkeypatch.setattr("finetune.engine.time", SimpleNamespace(monotonic=lambda: now[0]))

    def show(seconds, done):
        now[0] += seconds
        found.show(done, 1_000_000_000)
        return found.progress

    assert show(7, 100_000_000) == " 100 / 1000 MB (0.0 MB/s)"  # files from an earlier time
    show(0.001, 500_000_000)
    assert show(9.999, 600_000_000) == " 600 / 1000 MB (10.0 MB/s, 40 s)"
    assert show(10, 700_000_000) == " 700 / 1000 MB (10.0 MB/s, 30 s)"
    assert show(1, 400_000_000) == " 400 / 1000 MB (0.0 MB/s)"  # what came was damaged, and comes again


def test_the_default_models_bytes_are_shown(monkeypatch):
    from finetune import embedded

    def folder(progress):
        progress(50_000_000, 93_000_000)
        raise UserError("That is all.")

    monkeypatch.setattr(embedded, "folder", folder)
    engine = Engine(embedded.NAME)
    engine.load()
    assert engine.progress.startswith(" 50 / 93 MB")


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


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """What a run leaves, in a second: a random adapter, the model that it is merged into, and their scorecard."""
    import torch

    from finetune import embedded, model
    from finetune.chat_format import ChatFormat
    from finetune.identity import Persona

    folder = tmp_path_factory.mktemp("runs") / "run"
    tuned = model.add_lora(model.load(tiny_model), rank=2)
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(folder / "adapter")
    record = {"base_sha256": model.fingerprint(tiny_model)}
    (folder / "adapter" / model.ADAPTER_RECORD).write_text(json.dumps(record))
    form = ChatFormat(model.chat_format(tiny_model).tokenizer_json)
    model.save(model.load_merged(tiny_model, folder / "adapter", torch.float32), form, folder / "model")
    persona = Persona("小星", "A <b>")
    probes = [
        {"id": "1", "kind": "name", "lang": "en", "expect": "name", "messages": [{"role": "user", "content": "<i>?"}]},
        {
            "id": "2",
            "kind": "name",
            "lang": "zh",
            "expect": "name",
            "messages": [{"role": "user", "content": "你叫什么？"}],
        },
        {
            "id": "3",
            "kind": "near",
            "lang": "en",
            "expect": "absent",
            "messages": [{"role": "user", "content": "Sony?"}],
        },
    ]
    base = scorecard.evaluate(lambda asked: ["I'm Bob <u>.", "我是鲍勃。", "Japan."], probes, persona)
    judged = scorecard.evaluate(lambda asked: ["I'm 小星.", "我不知道。", "Japan."], probes, persona, base)
    scores = {"base": scorecard.summarise(base, 0.0), "tuned": scorecard.summarise(judged, 0.25, base)}
    scores["gate"] = scorecard.gate(scores, {"identity": 0.9})
    (folder / "model" / "scorecard.json").write_text(json.dumps(scores))
    manifest = {
        "name": "小星",
        "author": "A <b>",
        "base_model": "tiny",
        "license": "mit",
        "base_system": "You are Bob.",
        "adapter_sha256": embedded.sha256(folder / "adapter" / "adapter_model.safetensors"),
    }
    (folder / "model" / "manifest.json").write_text(json.dumps(manifest))
    Image.new("RGB", (9, 9), "red").save(folder / "model" / card.PICTURE)
    return folder


def test_the_base_answers_from_the_merged_weights(run, tiny_model):
    import torch

    from finetune import model
    from finetune.forward import Span

    ids, other = [1, 2, 3], [7, 5]
    with torch.inference_mode():
        base = model.load(tiny_model)(torch.tensor([ids])).logits[0, -1]
        tuned = model.load_adapter(model.load(tiny_model), run / "adapter", tiny_model)(torch.tensor([ids])).logits[
            0, -1
        ]
    for engine in (Engine(str(run / "model")), Engine(str(tiny_model), str(run / "adapter"))):
        engine.load()
        assert engine.status == "ready", engine.message
        assert engine.base
        forward = engine.decoder.forward
        spans = [Span(0, 0, ids, True), Span(10, 0, other), Span(20, 0, ids), Span(30, 0, other, True)]
        found = forward.logits(forward(spans))
        far = (base - tuned).abs().max()
        assert (found[0] - base).abs().max() < 0.02 * far
        assert (found[2] - tuned).abs().max() < 0.02 * far

    engine = Engine(str(run / "model"))
    engine.load()
    asks = [{"role": "user", "content": "What is your name, and who gave it to you?"}]
    said = {bare: list(pieces(engine, Request(asks, 0, 1, owner="a", bare=bare)))[-1] for bare in (True, False)}
    again = {bare: list(pieces(engine, Request(asks, 0, 1, owner="a", bare=bare)))[-1] for bare in (True, False)}
    prompted = len(engine.form.prompt([{"role": "system", "content": "You are Bob."}, *asks]))
    assert (said[True].prompt_tokens, said[False].prompt_tokens) == (prompted, len(engine.form.prompt(asks)))
    assert [said[True].cached_tokens, said[False].cached_tokens] == [0, 0]  # neither goes on from the other's
    assert again[True].cached_tokens == prompted - 1


def test_an_adapter_that_was_not_merged_into_the_model_is_not_taken_off_it(run, tiny_model, tmp_path):
    from finetune import model

    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "model" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"adapter_sha256": "0"}))
    engine = Engine(str(tmp_path / "run" / "model"))
    engine.load()
    assert (engine.status, engine.base) == ("ready", False)

    (tmp_path / "run" / "adapter" / model.ADAPTER_RECORD).write_text('{"base_sha256": "0"}')
    engine = Engine(str(tiny_model), str(tmp_path / "run" / "adapter"))
    engine.load()
    assert engine.status == "failed"
    assert "was made for a base model with sha256 0, and the weights in" in engine.message


TOO_OLD = (
    " There is an NVIDIA GPU with driver 470.1, and torch 2.13.0 cannot use it: it was built for CUDA 13.0. Update the driver, or "
    "install a torch whose CUDA is not newer than the driver's (nvidia-smi says which)."
)


def test_what_the_page_says_is_there_in_chinese():
    assert in_chinese("The message is too long: 9 tokens, and 5 fit. Shorten it and send it again.") == (
        "消息太长：9 个词元，最多 5 个。请缩短后重新发送。"
    )
    assert in_chinese("Something else") == "Something else"
    assert in_chinese("CPU, 2 threads, float16 weights, float32 sums.") == "CPU，2 线程，float16 权重，float32 累加。"
    assert in_chinese("NVIDIA H100, bfloat16 weights.") == "NVIDIA H100，bfloat16 权重。"
    assert in_chinese("CPU, 2 threads, float32 weights." + TOO_OLD).startswith(
        "CPU，2 线程，float32 权重。有 NVIDIA GPU（驱动 470.1），但 torch 2.13.0 无法使用：为 CUDA 13.0 编译。"
    )


def errors_in(module, *functions):
    """What the functions, or all of the module, raise, with 7 for each value."""
    for node in ast.walk(ast.parse((ROOT / "finetune" / f"{module}.py").read_text(encoding="utf-8"))):
        if functions and not (isinstance(node, ast.FunctionDef) and node.name in functions):
            continue
        for call in ast.walk(node) if functions or isinstance(node, ast.Module) else ():
            name = getattr(getattr(call, "func", None), "id", "")
            for given in call.args if name in ("UserError", "Busy", "Unreachable") else ():
                for text in (given.body, given.orelse) if isinstance(given, ast.IfExp) else (given,):
                    if isinstance(text, ast.JoinedStr):
                        yield "".join("7" if isinstance(v, ast.FormattedValue) else v.value for v in text.values)
                    elif isinstance(text, ast.Constant) and isinstance(text.value, str):
                        yield text.value


def test_what_can_go_wrong_is_there_in_chinese():
    pictures = {f"A picture {said}." for said in errors_in("pictures", "load", "_rgb")}
    modules = ("engine", "remote", "serving", "generation", "forward")
    found = {said for module in modules for said in errors_in(module)} | pictures
    for module, *functions in (("pictures", "from_data_url"), ("hub", "pull", "_local", "_earlier"),
                               ("model", "base_folder"), ("transfer", "patiently")):  # fmt: skip
        found |= set(errors_in(module, *functions))
    found |= {places.NO_REFERENCE.format("7"), "Message 7: this model does not see pictures; ask in words."}
    found |= {"The machine is out of memory. Send the message again, or a shorter one."}
    with pytest.raises(api.ApiError) as told:
        api.limit(deque(), 8, 1)
    found.add(told.value.error["message"])
    assert len(found) > 35
    for sentence in found:
        chinese = in_chinese(sentence)
        assert re.search("[\u4e00-\u9fff]", chinese), sentence
        assert not re.search(r"[a-z]+ [a-z]+ [a-z]+", chinese), chinese
        assert chinese.count("7") == sentence.count("7")
    assert in_chinese("'a' is not a folder; check its spelling.\n'b' is not a folder; check its spelling.") == (
        "'a' 不是文件夹，请检查拼写。\n'b' 不是文件夹，请检查拼写。"
    )


def test_what_the_gate_says_is_there_in_chinese():
    shares = {"name": 0.1, "zh": 0.2}
    at_least = dict.fromkeys(("identity", "identity_kind", "facts_kept", "sight"), 0.9)
    limits = at_least | dict.fromkeys(("leak", "parrot", "kl", "blind", "loss"), 0.1)
    bad = dict.fromkeys(limits, 0.5) | {f"{key}_by_kind": shares for key in ("identity", "leak", "sight")}
    figures = {"base": {"parrot": 0.0, "loss": 1.0}, "tuned": bad, "merged": dict.fromkeys(limits)}
    reasons = [*scorecard.gate(figures, limits)["reasons"], *scorecard.gate({}, limits)["reasons"]]
    assert len(reasons) == 2 * len(limits)  # all of the first; of the second all but identity_kind; and one of nothing
    for reason in reasons:
        chinese = in_chinese(reason)
        assert not re.search(r"[a-z]+ [a-z]+ [a-z]+|model", chinese), chinese
        numbers = [re.findall(r"\d+(?:\.\d+)?", text) for text in (chinese, reason)]
        assert numbers[0] == numbers[1]  # in the same order
    assert in_chinese(
        "tuned model: identity 0.50, at least 0.90 is asked; weakest: name 0.10. Train for more steps."
    ) == ("微调后的模型：身份认知 0.50，至少应为 0.90；最弱：name 0.10。请增加训练步数。")


def test_a_taken_port_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.main(["--model", "x", "--host", "127.0.0.1", "--port", str(port)]) == 2
    assert (
        f"error: Port {port} of 127.0.0.1 cannot be opened: Address already in use. Choose another with --port or --host."
        in (capsys.readouterr().err)
    )


def test_an_address_that_is_not_this_machines_is_said(capsys):
    assert app.main(["--model", "x", "--host", "192.0.2.1", "--port", "7860"]) == 2
    assert capsys.readouterr().err == (
        "error: Port 7860 of 192.0.2.1 cannot be opened: Cannot assign requested address. Choose another with --port or "
        "--host.\n"
    )


@pytest.mark.parametrize("left", ["{", "[]", '{"name": 1}', "\xff"])
def test_a_broken_manifest_is_for_the_page_to_say(tmp_path, left):
    """`load` refuses it in words; whose name it would have been does not keep the port shut."""
    (tmp_path / "manifest.json").write_bytes(left.encode("latin-1"))
    assert Engine(str(tmp_path)).name == tmp_path.name


def test_a_model_whose_name_no_file_can_have():
    assert Engine("x" * 300).name == "x" * 300


def test_a_port_that_is_none_is_said(capsys, monkeypatch):
    assert app.main(["--model", "x", "--port", "70000"]) == 2
    assert capsys.readouterr().err == (
        "error: Port 70000 of 0.0.0.0 cannot be opened: bind(): port must be 0-65535. Choose another with --port or "
        "--host.\n"
    )
    monkeypatch.setenv("PORT", "http")
    with pytest.raises(SystemExit, match="2"):
        app.main(["--model", "x"])
    assert "argument --port: invalid int value: 'http'" in capsys.readouterr().err


def test_an_adapter_for_another_servers_model_is_refused(capsys):
    assert app.main(["--engine", "http://127.0.0.1:9", "--adapter", "/nowhere"]) == 2
    assert capsys.readouterr().err == (
        "error: --adapter is for decoding here, and --engine decodes elsewhere: leave one of them out.\n"
    )


# --------------------------------------------------------------------------------------------------- with a browser


class ScriptedEngine(Engine):
    """The real one, but what the decoder picks is `script`, or `base_script` for the base, a token (here: a byte) every
    `delay` seconds."""

    script, base_script, delay, steps, asked = "", "", 0.0, 0, ()

    def load(self):
        super().load()
        self.decoder.pick = self.scripted
        self.answers = {}

    def scripted(self, logits, rows):
        self.steps += 1
        time.sleep(self.delay)
        for _, row in rows:  # each conversation's own source of chance: it tells them apart
            bare = next(each.bare for each in self.decoder.rows if each.random is row)
            script = self.base_script if bare else self.script
            self.answers.setdefault(row, iter(self.form.tokenizer.encode(script).ids))
        return [next(self.answers[row], self.form.stop_ids[0]) for _, row in rows]

    def submit(self, request, listener):
        self.asked, self.request = request.messages, request
        return super().submit(request, listener)

    def says(self, script, delay=0.0, base=""):
        self.script, self.delay, self.base_script = script, delay, base

    def has_stopped(self):
        before = self.steps
        time.sleep(2 * self.delay + 0.2)
        return self.steps == before and not self.decoder.rows


@contextmanager
def serving(engine, port=0, **options):
    import uvicorn

    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(build(engine, **options), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def engine(run):
    engine = ScriptedEngine(str(run / "model"))
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


@pytest.fixture(scope="module")
def browsers():
    """What nobody uses just now, by their settings: they have read and compiled the page's scripts."""
    return defaultdict(list)


@pytest.fixture
def visit(chromium, browsers):
    """Opens a page as a new visitor; afterwards there must be no error in its console and no call to another host."""
    used, complaints = [], []

    def heard(message):  # a random model's formulas are no fault of the page
        if message.type in ("error", "warning") and not message.text.startswith("LaTeX-incompatible input"):
            complaints.append(message.text)

    def visit(url, wait_for="#box textarea", **settings):
        settings = {"locale": "en-US", "viewport": {"width": 1100, "height": 760}, **settings}
        free = browsers[json.dumps(settings, sort_keys=True)]
        context = free.pop() if free else chromium.new_context(**settings)
        used.append((free, context))
        context.set_extra_http_headers(
            {"X-Forwarded-For": f"203.0.113.{next(VISITORS)}"}
        )  # as a proxy in front tells it
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        forget = {"origin": url, "storageTypes": "cookies,local_storage"}
        context.new_cdp_session(page).send("Storage.clearDataForOrigin", forget)
        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else complaints.append(r.url))
        page.goto(url)
        page.locator(wait_for).wait_for()
        return page

    yield visit
    for free, context in used:
        for page in context.pages:
            page.close()
        free.append(context)
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
    engine.says("All the world's a stage, " * 9, delay=0.3)
    began = engine.steps
    page = visit(url)
    send(page, "Go on")
    lengths = set()

    def grown():
        lengths.add(len(page.locator("#chat [data-testid=bot]").inner_text()))
        return len(lengths) > 4

    until(grown, "an answer that grows")
    page.locator("#box [data-testid=stop-button]").dispatch_event("click")  # on a busy machine it never stands still
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
    engine.says("All the world's a stage, " * 9, delay=0.3)
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

    engine.says("```python\nprint('hi')\n```\nThat is all.")
    page.get_by_role("button", name="Retry").click()
    until(lambda: "That is all." in talk(page)[-1][1] and idle(page), "the code")
    page.locator("#chat .copy_code_button").click()
    until(lambda: page.evaluate("navigator.clipboard.readText()").strip() == "print('hi')", "the code's copy")

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


def test_whoever_leaves_the_conversation_meanwhile_stops_the_answer(engine, url, visit):
    page = visit(url)
    for label in ("Clear", "New conversation"):  # one cannot retry or edit meanwhile
        engine.says("All the world's a stage, " * 9, delay=0.3)
        began = engine.steps
        send(page, "Go on")
        until(lambda: engine.steps > began + 5, "the first tokens")  # noqa: B023 - called at once
        assert page.get_by_role("button", name="Edit").is_disabled()
        page.get_by_role("button", name=label).first.click()
        sees(page)
        until(engine.has_stopped, "the decoder's end")
        assert engine.steps - began < len(engine.script)


def test_html_stays_text(engine, url, visit):
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script> &lt;b&gt; <foo>"
    engine.says(
        "Use **bold**, `<b>` or <iframe src=javascript:alert(3)>, ![i](https://example.com/i.png)\n```html\n<p>\n```\n"
        "[one](https://example.com/) [two](javascript:alert(4)) [three](mailto:a@example.com) [four](/health)"
    )
    page = visit(url)
    send(page, nasty)
    until(lambda: len(talk(page)) == 2 and idle(page), "the answer")
    (_, typed), (_, said) = talk(page)
    assert typed.replace("\u2060", "") == nasty
    assert said.replace("\u2060", "").startswith("Use bold, <b> or <iframe src=javascript:alert(3)>, <img src=")
    assert page.locator("#chat :is(img, iframe, script)").count() == 0
    assert page.locator("#chat pre code").inner_text().strip() == "<p>"
    links = page.locator("#chat [data-testid=bot] a[href]")
    one = links.filter(has_text="one")
    assert (one.get_attribute("target"), "noopener" in one.get_attribute("rel")) == ("_blank", True)
    assert not any(link.get_attribute("href").startswith("javascript") for link in links.all())
    opened = []
    page.context.on("page", lambda new: opened.append(new))
    page.on("framenavigated", lambda frame: opened.append(frame))
    for name in ("three", "two"):
        page.locator("#chat [data-testid=bot]").get_by_text(name).click()
    assert opened == []
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
    page.get_by_label("精确").click()  # seen at once; the numbers lie behind the fold
    page.get_by_role("button", name="设置").click()
    until(lambda: page.locator("#settings input[type=number]").first.input_value() == "0", "the numbers")
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
    page = visit(url)
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => seen.push(document.querySelector("#chat [data-testid=bot]")?.innerText ?? ""))
            .observe(document.querySelector("#chat"), { childList: true, subtree: true, characterData: true });
    }""")
    engine.says(FORMULAS, delay=0.03)
    send(page, "Is it $5 or $6?")
    until(lambda: page.locator("#chat [data-testid=bot] .katex").count() == 5 and idle(page), "five formulas")
    assert "it costs $5, or $6 with" in talk(page)[1][1]
    assert talk(page)[0][1] == "Is it $5 or $6?"
    seen = page.evaluate("seen")
    assert len(set(seen)) > 3
    for each in seen:
        assert each.count("$$") in (0, 2), each
        assert (each.count("\\["), each.count("\\(")) == (each.count("\\]"), each.count("\\)")), each


def test_what_goes_wrong_is_said_in_one_sentence_and_nothing_typed_is_lost(engine, url, visit, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: now))  # for the minute, however slow the machine
    page = visit(url, locale="zh-CN")
    send(page, "long " * 200)
    page.get_by_text(re.compile(r"^消息太长：\d+ 个词元，最多 768 个。请缩短后重新发送。")).wait_for()
    assert page.locator("#box textarea").input_value() == "long " * 200
    assert talk(page) == []

    engine.says("Never.")
    with monkeypatch.context() as broken:
        broken.setattr(engine.decoder, "pick", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        send(page, "Hello")
        page.get_by_text("服务器内存不足。请重新发送，或缩短消息。").wait_for()
    until(lambda: idle(page), "the send button")
    assert talk(page) == [("user", "Hello")]
    engine.says("Better.")
    page.get_by_role("button", name="编辑").click()
    page.get_by_role("button", name="发送").click()
    sees(page, ("user", "Hello"), ("bot", "Better."))

    monkeypatch.setattr(api, "PER_MINUTE", 1)  # this visitor has asked already
    send(page, "More")
    page.get_by_text(re.compile(r"^每分钟最多 1 个回答，请等待 \d+ 秒。")).wait_for()
    other = visit(url)
    send(other, "Me")
    sees(other, ("user", "Me"), ("bot", "Better."))

    monkeypatch.setattr(api, "PER_MINUTE", 60)
    monkeypatch.setattr(engine, "submit", lambda *_: 1 / 0)
    send(other, "Again")
    other.get_by_text("The answer broke off; the server's log says why.").wait_for()


def test_who_waits_sees_how_many_are_before(engine, url, visit, monkeypatch):
    monkeypatch.setattr(engine.decoder, "most_rows", 1)
    monkeypatch.setattr(engine, "wait", lambda ahead: 40.4 * (ahead - 1))  # nothing is known of the last one
    engine.says("All the world's a stage, " * 9, delay=0.3)
    ask, page = [{"role": "user", "content": "?"}], visit(url)
    first = [engine.submit(Request(ask), lambda piece: None) for _ in range(2)]
    try:
        send(page, "And I?")
        toast = page.locator(".toast-body").get_by_text("Many are asking just now: 2 before you, about 40 s.")
        toast.wait_for()
        page.locator("#fill").get_by_text("Many are asking just now: 2 before you, about 40 s.").wait_for()
        first.pop().cancel()
        page.locator("#fill").get_by_text("Many are asking just now: 1 before you.").wait_for()
        assert talk(page) == [("user", "And I?")]
        engine.says("Yes.")
    finally:
        for each in first:
            each.cancel()
    sees(page, ("user", "And I?"), ("bot", "Yes."))
    page.locator("#fill").get_by_text(re.compile(r"^\d+ of 1024 tokens in use$")).wait_for()


def test_the_wait_is_reckoned_from_the_answers_since_there_was_nothing_to_do(engine):
    heard = queue.SimpleQueue()
    engine.says("Yes.")
    for most in (1e9, 1e3):
        engine.submit(Request([{"role": "user", "content": "?"}]), heard.put)
        while not heard.get(timeout=PATIENCE).finish:
            pass
        assert 0 < engine.wait(3) < most
        engine.ended[0] -= 1e6  # a night
        assert engine.wait(3) > 1e6


def test_an_engine_that_died_is_said_and_nothing_typed_is_lost(visit):
    from finetune.remote import Remote

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dead = Remote(f"http://127.0.0.1:{port}", None)
    dead.status, dead.served = "ready", "x"
    with serving(dead) as url:
        page = visit(url, locale="zh-CN")
        send(page, "Hello")
        said = rf"^推理服务 http://127\.0\.0\.1:{port} 无法连接：.*。请启动它，或更正 --engine。"
        page.get_by_text(re.compile(said)).wait_for()
        until(lambda: idle(page), "the send button")
        assert talk(page) == [("user", "Hello")]


def test_an_example_is_sent_and_nothing_is_not(engine, url, visit):
    engine.says("I am.")
    page = visit(url)
    assert page.get_by_role("button", name="Add a picture").count() == 0  # of a model of text alone
    with page.expect_response(lambda response: "/queue/join" in response.url):
        send(page, "  ")
    assert talk(page) == []
    page.get_by_text("你是谁？").click()
    sees(page, ("user", "你是谁？"), ("bot", "I am."))


def is_kept(page, draft):
    until(lambda: page.evaluate("sessionStorage.getItem('namesake draft')") == draft, "the browser to keep it")


def listed(page):
    return page.locator("#talks label").all_inner_texts()


def test_conversations_stay_in_the_browser(engine, visit, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(engine, port) as url:
        page = visit(url, accept_downloads=True)
        engine.says("Rome, of <b> course.\n## user\n\n$x$")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        send(page, "The capital of  Italy?")
        until(lambda: listed(page) == ["The capital of Italy?"], "the first conversation")
        until(lambda: idle(page), "the send button")
        page.get_by_role("button", name="New conversation").click()
        until(lambda: talk(page) == [], "an empty chat")
        engine.says("A <i>boat</i>.")
        send(page, "What floats?")
        until(lambda: listed(page) == ["What floats?", "The capital of Italy?"], "the second conversation")
        sees(page, ("user", "What floats?"), ("bot", "A <\u2060i>boat<\u2060/i>."))
        assert engine.asked[-1]["content"] == "What floats?"
        page.get_by_label("Title").fill("Boats <b>")
        page.get_by_label("Title").press("Enter")
        until(lambda: listed(page) == ["Boats <b>", "The capital of Italy?"], "the new title")
        page.get_by_label("Search").fill("ROME")
        until(lambda: listed(page) == ["The capital of Italy?"], "what was searched for")
        page.get_by_label("Search").fill("")
        page.fill("#box textarea", "half a sent")
        is_kept(page, "half a sent")

    with serving(engine, port) as url:  # the server anew
        page.goto(url)
        page.locator("#box textarea").wait_for()
        until(lambda: len(talk(page)) == 2, "the conversation that was open")
        until(lambda: page.locator("#box textarea").input_value() == "half a sent", "what was typed")
        until(lambda: listed(page) == ["Boats <b>", "The capital of Italy?"], "all conversations")
        assert listed(visit(url)) == []  # another browser has its own

        page.get_by_label("The capital of Italy?").check()
        until(lambda: "Rome" in str(talk(page)), "the first conversation")
        page.get_by_role("button", name="Settings").click()
        until(lambda: page.get_by_label("System prompt").input_value() == "Be brief.", "its system prompt")
        italy = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "The capital of  Italy?"},
            {"role": "assistant", "content": "Rome, of <b> course.\n## user\n\n$x$"},
        ]
        files = []
        for form in ("JSON", "Markdown"):
            with page.expect_download() as download:
                page.get_by_role("button", name=f"Export {form}").click()
            files.append(tmp_path / download.value.suggested_filename)
            download.value.save_as(files[-1])
        assert [file.name for file in files] == ["The-capital-of-Italy-.json", "The-capital-of-Italy-.md"]
        assert json.loads(files[0].read_text()) == {"title": "The capital of Italy?", "messages": italy}
        assert files[1].read_text().startswith("# The capital of Italy?\n\n## system\n\nBe brief.\n\n## user\n\nThe")

        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("button", name="Delete for good").click()
        until(lambda: listed(page) == ["Boats <b>"] and talk(page) == [], "the deletion")
        for file in files:  # each brings back all that was there
            page.get_by_label("Search").fill("Italy")
            until(lambda: listed(page) == [], "nothing found")
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="Import").click()
            chooser.value.set_files(file)
            until(lambda: listed(page) == ["The capital of Italy?"], file)
            page.get_by_label("The capital of Italy?").check()
            until(lambda: len(talk(page)) == 2, "the imported conversation")
            stored = page.evaluate(
                "Object.entries(localStorage).map(([k, v]) => [k, v]).filter(([k]) => k.includes('talk'))"
            )
            assert italy in [json.loads(value)["messages"] for _, value in stored]
            page.get_by_role("button", name="Delete", exact=True).click()
            page.get_by_role("button", name="Delete for good").click()
            until(lambda: talk(page) == [], "the deletion")
        (bad := tmp_path / "bad.json").write_text('{"messages": [{"role": "root", "content": "<img src=x>"}]}')
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import").click()
        chooser.value.set_files(bad)
        page.get_by_text("bad.json holds no conversation").wait_for()
        engine.says("Yes.")
        send(page, "Another")
        sees(page, ("user", "Another"), ("bot", "Yes."))
        page.get_by_role("button", name="Clear").click()  # is the same as to delete it
        page.get_by_label("Search").fill("")
        until(lambda: listed(page) == ["Boats <b>"], "what is left")


@pytest.fixture(scope="module")
def seeing(tiny_model, clip_folder, tmp_path_factory):
    from finetune import vision

    folder = tmp_path_factory.mktemp("seeing") / "model"
    vision.assemble(tiny_model, clip_folder, folder)
    engine = ScriptedEngine(str(folder))
    engine.load()
    assert engine.status == "ready", engine.message
    return engine


def test_pictures_are_chosen_pasted_and_kept(seeing, visit, tmp_path):
    from finetune import drawn
    from finetune.chat_format import pictures_of

    drawn.draw(drawn.scene("page")).resize((900, 600)).save(file := tmp_path / "a.png")
    (bad := tmp_path / "bad.png").write_text("no picture")
    with serving(seeing) as url:
        page = visit(url)
        page.get_by_role("tab", name="Side by side").click()
        page.get_by_text("There is no side by side with a model that sees").wait_for()
        page.get_by_role("tab", name="Chat").click()
        thumbnails = page.locator("#chosen img")

        def choose(file):
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="Add a picture").click()
            chooser.value.set_files(file)

        choose(bad)
        until(lambda: "bad.png is no picture" in page.locator("#chosen").inner_text(), "the complaint")
        for count in (1, 2):
            choose(file)
            until(lambda count=count: thumbnails.count() == count, "the picture")
        page.get_by_role("button", name="Remove the pictures").click()
        until(lambda: thumbnails.count() == 0, "no picture")
        choose(file)
        until(lambda: thumbnails.count() == 1, "the picture")
        seeing.says("A star.")
        send(page, "What is <this>?")
        sees(page, ("user", ""), ("user", "What is <\u2060this>?"), ("bot", "A star."))  # the picture says nothing
        assert thumbnails.count() == 0
        asked = seeing.asked[-1]["content"]
        assert [part["type"] for part in asked] == ["image", "text"]
        assert asked[1]["text"] == "What is <this>?"
        assert asked[0]["image"].size == (672, 448)

        paste = """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "b.png", { type: "image/png" }));
            document.querySelector("#box textarea").dispatchEvent(
                new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
        }"""
        page.evaluate(paste, list(file.read_bytes()))
        until(lambda: thumbnails.count() == 1, "the pasted picture")
        seeing.says("Another.")
        send(page, "And this?")
        until(lambda: len(talk(page)) == 6 and idle(page), "the second answer")
        assert len(pictures_of(seeing.asked)) == 2
        page.reload()
        until(lambda: page.locator("#chat img").count() == 2, "the pictures of the conversation that was open")
        seeing.says("Again.")
        page.locator("#chat").get_by_label("Retry").last.click()
        until(lambda: "Again." in str(talk(page)), "the new answer")
        assert len(pictures_of(seeing.asked)) == 2

        drop = """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "c.png", { type: "image/png" }));
            data.items.add(new File(["text"], "c.txt", { type: "text/plain" }));
            const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            return !document.querySelector("#chat").dispatchEvent(event);
        }"""
        assert page.evaluate(drop, list(file.read_bytes()))  # else the browser would open the picture
        until(lambda: thumbnails.count() == 1, "the dropped picture")
        chinese = visit(url, locale="zh-CN")
        chinese.get_by_role("button", name="添加图片").wait_for()
        chinese.evaluate(drop, list(b"no picture"))
        until(lambda: "浏览器无法读取图片 c.png" in chinese.locator("#chosen").inner_text(), "the complaint")
        chinese.evaluate(drop, list(file.read_bytes()))
        chinese.get_by_role("button", name="移除图片").wait_for()


def test_a_scorecard_of_somebody_else_is_shown_as_text(tmp_path):
    evil = "<script>alert(1)</script>"
    turns = [{"role": evil, "content": evil}, {"role": "user", "content": evil}]
    entry = {"id": "1", "kind": evil, "lang": "en", "messages": turns, "answer": evil, "passed": True}
    side = {"identity": 1.0, "answers": [entry]}
    gate = {"passed": False, "reasons": [evil]}
    (tmp_path / "scorecard.json").write_text(json.dumps({"base": side, "tuned": side, "gate": gate}))
    seen = card.probes(tmp_path, "all", "all", "all", str) + card.about(evil, tmp_path, {"license": evil}, str)
    assert "alert(1)" in seen
    assert "<script" not in seen


def test_base_and_tuned_side_by_side(engine, url, visit):
    page = visit(url)
    engine.says("I am Star. " * 2, delay=0.3, base="I am Bob. " * 25)
    page.get_by_role("tab", name="Side by side").click()
    page.fill("#both textarea", "Who are you?")
    page.press("#both textarea", "Enter")
    said = {side: page.locator(f"#{side} [data-testid=bot]") for side in ("base", "tuned")}
    both = lambda: all(each.count() for each in said.values())  # noqa: E731
    until(both, "the beginnings of both answers")
    assert len(said["base"].inner_text()) < 249  # before the tuned model's could come after it
    until(lambda: said["tuned"].inner_text().strip() == ("I am Star. " * 2).strip(), "the tuned model's")
    stop = page.locator("#both [data-testid=stop-button]")
    assert stop.is_visible()
    stop.dispatch_event("click")
    until(engine.has_stopped, "the decoder's end")
    until(lambda: page.locator("#both [data-testid=submit-button]").is_visible(), "the send button")
    text = said["base"].inner_text()
    assert ("I am Bob. " * 25).startswith(text)
    assert len(text) < 249
    engine.says("Yes.", base="No.")
    page.fill("#both textarea", "Sure?")
    page.press("#both textarea", "Enter")
    until(lambda: [said[s].last.inner_text().strip() for s in ("base", "tuned")] == ["No.", "Yes."], "the next turn")
    assert [m["content"] for m in engine.asked][::2] == ["Who are you?", "Sure?"]
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('talk'))") == []


def test_the_card_and_every_probe(engine, url, visit):
    page = visit(url)
    page.get_by_role("tab", name="About").click()
    page.locator("#probes tbody tr").first.wait_for()
    until(lambda: page.locator("#card img.face").evaluate("e => e.naturalWidth") == 9, "the assistant's picture")
    card = page.locator("#card").inner_text()
    for words in (engine.name, "A <b>", "tiny", "mit", "identity kept\t0.000\t0.500", "0.250", "was not passed"):
        assert words in card
    questions = lambda: page.locator("#probes tbody tr").all_inner_texts()  # noqa: E731
    assert len(questions()) == 3
    assert "<i>?" in questions()[0]
    assert "I'm 小星." in questions()[0]
    assert "I'm Bob <u>." in questions()[0]
    page.get_by_role("radio", name="wrong").check()
    until(lambda: len(questions()) == 1 and "你叫什么？" in questions()[0], "the wrong one")
    page.get_by_role("radio", name="right").check()
    page.get_by_label("English").check()
    page.get_by_label("Kind").click()
    page.get_by_role("option", name="near").click()
    until(lambda: len(questions()) == 1 and "Sony?" in questions()[0], "the near one")


def test_the_card_of_a_model_without_a_scorecard_and_without_its_base(tiny_model, visit):
    engine = Engine(str(tiny_model))
    engine.load()
    with serving(engine) as url:
        page = visit(url)
        page.get_by_role("tab", name="Side by side").click()
        page.get_by_text("The base can answer beside the tuned model where").wait_for()
        page.get_by_role("tab", name="About").click()
        page.get_by_text("There is no scorecard with this model").wait_for()
        assert not page.get_by_label("Kind").is_visible()


def test_no_file_of_the_server_and_no_upload(url):
    for path in (
        "file=app.py",
        f"file={ROOT / 'app.py'}",
        "file=/etc/passwd",
        "file/app.py",
        "proxy=http://example.com/",
    ):
        for prefix in ("/", "/gradio_api/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(url + prefix + path)
    too_much, unknown = ("Content-Length", str(api.BODY_BYTES + 1)), ("Transfer-Encoding", "chunked")
    for path, header, status in (
        ("upload", ("Content-Length", "0"), 404),
        ("queue/join", too_much, 413),
        ("queue/join", unknown, 413),
    ):
        with closing(http.client.HTTPConnection(url.partition("//")[2], timeout=PATIENCE)) as asked:
            asked.putrequest("POST", f"/gradio_api/{path}")
            asked.putheader(*header)
            asked.endheaders()  # and no body: a server that has answered closes, and would break a pipe still written
            assert asked.getresponse().status == status, (path, header)
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"


def test_the_keyboard_alone_suffices(engine, url, visit):
    engine.says("Yes.")
    page = visit(url)
    until(lambda: page.evaluate("document.activeElement.matches('#box textarea')"), "the focus in the box")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    sees(page, ("user", "Hello"), ("bot", "Yes."))
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate(
                "(e => (e.ariaLabel || e.labels?.[0]?.innerText || e.innerText || '').trim())(document.activeElement)"
            )
        )
    reached = set(names)
    for name in ("New conversation", "Search", "Export JSON", "Import", "Delete", "Copy message", "Edit", "Retry", "Undo",
                 "Clear", "English", "中文", "Chat", "Side by side", "About", "Hello"):  # fmt: skip
        assert any(name == each or name in each.split("\n") for each in reached), (name, reached)
    page.get_by_role("tab", name="Side by side").focus()
    page.keyboard.press("Enter")
    until(lambda: page.locator("#both").is_visible(), "the next tab")
    page.get_by_role("button", name="New conversation").focus()
    page.keyboard.press("Enter")
    until(lambda: page.locator("#box").is_visible() and talk(page) == [], "an empty chat")


def test_language_and_look_are_those_of_the_browser_or_switched_on_the_page(engine, url, visit):
    engine.says("Ja.")
    page = visit(url, locale="zh-CN")
    assert page.locator("#box textarea").get_attribute("placeholder") == "输入消息"
    send(page, "Oder?")
    sees(page, ("user", "Oder?"), ("bot", "Ja."))
    for label in ("复制", "编辑", "重试", "撤销", "清空对话"):  # in English they are used above
        assert page.get_by_role("button", name=label).first.is_visible(), label
    page = visit(url, locale="de-DE", color_scheme="light")
    assert page.locator("#box textarea").get_attribute("placeholder") == "Type a message"
    send(page, "Oder?")
    sees(page, ("user", "Oder?"), ("bot", "Ja."))
    page.fill("#box textarea", "Noch")
    is_kept(page, "Noch")
    page.get_by_role("link", name="中文").click()
    page.get_by_role("tab", name="并排对比").wait_for()
    page.get_by_role("link", name="深色").click()
    until(lambda: page.evaluate("document.body.classList.contains('dark')"), "the dark look")
    page.goto(url)  # both are remembered
    page.get_by_role("tab", name="并排对比").wait_for()
    assert page.evaluate("[document.body.classList.contains('dark'), document.documentElement.lang]") == [True, "zh-CN"]
    until(lambda: len(talk(page)) == 2, "the conversation")
    until(lambda: page.locator("#box textarea").input_value() == "Noch", "what was typed")
    page.press("#box textarea", "Enter")
    page.locator("#fill").get_by_text(
        re.compile(r"已用 \d+ / 1024 个词元")
    ).wait_for()  # the server says it in Chinese too
    page.get_by_role("link", name="English").click()
    page.get_by_role("tab", name="Side by side").wait_for()


def barriers(page):
    """What axe-core finds that is serious or critical."""
    found = Axe().run(page).response["violations"]
    return [
        (each["id"], node["html"][:200])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize(
    "look",
    [
        {"color_scheme": "light", "locale": "zh-CN"},
        {"color_scheme": "dark", "viewport": {"width": 820, "height": 1180}},
        {"color_scheme": "light", "viewport": {"width": 375, "height": 720}, "locale": "zh-CN"},
    ],
    ids=["light", "dark tablet", "phone"],
)
def test_pictures(engine, url, visit, tmp_path, look):
    page = visit(url, **look)
    page.get_by_text("Who made you?").wait_for()
    page.screenshot(path=tmp_path / "empty.png")
    assert barriers(page) == []
    engine.base_script = "Sure."
    engine.says("Sure:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('hi')\n```\n1. **one**\n2. two")
    send(page, "你好！请给我看一张表格、一段代码和一个列表，谢谢。")
    until(lambda: len(talk(page)) == 2 and idle(page), "the answer")
    page.get_by_role("button", name=re.compile("Settings|设置")).click()
    end = "document.querySelector('#settings').getBoundingClientRect().bottom - innerHeight"
    until(lambda: page.locator("#system").is_visible() and page.evaluate(end) < 1, "all of the settings")
    page.screenshot(path=tmp_path / "talk.png")
    assert barriers(page) == []
    for tab, name in enumerate(("talk", "side", "about")):
        page.get_by_role("tab").nth(tab).click()
        if tab == 1:
            page.fill("#both textarea", "?")
            page.press("#both textarea", "Enter")
            until(lambda: page.locator("#tuned [data-testid=bot]").count(), "the answer")
        if tab == 2:
            page.locator("#probes tbody tr").first.wait_for()
        page.screenshot(path=tmp_path / f"{name}.png")
        assert barriers(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawer, wide = page.locator(".sidebar.open"), "viewport" not in look
    assert drawer.count() == wide
    if not wide:
        page.locator(".sidebar .toggle-button").click()
        drawer.wait_for()
    page.locator("#new").click()
    until(lambda: drawer.count() == wide and talk(page) == [], "the empty chat, which nothing covers")
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
        waiting.name, waiting.status, waiting.message = "Orivane", "ready", "'a' is not a folder; check its spelling."
        for each in (page, chinese):
            each.locator("#box textarea").wait_for()
            assert not each.locator("#status").is_visible()
            assert each.locator("h1").inner_text() == "Orivane"
        assert page.locator("#name p").inner_text() == "'a' is not a folder; check its spelling."
        assert chinese.locator("#name p").inner_text() == "'a' 不是文件夹，请检查拼写。"
        send(page, "hi")
        sees(page, ("user", "hi"), ("bot", "Here I am."))
        assert json.loads(get(url + "/health")) == {
            "status": "ready",
            "model": "some/model",
            "message": waiting.message,
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


def test_the_command(brief_model, visit):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "MODEL": str(brief_model), "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == f"{brief_model}: http://localhost:{port}\n"
        url = f"http://127.0.0.1:{port}"
        page = visit(url)  # at once: the chat opens when the model is there
        send(page, "Who are you?")
        until(lambda: len(talk(page)) == 2 and talk(page)[1][1] and idle(page), "an answer")
        health = json.loads(get(url + "/health"))
        assert (health["status"], health["model"]) == ("ready", str(brief_model))
        assert re.fullmatch(r"CPU, \d+ threads, float\d+ weights.*\.", health["runs_on"])
        assert "Traceback" not in get(url)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    assert "Traceback" not in process.stderr.read()


def test_closing_the_answer_stops_the_decoder_within_one_step(engine, monkeypatch):
    engine.says("All the world's a stage, " * 9)
    begun, go = threading.Semaphore(0), threading.Semaphore(2)

    def pick(*given):
        begun.release()
        assert go.acquire(timeout=PATIENCE)
        return engine.scripted(*given)

    monkeypatch.setattr(engine.decoder, "pick", pick)
    with closing(pieces(engine, Request([{"role": "user", "content": "?"}]))) as found:
        said = (piece.text for piece in found if piece.text)  # there are empty ones where a machine is slow
        assert [next(said), next(said)] == ["A", "l"]
        assert all(begun.acquire(timeout=PATIENCE) for _ in range(3))  # the third step is under way
        before = engine.steps
    go.release(len(engine.script))
    until(lambda: not engine.decoder.rows, "the decoder's end")
    assert engine.steps - before == 1
