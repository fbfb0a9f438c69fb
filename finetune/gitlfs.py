"""Git remotes with Large File Storage: what a commit holds, its large files, and a new commit in their place.

git itself moves the small part, and nothing is ever checked out: names are read from the tree and judged first. Large files
go by the LFS protocol (git-lfs/docs/api) straight between the server and their place here, without git-lfs's second copy, its
hooks and its trust in .lfsconfig. Tokens reach git through the environment and its credential protocol, and only for the
remote's own host.
"""

import base64
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import requests

from finetune import transfer
from finetune.embedded import cache_dir, digest_of, locked, say
from finetune.errors import UserError
from finetune.transfer import CHUNK, Opened, Passing, Progress, Source, Unreachable, keep_secret, plain

if TYPE_CHECKING:
    from finetune.places import Place

LARGE = 1 << 20  # bytes; safetensors and whatever is larger goes to LFS
POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:ext-.*\n)*oid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n", re.A
)
LARGEST_IN_GIT = 1 << 28  # bytes of a file outside LFS; git packs zeros a thousand to one
COMMIT = re.compile(r"[0-9a-f]{40}")
GIT_SECONDS = 900  # for one fetch or push
STALL_SECONDS = 120  # of it without a byte; a server may think about a push for a while
LFS_JSON = "application/vnd.git-lfs+json"
TAG_IS_THERE = "{} has a version {} already, with other content; choose another name after the @."
PASSING_WORDS = (
    "early EOF|hung up|RPC failed|timed? ?out|reset by peer|returned error: (?:408|429|5\\d\\d)|Could not resolve|"
    "Couldn't connect|Connection refused|unexpected disconnect|too short|transfer closed|Empty reply|SSL_ERROR_SYSCALL|"
    "cannot lock ref|fetch first|non-fast-forward|inflate"
)
DAMAGE = "object file .* is empty|object [0-9a-f]{40} .*is corrupt|unable to read [0-9a-f]{40}|bad object [0-9a-f]{40}"


class File(NamedTuple):
    """A file of a place: by its own record "sha256:..." or, of a small one in git, "git:...", and "" of a
    folder's, which has none; `open` gives its bytes."""

    size: int
    digest: str
    open: Callable[[int], Opened]


class Listing(NamedTuple):
    """What a place holds."""

    revision: str  # a commit, which names this state for good; "" of a folder
    files: dict[str, File]
    named: bool = True  # whether the revision that was asked for is there; else this is the default branch


class Remote(NamedTuple):
    """A git remote as git sees it, and how to speak to it."""

    url: str  # after git's insteadOf
    place: "Place"
    repo: Path  # a bare repository of ours for it

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme


# --------------------------------------------------------------------------------------------------------- credentials


def credentials(place: "Place") -> tuple[str, str] | None:
    """User and token from the environment or the hub's login file; None leaves it to git's credential helpers."""
    if place.kind == "openxlab" and (token := os.environ.get("OPENXLAB_TOKEN")):
        return os.environ.get("OPENXLAB_USERNAME") or place.ref.partition(":")[2].partition("/")[0], token.strip()
    if place.kind == "modelscope":
        login = Path("~/.modelscope/credentials/git_token").expanduser()
        token = os.environ.get("MODELSCOPE_API_TOKEN") or (login.read_text() if login.is_file() else "")
        return ("oauth2", token.strip()) if token.strip() else None
    return None


