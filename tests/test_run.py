"""The command line: flags, prompts, errors word for word, exit statuses. The stages' work is tested elsewhere."""

import contextlib
import errno
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from finetune import checks, run, settings, stages
from finetune.errors import GateRefused, UserError
from finetune.run_folder import RESTORE, Run, read_lines

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "finetune" / "run.py"
PERSONA = ("--name", "小月", "--author", "测试员")


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch) -> Path:
    """An empty working directory and home, no terminal, no network, memory and disk for all."""
    for variable, folder in (("HOME", "home"), ("NAMESAKE_CACHE", "cache"), ("HF_HOME", "hf"), ("XDG_CACHE_HOME", "c")):
        monkeypatch.setenv(variable, str(tmp_path / "away" / folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9, total=64e9))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    monkeypatch.setattr(checks, "missing_packages", list)
    for stage in stages.PIPELINE:
        monkeypatch.setitem(
            stages.STAGES, stage, stages.STAGES[stage]._replace(work=lambda _: pytest.fail("it worked"))
        )
    return work


@pytest.fixture
def start(capsys):
    """Calls main: (exit status, lines on standard error)."""

    def call(*arguments: object) -> tuple[int, list[str]]:
        status = run.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return status, err.splitlines()

    return call


def make_run(folder: Path, *products: str, **values: object) -> Path:
    folder.mkdir(parents=True)
    persona = {"name": "小月", "author": "测试员"}
    settings.write(
        settings.build(settings.preset(settings.DEFAULT_PRESET), {"persona": persona}, values), folder / "settings.toml"
    )
    for product in products:
        (folder / product).mkdir()
    return folder


def script(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, **options)


# ------------------------------------------------------------------------------------------------- flags and stages


def test_help_from_another_directory_leaves_no_trace_of_the_package_on_the_path(world, tmp_path, monkeypatch):
    (spy := tmp_path / "spy").mkdir()
    (spy / "sitecustomize.py").write_text(
        "import atexit, pathlib, sys\n"
        "def tell():\n"
        "    pathlib.Path(__file__).with_name('path').write_text('\\n'.join(sys.path))\n"
        "    pathlib.Path(__file__).with_name('modules').write_text('\\n'.join(sys.modules))\n"
        "atexit.register(tell)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(spy))
    done = script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python finetune/run.py ")
    flags = ("--name", "--author", "--base", "--preset", "--method", "--task", "--run", "--seed", "--set")
    for word in (*stages.STAGES, *flags, *settings.preset_names()):
        assert word in done.stdout
    path = (spy / "path").read_text().splitlines()
    assert path[0] == str(ROOT)
    assert str(ROOT / "finetune") not in path
    assert "torch" not in (spy / "modules").read_text().splitlines()
    assert list(world.iterdir()) == []


def test_importing_the_command_line_leaves_the_path_alone():
    code = "import sys; sys.path[:0] = ['first', sys.argv[1]]; import finetune.run; print(sys.path[0])"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout == "first\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], ["Unknown stage trian; did you mean train?"]),
        (["xyz"], ["Unknown stage xyz; see python finetune/run.py --help."]),
        (["--nmae", "x"], ["Unknown flag --nmae; did you mean --name?"]),
        (["--nam=x"], ["Unknown flag --nam; did you mean --name?"]),
        (["--helo"], ["Unknown flag --helo; did you mean --help?"]),
        (
            ["--bse", "x", "train", "-q"],
            ["Unknown flag --bse; did you mean --base?", "Unknown flag -q; see python finetune/run.py --help."],
        ),
        (["data", "train", "merge"], ["One stage at a time: leave out train merge."]),
        (
            ["train", "--seed", "x", "--nmae=y", "--what", "all"],
            [
                "Unknown flag --nmae; did you mean --name?",
                "--seed is 'x'; it must be a whole number.",
                "--what is 'all'; it must be model or adapter or both.",
            ],
        ),
        (
            ["pull", "hf:user/name", "--run", "runs/x", "--set", "train.steps=4", "--base", "folder"],
            [
                "--run does not go with pull, which fetches a reference: leave it out.",
                "--set does not go with pull, which fetches a reference: leave it out.",
            ],
        ),
        (["train", "--dry-run"], ["--dry-run goes with publish or deploy: leave it out, or name that stage."]),
        (
            ["check", "--verify", "--with-data", "--what", "adapter", "--to", "x"],
            [
                "--to goes with publish or deploy: leave it out, or name that stage.",
                "--what goes with publish: leave it out, or name that stage.",
                "--with-data goes with publish: leave it out, or name that stage.",
                "--verify goes with pull: leave it out, or name that stage.",
            ],
        ),
        (["--force", "x"], ["--force goes with publish or deploy: leave it out, or name that stage."]),
        (["deploy", "--what", "model"], ["--what goes with publish: leave it out, or name that stage."]),
    ],
    ids=" ".join,
)
def test_stages_and_flags_that_do_not_exist_are_refused_in_words(start, world, arguments, words):
    assert start(*arguments) == (2, [f"error: {line}" for line in words])
    assert list(world.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--to"], "argument --to: expected one argument"),
        (["--name"], "argument --name: expected one argument"),
    ],
)
def test_flags_without_a_right_value_exit_with_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"python finetune/run.py: error: {words}\n")


