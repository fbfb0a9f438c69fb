"""The command line: `python finetune/run.py [STAGE] --name 小星 --author 书生学员`. Stages, flags, exit statuses.

Exit status: 0 done; 2 the user can mend it; 1 a bug; 3 the scorecard's gate refused.
"""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python puts this file's folder first on the import path; the package lies one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from finetune import checks, identity, settings, stages
    from finetune.embedded import say
    from finetune.errors import GateRefused, Problems, UserError
    from finetune.run_folder import Run
except ModuleNotFoundError as error:
    if error.name.startswith("finetune"):
        raise
    print(f"error: {error}: run 'pip install -r requirements.txt' first.", file=sys.stderr)
    sys.exit(2)

RUNS = Path("runs")
STAGES = (*stages.STAGES, "publish", "pull", "deploy")
FLAGS = ("base", "method", "task", "seed", "data", "skip_bad")  # which are settings of the same name
NAMED = (None, "identity", "vision")  # tasks whose model learns a name; identity where none is said
FIRST = (None, "check", "data", "compare")  # what a new run begins with; other stages need one that is there
OF_NAMES = ("steps", "identity_rows", "near_rows", "ordinary_rows", "kl_weight", "develop_every")
NOT_OF = {  # settings in [train] of which a task takes no notice, and those that it has instead
    "identity": (("epochs", "tokens"), "train.steps, or train.identity_rows of a step"),
    **dict.fromkeys(("instruct", "pretrain"), (OF_NAMES, "train.epochs, or train.tokens of a step")),
}
ONLY = {  # flags that are not for all stages: whose they are
    **dict.fromkeys(("to", "force", "dry_run"), ("publish", "deploy")),
    **dict.fromkeys(("what", "with_data"), ("publish",)),
    "verify": ("pull",),
}
WHAT = ("model", "adapter", "both")


def main(arguments: list[str] | None = None) -> int:
    try:
        return chain([parse(part) for part in parts(sys.argv[1:] if arguments is None else arguments)])
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)  # whichever process it is
        return error.status
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS) and error.filename:
            say(
                f"error: {error.filename}: {error.strerror}; change its permissions, or choose another folder (for the run's "
                "--run, for the cache NAMESAKE_CACHE)."
            )
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(
            f"error: The disk is full ({error.strerror}); free some space and run the same command again, it goes on there."
        )
        return 2
    except KeyboardInterrupt:
        say("\nInterrupted. The same command goes on where it was. / 已中断，再次运行同一命令即可继续。")
        return 130


