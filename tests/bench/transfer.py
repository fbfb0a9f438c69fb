"""Pull and publish against git-lfs and huggingface_hub alone, each in a process of its own, on the loopback against the same
servers: one JSON line. `python tests/bench/transfer.py [megabytes] [rounds]`.

Each round measures theirs and ours one after the other; medians count, of the ratios too, so that a machine that others use
spoils little. MB/s of the whole command, Python's imports included but for no_change_s; memory in MB at most.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PULL = "import sys; from finetune import hub; print(hub.pull(sys.argv[1], progress=lambda *_: None))"
PUBLISH = """
import json, sys
from pathlib import Path
from finetune import hub, transfer
files = {n: transfer.Source(Path(p), s, h) for n, (p, s, h) in json.load(open(sys.argv[2])).items()}
hub.publish(sys.argv[1], files, "x")
"""
THEIRS = "import sys; from huggingface_hub import snapshot_download as s; s(sys.argv[1], cache_dir=sys.argv[2])"
THEIR_UPLOAD = "import sys; from huggingface_hub import HfApi as A; A().create_repo(sys.argv[1], exist_ok=True); \
A().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
IMPORTS = "import requests, yaml; from finetune import hub, gitlfs; import huggingface_hub.hf_api"
SERVE = """
import sys; sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from servers import GitServer, Hub
root = Path(sys.argv[3]); (root / "git").mkdir()
with GitServer(root / "git") as server, Hub(root / "hf", "token") as hf:
    for i in range(int(sys.argv[4])): server.make(f"user/x{i}"), server.make(f"user/y{i}")
    print(server.url, hf.url, flush=True)
    sys.stdin.read()
"""


def main(megabytes: int = 2000, rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        model = root / "model"
        model.mkdir()
        with (model / "model.safetensors").open("wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(1_000_000))
        (model / "config.json").write_text("{}")
        (model / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        rows = {}
        for path in (model / "model.safetensors", model / "config.json"):
            with path.open("rb") as file:
                rows[path.name] = [str(path), path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
        manifest = {"format_hash": "0", "files": {n: {"size": s, "sha256": h} for n, (_, s, h) in rows.items()}}
        data = json.dumps(manifest).encode()
        (root / "manifest.json").write_bytes(data)
        rows["manifest.json"] = [str(root / "manifest.json"), len(data), hashlib.sha256(data).hexdigest()]
        (root / "rows.json").write_text(json.dumps(rows))
        (root / "home").mkdir()
        serve = [sys.executable, "-c", SERVE, str(ROOT), str(ROOT / "tests"), str(root), str(rounds)]
        with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as servers:
            git, hf = servers.stdout.readline().split()
            print(json.dumps(measure(root, git, hf, megabytes, rounds)))
            servers.stdin.close()


def measure(root: Path, git: str, hf: str, megabytes: int, rounds: int) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GIT_", "XDG_"))}
    environment |= {
        "HOME": str(root / "home"),
        "NAMESAKE_CACHE": str(root / "cache"),
        "NO_PROXY": "*",
        "HF_ENDPOINT": hf,
    }
    environment |= {"HF_TOKEN": "token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    theirs = root / "theirs"
    peak = 0.0

    def timed(*command: str, cwd: Path = ROOT) -> float:
        nonlocal peak
        began = time.perf_counter()
        child = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, said.decode()
        if "finetune" in " ".join(command):
            peak = max(peak, usage.ru_maxrss / 1000)
        return time.perf_counter() - began

    def python(code: str, *arguments: object) -> float:
        return timed(sys.executable, "-c", code, *map(str, arguments))

    def clear() -> None:
        shutil.rmtree(root / "cache", ignore_errors=True)
        shutil.rmtree(theirs, ignore_errors=True)

    def forget() -> None:  # what the servers hold
        shutil.rmtree(root / "git" / "lfs", ignore_errors=True)
        for blob in (root / "hf").iterdir():
            blob.unlink()

    def their_push(i: int) -> float:
        work = root / f"push{i}"
        shutil.copytree(root / "model", work)
        setup = "git init -q -b main && git lfs install --local >/dev/null && git config user.email x@y && git config user.name x"
        subprocess.run(["sh", "-c", setup], cwd=work, env=environment, check=True)
        line = f"git add -A && git commit -qm x && git push -q {git}/user/y{i}.git main"
        seconds = timed("sh", "-c", line, cwd=work)
        shutil.rmtree(work)
        return seconds

    def rounds_of(before, **work) -> None:
        for i in range(rounds):
            for name, one in work.items():
                before()
                seconds.setdefault(name, []).append(one(i))

    def ratio(ours: str, theirs: str) -> float:
        return round(statistics.median(t / o for o, t in zip(seconds[ours], seconds[theirs], strict=True)), 2)

    seconds: dict[str, list[float]] = {}
    rows, last, model = root / "rows.json", rounds - 1, root / "model"
    lfs = "git lfs install --skip-repo >/dev/null && git clone -q"
    unchanged = {}
    rounds_of(
        forget,
        git_lfs_push=their_push,
        publish_git=lambda i: python(PUBLISH, f"git+{git}/user/x{i}.git", rows),
    )
    ours = f"git+{git}/user/x{last}.git"
    unchanged["publish_git"] = python(PUBLISH, ours, rows)
    rounds_of(
        clear,
        git_lfs_pull=lambda i: timed("sh", "-c", f"{lfs} {git}/user/x{last}.git {theirs}"),
        pull_git=lambda i: python(PULL, ours),
    )
    unchanged["pull_git"] = python(PULL, ours)
    rounds_of(
        forget,
        hf_upload=lambda i: python(THEIR_UPLOAD, f"user/y{i}", model),
        publish_hf=lambda i: python(PUBLISH, f"hf:user/x{i}", rows),
    )
    ours = f"hf:user/x{last}"
    unchanged["publish_hf"] = python(PUBLISH, ours, rows)
    rounds_of(
        clear,
        hf_download=lambda i: python(THEIRS, f"user/x{last}", theirs),
        pull_hf=lambda i: python(PULL, ours),
    )
    unchanged["pull_hf"] = python(PULL, ours)
    imports = python(IMPORTS)
    rate = {name: round(megabytes / statistics.median(values)) for name, values in seconds.items()}
    best = max(("git_lfs_pull", "hf_download"), key=rate.get)
    return {
        "megabytes": megabytes,
        "MB_per_s": rate,
        "ratios": {
            "pull_git": ratio("pull_git", "git_lfs_pull"),
            "pull_hf": ratio("pull_hf", "hf_download"),
            "publish_git": ratio("publish_git", "git_lfs_push"),
            "publish_hf": ratio("publish_hf", "hf_upload"),
        },
        "pull_of_best": round(min(rate["pull_git"], rate["pull_hf"]) / rate[best], 2),
        "no_change_s": {name: round(value - imports, 2) for name, value in unchanged.items()},
        "imports_s": round(imports, 2),
        "peak_MB": int(peak),
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
