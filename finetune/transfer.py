"""Bytes from there to here and back: over HTTP with patience, streamed, resumed, hashed once as they pass.

Nothing is decompressed, nothing longer than announced is kept, and what is secret stays with the host it was meant for.
"""

import contextlib
import email.utils
import functools
import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import requests
import urllib3

from finetune.errors import UserError, without_user

CHUNK = 1 << 20
TIMEOUT = (10, 30)  # seconds to connect, and without a byte
ATTEMPTS = 5  # in a row that brought nothing
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between them; a server that asks for more is not waited for
REDIRECTS = 5
LONGEST_REPLY = 16 << 20  # of JSON, bytes
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone a moment later
CUT = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
)

Progress = Callable[[int], object]  # bytes that arrived or left; negative where they must be sent anew
Opened = tuple[int, Iterator[bytes]]  # the offset that the bytes really begin at, and they

HAS_CHANGED = (
    "{} has changed since it was made: restore it from a copy; or, where it is of the run's model/, remove that folder and run "
    "the run's own command, which makes it again."
)

_secrets: set[str] = set()


class Unreachable(UserError):
    """The place does not answer, or not now; another one, or what was fetched earlier, may do."""


class Passing(Exception):
    """Worth another attempt, after `wait` seconds where the server said so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Source(NamedTuple):
    """A file to be sent: where it lies or what it says, and what it must be."""

    data: Path | bytes
    size: int
    sha256: str

    def open(self) -> Any:
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open("rb")


def source(data: bytes) -> Source:
    return Source(data, len(data), hashlib.sha256(data).hexdigest())


# -------------------------------------------------------------------------------------------------------- what is said


def keep_secret(value: str | None) -> str | None:
    """`value`, which from now on no sentence made with `plain` contains."""
    if value and value.strip():
        _secrets.add(value.strip())
    return value


def plain(text: object) -> str:
    """What a server or a program said, fit for a sentence: one line, printable, without secrets."""
    line = str(text)
    for secret in sorted(_secrets, key=len, reverse=True):
        line = line.replace(secret, "***")
    line = without_user(line)
    line = re.sub(r"\?\S{40,}", "?...", line)  # a signed address is a secret as well
    return "".join(c if c.isprintable() else " " for c in " ".join(line.split()))[:500].rstrip(". ")


def patiently(work: Callable[[], Any], where: str, moved: Callable[[], int] = lambda: 0) -> Any:
    """`work()`, again after a `Passing`, with growing waits; anew from the first wait where `moved()` grew. Raises
    Unreachable."""
    failures, before = 0, moved()
    while True:
        try:
            return work()
        except Passing as passing:
            if (now := moved()) > before:
                failures, before = 0, now
            failures += 1
            wait = max(passing.wait or 0, min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))
            if failures >= ATTEMPTS or wait > LONGEST_WAIT:
                later = f" It asks to come back in {wait:.0f} s." if wait > LONGEST_WAIT else ""
                raise Unreachable(
                    f"{where}: {plain(passing)}.{later} What has arrived is kept; try again later."
                ) from None
            time.sleep(wait)


def retry_after(headers: Any) -> float | None:
    """Seconds, from the header's number or date (RFC 9110, 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


# --------------------------------------------------------------------------------------------------------------- HTTP


@functools.cache
def _session() -> requests.Session:
    session = requests.Session()  # honours HTTPS_PROXY, NO_PROXY and REQUESTS_CA_BUNDLE
    for scheme in ("http://", "https://"):
        session.get_adapter(scheme).init_poolmanager(4, 4, blocksize=CHUNK)
    return session


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request  # given as `auth`, it keeps requests from putting ~/.netrc's over ours


def origin_of(url: str) -> tuple[str, str, int | None]:
    """As whoever connects reads it: to urlsplit the host of "http://a\\\\@b/" is b."""
    try:
        parts = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError:
        raise UserError(f"{plain(url)} is no address.") from None
    scheme = parts.scheme or ""
    return scheme, parts.host or "", parts.port or {"http": 80, "https": 443}.get(scheme)


