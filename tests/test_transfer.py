"""Bytes under faults: cut, delayed, changed, refused for now, killed; and tokens, which go nowhere they are not meant for."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import with_manifest
from servers import Faults, GitServer, git, lead_hub_to, log_in, mkdir, one_request_a_connection, redirect, tree

from finetune import hub, transfer
from finetune.errors import UserError

ROOT = Path(hub.__file__).parents[1]
SIZE = 8_000_000


@pytest.fixture(scope="module")
def big(package, tmp_path_factory):
    """A package whose weights are SIZE random bytes, enough to be interrupted in."""
    path = tmp_path_factory.mktemp("big") / "model.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    files = {n: s for n, s in package.items() if n != "manifest.json"}
    files["model.safetensors"] = transfer.Source(path, SIZE, hashlib.sha256(path.read_bytes()).hexdigest())
    return with_manifest(files)


@pytest.fixture(params=["git", "hf"])
def spoilt(request, monkeypatch):
    """(the proxy before an empty git repository or a hub, a reference through it)"""
    server = request.getfixturevalue("server" if request.param == "git" else "hf")
    one_request_a_connection(server)
    with Faults(server.server_port) as proxy:
        if request.param == "hf":
            lead_hub_to(proxy, monkeypatch)
            yield proxy, "hf:user/x"
        else:
            server.make("user/x")
            log_in(proxy.url)
            yield proxy, f"git+{proxy.url}/user/x.git"


def wanted(package: dict) -> dict[str, str]:
    return {name: source.sha256 for name, source in package.items()}


# -------------------------------------------------------------------------------------------------------- one file alone


@pytest.fixture
def served(world):
    """(a git server's LFS file, its address, its headers)"""
    data = random.Random(1).randbytes(SIZE)
    oid = hashlib.sha256(data).hexdigest()
    with GitServer(world / "served") as server:
        server.object(oid).parent.mkdir(parents=True)
        server.object(oid).write_bytes(data)
        yield server, f"/lfs/{oid}", {"X-Lfs-Canary": "lfs-canary-token"}, data


@pytest.mark.parametrize("kind", ["close", "cut"])
def test_a_hundred_interruptions_each_at_random_bytes(served, tmp_path, kind):
    """Twenty of every file, closed or reset: the right bytes, and at most 5 % over what was missing, headers included."""
    server, path, headers, data = served
    dice = random.Random(2)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    arrived: list[int] = []
    with Faults(server.server_port) as proxy:
        interrupted = files = 0
        while interrupted < 100:
            part = tmp_path / f"{files}.part"
            proxy.plan = [(kind, dice.randrange(1, SIZE // 8)) for _ in range(20)]
            proxy.used.clear()
            transfer._session.cache_clear()  # each attempt its own connection
            url = proxy.url + path
            transfer.receive(
                lambda n, url=url: transfer.open_url(url, headers, n), part, SIZE, digest, "x", arrived.append
            )
            assert part.read_bytes() == data
            files, interrupted = files + 1, interrupted + sum(fault != "none" for fault in proxy.used)
    assert sum(arrived) == files * SIZE  # what was taken back is negative
    assert proxy.passed <= 1.05 * files * SIZE, f"{proxy.passed / files / SIZE:.3f}"


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_what_is_there_is_gone_on_from(served, tmp_path, ranges):
    server, path, headers, data = served
    server.ranges = ranges
    digest, part, seen = f"sha256:{hashlib.sha256(data).hexdigest()}", tmp_path / "part", []
    part.write_bytes(data[: SIZE // 2])
    transfer.receive(lambda n: transfer.open_url(server.url + path, headers, n), part, SIZE, digest, "x", seen.append)
    assert part.read_bytes() == data
    assert sum(server.sent.values()) == (SIZE - SIZE // 2 if ranges else SIZE)
    assert sum(seen) == SIZE


@pytest.mark.parametrize(
    "left", [b"!" * 100, b"!" * (SIZE + 5), b"!" * SIZE, b""], ids=["other", "longer", "whole", "empty"]
)
def test_what_a_power_cut_left_comes_right(served, tmp_path, left):
    server, path, headers, data = served
    part = tmp_path / "part"
    part.write_bytes(left)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    transfer.receive(lambda n: transfer.open_url(server.url + path, headers, n), part, SIZE, digest, "x")
    assert part.read_bytes() == data


def test_a_byte_changed_on_the_way_is_fetched_again_and_always_changed_is_refused(served, tmp_path):
    server, path, headers, data = served
    digest, part = f"sha256:{hashlib.sha256(data).hexdigest()}", tmp_path / "part"
    with Faults(server.server_port) as proxy:
        for plan, right in (([("corrupt", 5000)], True), ([("corrupt", 5000)] * 9, False)):
            transfer._session.cache_clear()
            proxy.plan = list(plan)

            def open_at(n: int):
                transfer._session.cache_clear()
                return transfer.open_url(proxy.url + path, headers, n)

            if right:
                transfer.receive(open_at, part, SIZE, digest, "x")
                assert part.read_bytes() == data
                part.unlink()
            else:
                with pytest.raises(
                    UserError, match=r"x is not what it should be and is refused: it has sha256:[0-9a-f]{64}"
                ):
                    transfer.receive(open_at, part, SIZE, digest, "x")
                assert not part.exists()


def test_waits_as_long_as_it_is_asked_to(served, monkeypatch):
    server, path, headers, _ = served
    waited = []
    monkeypatch.setattr(transfer.time, "sleep", waited.append)
    answers = [(429, {"Retry-After": "7"}), (503, {}), (500, {}), (200, {})]

    def rule(handler) -> bool:
        status, more = answers.pop(0)
        return status != 200 and not handler.answer(b"", status, **{k.replace("-", "_"): v for k, v in more.items()})

    server.rules.append(rule)
    response = transfer.patiently(lambda: transfer.ask("GET", server.url + path, headers), "x")
    assert response.status_code == 200
    assert waited == [7.0, 0.04, 0.08]

    server.rules[0] = lambda handler: not handler.answer(b"", 429, Retry_After="86400")
    with pytest.raises(transfer.Unreachable, match=r"x: HTTP 429 .*It asks to come back in 86400 s"):
        transfer.patiently(lambda: transfer.ask("GET", server.url + path, headers), "x")


def test_a_server_that_says_nothing_is_left(monkeypatch, world):
    import socket

    monkeypatch.setattr(transfer, "TIMEOUT", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(transfer.Unreachable, match=r"x: .*timed out"):
            transfer.patiently(lambda: transfer.ask("GET", url), "x")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("asked", ["POST /api/repos/create", "PUT /lfs-blob/", "POST /api/models/user/x/commit/"])
def test_a_hub_that_says_nothing_to_a_publish_is_left(hf, package, monkeypatch, asked):
    """Its client waits for ever by itself."""
    import huggingface_hub

    monkeypatch.setattr("finetune.places.HUB_TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own between its attempts
    huggingface_hub.close_session()
    gate = threading.Event()
    hf.rules.append(lambda handler: f"{handler.command} {handler.path}".startswith(asked) and gate.wait(60))
    try:
        with pytest.raises(transfer.Unreachable, match=r"hf:user/x at http://.*: no answer to a P\w+ in 0\.3 s\."):
            hub.publish("hf:user/x", package, "x")
    finally:
        gate.set()
        huggingface_hub.close_session()


def test_a_hub_whose_gateway_answers_is_asked_again(hf, package):
    """The client reads what is said about a model card as JSON before it looks at the status."""
    answers = [502, 502]
    hf.rules.append(lambda h: "validate-yaml" in h.path and answers and h.body() and not h.answer(b"", answers.pop()))
    hub.publish("hf:user/x", package, "x")
    assert not answers
    assert tree(hub.pull("hf:user/x")) == wanted(package)


# ------------------------------------------------------------------------------------------------------------ redirects


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.com/x", "gopher://x/"])
def test_a_redirect_elsewhere_is_refused(served, target):
    server, path, headers, _ = served
    server.rules.append(lambda handler: not handler.answer(b"", 302, Location=target))
    with pytest.raises(UserError, match=r"sends us on to .*, which is refused: it is not https"):
        transfer.ask("GET", server.url + path, headers)


def test_a_redirect_to_another_host_goes_without_the_token(served, world):
    server, path, _, _ = served
    with GitServer(world / "served") as other:
        other.rules.append(lambda handler: not handler.answer(b"open"))
        server.rules.append(lambda handler: not handler.answer(b"", 302, Location=other.url + path))
        secret = {"Authorization": "Bearer canary", "X-Private": "canary", "Range": "bytes=5-"}
        assert transfer.read_all(transfer.ask("GET", server.url + path, secret)) == b"open"
        assert [(p, a) for _, p, a in other.seen] == [(path, None)]


def test_a_host_that_two_readers_see_differently_gets_no_token(served, world):
    """`\\` ends the host for whoever connects, and for Python's urlsplit the host is what follows the @."""
    server, path, _, _ = served
    with GitServer(world / "served") as other:
        other.rules.append(lambda handler: not handler.answer(b"open"))
        target = f"{other.url}\\@{server.url.partition('://')[2]}{path}"
        server.rules.append(lambda handler: not handler.answer(b"", 302, Location=target))
        with contextlib.suppress(UserError):
            transfer.ask("GET", server.url + path, {"Authorization": "Bearer canary"})
        assert all(authorization is None for _, _, authorization in other.seen)


@pytest.mark.parametrize("value", ["²", "9" * 400, "Mon, 01 Jan 0001 00:00:00 -0000", "soon", "-1"])
def test_a_wait_that_is_none(served, value, monkeypatch):
    server, path, headers, _ = served
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    server.rules.append(lambda handler: not handler.answer(b"", 429, Retry_After=value))
    with pytest.raises(transfer.Unreachable, match="HTTP 429"):
        transfer.patiently(lambda: transfer.ask("GET", server.url + path, headers), "x")


def test_a_loop_of_redirects_ends(served):
    server, path, headers, _ = served
    server.rules.append(lambda handler: not handler.answer(b"", 302, Location=path))
    with pytest.raises(UserError, match="sends us on more than 5 times"):
        transfer.ask("GET", server.url + path, headers)


@pytest.mark.parametrize("verb", ["pull", "publish"])
def test_git_is_not_sent_to_another_host(server, world, package, verb):
    server.make("user/x")
    log_in(server.url)
    with GitServer(world / "served", {"user": "git-canary-token"}) as other:
        server.rules.append(lambda h: "/info/refs" in h.path and not h.answer(b"", 302, Location=other.url + h.path))
        git("config", "--global", f"credential.{other.url}.helper", "store")
        with pytest.raises(UserError, match="git's token is not taken to another host"):
            hub.pull(f"git+{server.url}/user/x.git") if verb == "pull" else hub.publish(
                f"git+{server.url}/user/x.git", package, "x"
            )
        assert all(authorization is None for _, _, authorization in other.seen)


def test_an_lfs_server_that_names_a_file_or_another_host(server, package, world):
    server.make("user/x")
    log_in(server.url)
    ref = f"git+{server.url}/user/x.git"
    hub.publish(ref, package, "x")
    oid, size = package["model.safetensors"].sha256, package["model.safetensors"].size
    with GitServer(world / "served") as other:
        other.rules.append(lambda handler: not handler.answer(b"x" * size))

        def batch(href: str):
            entry = {"oid": oid, "size": size, "actions": {"download": {"href": href}}}
            return lambda h: h.path.endswith("/objects/batch") and h.body() and not h.answer({"objects": [entry]})

        server.rules.append(batch("file:///etc/passwd"))
        with pytest.raises(UserError, match="names the address file:///etc/passwd, which is refused"):
            hub.pull(ref)
        server.private = True  # so that a token is sent to it
        server.rules[0] = batch(f"{other.url}/x")
        with pytest.raises(UserError, match="is not what it should be and is refused"):
            hub.pull(ref)
        assert other.seen
        assert all(authorization is None for _, _, authorization in other.seen)


# ------------------------------------------------------------------------------------------------------ whole, under faults


FAULTS = [
    [("cut", 3000)],
    [("close", 100), ("cut", 50)],
    [("status", 503), ("status", 500), ("status", 429, {"Retry-After": "0"})],
    [("delay", 0.3)] * 3,
    [("none",)] * 3 + [("cut", 1_000_000), ("close", 500_000), ("status", 502)],
    [("status", 429)] * 2 + [("cut", 10)],
]


@pytest.mark.parametrize("plan", FAULTS, ids=range(len(FAULTS)))
def test_pull_under_faults(spoilt, big, plan):
    proxy, ref = spoilt
    hub.publish(ref, big, "x")
    proxy.plan = list(plan)
    assert tree(hub.pull(ref)) == wanted(big)
    assert not proxy.plan


@pytest.mark.parametrize("plan", FAULTS, ids=range(len(FAULTS)))
def test_publish_under_faults(spoilt, big, plan):
    proxy, ref = spoilt
    proxy.plan = list(plan)
    hub.publish(ref, big, "x")
    assert not proxy.plan
    assert tree(hub.pull(ref)) == wanted(big)


WORK = """
import hashlib, json, sys
from pathlib import Path
from finetune import hub, transfer
verb, ref, listed = sys.argv[1:]
files = {n: transfer.Source(Path(p), s, h) for n, (p, s, h) in json.load(open(listed)).items()}
print(hub.pull(ref) if verb == "pull" else hub.publish(ref, files, "x"))
"""


def listed(files: dict, folder: Path) -> Path:
    """The package as a child process reads it."""
    rows = {}
    for name, source in files.items():
        path = source.data
        if isinstance(path, bytes):
            path = folder / f"source-{name}"
            path.write_bytes(source.data)
        rows[name] = [str(path), source.size, source.sha256]
    (folder / "listed.json").write_text(json.dumps(rows))
    return folder / "listed.json"


def start(verb: str, ref: str, rows: Path, **more) -> subprocess.Popen:
    command = [sys.executable, "-c", WORK, verb, ref, str(rows)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def arrived(cache: Path) -> int:
    """Bytes of files that are not whole yet; one may become whole while it is looked at."""
    total = 0
    for file in cache.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


@pytest.mark.parametrize("kind", ["git", "hf"])
def test_a_killed_pull_goes_on(kind, request, world, big, monkeypatch):
    """SIGKILL after a third; the next one fetches the rest."""
    server = request.getfixturevalue("server" if kind == "git" else "hf")
    ref = "hf:user/x"
    if kind == "git":
        server.make("user/x")
        server.users = {}
        ref = f"git+{server.url}/user/x.git"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub.publish(ref, big, "x")
    gate = threading.Event()

    def slow(handler) -> bool:  # a third, then nothing more
        if handler.command != "GET" or not handler.path.endswith(
            (big["model.safetensors"].sha256, "model.safetensors")
        ):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(SIZE))
        handler.end_headers()
        handler.wfile.write(big["model.safetensors"].data.read_bytes()[: SIZE // 3])
        handler.wfile.flush()
        gate.wait(30)
        return True

    server.rules.append(slow)
    rows = listed(big, world)
    with start("pull", ref, rows) as child:
        wait_for(lambda: arrived(world / "cache") >= SIZE // 3 - 20_000)
        child.send_signal(signal.SIGKILL)
    server.rules.clear()
    gate.set()
    server.sent.clear()
    assert tree(hub.pull(ref)) == wanted(big)
    weights = [n for name, n in server.sent.items() if name == big["model.safetensors"].sha256]
    assert sum(weights) <= SIZE - SIZE // 3 + 40_000


def wait_for(done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["git", "hf"])
def test_a_killed_publish_goes_on(kind, request, world, big, monkeypatch):
    """What has arrived as a whole is not sent again."""
    server = request.getfixturevalue("server" if kind == "git" else "hf")
    ref = "hf:user/x"
    if kind == "git":
        server.make("user/x")
        log_in(server.url)
        ref = f"git+{server.url}/user/x.git"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    stored = server.object if kind == "git" else server.blob
    files = {n: s for n, s in big.items() if n != "manifest.json"}
    (second := world / "more.safetensors").write_bytes(random.Random(3).randbytes(SIZE))
    files["more.safetensors"] = transfer.Source(second, SIZE, hashlib.sha256(second.read_bytes()).hexdigest())
    files = with_manifest(files)
    puts = []

    def stop(handler) -> bool:
        if handler.command == "PUT":
            puts.append(handler.path.rpartition("/")[2])
            if len(puts) == 2:
                wait_for(stored(puts[0]).is_file)  # huggingface_hub sends several at once
                child.send_signal(signal.SIGKILL)
                handler.close_connection = True
                return True
        return False

    server.rules.append(stop)
    with start("publish", ref, listed(files, world)) as child:
        child.wait(60)
    assert len(puts) == 2
    server.rules.clear()
    server.received.clear()
    hub.publish(ref, files, "x")
    assert puts[0] not in server.received
    assert puts[1] in server.received
    assert tree(hub.pull(ref)) == wanted(files)


def test_what_a_power_cut_left_of_our_repository(server, world, package):
    """git's own locks, and objects without their bytes; what is published next needs the commit before."""
    ref = f"git+file://{server.make('user/x')}"
    hub.publish(ref, package, "x")
    (repo,) = (f.parent for f in (world / "cache" / "hub" / "git").glob("*/HEAD"))
    for name in ("index.lock", "shallow.lock", "config.lock"):
        (repo / name).touch()
    more = with_manifest({n: s for n, s in package.items() if n not in ("manifest.json", "README.md")})
    hub.publish(ref, more, "x")
    for file in (repo / "objects").rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            os.truncate(file, 0)
    with pytest.raises(UserError, match=r"was damaged, .* removed here: run the same command again"):
        hub.publish(ref, package, "x")
    hub.publish(ref, package, "x")
    assert tree(hub.pull(ref)) == wanted(package)


def test_a_killed_copy_to_a_folder_goes_on(world, big):
    (world / "stick" / ".namesake").mkdir(parents=True)
    source = big["model.safetensors"]
    part = world / "stick" / ".namesake" / f"model.safetensors-{source.sha256}.part"
    part.write_bytes(source.data.read_bytes()[:1000])
    hub.publish(f"dir:{world}/stick", big, "x")
    assert tree(world / "stick") == wanted(big)


# -------------------------------------------------------------------------------------------------------------- secrets


CANARY = "canary-5ecr3t-t0ken"


FAILURES = ["", "401", "403", "404", "500", "html", "redirect", "batch 500", "batch 401", "put 403"]


@pytest.mark.parametrize(
    "kind, fault",
    [
        *((kind, fault) for kind in ("openxlab", "git", "hf", "modelscope") for fault in FAILURES),
        *((f"{kind} login", fault) for kind in ("hf", "modelscope") for fault in ("", "403", "put 403")),
    ],
)
def test_no_token_is_told_anywhere(request, world, package, kind, fault, monkeypatch, capfd):
    """Whatever fails and wherever it is kept: not in the error, the output, or a file but the user's own."""
    kind, _, login = kind.partition(" ")
    own = world / "home" / "token"
    if kind == "hf":
        server, ref = request.getfixturevalue("hf"), "hf:user/x"
        server.token, server.private = CANARY, True
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(own))  # which 'hf auth login' writes
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    else:
        server = request.getfixturevalue("server")
        server.make("user/x")
        server.users, server.private = {"oauth2" if kind == "modelscope" else "user": CANARY}, True
        ref = f"git+{server.url}/user/x.git" if kind == "git" else f"{kind}:user/x"
        if kind == "git":
            log_in(server.url, CANARY)
            own = world / "home" / ".git-credentials"
        else:
            redirect(kind, server)
            monkeypatch.setenv({"openxlab": "OPENXLAB_TOKEN"}.get(kind, "MODELSCOPE_API_TOKEN"), CANARY)
    if login:
        monkeypatch.delenv({"hf": "HF_TOKEN"}.get(kind, "MODELSCOPE_API_TOKEN"))
        if kind == "modelscope":
            own = world / "home" / ".modelscope" / "credentials" / "git_token"
            own.parent.mkdir(parents=True)
        own.write_text(f"{CANARY}\n")
    told = json.dumps({"message": f"bad token {CANARY} for user"}).encode()  # a server that repeats it

    def fail(handler) -> bool:
        if handler.headers.get("Authorization") is None and fault != "redirect" and handler.command != "PUT":
            return False
        where, _, status = fault.rpartition(" ")
        if where == "batch" and not handler.path.endswith("objects/batch"):
            return False
        if where == "put" and handler.command != "PUT":
            return False
        if status == "html":
            return not handler.answer(b"<html>log in</html>")
        if status == "redirect":
            return not handler.answer(b"", 302, Location=f"http://user:{CANARY}@localhost:1/x")
        return not handler.answer(told, int(status))

    if fault:
        server.rules.append(fail)
    for verb in ("publish", "pull"):
        error = None
        try:
            hub.publish(ref, package, "x") if verb == "publish" else hub.pull(ref)
        except UserError as caught:
            error = caught
        assert fault or not error
        assert error or not fault or verb == "pull"
        while error:
            assert CANARY not in repr(error)
            error = error.__cause__
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    files = [f for f in world.rglob("*") if f.is_file() and f != own]
    assert not [f for f in files if CANARY.encode() in f.read_bytes()]


def test_a_token_of_the_environment_is_not_put_into_a_store(server, world, package, monkeypatch):
    """Git offers what it logged in with to every helper that it knows; and an older token there does not win."""
    server.make("user/x")
    redirect("openxlab", server)
    server.users, server.private = {"user": CANARY}, True
    log_in(server.url, "an-older-one")
    monkeypatch.setenv("OPENXLAB_TOKEN", CANARY)
    hub.publish("openxlab:user/x", package, "x")
    assert tree(hub.pull("openxlab:user/x")) == wanted(package)
    assert CANARY not in (world / "home" / ".git-credentials").read_text()


def test_no_token_is_in_any_argument(server, world, package, monkeypatch):
    """Of git, which says what it is started with, and of what it starts itself: its helpers."""
    server.make("user/x")
    redirect("openxlab", server)
    server.users, server.private = {"user": CANARY}, True
    monkeypatch.setenv("OPENXLAB_TOKEN", CANARY)
    real, seen = shutil.which("git"), world / "seen"
    (wrapper := mkdir(world / "bin") / "git").write_text(
        f'#!/bin/sh\necho "git $*" >> {seen}\nGIT_TRACE={seen} exec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    hub.publish("openxlab:user/x", package, "x")
    monkeypatch.setenv("NAMESAKE_CACHE", str(world / "somebody else's"))
    assert tree(hub.pull("openxlab:user/x")) == wanted(package)
    lines = seen.read_text().splitlines()
    for started in (
        r"^git .* push ",
        r"^git .* fetch ",
        r"trace: run_command: .*remote-http",
        r"run_command: .*test .* = get",
    ):
        assert any(re.search(started, line) for line in lines), started
    assert not [line for line in lines if CANARY in line]
