import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from finetune.errors import UserError
from finetune.forward import Forward, Span
from finetune.generation import GREEDY, Decoder, Sampling, Step, complete, pick, stream
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


ROOM = 1000


@pytest.fixture
def passes(model):
    """How many tokens went through the model at each step."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    yield seen
    hook.remove()


def run(decoder: Decoder) -> list[list[Step]]:
    steps = []
    while decoder.rows or decoder.waiting:
        steps.append(decoder.step())
    return steps


def tokens(model, prompts, stop_ids=(), most=NEW, sampling=GREEDY, **options) -> list[list[int]]:
    decoder = Decoder(model, stop_ids, ROOM, **options)
    rows = [decoder.add(prompt, most, sampling) for prompt in prompts]
    run(decoder)
    return [row.ids for row in rows]


def reference(model, prompt: list[int], most=NEW) -> list[int]:
    """transformers' own greedy tokens, the stop token included."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)
    return out[0, len(prompt) :].tolist()


# --------------------------------------------------------------------------------------------------------- forward

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases, yarn": LlamaConfig(**SMALL, attention_bias=True, rope_parameters=YARN),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=7),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=7),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def kind(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:  # not all ones or zeros: then a forgotten one is seen
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def record(body, _):
    """As a GPU does it, which always reads and writes in the same places."""
    found = body()
    return lambda: found.copy_(body()), found


@pytest.mark.parametrize("together", [0, 1, 2], ids=["one by one", "together, as on a GPU", "recorded"])
@pytest.mark.parametrize("fast", [False, True], ids=["float32", "float16 weights"])
def test_logits_are_transformers_own(kind, together, fast):
    texts = [torch.randint(0, 300, (n,)).tolist() for n in (40, 23, 31)]
    with torch.inference_mode():
        expected = [kind(torch.tensor([text])).logits[0] for text in texts]
    forward = Forward(kind, 200, fast=fast)
    forward.together, forward.record = together > 0, record
    forward.records = together == 2 and forward.layers is not None
    starts, past = [0, 60, 110], [0, 0, 0]
    most = 0.0
    # prompts in pieces among single tokens
    for pieces in ((12, 1, 5), (1, 9, 1), (14, 1, 1), (1, 1, 1), (1, 1, 1), (1, 10, 22)):
        spans = [Span(starts[i], past[i], texts[i][past[i] : past[i] + n]) for i, n in enumerate(pieces)]
        found = forward.logits(forward(spans))
        past = [p + n for p, n in zip(past, pieces, strict=True)]
        for i in range(3):
            most = max(most, (found[i] - expected[i][past[i] - 1]).abs().max().item())
    assert list(forward.recorded) == ([(4, 128)] if forward.records else [])
    scale = max(e.abs().max().item() for e in expected)
    assert most < (3e-3 if fast else 1e-5) * scale


def test_weights_in_16_bits_lie_side_by_side_and_say_the_same(tiny_model):
    spans = [Span(0, 0, [5, 6, 7, 8]), Span(20, 0, [9])]
    slow, fast = (Forward(load(tiny_model, torch.bfloat16), 50, fast=fast) for fast in (False, True))
    torch.testing.assert_close(fast.logits(fast(spans)), slow.logits(slow(spans)))
    assert all(layer.mlp.up_proj.weight is layer.self_attn.o_proj.weight is None for layer in fast.core.layers)
    assert slow.core.layers[0].mlp.up_proj.weight is not None


