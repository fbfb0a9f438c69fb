"""The page: chat with a model in the browser. `python app.py` opens the port at once and loads the model behind it.

    python app.py --model runs/xiaoxing/model        or MODEL=...; any folder or repo reference
    MODEL=openxlab:user/name,hf:user/name python app.py    sources in order; the page says which failed and why
    python app.py                                    the newest finished run, else the embedded default model

It listens on 0.0.0.0, as spaces need: whoever reaches this machine reaches the page; --host 127.0.0.1 keeps it here.
Importing this module starts nothing, loads no model and needs neither gradio nor torch.
"""

import argparse
import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.embedded import NAME as DEFAULT_MODEL
from finetune.embedded import say
from finetune.engine import Engine


def newest_run(runs: Path = Path("runs")) -> str | None:
    """The model of the run that was finished last."""
    manifests = sorted(runs.glob("*/model/manifest.json"), key=lambda file: file.stat().st_mtime)
    return str(manifests[-1].parent) if manifests else None


def deployed(folder: Path = Path(__file__).parent) -> str | None:
    """Where a space's weights are, as `deploy` wrote it down."""
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["model"] if manifest.is_file() else None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(description="A page to chat with a model. 与模型对话的网页。")
    parser.add_argument(
        "--model",
        default=env("MODEL"),
        help="a folder or repo reference, or several by commas, in order (default: the newest run's)",
    )
    parser.add_argument("--adapter", default=env("ADAPTER"), help="an adapter made for that model")
    parser.add_argument(
        "--host",
        default=env("GRADIO_SERVER_NAME", "0.0.0.0"),  # noqa: S104
        help="the address to listen on (default: 0.0.0.0, which the whole network reaches; 127.0.0.1 for this machine alone) / 监听地址",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=env("GRADIO_SERVER_PORT") or env("PORT") or 7860,
        help="the port (default: 7860) / 端口",
    )
    parser.add_argument(
        "--engine", default=env("ENGINE"), help="URL of an OpenAI-compatible server that decodes instead"
    )
    parser.add_argument(
        "--open-api", action="store_true", help="/v1 for everybody; with API_KEY=... it asks for that key"
    )
    parser.add_argument("--api-origin", action="append", default=(env("API_ORIGINS") or "").split(), metavar="ORIGIN",
                        help="of a page whose scripts may call /v1; may be given again")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.engine and args.adapter:
        say("error: --adapter is for decoding here, and --engine decodes elsewhere: leave one of them out.")
        return 2
    newest = None if args.adapter else deployed() or newest_run()
    if args.engine:
        from finetune.remote import Remote

        engine: Engine = Remote(args.engine, args.model or newest, os.environ.get("ENGINE_KEY"))
    else:
        engine = Engine(args.model or newest or DEFAULT_MODEL, args.adapter)
    try:
        # The port is open from here on; whoever comes before the page is ready waits a second or two for its answer.
        listener = socket.create_server((args.host, args.port), backlog=128)
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (")[0].rstrip(".")
        say(f"error: Port {args.port} of {args.host} cannot be opened: {why}. Choose another with --port or --host.")
        return 2
    say(f"{engine.health()['model']}: http://localhost:{args.port}")
    serve(engine, listener, key=os.environ.get("API_KEY"), open_api=args.open_api, origins=args.api_origin)
    return 0


def serve(engine: Engine, listener: socket.socket, **api: Any) -> None:
    """Serve the page until Ctrl-C."""
    import uvicorn

    from finetune.page import build  # which takes a second: the port is open already

    server = uvicorn.Server(uvicorn.Config(build(engine, **api), log_level="warning", timeout_graceful_shutdown=1))

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
    sys.stdout.reconfigure(errors="backslashreplace")  # where its encoding lacks a letter; as standard error does
    sys.exit(main())