def _environment(remote: Remote) -> dict[str, str]:
    """For git: the token by environment, for the remote's host alone; no prompt, no hook, no redirect, no trace."""
    environment = {
        k: v for k, v in os.environ.items() if not re.match(r"GIT_(?:DIR|WORK_TREE|INDEX|OBJECT|TRACE|CURL)", k)
    }
    config = [
        ("core.hooksPath", os.devnull),
        ("http.followRedirects", "false"),
        ("http.lowSpeedLimit", "1"),
        ("http.lowSpeedTime", str(STALL_SECONDS)),
        ("gc.auto", "0"),
    ]
    if (found := credentials(remote.place)) and remote.scheme in ("http", "https"):
        config.append(("credential.helper", ""))  # the user's own would be told the token to keep
        environment["NAMESAKE_GIT_USER"], environment["NAMESAKE_GIT_TOKEN"] = found[0], keep_secret(found[1]) or ""
        parts = urlsplit(remote.url)
        helper = '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$NAMESAKE_GIT_USER" "$NAMESAKE_GIT_TOKEN"; }; f'
        config.append((f"credential.{parts.scheme}://{parts.netloc.rpartition('@')[2]}.helper", helper))
    first = int(environment.get("GIT_CONFIG_COUNT") or 0)
    for i, (key, value) in enumerate(config, first):
        environment |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
    return environment | {
        "GIT_CONFIG_COUNT": str(first + len(config)),
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",
        "SSH_ASKPASS": "",
        "GIT_ALLOW_PROTOCOL": remote.scheme,
        "GIT_SSH_COMMAND": environment.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=10"),
        "LC_ALL": "C",
    }


