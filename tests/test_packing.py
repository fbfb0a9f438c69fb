import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from finetune.model import load
from finetune.packing import WIDTH, fill, pack, packed_attention
from finetune.tasks import plan
from finetune.train import answer_example, losses

LENGTHS = (5, 1, WIDTH, WIDTH + 1, 2, 3 * WIDTH)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


def conversations(seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=source).tolist() for length in LENGTHS]


def packed(model, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Each sequence's hidden states, [length, hidden size], from one packed row."""
    with packed_attention(model):
        hidden = model.base_model(**pack(sequences), use_cache=False).last_hidden_state[0]
    return list(hidden.split([len(sequence) for sequence in sequences]))


def alone(model, sequences: list[list[int]]) -> list[torch.Tensor]:
    return [model.base_model(torch.tensor([sequence]), use_cache=False).last_hidden_state[0] for sequence in sequences]


def test_ids_positions_and_bands():
    inputs = pack([[7, 8, 9], list(range(2 * WIDTH + 1)), [4], list(range(3 * WIDTH))])
    assert inputs["input_ids"].tolist() == [[7, 8, 9, *range(2 * WIDTH + 1), 4, *range(3 * WIDTH)]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, *range(2 * WIDTH + 1), 0, *range(3 * WIDTH)]]
    short, long = inputs["bands"]
    assert (short.grid, long.grid) == ((2, WIDTH), (2, 3 * WIDTH))  # the longest of each, rounded up
    first, last = 3, 3 + 2 * WIDTH + 1 + 1  # where the long ones begin in the row
    assert short.tokens.tolist() == [0, 1, 2, last - 1]
    assert short.slots.tolist() == [0, 1, 2, WIDTH]
    assert long.tokens.tolist() == [*range(first, last - 1), *range(last, last + 3 * WIDTH)]
    assert long.slots.tolist() == [*range(2 * WIDTH + 1), *range(3 * WIDTH, 6 * WIDTH)]


def test_sequences_of_one_length_are_lines_as_they_are(model):
    """And see each other as little as others do."""
    sequences = [ids[:WIDTH] for ids in conversations() if len(ids) >= WIDTH]
    inputs = pack(sequences)
    assert inputs["lines"] == len(sequences) == 3
    assert "bands" not in inputs
    with torch.no_grad():
        for a, b in zip(packed(model, sequences), alone(model, sequences), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gpus_rows_are_lines_only_where_they_need_no_filling_up():
    assert pack([[0] * 64] * 4, ragged=True)["lines"] == 4
    assert "lines" not in pack([[0] * 60] * 4, ragged=True)  # else each length would be compiled


def test_the_attentions_lines_are_at_least_half_full():
    source = random.Random(0)
    for _ in range(20):
        lengths = [source.randint(WIDTH, 2000) for _ in range(source.randint(2, 30))]
        bands = pack([[0] * length for length in lengths])["bands"]
        assert sum(band.grid[0] for band in bands) == len(lengths)
        assert sum(band.grid[0] * band.grid[1] for band in bands) < 2 * sum(lengths) + WIDTH * len(lengths)


@pytest.mark.parametrize("longest, share", [(300, 0.97), (2048, 0.93)])
def test_rows_are_full_and_hold_every_sequence_once(longest, share):
    source = random.Random(1)
    sequences = [(i, source.randint(1, longest)) for i in range(5000)]
    rows = list(fill(iter(sequences), 2048, size=lambda sequence: sequence[1]))
    filled = [sum(size for _, size in row) for row in rows]
    assert max(filled) <= 2048
    assert sum(filled) / (2048 * len(rows)) > share
    assert sorted(sequence for row in rows for sequence in row) == sequences
    assert rows == list(fill(sequences, 2048, size=lambda sequence: sequence[1]))  # the same again


def test_a_row_is_given_before_all_sequences_are_read():
    read = []
    rows = fill((read.append(i) or [i] * 7 for i in range(20_000)), 100)
    for _ in range(200):
        next(rows)
    assert len(read) < 4000


def test_a_sequence_longer_than_a_row_is_a_bug():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit in a row of 8"):
        list(fill([[1] * 8, [2] * 9], 8))


def test_the_steps_of_a_run_are_full_and_read_each_row_as_often_as_the_epochs_say():
    source = random.Random(3)
    tokens = [source.randint(20, 1024) for _ in range(3000)]
    count, steps = plan(tokens, 16_384, 2.5, seed=0)
    found = list(steps())
    sizes = [sum(tokens[row] for row in step) for step in found]
    assert count == len(found)
    assert max(sizes) <= 16_384
    assert sum(sizes) / len(sizes) > 0.98 * 16_384
    assert sum(sizes) == pytest.approx(2.5 * sum(tokens), abs=1024)
    assert set(Counter(row for step in found for row in step).values()) == {2, 3}
    assert found == list(steps())
    assert found != list(plan(tokens, 16_384, 2.5, seed=1)[1]())


def test_the_loss_of_full_rows_is_that_of_each_sequence_alone(model):
    """The sum over supervised tokens; answers only, as in instruction tuning, and every token, as in pretraining."""
    source = random.Random(2)
    sequences = [[source.randrange(256) for _ in range(source.randint(2, 90))] for _ in range(40)]
    for begin in (1, 0):  # the supervised part: the second half, or all but the first token
        examples = [
            answer_example(ids, [int(i >= begin * len(ids) // 2) for i in range(len(ids))]) for ids in sequences
        ]
        rows = list(fill(examples, 128, size=lambda example: len(example.ids)))
        assert max(map(len, rows)) > 2
        with torch.no_grad():
            together = sum(losses(model, row)[0].item() for row in rows)
            alone = 0.0
            for example in examples:
                logits = model(torch.tensor([example.ids])).logits[0].double()[example.positions]
                alone += F.cross_entropy(logits, torch.tensor(example.targets), reduction="sum").item()
        assert together == pytest.approx(alone, rel=1e-5)


def test_states_are_those_of_each_sequence_alone(model):
    with torch.no_grad():
        together, single = packed(model, conversations()), alone(model, conversations())
    for a, b in zip(together, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_each_sequence_alone(model):
    def gradients(states: list[torch.Tensor]) -> list[torch.Tensor]:
        hidden = torch.cat(states)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        return list(torch.autograd.grad((hidden * weight).sum(), list(model.base_model.parameters())))

    together = gradients(packed(model, conversations()))
    single = gradients(alone(model, conversations()))
    for a, b in zip(together, single, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_conversation_sees_no_other(model, changed):
    before = conversations()
    after = [[(t + 1) % 256 for t in ids] if i == changed else ids for i, ids in enumerate(before)]
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(packed(model, before), packed(model, after), strict=True)):
            assert torch.equal(a, b) == (i != changed)


def test_the_models_own_attention_comes_back(model):
    own = model.config._attn_implementation
    assert own != "packed"
    with packed_attention(model):
        assert model.config._attn_implementation == "packed"
    assert model.config._attn_implementation == own
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == own
