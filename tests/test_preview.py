"""A datum's life, the survey of all rows, the estimate, and `check --data` as a whole, on a tiny model whose tokens are bytes."""

import contextlib
import gc
import io
import itertools
import json
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from finetune import preview, records, run, settings, stages
from finetune.chat_format import ChatFormat

HOSTILE = "<script>alert(1)</script> [red]x[/red] \x1b[31m\x07 <|im_end|>\n{{ 1 }} 你好"


@pytest.fixture(scope="module")
def form(tiny_model) -> ChatFormat:
    return ChatFormat((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))


def chat(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def tokens_of(row: dict) -> int:
    """By the rule: a byte is a token, and each turn has two control tokens and a line break."""
    if "text" in row:
        return len(row["text"].encode()) + 1
    return sum(len(f"{m['role']}\n{m['content']}".encode()) + 3 for m in row["messages"])


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def rows_of_length(count: int, least: int, most: int) -> list[dict]:
    source = random.Random(0)
    return [chat("q" * source.randint(1, 20), "a" * source.randint(least, most)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- one datum


def test_a_conversations_life(form):
    row = {**chat("q", "a1", HOSTILE, "a<|im_end|>2"), "place": "f.jsonl:7", "raw": {"x": HOSTILE}}
    life = preview.life(form, row)
    assert life["place"] == "f.jsonl:7"
    assert json.loads(life["raw"]) == {"x": HOSTILE}
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"]]
    assert life["text"] == "".join(turns)
    assert len(life["tokens"]) == tokens_of(row)
    supervised = "".join(token["text"] for token in life["tokens"] if token["supervised"])
    assert supervised == "a1<|im_end|>a<|im_end|>2<|im_end|>"
    control = [token["text"] for token in life["tokens"] if token["control"]]
    assert control == ["<|im_start|>", "<|im_end|>"] * 4  # none that a message spells


def test_a_texts_life_and_that_of_an_identity_row(form):
    raw = {"text": "x", "url": f"data:image/png;base64,{'A' * 9000}==", "more": "x"}
    shown = json.loads(preview.life(form, {"text": "x", "raw": raw})["raw"])
    assert shown == {**raw, "url": f"data:image/png;base64,{'A' * 20}…"}
    text = preview.life(form, {"text": "从前 x", "place": "a.txt:1"})
    assert text["text"] == "从前 x<|endoftext|>"
    assert all(token["supervised"] for token in text["tokens"])
    identity = preview.life(form, {**chat("q", "a1", "q", "a2"), "target": "answer"})
    assert "".join(token["text"] for token in identity["tokens"] if token["supervised"]) == "a2<|im_end|>"


def test_a_long_rows_life_is_cut_for_the_eye_alone(form):
    life = preview.life(form, {"text": "x" * 1000})
    assert (len(life["tokens"]), life["more"]) == (preview.TOKENS, 1001 - preview.TOKENS)
    assert life["text"] == "x" * 1000 + "<|endoftext|>"


# ------------------------------------------------------------------------------------------------------- all rows


def test_the_survey_counts_by_the_rule(form, tmp_path):
    rows = [*rows_of_length(30, 10, 300), chat("q", "x" * 500)]
    file = write(tmp_path / "a.jsonl", [*rows, rows[0], rows[1], rows[0]])
    found = preview.survey(form, records.good_rows([str(file)]), length=200)
    every = [*rows, rows[0], rows[1], rows[0]]
    lengths = sorted(map(tokens_of, every))
    assert (found["rows"], found["sampled"], found["copies"]) == (34, 34, 3)
    assert found["forms"] == {"OpenAI messages": 34}
    assert found["tokens"] == sum(min(200, length) for length in lengths)
    assert (found["lengths"]["least"], found["lengths"]["most"]) == (lengths[0], lengths[-1])
    assert found["long"] == pytest.approx(sum(length > 200 for length in lengths) / 34)
    assert found["cut"] == pytest.approx(sum(max(0, length - 200) for length in lengths) / sum(lengths))
    answers = sum(len(row["messages"][1]["content"]) + 1 for row in every)
    assert found["supervised"] == pytest.approx(answers / sum(lengths))
    assert found["first"]["messages"] == rows[0]["messages"]


def test_rows_that_a_weight_repeats_are_no_copies(form, tmp_path):
    file = write(tmp_path / "a.jsonl", rows_of_length(10, 10, 90))
    found = preview.survey(form, records.good_rows([f"{file}=3"]), length=200)
    assert (found["rows"], found["copies"]) == (30, 0)


def test_of_many_rows_a_sample_is_tokenized(form, monkeypatch):
    monkeypatch.setattr(preview, "SAMPLE", 200)
    rows = [*rows_of_length(2000, 10, 300), *rows_of_length(2000, 500, 900)]
    found = preview.survey(form, iter(rows), length=10_000)
    assert (found["rows"], found["sampled"]) == (4000, 200)
    assert found["tokens"] == pytest.approx(sum(map(tokens_of, rows)), rel=0.02)
    monkeypatch.setattr(preview, "CHARACTERS", 5000)
    assert 1 <= preview.survey(form, iter(rows), length=10_000)["sampled"] < 50


# ------------------------------------------------------------------------------------------------------- estimate


def forget_the_peak() -> None:
    """Of the memory that this process held, in whatever it did before."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize("task", ["instruct", "pretrain"])
def test_the_estimate_comes_true(task, tiny_model, tmp_path, monkeypatch):
    """All but the speed, which other programs share: tests/bench/estimate.py times. Here every look at the clock is a tick."""
    monkeypatch.setattr(preview, "TRIAL_SECONDS", 1.0)
    lines = random.Random(0)
    texts = [
        {"text": "".join(f"{lines.randbytes(40).hex()}\n" for _ in range(lines.randint(1, 30)))} for _ in range(30)
    ]
    rows = rows_of_length(40, 20, 400) if task == "instruct" else texts
    file = write(tmp_path / "a.jsonl", rows)
    train = {"starter": "", "rank": 4, "epochs": 1.0, "length": 512, "tokens": 1024}
    values = settings.build({"base": str(tiny_model), "task": task, "data": [str(file)], "train": train})
    first, made = (stages.Run(tmp_path / name, values) for name in ("first", "run"))
    for stage in ("data", "train"):  # the first training in a process loads what stays: both are measured after it
        stages.perform(first, stage)
    found = preview.survey(made.tuned_format, records.good_rows(values.data), 512)
    forget_the_peak()
    with monkeypatch.context() as clock:
        ticks = itertools.count()
        clock.setattr(time, "perf_counter", lambda: next(ticks) / 40)
        expected = preview.estimate(made, found["sample"], found["rows"], found["tokens"])
    stages.perform(made, "data")
    forget_the_peak()
    stages.perform(made, "train")
    last = json.loads((made.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert expected["seconds"] * expected["tokens_per_s"] == pytest.approx(last["tokens"], rel=0.25)
    assert expected["steps"] == pytest.approx(last["step"], rel=0.2, abs=1)
    assert expected["bytes"] == pytest.approx(made.read("receipt.json")["peak_memory"]["host"], rel=0.15)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_trial_ends_with_the_longest_rows_and_the_heap_is_larger(method, tiny_model, tmp_path, monkeypatch):
    from finetune import train as training

    monkeypatch.setattr(preview, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(stages, "peak_memory", lambda: {"host": 10**10})
    monkeypatch.setattr(preview.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0)))
    seen, trained, train = [], [], training.train

    def watched(model, batches, *rest):
        trained.extend(weight.numel() for weight in training.trained(model).values())
        return train(model, (seen.append([len(e.ids) for e in batch]) or batch for batch in batches), *rest)

    monkeypatch.setattr(training, "train", watched)
    rows = rows_of_length(40, 20, 400)
    file = write(tmp_path / "a.jsonl", rows)
    values = {"base": str(tiny_model), "task": "instruct", "method": method, "data": [str(file)]}
    made = stages.Run(tmp_path / "run", settings.build({**values, "train": {"rank": 4}}))
    found = preview.estimate(made, rows, len(rows), sum(map(tokens_of, rows)))
    lengths = sorted(map(tokens_of, rows), reverse=True)
    count = next(n for n in itertools.count(1) if sum(lengths[: n + 1]) > preview.TRIAL_TOKENS)
    assert seen[-1] == lengths[:count]
    assert len(seen) == 3  # two steps at least before
    assert found["bytes"] == pytest.approx(1e10 + 0.1 * (1e10 - 16 * sum(trained)), rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- shown


class Page(HTMLParser):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags, self.text, self.supervised, self.open = [], "", "", []
        self.raw = file.read_text(encoding="utf-8")
        self.feed(self.raw)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append(dict(attributes).get("class") or "")

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.open and "supervised" in self.open[-1]:
            self.supervised += data


def test_the_terminal_shows_supervised_tokens_in_green_and_obeys_no_text(form):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system="standard", highlight=False)
    life = preview.life(form, {**chat(HOSTILE, "answer"), "place": "f:1"})
    preview.show([("rows", "条数", "[b]3[/b]")], life, console)
    shown = out.getvalue()
    assert "\x1b[31m" not in shown
    assert "\x07" not in shown
    assert "\\x1b[31m\\x07" in shown
    assert "[red]x[/red]" in shown
    assert "[b]3[/b]" in shown
    green = re.findall(r"\x1b\[1;4;32m(.*?)\x1b\[0m", shown)
    assert "".join(green[: len("answer")]) == "answer"


@pytest.fixture
def start(tmp_path, tiny_model, monkeypatch, capsys):
    """`check` with these words: (exit status, lines on standard error)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preview, "TRIAL_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, list[str]]:
        status = run.main(["check", "--base", str(tiny_model), *map(str, words)])
        return status, capsys.readouterr().err.splitlines()

    return call


def test_check_with_data_shows_all_of_it_here_and_as_a_page(start, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"query": HOSTILE, "response": "answer"}, *rows_of_length(40, 10, 90)])
    status, lines = start("--data", file)
    assert status == 0, lines
    shown = "\n".join(lines)
    assert f"{file}: query and response" in shown
    assert f"{file}: OpenAI messages" in shown
    for words in (
        "1. raw row",
        "2. conversation",
        "3. text with control tokens",
        "4. ids",
        "supervised",
        "copies of others",
    ):
        assert words in shown
    for words in ("training", "tokens/s, tried on", "GB at most"):
        assert words in shown
    assert lines[-1] == "check: nothing stands in the way. / 检查通过。"
    assert [path.name for path in (tmp_path / "runs" / "instruct").iterdir()] == ["check.html"]
    page = Page(tmp_path / "runs" / "instruct" / "check.html")
    assert "script" not in page.tags
    assert HOSTILE.replace("\x1b", "").replace("\x07", "").split()[0] in page.text
    ids = "".join(f"{token}" for token in (64, 77, 82, 86, 68, 81))  # "answer"
    assert page.supervised == f"answer<|im_end|>{ids}258"


def test_check_names_every_bad_row_beside_other_problems(start, tmp_path):
    file = write(tmp_path / "a.jsonl", [*rows_of_length(5, 10, 90), {"foo": 1}])
    status, lines = start("--data", file)
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == 2
    assert errors[0].startswith(f"error: {file}:6: has the fields foo; wanted are ")
    assert errors[1] == "error: 1 of 6 rows are bad: mend them, or go on without them with --skip-bad."
    assert start("--data", file, "--skip-bad")[0] == 0
    status, lines = start("--data", file, "--data", "nowhere", "--task", "instruct")
    assert [line for line in lines if line.startswith("error: ")].count(
        "error: --data nowhere: there is no such file or folder; check its spelling."
    ) == 1


def test_check_refuses_rows_of_the_other_task(start, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "once"}, *rows_of_length(2, 10, 90)])
    status, lines = start("--data", file)
    assert status == 2
    assert lines[-1] == f"error: {file}:2 is a conversation; --task pretrain does not learn these: use --task instruct."