def test_recorded_steps_say_the_same_in_company_that_comes_and_goes(model):
    chance = random.Random(0)
    prompts = [[chance.randrange(256) for _ in range(chance.randrange(1, 200))] for _ in range(30)]
    alone = [tokens(model, [prompt], most=20)[0] for prompt in prompts]
    decoder = Decoder(model, [], 2000, rows=8)
    decoder.forward.together, decoder.forward.records, decoder.forward.record = True, True, record
    rows, states = [], {}
    while len(rows) < len(prompts) or decoder.rows or decoder.waiting:
        if len(rows) < len(prompts) and chance.random() < 0.2:
            rows.append(decoder.add(prompts[len(rows)], 20))
        for step in decoder.step():
            states.setdefault(step.row, []).append(step.state)
    assert [row.ids for row in rows] == alone
    assert len(decoder.forward.recorded) > 4
    for row in rows:  # what was handed out stays as it was
        assert decoder.forward.logits(torch.stack(states[row])).argmax(-1).tolist() == row.ids


def test_attention_may_give_its_result_in_any_layout(model, monkeypatch):
    """On a GPU in float32 it gives [rows, heads, queries, size] as a view of [rows, queries, heads, size]."""
    plain = F.scaled_dot_product_attention

    def turned(*args, **kwargs):
        return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = tokens(model, prompts, most=5)
    monkeypatch.setattr(F, "scaled_dot_product_attention", turned)
    decoder = Decoder(model, [], 500)
    decoder.forward.together = True
    rows = [decoder.add(prompt, 5) for prompt in prompts]
    run(decoder)
    assert [row.ids for row in rows] == expected


def test_a_model_with_other_memory_is_refused():
    from transformers import MambaConfig

    other = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UserError, match="Models of type 'mamba' keep more than keys and values"):
        Forward(other, 10)