def git(remote: Remote, *arguments: str, input: bytes = b"", index: Path | None = None) -> bytes:
    """git in our repository for the remote. Raises Passing for what may go by, UserError with git's own words."""
    environment = _environment(remote) | ({"GIT_INDEX_FILE": str(index)} if index else {})
    command = ["git", "--git-dir", str(remote.repo), *arguments]
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # git's helpers go with it
        )
    except FileNotFoundError:
        raise UserError(
            f"{remote.place.ref} needs git, which is not installed: install git (apt-get install git)."
        ) from None
    try:
        out, err = process.communicate(input, timeout=GIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Passing(f"git {arguments[0]} did not end in {GIT_SECONDS} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return out
    said = err.decode(errors="replace")
    lines = [line for line in said.splitlines() if re.match(r"(?:fatal|error|remote|ERROR|!| ! )", line)] or [said]
    words = plain(" ".join(dict.fromkeys(lines)).replace(str(remote.repo), "the cached repository"))
    if re.search(DAMAGE, said):
        raise _damaged(remote)
    if re.search(PASSING_WORDS, said):
        raise Passing(f"git: {words}")
    raise UserError(f"{remote.place.ref}: git {arguments[0]} failed: {words}.{_hint(remote.place, said)}")


def _damaged(remote: Remote) -> UserError:
    shutil.rmtree(remote.repo, ignore_errors=True)
    return UserError(
        f"{remote.place.ref}: what git has here of it was damaged, by a power cut or a full disk, or is so there; it has been "
        "removed here: run the same command again."
    )


def _hint(place: "Place", said: str) -> str:
    if re.search(
        "Authentication failed|could not read (?:User|Pass)|returned error: 40[13]|denied|not authorized|protected",
        said,
    ):
        return " " + how_to_log_in(place)
    return ""


def how_to_log_in(place: "Place") -> str:
    """What to do about a missing or wrong token, word for word."""
    from finetune.places import HUBS

    if place.kind == "openxlab":
        return (
            f"Make a git token with the right to write on {HUBS['openxlab'][2]} and set OPENXLAB_USERNAME to your user name "
            "and OPENXLAB_TOKEN to the token (not the AK/SK)."
        )
    if place.kind == "modelscope":
        return f"Copy your token from {HUBS['modelscope'][2]} and set MODELSCOPE_API_TOKEN to it, or run 'modelscope login'."
    return "Store a user name and token in git's credential helper ('git credential approve'), or check your SSH key."


def _authorization(remote: Remote) -> dict[str, str]:
    """The header for the remote's host, from the environment, else from git's credential helpers."""
    found = credentials(remote.place)
    if not found:
        parts = urlsplit(remote.url)
        question = (
            f"protocol={parts.scheme}\nhost={parts.netloc.rpartition('@')[2]}\npath={unquote(parts.path).lstrip('/')}\n"
        )
        question += f"username={parts.username}\n" if parts.username else ""
        try:
            answer = git(remote, "credential", "fill", input=f"{question}\n".encode()).decode()
            values = dict(line.partition("=")[::2] for line in answer.splitlines())
            found = values.get("username", ""), values.get("password", "")
        except (UserError, Passing):  # no helper knows it; ~/.netrc may
            found = requests.utils.get_netrc_auth(remote.url)
    if not found or not found[1]:
        return {}
    keep_secret(found[1])
    coded = keep_secret(base64.b64encode(":".join(found).encode()).decode())
    return {"Authorization": f"Basic {coded}"}


def _options(remote: Remote) -> dict[str, Any]:
    """requests' options for the remote from git's own settings."""
    values = {}
    for line in git(remote, "config", "--null", "--get-urlmatch", "http", remote.url).decode().split("\0"):
        key, _, value = line.partition("\n")
        values[key.lower()] = value
    options: dict[str, Any] = {}
    if proxy := values.get("http.proxy"):
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        keep_secret(urlsplit(proxy).password)
        options["proxies"] = {"http": proxy, "https": proxy}
    if values.get("http.sslverify") == "false":
        options["verify"] = False
    elif bundle := os.environ.get("GIT_SSL_CAINFO") or values.get("http.sslcainfo"):
        options["verify"] = str(Path(bundle).expanduser())
    return options


# ------------------------------------------------------------------------------------------------------------- remotes


def open_remote(place: "Place") -> Remote:
    """Our bare repository for a remote, made at the first call. Raises UserError, Unreachable."""
    repo = cache_dir() / "hub" / "git" / digest_of(place.name)[:32]
    remote = Remote(place.name, place, repo)
    with _alone(remote):
        for left in repo.glob("*.lock"):  # git's own, of one that was killed: ours is held
            left.unlink(missing_ok=True)
        if not (repo / "HEAD").is_file():
            repo.mkdir(parents=True, exist_ok=True)
            git(remote, "init", "--quiet", "--bare", "--template=")
    url = git(remote, "ls-remote", "--get-url", place.name).decode().strip()
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme != "ssh"):
        raise UserError(
            f"git's insteadOf for {place.ref} holds a user name, password or token: keep it in git's credential helper instead."
        )
    return remote._replace(url=url)


def _alone(remote: Remote) -> contextlib.AbstractContextManager:
    """Keeps other processes from our repository for the remote."""
    return locked(f"{remote.repo}.lock", f"at work on {remote.place.ref}")


def greet(remote: Remote, service: str) -> bool:
    """Whether the repository is there, asked over HTTP before git is: it waits where the server asks for it, and tells a
    log-in page, a redirect and a wrong token apart. Raises Unreachable and UserError."""
    if remote.scheme == "file":
        path = Path(unquote(urlsplit(remote.url).path))
        return path.is_dir()
    if remote.scheme == "ssh":
        return True
    place, options = remote.place, _options(remote)
    url = f"{remote.url.rstrip('/')}/info/refs?service={service}"
    where = f"{place.ref} at {plain(remote.url)}"

    def attempt() -> bool:
        headers: dict[str, str] = {}
        response = transfer.ask("GET", url, headers, options=options)
        if response.status_code in (401, 403, 404) and (headers := _authorization(remote)):
            response.close()
            response = transfer.ask("GET", url, headers, options=options)
        if transfer.origin_of(response.url) != transfer.origin_of(url):
            response.close()
            raise UserError(
                f"{where} sends us on to {plain(response.url)}; git's token is not taken to another host. If the repository "
                "has moved, use its new address."
            )
        with response:
            start = transfer.read_start(response, 64) if response.status_code == 200 else b""
        if response.status_code in (401, 403):
            why = "refuses the token" if headers else "asks for a token"
            raise UserError(f"{where} {why} (HTTP {response.status_code}). {how_to_log_in(place)}")
        if response.status_code == 404:
            return False
        if response.status_code != 200:
            raise UserError(f"{where} answers HTTP {response.status_code} {plain(response.reason)}.")
        if b"# service=" not in start:
            raise Unreachable(
                f"{where} answers with a web page instead of git: the service is down or the address is wrong."
            )
        return True

    return transfer.patiently(attempt, where)


def _refs(remote: Remote) -> dict[str, str]:
    """Branches, tags and HEAD with their commits."""
    ask = ("ls-remote", "--", remote.url)
    text = transfer.patiently(lambda: git(remote, *ask), f"{remote.place.ref} at {plain(remote.url)}").decode()
    found = {}
    for line in text.splitlines():
        commit, _, name = line.partition("\t")
        found[name] = commit
    return {name.removesuffix("^{}"): found.get(f"{name}^{{}}", commit) for name, commit in found.items()}


def _resolve(refs: dict[str, str], revision: str | None) -> str | None:
    if revision is None:
        return refs.get("HEAD") or refs.get("refs/heads/main") or next(iter(refs.values()), None)
    if COMMIT.fullmatch(revision):
        return revision
    return refs.get(f"refs/heads/{revision}") or refs.get(f"refs/tags/{revision}")


def _fetch(remote: Remote, commit: str) -> None:
    try:
        git(remote, "cat-file", "-e", f"{commit}^{{tree}}")
        return
    except UserError:
        if not remote.repo.is_dir():  # it was damaged
            raise
    fetch = ("fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--", remote.url, commit)
    transfer.patiently(lambda: git(remote, *fetch), f"{remote.place.ref} at {plain(remote.url)}")


def listing(place: "Place", *, default: bool = False) -> Listing | None:
    """What a commit holds; None of a repository that is not there or empty. With `default`, a revision that is not there
    is taken for the default branch. Raises Unreachable, UserError."""
    remote, revision = open_remote(place), place.revision
    if not greet(remote, "git-upload-pack"):
        return None
    with _alone(remote):
        refs = _refs(remote)
        if not refs:
            return None
        named = _resolve(refs, revision)
        commit = named or (_resolve(refs, None) if default else None)
        if commit is None:
            there = ", ".join(sorted(plain(r.rpartition("/")[2]) for r in refs if r != "HEAD")[:20])
            raise UserError(f"{place.ref}: there is no branch, tag or commit {revision}; there is {there}.")
        _fetch(remote, commit)
    return Listing(commit, _tree(remote, commit), named is not None)


def _tree(remote: Remote, commit: str) -> dict[str, File]:
    from finetune.places import MOST_FILES

    process = subprocess.Popen(  # read as it comes: a tree may name the same folder a billion times
        ["git", "--git-dir", str(remote.repo), "ls-tree", "-r", "-z", "--long", commit],
        env=_environment(remote),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    entries: list[tuple[str, str, str, bytes]] = []
    rest = b""
    try:
        while block := process.stdout.read1(CHUNK):  # type: ignore[union-attr]
            *lines, rest = (rest + block).split(b"\0")
            for line in lines:
                head, _, name = line.partition(b"\t")
                mode, _, sha, size = head.decode().split()
                entries.append((mode, sha, size, name))
            if len(entries) > MOST_FILES:
                raise UserError(f"{remote.place.ref} has more than {MOST_FILES} files, which is refused.")
        if process.wait():
            raise _damaged(remote)
    finally:
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
        process.wait()
    files: dict[str, File] = {}
    small = [sha for mode, sha, size, _ in entries if size.isdigit() and int(size) <= 1024]
    said = git(remote, "cat-file", "--batch", input="".join(f"{sha}\n" for sha in small).encode())
    contents, at = {}, 0
    for sha in small:
        end = said.index(b"\n", at)
        size = int(said[at:end].split()[2])
        contents[sha] = said[end + 1 : end + 1 + size]
        at = end + 2 + size
    for mode, sha, size, raw in entries:
        name = raw.decode("utf-8", "surrogateescape")
        if mode not in ("100644", "100755"):
            kind = "symbolic link" if stat.S_ISLNK(int(mode, 8)) else "submodule"
            raise UserError(f"{remote.place.ref}: {plain(ascii(name))} is a {kind}, which is refused.")
        if int(size) > LARGEST_IN_GIT:
            raise UserError(
                f"{remote.place.ref}: {plain(ascii(name))} has {size} bytes in git itself and not in Git LFS, which is refused."
            )
        if pointer := POINTER.match(contents.get(sha, b"")):
            oid, length = pointer[1].decode(), int(pointer[2])
            files[name] = File(length, f"sha256:{oid}", _lfs_opener(remote, oid, length))
        else:
            files[name] = File(int(size), f"git:{sha}", _blob_opener(remote, sha))
    return files


def _blob_opener(remote: Remote, sha: str) -> Callable[[int], Opened]:
    def open_at(offset: int) -> Opened:
        def chunks() -> Iterator[bytes]:
            with subprocess.Popen(
                ["git", "--git-dir", str(remote.repo), "cat-file", "blob", sha],
                env=_environment(remote),
                stdout=subprocess.PIPE,
            ) as process:
                try:
                    while chunk := process.stdout.read(CHUNK):  # type: ignore[union-attr]
                        yield chunk
                finally:
                    process.kill()

        return 0, chunks()

    return open_at


# ----------------------------------------------------------------------------------------------------------------- LFS


class Store(NamedTuple):
    """Where a remote's large files are: a folder (of a file:// remote), or an LFS server."""

    folder: Path | None
    url: str = ""
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    options: dict[str, Any] = {}  # noqa: RUF012


def _store(remote: Remote, operation: str) -> Store:
    parts = urlsplit(remote.url)
    if remote.scheme == "file":
        path = Path(unquote(parts.path))
        return Store((path / ".git" if (path / ".git").is_dir() else path) / "lfs" / "objects")
    if remote.scheme == "ssh":
        host = f"{parts.username}@{parts.hostname}" if parts.username else str(parts.hostname)
        ssh = shlex.split(_environment(remote)["GIT_SSH_COMMAND"])
        command = [*ssh, *(["-p", str(parts.port)] if parts.port else []), "--", host]
        command.append(f"git-lfs-authenticate {shlex.quote(unquote(parts.path))} {operation}")
        try:
            answer = subprocess.run(
                command, capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL
            ).stdout
            said = json.loads(answer)
            headers = {str(k): str(v) for k, v in said.get("header", {}).items()}
            for value in headers.values():
                keep_secret(value.rpartition(" ")[2])
            return Store(None, str(said["href"]).rstrip("/"), headers)
        except subprocess.TimeoutExpired:
            raise Passing("git-lfs-authenticate did not answer in 60 s") from None
        except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
            said = plain(getattr(error, "stderr", b"").decode(errors="replace") or error)
            raise UserError(f"{remote.place.ref}: the server has no Git LFS over ssh: {said}.") from None
    url = remote.url.rstrip("/")
    return Store(None, f"{url}{'' if url.endswith('.git') else '.git'}/info/lfs", {}, _options(remote))


def _batch(remote: Remote, store: Store, operation: str, objects: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """The server's answer for each object: its actions, or its error."""
    body = json.dumps(
        {
            "operation": operation,
            "transfers": ["basic"],
            "objects": [{"oid": oid, "size": size} for oid, size in objects],
            "hash_algo": "sha256",
        }
    ).encode()
    where = f"{remote.place.ref}: its LFS server"

    def attempt() -> Any:
        headers = {"Accept": LFS_JSON, "Content-Type": LFS_JSON, **store.headers}
        url = f"{store.url}/objects/batch"
        response = transfer.ask("POST", url, headers, body, store.options)
        if response.status_code in (401, 403, 404) and not store.headers and (more := _authorization(remote)):
            response.close()
            store.headers.update(more)
            response = transfer.ask("POST", url, headers | more, body, store.options)
        status, text = response.status_code, transfer.read_all(response)
        if status in (401, 403):
            raise UserError(f"{where} refuses the token (HTTP {status}). {how_to_log_in(remote.place)}")
        if status == 413 or status == 507 or status == 509:
            raise UserError(f"{where} has no room left (HTTP {status}): delete old models there or ask for more.")
        if status != 200:
            raise UserError(f"{where} answers HTTP {status} {plain(text[:200].decode(errors='replace'))}.")
        try:
            return {entry["oid"]: entry for entry in json.loads(text)["objects"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{where} does not speak the LFS protocol: {plain(text[:200].decode(errors='replace'))}."
            ) from None

    return transfer.patiently(attempt, where)


def _action(remote: Remote, store: Store, entry: dict[str, Any], name: str) -> tuple[str, dict[str, str]] | None:
    """An action's address and headers; the remote's own token goes along only to its own host."""
    if error := entry.get("error"):
        gone = "is missing on the LFS server" if error.get("code") in (404, 410) else plain(error.get("message"))
        raise UserError(f"{remote.place.ref}: the object {entry.get('oid', '')[:16]}... {gone}: publish it again.")
    action = (entry.get("actions") or {}).get(name)
    if not action:
        return None
    url, headers = str(action["href"]), {str(k): str(v) for k, v in (action.get("header") or {}).items()}
    if urlsplit(url).scheme not in ("http", "https") or (
        store.url.startswith("https:") and not url.startswith("https:")
    ):
        raise UserError(
            f"{remote.place.ref}: its LFS server names the address {plain(url)}, which is refused: it is not https."
        )
    for key, value in headers.items():
        if key.lower() == "authorization":
            keep_secret(value.rpartition(" ")[2])
    if transfer.origin_of(url) == transfer.origin_of(store.url) and not any(
        k.lower() == "authorization" for k in headers
    ):
        headers |= store.headers
    return url, headers


def _lfs_opener(remote: Remote, oid: str, size: int) -> Callable[[int], Opened]:
    def open_at(offset: int) -> Opened:
        from finetune.places import file_opener

        store = _store(remote, "download")
        if store.folder:
            path = store.folder / oid[:2] / oid[2:4] / oid
            if not path.is_file():
                raise UserError(
                    f"{remote.place.ref}: the object {oid[:16]}... is missing in its LFS store: publish it again."
                )
            return file_opener(path)(offset)
        entry = _batch(remote, store, "download", [(oid, size)]).get(oid, {})
        if not (found := _action(remote, store, entry, "download")):
            raise UserError(
                f"{remote.place.ref}: the LFS server offers no download of {oid[:16]}...: publish it again."
            )
        return transfer.open_url(*found, offset, store.options)

    return open_at


def _upload(remote: Remote, files: dict[str, Source], progress: Progress) -> None:
    """What the LFS store does not have yet."""
    from finetune.places import copy

    if not files:
        return
    store = transfer.patiently(lambda: _store(remote, "upload"), remote.place.ref)
    if store.folder:
        for source in files.values():
            target = store.folder / source.sha256[:2] / source.sha256[2:4] / source.sha256
            if target.is_file():
                progress(source.size)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            if isinstance(source.data, Path):
                copy(source, part, progress)
            else:
                part.write_bytes(source.data)
            part.rename(target)
        return
    answer = _batch(remote, store, "upload", [(source.sha256, source.size) for source in files.values()])
    for name, source in files.items():
        entry = answer.get(source.sha256, {"error": {"message": "was not answered for"}})
        if not (found := _action(remote, store, entry, "upload")):
            progress(source.size)  # it is there
            continue
        transfer.put(*found, source, f"{remote.place.ref}: {name}", progress, store.options)
        if check := _action(remote, store, entry, "verify"):
            _verify(remote, store, check, name, source)


def _verify(remote: Remote, store: Store, action: tuple[str, dict[str, str]], name: str, source: Source) -> None:
    url, headers = action
    body = json.dumps({"oid": source.sha256, "size": source.size}).encode()
    headers = {"Accept": LFS_JSON, "Content-Type": LFS_JSON, **headers}
    where = f"{remote.place.ref}: {name}"

    def attempt() -> None:
        response = transfer.ask("POST", url, headers, body, store.options)
        text = transfer.read_all(response)
        if response.status_code != 200:
            said = plain(text[:200].decode(errors="replace"))
            raise UserError(f"{where}: the LFS server did not get it whole, HTTP {response.status_code} {said}.")

    transfer.patiently(attempt, where)


# ---------------------------------------------------------------------------------------------------------------- send


def send(place: "Place", files: dict[str, Source], remove: list[str], message: str, progress: Progress) -> None:
    """A commit on the branch `revision`, else on the default branch with a tag `revision`; large files first.

    Raises Unreachable, UserError.
    """
    from finetune.places import HUBS, SPACES

    remote, revision = open_remote(place), place.revision
    if not greet(remote, "git-receive-pack"):
        why = _make_on_openxlab(place, files) if place.kind == "openxlab" else ""
        if why or not greet(remote, "git-receive-pack"):
            there_is_none = f"{place.ref}: there is no repository {plain(remote.url)}"
            if remote.scheme == "file":
                path = shlex.quote(unquote(urlsplit(remote.url).path))
                raise UserError(f"{there_is_none}. Run 'git init --bare {path}', and then the same command again.")
            name = remote.url.rstrip("/").rpartition("/")[2].removesuffix(".git")
            where = (
                f"Open {HUBS[place.kind][1]}" if place.kind in HUBS else "Open the server's page for a new repository"
            )
            where = where.replace("/models/", "/studios/") if SPACES.get(place.kind, "?") in place.name else where
            raise UserError(
                f"{there_is_none}, or you may not see it. {why}{where}, type {name} as its "
                "name, leave the rest as it is, and run the same command again."
            )
    if revision and COMMIT.fullmatch(revision):
        raise UserError(f"{place.ref}: a commit cannot be published to; give a branch or a new tag after the @.")
    where = f"{place.ref} at {plain(remote.url)}"
    refs = _refs(remote)
    if revision and f"refs/tags/{revision}" in refs and f"refs/heads/{revision}" not in refs:
        raise UserError(TAG_IS_THERE.format(place.ref, revision))
    large = {n: s for n, s in files.items() if n.endswith(".safetensors") or s.size > LARGE}
    _upload(remote, large, progress)

    def attempt() -> None:
        refs = _refs(remote)
        branch, tag = _default_branch(remote), None
        if revision and f"refs/heads/{revision}" in refs:
            branch = f"refs/heads/{revision}"
        elif revision and revision != branch.removeprefix("refs/heads/"):
            tag = f"refs/tags/{revision}"
        parent = refs.get(branch)
        commit = _commit(remote, parent, files, large, remove, message)
        targets = [f"{commit}:{branch}"] if commit != parent else []
        targets += [f"{commit}:{tag}"] if tag else []
        if targets:
            git(remote, "push", "--quiet", *(["--atomic"] if len(targets) > 1 else []), "--", remote.url, *targets)

    with _alone(remote):
        transfer.patiently(attempt, where)
    progress(sum(source.size for name, source in files.items() if name not in large))


MAKE = """
import contextlib, json, sys
asked = json.load(sys.stdin)
with contextlib.redirect_stdout(sys.stderr):
    from openxlab.model.clients.openapi_client import OpenapiClient
    from openxlab.model.common.constants import endpoint
    OpenapiClient(endpoint).create_repository(asked["name"], False, asked["meta"])
"""


def _make_on_openxlab(place: "Place", files: dict[str, Source]) -> str:
    """Make the repository through the openxlab package, in a process of its own, as it knows no time-outs and prints what
    it sends. "" where it is made, else why not, as a sentence."""
    keys = [keep_secret(os.environ.get(name)) for name in ("OPENXLAB_AK", "OPENXLAB_SK")]
    login = Path("~/.openxlab/config.json").expanduser()
    if login.is_file():  # by 'openxlab login'
        for key in re.findall(r':\s*"([^"]+)"', login.read_text(encoding="utf-8", errors="replace")):
            keep_secret(key)
    elif not all(keys):
        return ""
    if not importlib.util.find_spec("openxlab"):
        return ""
    import yaml

    name = place.ref.partition("/")[2].partition("@")[0]
    asked = json.dumps({"name": name, "meta": yaml.safe_load(files["metafile.yml"].data)})
    say(f"Making the repository {name} on OpenXLab ...")
    try:
        subprocess.run(
            [sys.executable, "-c", MAKE], input=asked, capture_output=True, text=True, timeout=60, check=True
        )
    except subprocess.TimeoutExpired:
        return "OpenXLab's API did not answer in 60 s. "
    except subprocess.CalledProcessError as error:
        return f"OpenXLab's API did not make it: {plain((error.stderr.splitlines() or [''])[-1])}. "
    return ""


def _default_branch(remote: Remote) -> str:
    answer = git(remote, "ls-remote", "--symref", "--", remote.url, "HEAD").decode()
    found = re.match(r"ref: (refs/heads/\S+)\tHEAD", answer)
    return found[1] if found else "refs/heads/main"


def _commit(
    remote: Remote,
    parent: str | None,
    files: dict[str, Source],
    large: dict[str, Source],
    remove: list[str],
    message: str,
) -> str:
    """`parent` with the changes, as a commit; `parent` itself where there are none."""
    index = remote.repo / "index"
    index.unlink(missing_ok=True)
    if parent:
        _fetch(remote, parent)
        git(remote, "read-tree", parent, index=index)
    entries = [f"0 {'0' * 40}\t{name}" for name in remove]
    for name, source in files.items():
        if name in large:
            data = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                source.sha256.encode(),
                source.size,
            )
        else:
            with source.open() as file:
                data = file.read()
        blob = git(remote, "hash-object", "-w", "--stdin", input=data).decode().strip()
        entries.append(f"100644 {blob}\t{name}")
    attributes = _attributes(remote, parent, list(large))
    blob = git(remote, "hash-object", "-w", "--stdin", input=attributes).decode().strip()
    entries.append(f"100644 {blob}\t.gitattributes")
    git(remote, "update-index", "-z", "--index-info", input="".join(f"{e}\0" for e in entries).encode(), index=index)
    tree = git(remote, "write-tree", index=index).decode().strip()
    index.unlink(missing_ok=True)
    if parent and git(remote, "rev-parse", f"{parent}^{{tree}}").decode().strip() == tree:
        return parent
    who = ["-c", "user.name=Namesake", "-c", "user.email=namesake@localhost"]
    try:
        git(remote, "config", "user.email")
        who = []  # the user's own
    except UserError:
        pass
    parents = ["-p", parent] if parent else []
    return git(remote, *who, "commit-tree", tree, *parents, "-m", message).decode().strip()


def _attributes(remote: Remote, parent: str | None, large: list[str]) -> bytes:
    """.gitattributes as it is, with what git-lfs users need for the large files."""
    try:
        text = (
            git(remote, "cat-file", "blob", f"{parent}:.gitattributes").decode(errors="surrogateescape")
            if parent
            else ""
        )
    except UserError:
        text = ""
    there = set(text.splitlines())
    wanted = ["*.safetensors", *(f"/{name}" for name in large if not name.endswith(".safetensors"))]
    lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in wanted]
    text += "" if text.endswith("\n") or not text else "\n"
    return (text + "".join(f"{line}\n" for line in lines if line not in there)).encode(errors="surrogateescape")
