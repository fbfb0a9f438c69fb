"""The command line as a user types it, and what somebody does who has the model and no code of ours."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import merge, run

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "finetune" / "run.py"), *map(str, arguments)]


def finetune(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def here(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has everything imported: that takes a process longer than most stages of a tiny run."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        status = run.main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def begin() -> None:
    """Forks, before the first test, a process that has everything imported and has computed nothing: `apart` has it fork others,
    where what is imported takes longer than the work."""
    global forks
    forks, orders = multiprocessing.Pipe()
    if os.fork():
        orders.close()
        return
    forks.close()
    try:
        while True:  # to the end of the tests, which is an EOFError
            process = multiprocessing.get_context("fork").Process(target=_begun, args=orders.recv())
            process.start()
            process.join()
            orders.send(process.exitcode)
    finally:
        os._exit(0)


def apart(work: Callable[..., object], *arguments: object) -> int:
    """`work`, a module's function, in a process of its own: its exit status."""
    outputs = [f"/proc/{os.getpid()}/fd/{number}" for number in (1, 2)]  # where pytest catches what is said
    forks.send((outputs, dict(os.environ), Path.cwd(), work, arguments))
    assert forks.poll(600), f"{work} does not end"
    return forks.recv()


def _begun(outputs: list[str], environment: dict[str, str], folder: Path, work: Callable, arguments: tuple) -> None:
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    work(*arguments)


def proved_here(patch: pytest.MonkeyPatch) -> None:
    """Merged models are opened by the code that a fresh process runs, but in this one, which has everything imported. The fresh
    process is tests/test_merge.py's."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        _, _, code, *arguments = command
        out, err, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as words, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            words.setattr(sys, "argv", ["-c", *arguments])
            try:
                exec(code, {})
            except Exception:
                traceback.print_exc()
                status = 1
        return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())

    patch.setattr(merge, "subprocess", SimpleNamespace(run=run))


def plain_answers(model: Path, *questions: str) -> list[str]:
    """By somebody who has the folder, plain transformers and README's snippet, and no code of ours."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    before, path, rest = snippet.partition('"runs/小星/model"')
    assert path in rest
    assert '"Who are you?"' in rest
    code = before + json.dumps(str(model)) + rest.replace(path, json.dumps(str(model)))
    asked = [code.replace('"Who are you?"', json.dumps(question)) for question in questions]
    done = subprocess.run(
        [sys.executable, "-c", "print(end='\\0')\n".join(asked)],
        cwd="/",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return [answer.removesuffix("\n") for answer in done.stdout.split("\0")]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
