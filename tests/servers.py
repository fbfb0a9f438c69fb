"""Servers for the tests of publish and pull, real where there is one: git's own http-backend, giftless for LFS; a small LFS
server that knows ranges, a small Hugging Face hub, and a proxy that spoils what passes. All on 127.0.0.1."""

import base64
import contextlib
import fcntl
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import termios
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote

from finetune.places import HUBS


class Server(http.server.ThreadingHTTPServer):
    """Each answers as a proxy too, whatever host it is asked for; `proxied`: these hosts."""

    daemon_threads = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.proxied = set()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def parse_request(self) -> bool:
        good = super().parse_request()
        if good and (found := re.match(r"http://([^/]+)/", self.path)):  # asked as a proxy
            self.server.proxied.add(found[1])
            self.path = self.path[found.end() - 1 :]
        return good

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, body: bytes | dict | list = b"", status: int = 200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, path: Path, **headers):
        """With ranges; in pieces, so that what was sent can be counted."""
        size, first = path.stat().st_size, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "") if self.server.ranges else ""):
            first = int(found[1])
            if first >= size:
                return self.answer(b"", 416)
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        self.send_response(206 if first else 200)
        for name, value in {"Content-Length": size - first, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD":
            return None
        with path.open("rb") as file:
            file.seek(first)
            while chunk := file.read(1 << 18):
                self.server.sent[path.name] += len(chunk)  # before: whoever has it all may look at once
                self.wfile.write(chunk)
        return None

    def receive_file(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{threading.get_ident()}")
        left = int(self.headers["Content-Length"])
        with part.open("wb") as file:
            while left and (chunk := self.rfile.read(min(left, 1 << 20))):
                file.write(chunk)
                left -= len(chunk)
                self.server.received[path.name] += len(chunk)
        if left:
            part.unlink()
        else:
            part.rename(path)
        return not left


# ---------------------------------------------------------------------------------------------------------- git and LFS


class GitServer(Server):
    """Bare repositories at /user/name.git by git http-backend, with LFS at /user/name.git/info/lfs.

    `users`: names and passwords; reading is free unless `private`. `rules`: a list of functions(handler) -> whether they
    answered, asked before everything else. `seen`: (method, path, Authorization) of every request. `giftless`: the address
    of one, which then answers for LFS.
    """

    def __init__(self, root: Path, users: dict[str, str] | None = None, private: bool = False):
        super().__init__(("127.0.0.1", 0), GitHandler)
        self.root, self.users, self.private = root, users or {}, private
        self.rules, self.seen, self.sent, self.received = [], [], Counter(), Counter()
        self.ranges, self.giftless = True, None

    def make(self, name: str) -> Path:
        repo = self.root / f"{name}.git"
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(repo)], check=True)
        return repo

    def object(self, oid: str) -> Path:
        return self.root / "lfs" / oid