def parts(arguments: list[str]) -> list[list[str]]:
    """Several --task make a chain of runs: what is before the first is for all of them, what follows one is its own."""
    starts = [i for i, word in enumerate(arguments) if word.partition("=")[0] == "--task"]
    if len(starts) < 2:
        return [arguments]
    return [arguments[: starts[0]] + arguments[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]


def chain(runs: list[argparse.Namespace]) -> int:
    """One run, or several of which each starts from the last's model: FOLDER-1-TASK ..., and the last in FOLDER itself."""
    if len(runs) == 1:
        return work(runs[0])
    if any(args.stage or args.model for args in runs):
        raise UserError(
            "A chain of tasks does every stage: leave the stage out, or name it with one task and its --run."
        )
    last, refused = runs[-1], []
    shared = set.intersection(*(set(args.set) for args in runs))
    shared -= {text for text in shared if all(foreign(args.task, text) for args in runs)}
    for args in runs:  # what is for all is for those that take notice of it
        args.set = [text for text in args.set if text not in shared or not foreign(args.task, text)]
    if last.task in NAMED:
        ask_persona(last)
    folder = last.run or RUNS / folder_name(last.name if last.task in NAMED else last.task)
    for i, args in enumerate(runs):
        args.run = folder if args is last else folder.with_name(f"{folder.name}-{i + 1}-{args.task}")
        args.base = args.base if i == 0 else str(runs[i - 1].run / "model")
    problems = Problems()
    for args in runs:
        with problems.collect():
            problems.found += checks.task_problems(open_run(args))
    problems.stop_if_any()
    for args in runs:
        try:
            work(args)
        except GateRefused as error:  # a later task may mend it, and each has its own report
            refused += [f"{args.run}: {problem}" for problem in error.problems]
    if refused:
        raise GateRefused(*refused)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags. Raises UserError for a stage or flags that do not exist."""
    parse = argparse.ArgumentParser(
        prog="python finetune/run.py",
        description="Give a chat model your assistant's name: data, training, proof, one ordinary model folder. "
        "给对话模型起一个名字：数据、训练、评测、合并。",
        allow_abbrev=False,
    )
    parse.add_argument(
        "stage",
        nargs="?",
        metavar="STAGE",
        help=f"one stage only: {', '.join(STAGES)} (default: all, finished ones are skipped)",
    )
    parse.add_argument("--name", help="what the assistant is called / 助手的名字")
    parse.add_argument("--author", help="who made it / 作者")
    parse.add_argument(
        "--base", help="a preset's name, a local folder or hf:user/name (default: the embedded SmolLM2-135M-Instruct)"
    )
    parse.add_argument("--preset", help=f"settings to start from: {', '.join(settings.preset_names())}")
    parse.add_argument("--method", help="lora, qlora (the base in 4 bits) or full (every weight)")
    parse.add_argument(
        "--task",
        help="identity, instruct (conversations, with --data), pretrain (texts, with --data), vision-projector (captions), then "
        "vision (dialogues about pictures, and the name)",
    )
    parse.add_argument(
        "--data", action="append", help="a file or folder to learn from, PATH or PATH=WEIGHT; several times for several"
    )
    parse.add_argument("--skip-bad", action="store_true", default=None, help="go on without rows that are wrong")
    parse.add_argument("--run", type=Path, help="the run's folder (default: runs/NAME)")
    parse.add_argument("--seed", help="a whole number")
    parse.add_argument(
        "--model", help="evaluate or deploy this model, a folder or hf:user/name, made here or elsewhere"
    )
    parse.add_argument(
        "--to",
        metavar="REF",
        help="publish or deploy there: openxlab: hf: modelscope:user/name, git+URL, dir:PATH / 发布到",
    )
    parse.add_argument("--what", help=f"publish this: {', '.join(WHAT)} (default: model)")
    parse.add_argument(
        "--force",
        metavar="WHY",
        default="",
        help="publish in spite of the gate, and the model card says why; or deploy weights that are not public",
    )
    parse.add_argument("--dry-run", action="store_true", help="publish, deploy: only list what would be sent")
    parse.add_argument("--with-data", action="store_true", help="publish the training data as well")
    parse.add_argument(
        "--verify", action="store_true", help="pull: ask the model its witnesses' questions again / 复验"
    )
    parse.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any other setting")
    args, unknown = parse.parse_known_args(arguments)
    known = ["--help", *(f"--{name.replace('_', '-')}" for name in vars(args) if name != "stage")]
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    wrong = [_unknown("flag", flag, known) for flag in flags]
    if not flags and args.stage not in (None, *STAGES):  # the value of an unknown flag would pass for the stage
        wrong.append(_unknown("stage", args.stage, STAGES))
    if args.seed is not None and not re.fullmatch(r"[+-]?\d+", args.seed):
        wrong.append(f"--seed is {args.seed!r}; it must be a whole number.")
    if args.what not in (None, *WHAT):
        wrong.append(f"--what is {args.what!r}; it must be {' or '.join(WHAT)}.")
    if not wrong:
        wrong = [
            f"--{flag.replace('_', '-')} goes with {' or '.join(its)}: leave it out, or name that stage."
            for flag, its in ONLY.items()
            if getattr(args, flag) and args.stage not in its
        ]
        if args.stage == "pull":
            given = [flag for flag, value in vars(args).items() if value != parse.get_default(flag)]
            wrong += [
                f"--{flag.replace('_', '-')} does not go with pull, which fetches a reference: leave it out."
                for flag in given
                if flag not in ("stage", "base", "verify", *ONLY)
            ]
    if wrong:
        raise UserError(*wrong)
    args.seed = None if args.seed is None else int(args.seed)
    args.ref = unknown.pop(0) if args.stage == "pull" and unknown else None
    if unknown:
        raise UserError(f"One stage at a time: leave out {' '.join(unknown)}.")
    return args


def _unknown(what: str, word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"Unknown {what} {word}; " + (f"did you mean {close[0]}?" if close else "see python finetune/run.py --help.")


def work(args: argparse.Namespace) -> int:
    if args.model and args.stage == "deploy":
        return deploy(None, args)
    if args.model:
        return evaluate_model(args)
    if args.stage == "pull":
        return pull(args)
    if args.stage not in FIRST:
        named = args.name or (args.task if args.task not in NAMED else None)
        args.run = args.run or (RUNS / folder_name(named) if named else newest_run())
        if not has(args.run, "settings.toml"):
            raise UserError(f"There is no run in {args.run} yet: leave out '{args.stage}' to do every stage.")
    run = open_run(args)
    if args.stage == "publish":
        return publish(run, args)
    if args.stage == "deploy":
        return deploy(run, args)
    if args.stage == "data" and stages.is_main():
        checks.check(run)
    if args.stage:
        if not stages.perform(run, args.stage):
            say(f"{args.stage}: {run.folder / stages.STAGES[args.stage].product} is there already, nothing to do.")
        elif args.stage == "check":
            say("check: nothing stands in the way. / 检查通过。")
        if args.stage == "evaluate" and stages.is_main():
            from finetune.report import print_scorecard

            print_scorecard(run)
            stop_if_refused(run)
        return 0

    to_do = stages.agreed([name for name in stages.PIPELINE if not stages.is_done(run, name)])
    if to_do:
        if stages.is_main():
            checks.check(run)
        for name in to_do:
            say(f"[{name}]")
            stages.perform(run, name)
    else:
        say(f"Everything in {run.folder} is finished, nothing to do. / 全部完成，无需重做。")
    stages.agreed(None)  # the last stage is done
    if not stages.is_main():
        return 0
    from finetune.report import print_summary

    print_summary(run)
    stop_if_refused(run)
    return 0


def stop_if_refused(run: Run) -> None:
    gate = run.read("scorecard.json")["gate"]
    if not gate["passed"]:
        raise GateRefused(*(f"gate: {reason}" for reason in gate["reasons"]))


def evaluate_model(args: argparse.Namespace) -> int:
    """`evaluate --model REF`: a scorecard and nothing else, in a folder of its own."""
    if args.stage != "evaluate":
        raise UserError(f"--model goes with the evaluate stage: python finetune/run.py evaluate --model {args.model}")
    ask_persona(args)
    args.run = args.run or RUNS / folder_name(f"{args.name} in {Path(args.model).absolute().name}")
    if has(args.run, "scorecard.json"):
        raise UserError(f"There is a scorecard in {args.run} already; choose another folder with --run.")
    if has(args.run, "settings.toml"):  # its own scorecard is of its own model
        raise UserError(f"There is a run in {args.run} already; choose another folder with --run.")
    run = open_run(args)
    stages.evaluate_model(run, args.model)
    from finetune.report import print_scorecard

    print_scorecard(run)
    return 0


def pull(args: argparse.Namespace) -> int:
    """`pull REF`: the folder's path is the last line of standard output."""
    from finetune import hub

    if not args.ref:
        raise UserError("Say what to pull, for example: python finetune/run.py pull hf:user/name")
    folder, failed = hub.pull_first(hub.several(args.ref))
    for reason in failed:
        say(f"Note: {reason}")
    if args.verify:
        say(f"{hub.verify(folder, args.base)} witnesses answer as the scored model did. / 见证问题的回答与评测时一致。")
    print(folder)
    return 0


def publish(run: Run, args: argparse.Namespace) -> int:
    """`publish --to REF`: what is there afterwards is what the run made, by the place's own record."""
    from finetune import hub, release

    problems, what, refused, files = Problems(), args.what or "model", (), {}
    if not args.to:
        problems.found.append(
            "Say where to publish to, for example: --to openxlab:user/name (or hf: modelscope: git+URL dir:PATH)"
        )
    if missing := [n for n in ("scorecard.json", "model", "receipt.json") if not has(run.folder, n)]:
        problems.found.append(f"The run in {run.folder} has no {', '.join(missing)} yet: run '{run.command}' first.")
    if "scorecard.json" not in missing:
        try:
            release.gate(run, args.force)
        except GateRefused as error:
            refused = error.problems
    if args.to:
        with problems.collect():
            place = hub.target(args.to)
            files = release.files(run, place, what, args.force, args.with_data) if not missing else {}
    if problems.found:
        raise UserError(*problems.found, *refused)
    if refused:
        raise GateRefused(*refused)
    if args.dry_run:
        _, send, remove, _ = hub.changes(args.to, files)
        print("\n".join(hub.listed(send, remove)))
        return 0
    revision = hub.publish(args.to, files, f"{run.title}: {what}")
    published = run.read("receipt.json").get("published", {})
    run.note(published={**published, args.to: {"what": what, "revision": revision}})
    say(f"Published 已发布: {args.to}{f' (commit {revision})' if revision else ''}")
    say(f"Next 下一步: python finetune/run.py pull --verify {args.to}")
    return 0


def deploy(run: Run | None, args: argparse.Namespace) -> int:
    """`deploy --to SPACE`: a space of the run's published model, or of any with --model; the platform's form on standard
    output."""
    from finetune import space

    if not args.to:
        raise UserError(
            "Say where the space goes, for example: --to hf:user/name (or modelscope:user/name, dir:PATH, "
            "openxlab:git+https://github.com/user/name.git)"
        )
    revision = space.deploy(args.to, run, args.model, args.force, args.dry_run)
    if not args.dry_run:
        say(f"Deployed 已部署: {args.to}{f' (commit {revision})' if revision else ''}")
    return 0


def open_run(args: argparse.Namespace) -> Run:
    """The run that the flags mean. Raises UserError with all problems."""
    stored, problems = {}, Problems()
    if args.run and has(args.run, "settings.toml"):
        stored = settings.read_toml(args.run / "settings.toml")
    elif args.stage != "check" and args.task in NAMED:
        with problems.collect():
            ask_persona(args)
    if args.stage == "check" and args.data and args.task is None and not stored:
        args.task = checks.task_of(args.data)
    flags = {key: value for key in FLAGS if (value := getattr(args, key)) is not None}
    persona = {key: value for key in ("name", "author") if (value := getattr(args, key)) is not None}
    layers = [stored, flags, {"persona": persona}]
    with problems.collect():
        known = args.preset or checks.preset_of(args.base or settings.DEFAULT_PRESET)
        if known:
            layers.insert(0, settings.preset(known))
            if not stored and args.base not in (None, known) and not args.preset:
                say(f"The base is {known}: its preset is used; --preset takes another. / 已识别底座，使用其预设。")
                args.preset = known  # of a chain, which asks twice, it is said once
        elif args.task == "vision":
            layers.insert(0, phase_one(args.base))
    for assignment in args.set:
        with problems.collect():
            layers.append(settings.parse_assignment(assignment))
    values, wrong = settings.collect(*layers)
    problems.found += wrong
    for key in filter(None, (foreign(values.task, text) for text in args.set)):
        problems.found.append(f"train.{key} is not of --task {values.task}: set {NOT_OF[values.task][1]}.")
    named = values.persona.name if values.task in NAMED else values.task
    run = Run(args.run or RUNS / folder_name(named), values)
    if problems.found and args.stage in FIRST:
        checks.check(run, problems)  # tells its own at the same time
    problems.stop_if_any()

    if not has(run.folder, "settings.toml"):
        if has(run.folder):
            raise UserError(f"The folder {run.folder} has other files in it and is no run; choose another with --run.")
    elif has(run.folder, "data"):
        made_with = settings.build(settings.read_toml(run.folder / "settings.toml"))
        if differences := settings.differences(made_with, values):
            raise UserError(
                f"The run in {run.folder} was made with other settings ({'; '.join(differences)}); a run never "
                f"overwrites another: give this one its own folder, for example with --run {run.folder}-2."
            )
    return run


def foreign(task: str, assignment: str) -> str:
    """Which setting in [train] it sets, if the task takes no notice of that one."""
    key = re.match(r"\s*train\.(\w+)\s*=", assignment)
    return key[1] if key and key[1] in NOT_OF.get(task, ((), ""))[0] else ""


def phase_one(base: str) -> dict[str, Any]:
    """What of the settings of the run that gave the base its eyes holds for the next phase too: its language model is the
    same, so it begins from the same starter and answers to the same name, and its projector needs as many steps."""
    file = Path(base.removeprefix("dir:")).expanduser().parent / "settings.toml"
    made = settings.read_toml(file) if file.is_file() else {}
    kept = ("train", "gate", "merge", "old_name", "old_maker")
    if made.get("task") != "vision-projector":
        return {}
    sizes = {key: value for key, value in made.get("vision", {}).items() if key in ("pictures", "rows", "steps")}
    return {key: made[key] for key in kept if key in made} | {"vision": sizes}


def has(folder: Path, name: str = "") -> bool:
    """Whether `name` is in the folder; without one, whether anything is, besides hidden and unfinished files and what
    `check` leaves."""
    try:
        there = [file.name for file in folder.iterdir()]
        return name in there if name else not all(n == "check.html" or re.match(r"\.|.*\.tmp$", n) for n in there)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a name too long, no permission
        raise UserError(
            f"The run's folder {folder} cannot be used: {error.strerror}; choose another with --run."
        ) from error


def ask_persona(args: argparse.Namespace) -> None:
    """Ask on a terminal for what the flags leave open; without a terminal and without a name use the example persona."""
    example = settings.Persona()
    missing = [field for field in ("name", "author") if getattr(args, field) is None]
    if sys.stdin.isatty():
        words = {"name": "What is your assistant called? / 助手叫什么名字？", "author": "Who made it? / 作者是谁？"}
        for field in missing:
            try:
                typed = input(f"{words[field]} [{getattr(example, field)}] ").strip()
                setattr(args, field, typed or getattr(example, field))
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
    name = name[: identity.MAX_LENGTH]
    return re.sub(r"[^\w]+", "-", name).strip("-") or "run-" + "-".join(f"{ord(c):x}" for c in name)


def newest_run() -> Path:
    found = sorted(RUNS.glob("*/settings.toml"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"There is no run in {RUNS.absolute()} yet: run 'python finetune/run.py' first.")
    return found[-1].parent


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # where its encoding lacks a letter; as standard error does
    sys.exit(main())
