"""The page: chat with a model in the browser. `python app.py` opens the port at once and loads the model behind it.

    python app.py --model runs/xiaoxing/model        or MODEL=...; any folder or repo reference
    MODEL=openxlab:user/name,hf:user/name python app.py    sources in order; the page says which failed and why
    python app.py                                    the newest finished run, else the embedded default model

It listens on 0.0.0.0, as spaces need: whoever reaches this machine reaches the page; --host 127.0.0.1 keeps it here.
Importing this module starts nothing, loads no model and needs neither gradio nor torch.
"""

import argparse
import html
import inspect
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from finetune.embedded import NAME as DEFAULT_MODEL
from finetune.embedded import say
from finetune.engine import Engine, Request, pieces
from finetune.errors import UserError

CHINESE = {
    "Starting": "正在启动",
    "Fetching the model": "正在获取模型",
    "Loading the model": "正在加载模型",
    "Asking the engine": "正在连接推理服务",
    "The chat opens by itself. The first start takes a little longer.": "准备好后会自动进入对话，首次启动需要稍等片刻。",
    "The model could not be loaded": "模型加载失败",
    "No source answers; trying again": "暂无来源响应，正在重试",
    "Type a message": "输入消息",
    "Ask me something, or begin with one of these:": "想聊点什么？也可以从这里开始：",
}
GRADIO_CHINESE = {  # strings of Gradio's own that its Chinese lacks
    "chatbot.copy_message": "复制",
    "chatbot.copied_message": "已复制",
}
VISITORS = 100  # whose answers are written or waited for at once
WAITING = "Many are asking just now: {} before you."
CHINESE[WAITING] = "当前提问较多，您前面还有 {} 位。"
FILL = "{} of {} tokens in use"
CHINESE[FILL] = "已用 {} / {} 个词元"
LEFT_OUT = " · the oldest {} messages are left out"
CHINESE[LEFT_OUT] = " · 最早的 {} 条消息已略去"
CHINESE |= {"Settings": "设置", "precise": "精确", "balanced": "均衡", "free": "自由", "Style": "风格"}
CHINESE |= {"System prompt": "系统提示词", "What the assistant is told before the conversation": "对话前告诉助手的话"}
CHINESE |= {"Temperature": "温度", "Top p": "核采样 top p"}
STYLES = {"precise": (0.0, 1.0), "balanced": (0.7, 0.9), "free": (1.0, 0.95)}  # temperature, top_p
LATEX = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False)]
EXAMPLES = ["你是谁？", "Who made you?", "Write two lines about the sea."]
CSS = """
.gradio-container .main { max-width: 900px !important; margin: auto }
#name p { margin: 0; opacity: .75; text-align: center; overflow-wrap: anywhere }
#name h1 { margin: 0; font-size: 1.25rem; text-align: center; overflow-wrap: anywhere }
#status { text-align: center; margin: 20vh auto 0; overflow-wrap: anywhere }
#status p { opacity: .75; margin-top: .5rem }
#fill { text-align: right; font-size: .8rem; opacity: .75; min-height: 1.2rem }
"""


# What looks like a tag or an entity outside of code gets an invisible word joiner, so that Markdown takes it for text.
# This is for showing it whole; against scripts there is the chat's own sanitizer.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


def shown(text: str) -> str:
    pieces = CODE.split(text)
    pieces[::2] = [re.sub(r"[<&](?=[A-Za-z/!?#])", "\\g<0>\u2060", piece) for piece in pieces[::2]]
    return "".join(pieces)


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": shown(text)}


def text_of(content: Any) -> str:
    """What was typed or answered. Gradio gives a str through its API, a list of parts from the page."""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return re.sub("(?<=[<&])\u2060", "", "".join(parts))


def import_gradio() -> Any:
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