def ask(
    method: str,
    url: str,
    headers: dict[str, str] | None = None,
    body: Any = None,
    options: dict[str, Any] | None = None,
) -> requests.Response:
    """One request; its redirects are followed, `headers` but Range only within the same origin. The body is not read yet.

    `options` are requests' own (proxies, verify). Raises Passing, or UserError for an answer that is not acceptable.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "namesake", **(headers or {})}
    for _ in range(REDIRECTS + 1):
        try:
            response = _session().request(
                method,
                url,
                headers=headers,
                data=body,
                auth=_no_netrc,
                stream=True,
                allow_redirects=False,
                timeout=TIMEOUT,
                **(options or {}),
            )
        except CUT as error:
            raise Passing(reason_of(error)) from None
        except (requests.RequestException, ValueError) as error:  # an address that is none
            raise UserError(f"{plain(url)} cannot be asked: {plain(error)}.") from None
        if response.status_code in PASSING:
            response.close()
            raise Passing(f"HTTP {response.status_code} {plain(response.reason)}", retry_after(response.headers))
        if not (response.is_redirect and response.headers.get("Location")):
            break
        target = urljoin(url, response.headers["Location"])
        response.close()
        if method != "GET":
            raise UserError(f"{plain(url)} sends us on to {plain(target)}, which is refused for a {method}.")
        old, new = origin_of(url), origin_of(target)
        if new[0] not in ("http", "https") or (old[0] == "https" and new[0] == "http"):
            raise UserError(f"{plain(url)} sends us on to {plain(target)}, which is refused: it is not https.")
        if old != new:
            headers = {k: v for k, v in headers.items() if k in ("Accept-Encoding", "User-Agent", "Range", "Accept")}
        url = target
    else:
        raise UserError(f"{plain(url)} sends us on more than {REDIRECTS} times, which is refused.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise UserError(f"{plain(url)} answers compressed, which was not asked for and is refused.")
    return response


def reason_of(error: BaseException) -> str:
    """The innermost reason of a connection's failure, in a few words."""
    while (inner := getattr(error, "reason", None) or error.__cause__ or error.__context__) and isinstance(
        inner, BaseException
    ):
        error = inner
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"^.*?: (?=Failed|Connection|Read)", "", text) or type(error).__name__


def read_start(response: requests.Response, most: int) -> bytes:
    """The body's first bytes. Raises Passing where they are cut, be it within the headers, of which the rest then lacks."""
    length = response.headers.get("Content-Length", "")
    try:
        start = response.raw.read(most)
    except CUT as error:
        raise Passing(reason_of(error)) from None
    whole = not length and "Transfer-Encoding" in response.headers
    if not whole and len(start) < (min(most, int(length)) if length.isdecimal() else 1):
        raise Passing("the answer was cut")
    return start


def read_all(response: requests.Response) -> bytes:
    """A short body. Raises Passing where it is cut, UserError where it is long."""
    with response:
        body = read_start(response, LONGEST_REPLY + 1)
    if len(body) > LONGEST_REPLY:
        raise UserError(f"{plain(response.url)} answers with more than {LONGEST_REPLY} bytes, which is refused.")
    return body


def open_url(url: str, headers: dict[str, str], offset: int, options: dict[str, Any] | None = None) -> Opened:
    """The bytes at `url` from `offset` on, or from 0 where the server knows no ranges."""
    ranged = {**headers, "Range": f"bytes={offset}-"} if offset else headers
    response = ask("GET", url, ranged, options=options)
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code == 416:
        response.close()
        return 0, open_url(url, headers, 0, options)[1]
    if response.status_code not in (200, 206) or (response.status_code == 206 and not found):
        response.close()
        raise UserError(f"{plain(url)} answers HTTP {response.status_code} {plain(response.reason)}")

    def chunks() -> Iterator[bytes]:
        with response:
            try:
                while chunk := response.raw.read1(CHUNK):  # read() would lose what it has when it is cut
                    yield chunk
            except (*CUT, OSError) as error:
                raise Passing(reason_of(error)) from None

    return int(found[1]) if response.status_code == 206 else 0, chunks()


# ----------------------------------------------------------------------------------------------------- there -> here