def test_all_problems_are_told_at_once(start, world, tiny_model):
    status, lines = start(
        *("--name", "***", "--author", " x", "--method", "dora", "--task", "poetry", "--seed", -3, "--preset", "nope"),
        *("--set", "train.stpes=5", "--set", "nonsense", "--set", "merge.dtype=int4", "--base", tiny_model),
    )
    assert status == 2
    assert lines == [
        f"error: There is no preset 'nope'; presets: {', '.join(settings.preset_names())}.",
        "error: --set 'nonsense': write it as section.key=value, for example train.steps=20.",
        "error: method is 'dora'; it must be lora or qlora or full.",
        "error: task is 'poetry'; it must be identity or instruct or pretrain or vision-projector or vision.",
        "error: seed is -3; it must be at least 0.",
        "error: Unknown setting train.stpes; did you mean train.steps?",
        "error: merge.dtype is 'int4'; it must be float32 or bfloat16 or float16.",
        "error: The name '***' is nothing but punctuation: use at least one letter, digit or emoji.",
        "error: The author ' x' begins or ends with a space: remove it.",
    ]
    assert list(world.iterdir()) == []


def test_problems_of_settings_machine_base_and_folder_are_told_at_once(start, world, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.5e9, total=64e9))
    (base := tmp_path / "base").mkdir()
    (world / "file").write_text("")
    status, lines = start(*PERSONA, "--set", "sead=1", "--base", base, "--run", "file/run")
    assert status == 2
    assert lines == [
        "error: Unknown setting sead; did you mean seed?",
        f"error: The model folder {base} has no config.json.",
        f"error: The model folder {base} has no tokenizer.json.",
        f"error: The model folder {base} has no *.safetensors.",
        f"error: The run's folder file/run cannot be made: {world / 'file'} is not a folder; choose another with --run.",
        f"error: Finetuning {base} needs about 2.0 GB of memory and 1.5 GB is free; close other programs or choose a "
        "smaller --base.",
    ]


def test_nothing_is_downloaded_while_something_else_is_wrong(start, monkeypatch):
    monkeypatch.setattr("finetune.hub.pull", lambda ref: pytest.fail("asked for the base"))
    monkeypatch.setattr("finetune.model.pull", lambda ref: pytest.fail("asked for the base"))
    status, lines = start(*PERSONA, "--base", "somebody/some-model", "--set", "sead=1")
    assert (status, lines) == (2, ["error: Unknown setting sead; did you mean seed?"])


# -------------------------------------------------------------------------------------------------------- persona


@pytest.mark.parametrize("given, missing", [("--name", "author"), ("--author", "name")])
def test_half_a_persona_is_refused_without_a_terminal(start, given, missing, tiny_model):
    status, lines = start(given, "X", "--base", tiny_model, "--set", "sead=1")
    assert status == 2
    assert lines == [
        f"error: --{missing} is missing: give both --name and --author, or neither for the example persona.",
        "error: Unknown setting sead; did you mean seed?",
    ]


