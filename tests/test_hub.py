"""References -> folders; the Hub's real client against a small hub of our own on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune import hub
from finetune.errors import UserError

ROOT = Path(hub.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """The part of the Hub's HTTP API that a download needs: user/tiny at the revisions main and v1."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.sent, self.cut, self.broken = [], False, False


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, body: bytes = b"", status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if self.server.cut and headers.get("ETag") else body)

    def do_GET(self):
        hub: Hub = self.server
        path = self.path.partition("?")[0].strip("/").split("/")
        if hub.broken:
            return self.answer(b"on fire", 500)
        if path[0] == "api" and path[:4] != ["api", "models", "user", "tiny"]:
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        if path[:3] == ["user", "tiny", "resolve"] and path[3] == COMMIT:
            name = "/".join(path[4:])
            if self.command == "GET":
                hub.sent.append(name)
            body = hub.files[name]
            return self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)
        if path[4] == "revision" and path[5] in ("main", "v1", COMMIT):
            files = [{"rfilename": name} for name in hub.files]
            return self.answer(json.dumps({"id": "user/tiny", "sha": COMMIT, "siblings": files}).encode())
        if path[4] == "tree" and path[5] == COMMIT:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in hub.files.items()]
            return self.answer(json.dumps(tree).encode())
        return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")

    do_HEAD = do_GET


@pytest.fixture
def local_hub(tiny_model, tmp_path):
    folder = tmp_path / "on the hub"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("pytorch_model.bin", "modeling_evil.py", "onnx/config.json", "checkpoint-1/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


CHILD = """
import sys
from finetune.errors import UserError
from finetune.hub import pull
try:
    print(pull(sys.argv[1]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def pull(tmp_path):
    """Pulls in a process of its own, as the client reads HF_ENDPOINT when it is imported: (status, stdout, stderr)."""

    def run(ref: str, port: int) -> tuple[int, str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, ref],
            cwd=tmp_path,
            env={
                **environment,
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HOME": str(tmp_path),
                "NO_PROXY": "*",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


# ------------------------------------------------------------------------------------------------ folders on this disk


def test_a_path_is_its_folder(tmp_path, monkeypatch):
    (tmp_path / "user" / "name").mkdir(parents=True)
    (tmp_path / "link").symlink_to("user")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "user" / "name"
    for ref in (str(folder), "user/name", "./user/name/", "user/../user/name", "~/user/name", "link/name"):
        assert hub.pull(ref) == folder
        assert hub.pull(f"dir:{ref}") == folder


@pytest.mark.parametrize("ref", ["dir:no/where", "dir:", "dir:hf:user/name", "dir:~nobody-such/x", "dir:" + "x" * 5000])
def test_a_folder_that_is_not_there(ref):
    with pytest.raises(UserError) as caught:
        hub.pull(ref)
    assert str(caught.value) == f"{ref.removeprefix('dir:')!r} is not a folder; check its spelling."


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        hub.pull(str(tmp_path / "file"))
    assert str(caught.value) == f"'{tmp_path}/file' is not a folder; check its spelling."


@pytest.mark.parametrize(
    "ref",
    [
        *(
            "",
            " ",
            "name",
            "hf:",
            "hf:name",
            "hf:/name",
            "hf:user/",
            "a/b/c",
            "hf:a/b/c",
            "user/name@",
            "user name/x",
            "./name",
            "../name",
        ),
        *(
            "https://example.com/user/name",
            "~nobody-such/x",
            "用户/模型",
            "user/name\n",
            "x" * 5000,
            "a\0b",
            "/no/where",
        ),
    ],
    ids=ascii,
)
def test_what_is_no_reference_is_told_so(ref):
    with pytest.raises(UserError) as caught:
        hub.pull(ref)
    assert str(caught.value) == (
        f"{ref!r} is neither a folder nor a repo reference such as hf:user/name; check its spelling."
    )


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("ref", ["hf:user/tiny@v1", "user/tiny", f"hf:user/tiny@{COMMIT}"])
def test_a_repository_is_fetched_once(local_hub, pull, tiny_model, ref):
    status, out, err = pull(ref, local_hub.server_port)
    assert status == 0, err
    folder = Path(out.splitlines()[-1])
    wanted = sorted(["README.md", *(file.name for file in tiny_model.iterdir())])
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == wanted  # no pickles, no code
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert sorted(local_hub.sent) == wanted

    local_hub.sent.clear()
    assert pull(ref, local_hub.server_port)[:2] == (0, out)
    assert local_hub.sent == []
    assert pull(ref, closed_port())[:2] == (0, out)  # the hub may be gone by now


def closed_port() -> int:
    with http.server.HTTPServer(("127.0.0.1", 0), None) as server:
        return server.server_port


HINT = "Check the name and the connection (HF_ENDPOINT names a mirror), or give a local folder."


@pytest.mark.parametrize(
    "ref, reason",
    [
        ("hf:user/other", "Repository Not Found for url: {url}/api/models/user/other/revision/main."),
        ("hf:user/tiny@v2", "Revision Not Found for url: {url}/api/models/user/tiny/revision/v2."),
    ],
)
def test_what_the_hub_does_not_have(local_hub, pull, ref, reason):
    status, out, err = pull(ref, local_hub.server_port)
    (told,) = err.splitlines()
    reason = reason.format(url=f"http://127.0.0.1:{local_hub.server_port}")
    assert told.startswith(f"{ref} is not a folder here and could not be fetched from the Hugging Face Hub: {reason}")
    assert told.endswith(HINT)
    assert (status, out) == (2, "")


def test_a_hub_that_does_not_answer(pull):
    began = time.monotonic()
    status, out, err = pull("hf:user/tiny", closed_port())
    assert (status, out) == (2, "")
    assert err == (
        "hf:user/tiny is not a folder here and could not be fetched from the Hugging Face Hub: ConnectError: [Errno 111] "
        f"Connection refused. {HINT}\n"
    )
    assert time.monotonic() - began < 20


def test_a_hub_that_is_broken(local_hub, pull):
    local_hub.broken = True
    status, out, err = pull("hf:user/tiny", local_hub.server_port)
    assert (status, out) == (2, "")
    assert "Server Error" in err
    assert err.splitlines()[-1].endswith(HINT)


def test_a_cut_download(local_hub, pull):
    local_hub.cut = True
    status, out, err = pull("hf:user/tiny", local_hub.server_port)
    assert (status, out) == (2, ""), err
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(HINT)
    local_hub.cut = False
    assert pull("hf:user/tiny", local_hub.server_port)[0] == 0