def build(engine: Engine, key: str | None = None, open_api: bool = False, origins: Sequence[str] = ()) -> Any:
    """The page and the API (see `finetune.api.add_routes`) as a FastAPI app; starts nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = import_gradio()
    from fastapi import FastAPI

    from finetune import api

    chinese = CHINESE | GRADIO_CHINESE
    i18n = gr.I18n(**{"en": {text: text for text in CHINESE}, "zh-CN": chinese, "zh-TW": chinese})
    # Gradio's own choice of weights, 400 and 600, has no Latin letters in 600.
    font = gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700))

    def text(request: gr.Request, english: str) -> str:
        return (CHINESE if request.headers.get("accept-language", "").lower().startswith("zh") else {}).get(
            english, english
        )

    def view(request: gr.Request) -> list[Any]:
        """What is to be seen now: [name, status, chat, timer]."""
        if engine.status == "failed":
            title, words = "The model could not be loaded", engine.message
        else:
            title, _, why = engine.message.partition("\n")
            words = why or "The chat opens by itself. The first start takes a little longer."
        seconds = f"{engine.progress} … {time.monotonic() - engine.began:.0f} s" if engine.status == "loading" else ""
        status = f"<b>{text(request, title)}{seconds}</b><p>{html.escape(text(request, words))}</p>"
        ready = engine.status == "ready"
        failed = f"<p>{html.escape(engine.message)}</p>" if ready and engine.message else ""  # sources before the one
        return [
            f"<h1>{html.escape(engine.name)}</h1>{failed}<small>{html.escape(engine.runs_on)}</small>",
            gr.HTML(status, visible=not ready),
            gr.Column(visible=ready),
            gr.Timer(active=engine.status == "loading"),
        ]

    def styles(request: gr.Request) -> Any:
        return gr.Radio([(text(request, name), name) for name in STYLES])

    def warn(sentence: str) -> None:
        gr.Warning(html.escape(sentence))  # a gr.Error would cover the whole chat until it is clicked away

    def reply(history: list[dict], system: str, heat: float, top_p: float, request: gr.Request) -> Iterator[tuple]:
        """Streams the answer to the last message into the chat, and says how full the context is. Gradio closes this
        generator on Stop and when the tab is closed, and with it the decoder."""
        unchanged = gr.skip(), gr.skip()  # a generator that yields nothing empties the chat
        if not history or history[-1]["role"] != "user":  # cleared meanwhile
            yield unchanged
            return
        answer, sent, told = "", 0.0, False
        try:
            talk = [{"role": m["role"], "content": text_of(m["content"])} for m in history]
            talk = [{"role": "system", "content": system}, *talk] if system and system.strip() else talk
            kept = engine.trim(talk)
            with closing(pieces(engine, Request(kept, heat, top_p, owner=request.session_hash))) as found:
                for piece in found:
                    answer += piece.text
                    if piece.ahead and not told:
                        gr.Info(text(request, WAITING).format(piece.ahead))
                        told = True
                    if answer and time.monotonic() - sent > 0.05:  # more often only costs time
                        yield [*history, message("assistant", answer)], gr.skip()
                        sent = time.monotonic()
            fill = ""
            if piece.prompt_tokens and engine.context:
                fill = text(request, FILL).format(piece.prompt_tokens + piece.completion_tokens, engine.context)
            if left_out := len(talk) - len(kept):
                fill += text(request, LEFT_OUT).format(left_out)
            yield [*history, message("assistant", answer)], fill
        except UserError as error:
            warn(str(error))
            yield unchanged
        except Exception:
            traceback.print_exc()
            warn("The answer broke off; the server's log says why.")
            yield unchanged

    # What an action leaves of the conversation; a new `turn` is then answered.
    def ask(history: list[dict], text: str, turn: int) -> tuple:
        if not text.strip():
            return gr.skip(), gr.skip(), gr.skip()
        return [*history, message("user", text)], turn + 1, gr.Textbox("", submit_btn=False, stop_btn=True)

    def example(turn: int, event: gr.SelectData) -> tuple:
        return ask([], event.value["text"], turn)

    def retry(history: list[dict], turn: int) -> tuple:
        return history[: last_question(history) + 1], turn + 1, gr.Textbox(submit_btn=False, stop_btn=True)

    def edit(history: list[dict], turn: int, event: gr.EditData) -> tuple:
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        history = [*history[:index], message("user", text_of(event.value))]
        return history, turn + 1, gr.Textbox(submit_btn=False, stop_btn=True)

    def undo(history: list[dict]) -> tuple:
        index = last_question(history)
        return history[:index], gr.Textbox(text_of(history[index]["content"]), submit_btn=True, stop_btn=False)

    def idle() -> Any:
        return gr.Textbox(submit_btn=True, stop_btn=False)

    with gr.Blocks(title=engine.name, fill_height=True, analytics_enabled=False) as page:
        name = gr.HTML(f"<h1>{html.escape(engine.name)}</h1>", elem_id="name")
        status = gr.HTML(elem_id="status")
        with gr.Column(visible=False, scale=1) as chat:
            chatbot = gr.Chatbot(
                scale=1,
                show_label=False,
                layout="bubble",
                buttons=["copy"],
                editable="user",
                allow_tags=["img"],  # an image in an answer would call other hosts: it is shown as text
                placeholder=i18n("Ask me something, or begin with one of these:"),
                examples=[{"text": text} for text in EXAMPLES],
                latex_delimiters=[{"left": left, "right": right, "display": block} for left, right, block in LATEX],
                elem_id="chat",
            )
            box = gr.Textbox(
                show_label=False,
                label=i18n("Type a message"),
                placeholder=i18n("Type a message"),
                max_lines=8,
                submit_btn=True,
                autofocus=True,
                elem_id="box",
            )
            fill = gr.HTML(elem_id="fill")
            with gr.Accordion(i18n("Settings"), open=False, elem_id="settings"):
                style = gr.Radio(list(STYLES), value="balanced", label=i18n("Style"))
                with gr.Row():
                    heat = gr.Slider(0, 2, STYLES["balanced"][0], step=0.05, label=i18n("Temperature"))
                    top_p = gr.Slider(0.05, 1, STYLES["balanced"][1], step=0.05, label=i18n("Top p"))
                system = gr.Textbox(
                    label=i18n("System prompt"),
                    placeholder=i18n("What the assistant is told before the conversation"),
                    max_lines=6,
                )
        turn, timer = gr.Number(0, visible="hidden"), gr.Timer(1)
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([page.load, timer.tick], view, None, [name, status, chat, timer], **quiet)
        page.load(styles, None, style, **quiet)
        style.input(STYLES.get, style, [heat, top_p], **quiet)
        heard = [chatbot, system, heat, top_p]
        answering = turn.change(
            reply, heard, [chatbot, fill], concurrency_limit=VISITORS, api_visibility="private", show_progress="hidden"
        )
        answering.then(idle, None, box, **quiet)
        # First of each trigger's events: Gradio runs them one after the other, and would stop the new answer as well.
        asked = [box.submit, chatbot.example_select, chatbot.retry, chatbot.edit, chatbot.undo]
        gr.on([*asked, box.stop, chatbot.clear], None, cancels=[answering], api_visibility="private")
        box.submit(ask, [chatbot, box, turn], [chatbot, turn, box], **quiet)
        chatbot.example_select(example, turn, [chatbot, turn, box], **quiet)
        chatbot.retry(retry, [chatbot, turn], [chatbot, turn, box], **quiet)
        chatbot.edit(edit, [chatbot, turn], [chatbot, turn, box], **quiet)
        chatbot.undo(undo, chatbot, [chatbot, box], **quiet)
        chatbot.clear(lambda: ([], idle(), ""), None, [chatbot, box, fill], **quiet)
        box.stop(idle, None, box, **quiet)

    # As launch(max_threads=...) does: an answer that is waited for holds a thread.
    page.max_threads = page._queue.max_thread_count = 2 * VISITORS
    app = FastAPI(openapi_url=None)
    app.get("/health")(engine.health)
    api.add_routes(app, engine, key=key, open_to_all=open_api, origins=list(origins))
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        i18n=i18n,
        theme=gr.themes.Default(font=[font, "system-ui", "sans-serif"]),
        css=CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        root_path=os.environ.get("GRADIO_ROOT_PATH"),  # behind a proxy that does not say where it is
    )


def last_question(history: list[dict]) -> int:
    return max((i for i, m in enumerate(history) if m["role"] == "user"), default=0)


def newest_run(runs: Path = Path("runs")) -> str | None:
    """The model of the run that was finished last."""
    manifests = sorted(runs.glob("*/model/manifest.json"), key=lambda file: file.stat().st_mtime)
    return str(manifests[-1].parent) if manifests else None


def deployed(folder: Path = Path(__file__).parent) -> str | None:
    """Where a space's weights are, as `deploy` wrote it down."""
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["model"] if manifest.is_file() else None