def hash_for(digest: str, size: int) -> Any:
    """The empty hash of "sha256:..." or of git's "git:...", which begins with the size."""
    return hashlib.sha256() if digest.startswith("sha256:") else hashlib.sha1(b"blob %d\0" % size)  # noqa: S324 - git's


def receive(
    open_at: Callable[[int], Opened],
    part: Path,
    size: int,
    digest: str,
    where: str,
    progress: Progress = lambda n: None,
) -> None:
    """Make `part` whole: `size` bytes with that digest. What an earlier attempt left there is gone on from; it is then
    read for its hash, otherwise every byte is hashed while it is written and never read again.

    Raises Unreachable, and UserError where the bytes are not those.
    """
    found = ""
    for _ in range(3):  # what was damaged on the way, or by a power cut, comes right
        found, start = _fill(open_at, part, size, digest, where, progress)
        if found == digest:
            return
        part.unlink()
        progress(-size)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{where} is a Git LFS pointer, not the file itself, and is refused: publish it again.")
    raise UserError(f"{where} is not what it should be and is refused: it has {found}, expected is {digest}.")


def _fill(
    open_at: Callable[[int], Opened], part: Path, size: int, digest: str, where: str, progress: Progress
) -> tuple[str, bytes]:
    """(the digest of `part`, now `size` bytes long, and how it begins)"""
    done, hashed, start = 0, hash_for(digest, size), b""
    with part.open("ab+") as file:
        if file.tell() > size:
            file.truncate(0)
        file.seek(0)
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            start, done = start or chunk[:64], done + len(chunk)
        progress(done)

        def attempt() -> None:
            nonlocal done, hashed, start
            if done == size:
                return
            offset, chunks = open_at(done)
            if offset != done:  # the server knows no ranges
                file.truncate(0)
                progress(-done)
                done, hashed, start = 0, hash_for(digest, size), b""
                if offset:
                    raise UserError(f"{where} comes from byte {offset} on, which was not asked for; it is refused.")
            with contextlib.closing(chunks):
                for chunk in chunks:
                    if done + len(chunk) > size:
                        raise UserError(f"{where} is longer than its {size} bytes and is refused.")
                    hashed.update(chunk)
                    file.write(chunk)
                    start, done = start or chunk[:64], done + len(chunk)
                    progress(len(chunk))
            if done < size:
                raise Passing(f"the connection was cut after {done} of {size} bytes")

        patiently(attempt, where, lambda: done)
    return digest.partition(":")[0] + ":" + hashed.hexdigest(), start


# ----------------------------------------------------------------------------------------------------- here -> there


class _Hashed:
    """A file for requests, which asks for its length, and hashes what is read from it."""

    def __init__(self, file: Any, size: int, progress: Progress) -> None:
        self.file, self.size, self.progress, self.sent = file, size, progress, 0
        self.hash = hashlib.sha256()

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(CHUNK), b"")

    def read(self, size: int) -> bytes:
        chunk = self.file.read(min(size, self.size - self.sent))
        self.hash.update(chunk)
        self.sent += len(chunk)
        self.progress(len(chunk))
        return chunk


def put(
    url: str,
    headers: dict[str, str],
    source: Source,
    where: str,
    progress: Progress = lambda n: None,
    options: dict[str, Any] | None = None,
) -> None:
    """PUT the file, hashed while it is sent. Raises Unreachable, and UserError where the server will not have it or the
    file is no longer what it was."""

    def attempt() -> None:
        with source.open() as file:
            body = _Hashed(file, source.size, progress)
            try:
                response = ask("PUT", url, {"Content-Type": "application/octet-stream", **headers}, body, options)
            except Passing:
                progress(-body.sent)
                raise
            said = plain(read_all(response)[:200].decode(errors="replace"))
        if body.sent == source.size and body.hash.hexdigest() != source.sha256:
            raise UserError(HAS_CHANGED.format(source.data))
        if response.status_code not in (200, 201, 204):
            raise UserError(f"{where}: the server refuses the file, HTTP {response.status_code} {said}.")

    patiently(attempt, where)
