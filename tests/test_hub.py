"""References -> folders: local ones in place, repositories into the shared cache; what is refused, and why."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import with_manifest
from filelock import FileLock
from servers import closed_port, commit, git, mkdir, tree

import finetune
from finetune import embedded, hub, places, transfer
from finetune.errors import UserError

ROOT = Path(hub.__file__).parents[1]


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


@pytest.mark.parametrize(
    "ref",
    [
        "dir:no/where",
        "dir:",
        "dir:hf:user/name",
        "dir:~nobody-such/x",
        "dir:" + "x" * 5000,
    ],
)
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
        ),
        *(
            "https://example.com/user/name",
            "./name",
            "../name",
            "~nobody-such/x",
            "/no/where",
            "用户/模型",
            "user/name\n",
            "x" * 5000,
            "a\0b",
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


# ------------------------------------------------------------------------------------------- a local folder's manifest


@pytest.fixture
def made(world, package) -> Path:
    """A folder that was published to."""
    hub.publish(f"dir:{world}/made", package, "x")
    return world / "made"


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_folder_is_compared_with_its_manifest_once(made, monkeypatch):
    assert hub.pull(str(made)) == made
    monkeypatch.setattr(transfer, "hash_for", lambda *_: pytest.fail("read again"))
    assert hub.pull(str(made)) == made


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda f: rewrite(f / "model.safetensors", b"!" + (f / "model.safetensors").read_bytes()[1:]),
            "its bytes have changed",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors has 100 bytes, and"),
        (
            lambda f: rewrite(f / "model.safetensors", POINTER),
            "model.safetensors is a Git LFS pointer, not the file itself",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (
            lambda f: (f / "pytorch_model.bin").touch(),
            "pytorch_model.bin was not published with the model and can run code",
        ),
        (lambda f: rewrite(f / "manifest.json", POINTER), None),
        (
            lambda f: rewrite(f / "manifest.json", b'{"format_hash": 1, "files": {"x": 1}}'),
            "its manifest.json is broken",
        ),
    ],
    ids=["a byte", "cut", "a pointer", "missing", "a pickle", "no manifest", "a broken manifest"],
)
def test_a_spoilt_folder_is_refused_by_name(made, spoil, words):
    hub.pull(str(made))
    spoil(made)
    if words is None:  # it is no JSON of ours: an ordinary folder, which whoever loads it checks
        with pytest.raises(UserError, match=r"its manifest\.json is a Git LFS pointer"):
            hub.pull(str(made))
        return
    with pytest.raises(UserError, match=re.escape(words)):
        hub.pull(str(made))


def test_a_changed_byte_in_a_folder_is_mended_by_publishing_again(made, package, capfd):
    wanted = tree(made)
    rewrite(made / "model.safetensors", b"!" + (made / "model.safetensors").read_bytes()[1:])
    with pytest.raises(UserError, match=r"its bytes have changed: publish or copy it again"):
        hub.pull(str(made))
    hub.publish(f"dir:{made}", package, "x")
    assert "Sent 1 files" in capfd.readouterr().err
    assert tree(made) == wanted
    assert hub.pull(str(made)) == made


def test_a_folder_that_does_not_keep_what_it_is_sent_is_told(world, package, monkeypatch):
    def spoil(place, files, remove, message, progress):
        fill(place, files, remove, message, progress)
        rewrite(world / "stick" / "config.json", b"!" * package["config.json"].size)

    fill = places.send
    monkeypatch.setattr(places, "send", spoil)
    with pytest.raises(UserError, match=r"took the files and now records others for config\.json: publish again"):
        hub.publish(f"dir:{world}/stick", package, "x")


# ------------------------------------------------------------------------------------------------------- a repository


@pytest.fixture
def foreign(hf, tiny_model, world):
    """user/tiny, made by others: no manifest, and much that is not to be fetched."""
    folder = mkdir(world / "foreign")
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("pytorch_model.bin", "modeling_evil.py", "onnx/config.json", "checkpoint-1/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    hf.tags["user/tiny"] = {"v1": hf.put("user/tiny", folder)}
    return hf


def test_a_repository_is_fetched_once(foreign, tiny_model):
    folder = finetune.pull("hf:user/tiny@v1")
    wanted = sorted(["README.md", *(file.name for file in tiny_model.iterdir())])
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == wanted  # no pickles, no code
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert len(foreign.sent) == len(wanted)

    foreign.sent.clear()
    assert hub.pull("user/tiny") == hub.pull("hf:user/tiny@v1") == folder
    assert not foreign.sent
    foreign.seen.clear()
    assert hub.pull(f"hf:user/tiny@{folder.name}") == folder  # a commit does not change: nothing is asked
    assert not foreign.seen


def test_a_damaged_cache_is_mended(foreign):
    folder = hub.pull("hf:user/tiny")
    before = tree(folder)
    rewrite(folder / "model.safetensors", b"short")  # the blob too, they are one file
    assert tree(hub.pull("hf:user/tiny")) == before


def test_offline_and_unreachable_give_what_was_fetched_last(foreign, monkeypatch, capfd):
    folder = hub.pull("hf:user/tiny")
    monkeypatch.setenv("NAMESAKE_OFFLINE", "1")
    foreign.seen.clear()
    assert hub.pull("hf:user/tiny") == folder
    assert not foreign.seen
    with pytest.raises(
        UserError,
        match=r"hf:user/other is not a folder here and could not be fetched from the Hugging Face Hub: offline mode is on",
    ):
        hub.pull("hf:user/other")
    monkeypatch.delenv("NAMESAKE_OFFLINE")
    foreign.rules.append(lambda handler: not handler.answer(b"on fire", 500))
    assert hub.pull("hf:user/tiny") == folder
    assert "HTTP 500" in capfd.readouterr().err


def test_what_the_hub_does_not_have(foreign):
    with pytest.raises(
        UserError, match=r"hf:user/other: there is no such repository, it is empty, or you may not see it"
    ):
        hub.pull("hf:user/other")
    with pytest.raises(UserError, match=r"hf:user/tiny@v2: .*Check the name and the revision"):
        hub.pull("hf:user/tiny@v2")


def test_a_hub_that_does_not_answer(world, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(
        UserError, match=r"could not be fetched from the Hugging Face Hub: .*Connection refused"
    ) as caught:
        hub.pull("hf:user/tiny")
    assert "HF_ENDPOINT" in str(caught.value)


def test_the_first_source_that_answers(foreign, server):
    folder, failed = hub.pull_first([f"git+{server.url}/user/gone.git", "hf:user/other", "hf:user/tiny"])
    assert folder == hub.pull("hf:user/tiny")
    assert [reason.partition(": ")[0] for reason in failed] == [f"git+{server.url}/user/gone.git", "hf:user/other"]
    with pytest.raises(UserError) as caught:
        hub.pull_first(["hf:user/other", "dir:/no/where"])
    assert len(caught.value.problems) == 2


PULL = "import sys; from finetune import pull; print(pull(sys.argv[1], progress=lambda done, total: None))"


def test_many_processes_at_once_fetch_once(server, package):
    server.make("user/x")
    server.users = {}
    ref = f"git+{server.url}/user/x.git"
    hub.publish(ref, package, "x")

    def one(_: int) -> str:
        command = [sys.executable, "-c", PULL, ref]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout.strip()

    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(one, range(4)))
    assert tree(Path(folder)) == {name: source.sha256 for name, source in package.items()}
    assert sum(server.sent.values()) == package["model.safetensors"].size


def test_who_waits_for_another_process_is_told(foreign, world, monkeypatch):
    """Of a file that it fetches; a lock that is free is taken in silence."""
    weights = foreign.files("user/tiny", "v1")[1]["model.safetensors"]
    mkdir(world / "cache" / "hub" / "blobs")
    other, said = FileLock(world / "cache" / "hub" / "blobs" / f"sha256-{weights}.lock"), []
    other.acquire()
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0)
    monkeypatch.setattr(embedded, "say", lambda text: (said.append(text), other.release()))
    hub.pull("hf:user/tiny")
    (told,) = said
    assert told.startswith("Another process is fetching hf:user/tiny: model.safetensors; waiting for it ...")


# ----------------------------------------------------------------------------------------- repositories that mean harm


BAD = ["../x.json", "a/../../x.json", "/etc/x.json", "a\\..\\x.json", ".git/config", "a//b.json", "x\n.json", "x\u202egnp.json",
       "con:.json", "a/.", "x" * 500]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_write_elsewhere_or_hide(hf, package, name, world):
    hf.commit("user/x", {**{n: hf.add(read(s)) for n, s in package.items()}, name: hf.add(b"{}")})
    with pytest.raises(UserError, match=r"is refused: it could write elsewhere or hide"):
        hub.pull("hf:user/x")
    assert not list((world / "cache").rglob("*.json"))


def test_a_manifest_that_names_elsewhere(hf, package):
    files = with_manifest({**package, "../x.json": transfer.source(b"{}")})
    hf.commit("user/x", {n: hf.add(read(s)) for n, s in files.items() if ".." not in n})
    with pytest.raises(UserError, match=r"could write elsewhere"):
        hub.pull("hf:user/x")


def test_two_names_that_are_one_on_some_disks(hf):
    hf.commit("user/x", {"Config.json": hf.add(b"{}"), "config.json": hf.add(b"[]")})
    with pytest.raises(UserError, match=r"are one file on some disks"):
        hub.pull("hf:user/x")


def test_a_file_that_is_a_folder_too(hf, world):
    hf.commit("user/x", {"config.json": hf.add(b"{}"), "config.json/x.json": hf.add(b"[]")})
    with pytest.raises(UserError, match=r"'config\.json/x\.json' is refused"):
        hub.pull("hf:user/x")


@pytest.mark.parametrize(
    "key, value",
    [
        ("sha", "../../../../home/mine"),
        ("sha", None),
        ("blobId", "x/../../../home/mine/y"),
        ("oid", "x/../../../home/mine/y"),
        ("size", None),
        ("size", -1),
    ],
)
def test_a_hub_whose_record_is_a_path(hf, package, world, key, value):
    """It would name a folder of the cache, which is emptied first."""
    (mkdir(world / "home" / "mine") / "letter").write_text("dear")
    made = hf.commit("user/x", {n: hf.add(read(s)) for n, s in package.items()})

    def lie(handler) -> bool:
        if "/api/models/user/x" not in handler.path:
            return False
        entries = [handler_entry(hf, n, s) for n, s in package.items()]
        for entry in entries:
            told = entry["lfs"] if key == "oid" and "lfs" in entry else entry
            told |= {key: value, "sha256": value} if key == "oid" else {key: value}
        return not handler.answer({"id": "user/x", "sha": value if key == "sha" else made, "siblings": entries})

    hf.rules.append(lie)
    with pytest.raises(UserError, match=r"hf:user/x: the hub's record of .* is broken, which is refused"):
        hub.pull("hf:user/x")
    assert tree(world / "home") == {"mine/letter": transfer.source(b"dear").sha256}


def handler_entry(hf, name: str, source) -> dict:
    from servers import HubHandler

    handler = HubHandler.__new__(HubHandler)
    handler.server = hf
    return handler.entry(name, source.sha256)


def test_what_unpacks_from_nothing(server, world, monkeypatch):
    """A gigabyte of zeros is a megabyte to fetch, where it lies in git itself."""
    monkeypatch.setattr("finetune.gitlfs.LARGEST_IN_GIT", 1000)
    bare = server.make("user/x")
    git("init", "-q", "-b", "main", cwd=mkdir(world / "mine"))
    (world / "mine" / "config.json").write_bytes(b"\0" * 1001)
    commit(world / "mine", f"file://{bare}")
    with pytest.raises(UserError, match=r"'config\.json' has 1001 bytes in git itself .* refused"):
        hub.pull(f"git+file://{bare}")


def test_a_tree_that_git_cannot_read(server, world):
    """What of it was read is not taken for the whole."""
    bare = server.make("user/x")
    one = subprocess.run(
        ["git", "-C", bare, "hash-object", "-w", "--stdin"], input="{}", capture_output=True, text=True
    )
    below = make_tree(bare, f"100644 blob {one.stdout.strip()}\tx.json\n")
    top = make_tree(bare, f"100644 blob {one.stdout.strip()}\tconfig.json\n040000 tree {below}\tz\n")
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    made = git("-C", str(bare), *who, "commit-tree", top, "-m", "x").strip()
    git("-C", str(bare), "update-ref", "refs/heads/main", made)
    ref = f"git+file://{bare}"
    hub.pull(ref)
    for file in (world / "cache" / "hub" / "git").rglob(f"{below[2:]}"):
        file.unlink()
    assert not list((world / "cache" / "hub" / "git").rglob("*.pack"))
    with pytest.raises(UserError, match=r"was damaged, by a power cut"):
        hub.pull(ref)


def test_ten_thousand_files(hf, server, world):
    one = hf.add(b"{}")
    hf.commit("user/x", {f"{i}.json": one for i in range(10_000)})
    bare = server.make("user/x")
    blob = subprocess.run(
        ["git", "-C", bare, "hash-object", "-w", "--stdin"], input="{}", capture_output=True, text=True
    )
    lines = "".join(f"100644 blob {blob.stdout.strip()}\t{i}.json\n" for i in range(100))
    below = make_tree(bare, lines)
    for _ in range(4):  # a hundred to the power of five names from six objects
        below = make_tree(bare, "".join(f"040000 tree {below}\t{i}\n" for i in range(100)))
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    made = git("-C", str(bare), *who, "commit-tree", below, "-m", "x").strip()
    git("-C", str(bare), "update-ref", "refs/heads/main", made)
    for ref in ("hf:user/x", f"git+file://{bare}"):
        with pytest.raises(UserError, match=r"has more than 2000 files, which is refused"):
            hub.pull(ref)


def make_tree(bare: Path, lines: str) -> str:
    done = subprocess.run(["git", "-C", bare, "mktree"], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret", "config.json"])
def test_a_symbolic_link(server, world, target):
    bare = server.make("user/x")
    work = mkdir(world / "mine")
    git("init", "-q", "-b", "main", cwd=work)
    (work / "config.json").write_text("{}")
    (work / "model.safetensors").symlink_to(target)
    commit(work, f"file://{bare}")
    with pytest.raises(UserError, match=r"'model.safetensors' is a symbolic link, which is refused"):
        hub.pull(f"git+file://{bare}")


def read(source) -> bytes:
    with source.open() as file:
        return file.read()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pkl", "adapter/x.PT", "optimizer.ckpt"])
def test_an_extra_pickle_beside_a_manifest(hf, package, name):
    hf.commit("user/x", {**{n: hf.add(read(s)) for n, s in package.items()}, name: hf.add(b"\x80\x02")})
    with pytest.raises(UserError, match=f"{name} was not published with the model and can run code: refused"):
        hub.pull("hf:user/x")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_x.py", ".env", "run.sh"])
def test_a_manifest_with_code(hf, package, name):
    files = with_manifest({**{n: s for n, s in package.items() if n != "manifest.json"}, name: transfer.source(b"x")})
    hf.commit("user/x", {n: hf.add(read(s)) for n, s in files.items()})
    with pytest.raises(UserError, match=f"{name} is in the manifest and of a kind that can run code"):
        hub.pull("hf:user/x")


def test_everything_wrong_is_told_at_once(hf, package):
    there = {n: hf.add(read(s)) for n, s in package.items() if n != "tokenizer.json"}
    there["model.safetensors"] = hf.add(b"!" * package["model.safetensors"].size)
    there["config.json"] = hf.add(b"{}")
    hf.commit("user/x", {**there, "x.pkl": hf.add(b"")})
    with pytest.raises(UserError) as caught:
        hub.pull("hf:user/x")
    told = sorted(re.sub("hf:user/x: | .*", "", problem) for problem in caught.value.problems)
    assert told == ["config.json", "model.safetensors", "tokenizer.json", "x.pkl"]
    assert hf.sent.keys() == {there["manifest.json"]}  # nothing was fetched for it


def test_a_pointer_where_the_file_should_be(hf, package):
    files = {n: s for n, s in package.items() if n != "manifest.json"}
    told = with_manifest({**files, "config.json": files["config.json"]._replace(size=len(POINTER))})
    hf.commit("user/x", {n: hf.add(POINTER if n == "config.json" else read(s)) for n, s in told.items()})
    with pytest.raises(UserError, match=r"config\.json is a Git LFS pointer, not the file itself, and is refused"):
        hub.pull("hf:user/x")


def test_the_object_of_a_pointer_is_gone(server, package):
    server.make("user/x")
    server.users = {}
    ref = f"git+{server.url}/user/x.git"
    hub.publish(ref, package, "x")
    server.object(package["model.safetensors"].sha256).unlink()
    with pytest.raises(
        UserError, match=r"the object [0-9a-f]{16}\.\.\. is missing on the LFS server: publish it again"
    ):
        hub.pull(ref)


def test_a_body_that_does_not_end_or_is_compressed(hf, package):
    import gzip

    hf.commit("user/x", {n: hf.add(read(s)) for n, s in package.items()})

    def bomb(handler) -> bool:
        if not handler.path.endswith("model.safetensors"):
            return False
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        while True:
            handler.wfile.write(b"\0" * (1 << 20))

    hf.rules.append(bomb)
    with pytest.raises(UserError, match=r"model.safetensors is longer than its [0-9]+ bytes and is refused"):
        hub.pull("hf:user/x")
    packed = gzip.compress(b"\0" * (1 << 24))
    hf.rules[0] = lambda h: h.path.endswith("model.safetensors") and not h.answer(packed, Content_Encoding="gzip")
    with pytest.raises(UserError, match=r"answers compressed, which was not asked for and is refused"):
        hub.pull("hf:user/x")


def test_a_manifest_of_gigabytes(hf, package):
    there = {n: hf.add(read(s)) for n, s in package.items()}
    hf.commit("user/x", {**there, "manifest.json": hf.add(b" " * (5 << 20))})
    with pytest.raises(UserError, match=r"its manifest.json has 5242880 bytes, which is refused"):
        hub.pull("hf:user/x")
    assert not hf.sent


def test_verify_needs_witnesses(made):
    with pytest.raises(UserError, match=r"brings no witnesses"):
        hub.verify(made)


@pytest.mark.parametrize(
    "witnesses", [{"a": 1}, [1], [{"messages": "x", "ids": [1]}], [{"messages": [{"role": "user"}]}]]
)
def test_witnesses_that_are_none(made, witnesses):
    manifest = json.loads((made / "manifest.json").read_text())
    rewrite(made / "manifest.json", json.dumps({**manifest, "witnesses": witnesses}).encode())
    with pytest.raises(UserError, match=r"its witnesses are broken"):
        hub.verify(made)


def test_a_manifest_of_another_program_is_no_matter(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    assert hub.pull(str(tmp_path)) == tmp_path
