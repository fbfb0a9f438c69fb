"""Publish a model and pull one: the two verbs, the same for every kind of place, with a proof each way.

What is published carries a manifest.json: the length and sha256 of every file, and a few witnesses, which are questions with
the greedy token ids that the scored model answered. What is pulled is compared with it while it streams to the disk, and
lies in a cache that processes share:

    $NAMESAKE_CACHE/hub/blobs/DIGEST          a file's bytes by their digest; DIGEST.part while they arrive
                        snapshots/REPO/COMMIT a folder of links to them
                        refs/REPO/REVISION    the commit that a name stood for when last asked
"""

import contextlib
import fnmatch
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from finetune import places, transfer
from finetune.chat_format import check_messages, text_of
from finetune.embedded import cache_dir, locked, say
from finetune.errors import UserError
from finetune.gitlfs import File, Listing
from finetune.places import MANIFEST, Place
from finetune.transfer import Source, Unreachable, plain

# What an ordinary model needs; never pickles, never code.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "README.md"]
KINDS = {
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".md",
    ".jsonl",
    ".txt",
    ".yml",
    ".png",
}  # all that a manifest may name
PICKLES = {
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".joblib",
    ".dill",
    ".npy",
    ".npz",
    ".h5",
    ".keras",
    ".msgpack",
}
LONGEST_MANIFEST = 4 << 20
LFS_POINTER = b"version https://git-lfs"


# ------------------------------------------------------------------------------------------------------------------ pull


def pull(ref: str, *, progress: Callable[[int, int], object] | None = None) -> Path:
    """The folder that a reference names, fetched into the shared cache where it must be; a local folder is itself.

    A repository with a manifest.json is compared with it, byte for byte, as it arrives; of another one the usual model
    files are taken, compared with the place's own record. `progress(bytes here, bytes in all)` is called instead of
    drawing a bar. HF_HUB_OFFLINE or NAMESAKE_OFFLINE set to 1, or a place that does not answer: what was fetched last.

    Raises UserError: every file that is missing, changed, cut, a pointer, or not to be trusted, by name.
    """
    if (folder := _local(ref)) is not None:
        return _check_local(folder)
    place = places.parse(ref)
    if place.kind == "dir":
        if ref.startswith("dir:"):
            raise UserError(f"{place.name!r} is not a folder; check its spelling.")
        raise UserError(places.NO_REFERENCE.format(ref))
    repo = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', place.name)[-80:]}-{transfer.source(place.name.encode()).sha256[:8]}"
    snapshots = cache_dir() / "hub" / "snapshots" / repo
    named = cache_dir() / "hub" / "refs" / repo / quote(place.revision or "HEAD", safe="")
    revision = place.revision or ""
    if re.fullmatch("[0-9a-f]{40}", revision) and _is_whole(snapshots / revision):
        return snapshots / revision  # a commit does not change
    if _offline():
        return _earlier(place, snapshots, named, "offline mode is on")
    try:
        listing = places.listing(place)
        if listing is None:
            raise UserError(
                f"{ref}: there is no such repository, it is empty, or you may not see it. Check the name and log in."
            )
        target = snapshots / listing.revision
        if not _is_whole(target):
            _fetch(place, listing, target, progress)
    except Unreachable as error:
        folder = _earlier(place, snapshots, named, str(error))
        say(f"Note: {error} Using what was fetched earlier: {folder}")
        return folder
    named.parent.mkdir(parents=True, exist_ok=True)
    _write(named, listing.revision.encode())
    return target


def several(refs: str) -> list[str]:
    """The references in "a,b,c"; a folder may have a comma in its name."""
    return [refs] if os.path.lexists(refs) else [ref.strip() for ref in refs.split(",")]


def pull_first(refs: list[str], one: Callable[[str], Any] = pull) -> tuple[Any, list[str]]:
    """`one` of the first reference that can be had, and what was wrong with those before it. Raises UserError with all
    reasons when none can; Unreachable where one may answer later."""
    failed: list[str] = []
    kind = UserError
    for ref in refs:
        try:
            return one(ref), failed
        except UserError as error:
            failed.append(" ".join(error.problems))  # each names its reference
            kind = Unreachable if isinstance(error, Unreachable) else kind
    raise kind(*failed)


