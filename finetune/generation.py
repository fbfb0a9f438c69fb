"""Batched, cancellable, streaming decoding; used by the scorecard, the report, chat and the page.

One generator, `decode`, yields after every step; whoever stops iterating (or closes it) stops the decoder.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from finetune.chat_format import ChatFormat, Message

BATCH = {"cpu": 64, "cuda": 1024}  # rows decoded together

Pick = Callable[[Tensor], Tensor]  # logits [rows, vocabulary] -> token ids [rows]


class Step(NamedTuple):
    """What one step gave: for every row still decoding its index, its new token, and the final hidden state that chose it."""

    rows: list[int]
    tokens: list[int]
    states: Tensor  # [rows, hidden size]


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def sampler(temperature: float, top_p: float = 1.0, seed: int | None = None) -> Pick:
    """Draws from the smallest set of tokens whose probability exceeds top_p (nucleus sampling, arXiv:1904.09751)."""
    if temperature <= 0:
        return greedy
    source: torch.Generator | None = None

    def pick(logits: Tensor) -> Tensor:
        nonlocal source
        if source is None:
            source = torch.Generator(logits.device)
            source.manual_seed(seed) if seed is not None else source.seed()
        probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        drawn = probabilities.masked_fill((before >= top_p) & (before > 0), 0).multinomial(1, generator=source)
        return order.gather(-1, drawn).squeeze(-1)

    return pick


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pick: Pick = greedy,
) -> Iterator[Step]:
    """Decode one batch. A row's stop token is its last and is yielded too; finished rows leave the batch.

    What all prompts begin with is computed once; the rest is padded on its left.
    """
    device = model.device
    first, last = min(prompts), max(prompts)  # what these two begin with alike, all do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, prompts)) - 1)
    width = max(map(len, prompts)) - shared
    ids = torch.tensor([[0] * (width - len(p) + shared) + list(p[shared:]) for p in prompts], device=device)
    seen = torch.tensor(  # [rows, time]
        [[1] * shared + [0] * (width - len(p) + shared) + [1] * (len(p) - shared) for p in prompts], device=device
    )
    rows, cache = torch.arange(len(prompts)), DynamicCache(config=model.config)
    if shared:
        model.base_model(input_ids=torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache)
        cache.batch_repeat_interleave(len(prompts))
    for _ in range(max_new_tokens):
        position = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = model.base_model(
            input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        tokens = pick(model.get_output_embeddings()(hidden))
        yield Step(rows.tolist(), tokens.tolist(), hidden)
        going = torch.tensor([token not in stop_ids for token in tokens.tolist()])
        if not going.any():
            return
        if not going.all():
            rows, kept = rows[going], going.nonzero().squeeze(-1).to(device)
            tokens, seen = tokens[kept], seen[kept]
            cache.batch_select_indices(kept)
        ids, seen = tokens[:, None], torch.cat([seen, seen.new_ones(len(tokens), 1)], -1)


class Answer(NamedTuple):
    ids: list[int]  # without the stop token
    states: Tensor  # [tokens, hidden size]: the final hidden state that chose each token, the stop token's included


def complete(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    *,
    batch: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """Greedy answers to all prompts, in their order. Prompts of like length are decoded together, `batch` at once."""
    batch = batch or BATCH[model.device.type]
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        ids: list[list[int]] = [[] for _ in chunk]
        states: list[list[Tensor]] = [[] for _ in chunk]
        for step in decode(model, [prompts[i] for i in chunk], stop_ids, max_new_tokens):
            for row, token, state in zip(step.rows, step.tokens, step.states, strict=True):
                ids[row].append(token)
                states[row].append(state)
        for i, row_ids, row_states in zip(chunk, ids, states, strict=True):
            ended = row_ids[-1] in stop_ids
            answers[i] = Answer(row_ids[:-1] if ended else row_ids, torch.stack(row_states))
        progress(len(chunk))
    return answers  # type: ignore[return-value]


def answer_texts(
    model: PreTrainedModel,
    form: ChatFormat,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """The greedy answer to each conversation, as text."""
    prompts = [form.prompt(messages) for messages in conversations]
    found = complete(model, prompts, form.stop_ids, max_new_tokens, progress=progress)
    return [form.decode(answer.ids).strip() for answer in found]


def stream(
    model: PreTrainedModel,
    form: ChatFormat,
    messages: Sequence[Message],
    max_new_tokens: int = 512,
    pick: Pick = greedy,
) -> Iterator[str]:
    """The answer's text, piece by piece. Closing the iterator stops the decoder."""
    text = form.stream()
    for step in decode(model, [form.prompt(messages)], form.stop_ids, max_new_tokens, pick):
        if step.tokens[0] not in form.stop_ids and (piece := text.add(step.tokens[0])):
            yield piece
