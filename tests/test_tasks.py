import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from finetune import settings, stages, tasks
from finetune.errors import UserError
from finetune.model import chat_format, load
from finetune.run_folder import Run


@pytest.fixture(scope="module")
def form(tiny_model):
    return chat_format(tiny_model)


def conversation(number: int, answer: str = "") -> dict:
    said = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": answer or f"{number}."}]
    return {"messages": said, "place": f"chat.jsonl:{number + 1}"}


def prepared(rows: list[dict], task: str, form, folder: Path, length: int = 200) -> dict[str, list[dict]]:
    folder.mkdir()
    tasks.prepare(iter(rows), task, form, length, 0, folder)
    return {file.stem: [json.loads(line) for line in file.open()] for file in folder.iterdir()}


def test_held_out_rows_are_not_trained_on(form, tmp_path):
    """Not even where a row comes several times."""
    found = prepared([conversation(i % 60) for i in range(180)], "instruct", form, tmp_path / "d")
    assert found.keys() == {"train", "heldout", "probes"}
    held, trained = ({str(row["messages"]) for row in found[name]} for name in ("heldout", "train"))
    assert held & trained == set()
    assert len(held | trained) == 60
    assert len(found["heldout"]) == len(held) == 180 // 20
    assert {row["task"] for row in found["heldout"]} == {"instruct"}
    for probe in found["probes"]:
        assert str([*probe["messages"], {"role": "assistant", "content": probe["accept"][0]}]) in held
    again = prepared([conversation(i % 60) for i in range(180)], "instruct", form, tmp_path / "again")
    assert again == found


def test_one_row_cannot_be_held_out_and_trained_on(form, tmp_path):
    with pytest.raises(UserError, match="give more"):
        prepared([conversation(1)] * 5, "instruct", form, tmp_path / "d")


def test_rows_are_prepared_without_holding_them(form, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH", 4)
    rows = (conversation(i, "word " * 200) for i in range(1000))
    (tmp_path / "d").mkdir()
    tracemalloc.start()
    tasks.prepare(rows, "instruct", form, 200, 0, tmp_path / "d")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "d" / "train.jsonl").stat().st_size
    assert size > 1_000_000
    assert peak < size / 3


@pytest.mark.parametrize("there", [[], ["check.html"]])
def test_a_try_that_fails_is_in_nobodys_way(tiny_model, tmp_path, monkeypatch, there):
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    (one := tmp_path / "one.jsonl").write_text(json.dumps(conversation(1)))
    run = Run(tmp_path / "r", settings.build({"base": str(tiny_model), "task": "instruct", "data": [str(one)]}))
    run.folder.mkdir()
    for name in there:
        (run.folder / name).write_text("")
    with pytest.raises(UserError, match="give more"):
        stages.data(run)
    assert ([file.name for file in run.folder.iterdir()] if run.folder.exists() else []) == there


@pytest.mark.parametrize(
    "task, row, words",
    [
        ("pretrain", conversation(1), "chat.jsonl:2 is a conversation; --task pretrain .* use --task instruct"),
        ("instruct", {"text": "x", "place": "a.md:1"}, "a.md:1 is a text; --task instruct .* use --task pretrain"),
    ],
)
def test_rows_of_the_other_task_are_told(task, row, words, form, tmp_path):
    with pytest.raises(UserError, match=words):
        prepared([row], task, form, tmp_path / "d")


def test_a_text_becomes_passages_that_lose_nothing(form, tmp_path):
    text = "".join(f"Line {i} of the book, {'word ' * (i % 9)}\n" for i in range(60)) + "x" * 500
    passages = list(tasks.passages(text, form, 100))
    assert "".join(passages) == text
    assert all(len(form.encode(passage).ids) <= 100 for passage in passages)
    assert all(passage.endswith("\n") for passage in passages[: len(passages) - 6])  # but in the long last line
    found = prepared([{"text": text}], "pretrain", form, tmp_path / "d", 102)
    rows = found["train"] + found["heldout"]
    assert sorted(row["text"] for row in rows) == sorted(passages)
    assert [row["text"] for row in rows if row["ends"]] == [passages[-1]]
    for row in rows:
        ids, mask = tasks.encode(row, form, 102)
        assert len(ids) == row["tokens"] <= 102
        assert (ids[-1] in form.stop_ids) == row["ends"]
        assert all(mask)
    for probe in found["probes"]:
        row = next(row for row in found["train"] if row["text"].startswith(probe["messages"][0]["content"]))
        rest = row["text"][len(probe["messages"][0]["content"]) :]
        assert rest.strip().startswith(probe["accept"][0])