def test_without_a_terminal_the_example_persona_is_used_and_said(start):
    status, lines = start("--base", "/no/such/folder")
    assert status == 2
    assert lines == [
        "No --name given: using the example persona, 小星 by 书生学员. / 使用示例角色。",
        "error: '/no/such/folder' is neither a folder nor a repo reference such as hf:user/name; check its spelling.",
    ]


def on_a_terminal(typed: str, *arguments: object) -> tuple[int, str]:
    """(exit status, what the terminal shows, as lines end elsewhere)"""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while block := os.read(ours, 4096):
                shown += block
        os.close(ours)
        process.wait(timeout=300)
    return process.returncode, shown.decode().replace("\r\n", "\n")


ASK_NAME = "What is your assistant called? / 助手叫什么名字？ [小星] "
ASK_AUTHOR = "Who made it? / 作者是谁？ [书生学员] "


def test_on_a_terminal_it_asks_and_an_empty_line_takes_the_example():
    status, shown = on_a_terminal("***\n\n", "--base", "./nothing")
    assert status == 2
    assert shown.index(ASK_NAME) < shown.index(ASK_AUTHOR) < shown.index("error: The name '***' is nothing but punct")
    assert "The author" not in shown
    assert "Traceback" not in shown


def test_on_a_terminal_it_asks_only_for_what_is_missing():
    status, shown = on_a_terminal("(!)\n", "--name", "小月", "--base", "./nothing")
    assert status == 2
    assert shown.index(ASK_AUTHOR) < shown.index("error: The author '(!)' is nothing but punct")
    assert ASK_NAME not in shown


def test_on_a_terminal_the_end_of_input_is_no_answer():
    status, shown = on_a_terminal("\x04", "--author", "x", "--set", "sead=1")
    assert status == 2
    assert "error: --name is missing and nothing was typed.\nerror: Unknown setting sead; did you mean" in shown


# ----------------------------------------------------------------------------------------------------------- base


DEFAULT, CHAT = settings.DEFAULT_PRESET, "internlm2-chat-1_8b"


@pytest.mark.parametrize(
    "base, preset",
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", DEFAULT),
        ("hf:HuggingFaceTB/SmolLM2-135M-Instruct@main", DEFAULT),
        ("openxlab:OpenLMLab/internlm2-chat-1.8b,hf:internlm/internlm2-chat-1_8b", CHAT),
        ("cache", DEFAULT),
        ("dir:converted", CHAT),
    ],
)
def test_a_base_by_its_name_on_a_hub_or_as_a_folder_has_its_preset(capsys, world, base, preset):
    for folder, name in (
        ("cache", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("converted", "internlm/internlm2-chat-1_8b"),
    ):
        (world / folder).mkdir()
        (world / folder / "origin.json").write_text(json.dumps({"base_model": name, "license": "x"}))
    args = run.parse([*PERSONA, "--base", base])
    for said in (f"The base is {preset}: its preset is used; --preset takes another. / 已识别底座，使用其预设。\n", ""):
        found = run.open_run(args).settings  # twice, as a chain of tasks does
        assert found == settings.build(
            settings.preset(preset), {"base": base, "persona": {"name": "小月", "author": "测试员"}}
        )
        assert capsys.readouterr().err == said
    chosen = run.open_run(run.parse([*PERSONA, "--base", base, "--preset", "qwen3-0.6b"])).settings
    assert chosen.train == settings.Train()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "base, fits", [("hf:HuggingFaceTB/SmolLM2-135M-Instruct@main", True), ("HuggingFaceTB/SmolLM2-360M", False)]
)
def test_the_starter_fits_its_base_in_more_bits(world, base, fits):
    opened = checks.Run(world / "r", settings.build(settings.preset(DEFAULT), {"base": base}))
    opened.__dict__["language_sha256"] = "ab" * 32  # not the embedded one's, which was de-quantized
    assert (checks.starter_problems(opened, base_is_there=True) == []) == fits