def _local(ref: str) -> Path | None:
    name = ref.removeprefix("dir:")
    try:
        path = Path(name).expanduser()
        exists = bool(name) and path.exists()
    except (OSError, RuntimeError, ValueError):  # no file can have that name, or we may not look
        exists = False
    if exists and not path.is_dir():
        raise UserError(f"{name!r} is not a folder; check its spelling.")
    return path.resolve() if exists else None


def _offline() -> bool:
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "NAMESAKE_OFFLINE")
    )


def _earlier(place: Place, snapshots: Path, named: Path, why: str) -> Path:
    """The snapshot that the reference meant when the place was last asked."""
    if named.is_file() and _is_whole(folder := snapshots / named.read_text()):
        return folder
    hub = "the Hugging Face Hub" if place.kind == "hf" else plain(place.name)
    raise Unreachable(
        f"{place.ref} is not a folder here and could not be fetched from {hub}: {plain(why)}. Check the name and the connection "
        "(HTTPS_PROXY, HF_ENDPOINT), or give a local folder."
    )


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot still has all its files with their lengths."""
    try:
        sizes = json.loads((folder.parent / f"{folder.name}.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _fetch(place: Place, listing: Listing, target: Path, progress: Callable[[int, int], object] | None) -> None:
    files = listing.files
    check_names(place.ref, files)
    manifest = None
    if MANIFEST in files:
        if files[MANIFEST].size > LONGEST_MANIFEST:
            raise UserError(f"{place.ref}: its {MANIFEST} has {files[MANIFEST].size} bytes, which is refused.")
        blob = _blob(files[MANIFEST], f"{place.ref}: {MANIFEST}", lambda n: None)
        manifest = read_manifest(blob.read_bytes(), place.ref)
    if manifest is not None:
        chosen = check_manifest(place.ref, manifest, files)
        chosen[MANIFEST] = files[MANIFEST]
    else:
        chosen = {n: f for n, f in files.items() if "/" not in n and any(fnmatch.fnmatchcase(n, p) for p in FILES)}
    if not chosen:
        raise UserError(f"{place.ref} holds no model: none of its {len(files)} files is {', '.join(FILES)}.")
    blobs = cache_dir() / "hub" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    missing = sum(f.size for f in chosen.values() if not _blob_path(f).exists())
    if missing > (free := shutil.disk_usage(blobs).free):
        raise UserError(
            f"{place.ref} needs {missing / 1e6:.0f} MB more in {cache_dir()} and its disk has {free / 1e6:.0f} MB free; free "
            "some space or set NAMESAKE_CACHE to a folder on another disk."
        )
    with _bar(f"Pulling {place.ref}", sum(f.size for f in chosen.values()), progress) as advance:
        there = {name: _blob(file, f"{place.ref}: {name}", advance) for name, file in chosen.items()}
    _link(there, {name: file.size for name, file in chosen.items()}, target)


def _blob_path(file: File) -> Path:
    return cache_dir() / "hub" / "blobs" / file.digest.replace(":", "-")


def _blob(file: File, where: str, advance: transfer.Progress) -> Path:
    """The file's bytes in the cache. Of processes that want the same one, one fetches it."""
    blob = _blob_path(file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with locked(f"{blob}.lock", f"fetching {where}"):
        if not (blob.is_file() and blob.stat().st_size == file.size):
            part = Path(f"{blob}.part")
            transfer.receive(file.open, part, file.size, file.digest, where, advance)
            part.chmod(0o444)  # it is linked from many folders
            part.replace(blob)
        else:
            advance(file.size)
    return blob


def _link(blobs: dict[str, Path], sizes: dict[str, int], target: Path) -> None:
    """The snapshot folder, there as a whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(f"{target}.lock", f"laying out {target}"):
        if _is_whole(target):
            return
        new = target.with_name(f".{target.name}.new")
        for left in (target, new):
            shutil.rmtree(left, ignore_errors=True)
        for name, blob in blobs.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(blob, new / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(blob, new / name)
        new.rename(target)
        _write(target.parent / f"{target.name}.json", json.dumps(sizes).encode())


def _write(path: Path, data: bytes) -> None:
    descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    Path(new).replace(path)


@contextlib.contextmanager
def _bar(what: str, total: int, progress: Callable[[int, int], object] | None) -> Iterator[transfer.Progress]:
    """A function that takes bytes; on a terminal a bar with size, speed and time left."""
    if progress is None:
        with tqdm(total=total, unit="B", unit_scale=True, desc=what, miniters=1, mininterval=0.2) as bar:
            yield bar.update
        return
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    yield advance


# ------------------------------------------------------------------------------------------------------------- what may be


def check_names(where: str, names: Any) -> None:
    """Raises UserError for names that could do harm on a disk, all of them."""
    if len(names) > places.MOST_FILES:
        raise UserError(f"{where} has {len(names)} files, more than {places.MOST_FILES}, which is refused.")
    problems = []
    folded: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if (
            not name
            or len(name.encode(errors="replace")) > 400
            or any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for c in name)
            or any(c in name for c in '\\:*?"<>|')
            or any(
                p in ("", ".", "..") or p.lower() == ".git" or p[-1] in " ." or len(p.encode(errors="replace")) > 255
                for p in parts
            )
            or any("/".join(parts[:i]) in names for i in range(1, len(parts)))  # a file that is a folder too
        ):
            problems.append(
                f"{where}: the file name {plain(ascii(name))} is refused: it could write elsewhere or hide."
            )
        elif (other := folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            problems.append(
                f"{where}: {plain(ascii(name))} and {plain(ascii(other))} are one file on some disks, refused."
            )
    if problems:
        raise UserError(*problems[:20])


def read_manifest(data: bytes, where: str) -> dict[str, Any] | None:
    """A manifest of ours; None for another program's manifest.json. Raises UserError for a broken one."""
    try:
        manifest = json.loads(data)
        if not isinstance(manifest, dict) or "files" not in manifest or "format_hash" not in manifest:
            return None
        for name, entry in manifest["files"].items():
            if not (
                type(entry["size"]) is int and entry["size"] >= 0 and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
            ):
                raise ValueError(f"the entry of {name}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if data.startswith(LFS_POINTER):
            raise UserError(
                f"{where}: its {MANIFEST} is a Git LFS pointer, not the file itself: publish it again."
            ) from None
        raise UserError(f"{where}: its {MANIFEST} is broken ({plain(error)}): publish it again.") from None
    return manifest


def check_manifest(where: str, manifest: dict[str, Any], files: dict[str, File]) -> dict[str, File]:
    """The manifest's files as they must be, after comparing it with the place's record. Raises UserError with all that
    is missing, changed or not to be there."""
    check_names(where, manifest["files"])
    problems, chosen = [], {}
    for name, entry in manifest["files"].items():
        wanted = f"sha256:{entry['sha256']}"
        if PurePosixPath(name).suffix.lower() not in KINDS and name != "LICENSE":
            problems.append(
                f"{where}: {name} is in the manifest and of a kind that can run code or is not a model's: refused."
            )
        elif name not in files:
            problems.append(f"{where}: {name} is missing: publish it again.")
        elif files[name].size != entry["size"]:
            problems.append(
                f"{where}: {name} has {files[name].size} bytes, and {entry['size']} were published: publish it again."
            )
        elif files[name].digest.startswith("sha256:") and files[name].digest != wanted:
            problems.append(
                f"{where}: {name} is not the file that was published: {files[name].digest}, expected {wanted}: publish it "
                "again."
            )
        else:
            chosen[name] = files[name]._replace(digest=wanted)
    extra = sorted(n for n in files if n not in manifest["files"] and PurePosixPath(n).suffix.lower() in PICKLES)
    problems += [f"{where}: {name} was not published with the model and can run code: refused." for name in extra]
    if problems:
        raise UserError(*problems)
    return chosen


def _check_local(folder: Path) -> Path:
    """A folder here is used in place. With a manifest, its files are compared with it, read once: again only when one's
    length, time or place on the disk changes."""
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > LONGEST_MANIFEST or _snapshot(folder):
        return folder
    if (manifest := read_manifest(path.read_bytes(), str(folder))) is None:
        return folder
    names = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    judged = {n for n in names if n in manifest["files"] or n == MANIFEST or PurePosixPath(n).suffix.lower() in PICKLES}
    stats = {n: names[n].stat() for n in judged}
    seen = transfer.source(
        repr([(n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in sorted(stats.items())]).encode()
    ).sha256
    record = cache_dir() / "hub" / "checked" / transfer.source(str(folder).encode()).sha256
    if record.is_file() and record.read_text() == seen:
        return folder
    files = {n: File(f.stat().st_size, "", places.file_opener(f)) for n, f in names.items()}
    problems = []
    try:
        chosen = check_manifest(str(folder), manifest, files)
    except UserError as error:
        problems, chosen = error.problems, {}
        for name in set(manifest["files"]) & set(names):
            with names[name].open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    problems = [p for p in problems if f": {name} has " not in p]
                    problems.append(
                        f"{folder}: {name} is a Git LFS pointer, not the file itself: run 'git lfs pull' there."
                    )
    for name, file in chosen.items():
        if _digest(file) != file.digest:
            problems.append(
                f"{folder}: {name} is not the file that the manifest names, its bytes have changed: publish or copy it again."
            )
    if problems:
        raise UserError(*problems)
    with contextlib.suppress(OSError):  # somebody else's cache: it is only slower
        record.parent.mkdir(parents=True, exist_ok=True)
        _write(record, seen.encode())
    return folder


def _snapshot(folder: Path) -> bool:
    """Whether it is a folder of our cache, which was compared when it was made."""
    return (cache_dir() / "hub" / "snapshots").resolve() in folder.parents


# --------------------------------------------------------------------------------------------------------------- verify


def verify(folder: Path, base_ref: str | None = None) -> int:
    """Ask the witnesses' questions of the model in `folder` here: their number, all answered with the token ids that the
    scored model gave. An adapter's base is where its record says, or at `base_ref`. Raises UserError: which differ, and
    from which token on."""
    from finetune import generation, model

    path = folder / MANIFEST
    manifest = read_manifest(path.read_bytes(), str(folder)) if path.is_file() else None
    if not (witnesses := (manifest or {}).get("witnesses")):
        raise UserError(
            f"The model in {folder} brings no witnesses, so it cannot be said whether it is the one that was scored."
        )
    alone = (folder / "config.json").is_file()
    try:
        for witness in witnesses:
            check_messages(witness["messages"], sees=True)
            if not all(type(token) is int for token in witness["ids"]):
                raise TypeError
        recorded = "" if alone else str(manifest["base"]["ref"])  # type: ignore[index]
    except (UserError, AttributeError, KeyError, TypeError):
        raise UserError(f"{folder}: its witnesses are broken, so it cannot be verified: publish it again.") from None
    if alone:
        loaded: Any = model.load(folder)
    else:
        try:
            base = model.base_folder(base_ref or recorded)
        except UserError as error:
            if base_ref:
                raise
            raise type(error)(
                f"{folder} holds an adapter alone, and its base, {plain(recorded)} by its record, is not here: give it with --base "
                "FOLDER (or hf:user/name).",
                *(error.problems if "/" in recorded else ()),  # else a local folder's name
            ) from None
        loaded = model.load_adapter(model.load(base), folder, base).get_base_model()
    form: Any = model.OwnFormat(folder, loaded)
    if model.vision_of(folder):  # whose template a tokenizer alone cannot follow
        form = model.chat_format(folder)
        model.give_eyes(loaded, form)
    prompts = [form.prompt(w["messages"]) for w in witnesses]
    answers = [
        generation.complete(loaded, [prompt], form.stop_ids, max(1, len(w["ids"])))[0].ids
        for prompt, w in zip(prompts, witnesses, strict=True)
    ]
    problems = []
    for witness, ids in zip(witnesses, answers, strict=True):
        if ids != witness["ids"]:
            same = next((i for i, (a, b) in enumerate(zip(ids, witness["ids"], strict=False)) if a != b), len(ids))
            problems.append(
                f"{folder}: to {plain(text_of(witness['messages'][-1]))!r} it answers {form.decode(ids)!r}, and the scored model "
                f"answered {form.decode(witness['ids'])!r}: {same} of {len(witness['ids'])} tokens are the same."
            )
    if problems:
        raise UserError(*problems)
    return len(witnesses)


# -------------------------------------------------------------------------------------------------------------- publish


def target(ref: str) -> Place:
    """Where to publish to; a path that is there is that folder. Raises UserError."""
    if _local(ref):
        return Place("dir", ref.removeprefix("dir:"), None, ref)
    try:
        return places.parse(ref)
    except UserError:
        if ":" in ref or not ref.strip():
            raise
        raise UserError(
            f"{ref!r} is no repo reference such as hf:user/name; for a folder that is not there yet write dir:{ref}"
        ) from None


class Changes(NamedTuple):
    """What publishing would do."""

    place: Place
    send: dict[str, Source]  # what the place lacks or has otherwise
    remove: list[str]  # of an earlier publish
    revision: str | None  # what it holds now; None where that has not the name yet that was asked for


def changes(ref: str, files: dict[str, Source]) -> Changes:
    """Compares `files` with the place's record. Raises Unreachable, and UserError for files of strangers there that `pull`
    would refuse."""
    check_names("What is to be published", files)
    place = target(ref)
    if place.kind != "dir" and _offline():
        raise UserError(
            f"{ref}: offline mode is on (HF_HUB_OFFLINE or NAMESAKE_OFFLINE); publishing needs the network."
        )
    listing = places.listing(place, default=True)
    there = listing.files if listing else {}
    send = {name: source for name, source in files.items() if not _same(there.get(name), source)}
    remove: list[str] = []
    if MANIFEST in send and MANIFEST in there and there[MANIFEST].size <= LONGEST_MANIFEST:
        with contextlib.suppress(UserError):  # a broken one: it is replaced
            data = transfer.patiently(lambda: b"".join(there[MANIFEST].open(0)[1]), ref)
            earlier = read_manifest(data, ref) or {"files": {}}
            remove = sorted(name for name in earlier["files"] if name in there and name not in files)
    strange = [n for n in there if n not in files and n not in remove and PurePosixPath(n).suffix.lower() in PICKLES]
    if strange:
        raise UserError(
            f"{ref} already holds {', '.join(sorted(map(plain, strange)))}, which can run code: remove it there first."
        )
    return Changes(place, send, remove, listing.revision if listing and listing.named else None)


def _same(there: File | None, source: Source) -> bool:
    if there is None or there.size != source.size:
        return False
    if there.digest.startswith("git:"):
        hashed = transfer.hash_for("git:", source.size)
        with source.open() as file:
            while chunk := file.read(transfer.CHUNK):
                hashed.update(chunk)
        return there.digest == f"git:{hashed.hexdigest()}"
    return (there.digest or _digest(there)) == f"sha256:{source.sha256}"


def _digest(file: File) -> str:
    hashed = transfer.hash_for("sha256:", file.size)
    for chunk in file.open(0)[1]:
        hashed.update(chunk)
    return f"sha256:{hashed.hexdigest()}"


def publish(ref: str, files: dict[str, Source], message: str) -> str:
    """Make the place hold `files`; only what changed is sent, and what an earlier publish left beside them goes. Afterwards
    the place's own record is compared with them. Of processes here that publish to one place, one does at a time. Returns its
    revision. Raises Unreachable, UserError."""
    place = target(ref)
    name = str(Path(place.name).expanduser().resolve()) if place.kind == "dir" else place.name
    lock = cache_dir() / "hub" / "publishing" / f"{transfer.source(name.encode()).sha256}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, f"publishing to {ref}"):
        return _publish(ref, files, message)


def _publish(ref: str, files: dict[str, Source], message: str) -> str:
    place, send, remove, revision = changes(ref, files)
    if not (send or remove or revision is None):
        say(f"{ref} holds it already, nothing was sent. / 内容一致，无需上传。")
        return revision
    total, began = sum(source.size for source in send.values()), time.perf_counter()
    own_bar = contextlib.nullcontext(lambda n: None)  # huggingface_hub draws its own
    with own_bar if place.kind == "hf" else _bar(f"Publishing to {ref}", total, None) as advance:
        places.send(place, send, remove, message, advance)
    say(f"Sent {len(send)} files, {total / 1e6:.1f} MB, in {time.perf_counter() - began:.0f} s.")
    listing = places.listing(place)
    there = listing.files if listing else {}
    if wrong := [name for name, source in files.items() if not _same(there.get(name), source)]:
        raise UserError(
            f"{ref} took the files and now records others for {', '.join(wrong)}: publish again; if it stays so, that place is "
            "broken."
        )
    return listing.revision


def listed(send: dict[str, Source], remove: Sequence[str]) -> list[str]:
    """What would be sent, one line each, with sizes."""
    lines = [f"send   {source.size / 1e6:10.3f} MB  {name}" for name, source in sorted(send.items())]
    lines += [f"remove {'':13}  {plain(name)}" for name in remove]
    return [*lines, f"total  {sum(source.size for source in send.values()) / 1e6:10.3f} MB"]
