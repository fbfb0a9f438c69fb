"""Publish and pull, each kind of place, there and back; pulled by strangers as well."""

import hashlib
import os
from pathlib import Path

import pytest
from servers import GitServer, Hub, giftless, git

from finetune import hub, places


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): sha256(f) for f in folder.rglob("*") if f.is_file()}


def wanted(package: dict) -> dict[str, str]:
    return {name: source.sha256 for name, source in package.items()}


@pytest.fixture
def server(world):
    with GitServer(world / "served", {"user": "git-canary-token"}) as server:
        (world / "served").mkdir()
        yield server


@pytest.fixture
def hf(world, monkeypatch):
    from huggingface_hub import constants

    with Hub(world / "hf") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def log_in(url: str, password: str = "git-canary-token") -> None:
    """Through git's own credential store, as a user does it."""
    git("config", "--global", "credential.helper", "store")
    host = url.partition("://")[2]
    (Path(os.environ["HOME"]) / ".git-credentials").write_text(f"http://user:{password}@{host}\n")


def redirect(kind: str, server: GitServer) -> None:
    """The hub's address leads to our server, by git's own insteadOf."""
    git("config", "--global", f"url.{server.url}/.insteadOf", places.HUBS[kind][0].format("").removesuffix(".git"))


@pytest.fixture(params=["dir", "file", "http", "giftless", "openxlab", "modelscope", "hf"])
def place(request, world, server, monkeypatch):
    """A reference to an empty place of each kind."""
    kind = request.param
    if kind == "dir":
        yield f"dir:{world}/usb stick/xiaoxing"
    elif kind == "file":
        yield f"git+file://{server.make('user/xiaoxing')}"
    elif kind == "hf":
        request.getfixturevalue("hf")
        yield "hf:user/xiaoxing"
    else:
        server.make("user/xiaoxing")
        if kind in ("http", "giftless"):
            log_in(server.url)
            ref = f"git+{server.url}/user/xiaoxing.git"
        else:
            redirect(kind, server)
            ref = f"{kind}:user/xiaoxing"
            server.users = {"oauth2" if kind == "modelscope" else "user": "git-canary-token"}
            monkeypatch.setenv({"openxlab": "OPENXLAB_TOKEN"}.get(kind, "MODELSCOPE_API_TOKEN"), "git-canary-token")
        if kind == "giftless":
            with giftless(world / "giftless") as server.giftless:
                yield ref
        else:
            yield ref


def test_there_and_back(place, package, capfd):
    revision = hub.publish(place, package, "first")
    folder = hub.pull(place)
    assert tree(folder) == wanted(package)
    if not place.startswith("dir:"):
        assert hub.pull(f"{place}@{revision}") == folder
    assert hub.publish(place, package, "again") == revision
    assert "nothing was sent" in capfd.readouterr().err
