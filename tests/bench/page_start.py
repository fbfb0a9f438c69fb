"""How soon `python app.py` answers: prints one JSON line. `python tests/bench/page_start.py [REPEATS]`

open: seconds until a connection is accepted; answered: until the first HTTP 200 on /; ready: until /health says so.
"""

import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


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
                return times
            time.sleep(0.1)
    finally:
        page.terminate()
        page.wait()


if __name__ == "__main__":
    runs = [start() for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)]
    print(json.dumps({key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}))
