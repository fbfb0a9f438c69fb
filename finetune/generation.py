"""One decoder for the scorecard, the report, the terminal, the page and the API: conversations join and leave it between
two steps, and what the beginning of a prompt has cost once is not computed again.
"""

import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.chat_format import ChatFormat, Message
from finetune.errors import UserError
from finetune.forward import Adapter, Forward, Span
from finetune.serving import pool_tokens

ROWS = {"cpu": 64, "cuda": 128}  # conversations decoded together
CHUNK = {"cpu": 128, "cuda": 2048}  # tokens of prompts that a step reads beside them: what the others wait for
# Blocks of one owner among which the longest beginning is looked for: among hundreds that takes as long as a step.
RECENT = 16
LIKELY = 256  # tokens among which the nucleus is looked for before all are sorted


class Sampling(NamedTuple):
    """How a token is chosen. At temperature 0 it is the likeliest one. The same seed gives the same answer, in whatever
    company."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


@dataclass(eq=False)
class Block:
    """A piece of the pool."""

    start: int
    size: int  # tokens
    owner: Hashable
    ids: list[int]  # the tokens whose keys and values lie there
    busy: bool = True


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    prompt: list[int]
    most: int  # new tokens
    sampling: Sampling
    owner: Hashable
    bare: bool = False  # by the base: the adapter is taken off
    ids: list[int] = field(default_factory=list)  # the answer's tokens so far, the stop token included
    reused: int = 0  # the prompt's tokens that were not computed anew
    block: Block | None = None  # None: it waits for room, or is done

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)

    @property
    def missing(self) -> int:
        """Tokens that have to go through the model before the next one is known."""
        return len(self.prompt) + len(self.ids) - len(self.block.ids)


class Step(NamedTuple):
    row: Row
    token: int
    state: Tensor  # [hidden size], the final hidden state that chose it
    done: bool


class Decoder:
    """`add` a conversation at any time, `step` for a token of each, `cancel` to let one go.

    `room` is the pool's, in tokens. Finished conversations stay in it until others need their place: a prompt of the same
    `owner` goes on from the longest beginning that it shares with one of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Sequence[int],
        room: int,
        *,
        rows: int | None = None,
        chunk: int | None = None,
        fast: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.forward, self.stop_ids = Forward(model, room, fast=fast, adapter=adapter), frozenset(stop_ids)
        self.most_rows, self.chunk = rows or ROWS[model.device.type], chunk or CHUNK[model.device.type]
        self.pick = pick
        self.blocks: list[Block] = []  # the ones used last at the end
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        owner: Hashable = None,
        bare: bool = False,
    ) -> Row:
        """`bare`: answered by the base, without the adapter. Raises UserError where there will never be room for it."""
        if (need := len(prompt) + max_new_tokens) > self.forward.room:
            raise UserError(f"The conversation is too long: {need} tokens, and {self.forward.room} fit. Shorten it.")
        # What the base has read is of no use to the tuned model.
        self.waiting.append(row := Row(list(prompt), max_new_tokens, sampling, (owner, bare), bare))
        return row

    def cancel(self, row: Row) -> None:
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self._leave(row)

    def step(self) -> list[Step]:
        """One pass of the model: a new token for every conversation whose prompt is read, and a piece of other prompts.
        Empty while there are only prompts to read, or nothing to do."""
        self._admit()
        if not self.rows:
            return []
        left, spans = self.chunk, {}
        reading = sorted((row for row in self.rows if row.missing > 1), key=lambda row: row.missing)
        for i, row in enumerate(reading):  # each gets an equal share, the short ones' rest goes to the long
            left -= (taken := min(row.missing, max(1, left // (len(reading) - i))))
            spans[row] = taken
        spans |= {row: 1 for row in self.rows if row.missing == 1}
        states = self.forward([self._span(row, tokens) for row, tokens in spans.items()])
        for row, tokens in spans.items():
            at = len(row.block.ids)
            row.block.ids += (row.prompt[at:] or row.ids[-1:])[:tokens]
        read = [(i, row) for i, row in enumerate(spans) if row.missing == 0]
        if not read:
            return []
        if len(read) < len(spans):
            states = states[[i for i, _ in read]]
        tokens = self.pick(self.forward.logits(states), [(row.sampling, row.random) for _, row in read])
        steps = []
        for (_, row), token, state in zip(read, tokens, states, strict=True):
            row.ids.append(token)
            done = token in self.stop_ids or len(row.ids) == row.most
            steps.append(Step(row, token, state, done))
            if done:
                self._leave(row)
        return steps

    def _span(self, row: Row, tokens: int) -> Span:
        past = len(row.block.ids)
        return Span(row.block.start, past, (row.prompt[past:] or row.ids[-1:])[:tokens], row.bare)

    def _admit(self) -> None:
        """Let in who waits, in order, as long as there is room, and prompts enough to be read at this step."""
        reading = sum(min(row.missing, self.chunk // 8) for row in self.rows if row.missing > 1)
        while self.waiting and len(self.rows) < self.most_rows and reading < self.chunk:
            row = self.waiting[0]
            if not (block := self._allocate(row)):
                return
            self.waiting.popleft()
            row.block = block
            self.rows.append(row)
            reading += min(row.missing, self.chunk // 8)

    def _allocate(self, row: Row) -> Block | None:
        size = len(row.prompt) + row.most - 1  # the last token never goes through the model
        if sum(block.size for block in self.blocks if block.busy) + size > self.forward.room:
            return None
        own = [block for block in self.blocks if block.owner == row.owner][-RECENT:]
        shared = {id(block): common(block.ids, row.prompt[:-1]) for block in own}
        # The block to go on from is the last to be given up for this one.
        idle = sorted((b for b in self.blocks if not b.busy), key=lambda b: shared.get(id(b), 0))
        while (start := self._gap(size)) is None:
            if not idle:
                return None
            self.blocks.remove(gone := idle.pop(0))
            shared.pop(id(gone), None)
        best = max((b for b in own if id(b) in shared), key=lambda b: shared[id(b)], default=None)
        row.reused = shared[id(best)] if best else 0
        if row.reused:
            self.forward.copy(best.start, start, row.reused)
            if not best.busy and row.reused == len(best.ids):  # this one knows all that it knew
                self.blocks.remove(best)
        block = Block(start, size, row.owner, row.prompt[: row.reused])
        self.blocks.append(block)
        return block

    def _gap(self, size: int) -> int | None:
        """Where the first gap of that size begins."""
        end = 0
        for block in sorted(self.blocks, key=lambda block: block.start):
            if block.start - end >= size:
                return end
            end = block.start + block.size
        return end if self.forward.room - end >= size else None

    def _leave(self, row: Row) -> None:
        self.rows.remove(row)
        block, row.block = row.block, None
        self.blocks.remove(block)
        if block.ids:
            block.busy, block.size = False, len(block.ids)
            self.blocks.append(block)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pick(logits: Tensor, samplings: Sequence[tuple[Sampling, random.Random]]) -> list[int]:
    """A token for each row of logits, [rows, vocabulary]: the likeliest, or one drawn from the smallest set of tokens whose
    probability reaches top_p (nucleus sampling, arXiv:1904.09751)."""
    tokens = logits.argmax(-1).tolist()
    for nucleus in (False, True):
        rows = [i for i, (s, _) in enumerate(samplings) if s.temperature > 0 and (s.top_p < 1) == nucleus]
        if not rows:
            continue
        temperature, top_p, drawn = (
            torch.tensor(values, device=logits.device)[:, None]
            for values in zip(
                *((s.temperature, s.top_p, source.random()) for s, source in (samplings[i] for i in rows)), strict=True
            )
        )
        shares, order = (logits[rows].float() / temperature).softmax(-1), None
        if nucleus:
            likely = shares.topk(min(LIKELY, shares.shape[-1]))
            if (likely.values.sum(-1, keepdim=True) < top_p).any():
                likely = shares.sort(-1, descending=True)
            shares, order = likely
            before = shares.cumsum(-1) - shares
            shares = shares.masked_fill((before >= top_p) & (before > 0), 0)
        sums = shares.cumsum(-1)
        at = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)
        at = at.minimum((shares > 0).cumsum(-1).argmax(-1, keepdim=True))  # rounding must not draw what cannot be
        for i, token in zip(rows, (order.gather(-1, at) if order is not None else at).flatten().tolist(), strict=True):
            tokens[i] = token
    return tokens


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
    sampling: Sampling = GREEDY,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """Answers to all prompts, in their order, `batch` at once; where they are drawn, each with a seed of its own."""
    if not prompts or not max_new_tokens:
        return [Answer([], torch.empty(0, 0))] * len(prompts)
    device, lengths = model.device.type, [len(prompt) + max_new_tokens for prompt in prompts]
    rows = min(len(prompts), batch or 2 * ROWS[device])  # nobody watches these: more at once than for visitors
    room = min(rows * sum(lengths) // len(lengths), pool_tokens(model, rows))  # for so many of middling length
    room = max(room, *lengths)
    decoder = Decoder(model, stop_ids, room, rows=rows, chunk=2 * CHUNK[device])
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])  # so that beginnings are shared
    seeds = [sampling.seed if sampling.seed is None else sampling.seed + i for i in range(len(prompts))]
    states = {decoder.add(prompts[i], max_new_tokens, sampling._replace(seed=seeds[i])): [] for i in order}
    while decoder.rows or decoder.waiting:
        for step in decoder.step():
            states[step.row].append(step.state)
            if step.done:
                progress(1)
    answers: dict[int, Answer] = {}
    for i, (row, found) in zip(order, states.items(), strict=True):
        answers[i] = Answer(row.ids[:-1] if row.ids[-1] in stop_ids else row.ids, torch.stack(found))
    return [answers[i] for i in range(len(prompts))]


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


def stream(decoder: Decoder, form: ChatFormat, messages: Sequence[Message], max_new_tokens: int = 512) -> Iterator[str]:
    """The greedy answer's text, piece by piece. Closing the iterator stops the decoder."""
    text = form.stream()
    row = decoder.add(form.prompt(messages), max_new_tokens)
    try:
        while not row.ids or row.block:
            for step in decoder.step():
                if step.token not in form.stop_ids and (piece := text.add(step.token)):
                    yield piece
    finally:
        decoder.cancel(row)