class GitHandler(Handler):
    server: GitServer

    def allowed(self, writing: bool) -> bool:
        if not self.server.users or not (writing or self.server.private):
            return True
        scheme, _, coded = self.headers.get("Authorization", "").partition(" ")
        user, _, password = base64.b64decode(coded).decode().partition(":") if scheme == "Basic" else ("", "", "")
        if self.server.users.get(user) == password and user:
            return True
        self.body()
        self.answer(b"who are you?", 401, WWW_Authenticate='Basic realm="git"')
        return False

    def do_GET(self):
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        if any(rule(self) for rule in list(self.server.rules)):
            return None
        path, _, query = self.path.partition("?")
        if self.server.giftless and ("/info/lfs/" in path or "/objects/storage/" in path):
            return self.forward()
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch()
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self.object(self.server.object(found[1]))
        repo = re.match(r"/(?:studios/)?[^/]+/[^/]+\.git", path)
        if not repo or not (self.server.root / repo[0][1:]).is_dir():
            return self.answer(b"not here", 404)
        if not self.allowed("git-receive-pack" in self.path):
            return None
        return self.backend(path, query)

    do_POST = do_PUT = do_HEAD = do_GET

    def backend(self, path: str, query: str):
        data = self.body()
        environment = {
            **os.environ,
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_COUNT": "0",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(data)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_USER": "someone",
        }
        done = subprocess.run(["git", "http-backend"], input=data, env=environment, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.answer(content, int(headers.pop("Status", "200").split()[0]), **headers)

    def batch(self):
        question = json.loads(data) if self.allowed(b"upload" in (data := self.peek())) else None
        if question is None:
            return None
        objects = []
        for entry in question["objects"]:
            there = self.server.object(entry["oid"]).is_file()
            action = {
                "href": f"http://{self.headers['Host']}/lfs/{entry['oid']}",
                "header": {"X-Lfs-Canary": "lfs-canary-token"},
            }
            if question["operation"] == "upload":
                objects.append({**entry, "actions": {"upload": action, "verify": {**action}}} if not there else entry)
            elif there:
                objects.append({**entry, "actions": {"download": action}})
            else:
                objects.append({**entry, "error": {"code": 404, "message": "Object does not exist"}})
        return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def peek(self) -> bytes:
        data = Handler.body(self)
        self.body = lambda: data
        return data

    def object(self, path: Path):
        if self.headers.get("X-Lfs-Canary") != "lfs-canary-token":
            return self.answer(b"no key", 403)
        if self.command == "PUT":
            if self.receive_file(path):
                if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                    path.unlink()
                    return self.answer(b"not that oid", 422)
                self.answer()
            return None
        if self.command == "POST":  # verify
            size = json.loads(self.body())["size"]
            return self.answer({}, 200 if path.is_file() and path.stat().st_size == size else 404)
        return self.send_file(path) if path.is_file() else self.answer(b"gone", 404)

    def forward(self):
        import requests

        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "content-length")}
        answer = requests.request(
            self.command, self.server.giftless + self.path, data=self.body(), headers=headers, timeout=20
        )
        self.answer(answer.content, answer.status_code, Content_Type=answer.headers.get("Content-Type", ""))


