import pytest
import torch

from finetune.model import load
from finetune.packing import WIDTH, pack, packed_attention

LENGTHS = (5, 1, WIDTH, WIDTH + 1, 2)


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


def test_rows_slots_and_positions():
    inputs = pack([[7, 8, 9], list(range(WIDTH + 1)), [4]])
    assert inputs["input_ids"].tolist() == [[7, 8, 9, *range(WIDTH + 1), 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, *range(WIDTH + 1), 0]]
    assert inputs["grid"] == (3, 2 * WIDTH)  # the longest, rounded up
    assert inputs["slots"].tolist() == [0, 1, 2, *range(2 * WIDTH, 3 * WIDTH + 1), 4 * WIDTH]


def test_a_width_that_is_full_is_not_widened():
    assert pack([list(range(WIDTH)), [1]])["grid"] == (2, WIDTH)


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