def main(arguments: list[str] | None = None) -> int:
    env = os.environ.get
    parser = argparse.ArgumentParser(description="A page to chat with a model. 与模型对话的网页。")
    parser.add_argument(
        "--model",
        default=env("MODEL"),
        help="a folder or repo reference, or several by commas, in order (default: the newest run's)",
    )
    parser.add_argument("--adapter", default=env("ADAPTER"), help="an adapter made for that model")
    parser.add_argument("--host", default=env("GRADIO_SERVER_NAME", "0.0.0.0"))  # noqa: S104
    parser.add_argument("--port", type=int, default=env("GRADIO_SERVER_PORT") or env("PORT") or 7860)
    parser.add_argument(
        "--engine", default=env("ENGINE"), help="URL of an OpenAI-compatible server that decodes instead"
    )
    parser.add_argument(
        "--open-api", action="store_true", help="/v1 for everybody; with API_KEY=... it asks for that key"
    )
    parser.add_argument("--api-origin", action="append", default=(env("API_ORIGINS") or "").split(), metavar="ORIGIN",
                        help="of a page whose scripts may call /v1; may be given again")  # fmt: skip
    args = parser.parse_args(arguments)
    newest = None if args.adapter else deployed() or newest_run()
    if args.engine:
        from finetune.remote import Remote

        engine: Engine = Remote(args.engine, args.model or newest, env("ENGINE_KEY"))
    else:
        engine = Engine(args.model or newest or DEFAULT_MODEL, args.adapter)
    try:
        # The port is open from here on; whoever comes before the page is ready waits a second or two for its answer.
        listener = socket.create_server((args.host, args.port), backlog=128)
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (")[0].rstrip(".")
        say(f"error: Port {args.port} cannot be opened: {why}. Choose another with --port.")
        return 2
    say(f"{engine.ref}: http://localhost:{args.port}")
    serve(engine, listener, key=env("API_KEY"), open_api=args.open_api, origins=args.api_origin)
    return 0


def serve(engine: Engine, listener: socket.socket, **api: Any) -> None:
    """Serve the page until Ctrl-C."""
    app = build(engine, **api)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))

    def load() -> None:
        while not server.started:  # torch's import would slow the first answer down
            time.sleep(0.02)
        engine.load()

    threading.Thread(target=load, daemon=True).start()
    # Open pages keep a connection each; that these are cut at the end is no error.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