@contextlib.contextmanager
def giftless(folder: Path):
    """The address of a giftless LFS server that keeps its objects in `folder`."""
    os.environ["GIFTLESS_CONFIG_STR"] = json.dumps(
        {
            "AUTH_PROVIDERS": ["giftless.auth.allow_anon:read_write"],
            "TRANSFER_ADAPTERS": {
                "basic": {
                    "factory": "giftless.transfer.basic_streaming:factory",
                    "options": {
                        "storage_class": "giftless.storage.local_storage:LocalStorage",
                        "storage_options": {"path": str(folder)},
                    },
                }
            },
        }
    )
    from giftless.app import init_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, init_app(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


# --------------------------------------------------------------------------------------------------------- Hugging Face


# hf-local-hub's wheel (3.0.0) holds a client alone, which starts a Go program that has to be built: it cannot serve here.
class Hub(Server):
    """The part of the Hub's HTTP API that the real client uses to read, create, commit and tag. `commits`: per repository a
    list of (id, {name: sha256}); `names`: branches and tags. Files named like LARGE go through its LFS."""

    def __init__(self, root: Path, token: str = "hf_right", private: bool = False, port: int = 0):
        super().__init__(("127.0.0.1", port), HubHandler)
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.token, self.private = root, token, private
        self.commits: dict[str, list[tuple[str, dict[str, str]]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.rules, self.seen, self.sent, self.received = [], [], Counter(), Counter()
        self.ranges = True

    def blob(self, sha256: str) -> Path:
        return self.root / sha256

    def add(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blob(sha256).write_bytes(data)
        return sha256

    def commit(self, repo: str, files: dict[str, str], branch: str = "main") -> str:
        made = hashlib.sha1(json.dumps([repo, files, len(self.commits.setdefault(repo, []))]).encode()).hexdigest()
        self.commits[repo].append((made, files))
        self.branches.setdefault(repo, {})[branch] = made
        self.tags.setdefault(repo, {})
        return made

    def put(self, repo: str, folder: Path) -> str:
        names = [f for f in folder.rglob("*") if f.is_file()]
        return self.commit(repo, {f.relative_to(folder).as_posix(): self.add(f.read_bytes()) for f in names})

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, str]] | None:
        wanted = self.branches[repo].get(revision) or self.tags[repo].get(revision) or revision
        return next(((made, files) for made, files in self.commits[repo] if made == wanted), None)


LARGE = (".safetensors", ".bin", ".model")


class HubHandler(Handler):
    server: Hub

    def entry(self, name: str, sha256: str) -> dict:
        path = self.server.blob(sha256)
        size = path.stat().st_size
        large = name.endswith(LARGE)
        data = sha256.encode() if large else path.read_bytes()  # git holds a pointer
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 130}} if large else {}
        return {"rfilename": name, "path": name, "type": "file", "size": size, "blobId": git, "oid": git, **lfs}

    def do_GET(self):
        hub, authorization = self.server, self.headers.get("Authorization")
        hub.seen.append((self.command, self.path, authorization))
        if any(rule(self) for rule in list(hub.rules)):
            return None
        path = self.path.partition("?")[0]
        parts = unquote(path).strip("/").split("/")
        if parts[0] == "lfs-blob":
            return self.send_file(hub.blob(parts[1])) if self.command != "PUT" else self.put_blob(parts[1])
        writing = self.command == "POST" and "paths-info" not in path
        if (writing or hub.private) and authorization != f"Bearer {hub.token}":
            self.body()
            return self.answer(b"{}", 401, X_Error_Message="Invalid username or password.")
        if path == "/api/whoami-v2":
            return self.answer({"name": "user", "type": "user"})
        if path == "/api/repos/create":
            made = json.loads(self.body())
            repo = f"{made.get('organization') or 'user'}/{made['name']}"
            if made.get("type") == "space":
                assert made["sdk"] == "gradio"
                repo = f"spaces/{repo}"
            if repo in hub.commits:
                return self.answer({"url": f"{hub.url}/{repo}"}, 409)
            hub.commit(repo, {})
            return self.answer({"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
        if path == "/api/validate-yaml":
            self.body()
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch()
        space = "spaces/" if "spaces" in parts[:2] else ""
        parts = parts[1:] if parts[0] == "spaces" else parts
        repo = space + "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in hub.commits:
            self.body()
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        what = parts[4] if parts[0] == "api" and len(parts) > 4 else parts[2] if parts[0] != "api" else "revision"
        if what == "refs":
            named = {"branches": hub.branches[repo], "tags": hub.tags[repo], "converts": {}}
            return self.answer(
                {
                    kind: [{"name": n, "ref": f"refs/x/{n}", "targetCommit": c} for n, c in values.items()]
                    for kind, values in named.items()
                }
            )
        if what == "tag":
            tag = json.loads(self.body())["tag"]
            hub.tags[repo][tag] = hub.files(repo, "/".join(parts[5:]))[0]
            return self.answer({})
        if what.startswith("xet-"):
            return self.answer(b"{}", 404, X_Error_Message="This hub has no Xet")
        revision = parts[5] if parts[0] == "api" and len(parts) > 5 else parts[3] if parts[0] != "api" else "main"
        if (found := hub.files(repo, revision)) is None:
            self.body()
            return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        made, files = found
        if what == "revision":
            return self.answer({"id": repo, "sha": made, "siblings": [self.entry(n, s) for n, s in files.items()]})
        if what == "tree":
            return self.answer([self.entry(n, s) for n, s in files.items()])
        if what == "paths-info":
            asked = json.loads(data) if (data := self.body()).startswith(b"{") else parse_qs(data.decode())
            return self.answer([self.entry(n, files[n]) for n in asked["paths"] if n in files])
        if what == "preupload":
            asked = json.loads(self.body())["files"]
            return self.answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for f in asked
                    ]
                }
            )
        if what == "commit":
            return self.commit(repo, revision, dict(files))
        if what == "resolve":
            name = "/".join(parts[4:])
            if name not in files:
                return self.answer(b"{}", 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            entry = self.entry(name, files[name])
            etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
            return self.send_file(hub.blob(files[name]), ETag=f'"{etag}"', X_Repo_Commit=made)
        raise AssertionError(f"{self.command} {self.path} is not in this small hub")

    do_POST = do_PUT = do_HEAD = do_GET

    def put_blob(self, sha256: str):
        if self.receive_file(self.server.blob(sha256)):
            self.answer(b"", 200, ETag='"x"')

    def lfs_batch(self):
        asked = json.loads(self.body())
        objects = []
        for entry in asked["objects"]:
            href = f"http://{self.headers['Host']}/lfs-blob/{entry['oid']}"
            there = self.server.blob(entry["oid"]).is_file()
            objects.append(entry if there else {**entry, "actions": {"upload": {"href": href}}})
        return self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, branch: str, files: dict[str, str]):
        for line in self.body().splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = self.server.add(base64.b64decode(value["content"]))
            elif change["key"] == "lfsFile":
                assert self.server.blob(value["oid"]).stat().st_size == value["size"]
                files[value["path"]] = value["oid"]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        made = self.server.commit(repo, files, branch)
        return self.answer({"commitOid": made, "commitUrl": f"{self.server.url}/{repo}/commit/{made}", "success": True})


