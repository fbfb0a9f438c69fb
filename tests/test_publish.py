"""Publish and pull, each kind of place, there and back; pulled by strangers as well."""

import base64
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import with_manifest
from servers import commit, giftless, git, log_in, mkdir, redirect, tree

from finetune import hub, places, transfer
from finetune.errors import UserError
from finetune.places import HUBS


def wanted(package: dict) -> dict[str, str]:
    return {name: source.sha256 for name, source in package.items()}


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


@pytest.mark.parametrize("place", ["dir", "file", "http", "hf"], indirect=True)
def test_a_second_version_sends_what_changed_and_the_first_stays(place, package, world, capfd):
    """By a tag where the place knows one."""
    tagged = "" if place.startswith("dir:") else "@v1"
    first = hub.publish(place + tagged, package, "first")
    one = hub.pull(place + tagged)
    files = {n: s for n, s in package.items() if n not in ("manifest.json", "generation_config.json")}
    files["README.md"] = transfer.source("# 小星 2".encode())
    second = with_manifest(files)
    _, send, remove, _ = hub.changes(place, second)
    assert sorted(send) == ["README.md", "manifest.json"]
    assert remove == ["generation_config.json"]
    assert hub.publish(place, second, "second") != first or not tagged
    assert tree(hub.pull(place)) == wanted(second)
    if tagged:
        assert tree(one) == tree(hub.pull(f"{place}@v1")) == wanted(package)
        with pytest.raises(UserError, match=r"has a version v1 already, with other content"):
            hub.publish(f"{place}@v1", second, "third")
        with pytest.raises(UserError):
            hub.pull(f"{place}@v9")


def test_what_others_put_there_stays(server, package, world):
    bare = server.make("user/xiaoxing")
    git("init", "-q", "-b", "main", cwd=mkdir(world / "mine"))
    (world / "mine" / "LICENSE").write_text("mine")
    (world / "mine" / ".gitattributes").write_text("*.png filter=lfs diff=lfs merge=lfs -text")
    commit(world / "mine", f"file://{bare}")
    hub.publish(f"git+file://{bare}", package, "ours")
    git("clone", "-q", f"file://{bare}", str(world / "clone"))
    assert (world / "clone" / "LICENSE").read_text() == "mine"
    assert (world / "clone" / ".gitattributes").read_text().splitlines() == [
        "*.png filter=lfs diff=lfs merge=lfs -text",
        "*.safetensors filter=lfs diff=lfs merge=lfs -text",
    ]


@pytest.mark.parametrize("name", [".namesake", "data", "config.json"])
def test_a_folder_that_leads_out_of_itself_is_left_alone(package, tmp_path, name):
    (mine := mkdir(tmp_path / "mine") / "letter").write_text("dear")
    (mkdir(tmp_path / "stick") / name).symlink_to(mine if "." in name[1:] else mine.parent)
    (tmp_path / "stick" / "manifest.json").write_text("{}")
    files = with_manifest({**package, "data/letter": transfer.source(b"!")})
    with pytest.raises(UserError, match=rf"stick/{name} leads elsewhere \(a symbolic link\)"):
        hub.publish(f"dir:{tmp_path}/stick", files, "x")
    assert tree(tmp_path / "mine") == {"letter": transfer.source(b"dear").sha256}


def test_two_at_once_take_turns(package, tmp_path, monkeypatch):
    """Both would write into the same unfinished files."""
    sending, sent = threading.Lock(), []

    def send(*given, own=places.send):
        assert sending.acquire(blocking=False)
        time.sleep(0.2)
        sent.append(own(*given))
        sending.release()

    monkeypatch.setattr(places, "send", send)
    (tmp_path / "x").mkdir()
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(
            lambda ref: hub.publish(ref, package, "x"), [f"dir:{tmp_path}/x", f"{tmp_path}/../{tmp_path.name}/x"]
        ):
            pass
    assert len(sent) == 1  # the other one found it done
    assert tree(hub.pull(f"dir:{tmp_path}/x")) == wanted(package)


