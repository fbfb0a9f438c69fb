"""Rows of people's files: forms, kinds of file, weights, what is wrong with a bad one. Expectations are written by hand."""

import csv
import itertools
import json
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune import records
from finetune.errors import UserError


def chat(*contents: str, system: str = "") -> list[dict]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


FORMS = {  # name: (row, its messages or its text)
    "OpenAI messages": (
        {"messages": chat("q", "a", "q2", "a2", system="s"), "id": 7},
        chat("q", "a", "q2", "a2", system="s"),
    ),
    "OpenAI parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                *chat("", "c")[1:],
            ]
        },
        chat("ab", "c"),
    ),
    "OpenAI developer": (
        {"messages": [{"role": "developer", "content": "s"}, *chat("q", "a")]},
        chat("q", "a", system="s"),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        chat("q", "a", system="s"),
    ),
    "OpenAI messages, named otherwise": ({"conversations": chat("q", "a")}, chat("q", "a")),
    "Alpaca": ({"instruction": "do", "input": "", "output": "done"}, chat("do", "done")),
    "Alpaca with input": (
        {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]], "text": "all"},
        chat("q", "a", "do\nthis", "done", system="s"),
    ),
    "XTuner, one turn": ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, chat("q", "a", system="s")),
    "XTuner, several turns": (
        {"conversation": [{"system": "", "input": "q", "output": "a"}, {"input": "q2", "output": "a2"}]},
        chat("q", "a", "q2", "a2"),
    ),
    "XTuner, text": ({"conversation": [{"input": "", "output": "once upon a time"}]}, "once upon a time"),
    "query and response": (
        {"system": None, "query": "q2", "response": "a2", "history": [["q", "a"]]},
        chat("q", "a", "q2", "a2"),
    ),
    "text ": ({"text": "once upon a time", "source": "a book"}, "once upon a time"),
    "text in Chinese": ({"text": "从前有座山\n🙂"}, "从前有座山\n🙂"),
}


def content(row: dict) -> list[dict] | str:
    return row["messages"] if "messages" in row else row["text"]


def read(*sources: object, **options: bool) -> list[dict]:
    return list(records.read([str(source) for source in sources], **options))


def problems(*sources: object, **options: bool) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*sources, **options)
    return list(caught.value.problems)


