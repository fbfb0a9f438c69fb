"""Data files in the forms that people have -> conversations and texts, one at a time; every bad row is named.

A source is `PATH` or `PATH=WEIGHT`: a file or a folder, and how often each of its rows comes (1 if not said; `=3` is
three times, `=0.1` every tenth). Files are streamed, never held; sources are mixed so that all end together.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from finetune.chat_format import IMAGE, check_messages
from finetune.embedded import say
from finetune.errors import Problems, UserError

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".text", ".md", ".markdown")
CODE = (  # suffixes
    ".asm .bash .c .cc .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .erl .ex .f90 .fs .go .gradle .groovy .h "
    ".hpp .hs .html .ini .java .jl .js .jsx .kt .lisp .lua .m .ml .mm .nim .php .pl .proto .ps1 .pxd .py .pyi "
    ".pyx .r .rb .rs .rst .scala .scss .sh .sql .svelte .swift .tex .toml .ts .tsx .v .vhd .vue .xml .yaml .yml "
    ".zig .zsh"
)
LEFT_OUT = ("node_modules", "__pycache__")  # folders within a folder of code, beside hidden ones
PIECE = 100_000  # bytes of a text that come as one row; a longer text is cut at a line's end
CHUNK = 1 << 18  # bytes read at once
LONGEST = 1 << 27  # bytes of one row; where one is longer the file is taken to be broken
SHOWN = 20  # bad rows that are named one by one

WHO = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}
NESTED = ("messages", "conversations", "conversation", "history")  # columns of a table that hold JSON
BETWEEN = re.compile(r"[\s,\[\]]*")  # the rows of an array


class Wrong(str):
    """Instead of a row: what is wrong with it."""


Item = tuple[
    int | str, Any, int
]  # where the row begins, the row as it was read, bytes of the file that are read by then


# A row as it was read, its messages and its file's folder -> the messages with its pictures; see pictures.sight
Sight = Callable[[dict[str, Any], list[dict[str, Any]], Path], list[dict[str, Any]]]


class Source(NamedTuple):
    name: str
    weight: float
    files: list[Path]
    code: bool  # a folder of code, whose files are all text


def read(sources: Sequence[str], skip_bad: bool = False, sight: Sight | None = None) -> Iterator[dict[str, Any]]:
    """{"messages": [{"role", "content"}, ...], "place": "FILE:LINE"} or {"text": str, "place": ...} for every row.

    What form a file has is said on standard error. After the good rows UserError names every bad one by file and line;
    with `skip_bad` they are named there too, and counted. `sight`, for a task that learns from pictures, finds a row's.
    """
    for row in good_rows(sources, skip_bad, sight):
        yield {key: row[key] for key in ("messages", "text", "place") if key in row}


def good_rows(sources: Sequence[str], skip_bad: bool = False, sight: Sight | None = None) -> Iterator[dict[str, Any]]:
    """`read` with all that `scan` says of a row."""
    good, bad, first, broken, said = 0, 0, [], (), set()
    try:
        for row in scan(sources, sight):
            if "problem" not in row:
                good += 1
                if (row["of"], row["form"]) not in said:
                    said.add((row["of"], row["form"]))
                    say(f"{row['of']}: {row['form']}")
                yield row
            else:
                bad += 1
                first += [f"{row['place']}: {row['problem']}"] if bad <= SHOWN else []
    except UserError as error:  # of a source or a whole file
        broken = error.problems
    first += [f"... and {bad - SHOWN:,} more bad rows"] if bad > SHOWN else []
    if broken or (bad and not (skip_bad and good)):
        advice = ", or go on without them with --skip-bad" if good else ""
        count = [f"{bad:,} of {good + bad:,} rows are bad: mend them{advice}."] if bad else []
        raise UserError(*broken, *first, *count)
    if bad:
        say("\n".join([f"Left out {bad:,} bad rows of {good + bad:,}:", *first]))
    elif not good:
        raise UserError(f"There is no row in {', '.join(sources) or '--data'}: give a file that has some.")


def scan(sources: Sequence[str], sight: Sight | None = None) -> Iterator[dict[str, Any]]:
    """Every row, good or bad: {"place": "FILE:LINE", "of": file or folder of code, "form": its name, "raw": as it was
    read, "pictured", "again": whether its weight repeats it} and "messages", "text", or "problem": what is wrong with it. Raises
    UserError for all sources that cannot be read, before the first, and for a file in which nothing more can be read."""
    streams = [_weighted(source, sight) for source in open_sources(sources)]
    shown = "{desc}: {percentage:.0f}% [{elapsed}<{remaining}]"
    with tqdm(total=100, desc="Reading", bar_format=shown, delay=2) as bar:
        heads = {i: head for i, stream in enumerate(streams) if (head := next(stream, None))}
        while heads:
            i = min(heads, key=lambda i: heads[i][0])
            share, row = heads[i]
            if 100 * share > bar.n + 1:
                bar.update(int(100 * share) - bar.n)
            yield row
            if head := next(streams[i], None):
                heads[i] = head
            else:
                del heads[i]


# --------------------------------------------------------------------------------------------------------- sources


def open_sources(sources: Sequence[str]) -> list[Source]:
    """What `PATH[=WEIGHT]`s mean. Raises UserError with everything that is wrong with them."""
    problems, found = Problems(), []
    for text in sources:
        with problems.collect():
            found.append(_open_source(text))
    problems.stop_if_any()
    return found


def _open_source(text: str) -> Source:
    name, weight = text, 1.0
    if not _exists(text) and (given := re.fullmatch(r"(.+)=([^=/]*)", text, re.S)):
        try:
            name, weight = given[1], float(given[2])
        except ValueError:
            weight = -1.0
        if not 0 < weight < 1e6:
            raise UserError(
                f"--data {text}: the weight {given[2]!r} is not a number above 0; write it as PATH=0.5 or PATH=3."
            )
    path = Path(name).expanduser()
    if not _exists(name):
        raise UserError(f"--data {name}: there is no such file or folder; check its spelling.")
    if not path.is_dir():
        if path.suffix.lower() not in {*ROWS, *TEXTS, *CODE.split()}:
            raise UserError(
                f"--data {name}: files that end in {path.suffix or 'nothing'!r} are not read; {', '.join(ROWS + TEXTS)} and "
                "source code are."
            )
        return Source(name, weight, [path], code=False)
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not _left_out(file.relative_to(path)))
    code = any(file.suffix.lower() in CODE.split() for file in inside)
    wanted = {*TEXTS, *(CODE.split() if code else ROWS)}
    files = [file for file in inside if file.suffix.lower() in wanted]
    if not files:
        raise UserError(
            f"--data {name}: nothing in this folder is read; {', '.join(ROWS + TEXTS)} and source code are."
        )
    if others := sorted({file.suffix or file.name for file in inside if file not in set(files)}):
        what = "a folder of code" if code else "a folder of data"
        say(f"{name}: {what}, {len(files)} files; {len(inside) - len(files)} others left out ({', '.join(others[:8])})")
    return Source(name, weight, files, code)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # no file can have that name, or we may not look
        return False


def _left_out(path: Path) -> bool:
    return any(part.startswith(".") or part in LEFT_OUT for part in path.parts)


def _weighted(source: Source, sight: Sight | None) -> Iterator[tuple[float, dict[str, Any]]]:
    """(share of the source that is done, row); `weight` times each row, a fraction as every so many-th."""
    rounds = -(-source.weight // 1)
    total = sum(file.stat().st_size for file in source.files) or 1
    for turn in range(int(rounds)):
        weight, taken, before, number = min(1.0, source.weight - turn), 0, 0, 0
        for file in source.files:
            for line, raw, done in _rows(file):
                number += 1
                row = {
                    "place": f"{file}:{line}",
                    "of": source.name if source.code else str(file),
                    "again": turn > 0,
                    **understand(raw, sight, file.parent),
                }
                wanted, taken = int(number * weight + 1e-9) > taken, int(number * weight + 1e-9)
                if wanted if "problem" not in row else turn == 0:  # a bad row is told once
                    yield (turn + (before + done) / total) / rounds, row
            before += file.stat().st_size


# ----------------------------------------------------------------------------------------------------------- files


def _rows(file: Path) -> Iterator[Item]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(file)
        return
    try:
        stream = file.open("rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    with stream:
        if stream.read(3) != b"\xef\xbb\xbf":  # a byte order mark, as Windows writes it
            stream.seek(0)
        if kind in (".csv", ".tsv"):
            yield from _table(stream, "\t" if kind == ".tsv" else ",")
        elif kind in (".jsonl", ".ndjson"):
            yield from _json_lines(stream)
        elif kind == ".json":
            yield from _json(stream)
        else:
            yield from _text(stream)


def _text(stream: BinaryIO) -> Iterator[Item]:
    # a line may be longer than a piece, which then ends anywhere
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    piece, begin, line = b"", 1, 1
    while new := stream.readline(PIECE):
        piece += new
        line += new.endswith(b"\n")
        if len(piece) >= PIECE:
            yield begin, {"text": utf8.decode(piece)}, stream.tell()
            piece, begin = b"", line
    if (text := utf8.decode(piece, True)).strip():
        yield begin, {"text": text}, stream.tell()


def _json_lines(stream: BinaryIO) -> Iterator[Item]:
    done = stream.tell()
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST), b""), 1):
        done += len(line)
        if line.strip():
            try:
                row = json.loads(_decode(line).rstrip())
            except (ValueError, RecursionError) as error:
                row = Wrong(f"is not JSON ({_why(error)})")
            yield number, row, done


def _json(stream: BinaryIO) -> Iterator[Item]:
    """An array of rows, one row, or rows one after another, with line breaks wherever they are."""
    start = stream.tell()
    first = next((c for c in iter(lambda: stream.read(1), b"") if not c.isspace()), b"")
    if first == b"{":
        try:
            json.loads(_decode(first + stream.readline(LONGEST)))
        except (ValueError, RecursionError):
            pass
        else:  # as in .jsonl, where one broken line leaves the others
            stream.seek(start)
            yield from _json_lines(stream)
            return
    stream.seek(start)
    parse, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, at, line, depth, more, wanted = "", 0, 1, 0, True, CHUNK
    number, before = 0, 0  # rows, and the line where the last one began
    while True:
        if more and len(text) - at < wanted:
            new = stream.read(wanted)
            text, at, more = text[at:] + utf8.decode(new, not new), 0, bool(new)
        gap = BETWEEN.match(text, at)
        line += gap[0].count("\n")
        depth += gap[0].count("[") - gap[0].count("]")
        at = gap.end()
        if at == len(text):
            if more:
                continue
            if depth > 0:
                raise UserError(
                    f"{stream.name}:{line}: the file ends within its array of rows: fetch or write it again."
                )
            return
        try:
            row, end = parse(text, at)
        except (ValueError, RecursionError) as error:
            position = getattr(error, "pos", at)
            cut = position > len(text) - 16 or str(error).startswith("Unterminated string")
            if more and cut and wanted < LONGEST:
                wanted *= 2
                continue
            line += text.count("\n", at, position)
            raise UserError(
                f"{stream.name}:{line}: is not JSON ({_why(error)}), nothing after it can be read: mend it."
            ) from error
        number += 1
        yield (line if line > before else f"{line}, row {number}"), row, stream.tell()
        before = line
        line += text.count("\n", at, end)
        at, wanted = end, CHUNK


def _table(stream: BinaryIO, delimiter: str) -> Iterator[Item]:
    csv.field_size_limit(LONGEST)
    reader = csv.reader(map(_decode, stream), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if reader.line_num > line:
                raise UserError(
                    f"{stream.name}:{line}: is not CSV ({error}): a quote that opens in this row is not closed in it; mend it."
                ) from error
            yield line, Wrong(f"is not CSV ({error})"), stream.tell()
            continue
        if cells is None:
            return
        if not header:
            header = cells
        elif len(cells) != len(header):
            if cells:
                wrong = f"has {len(cells)} cells, and the first line names {len(header)} columns"
                yield line, Wrong(wrong), stream.tell()
        else:
            yield line, _nested({name: cell for name, cell in zip(header, cells, strict=True) if cell}), stream.tell()


def _parquet(file: Path) -> Iterator[Item]:
    """The line is the row's number."""
    from pyarrow import ArrowException, parquet

    number, size = 0, file.stat().st_size
    try:
        with parquet.ParquetFile(file) as table:
            total = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _nested(row), size * number // total
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet ({error}): fetch it again.") from error


