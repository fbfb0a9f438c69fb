"""The page: a chat whose history stays in the browser, base and tuned side by side, and what is known of the model; with
the API as one FastAPI app. Importing it imports gradio."""

import html
import inspect
import json
import os
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from finetune import api, card
from finetune.engine import Engine, Request, pieces
from finetune.errors import UserError
from finetune.words import CHINESE, GRADIO_CHINESE, in_chinese

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


def _import_gradio() -> Any:
    """gradio, in half the time: at each import it writes a .pyi file beside every component, unless the component's
    source cannot be found."""

    def not_found(_: object) -> str:
        raise OSError

    getfile, inspect.getfile = inspect.getfile, not_found
    try:
        import gradio
    finally:
        inspect.getfile = getfile
    return gradio


gr = _import_gradio()

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "page"
VISITORS = 100  # whose answers are written or waited for at once
STYLES = {"precise": (0.0, 1.0), "balanced": (0.7, 0.9), "free": (1.0, 0.95)}  # temperature, top_p
LATEX = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$\u2060", "\u2060$", False)]
EXAMPLES = ["你是谁？", "Who made you?", "Write two lines about the sea."]
WAITS = "Many are asking just now: {} before you, about {} s."
WAITS_UNKNOWN = "Many are asking just now: {} before you."
NO_BASE = (
    "The base can answer beside the tuned model where the adapter lies beside it: in a run's folder, or published with "
    "--what both."
)
BLIND_BASE = "There is no side by side with a model that sees: its base does not."
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# What may warn or stream has to go through the queue.
STREAM = {"concurrency_limit": VISITORS, "show_progress": "hidden", "api_visibility": "private"}
LOOKS = """<nav aria-label="Language and look 语言与外观"><a href="?lang=en" lang="en">English</a> <a href="?lang=zh-CN"
lang="zh-CN">中文</a> <a href="?__theme=light" aria-label="Light 浅色">☀</a> <a href="?__theme=dark" aria-label="Dark 深色">☾</a></nav>"""
# Gradio needs inline scripts and functions made of text. Nothing is loaded from, or sent to, another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}
CLOSED = re.compile(  # what Gradio serves and this page has no use for
    r"/(gradio_api/)?(file|proxy|stream|upload|upload_progress|custom_component|component_server|process_recording|"
    r"monitoring|deep_link|dev|(undo-)?vibe-\w+)\b"
)
ASGI = Callable[..., Awaitable[None]]

# What looks like a tag or an entity outside of code gets an invisible word joiner, so that Markdown takes it for text.
# This is for showing it whole; against scripts there is the chat's own sanitizer. Dollars get one where they enclose a formula,
# by Pandoc's rule: two prices in a sentence are none.
PICTURE = re.compile(r'<img alt="" src="(data:image/[\w.+-]+;base64,[A-Za-z0-9+/=]+)">')
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
FORMULA = re.compile(r"(?<![\\$])\$(?=[^\s$])([^$\n]*[^\s\\$])\$(?![\d$])")

DISPLAYED = re.compile(r"\$\$.+?\$\$|(?<!\\)\\\[.+?\\\]|(?<!\\)\\\(.+?\\\)", re.DOTALL)
# The beginning of a formula, or of its delimiter; what goes on over a blank line or so long is none.
HALF = re.compile(
    r"(?:\$\$(?:(?!\n\n).){0,999}|(?<!\\)\\[\[(](?:(?!\n\n).){0,999}|(?<!\\)[\\$]|(?<![\\$])\$[^\s$\d][^$\n]{0,99})\Z",
    re.DOTALL,
)


def unbroken(text: str) -> str:
    """Without the formula that it ends in the middle of."""
    last = masked = CODE.split(text)[-1]
    for whole in (DISPLAYED, FORMULA):
        masked = whole.sub(lambda found: "x" * len(found[0]), masked)
    half = HALF.search(masked)
    return text[: len(text) - len(last) + half.start()] if half else text