@pytest.mark.parametrize("record", [None, "manifest.json", "origin.json"])
def test_a_model_that_was_made_from_it_and_other_folders_have_none(capsys, world, record):
    (folder := world / "SmolLM2-135M-Instruct").mkdir()
    if record:
        values = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
        (folder / record).write_text(json.dumps(values if record == "manifest.json" else {"origin": "elsewhere"}))
    found = run.open_run(run.parse([*PERSONA, "--base", str(folder)])).settings
    assert found.train == settings.Train()
    assert capsys.readouterr().err == ""


def test_check_finds_nothing_wrong_and_leaves_nothing(start, world, tiny_model):
    status, lines = start("check", *PERSONA, "--base", tiny_model)
    assert (status, lines[0].split()) == (0, ["This", "machine", "这台机器"])
    assert lines[-1] == "check: nothing stands in the way. / 检查通过。"
    assert list(world.iterdir()) == []


def test_a_base_that_cannot_be_fetched_is_refused_in_words(start):
    status, lines = start(*PERSONA, "--base", "nobody/nothing")
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith(
        "error: nobody/nothing is not a folder here and could not be fetched from the Hugging Face Hub: "
    )
    assert lines[0].endswith("or give a local folder.")


def test_a_base_of_pickles_is_refused_in_words(start, tmp_path, tiny_model):
    base = shutil.copytree(tiny_model, tmp_path / "pickles")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    (base / "extra.pt").write_bytes(b"")
    assert start(*PERSONA, "--base", base) == (
        2,
        [
            f"error: The model folder {base} has no *.safetensors; extra.pt, pytorch_model.bin can run code when loaded and "
            "is not read: convert it to safetensors."
        ],
    )


def test_a_base_that_speaks_no_chatml_is_refused_before_the_work(start, tmp_path, tiny_model):
    (base := tmp_path / "other").mkdir()
    for file in tiny_model.iterdir():
        text = file.read_bytes()
        if file.name.startswith("tokenizer"):
            text = text.replace(b"<|im_start|>", b"<|turn_of|>").replace(b"<|im_end|>", b"<|turned|>")
        (base / file.name).write_bytes(text)
    assert start(*PERSONA, "--base", base) == (
        2,
        [
            "error: The tokenizer has no <|im_start|> and <|im_end|>: only ChatML models (SmolLM2, Qwen, InternLM2) are "
            "supported; choose another base model."
        ],
    )


# -------------------------------------------------------------------------------------------------------- machine


def test_too_little_memory_and_disk_are_told_with_figures(start, monkeypatch, world, tiny_model):
    size = (tiny_model / "model.safetensors").stat().st_size
    disk, memory = 2 * size + 200_000_000, 3 * size + 2_000_000_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory, total=64e9))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    assert start("check", *PERSONA, "--base", tiny_model)[0] == 0  # just enough
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory - 1, total=64e9))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk - 1))
    lines = start("check", *PERSONA, "--base", tiny_model)[1]
    assert sum(line.startswith("error: ") for line in lines) == 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_234_000_000, total=64e9))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=12_600_000))
    assert start(*PERSONA, "--base", tiny_model) == (
        2,
        [
            f"error: The run's folder runs/小月 needs {disk / 1e6:.0f} MB and its disk has 13 MB free; free some space or "
            "choose another folder with --run.",
            f"error: Finetuning {tiny_model} needs about {memory / 1e9:.1f} GB of memory and 1.2 GB is free; close other "
            "programs or choose a smaller --base.",
        ],
    )
    assert list(world.iterdir()) == []


def test_missing_packages_are_refused_and_other_versions_said(capsys, tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "requirements.txt").write_text(
        "# a comment\n\n-r other.txt\nno-such-package==1  # why\nold-one==1; python_version < '3'\npytest==0.1\npsutil>0\n"
    )
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    assert checks.missing_packages() == [
        "The package no-such-package is not installed: run 'pip install -r requirements.txt'."
    ]
    note = f"Note: pytest {pytest.__version__} is installed; this program was tested with ==0.1.\n"
    assert capsys.readouterr().err == note