def test_a_folder_with_other_things_is_left_alone(package, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"sea")
    with pytest.raises(UserError, match=r"holds other files and no manifest\.json; choose an empty or a new one"):
        hub.publish(f"dir:{tmp_path}", package, "x")
    assert [f.name for f in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("place", ["dir", "file", "http", "hf"], indirect=True)
def test_a_file_that_changed_since_it_was_made_is_not_published(place, package, world):
    (changed := world / "model.safetensors").write_bytes(package["model.safetensors"].data.read_bytes()[:-1] + b"!")
    files = {**package, "model.safetensors": package["model.safetensors"]._replace(data=changed)}
    with pytest.raises(UserError) as caught:
        hub.publish(place, files, "x")
    assert str(caught.value) == (
        f"{changed} has changed since it was made: restore it from a copy; or, where it is of the run's model/, remove that "
        "folder and run the run's own command, which makes it again."
    )
    if place.startswith("dir:"):
        assert not (world / "usb stick" / "xiaoxing" / "manifest.json").exists()
    else:
        with pytest.raises(UserError, match=r"it is empty|holds no model"):
            hub.pull(place)


def test_a_place_with_a_pickle_is_refused_before_anything_is_sent(hf, package, world):
    (world / "x").mkdir()
    (world / "x" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    hf.put("user/xiaoxing", world / "x")
    with pytest.raises(UserError, match=r"already holds pytorch_model\.bin, which can run code"):
        hub.publish("hf:user/xiaoxing", package, "x")
    assert not hf.received


# ------------------------------------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize("kind", ["http", "file"])
def test_git_with_lfs_gets_the_files(kind, server, package, world):
    bare = server.make("user/xiaoxing")
    log_in(server.url)
    url = f"{server.url}/user/xiaoxing.git" if kind == "http" else f"file://{bare}"
    hub.publish(f"git+{url}", package, "x")
    git("lfs", "install", "--skip-repo")
    git("clone", "-q", url, str(world / "clone"))
    assert tree(world / "clone") == {**wanted(package), ".gitattributes": tree(world / "clone")[".gitattributes"]}


def test_what_git_lfs_pushed_is_pulled(server, package, world):
    """By somebody who publishes by hand, as the course does it."""
    bare = server.make("user/xiaoxing")
    log_in(server.url)
    git("lfs", "install", "--skip-repo")
    git("init", "-q", "-b", "main", cwd=mkdir(world / "mine"))
    git("lfs", "track", "*.safetensors", cwd=world / "mine")
    for name, source in package.items():
        with source.open() as file:
            (world / "mine" / name).write_bytes(file.read())
    commit(world / "mine", f"{server.url}/user/xiaoxing.git")
    assert bare.is_dir()
    assert tree(hub.pull(f"git+{server.url}/user/xiaoxing.git")) == wanted(package)


def test_snapshot_download_gets_the_files(hf, package, world):
    from huggingface_hub import snapshot_download

    hub.publish("hf:user/xiaoxing", package, "x")
    assert tree(Path(snapshot_download("user/xiaoxing", cache_dir=world / "theirs"))) == wanted(package)


# ------------------------------------------------------------------------------------- what a user is told, word for word


@pytest.mark.parametrize("ref", ["mymodel", "a/b/c", "user/name@"])
def test_a_new_folder_needs_its_dir(package, ref):
    with pytest.raises(UserError) as caught:
        hub.publish(ref, package, "x")
    assert str(caught.value) == (
        f"{ref!r} is no repo reference such as hf:user/name; for a folder that is not there yet write dir:{ref}"
    )


def test_no_repository_on_this_disk(package, world):
    """What it says to do makes it."""
    ref = f"git+file://{world}/my%20disk/x.git"
    with pytest.raises(UserError) as caught:
        hub.publish(ref, package, "x")
    told = re.fullmatch(
        rf"{re.escape(ref)}: there is no repository .*\. Run '(git init --bare .*)', and then the same command again\.",
        str(caught.value),
    )
    subprocess.run(shlex.split(told[1]), check=True, capture_output=True)
    hub.publish(ref, package, "x")
    assert tree(hub.pull(ref)) == wanted(package)


def test_no_repository_on_openxlab(server, package, monkeypatch):
    redirect("openxlab", server)
    monkeypatch.setenv("OPENXLAB_TOKEN", "git-canary-token")
    with pytest.raises(UserError) as caught:
        hub.publish("openxlab:user/xiaoxing", package, "x")
    assert str(caught.value) == (
        f"openxlab:user/xiaoxing: there is no repository {server.url}/user/xiaoxing.git, or you may not see it. Open "
        "https://openxlab.org.cn/models/create, type xiaoxing as its name, leave the rest as it is, and run the same command "
        "again."
    )


@pytest.mark.parametrize(
    "kind, token, words",
    [
        (
            "openxlab",
            "",
            "asks for a token (HTTP 401). Make a git token with the right to write on https://sso.openxlab.org.cn",
        ),
        (
            "openxlab",
            "wrong",
            "refuses the token (HTTP 401). Make a git token with the right to write on https://sso.openxlab",
        ),
        (
            "modelscope",
            "wrong",
            "refuses the token (HTTP 401). Copy your token from https://www.modelscope.cn/my/myaccesstoken",
        ),
    ],
)
def test_no_or_a_wrong_token(server, package, monkeypatch, kind, token, words):
    server.make("user/xiaoxing")
    redirect(kind, server)
    if token:
        monkeypatch.setenv({"openxlab": "OPENXLAB_TOKEN"}.get(kind, "MODELSCOPE_API_TOKEN"), token)
    with pytest.raises(UserError) as caught:
        hub.publish(f"{kind}:user/xiaoxing", package, "x")
    assert words in str(caught.value)
    assert not server.received


def test_the_readme_sends_to_the_pages_that_the_messages_name():
    readme = (Path(hub.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert all(f"<{page}>" in readme for page in HUBS["openxlab"][1:])


def test_a_hub_without_a_token(hf, package, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"there is no token\. Log in with 'hf auth login' or set HF_TOKEN"):
        hub.publish("hf:user/xiaoxing", package, "x")


@pytest.mark.parametrize("user", ["user:s3cret-canary@", "user:with@s3cret-canary@", "s3cret-canary@"])
def test_a_password_in_the_address_is_refused(package, user, world):
    """A token alone may stand for the user's name."""
    ref = f"git+https://{user}example.com/user/x.git"
    with pytest.raises(UserError, match="keep it in git's credential helper") as caught:
        hub.publish(ref, package, "x")
    said = [str(caught.value)]
    for wrong in (f"{ref},hf:", ref.removeprefix("git+"), f"{ref}?x", f"git+https://example.com/x.git?token={user}"):
        with pytest.raises(UserError) as caught:
            hub.pull_first(hub.several(wrong))
        said.append(str(caught.value))
    git("config", "--global", f"url.https://{user}example.com/.insteadOf", "https://example.com/")
    with pytest.raises(UserError, match="keep it in git's credential helper") as caught:
        hub.pull("git+https://example.com/user/x.git")
    assert not [text for text in [*said, str(caught.value)] if "s3cret" in text]


@pytest.mark.parametrize(
    "ref", ["git+ext::sh -c x", "git+ftp://a/b", "git+https://", "git+javascript:1", "git+/x", "git+"]
)
def test_no_git_remote(ref):
    with pytest.raises(UserError, match=r"is no git remote: write git"):
        hub.pull(ref)


# ------------------------------------------------------------------------------------------ OpenXLab's own package, real


META = {
    "Collections": [{"Name": "xiaoxing", "License": "mit", "Code": {"URL": "https://example.com"}}],
    "Models": [{"Name": "小星", "Weights": "model.safetensors", "Results": [{"Task": "t", "Dataset": "d"}]}],
}
SITE = """
import os, requests
real = requests.Session.request
def request(self, method, url, **more):
    return real(self, method, url.replace("https://openapi.openxlab.org.cn", os.environ["TEST_OPENXLAB"]), **more)
requests.Session.request = request
"""


@pytest.fixture(scope="module")
def openxlab(tmp_path_factory) -> str:
    """Where the package is importable from; its pins contradict torch's on Python 3.11, so it is installed aside."""
    folder = tmp_path_factory.mktemp("openxlab")
    if not importlib.util.find_spec("openxlab"):
        command = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "openxlab==0.1.3"]
        subprocess.run([sys.executable, *command], check=True)
    return str(folder)


def keys(world: Path, openxlab: str, server, monkeypatch) -> None:
    """OpenXLab's token and keys in the environment, and its API's address led to our server."""
    (world / "site").mkdir()
    (world / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.syspath_prepend(openxlab)
    for name, value in {
        "PYTHONPATH": f"{world / 'site'}:{openxlab}",
        "TEST_OPENXLAB": server.url,
        "OPENXLAB_AK": "ak-canary",
        "OPENXLAB_SK": "sk-canary",
        "OPENXLAB_TOKEN": "git-canary-token",
    }.items():
        monkeypatch.setenv(name, value)


def test_the_openxlab_package_makes_the_repository(server, package, world, openxlab, monkeypatch):
    """It answers as its service is known to: a nonce, a JWT, then a message code in each reply."""
    redirect("openxlab", server)
    asked = []

    def service(handler) -> bool:
        if not handler.path.startswith("/api/v1/"):
            return False
        body = json.loads(handler.body())
        asked.append((handler.path.rpartition("/")[2], body, handler.headers.get("Authorization")))
        data = {"nonce": "n", "algorithm": "HmacSHA256"}
        if handler.path.endswith("getJwt"):
            times = {"expiration": "2099-01-01 00:00:00", "refresh_expiration": "2099-01-01 00:00:00"}
            data = {"jwt": "jwt-canary", "sso_uid": "1", "refresh_token": "r", **times}
        if handler.path.endswith("createModelRepository"):
            server.make("user/xiaoxing")
        handler.answer({"msgCode": "10000", "msg": "ok", "data": {"msgCode": "10000", "msg": "ok", "data": data}})
        return True

    server.rules.append(service)
    keys(world, openxlab, server, monkeypatch)
    files = {n: s for n, s in package.items() if n != "manifest.json"}
    files = with_manifest({**files, "metafile.yml": transfer.source(yaml.safe_dump(META).encode())})
    hub.publish("openxlab:user/xiaoxing", files, "x")
    assert [name for name, _, _ in asked] == ["auth", "getJwt", "createModelRepository"]
    _, body, authorization = asked[2]
    assert authorization == "jwt-canary"
    assert (body["name"], body["license"], body["publicStatus"]) == ("xiaoxing", "mit", 1)
    assert tree(hub.pull("openxlab:user/xiaoxing")) == wanted(files)


@pytest.mark.parametrize("kept", ["environment", "login"])
@pytest.mark.parametrize("said", ["503", "wrong ak-canary"])
def test_the_openxlab_package_says_no(server, package, world, openxlab, monkeypatch, said, kept):
    """Its service may repeat the key that it was sent."""
    redirect("openxlab", server)
    no = {"msgCode": "A0202", "msg": said, "traceId": "t"}
    answer = (b"sorry", 503) if said == "503" else ({"msgCode": "10000", "msg": "ok", "data": no},)
    server.rules.append(lambda handler: handler.path.startswith("/api/v1/") and not handler.answer(*answer))
    keys(world, openxlab, server, monkeypatch)
    if kept == "login":
        logged_in = {name.lower()[-2:]: os.environ[name] for name in ("OPENXLAB_AK", "OPENXLAB_SK")}
        (mkdir(world / "home" / ".openxlab") / "config.json").write_text(json.dumps(logged_in, indent=4))
        for name in ("OPENXLAB_AK", "OPENXLAB_SK"):
            monkeypatch.delenv(name)
    files = {**package, "metafile.yml": transfer.source(yaml.safe_dump(META).encode())}
    with pytest.raises(UserError) as caught:
        hub.publish("openxlab:user/xiaoxing", files, "x")
    assert "OpenXLab's API did not make it: " in str(caught.value)
    assert said.replace("ak-canary", "***") in str(caught.value)
    assert "Open https://openxlab.org.cn/models/create, type xiaoxing as its name" in str(caught.value)
    assert "canary" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- proxies


@pytest.mark.parametrize("how", ["environment", "git"])
def test_through_a_proxy(server, package, monkeypatch, how):
    """To a host that only the proxy knows."""
    server.make("user/x")
    server.users = {}
    monkeypatch.delenv("NO_PROXY")
    if how == "git":
        git("config", "--global", "http.http://hub.invalid.proxy", server.url)
    else:
        monkeypatch.setenv("http_proxy", server.url)
    hub.publish("git+http://hub.invalid/user/x.git", package, "x")
    assert tree(hub.pull("git+http://hub.invalid/user/x.git")) == wanted(package)
    assert server.proxied == {"hub.invalid"}


def test_hugging_face_through_a_proxy(hf, package, monkeypatch):
    import huggingface_hub

    hub.publish("hf:user/x", package, "x")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    template = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", hf.url)
    huggingface_hub.close_session()
    try:
        assert tree(hub.pull("hf:user/x")) == wanted(package)
    finally:
        huggingface_hub.close_session()
    assert hf.proxied == {"hub.invalid"}


# ------------------------------------------------------------------------------------------------------------------ ssh


def test_over_ssh(server, package, world, monkeypatch):
    """Git's own transport and git-lfs-authenticate; a script in ssh's place runs on this machine what it is asked to."""
    bare = server.make("user/x")
    coded = base64.b64encode(b"user:git-canary-token").decode()
    said = {"href": f"{server.url}/user/x.git/info/lfs", "header": {"Authorization": f"Basic {coded}"}}
    for name, text in {
        "ssh": '#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n',
        "git-lfs-authenticate": f"#!/bin/sh\necho \"$@\" >> {world}/asked\necho '{json.dumps(said)}'\n",
    }.items():
        (mkdir(world / name) / name).write_text(text)
        (world / name / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{world}/git-lfs-authenticate:{os.environ['PATH']}")
    monkeypatch.setenv("GIT_SSH_COMMAND", f"{world}/ssh/ssh")
    monkeypatch.setenv("GIT_SSH_VARIANT", "ssh")
    hub.publish(f"git+ssh://git@example.com{bare}", package, "x")
    assert tree(hub.pull(f"git+ssh://git@example.com{bare}")) == wanted(package)
    assert (world / "asked").read_text().splitlines() == [f"{bare} upload", f"{bare} download"]