def shown(text: str) -> str:
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"[<&](?=[A-Za-z/!?#])", "\\g<0>\u2060", part) for part in parts[::2]]
    parts[::2] = [FORMULA.sub("$\u2060\\1\u2060$", part) for part in parts[::2]]
    return "".join(parts)


def message(role: str, text: str, pictures: Sequence[str] = ()) -> dict[str, Any]:
    """As the chat shows it; `pictures` are data URLs, so that no file of the server is asked for."""
    if not pictures:
        return {"role": role, "content": shown(text)}
    html_part = {"type": "component", "component": "html", "constructor_args": {}, "props": {}}
    seen = [{**html_part, "value": f'<img alt="" src="{html.escape(url)}">'} for url in pictures]
    return {"role": role, "content": [*seen, *([{"type": "text", "text": shown(text)}] if text else [])]}


def text_of(content: Any) -> str:
    """What was typed or answered. Gradio gives a str through its API, a list of parts from the page."""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return re.sub("(?<=[<&$])\u2060|\u2060(?=[$])", "", "".join(parts))


def pictures_of(content: Any) -> list[str]:
    """The data URLs in a message of the chat."""
    parts = [] if isinstance(content, str) else content
    return [found[1] for part in parts if (found := PICTURE.fullmatch(str(part.get("value"))))]


def anew(given: dict[str, Any]) -> dict[str, Any]:
    """A message that the chat gave back, without what Gradio has added."""
    return message(given["role"], text_of(given["content"]), pictures_of(given["content"]))


def said(given: dict[str, Any]) -> dict[str, Any]:
    """The same for the engine. Raises UserError for a picture that is none."""
    text, urls = text_of(given["content"]), pictures_of(given["content"])
    if not urls:
        return {"role": given["role"], "content": text}
    from finetune.pictures import from_data_url

    seen = [{"type": "image", "image": from_data_url(url)} for url in urls]
    return {"role": given["role"], "content": [*seen, {"type": "text", "text": text}]}


def last_question(history: list[dict]) -> int:
    return max((i for i, m in enumerate(history) if m["role"] == "user"), default=0)


def says(request: gr.Request, sentence: str) -> str:
    """The sentence in the visitor's language: the one that the page's address asks for, else the browser's."""
    asked = parse_qs(urlsplit(request.headers.get("referer") or "").query).get("lang")
    language = asked[0] if asked else request.headers.get("accept-language") or ""
    return in_chinese(sentence) if language.lower().startswith("zh") else sentence


def warn(request: gr.Request, sentence: str) -> None:
    """A gr.Error would cover the whole chat until it is clicked away."""
    gr.Warning(html.escape(says(request, sentence)))


def replies(engine: Engine, visitors: api.Visitors, bare: bool = False) -> Callable[..., Iterator[tuple]]:
    """The function that streams an answer to the last message into a chat, and says how full the context is. Gradio closes
    its generator on Stop and when the tab is closed, and with it the decoder."""

    def reply(
        history: list[dict], system: str, heat: float, top_p: float, talk: str, request: gr.Request
    ) -> Iterator[tuple]:
        if not history or history[-1]["role"] != "user":  # cleared meanwhile
            yield gr.skip(), gr.skip(), gr.skip()  # a generator that yields nothing empties the chat
            return
        answer, sent, told = "", 0.0, False
        try:
            turns, history = [said(m) for m in history], [anew(m) for m in history]
            turns = [{"role": "system", "content": system}, *turns] if system and system.strip() else turns
            kept = engine.trim(turns, bare)
            asked = Request(kept, heat, top_p, owner=request.session_hash, bare=bare)
            visitors.ask(visitor := api.address(request), 1)
            with visitors.answering(visitor, 1), closing(pieces(engine, asked)) as found:
                for piece in found:
                    answer += piece.text
                    if piece.ahead:
                        wait = round(engine.wait(piece.ahead))
                        waits = says(request, WAITS if wait else WAITS_UNKNOWN).format(piece.ahead, wait)
                        if not told:
                            gr.Info(waits)
                        told = True
                        yield gr.skip(), waits, gr.skip()
                    if time.monotonic() - sent > 0.05 and (half := unbroken(answer)):  # more often only costs time
                        yield talk, "" if told else gr.skip(), [*history, message("assistant", half)]
                        sent = time.monotonic()
            fill = ""
            if piece.prompt_tokens and engine.context:
                used = piece.prompt_tokens + piece.completion_tokens
                fill = says(request, "{} of {} tokens in use").format(used, engine.context)
            if left_out := len(turns) - len(kept):
                fill += says(request, " · the oldest {} messages are left out").format(left_out)
            yield talk, fill, [*history, message("assistant", answer)]
        except (UserError, api.ApiError) as error:
            warn(request, str(error))
            yield gr.skip(), "" if told else gr.skip(), gr.skip()
        except Exception:
            traceback.print_exc()
            warn(request, "The answer broke off; the server's log says why.")
            yield gr.skip(), "" if told else gr.skip(), gr.skip()

    return reply