# --------------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("chunk", [1, 5, 128])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_greedy_tokens_are_transformers_own(model, prompts, chunk):
    expected = [reference(model, prompt) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(set(map(tuple, prompts)))
    assert tokens(model, prompts, [model.generation_config.eos_token_id], chunk=chunk) == expected


def test_the_same_tokens_alone_and_in_company_that_comes_and_goes(model):
    """Forty conversations join at random steps, some are cancelled, in a pool too small for all."""
    chance = random.Random(0)
    prompts = [[chance.randrange(256) for _ in range(chance.randrange(1, 60))] for _ in range(40)]
    alone = [tokens(model, [prompt], most=20)[0] for prompt in prompts]
    decoder = Decoder(model, [], 400, rows=8, chunk=16)
    rows, dropped, most = [], set(), 0
    while len(rows) < len(prompts) or decoder.rows or decoder.waiting:
        if len(rows) < len(prompts) and chance.random() < 0.5:
            rows.append(decoder.add(prompts[len(rows)], 20))
        decoder.step()
        most = max(most, len(decoder.rows))
        if decoder.rows and chance.random() < 0.1:
            dropped.add(victim := chance.choice(decoder.rows))
            decoder.cancel(victim)
    assert most > 3
    assert 3 < len(dropped) < 30
    for row, expected in zip(rows, alone, strict=True):
        assert row.ids == (expected[: len(row.ids)] if row in dropped else expected)


def test_the_default_model_says_the_same_alone_and_in_company(default_model):
    """In float32, bit by bit of the arithmetic that decides: real logits lie closer than a random model's."""
    model, form = load(default_model), chat_format(default_model)
    asks = ["Who are you?", "你是谁？", "2 + 2 = ?"]
    prompts = [form.prompt([{"role": "user", "content": ask}]) for ask in asks]
    together = tokens(model, prompts, form.stop_ids, chunk=32)
    assert together == [tokens(model, [prompt], form.stop_ids)[0] for prompt in prompts]
    assert together[0] == reference(model, prompts[0])


def test_one_joins_and_one_leaves_between_two_steps(model, passes):
    decoder = Decoder(model, [], ROOM)
    first = decoder.add([5, 6, 7], 50)
    assert [step.row for step in decoder.step() + decoder.step()] == [first, first]
    second = decoder.add([8, 9], 3)
    assert [[step.row for step in decoder.step()] for _ in range(4)] == [
        [second, first],
        *[[first, second]] * 2,
        [first],
    ]
    assert passes == [3, 1, 3, 2, 2, 1]
    assert len(second.ids) == 3
    decoder.cancel(first)
    assert decoder.step() == []
    assert passes == [3, 1, 3, 2, 2, 1]
    assert len(first.ids) == 6


def test_a_long_prompt_does_not_freeze_the_others(model, passes):
    decoder = Decoder(model, [], ROOM, chunk=16)
    talking = decoder.add([1], 100)
    decoder.step()
    long = decoder.add(list(range(200)), 5)
    short = decoder.add([9, 8, 7], 5)
    assert [step.row for step in decoder.step()] == [short, talking]  # the short prompt is answered at once
    assert passes == [1, 16 + 1]  # and what it leaves of its share goes to the long one
    while not long.ids:
        assert talking in [step.row for step in decoder.step()]
    assert max(passes) <= 16 + 2
    assert long.ids == tokens(model, [list(range(200))], most=1)[0]


def test_the_next_turn_computes_what_is_new(model, passes):
    decoder = Decoder(model, [], ROOM)
    first = decoder.add(SHARED, 8, owner="a")
    run(decoder)
    prompt = [*SHARED, *first.ids, 1, 2, 3]
    before = len(passes)
    second = decoder.add(prompt, 8, owner="a")
    run(decoder)
    assert second.reused == len(SHARED) + 7  # the answer's last token never went through the model
    assert passes[before] == 4
    assert second.ids == tokens(model, [prompt], most=8)[0]
    stranger = decoder.add(prompt, 8, owner="b")
    run(decoder)
    assert stranger.reused == 0  # not even how long it takes tells what another one has asked
    assert stranger.ids == second.ids
    assert all(not block.busy for block in decoder.blocks)


def test_what_is_kept_gives_way_to_who_comes_and_who_comes_waits_for_who_is_there(model):
    decoder = Decoder(model, [], 100, rows=8)
    for start in range(0, 200, 20):  # ten of 25 tokens each, one after the other
        decoder.add(list(range(start, start + 20)), 5, owner=start)
        run(decoder)
        assert sum(block.size for block in decoder.blocks) <= 100
    rows = [decoder.add(list(range(50)), 10, owner=i) for i in range(3)]
    steps = run(decoder)
    assert [[step.row for step in together] for together in steps] == [[row] for row in rows for _ in range(10)]
    assert [len(row.ids) for row in rows] == [10] * 3
    with pytest.raises(UserError, match=r"^The conversation is too long: 101 tokens, and 100 fit\. Shorten it\.$"):
        decoder.add([0] * 91, 10)


def test_a_stop_token_ends_its_row_which_leaves(model, passes):
    prompts = PROMPTS["nothing in common"]
    full = tokens(model, prompts)
    stop = [full[0][2], full[1][5]]
    expected = [row[: next((i for i, t in enumerate(row) if t in stop), NEW) + 1] for row in full]
    lengths = [len(row) for row in expected]
    assert len(set(lengths)) > 1  # they end at different steps
    passes.clear()
    assert tokens(model, prompts, stop) == expected
    assert passes[1:] == [sum(length > n for length in lengths) for n in range(1, max(lengths))]


@pytest.mark.parametrize("most", [1, 7])
def test_max_new_tokens(model, most):
    assert [len(row) for row in tokens(model, PROMPTS["single tokens"], most=most)] == [most] * 3


# --------------------------------------------------------------------------------------------------------- sampler

PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])
DRAWS = 20_000


def shares(**values) -> dict[int, float]:
    source = random.Random(0)
    drawn = pick(PROBABILITIES.log().expand(DRAWS, 4), [(Sampling(**values), source)] * DRAWS)
    return {token: count / DRAWS for token, count in Counter(drawn).items()}


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


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1e-9}])
def test_what_is_greedy(model, values):
    prompts = PROMPTS["a common beginning"]
    assert tokens(model, prompts, sampling=Sampling(**values)) == tokens(model, prompts)