def test_every_answer_is_supervised_and_long_conversations_are_cut(form):
    said = [*conversation(1)["messages"], *conversation(2)["messages"]]
    ids, mask = tasks.encode({"messages": said}, form, 1000)
    assert form.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "1.2."
    assert tasks.encode({"messages": said}, form, 20) == (ids[:20], mask[:20])
    long = {"messages": [{"role": "user", "content": "?" * 50}, *conversation(1)["messages"][1:]]}
    assert list(tasks.pieces([long], "instruct", form, 40)) == []  # nothing that could be learned is left


def test_steps_read_every_row_so_many_times():
    tokens = [100 + 7 * (i % 11) for i in range(500)]
    count, steps = tasks.plan(tokens, 4096, 2.0, seed=0)
    found = list(steps())
    assert len(found) == count
    assert Counter(row for step in found for row in step) == Counter(dict.fromkeys(range(500), 2))
    sizes = [sum(tokens[row] for row in step) for step in found]
    assert max(sizes) <= max(1024, sum(tokens) * 2 // tasks.STEPS)  # little data makes small steps
    assert list(steps()) == found
    half = [row for step in tasks.plan(tokens, 4096, 0.5, seed=0)[1]() for row in step]
    assert len(set(half)) == len(half)
    assert 0 <= sum(tokens[row] for row in half) - sum(tokens) / 2 < max(tokens)
    many = tasks.plan([100] * 100_000, 4096, 1.0, seed=0)[1]
    assert max(100 * len(step) for step in many()) <= 4096


def test_what_a_model_makes_of_probes(tiny_model, form):
    """Recall: its own greedy continuation is right, another is not. Reply: an answer ends or does not."""
    from finetune.generation import complete

    model = load(tiny_model)
    prompt = "The river runs"
    ids = complete(model, [form.document(prompt, ends=False)], form.stop_ids, 4)[0].ids
    goes_on = form.decode(ids).strip()
    probe = {"id": "a", "kind": "recall", "messages": [{"role": "user", "content": prompt}]}
    judged = tasks.ask(model, form, [{**probe, "accept": [goes_on]}, {**probe, "id": "b", "accept": [goes_on + "?!"]}])
    assert [entry["passed"] for entry in judged] == [True, False]
    questions = [[{"role": "user", "content": f"{i}?"}] for i in range(6)]
    replies = tasks.ask(model, form, [{"id": str(i), "kind": "reply", "messages": q} for i, q in enumerate(questions)])
    answers = complete(model, [form.prompt(q) for q in questions], form.stop_ids, tasks.REPLY_TOKENS)
    for entry, answer in zip(replies, answers, strict=True):
        ended = len(answer.states) > len(answer.ids)
        assert entry["passed"] == (ended and bool(form.decode(answer.ids).strip()))


def test_loss_per_token_by_task(tiny_model, form):
    import torch

    model = load(tiny_model)
    rows = [{"task": "pretrain", "text": f"Passage {i}", "ends": True} for i in range(3)]
    rows += [{"task": "instruct", **conversation(i)} for i in range(2)]
    found = tasks.loss_by_task(model, form, rows, 100)
    for task in ("pretrain", "instruct"):
        total, count = 0.0, 0
        for row in rows:
            if row["task"] == task:
                ids, mask = tasks.encode(row, form, 100)
                with torch.inference_mode():
                    log = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                for i in range(1, len(ids)):
                    total -= mask[i] * log[i - 1, ids[i]].item()
                    count += mask[i]
        assert found[task] == pytest.approx(total / count, rel=1e-4)