def saved(text: str) -> tuple[str, str, str, str, list[dict]]:
    """A conversation as the browser kept it: its system prompt, id, title, fill and, last, the messages, at whose change the
    browser keeps what is there under the id that is there."""
    talk = json.loads(text)
    messages = [m for m in talk.get("messages", []) if m["role"] != "system"]
    system = next((m["content"] for m in talk.get("messages", []) if m["role"] == "system"), "")
    return system, talk["id"], talk.get("title", ""), "", [restored(m) for m in messages]


def restored(kept: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form, as the browser keeps it."""
    parts = [{"type": "text", "text": kept["content"]}] if isinstance(kept["content"], str) else kept["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return message(kept["role"], "".join(part.get("text", "") for part in parts), urls)


def build(engine: Engine, key: str | None = None, open_api: bool = False, origins: Sequence[str] = ()) -> Any:
    """The page and the API (see `finetune.api.add_routes`) as a FastAPI app; starts nothing."""
    chinese = CHINESE | GRADIO_CHINESE
    i18n = gr.I18n(**{"en": {text: text for text in CHINESE}, "zh-CN": chinese, "zh-TW": chinese})
    # Gradio's own choice of weights, 400 and 600, has no Latin letters in 600.
    font = gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700))
    theme = gr.themes.Default(primary_hue="indigo", font=[font, "system-ui", "sans-serif"])
    theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # lighter is not legible
    visitors = api.Visitors()
    with gr.Blocks(title=engine.name, fill_height=True, analytics_enabled=False) as page:
        name = gr.HTML(heading(engine.name), elem_id="name")
        status = gr.HTML(elem_id="status")
        with gr.Column(visible=False) as main:
            with gr.Sidebar(open=False) as sidebar:
                drawer = sidebar_view(i18n)
            with gr.Tabs() as tabs:
                with gr.Tab(i18n("Chat"), id="chat"):
                    eyes = chat_view(page, engine, visitors, i18n, drawer, sidebar, tabs)
                with gr.Tab(i18n("Side by side")):
                    no_base, both = side_view(engine, visitors, i18n)
                with gr.Tab(i18n("About")) as tab:
                    about_view(tab, engine, i18n)
        timer = gr.Timer(1)

        def view(request: gr.Request) -> list[Any]:
            """What is to be seen now, of the components below."""
            if engine.status == "failed":
                title, words = "The model could not be loaded", engine.message
            else:
                title, _, why = engine.message.partition("\n")
                words = why or "The chat opens by itself. The first start takes a little longer."
            loading, ready = engine.status == "loading", engine.status == "ready"
            seconds = f"{engine.progress} … {time.monotonic() - engine.began:.0f} s" if loading else ""
            state = f"<b>{says(request, title)}{seconds}</b><p>{html.escape(says(request, words))}</p>"
            sources = html.escape(says(request, engine.message)) if ready else ""  # that failed before one did not
            return [
                f"{heading(engine.name)}{sources and f'<p>{sources}</p>'}<small>{html.escape(says(request, engine.runs_on))}</small>",
                gr.HTML(state, visible=not ready),
                gr.Column(visible=ready),
                gr.Timer(active=loading),
                gr.HTML(says(request, BLIND_BASE if engine.sees else NO_BASE), visible=not engine.base),
                gr.Column(visible=bool(engine.base)),
                gr.Row(visible=engine.sees),
            ]

        gr.on([page.load, timer.tick], view, None, [name, status, main, timer, no_base, both, eyes], **QUIET)

    # As launch(max_threads=...) does: an answer that is waited for holds a thread.
    page.max_threads = page._queue.max_thread_count = 2 * VISITORS
    app = FastAPI(openapi_url=None)
    app.add_middleware(guarded, engine=engine)
    app.get("/health")(engine.health)
    api.add_routes(app, engine, key=key, open_to_all=open_api, origins=list(origins))
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        i18n=i18n,
        theme=theme,
        css_paths=ASSETS / "page.css",
        footer_links=[],
        run_history=False,
        show_error=False,
        root_path=os.environ.get("GRADIO_ROOT_PATH"),  # behind a proxy that does not say where it is
    )
    app.routes[-1].app.user_middleware.append(Middleware(with_script))  # within the one that compresses
    return app


def heading(name: str) -> str:
    return f"<h1>{html.escape(name)}</h1>{LOOKS}"


def chat_box(i18n: Any, elem_id: str) -> Any:
    return gr.Textbox(
        label=i18n("Message"),
        show_label=False,
        placeholder=i18n("Type a message"),
        max_lines=8,
        submit_btn=True,
        autofocus=elem_id == "box",
        elem_id=elem_id,
    )


def chatbot_of(**options: Any) -> Any:
    return gr.Chatbot(
        height="max(18rem, calc(100dvh - 21.25rem))",
        layout="bubble",
        buttons=["copy"],
        allow_tags=["img"],  # an image in an answer would call other hosts: it is shown as text
        latex_delimiters=[{"left": left, "right": right, "display": block} for left, right, block in LATEX],
        **options,
    )


def idle() -> Any:
    return gr.Textbox(submit_btn=True, stop_btn=False)


def busy() -> Any:
    return gr.Textbox("", submit_btn=False, stop_btn=True)


class Drawer(NamedTuple):
    """What is in the sidebar: the conversations that the browser keeps."""

    new: Any
    search: Any
    talks: Any
    title: Any
    as_json: Any
    as_markdown: Any
    load: Any
    delete: Any
    sure: Any
    notice: Any


def sidebar_view(i18n: Any) -> Drawer:
    new = gr.Button(i18n("New conversation"), elem_id="new")
    search = gr.Textbox(label=i18n("Search"), elem_id="search")
    talks = gr.Radio([], label=i18n("Conversations"), info=i18n("They stay in this browser."), elem_id="talks")
    title = gr.Textbox(label=i18n("Title"), elem_id="title")
    with gr.Row():
        as_json, as_markdown = (
            gr.Button(i18n(f"Export {form}"), size="sm", min_width=80) for form in ("JSON", "Markdown")
        )
    with gr.Row():
        load, delete = (gr.Button(i18n(words), size="sm", min_width=80) for words in ("Import", "Delete"))
    sure = gr.Button(i18n("Delete for good"), size="sm", variant="stop", visible=False)
    return Drawer(new, search, talks, title, as_json, as_markdown, load, delete, sure, gr.HTML(elem_id="notice"))


def chat_view(
    page: Any, engine: Engine, visitors: api.Visitors, i18n: Any, drawer: Drawer, sidebar: Any, tabs: Any
) -> Any:
    """The chat with its settings, and what the sidebar does to it. Returns what only a model that sees has: the row in
    which pictures are chosen."""
    new, search, talks, title, as_json, as_markdown, load, delete, sure, notice = drawer
    chatbot = chatbot_of(
        show_label=False,
        editable="user",
        placeholder=i18n("Ask me something, or begin with one of these:"),
        examples=[{"text": text} for text in EXAMPLES],
        elem_id="chat",
    )
    box = chat_box(i18n, "box")
    with gr.Row(visible=False, elem_id="eyes") as eyes:
        add = gr.Button(i18n("Add a picture"), size="sm", scale=0, min_width=120, elem_id="add")
        chosen = gr.HTML(elem_id="chosen")
        remove = gr.Button(i18n("Remove the pictures"), size="sm", scale=0, min_width=120, visible=False)
    with gr.Row(elem_id="under"):
        style = gr.Radio(
            [(i18n(name), name) for name in STYLES],
            value="balanced",
            label=i18n("Style"),
            show_label=False,
            container=False,
            min_width=240,
            elem_id="style",
        )
        fill = gr.HTML(elem_id="fill")
    with gr.Accordion(i18n("Settings"), open=False, elem_id="settings") as settings:
        with gr.Row():
            heat = gr.Slider(0, 2, STYLES["balanced"][0], step=0.05, label=i18n("Temperature"))
            top_p = gr.Slider(0.05, 1, STYLES["balanced"][1], step=0.05, label=i18n("Top p"))
        told = i18n("What the assistant is told before the conversation")
        system = gr.Textbox(label=i18n("System prompt"), placeholder=told, max_lines=6, elem_id="system")
    turn, talk = gr.Number(0, visible="hidden"), gr.Textbox(visible="hidden")
    urls = gr.Textbox("[]", visible="hidden")  # of the pictures that are chosen

    # What an action leaves of the conversation; a new `turn` is then answered.
    def ask(history: list[dict], text: str, turn: int, talk: str, urls: str, request: gr.Request) -> tuple:
        nothing = (gr.skip(),) * 5
        if not text.strip() and urls == "[]":
            return nothing
        asked = message("user", text, json.loads(urls))
        try:
            engine.trim([said(asked)])
        except UserError as error:  # what was typed stays in the box
            warn(request, str(error))
            return nothing
        return talk or token_hex(8), [*map(anew, history), asked], turn + 1, busy(), "[]"

    def example(turn: int, event: gr.SelectData, request: gr.Request) -> tuple:
        return ask([], event.value["text"], turn, "", "[]", request)

    def retry(history: list[dict], turn: int) -> tuple:
        kept = [anew(m) for m in history[: last_question(history) + 1]]
        return kept, turn + 1, gr.Textbox(submit_btn=False, stop_btn=True)

    def edit(history: list[dict], turn: int, event: gr.EditData) -> tuple:
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        edited = message("user", text_of(event.value), pictures_of(history[index]["content"]))
        return [*map(anew, history[:index]), edited], turn + 1, gr.Textbox(submit_btn=False, stop_btn=True)

    def undo(history: list[dict]) -> tuple:
        index = last_question(history)
        content = history[index]["content"]
        box = gr.Textbox(text_of(content), submit_btn=True, stop_btn=False)
        return [*map(anew, history[:index])], box, json.dumps(pictures_of(content)), ""

    style.input(STYLES.get, style, [heat, top_p], **QUIET)
    answering = turn.change(
        replies(engine, visitors), [chatbot, system, heat, top_p, talk], [talk, fill, chatbot], **STREAM
    )
    answering.then(idle, None, box, **QUIET)
    # First of each trigger's events: Gradio runs them one after the other, and would stop the new answer as well.
    asked = [box.submit, chatbot.example_select, chatbot.retry, chatbot.edit, chatbot.undo]
    left = [box.stop, chatbot.clear, new.click, talks.input, sure.click]
    gr.on([*asked, *left], None, cancels=[answering], api_visibility="private")
    box.submit(ask, [chatbot, box, turn, talk, urls], [talk, chatbot, turn, box, urls], **STREAM)
    chatbot.example_select(example, turn, [talk, chatbot, turn, box, urls], **STREAM)
    chatbot.retry(retry, [chatbot, turn], [chatbot, turn, box], **QUIET)
    chatbot.edit(edit, [chatbot, turn], [chatbot, turn, box], **QUIET)
    chatbot.undo(undo, chatbot, [chatbot, box, urls, fill], **QUIET)
    box.stop(lambda: (idle(), ""), None, [box, fill], **QUIET)

    def script(event: Any, code: str, inputs: Any, outputs: Any) -> None:
        """The browser alone does this."""
        event(None, inputs, outputs, js=code, **QUIET)

    opened = [system, talk, title, fill, chatbot]
    blank = json.dumps({"id": ""})
    script(chatbot.change, "talks.save", [chatbot, system, talk, search], [talks, title, notice])
    script(box.change, "talks.draft", box, None)
    script(settings.expand, "talks.reveal", None, None)
    script(add.click, "talks.add", urls, [urls, chosen])
    script(urls.change, "talks.chosen", urls, [chosen, remove])
    script(remove.click, "() => ['[]']", None, urls)
    script(search.change, "(search, id) => [talks.list(search, id)]", [search, talk], talks)
    gr.on([title.submit, title.blur], None, [talk, title, search], talks, js="talks.rename", **QUIET)
    script(as_json.click, "(id, search) => talks.save_as(id, search, false)", [talk, search], notice)
    script(as_markdown.click, "(id, search) => talks.save_as(id, search, true)", [talk, search], notice)
    script(load.click, "talks.load", search, [talks, notice])
    # A conversation's text comes in place of another input's: the server does not know what may be chosen.
    talks.input(lambda _, text: saved(text), [talks, talk], opened, js="(id) => [null, talks.open(id)]", **QUIET)
    gr.on([talks.input, new.click], lambda: (idle(), gr.Tabs(selected="chat")), None, [box, tabs], **QUIET)
    new.click(saved, talk, opened, js=f"() => (talks.open(''), ['{blank}'])", **QUIET)
    script(new.click, "() => [null]", None, talks)
    shown_sure = "(id) => [{__type__: 'update', visible: !!id}]"
    script(delete.click, shown_sure, talk, sure)
    gr.on([sure.click, chatbot.clear], None, [talk, search], [talks], js="talks.remove", **QUIET)
    gr.on([sure.click, chatbot.clear], lambda: (*saved(blank), idle(), gr.Button(visible=False)), None,
          [*opened, box, sure], **QUIET)  # fmt: skip
    page.load(lambda text, typed: (*saved(text), typed), [talk, box], [*opened, box], js="talks.start", **QUIET)
    script(page.load, "() => [talks.list(), talks.wide()]", None, [talks, sidebar])
    gr.on([talks.input, new.click], None, None, [sidebar], js="() => [talks.wide()]", **QUIET)  # else it covers a phone
    return eyes


def side_view(engine: Engine, visitors: api.Visitors, i18n: Any) -> tuple[Any, Any]:
    """Base and tuned model answer the same messages; what is seen where the base is not there, and where it is."""
    no_base = gr.HTML(visible=False)
    with gr.Column(visible=False) as both:
        with gr.Row():
            chats = [chatbot_of(label=i18n(side), elem_id=side) for side in ("base", "tuned")]
        box = chat_box(i18n, "both")
        gr.HTML(i18n("Both answer at once, from one copy of the weights. This is not kept."))
    system, heat, top_p = gr.State(""), gr.State(0.0), gr.State(1.0)  # the likeliest words: what differs is the model
    turns = [gr.Number(0, visible="hidden") for _ in chats]  # of one component's events the second waits for the first
    unused = gr.State("")
    left: dict[str, int] = {}  # of each page: answers that are being written

    def ask(base: list[dict], tuned: list[dict], text: str, turn: int, request: gr.Request) -> tuple:
        nothing = (gr.skip(),) * 5
        if not text.strip():
            return nothing
        try:
            for bare in (True, False):
                engine.trim([{"role": "user", "content": text}], bare)
        except UserError as error:
            warn(request, str(error))
            return nothing
        asked, left[request.session_hash] = message("user", text), 2
        return [*base, asked], [*tuned, asked], turn + 1, turn + 1, busy()

    def done(request: gr.Request) -> Any:
        left[request.session_hash] = left.get(request.session_hash, 1) - 1
        return stopped(request) if left[request.session_hash] < 1 else gr.skip()

    def stopped(request: gr.Request) -> Any:
        left.pop(request.session_hash, None)
        return idle()

    answering = [
        turn.change(
            replies(engine, visitors, bare), [chat, system, heat, top_p, unused], [unused, unused, chat], **STREAM
        )
        for chat, turn, bare in zip(chats, turns, (True, False), strict=True)
    ]
    clears = [chat.clear for chat in chats]
    gr.on([box.submit, box.stop, *clears], None, cancels=answering, api_visibility="private")
    box.submit(ask, [*chats, box, turns[0]], [*chats, *turns, box], **STREAM)
    for each in answering:
        each.then(done, None, box, **QUIET)
    gr.on([box.stop, *clears], stopped, None, box, **QUIET)
    gr.on(clears, lambda: ([], []), None, chats, **QUIET)
    return no_base, both


def about_view(tab: Any, engine: Engine, i18n: Any) -> None:
    """The card, and every question of the scorecard with its answers; read when it is opened."""
    who = gr.HTML(elem_id="card")
    with gr.Column(visible=False) as questions:
        with gr.Row():
            kind = gr.Dropdown([(i18n("all"), "all")], value="all", label=i18n("Kind"))
            language = gr.Radio([(i18n("all"), "all"), ("中文", "zh"), ("English", "en")], value="all",
                                label=i18n("Language"))  # fmt: skip
            verdict = gr.Radio([(i18n(word), word) for word in ("all", "right", "wrong")], value="all",
                               label=i18n("Answer"))  # fmt: skip
        found = gr.HTML(elem_id="probes")

    def about(request: gr.Request) -> tuple:
        say = lambda sentence: says(request, sentence)  # noqa: E731
        kinds = card.kinds(engine.folder)
        return (
            card.about(engine.name, engine.folder, engine.origin, say),
            gr.Column(visible=bool(kinds)),
            gr.Dropdown([(say("all"), "all"), *((name, name) for name in kinds)]),
            card.probes(engine.folder, "all", "all", "all", say),
        )

    def choose(kind: str, language: str, verdict: str, request: gr.Request) -> str:
        return card.probes(engine.folder, kind, language, verdict, lambda sentence: says(request, sentence))

    tab.select(about, None, [who, questions, kind, found], **QUIET)
    gr.on([kind.input, language.input, verdict.input], choose, [kind, language, verdict], found, **QUIET)


def guarded(app: ASGI, engine: Engine) -> ASGI:
    """Headers that keep a page to itself; no file of the server, no upload, no endless body."""

    async def answer(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)

        async def with_headers(event: dict) -> None:
            if event["type"] == "http.response.start":
                event["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(event)

        headers = dict(scope["headers"])
        length = b"?" if b"transfer-encoding" in headers else headers.get(b"content-length", b"0")
        if CLOSED.match(scope["path"]):
            return await JSONResponse({"detail": "Not found"}, 404)(scope, receive, with_headers)
        api_says_it = scope["path"].startswith("/v1/")
        most = api.SEEING_BODY_BYTES if engine.sees else api.BODY_BYTES
        if not (api_says_it or (length.isdigit() and int(length) <= most)):
            return await JSONResponse({"detail": "Too large"}, 413)(scope, receive, with_headers)
        return await app(scope, receive, with_headers)

    return answer


def with_script(app: ASGI) -> ASGI:
    """The page's own script before Gradio's, which else has asked for the language already."""
    words = json.dumps(CHINESE, ensure_ascii=False).replace("</", "<\\/")
    script = f"<script>const CHINESE = {words};\n{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>"

    async def answer(scope: dict, receive: Callable, send: Callable) -> None:
        started: dict = {}

        async def put(event: dict) -> None:
            if event["type"] == "http.response.start":
                kinds = [value for name, value in event["headers"] if name == b"content-type"]
                if kinds and kinds[0].startswith(b"text/html"):
                    started.update(event)
                    return
            elif started:
                body = event["body"].replace(b"<head>", b"<head>" + script.encode(), 1)
                others = [(name, value) for name, value in started["headers"] if name != b"content-length"]
                await send({**started, "headers": [*others, (b"content-length", str(len(body)).encode())]})
                started.clear()
                event = {**event, "body": body}
            await send(event)

        await app(scope, receive, put)

    return answer