# ---------------------------------------------------------------------------------------------------------------- faults


def unacknowledged(connection: socket.socket) -> int:
    """Bytes that were written to a connection and that the other side's system does not have yet."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0]


class Faults:
    """A TCP proxy before a server: each new connection takes the next fault of `plan`, if any is left.

    ("cut", n): closed, with a reset, when n bytes of the answer have arrived; ("close", n): closed quietly; ("delay",
    seconds); ("corrupt", n): the answer's byte n is another one; ("status", code, headers): answered in the server's place.
    `passed` counts the answers' bytes that arrived.
    """

    def __init__(self, port: int):
        self.target, self.plan, self.passed, self.used = port, [], 0, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.close()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            fault = self.plan.pop(0) if self.plan else ("none",)
            self.used.append(fault[0])
            threading.Thread(target=self.connection, args=(client, fault), daemon=True).start()

    def connection(self, client: socket.socket, fault: tuple):
        try:
            with contextlib.suppress(OSError):
                self.carry(client, fault)
        finally:
            with contextlib.suppress(OSError):  # else the other thread's recv keeps it open
                client.shutdown(socket.SHUT_RD if fault[0] == "cut" else socket.SHUT_RDWR)
            client.close()

    def carry(self, client: socket.socket, fault: tuple):
        if fault[0] == "status":
            client.recv(1 << 16)
            lines = "".join(f"{k}: {v}\r\n" for k, v in (fault[2] if len(fault) > 2 else {}).items())
            client.sendall(f"HTTP/1.1 {fault[1]} x\r\nContent-Length: 0\r\nConnection: close\r\n{lines}\r\n".encode())
            return
        if fault[0] == "delay":
            time.sleep(fault[1])
        server = self.reach()
        threading.Thread(target=self.up, args=(client, server), daemon=True).start()
        count = 0
        with server:
            while data := server.recv(1 << 16):
                if fault[0] == "corrupt" and count <= fault[1] < count + len(data):
                    i = fault[1] - count
                    data = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
                if fault[0] in ("cut", "close") and count + len(data) >= fault[1]:
                    client.sendall(data[: fault[1] - count])
                    self.passed += fault[1] - count
                    if fault[0] == "cut":
                        while unacknowledged(client):  # a reset throws away what is still here
                            time.sleep(0.001)
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    return
                client.sendall(data)
                count += len(data)
                self.passed += len(data)

    def reach(self) -> socket.socket:
        """A busy machine refuses a connection now and then, although the server listens; that is no fault of the plan's."""
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", self.target))
            time.sleep(0.02)
        raise ConnectionRefusedError

    def up(self, client: socket.socket, server: socket.socket):
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)


def one_request_a_connection(server: Server) -> None:
    """So that a plan of faults is used up by whoever keeps connections, too."""

    def rule(handler: Handler) -> bool:
        handler.end_headers = lambda: (
            handler.send_header("Connection", "close"),
            http.server.BaseHTTPRequestHandler.end_headers(handler),
        )
        return False

    server.rules.append(rule)


def lead_hub_to(proxy: Faults, monkeypatch) -> None:
    """hf: references go through a proxy before the small hub; its client's own waits are none."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", proxy.url)
    template = proxy.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))


def git(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """A stranger's git."""
    done = subprocess.run(
        ["git", *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = [f for f in folder.rglob("*") if f.is_file() and ".git" not in f.relative_to(folder).parts]
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def log_in(url: str, password: str = "git-canary-token") -> None:
    """Through git's own credential store, as a user does it."""
    git("config", "--global", "credential.helper", "store")
    host = url.partition("://")[2]
    (Path(os.environ["HOME"]) / ".git-credentials").write_text(f"http://user:{password}@{host}\n")


def redirect(kind: str, server: GitServer) -> None:
    """The hub's address leads to our server, by git's own insteadOf."""
    git("config", "--global", "--add", f"url.{server.url}/.insteadOf", HUBS[kind][0].format("").removesuffix(".git"))


def mkdir(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, url: str) -> None:
    """Everything in a work tree, pushed to the main branch there."""
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    git("add", "-A", cwd=folder)
    git(*who, "commit", "-qm", "x", cwd=folder)
    git("push", "-q", url, "HEAD:refs/heads/main", cwd=folder)
