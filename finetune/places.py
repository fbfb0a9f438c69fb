"""Where models are: repo references, and the five kinds of place behind them.

    openxlab:user/name  modelscope:user/name  git+URL    git and Git LFS, see finetune/gitlfs.py
    hf:user/name                                         huggingface_hub
    dir:PATH or a plain path                             a folder

each but a folder with an optional @revision. hf:spaces/user/name and modelscope:studios/user/name are these hubs' spaces. A place can do two things: `listing` says what it holds, by its own record, and
opens its files; `send` makes it hold what it is given.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from finetune import gitlfs, transfer
from finetune.errors import UserError, without_user
from finetune.gitlfs import File, Listing
from finetune.transfer import CHUNK, Opened, Passing, Progress, Source, Unreachable, keep_secret, plain

MANIFEST = "manifest.json"
NO_REFERENCE = "{!r} is neither a folder nor a repo reference such as hf:user/name; check its spelling."
MOST_FILES = 2000  # in one repository
DIGEST = re.compile("sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
HUBS = {  # git hosts: the address, where a repository is made by hand, where a token is
    "openxlab": (
        "https://code.openxlab.org.cn/{}.git",
        "https://openxlab.org.cn/models/create",
        "https://sso.openxlab.org.cn/usercenter?tab=secret",
    ),
    "modelscope": (
        "https://www.modelscope.cn/{}.git",
        "https://www.modelscope.cn/models/create",
        "https://www.modelscope.cn/my/myaccesstoken",
    ),
}
# Of the Hugging Face client: seconds to connect, and without a byte; a hub may think about a commit.
HUB_TIMEOUT = (10, 120)
SPACES = {"hf": "spaces/", "modelscope": "studios/"}  # what a space's name begins with


class Place(NamedTuple):
    kind: str  # "dir", "hf", "git", "openxlab" or "modelscope"
    name: str  # a path, user/name or spaces/user/name, or for the last three the address
    revision: str | None
    ref: str  # as it was written


def parse(ref: str) -> Place:
    """The place that a reference names. Raises UserError."""
    kind, colon, rest = ref.partition(":")
    if ref.startswith("git+"):
        return _git(ref)
    if (colon and kind == "dir") or ref.startswith(("/", "./", "../", "~")):
        return Place("dir", ref.removeprefix("dir:"), None, ref)
    if not (colon and kind in ("hf", *HUBS)):
        kind, rest = "hf", ref
    space = SPACES.get(kind, "")
    found = re.fullmatch(rf"((?:{space})?\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", rest, re.A)
    if not found or ".." in ref:
        raise UserError(NO_REFERENCE.format(without_user(ref)))
    name = found[1] if kind == "hf" else HUBS[kind][0].format(found[1])
    return Place(kind, name, found[2], ref)


def _git(ref: str) -> Place:
    path, at, revision = ref.removeprefix("git+").rpartition("@")
    if not at or not re.fullmatch(r"[\w./-]+", revision, re.A) or path.endswith(":/") or "://" not in path:
        path, revision = ref.removeprefix("git+"), ""  # an @ before the host is not a revision's
    if re.fullmatch(r"\w+://[^/]*", path):
        path, revision = ref.removeprefix("git+"), ""
    parts = urlsplit(path)
    if parts.password or parts.query or (parts.username and parts.scheme != "ssh"):
        raise UserError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: a user name, password or token in the address ends up in logs; "
            "leave it out and keep it in git's credential helper."
        )
    if parts.scheme not in ("https", "http", "ssh", "file") or not parts.path.strip("/") or ".." in revision:
        raise UserError(
            f"{plain(ref)!r} is no git remote: write git+https://, git+http://, git+ssh:// or git+file:// and its address."
        )
    return Place("git", path, revision or None, ref)


def listing(place: Place, *, default: bool = False) -> Listing | None:
    """What the place holds at its revision; None where there is nothing yet. With `default`, a revision that is not there
    is taken for the default branch. Raises Unreachable and UserError."""
    if place.kind == "dir":
        return _list_folder(Path(place.name).expanduser())
    if place.kind == "hf":
        return _list_hub(place, default)
    return gitlfs.listing(place, default=default)


def send(
    place: Place, files: dict[str, Source], remove: list[str], message: str, progress: Progress = lambda n: None
) -> None:
    """Make the place hold `files` and no longer `remove`; what else is there stays. All at once, when all has arrived.

    Raises Unreachable and UserError.
    """
    if place.kind == "dir":
        _fill_folder(Path(place.name).expanduser(), files, remove, progress)
    elif place.kind == "hf":
        _send_to_hub(place, files, remove, message)
    else:
        gitlfs.send(place, files, remove, message, progress)


# ------------------------------------------------------------------------------------------------------------ a folder


def file_opener(path: Path) -> Callable[[int], Opened]:
    def open_at(offset: int) -> Opened:
        def chunks() -> Iterator[bytes]:
            with path.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(CHUNK):
                    yield chunk

        return offset, chunks()

    return open_at


def copy(source: Source, part: Path, progress: Progress) -> None:
    """A file that lies here into `part`. Raises UserError where it is no longer what it was."""
    try:
        transfer.receive(file_opener(source.data), part, source.size, f"sha256:{source.sha256}", "it", progress)
    except UserError:
        raise UserError(transfer.HAS_CHANGED.format(source.data)) from None


def _list_folder(folder: Path) -> Listing | None:
    """A folder keeps no record: whoever compares its files reads them."""
    if not folder.is_dir():
        return None
    names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and STAGING not in f.parts]
    return Listing("", {n: File((folder / n).stat().st_size, "", file_opener(folder / n)) for n in names})


STAGING = ".namesake"  # in a folder that is being published to: files that have arrived, by their sha256


def _staged(name: str, source: Source) -> str:
    return f"{name.replace('/', '--')}-{source.sha256}"


def _fill_folder(folder: Path, files: dict[str, Source], remove: list[str], progress: Progress) -> None:
    staging = folder / STAGING
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path} leads elsewhere (a symbolic link); choose an empty or a new folder.")
    try:
        if folder.is_dir() and not (folder / MANIFEST).is_file() and {f.name for f in folder.iterdir()} - {STAGING}:
            raise UserError(f"The folder {folder} holds other files and no {MANIFEST}; choose an empty or a new one.")
        staging.mkdir(parents=True, exist_ok=True)
        for name, source in files.items():
            arrived = staging / _staged(name, source)
            if arrived.is_file():
                progress(source.size)
                continue
            part = staging / f"{arrived.name}.part"
            if isinstance(source.data, bytes):
                part.write_bytes(source.data)
                progress(source.size)
            else:
                copy(source, part, progress)
            part.rename(arrived)
        for name in sorted(files, key=lambda name: name == MANIFEST):  # it says that the others are there: last
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / _staged(name, files[name])).replace(folder / name)
        for name in remove:
            (folder / name).unlink(missing_ok=True)
        for left in staging.iterdir():
            left.unlink()
        staging.rmdir()
    except (NotADirectoryError, FileExistsError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}; choose another.") from error


# --------------------------------------------------------------------------------------------------------- Hugging Face


def _hub_work(place: Place, work: Callable[[Any], Any]) -> Any:
    """`work(HfApi())` with patience; what the client raises is told in a sentence."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    keep_secret(get_token())
    where = f"{place.ref} at {_hub_endpoint()}"

    def attempt() -> Any:
        try:
            return work(HfApi())
        except UserError:
            raise
        except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError wraps what an upload raised
            error = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            response = getattr(error, "response", None)
            status = response.status_code if isinstance(error, HfHubHTTPError) and response is not None else 0
            said = [line for line in str(error).splitlines() if line] or [type(error).__name__]
            reason = plain(next((line for line in said if " for url" in line), said[0]).removeprefix("Got: "))
            if status in transfer.PASSING:
                raise Passing(f"HTTP {status}", transfer.retry_after(response.headers)) from None
            if "xet-write-token" in str(error) and "404" in str(error):
                raise UserError(
                    f"{place.ref}: {_hub_endpoint()} has no Xet storage; set HF_HUB_DISABLE_XET=1."
                ) from None
            if type(error).__name__ in ("ReadTimeout", "WriteTimeout") and (method := error.request.method) != "GET":
                silent = f"no answer to a {method} in {HUB_TIMEOUT[1]} s"  # the client tried an upload again itself
                raise Unreachable(f"{where}: {silent}. What has arrived is kept; try again later.") from None
            if isinstance(error, json.JSONDecodeError):  # the client reads some answers before their status
                raise Passing("the answer is not the hub's, which is JSON") from None
            if not status and isinstance(error, (HTTPError, OSError)) and not isinstance(error, OfflineModeIsEnabled):
                raise Passing(f"{type(error).__name__}: {transfer.reason_of(error)}") from None
            hints = {
                401: HUB_TOKEN,
                403: HUB_TOKEN,
                404: "Check the name and the revision; a private one needs HF_TOKEN.",
            }
            raise UserError(f"{place.ref}: {reason}. {hints.get(status, '')}".strip()) from None

    return transfer.patiently(attempt, where)


