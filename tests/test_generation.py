from collections import Counter

import pytest
import torch

from finetune import generation
from finetune.generation import Step, complete, decode, greedy, sampler, stream
from finetune.model import chat_format, load

NEW = 12
SHARED = list(b"user: what is ")
PROMPTS = {
    "nothing in common": [[5, 6, 7, 8, 9], [77], [100, 3, 200]],
    "a common beginning": [[*SHARED, 65, 66, 67], [*SHARED, 70], [*SHARED, 65, 90]],
    "one begins another": [[*SHARED, 65, 66], SHARED, [*SHARED, 65]],
    "the same twice": [SHARED, [*SHARED], [*SHARED]],
    "single tokens": [[5], [5], [6]],
    "one prompt": [SHARED],
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def form(tiny_model):
    return chat_format(tiny_model)


@pytest.fixture
def calls(model):
    """Shapes of what went through the model."""
    seen: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    yield seen
    hook.remove()


def tokens(model, prompts, stop_ids=(), most=NEW, pick=greedy) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, stop_ids, most, pick):
        for row, token in zip(step.rows, step.tokens, strict=True):
            found[row].append(token)
    return found


def reference(model, prompt: list[int]) -> list[int]:
    """transformers' own greedy tokens, the stop token included."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    return out[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_greedy_tokens_are_transformers_own(model, prompts):
    expected = [reference(model, prompt) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(set(map(tuple, prompts)))
    assert tokens(model, prompts, [model.generation_config.eos_token_id]) == expected


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_states_do_not_depend_on_the_batch(model, prompts):
    together = complete(model, prompts, [], NEW)
    for prompt, answer in zip(prompts, together, strict=True):
        (single,) = complete(model, [prompt], [], NEW)
        torch.testing.assert_close(answer.states, single.states, rtol=1e-4, atol=1e-4)


def test_the_common_beginning_is_computed_once(model, calls):
    tokens(model, PROMPTS["a common beginning"], most=2)
    assert calls == [(1, len(SHARED)), (3, 3), (3, 1)]
    calls.clear()
    tokens(model, PROMPTS["one begins another"], most=2)
    assert calls == [(1, len(SHARED) - 1), (3, 3), (3, 1)]  # a token of each is left to be decoded from


def test_a_stop_token_ends_its_row_which_leaves(model, calls):
    prompts = PROMPTS["nothing in common"]
    full = tokens(model, prompts)
    stop = [full[0][2], full[1][5]]
    expected = [row[: next((i for i, t in enumerate(row) if t in stop), NEW) + 1] for row in full]
    lengths = [len(row) for row in expected]
    assert len(set(lengths)) > 1  # they end at different steps
    calls.clear()
    steps = list(decode(model, prompts, stop, NEW))
    assert [step.rows for step in steps] == [[i for i in range(3) if lengths[i] > n] for n in range(max(lengths))]
    assert [shape[0] for shape in calls] == [len(step.rows) for step in steps]
    assert [len(step.states) for step in steps] == [len(step.rows) for step in steps]
    assert tokens(model, prompts, stop) == expected


@pytest.mark.parametrize("most", [0, 1, 7])
def test_max_new_tokens(model, most):
    assert [len(row) for row in tokens(model, PROMPTS["single tokens"], most=most)] == [most] * 3


def test_closing_the_iterator_stops_the_decoder(model, calls):
    steps = decode(model, [SHARED], [], 1000)
    assert next(steps).states.is_inference()
    assert not torch.is_inference_mode_enabled()  # it does not leak to who iterates
    next(steps)
    before = len(calls)
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)
    assert len(calls) == before == 3  # the beginning and two steps


# --------------------------------------------------------------------------------------------------------- sampler

PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])
DRAWS = 20_000


def shares(**values) -> dict[int, float]:
    drawn = sampler(seed=0, **values)(PROBABILITIES.log().expand(DRAWS, 4))
    return {token: count / DRAWS for token, count in Counter(drawn.tolist()).items()}


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"temperature": 1.0}, {0: 0.15, 1: 0.5, 2: 0.05, 3: 0.3}),
        ({"temperature": 1.0, "top_p": 0.9}, {0: 0.15 / 0.95, 1: 0.5 / 0.95, 3: 0.3 / 0.95}),
        ({"temperature": 1.0, "top_p": 0.7}, {1: 0.625, 3: 0.375}),  # 0.5 is not enough, 0.5 + 0.3 is
        ({"temperature": 1.0, "top_p": 0.4}, {1: 1.0}),
        # 0.5 doubles the logarithms: the squares 0.0225, 0.25, 0.0025, 0.09 over their sum 0.365
        ({"temperature": 0.5}, {0: 0.0616, 1: 0.6849, 2: 0.0068, 3: 0.2466}),
        ({"temperature": 0.5, "top_p": 0.9}, {1: 0.25 / 0.34, 3: 0.09 / 0.34}),
    ],
)
def test_the_nucleus_by_hand(values, expected):
    assert shares(**values) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    "values", [{"temperature": 0}, {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1.0, "top_p": 0.0}]
)
def test_what_is_greedy(model, values):
    prompts = PROMPTS["a common beginning"]
    assert tokens(model, prompts, pick=sampler(**values)) == tokens(model, prompts)


def test_the_same_seed_gives_the_same_tokens(model):
    def drawn(seed):
        return tokens(model, PROMPTS["nothing in common"], pick=sampler(2.0, 0.95, seed))

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


# ------------------------------------------------------------------------------------------------ complete, stream


def test_complete_keeps_the_order_and_its_states_give_the_tokens(model):
    prompts = [*PROMPTS["a common beginning"], *PROMPTS["nothing in common"]]
    full = tokens(model, prompts)
    stop = [full[1][4]]
    done: list[int] = []
    answers = complete(model, prompts, stop, NEW, batch=4, progress=done.append)
    assert sum(done) == len(prompts)
    assert stop[0] in full[1]
    for row, answer in zip(full, answers, strict=True):
        ended = stop[0] in row
        assert answer.ids == (row[: row.index(stop[0])] if ended else row)
        said = model.get_output_embeddings()(answer.states).argmax(-1).tolist()
        assert said == answer.ids + stop * ended


def test_stream_joins_to_the_answer(model, form):
    for word in "abc":
        messages = [{"role": "user", "content": word}]
        (answer,) = complete(model, [form.prompt(messages)], form.stop_ids, 20)
        text = form.decode(answer.ids).rstrip("\ufffd")  # a cut answer may end within a character
        assert text
        assert "".join(stream(model, form, messages, 20)) == text


def test_stream_shows_whole_characters_and_not_the_stop_token(model, form, monkeypatch):
    ids = [*form._encode("né 小星").ids, form.stop_ids[0]]
    monkeypatch.setattr(generation, "decode", lambda *_: (Step([0], [token], torch.empty(1, 1)) for token in ids))
    assert list(stream(model, form, [{"role": "user", "content": "?"}])) == ["n", "é", " ", "小", "星"]
