"""Pull and publish against git-lfs and huggingface_hub alone, each in a process of its own, on the loopback against the same
servers: one JSON line. `python tests/bench/transfer.py [megabytes] [rounds]`; the best of the rounds counts.

MB/s of the whole command, Python's imports included but for no_change_s; memory in MB at most.
"""

import hashlib
import json
import os
import shutil
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
THEIRS = "import sys; from huggingface_hub import snapshot_download as s; s('user/x', cache_dir=sys.argv[1])"
THEIR_UPLOAD = "import sys; from huggingface_hub import HfApi as A; A().create_repo('user/y', exist_ok=True); \
A().upload_folder(repo_id='user/y', folder_path=sys.argv[1])"
IMPORTS = "import requests, yaml; from finetune import hub, gitlfs; import huggingface_hub.hf_api"
SERVE = """
import sys; sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from servers import GitServer, Hub
root = Path(sys.argv[3]); (root / "git").mkdir()
with GitServer(root / "git") as server, Hub(root / "hf", "token") as hf:
    for name in ("user/x", "user/y", "user/z"): server.make(name)
    print(server.url, hf.url, flush=True)
    sys.stdin.read()
"""


def main(megabytes: int = 2000, rounds: int = 2) -> None:
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
        serve = [sys.executable, "-c", SERVE, str(ROOT), str(ROOT / "tests"), str(root)]
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
    ours, theirs = f"git+{git}/user/x.git", root / "theirs"
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

    def best(work, before=lambda i: None) -> float:
        found = []
        for i in range(rounds):
            before(i)
            found.append(work(i))
        return min(found)

    def clear(_: int) -> None:
        shutil.rmtree(root / "cache", ignore_errors=True)
        shutil.rmtree(theirs, ignore_errors=True)

    def forget(_: int) -> None:  # what the servers hold
        shutil.rmtree(root / "git" / "lfs", ignore_errors=True)
        for blob in (root / "hf").iterdir():
            blob.unlink()

    def their_push(i: int) -> float:
        work = root / f"push{i}"
        shutil.copytree(root / "model", work)
        setup = "git init -q -b main && git lfs install --local >/dev/null && git config user.email x@y && git config user.name x"
        subprocess.run(["sh", "-c", setup], cwd=work, env=environment, check=True)
        line = f"git add -A && git commit -qm x && git push -qf {git}/user/y.git main"
        seconds = timed("sh", "-c", line, cwd=work)
        shutil.rmtree(work)
        return seconds

    seconds = {"git_lfs_push": best(their_push, forget)}
    seconds["hf_upload"] = best(lambda i: python(THEIR_UPLOAD, root / "model"), forget)
    forget(0)
    subprocess.run(
        ["sh", "-c", f"rm -rf {root}/git/user/x.git && git init -q --bare -b main {root}/git/user/x.git"], check=True
    )
    seconds["publish_hf"] = python(PUBLISH, "hf:user/x", root / "rows.json")
    seconds["publish_git"] = python(PUBLISH, ours, root / "rows.json")
    unchanged = [python(PUBLISH, ref, root / "rows.json") for ref in (ours, "hf:user/x")]
    lfs = "git lfs install --skip-repo >/dev/null && git clone -q"
    seconds["git_lfs_pull"] = best(lambda i: timed("sh", "-c", f"{lfs} {git}/user/x.git {theirs}"), clear)
    seconds["hf_download"] = best(lambda i: python(THEIRS, theirs), clear)
    seconds["pull_hf"] = best(lambda i: python(PULL, "hf:user/x"), clear)
    seconds["pull_git"] = best(lambda i: python(PULL, ours), clear)
    python(PULL, "hf:user/x")
    unchanged += [python(PULL, ref) for ref in (ours, "hf:user/x")]
    imports = python(IMPORTS)
    rate = {name: round(megabytes / value) for name, value in seconds.items()}
    return {
        "megabytes": megabytes,
        "MB_per_s": rate,
        "pull_ratio": round(max(rate["pull_git"], rate["pull_hf"]) / max(rate["git_lfs_pull"], rate["hf_download"]), 2),
        "pull_git_ratio": round(rate["pull_git"] / rate["git_lfs_pull"], 2),
        "pull_hf_ratio": round(rate["pull_hf"] / rate["hf_download"], 2),
        "publish_git_ratio": round(rate["publish_git"] / rate["git_lfs_push"], 2),
        "publish_hf_ratio": round(rate["publish_hf"] / rate["hf_upload"], 2),
        "no_change_s": [round(value - imports, 2) for value in unchanged],
        "imports_s": round(imports, 2),
        "peak_MB": int(peak),
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
