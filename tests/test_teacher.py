import errno
import multiprocessing
from pathlib import Path

import pytest
import torch
from commands import apart
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune import teacher
from finetune.generation import Answer, complete
from finetune.model import load

A, B, C = list(b"What is rain?"), list(b"Tell me a story"), list(b"2+2")
STOP, MOST = [200], 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loaded(tiny_model):
    """load_base, which counts its calls."""

    def load_base():
        load_base.calls += 1
        return load(tiny_model)

    load_base.calls = 0
    return load_base


def unloadable():
    pytest.fail("the base was loaded")


def same(found: list[Answer], expected: list[Answer]) -> bool:
    return all(a.ids == b.ids and torch.equal(a.states, b.states) for a, b in zip(found, expected, strict=True))


def test_the_base_is_asked_once(loaded, tiny_model):
    fresh = teacher.ask("base", loaded, [A, B, A], STOP, MOST)
    assert loaded.calls == 1
    assert same(fresh, [fresh[0], fresh[1], fresh[0]])
    assert same(fresh[:2], complete(load(tiny_model), [A, B], STOP, MOST))
    assert same(teacher.ask("base", unloadable, [B, A], STOP, MOST), [fresh[1], fresh[0]])


def test_only_what_is_missing_is_asked(loaded, monkeypatch):
    first = teacher.ask("base", loaded, [A], STOP, MOST)
    asked = []
    own = teacher.complete
    monkeypatch.setattr(teacher, "complete", lambda m, p, *a, **k: asked.extend(p) or own(m, p, *a, **k))
    found = teacher.ask("base", loaded, [B, A, C], STOP, MOST)
    assert asked == [B, C]
    assert same(found[1:2], first)
    assert [len(answer.states) - len(answer.ids) in (0, 1) for answer in found] == [True] * 3


def test_bases_and_lengths_are_not_mixed(loaded, tiny_model):
    short = teacher.ask("one", loaded, [A], STOP, 2)
    long = teacher.ask("one", loaded, [A], STOP, MOST)
    assert (len(short[0].states), len(long[0].states)) == (2, MOST)

    def other():
        model = load(tiny_model)
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(9))
        return model

    assert teacher.ask("two", other, [A], STOP, MOST)[0].ids != long[0].ids
    assert same(teacher.ask("one", unloadable, [A], STOP, MOST), long)
    assert loaded.calls == 2


def test_a_failure_leaves_the_cache_as_it_was(loaded, monkeypatch):
    first = teacher.ask("base", loaded, [A], STOP, MOST)
    monkeypatch.setattr(teacher, "complete", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.ask("base", loaded, [A, B], STOP, MOST)
    assert same(teacher.ask("base", unloadable, [A], STOP, MOST), first)


def test_a_damaged_cache_is_asked_for_anew(loaded, cache):
    first = teacher.ask("base", loaded, [A], STOP, MOST)
    (cache / "teacher" / "base.safetensors").write_bytes(b"")  # a power cut
    assert same(teacher.ask("base", loaded, [A], STOP, MOST), first)
    assert loaded.calls == 2
    assert same(teacher.ask("base", unloadable, [A], STOP, MOST), first)


def test_a_full_disk_is_an_ordinary_error(loaded, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(teacher, "save_file", full)
    with pytest.raises(OSError) as caught:
        teacher.ask("base", loaded, [A], STOP, MOST)
    assert caught.value.errno == errno.ENOSPC


def ask(base: Path, cache: Path, prompts: list[list[int]], both, mine, others, answers) -> None:
    """In a process of its own. While it has the base loaded, it tells so and gives the other one time to come between."""

    def load_base():
        mine.set()
        others.wait(0.3)
        return load(base)

    torch.set_num_threads(1)
    both.wait()
    answers.put((prompts, [answer.ids for answer in teacher.ask("base", load_base, prompts, STOP, MOST)]))


def both_ask(base: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    both, one, other, answers = context.Barrier(2), context.Event(), context.Event(), context.Queue()
    first = context.Process(target=ask, args=(base, cache, [A, B], both, one, other, answers))
    second = context.Process(target=ask, args=(base, cache, [B, C], both, other, one, answers))
    for process in (first, second):
        process.start()
    for _ in range(2):
        prompts, found = answers.get(timeout=120)
        assert found == [answer.ids for answer in complete(load(base), prompts, STOP, MOST)]
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0


def test_two_processes_at_once(tiny_model, cache):
    assert apart(both_ask, tiny_model, cache) == 0
    assert len(load_file(cache / "teacher" / "base.safetensors")) == 6  # ids and states of three prompts
    teacher.ask("base", unloadable, [A, B, C], STOP, MOST)
