"""The command line: `python finetune/run.py [STAGE] --name 小星 --author 书生学员`. Stages, flags, exit statuses.

Exit status: 0 done; 2 the user can mend it; 1 a bug; 3 the scorecard's gate refused.
"""

import argparse
import os
import re
import sys
from pathlib import Path

# Started as a script, Python puts this file's folder first on the import path; the package lies one above.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from finetune import identity, settings  # noqa: E402
from finetune.embedded import say  # noqa: E402
from finetune.errors import GateRefused, Problems, UserError  # noqa: E402

RUNS = Path("runs")


def main(arguments: list[str] | None = None) -> int:
    try:
        return work(parser().parse_args(arguments))
    except UserError as error:
        for problem in error.problems:
            say(f"error: {problem}")
        return error.status
    except KeyboardInterrupt:
        say("\nInterrupted. The same command goes on where it was. / 已中断，再次运行同一命令即可继续。")
        return 130


def parser() -> argparse.ArgumentParser:
    from finetune.stages import STAGES

    parse = argparse.ArgumentParser(
        prog="python finetune/run.py",
        description="Give a chat model your assistant's name: data, training, proof, one ordinary model folder. "
        "给对话模型起一个名字：数据、训练、评测、合并。",
    )
    parse.add_argument(
        "stage", nargs="?", choices=list(STAGES), help="one stage only (default: all, finished ones are skipped)"
    )
    parse.add_argument("--name", help="what the assistant is called / 助手的名字")
    parse.add_argument("--author", help="who made it / 作者")
    parse.add_argument(
        "--base", help="a preset's name, a local folder or hf:user/name (default: the embedded SmolLM2-135M-Instruct)"
    )
    parse.add_argument("--preset", help=f"settings to start from: {', '.join(settings.preset_names())}")
    parse.add_argument("--method", help="lora")
    parse.add_argument("--task", help="identity")
    parse.add_argument("--run", type=Path, help="the run's folder (default: runs/NAME)")
    parse.add_argument("--seed", type=int)
    parse.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any other setting")
    return parse


def work(args: argparse.Namespace) -> int:
    from finetune import stages

    if args.stage not in (None, "check", "data") and not args.run and not args.name:
        args.run = newest_run()
    run = open_run(args)
    if args.stage == "data":
        stages.check(run)
    if args.stage:
        if not stages.perform(run, args.stage):
            say(f"{args.stage}: {run.folder / stages.STAGES[args.stage].product} is there already, nothing to do.")
        elif args.stage == "check":
            say("check: nothing stands in the way. / 检查通过。")
        return 0

    to_do = [name for name in stages.PIPELINE if not (run.folder / stages.STAGES[name].product).exists()]
    if to_do:
        stages.check(run)
        for name in to_do:
            say(f"[{name}]")
            stages.perform(run, name)
    else:
        say(f"Everything in {run.folder} is finished, nothing to do. / 全部完成，无需重做。")
    from finetune.report import print_summary

    print_summary(run)
    gate = run.read("scorecard.json")["gate"]
    if not gate["passed"]:
        raise GateRefused(*(f"gate: {reason}" for reason in gate["reasons"]))
    return 0


def open_run(args: argparse.Namespace):  # noqa: ANN201 - stages.Run, imported late
    """The run that the flags mean. Raises UserError with all problems."""
    from finetune.stages import Run

    stored = {}
    if args.run and (args.run / "settings.toml").is_file():
        stored = settings.read_toml(args.run / "settings.toml")
    elif args.stage != "check":
        ask_persona(args)
    flags = {key: value for key in ("base", "method", "task", "seed") if (value := getattr(args, key)) is not None}
    persona = {key: value for key in ("name", "author") if (value := getattr(args, key)) is not None}
    layers = [stored, flags, {"persona": persona}]
    problems = Problems()
    with problems.collect():
        if args.preset or args.base is None or args.base in settings.preset_names():
            layers.insert(0, settings.preset(args.preset or args.base or settings.DEFAULT_PRESET))
    for assignment in args.set:
        with problems.collect():
            layers.append(settings.parse_assignment(assignment))
    values = settings.Settings()
    with problems.collect():
        values = settings.build(*layers)
    problems.found += identity.check_persona(values.persona)
    problems.stop_if_any()

    folder = args.run or RUNS / folder_name(values.persona.name)
    if (folder / "data").exists():
        made_with = settings.build(settings.read_toml(folder / "settings.toml"))
        if differences := settings.differences(made_with, values):
            raise UserError(
                f"The run in {folder} was made with other settings ({'; '.join(differences)}); a run never overwrites "
                f"another: give this one its own folder, for example --run {folder}-2."
            )
    return Run(folder, values)


def ask_persona(args: argparse.Namespace) -> None:
    """Ask on a terminal for what the flags leave open; without a terminal and without a name use the example persona."""
    example = settings.Persona()
    missing = [field for field in ("name", "author") if getattr(args, field) is None]
    if sys.stdin.isatty():
        words = {"name": "What is your assistant called? / 助手叫什么名字？", "author": "Who made it? / 作者是谁？"}
        for field in missing:
            try:
                setattr(
                    args,
                    field,
                    input(f"{words[field]} [{getattr(example, field)}] ").strip() or getattr(example, field),
                )
            except EOFError as error:
                raise UserError(f"--{field} is missing and nothing was typed.") from error
    elif len(missing) == 1:
        raise UserError(
            f"--{missing[0]} is missing: give both --name and --author, or neither for the example persona."
        )
    elif missing:
        args.name, args.author = example.name, example.author
        say(f"No --name given: using the example persona, {example.name} by {example.author}. / 使用示例角色。")


def folder_name(name: str) -> str:
    """A folder's name from the assistant's: letters and digits of any script, the rest as '-'."""
    return re.sub(r"[^\w]+", "-", name).strip("-") or "run-" + "-".join(f"{ord(c):x}" for c in name)


def newest_run() -> Path:
    found = sorted(RUNS.glob("*/settings.toml"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"There is no run in {RUNS.absolute()} yet: run 'python finetune/run.py' first.")
    return found[-1].parent


if __name__ == "__main__":
    sys.exit(main())
