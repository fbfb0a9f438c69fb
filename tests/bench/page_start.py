"""How soon `python app.py` answers: prints one JSON line. `python tests/bench/page_start.py [REPEATS]`

open: seconds until a connection is accepted; answered: until the first HTTP 200 on /; ready: until /health says so. Of the first
view in a Chromium without a cache: its requests, and megabytes as they come over the line.
"""

import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def first_view(url: str) -> dict[str, float]:
    sizes: list[float] = []
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or "/usr/bin/chromium"
        page = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
        network = page.context.new_cdp_session(page)
        network.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
        network.send("Network.enable")
        page.goto(url)
        page.locator("#box textarea").wait_for()
        page.wait_for_timeout(1000)  # what comes after that nobody waits for
    return {"requests": len(sizes), "megabytes": sum(sizes) / 1e6}


def start() -> dict[str, float]:
    port = free_port()
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), *sys.argv[2:]]
    page = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    times = {}
    try:
        while "open" not in times:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=60).close()
                times["open"] = time.monotonic() - began
            except ConnectionRefusedError:
                time.sleep(0.01)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
            assert answer.status == 200
            answer.read()
        times["answered"] = time.monotonic() - began
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
                health = json.load(answer)
            if health["status"] != "loading":
                assert health["status"] == "ready", health
                times["ready"] = time.monotonic() - began
                return times | first_view(f"http://127.0.0.1:{port}/")
            time.sleep(0.1)
    finally:
        page.terminate()
        page.wait()


if __name__ == "__main__":
    runs = [start() for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)]
    print(json.dumps({key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}))
