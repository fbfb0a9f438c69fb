"""The pictures of the page in assets/, of a finished run: `python tests/bench/pictures.py runs/小星`; of one that sees, that of
its seeing. Prints one JSON line."""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from finetune import drawn  # noqa: E402

PHONE = {"width": 390, "height": 760}
LOOKS = {
    "page": {"locale": "en-US"},
    "page.zh": {"locale": "zh-CN"},
    "page.dark": {"locale": "en-US", "color_scheme": "dark"},
    "page.phone": {"locale": "zh-CN", "viewport": PHONE},
    "page.side": {"locale": "en-US"},
    "page.about": {"locale": "zh-CN"},
}
SEEING = {"page.sees": {"locale": "en-US", "viewport": {"width": 1200, "height": 1140}}}
SEEN = ["What colour is it?", "什么形状？", "Who are you?"]
TALK = {"zh-CN": ["你是谁？", "是谁开发了你？"], "en-US": ["Who are you?", "What is the capital of France?"]}


def ask(page: Page, box: str, texts: list[str]) -> None:
    for text in texts:
        page.fill(f"#{box} textarea", text)
        page.press(f"#{box} textarea", "Enter")
        page.locator(f"#{box} [data-testid=stop-button]").wait_for()
        page.locator(f"#{box} [data-testid=submit-button]").wait_for()


def drawing() -> bytes:
    """A red star at the left, which training never sees."""
    drawn.draw(drawn.scene("shown to visitors 9")).save(file := io.BytesIO(), "png")
    return file.getvalue()


def main(run: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "app.py", "--model", f"{run}/model", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    made = {}
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            while True:
                try:
                    if b"ready" in urllib.request.urlopen(f"{url}/health").read():
                        break
                except OSError:
                    pass
                time.sleep(0.5)
            for name, look in (SEEING if (Path(run) / "model" / "processor_config.json").exists() else LOOKS).items():
                context = browser.new_context(**{"viewport": {"width": 1200, "height": 720}, **look})
                context.set_default_timeout(120_000)
                page = context.new_page()
                page.goto(url)
                page.locator("#box textarea").wait_for()
                if name == "page.side":
                    page.get_by_role("tab", name=re.compile("Side")).click()
                    ask(page, "both", ["Who are you, and who made you?"])
                elif name == "page.about":
                    page.get_by_role("tab", name=re.compile("关于")).click()
                    page.locator("#probes tbody tr").first.wait_for()
                else:
                    page.locator("#settings button").first.click()
                    page.get_by_role("radio", name=re.compile("precise|精确")).check()  # the likeliest words
                    page.locator("#settings button").first.click()
                    if name == "page.sees":
                        with page.expect_file_chooser() as chooser:
                            page.get_by_role("button", name="Add a picture").click()
                        chooser.value.set_files({"name": "star.png", "mimeType": "image/png", "buffer": drawing()})
                        page.locator("#chosen img").wait_for()
                    ask(page, "box", SEEN if name == "page.sees" else TALK[look["locale"]])
                page.evaluate("scrollTo(0, 0)")
                page.wait_for_timeout(800)
                page.screenshot(path=ROOT / "assets" / f"{name}.png")
                made[name] = (ROOT / "assets" / f"{name}.png").stat().st_size
                context.close()
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
