"""What the README and the top level promise: its commands are taken from the README itself."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import app
from finetune import run, settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    part.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    for part in line.split("&&")
]


def test_front_matter_is_what_a_space_accepts():
    front = yaml.safe_load(README.split("---")[1])
    assert front["sdk"] == "gradio"
    assert (ROOT / front["app_file"]).is_file()
    assert f"gradio=={front['sdk_version']}" in (ROOT / "requirements.txt").read_text()
    assert front["license"] == "apache-2.0"


@pytest.mark.parametrize("command", [c for c in COMMANDS if " finetune/run.py" in c and "--help" not in c])
def test_run_commands_are_understood(command):
    for part in run.parts(shlex.split(command.partition(" finetune/run.py")[2])):
        args = run.parse(part)
        assert args.stage is None or args.stage in ("chat", "check", "compare", "deploy", "evaluate", "publish", "pull")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python app.py" in c])
def test_the_pages_commands_are_understood(command, monkeypatch):
    before, _, after = command.partition("python app.py")
    for word in before.split():
        monkeypatch.setenv(*word.split("=", 1))
    args = app.parse(shlex.split(after))
    assert args.model or args.engine or not after


class Understood(Exception):
    pass


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m finetune.")])
def test_commands_of_modules_are_understood(command, monkeypatch):
    def begin(*_):
        raise Understood

    name, *arguments = shlex.split(command)[2:]
    module = importlib.import_module(name)
    monkeypatch.setattr(module, {"finetune.internlm2": "pull", "finetune.vision": "write_projector"}[name], begin)
    with pytest.raises(Understood):
        module.main(arguments)


def test_first_line_makes_the_example_persona():
    args = run.parse(shlex.split(next(c for c in COMMANDS if c.startswith("python finetune/run.py")))[2:])
    assert (args.name, args.author) == (settings.Persona().name, settings.Persona().author)


def test_pictures_and_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_packages_txt_goes_through_xargs():
    """The platform runs `xargs -r -a packages.txt apt-get install -y`: every word is a package's name."""
    for file in ("packages.txt", "tests/packages.txt"):
        for word in (ROOT / file).read_text().split():
            assert re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", word), word


def test_top_level_stays_short():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top == {
        *("app.py", "requirements.txt", "packages.txt", "README.md", "LICENSE", "pyproject.toml"),
        *("finetune", "assets", "tests"),
    }


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_requirements_resolve(python):
    """Against the package index, for the spaces' Python and for newer ones; nothing is installed."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--python-version",
        python,
        "--python-platform",
        "x86_64-manylinux_2_28",
    ]
    done = subprocess.run([*command, "requirements.txt"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch = "2.6.0" if python == "3.10" else "2.13.0"
    assert f"torch=={torch}" in done.stdout


def test_what_openxlab_says_is_what_we_say():
    """Every message that the table explains is one of the program's, or of the libraries that it quotes."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| the message says")[2].partition("\n\n")[0]
    told = [words for row in table.splitlines()[2:] for words in re.findall("`([^`]+)`", row.split("|")[1])]
    assert len(told) > 15
    sources = "".join(
        (ROOT / "finetune" / f"{name}.py").read_text() for name in ("hub", "places", "gitlfs", "transfer")
    )
    theirs = {"403", "Name or service not known", "timed out"}
    for words in told:
        known = re.sub(r" \(HTTP 401\)| \d+$", "", words).replace(" v1 ", " {} ")
        assert words in theirs or known in sources, words