def test_a_nucleus_of_more_than_the_likeliest():
    """Of 1,000 tokens alike 90 % are drawn: more than are looked at first."""
    drawn = pick(torch.zeros(2000, 1000), [(Sampling(1.0, 0.9), random.Random(i)) for i in range(2000)])
    assert 700 < len(set(drawn)) <= 901


def test_each_row_is_drawn_its_own_way_and_the_seed_decides_in_any_company(model):
    prompts = PROMPTS["nothing in common"]
    ways = [Sampling(2.0, 0.95, 3), Sampling(), Sampling(1.5, 1.0, 4)]
    decoder = Decoder(model, [], ROOM)
    rows = [decoder.add(prompt, NEW, way) for prompt, way in zip(prompts, ways, strict=True)]
    run(decoder)
    alone = [tokens(model, [prompt], sampling=way)[0] for prompt, way in zip(prompts, ways, strict=True)]
    assert [row.ids for row in rows] == alone
    assert alone[0] != tokens(model, prompts[:1], sampling=Sampling(2.0, 0.95, 5))[0]
    drawn = [tokens(model, prompts[:1], sampling=Sampling(2.0))[0] for _ in range(2)]
    assert drawn[0] != drawn[1]


# ------------------------------------------------------------------------------------------------ complete, stream


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_states_do_not_depend_on_the_batch(model, prompts):
    together = complete(model, prompts, [], NEW)
    for prompt, answer in zip(prompts, together, strict=True):
        (single,) = complete(model, [prompt], [], NEW)
        torch.testing.assert_close(answer.states, single.states, rtol=1e-4, atol=1e-4)


def test_the_common_beginning_is_computed_once(model, passes):
    prompts = [[*SHARED, n, 1, 2] for n in range(100)]
    complete(model, prompts, [], 2)
    assert sum(passes) < 100 * (3 + 1) + 20 * len(SHARED)  # of 100 * (3 + 1 + len(SHARED))


def test_complete_under_autocast(model):
    """As training asks in between, where the processor has bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = complete(model, [SHARED], [], 3)
    (exact,) = complete(model, [SHARED], [], 3)
    assert 0 < (rounded.states[0].float() - exact.states[0]).abs().max() < 0.2 * exact.states[0].abs().max()


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
    decoder = Decoder(model, form.stop_ids, ROOM)
    for word in "abc":
        messages = [{"role": "user", "content": word}]
        (answer,) = complete(model, [form.prompt(messages)], form.stop_ids, 20)
        text = form.decode(answer.ids).rstrip("\ufffd")  # a cut answer may end within a character
        assert text
        assert "".join(stream(decoder, form, messages, 20)) == text


def test_stream_shows_whole_characters_and_not_the_stop_token(model, form):
    ids = iter([*form._encode("né 小星").ids, form.stop_ids[0]])
    decoder = Decoder(model, form.stop_ids, ROOM)
    decoder.pick = lambda *_: [next(ids)]
    assert list(stream(decoder, form, [{"role": "user", "content": "?"}])) == ["n", "é", " ", "小", "星"]


def test_closing_the_stream_stops_the_decoder(model, form, passes):
    decoder = Decoder(model, form.stop_ids, ROOM)
    pieces = stream(decoder, form, [{"role": "user", "content": "b"}], 500)
    next(pieces)
    before = len(passes)
    pieces.close()
    assert not decoder.rows
    assert decoder.step() == []
    assert len(passes) == before


def test_completions_that_are_drawn_differ_and_come_again_with_the_same_seed(model):
    prompts = [SHARED] * 4
    first, again, other = (complete(model, prompts, [], NEW, sampling=Sampling(1.0, 0.9, seed)) for seed in (0, 0, 9))
    ids = [answer.ids for answer in first]
    assert ids == [answer.ids for answer in again]
    assert ids != [answer.ids for answer in other]
    assert len({tuple(answer) for answer in ids}) == 4