def _nested(row: dict[str, Any]) -> dict[str, Any] | Wrong:
    """A table's row; the columns that other formats nest hold JSON."""
    for key in NESTED:
        if isinstance(row.get(key), str):
            try:
                row[key] = json.loads(row[key] or "null")
            except (ValueError, RecursionError) as error:
                return Wrong(f"column {key} is not JSON ({_why(error)})")
    return row


def _why(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _decode(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")  # what is no UTF-8 is found later, in the text that holds it


# ----------------------------------------------------------------------------------------------------------- forms


def understand(raw: Any, sight: Sight | None = None, folder: Path = Path()) -> dict[str, Any]:
    """{"raw", "form", "pictured": whether it names pictures} and one of "messages", "text" or "problem"."""
    found: dict[str, Any] = {"raw": raw, "form": "", "pictured": False}
    try:
        if isinstance(raw, Wrong):
            raise UserError(raw)
        if not isinstance(raw, dict):
            raise UserError(f"is {_kind(raw)}, not an object with named fields")
        row = _with_pictures({key: value for key, value in raw.items() if value is not None})
        found["pictured"] = bool(row.get("image") or row.get("images"))
        if found["pictured"] and not sight:
            raise UserError("has an image, and this task learns from text alone")
        found["form"], content = _form(row)
        if isinstance(content, str):
            if not content.strip():
                raise UserError("the text is empty")
            if half := re.search("[\ud800-\udfff]", content):
                raise UserError(f"the text holds {half[0]!r}: save it as UTF-8")
            return {**found, "text": content}
        check_messages(content)
        if empty := [i for i, m in enumerate(content, 1) if not m["content"].strip() and m["role"] != "system"]:
            raise UserError(f"message {empty[0]} is empty")
        if not any(m["role"] == "assistant" for m in content):
            raise UserError("has no answer of the assistant: there is nothing to learn")
        return {**found, "messages": sight(row, content, folder) if sight else content}
    except UserError as error:
        return {**found, "problem": " ".join(error.problems)}


def _with_pictures(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's messages with their pictures, {"type": "image_url", "image_url": {"url"}}, named as LLaVA's rows name them."""
    urls: list[Any] = []

    def text(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") != "image_url":
            return part
        url = part.get("image_url")
        urls.append(url.get("url") if isinstance(url, dict) else url)
        return {"type": "text", "text": f"{IMAGE}\n"}

    turns = row.get("messages")
    messages = [
        {**turn, "content": [text(part) for part in turn["content"]]}
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
        else turn
        for turn in (turns if isinstance(turns, list) else [])
    ]
    return {**row, "messages": messages, "images": urls} if urls else row


def _form(row: dict[str, Any]) -> tuple[str, list[dict[str, str]] | str]:
    """(the form's name, its messages or its text)"""
    system = [{"role": "system", "content": _text_of(row, "system")}] if row.get("system") else []
    if name := next((key for key in ("messages", "conversations", "conversation") if key in row), None):
        turns = row[name]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"{name} must be a list of messages, at least one")
        if "from" in turns[0]:
            return "ShareGPT", system + [_said(turn, "from", "value") for turn in turns]
        if "role" in turns[0]:
            return "OpenAI messages", system + [_said(turn, "role", "content") for turn in turns]
        if len(turns) == 1 and not turns[0].get("system") and not turns[0].get("input"):
            return "XTuner, text", _text_of(turns[0], "output")
        return f"XTuner, {'one turn' if len(turns) == 1 else 'several turns'}", [m for t in turns for m in _turn(t)]
    for name, asked, answered in (("Alpaca", "instruction", "output"), ("query and response", "query", "response")):
        if asked in row and answered in row:
            question = _text_of(row, asked)
            if name == "Alpaca" and row.get("input"):
                question = f"{question}\n{_text_of(row, 'input')}"
            pairs = [*_history(row), (question, _text_of(row, answered))]
            return name, system + [m for pair in pairs for m in _pair(*pair)]
    if "text" in row:
        return "text", _text_of(row, "text")
    raise UserError(
        f"has the fields {', '.join(map(str, row)) or 'none'}; wanted are messages, conversations, conversation, instruction "
        "and output, query and response, or text"
    )


def _said(turn: dict[str, Any], who: str, what: str) -> dict[str, str]:
    role = WHO.get(turn.get(who), turn.get(who)) if isinstance(turn.get(who), str) else turn.get(who)
    if turn.get("tool_calls") or turn.get("function_call"):
        raise UserError("has tool calls, which are not learned here")
    if turn.get("weight") == 0 or turn.get("loss") is False:
        raise UserError("has a message that is not to be learned (weight or loss), which is not supported")
    content = turn.get(what)
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(_text_of(part, "text") for part in content)
    return {"role": role, "content": content}


def _turn(turn: dict[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": _text_of(turn, "system")}] if turn.get("system") else []
    return system + _pair(_text_of(turn, "input"), _text_of(turn, "output"))


def _history(row: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise UserError("history must be a list of [query, response]")
    return [(asked, answered) for asked, answered in pairs]


def _pair(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _text_of(row: dict[str, Any], key: str) -> str:
    if not isinstance(value := row.get(key), str):
        raise UserError(f"{key} is {_kind(value)}, it must be text")
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