def write(file: Path, *rows: object) -> Path:
    """A file of JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def texts(count: int) -> list[dict]:
    return [{"text": f"row {i}"} for i in range(count)]


# ----------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_recognised_said_and_read(name, tmp_path, capsys):
    row, expected = FORMS[name]
    file = write(tmp_path / "rows.jsonl", row)
    assert read(file) == [{("text" if isinstance(expected, str) else "messages"): expected, "place": f"{file}:1"}]
    said = capsys.readouterr().err
    assert said.startswith(f"{file}: ")
    assert name.split()[0] == said.removeprefix(f"{file}: ").split()[0]


@pytest.mark.parametrize("kind", ["array", "array on one line", "lines", "objects", "csv", "tsv", "parquet", "bom"])
def test_each_kind_of_file_gives_the_same_rows(kind, tmp_path):
    rows = [row for row, _ in FORMS.values()]
    file = tmp_path / "rows.json"
    match kind:
        case "array":
            file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        case "array on one line":
            file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        case "lines":
            write(file, *rows)
        case "objects":
            file.write_text("\n".join(json.dumps(row, indent=1) for row in rows), encoding="utf-8")
        case "bom":
            file = write(tmp_path / "rows.jsonl", *rows)
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        case "csv" | "tsv":
            file = file.with_suffix(f".{kind}")
            columns = list(dict.fromkeys(key for row in rows for key in row))
            with file.open("w", newline="", encoding="utf-8") as stream:
                table = csv.DictWriter(stream, columns, delimiter="," if kind == "csv" else "\t")
                table.writeheader()
                for row in rows:
                    cells = {key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()}
                    table.writerow(cells)
        case "parquet":
            file = file.with_suffix(".parquet")
            plain = [{**row, "messages": content} for row, content in FORMS.values() if isinstance(content, list)]
            plain = [{"messages": row["messages"]} for row in plain]
            parquet.write_table(pa.Table.from_pylist(plain), file)
    expected = [content for _, content in FORMS.values() if kind != "parquet" or isinstance(content, list)]
    assert [content(row) for row in read(file)] == expected


def test_a_table_of_parquet_with_several_columns_and_row_groups(tmp_path):
    table = pa.table(
        {"instruction": [f"do {i}" for i in range(2500)], "input": [None] * 2500, "output": ["done"] * 2500}
    )
    parquet.write_table(table, file := tmp_path / "a.parquet", row_group_size=700)
    rows = read(file)
    assert [content(row) for row in rows] == [chat(f"do {i}", "done") for i in range(2500)]
    assert rows[-1]["place"] == f"{file}:2500"


def test_places_are_those_where_a_row_begins(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text":\n "a"},\n\n {"text": "b"}, {"text": "c"}\n]\n')
    (tmp_path / "a.csv").write_text('text\n"a\nb"\n\nc\n')
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    for name, lines in (("a.json", ["2", "5", "5, row 3"]), ("a.csv", ["2", "5"]), ("a.jsonl", ["2", "4"])):
        assert [row["place"] for row in read(tmp_path / name)] == [f"{tmp_path / name}:{line}" for line in lines]


def test_running_text_comes_in_pieces_that_join_to_the_whole(tmp_path):
    text = "".join(f"{'第' * (i % 90)} line {i}\n" for i in range(5000))
    for name in ("book.txt", "book.md", "book.py", "one-line.txt"):
        text = text.replace("\n", "") if name == "one-line.txt" else text
        (file := tmp_path / name).write_text(text, encoding="utf-8")
        rows = read(file)
        assert "".join(row["text"] for row in rows) == text
        assert len(rows) > 3
        if name == "one-line.txt":
            continue
        assert all(row["text"].endswith("\n") for row in rows)
        second = int(rows[1]["place"].rpartition(":")[2])
        assert text.splitlines(keepends=True)[second - 1] == rows[1]["text"].splitlines(keepends=True)[0]


def test_a_folder_of_code_is_text_and_a_folder_of_data_is_rows(tmp_path, capsys):
    code, data = tmp_path / "code", tmp_path / "data"
    for name in (
        "a.py",
        "src/b.rs",
        "README.md",
        "package.json",
        "logo.png",
        ".git/config.py",
        "node_modules/x.js",
        "empty.py",
    ):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("" if name.startswith("empty") else f"# {name}\n")
    (data / "more").mkdir(parents=True)
    write(data / "more" / "b.jsonl", {"text": "b"})
    (data / "a.csv").write_text("text\na\n")
    (data / "notes.md").write_text("n")
    assert {row["text"] for row in read(code)} == {"# a.py\n", "# src/b.rs\n", "# README.md\n"}
    said = capsys.readouterr().err
    assert f"{code}: a folder of code, 4 files; 2 others left out (.json, .png)\n" in said
    assert f"{code}: text\n" in said
    assert [row["text"] for row in read(data)] == ["a", "b", "n"]


# --------------------------------------------------------------------------------------------------------- weights


def test_weights_say_how_often_a_row_comes(tmp_path):
    a, b, c = (write(tmp_path / f"{name}.jsonl", *[{"text": f"{name}{i}"} for i in range(100)]) for name in "abc")
    seen = Counter(row["text"] for row in read(f"{a}=3", f"{b}=0.1", f"{c}=1.5", tmp_path / "a.jsonl"))
    assert {seen[f"a{i}"] for i in range(100)} == {4}
    assert sum(seen[f"b{i}"] for i in range(100)) == 10
    assert Counter(seen[f"c{i}"] for i in range(100)) == {1: 50, 2: 50}


def test_a_weights_share_is_spread_over_the_file(tmp_path):
    file = write(tmp_path / "a.jsonl", *texts(1000))
    kept = [int(row["text"].split()[1]) for row in read(f"{file}=0.05")]
    assert len(kept) == 50
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 21


def test_sources_of_different_size_are_mixed_from_beginning_to_end(tmp_path):
    write(tmp_path / "large.jsonl", *[{"text": "large"}] * 3000)
    write(tmp_path / "small.jsonl", *[{"text": "small"}] * 30)
    order = [row["text"] for row in read(tmp_path / "large.jsonl", tmp_path / "small.jsonl")]
    for tenth in range(10):
        assert order[tenth * 303 : (tenth + 1) * 303].count("small") in (2, 3, 4)


def test_a_file_whose_name_looks_like_a_weight(tmp_path):
    file = write(tmp_path / "lr=3", {"text": "a"}).rename(tmp_path / "lr=3.txt")
    assert len(read(file)) == 1
    assert len(read(f"{file}=2")) == 2


# -------------------------------------------------------------------------------------------------------- bad rows


BAD = [  # (line of JSON or bytes, what is wrong)
    ("nonsense", "is not JSON (Expecting value at column 1)"),
    ('{"text": "a"', "is not JSON (Expecting ',' delimiter at column 13)"),
    ("[1]", "is of type list, not an object with named fields"),
    ("3", "is of type int, not an object with named fields"),
    ('"text"', "is of type str, not an object with named fields"),
    (
        b'{"messages": [{"role": "user", "content": "\xe9"}]}',
        "Message 1: content holds '\\udce9', which is half a character and no text.",
    ),
    (
        '{"foo": 1, "bar": 2}',
        "has the fields foo, bar; wanted are messages, conversations, conversation, instruction and output, query and response, "
        "or text",
    ),
    (
        "{}",
        "has the fields none; wanted are messages, conversations, conversation, instruction and output, query and response, or text",
    ),
    ('{"text": 3}', "text is of type int, it must be text"),
    ('{"text": "  "}', "the text is empty"),
    ('{"messages": []}', "messages must be a list of messages, at least one"),
    ('{"messages": ["a"]}', "messages must be a list of messages, at least one"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "Message 1: role 'bot' is not one of system, user, assistant."),
    ('{"messages": [{"role": "user"}]}', "Message 1: content is NoneType, it must be text."),
    (
        '{"messages": [{"role": "user", "content": "q"}]}',
        "has no answer of the assistant: there is nothing to learn",
    ),
    (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}',
        "message 2 is empty",
    ),
    (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]}',
        "has tool calls, which are not learned here",
    ),
    (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}',
        "has a message that is not to be learned (weight or loss), which is not supported",
    ),
    ('{"conversations": [{"from": "gpt"}]}', "Message 1: content is NoneType, it must be text."),
    ('{"conversation": [{"input": "q", "output": null}]}', "output is missing, it must be text"),
    ('{"instruction": "q", "output": ["a"]}', "output is of type list, it must be text"),
    ('{"query": "q", "response": "a", "history": [["x"]]}', "history must be a list of [query, response]"),
    ('{"text": "a", "image": "a.png"}', "has an image, and this task learns from text alone"),
    (b'{"text": "caf\xe9"}', "the text holds '\\udce9': save it as UTF-8"),
]


def test_every_bad_row_is_named_by_file_and_line_with_what_is_wrong(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = b'{"text": "good"}\n'
    lines = [line if isinstance(line, bytes) else line.encode() for line, _ in BAD]
    file.write_bytes(good + b"\n".join(lines) + b"\n" + good)
    named = [f"{file}:{i}: {words}" for i, (_, words) in enumerate(BAD, 2)]
    found = problems(file)
    assert found[: records.SHOWN] == named[: records.SHOWN]
    count = len(BAD)
    assert found[records.SHOWN :] == [
        f"... and {count - records.SHOWN} more bad rows",
        f"{count} of {count + 2} rows are bad: mend them, or go on without them with --skip-bad.",
    ]
    for i in range(records.SHOWN, count):
        file.write_bytes(lines[i])
        assert problems(file) == [f"{file}:1: {BAD[i][1]}", "1 of 1 rows are bad: mend them."]


def test_skip_bad_goes_on_and_counts_and_names_them(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\nnonsense\n{"text": "b"}\n{"foo": 1}\n')
    assert [row["text"] for row in read(f"{file}=2", skip_bad=True)] == ["a", "b", "a", "b"]
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "Left out 2 bad rows of 6:"
    assert said[2] == f"{file}:2: is not JSON (Expecting value at column 1)"
    assert said[3].startswith(f"{file}:4: has the fields foo; wanted are ")


def test_nothing_good_is_an_error_with_skip_bad_too(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"foo": 1})
    assert problems(file, skip_bad=True)[-1] == "1 of 1 rows are bad: mend them."
    file.write_text("\n\n")
    assert problems(file) == [f"There is no row in {file}: give a file that has some."]


def test_bad_rows_of_a_table_are_named(tmp_path):
    (file := tmp_path / "a.csv").write_text('instruction,output\na,b\nc\n"d"x,e\nf,g,h\ni,j\n')
    assert problems(file)[:3] == [
        f"{file}:3: has 1 cells, and the first line names 2 columns",
        f"{file}:4: is not CSV (',' expected after '\"')",
        f"{file}:5: has 3 cells, and the first line names 2 columns",
    ]
    assert [row["place"] for row in read(file, skip_bad=True)] == [f"{file}:2", f"{file}:6"]
    file.write_text('messages\n"[{]"\n')
    assert problems(file)[0].startswith(f"{file}:2: column messages is not JSON (Expecting property name")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_broken_file_is_refused_though_bad_rows_are_skipped(tmp_path, skip_bad):
    rows = json.dumps(texts(100), indent=1)
    (file := tmp_path / "a.json").write_text(rows[:-30])
    assert problems(file, skip_bad=skip_bad)[0].startswith(f"{file}:298: is not JSON (Expecting")
    file.write_text(rows[:-1])
    assert problems(file, skip_bad=skip_bad) == [
        f"{file}:302: the file ends within its array of rows: fetch or write it again."
    ]
    file.write_text(rows.replace('"row 50"', "oops"))
    assert problems(file, skip_bad=skip_bad) == [
        f"{file}:153: is not JSON (Expecting value at column 11), nothing after it can be read: mend it."
    ]
    (table := tmp_path / "a.csv").write_text('text\na\n"b\nc\nd\n')
    assert problems(table, skip_bad=skip_bad) == [
        f"{table}:3: is not CSV (unexpected end of data): a quote that opens in this row is not closed in it; mend it."
    ]
    (columns := tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert problems(columns, skip_bad=skip_bad)[0].startswith(f"{columns} cannot be read as Parquet (")


def test_sources_that_cannot_be_read_are_told_together_before_the_first_row(tmp_path):
    good = write(tmp_path / "a.jsonl", *texts(2))
    (tmp_path / "a.docx").write_text("")
    (tmp_path / "empty").mkdir()
    kinds = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .text, .md, .markdown and source code"
    rows = records.read(
        [str(good), "nowhere", f"{good}=x", f"{good}=-1", str(tmp_path / "a.docx"), str(tmp_path / "empty")]
    )
    with pytest.raises(UserError) as caught:
        next(rows)
    assert list(caught.value.problems) == [
        "--data nowhere: there is no such file or folder; check its spelling.",
        f"--data {good}=x: the weight 'x' is not a number above 0; write it as PATH=0.5 or PATH=3.",
        f"--data {good}=-1: the weight '-1' is not a number above 0; write it as PATH=0.5 or PATH=3.",
        f"--data {tmp_path / 'a.docx'}: files that end in '.docx' are not read; {kinds} are.",
        f"--data {tmp_path / 'empty'}: nothing in this folder is read; {kinds} are.",
    ]


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "txt"])
def test_a_large_file_is_never_held(kind, tmp_path):
    """12 MB of rows are read within 6 MB of Python's memory (Parquet's own buffers are not Python's)."""
    source = random.Random(0)
    rows = [{"text": source.randbytes(1000).hex()} for _ in range(200)] * 30
    file = tmp_path / f"a.{kind}"
    match kind:
        case "json":
            file.write_text(json.dumps(rows))
        case "jsonl":
            write(file, *rows)
        case "csv" | "txt":
            file.write_text("\n".join(["text", *(row["text"] for row in rows)]))
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000)
    count = len(rows)
    del rows
    tracemalloc.start()
    characters = sum(len(row["text"]) for row in records.read([str(file)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters >= 2000 * count
    assert peak < 6_000_000 + (kind == "parquet") * 6_000_000


def test_a_row_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 64)
    rows = [{"text": "x" * 10}, {"text": '一二三\\"' * 500}, {"text": "🙂" * 300}, {"n": 12345, "text": "end"}]
    for options in ({"indent": 1}, {}, {"ensure_ascii": False}):
        (file := tmp_path / "a.json").write_text(json.dumps(rows, **options), encoding="utf-8")
        assert [row["text"] for row in read(file)] == [row["text"] for row in rows]


def test_the_readmes_examples_are_read():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| [^|]+ \| `(\{.*?\})`", readme, re.M)
    assert len(examples) == 6
    for example in examples:
        assert "problem" not in records.understand(json.loads(example)), example