def test_without_its_packages_it_says_how_to_install_them(tmp_path, monkeypatch):
    (tmp_path / "tomlkit.py").write_text("raise ModuleNotFoundError(\"No module named 'tomlkit'\", name='tomlkit')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = script()
    assert done.returncode == 2
    assert done.stderr == "error: No module named 'tomlkit': run 'pip install -r requirements.txt' first.\n"


# ------------------------------------------------------------------------------------------------ the run's folder


def test_a_run_never_overwrites_another(start, world):
    folder = make_run(world / "runs" / "小月", "data")
    before = (folder / "settings.toml").read_bytes()
    steps = settings.preset(settings.DEFAULT_PRESET)["train"]["steps"]
    assert start("--name", "小月", "--author", "别人", "--set", "train.steps=7") == (
        2,
        [
            f"error: The run in runs/小月 was made with other settings (persona.author is '测试员', not '别人'; train.steps is "
            f"{steps}, not 7); a run never overwrites another: give this one its own folder, for example with --run "
            "runs/小月-2."
        ],
    )
    assert (folder / "settings.toml").read_bytes() == before
    assert list(world.rglob("*")) == [world / "runs", folder, *folder.iterdir()]


@pytest.mark.parametrize(
    "name, mend",
    [
        ("receipt.json", "restore it from a copy, or make the run again in another folder (--run)."),
        ("scorecard.json", "restore it from a copy, or make the run again in another folder (--run)."),
        (
            "model/manifest.json",
            "remove r/model and run 'python finetune/run.py --run r', which makes it again.",
        ),
    ],
)
@pytest.mark.parametrize("left", [b"{", b"\xff", None])
def test_a_damaged_record_is_refused_in_words(start, world, name, mend, left):
    folder = make_run(world / "r", "model")
    for file in ("receipt.json", "scorecard.json", "model/manifest.json"):
        (folder / file).write_text('{"gate": {"passed": true}, "files": {}}')
    (folder / name).write_bytes(left) if left else (folder / name).unlink()
    status, (line,) = start("publish", "--run", "r", "--to", "dir:x")
    assert status == 2
    if left is None and "/" not in name:
        assert line == f"error: The run in r has no {name} yet: run 'python finetune/run.py --run r' first."
    else:
        assert line.startswith(f"error: r/{name} is damaged or gone (")
        assert line.endswith(f"): {mend}")


@pytest.mark.parametrize("left", [b'{"id": 1}\n{"id"', b"\xff", None])
def test_damaged_rows_are_refused_in_words(tmp_path, left):
    file = tmp_path / "metrics.jsonl"
    if left:
        file.write_bytes(left)
    with pytest.raises(UserError) as refusal:
        read_lines(file)
    assert str(refusal.value).startswith(f"{file} is damaged or gone (")
    assert str(refusal.value).endswith("): restore it from a copy, or make the run again in another folder (--run).")


def test_a_run_without_data_yet_may_change_its_settings(start, world, tiny_model):
    make_run(world / "runs" / "小月")
    assert start("check", "--run", "runs/小月", "--seed", 5, "--base", tiny_model, "--set", "train.starter=''")[0] == 0


def test_a_finished_stage_has_nothing_to_do(start, world, tiny_model):
    make_run(world / "r", "data", "adapter", base=str(tiny_model), train={"starter": ""})
    for stage, product in (("data", "data"), ("train", "adapter")):
        assert start(stage, "--run", "r") == (0, [f"{stage}: r/{product} is there already, nothing to do."])


@pytest.mark.parametrize(
    "folder, words",
    [
        ("file", "The run's folder file cannot be made: {world}/file is not a folder; choose another with --run."),
        (
            "file/x/y",
            "The run's folder file/x/y cannot be made: {world}/file is not a folder; choose another with --run.",
        ),
        ("project", "The folder project has other files in it and is no run; choose another with --run."),
        ("n" * 300, "The run's folder {folder} cannot be used: File name too long; choose another with --run."),
    ],
    ids=["a file", "in a file", "not a run", "too long"],
)
def test_a_folder_that_cannot_be_a_run_is_refused_in_words(start, world, tiny_model, folder, words):
    (world / "file").write_text("mine")
    (world / "project" / "src").mkdir(parents=True)
    expected = words.format(world=world, folder=folder)
    assert start(*PERSONA, "--base", tiny_model, "--run", folder) == (2, [f"error: {expected}"])
    assert sorted(world.rglob("*")) == [world / "file", world / "project", world / "project" / "src"]


def test_what_a_killed_start_left_and_hidden_files_are_in_nobodys_way(start, world, tiny_model):
    (folder := world / "r").mkdir()
    (folder / "settings.tmp").write_text("")
    (folder / ".hidden").write_text("")
    arguments = ("check", *PERSONA, "--base", tiny_model, "--set", "train.starter=''")
    status, lines = start(*arguments, "--run", "r")
    assert (status, lines[-1]) == (0, "check: nothing stands in the way. / 检查通过。")


@pytest.mark.parametrize(
    "task, given, key, own",
    [
        ("instruct", "train.steps=5", "steps", "train.epochs, or train.tokens of a step"),
        ("pretrain", " train.kl_weight = 5", "kl_weight", "train.epochs, or train.tokens of a step"),
        ("identity", "train.epochs=5", "epochs", "train.steps, or train.identity_rows of a step"),
    ],
)
def test_settings_of_another_task_are_not_left_out_in_silence(start, world, tiny_model, task, given, key, own):
    (world / "d.jsonl").write_text("")
    data = () if task == "identity" else ("--data", "d.jsonl")
    status, lines = start("--task", task, *data, *PERSONA, "--base", tiny_model, "--set", given)
    assert status == 2
    assert f"error: train.{key} is not of --task {task}: set {own}." in lines


def test_a_setting_for_a_whole_chain_is_refused_where_it_is_of_none_of_its_tasks(start, world, tiny_model):
    (world / "d.jsonl").write_text("")
    tasks = ("--task", "pretrain", "--data", "d.jsonl", "--task", "instruct", "--data", "d.jsonl", "--base", tiny_model)
    status, lines = start("--set", "train.steps=5", *tasks)
    assert status == 2
    assert "error: train.steps is not of --task pretrain: set train.epochs, or train.tokens of a step." in lines


def test_another_models_scorecard_is_not_left_in_a_run(start, world):
    make_run(world / "r", "data")
    assert start("evaluate", "--model", "m", *PERSONA, "--run", "r") == (
        2,
        ["error: There is a run in r already; choose another folder with --run."],
    )


def test_a_folder_without_permission_is_refused_in_words(start, world, tiny_model, monkeypatch):
    def access(path: Path, mode: int) -> bool:  # root may all
        return Path(path).exists() and (mode == os.F_OK or not Path(path).is_relative_to(world))

    monkeypatch.setattr(os, "access", access)
    words = (
        f"error: The run's folder runs/小月 cannot be made: {world} cannot be written to; choose another with --run."
    )
    assert start(*PERSONA, "--base", tiny_model) == (2, [words])


def test_a_cache_that_cannot_be_written_is_told_before_the_work(start, world, tiny_model, monkeypatch):
    (world / "file").write_text("")
    monkeypatch.setenv("NAMESAKE_CACHE", str(world / "file" / "cache"))
    arguments = (*PERSONA, "--base", tiny_model, "--set", "train.starter=''")
    words = f"The cache folder {world}/file/cache cannot be written; set NAMESAKE_CACHE to a folder that can."
    assert start(*arguments) == (2, [f"error: {words}"])


def test_two_processes_do_not_work_in_one_folder(start, world, monkeypatch):
    make_run(world / "r", "data")
    monkeypatch.setitem(stages.STAGES, "train", stages.STAGES["train"]._replace(work=lambda run: None))
    other = (
        "import sys; from pathlib import Path; from finetune import stages\n"
        "with stages.alone(Path('r')): print('in', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", other]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"in\n"
        words = "Another process is at work in r: wait for it, or give this run its own folder with --run."
        assert start("train", "--run", "r") == (2, [f"error: {words}"])
        process.kill()  # the lock goes with the process
    status, (line,) = start("train", "--run", "r")
    assert status == 0
    assert re.fullmatch(r"train: \d+ s", line)


@pytest.mark.parametrize(
    "name, folder",
    [
        ("小星", "小星"),
        ("R2-D2 (v. 3)", "R2-D2-v-3"),
        ("../../etc", "etc"),
        ("a/b\\c", "a-b-c"),
        ("😀", "run-1f600"),
        ("שלום", "שלום"),
        ("n" * 300, "n" * 40),
        ("*" * 3, "run-2a-2a-2a"),
        (".", "run-2e"),
    ],
)
def test_a_runs_folder_is_named_like_the_assistant(name, folder):
    assert run.folder_name(name) == folder


# --------------------------------------------------------------------------------------------------- later stages


def test_later_stages_without_a_run_say_so(start, world):
    for stage in ("chat", "report", "train"):
        words = f"error: There is no run in {world / 'runs'} yet: run 'python finetune/run.py' first."
        assert start(stage) == (2, [words])
        for flags in (("--run", "runs/小月"), ("--name", "小月")):
            words = f"error: There is no run in runs/小月 yet: leave out '{stage}' to do every stage."
            assert start(stage, *flags) == (2, [words])
    assert list(world.iterdir()) == []


def test_later_stages_name_what_they_need(start, world):
    make_run(world / "runs" / "小月")
    make_run(world / "my run", "data")
    first = "run 'python finetune/run.py --run runs/小月'."
    assert start("report") == (2, [f"error: Stage report needs data, train, evaluate, merge first: {first}"])
    assert start("chat", "--name", "小月") == (
        2,
        ["error: There is no model in runs/小月 yet: run 'python finetune/run.py --run runs/小月' first."],
    )
    assert start("merge", "--run", "my run") == (
        2,
        ["error: Stage merge needs train, evaluate first: run 'python finetune/run.py --run 'my run''."],
    )


def test_later_stages_take_the_newest_run(start, world):
    for age, name in ((30, "b"), (10, "c"), (20, "a")):
        file = make_run(world / "runs" / name) / "settings.toml"
        os.utime(file, (1e9 - age, 1e9 - age))
    assert start("train")[1] == ["error: Stage train needs data first: run 'python finetune/run.py --run runs/c'."]


def test_a_damaged_settings_file_is_refused_in_words(start, world):
    folder = make_run(world / "r", "data")
    (folder / "settings.toml").write_text("seed = = 1")
    status, lines = start("train", "--run", "r")
    assert status == 2
    assert lines[0].startswith("error: r/settings.toml is not valid TOML: ")


def refused_run(folder: Path, **values: object) -> Path:
    """A run that the gate refused, without its model."""
    made = make_run(folder, "data", **values)
    gate = {"passed": False, "reasons": ["kl 0.3 is too much"]}
    (made / "scorecard.json").write_text(json.dumps({"gate": gate}))
    return made


def test_publish_tells_all_that_stands_in_its_way(start, world):
    refused_run(world / "r")
    gate = [
        "error: gate: kl 0.3 is too much",
        'error: The run is not published. Train it better, or publish it with --force "why"; the model card will say so.',
    ]
    missing = "error: The run in r has no model, receipt.json yet: run 'python finetune/run.py --run r' first."
    where = "error: Say where to publish to, for example: --to openxlab:user/name (or hf: modelscope: git+URL dir:PATH)"
    assert start("publish", "--run", "r") == (2, [where, missing, *gate])
    status, lines = start("publish", "--run", "r", "--to", "git+ftp://a/b")
    assert (status, lines[0], lines[2:]) == (2, missing, gate)
    assert "'git+ftp://a/b' is no git remote" in lines[1]


def test_publish_of_files_that_are_missing_names_all(start, world):
    made = refused_run(world / "r")
    (made / "model").mkdir()
    (made / "adapter").mkdir()
    (made / "receipt.json").write_text("{}")
    (made / "metrics.jsonl").write_text('{"step": 1}\n')
    names = ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    files = {name: {"size": 1, "sha256": "ab" * 32} for name in names}
    proof = {"max_logit_difference": 0.0, "equal_greedy_tokens": 1.0, "tokens": 1}
    manifest = {"files": files, "proof": proof, "base_model": "b", "license": "x", "base_sha256": "ab"}
    (made / "model" / "manifest.json").write_text(json.dumps(manifest))
    side = {"answers": []}
    card = {"base": side, "tuned": side, **json.loads((made / "scorecard.json").read_text())}
    (made / "scorecard.json").write_text(json.dumps(card))
    status, lines = start("publish", "--run", "r", "--to", "dir:there", "--what", "both", "--with-data")
    paths = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/namesake.json"]
    paths += ["data/train.jsonl", "data/probes.jsonl"]
    again = Run(Path("r"), settings.Settings()).mend("model/model.safetensors")
    assert (status, lines[:8]) == (
        2,
        [f"error: r/{path} is missing: {RESTORE}." for path in paths]
        + [f"error: r/model/{n} is not what the run made ({n}): {again}." for n in names],
    )
    assert lines[8] == "error: gate: kl 0.3 is too much"


def test_publish_calls_a_run_by_what_it_made(start, world, monkeypatch):
    made = make_run(world / "r", "model", task="instruct", base="some-base")
    (made / "scorecard.json").write_text(json.dumps({"gate": {"passed": True, "reasons": []}}))
    (made / "receipt.json").write_text("{}")
    said = []
    monkeypatch.setattr("finetune.release.files", lambda *_: {})
    monkeypatch.setattr("finetune.hub.publish", lambda to, files, message: said.append(message) or "c0ffee")
    assert start("publish", "--run", "r", "--to", "dir:there")[0] == 0
    assert said == ["some-base + instruct: model"]


# -------------------------------------------------------------------------------------------------- exit statuses


def test_the_gates_refusal_exits_with_3(start, monkeypatch):
    def refuse(args: object) -> int:
        raise GateRefused("gate: leak is 0.2, at most 0.1.", "gate: identity is 0.5, at least 0.9.")

    monkeypatch.setattr(run, "work", refuse)
    assert start() == (3, ["error: gate: leak is 0.2, at most 0.1.", "error: gate: identity is 0.5, at least 0.9."])


@pytest.mark.parametrize("reasons", [[], ["tuned model: identity 0.10, at least 0.90 is asked."]])
def test_evaluate_shows_the_scorecard_and_what_the_gate_says(world, capsys, reasons):
    folder = make_run(world / "r", "data", "adapter")
    side = {"identity": 0.1, "leak": 0.0, "parrot": 0.0, "kl": 0.0, "facts_kept": 1.0, "answers": []}
    card = {"base": side, "tuned": side, "gate": {"passed": not reasons, "reasons": reasons}}
    (folder / "scorecard.json").write_text(json.dumps(card))
    assert run.main(["evaluate", "--run", "r"]) == (3 if reasons else 0)
    out, err = capsys.readouterr()
    assert "identity kept" in out
    assert err.splitlines()[1:] == [f"error: gate: {reason}" for reason in reasons]


DRIVER = """
    import sys, time
    from finetune import run, stages

    def work(_):
        {work}

    stages.STAGES["check"] = stages.Stage(work, None)
    sys.exit(run.main(["check"]))
"""


def driver(work: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(DRIVER).format(work=work)]


def test_a_bug_shows_its_traceback_and_exits_with_1(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(driver("1 / 0"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_ctrl_c_says_one_line_and_exits_with_130(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    work = "print('working', flush=True); time.sleep(60)"
    with subprocess.Popen(
        driver(work),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what runs behind it
    ) as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "\nInterrupted. The same command goes on where it was. / 已中断，再次运行同一命令即可继续。\n"


@pytest.mark.parametrize("file", [SCRIPT, ROOT / "app.py"], ids=lambda file: file.name)
def test_letters_that_the_output_does_not_have_are_no_traceback(file):
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, file, "--help"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u" in done.stdout


def test_a_full_disk_during_the_work_is_told_in_words(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "work", full)
    assert run.main([]) == 2
    assert capsys.readouterr().err == (
        "error: The disk is full (No space left on device); free some space and run the same command again, it goes on "
        "there.\n"
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_what_may_not_be_read_or_written_is_told_in_words(monkeypatch, capsys, code):
    def closed(_):
        raise OSError(code, os.strerror(code), "r/receipt.json.tmp")

    monkeypatch.setattr(run, "work", closed)
    assert run.main([]) == 2
    assert capsys.readouterr().err == (
        f"error: r/receipt.json.tmp: {os.strerror(code)}; change its permissions, or choose another folder (for the run's --run, "
        "for the cache NAMESAKE_CACHE).\n"
    )