@functools.cache
def _limit_hubs_waits() -> None:
    """huggingface_hub's client waits for ever by itself."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = default_client_factory()
        made.timeout = (*HUB_TIMEOUT, HUB_TIMEOUT[1], None)
        return made

    set_client_factory(client)


HUB_TOKEN = "Log in with 'hf auth login' or set HF_TOKEN to a token that may write there."  # noqa: S105


def _hub_endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _hub_repo(place: Place) -> dict[str, str]:
    """The repository as huggingface_hub's arguments."""
    name = place.name.removeprefix(SPACES["hf"])
    return {"repo_id": name, "repo_type": "model" if name == place.name else "space"}


def _list_hub(place: Place, default: bool) -> Listing | None:
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    named = True

    def ask(api: Any, revision: str | None = place.revision) -> Any:
        nonlocal named
        try:
            return api.repo_info(**_hub_repo(place), revision=revision, files_metadata=True, timeout=30)
        except RevisionNotFoundError:
            if not (default and revision):
                raise
            named = False
            return ask(api, None)
        except RepositoryNotFoundError as error:
            if error.response is not None and error.response.status_code in (401, 404):  # 401: it does not say which
                return None
            raise

    if (info := _hub_work(place, ask)) is None:
        return None
    if len(info.siblings or []) > MOST_FILES:
        raise UserError(f"{place.ref} has more than {MOST_FILES} files, which is refused.")
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    broken = f"{place.ref}: the hub's record of {{}} is broken, which is refused."
    if not gitlfs.COMMIT.fullmatch(str(info.sha)):
        raise UserError(broken.format("its revision"))
    files = {}
    for sibling in info.siblings or []:
        digest = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}"
        if not (DIGEST.fullmatch(digest) and type(sibling.size) is int and sibling.size >= 0):
            raise UserError(broken.format(plain(ascii(sibling.rfilename))))
        url = hf_hub_url(**_hub_repo(place), filename=sibling.rfilename, revision=info.sha, endpoint=_hub_endpoint())

        def open_at(offset: int, url: str = url) -> Opened:
            return transfer.open_url(url, headers, offset)

        files[sibling.rfilename] = File(sibling.size, digest, open_at)
    return Listing(info.sha, files, named)


def _send_to_hub(place: Place, files: dict[str, Source], remove: list[str], message: str) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    if not get_token():
        raise UserError(f"{place.ref}: there is no token. {HUB_TOKEN}")
    _limit_hubs_waits()
    added = [
        CommitOperationAdd(name, source.data if isinstance(source.data, bytes) else str(source.data))
        for name, source in files.items()
    ]
    changes = [*added, *(CommitOperationDelete(name) for name in remove)]
    repo = _hub_repo(place)

    def work(api: Any) -> None:
        api.create_repo(**repo, exist_ok=True, space_sdk="gradio" if repo["repo_type"] == "space" else None)
        branch, tag = "main", None
        if place.revision:
            refs = api.list_repo_refs(**repo)
            if place.revision in {ref.name for ref in refs.branches}:
                branch = place.revision
            elif place.revision in {ref.name for ref in refs.tags}:
                raise UserError(gitlfs.TAG_IS_THERE.format(place.ref, place.revision))
            else:
                tag = place.revision
        api.preupload_lfs_files(**repo, additions=added, revision=branch)  # nothing is to be seen of them yet
        for file in added:
            if file.upload_info.is_hashed and file.upload_info.sha256.hex() != files[file.path_in_repo].sha256:
                raise UserError(transfer.HAS_CHANGED.format(files[file.path_in_repo].data))
        revision = branch
        if changes:
            revision = api.create_commit(**repo, operations=changes, commit_message=message, revision=branch).oid
        if tag:
            api.create_tag(**repo, tag=tag, revision=revision)

    _hub_work(place, work)
