"""Many short conversations -> full rows in which none sees another; no padding but within the attention."""

import bisect
import contextlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.6
    varlen_attn = None

# Torch 2.11 takes grouped queries unasked, 2.13 where it is told.
GROUPED = {"enable_gqa": True} if varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
WIDTH = 16  # a band's width is a multiple of this: few different shapes, which GPU kernels are built for
LONGEST = 512  # tokens that a ragged row's longest sequence counts for at least: fewer shapes are compiled
WINDOW = 1000  # sequences among which `fill` looks for those that fit together

T = TypeVar("T")


def fill(sequences: Iterable[T], length: int, size: Callable[[T], int] = len) -> Iterator[list[T]]:
    """The sequences in rows of at most `length` tokens, each whole and in one row. Of WINDOW sequences at a time the
    longest comes first, each goes where it leaves the least room (best-fit decreasing); a row less than half full waits
    for the next window. The rows of a window come shuffled, the same way each time.

    `size` tells a sequence's tokens. Raises ValueError for one that is longer than a row.
    """
    sequences, order = iter(sequences), random.Random(0)
    rows: list[list[T]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, which row), sorted
    while window := list(itertools.islice(sequences, WINDOW)):
        for sequence in sorted(window, key=size, reverse=True):
            if (needs := size(sequence)) > length:
                raise ValueError(f"a sequence of {needs} tokens does not fit in a row of {length}")
            at = bisect.bisect_left(rooms, (needs, -1))
            if at == len(rooms):
                rooms.append((length, len(rows)))
                rows.append([])
            room, row = rooms.pop(at)
            rows[row].append(sequence)
            bisect.insort(rooms, (room - needs, row))
        waiting = [(room, row) for room, row in rooms if 2 * room > length]
        done = [rows[row] for room, row in rooms if 2 * room <= length]
        order.shuffle(done)
        yield from done
        rows, rooms = [rows[row] for _, row in waiting], [(room, i) for i, (room, _) in enumerate(waiting)]
    yield from rows


class Band(NamedTuple):
    """Sequences of like length, which one call of the attention takes, each on a line of its own."""

    grid: tuple[int, int]  # lines, width
    tokens: Tensor  # [n] where in the row their tokens are
    slots: Tensor  # [n] where in the flattened grid each of these goes


def pack(
    sequences: Sequence[Sequence[int]], device: torch.device | None = None, *, ragged: bool = False
) -> dict[str, Any]:
    """Model inputs for all sequences in one row: input_ids and position_ids, both [1, total length], and the attention's
    bands, or the number of its lines where all are of one length. The positions start again at 0 with every sequence.

    `ragged`, on a GPU in 16 bits: a kernel takes the row as it is, with the sequences' bounds. The row is then filled up
    by at most an eighth, and the bounds too, so that few different shapes come: what is compiled is compiled once.
    """
    filler = 0
    if ragged:
        total = sum(map(len, sequences))
        step = max(128, 1 << max(0, (total - 1).bit_length() - 4))
        if filler := -total % step:
            sequences = [*sequences, [0] * filler]
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    starts = np.cumsum(lengths) - lengths
    ids = np.fromiter(itertools.chain.from_iterable(sequences), np.int64, lengths.sum())
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)

    def tensor(values: np.ndarray) -> Tensor:
        return there(torch.from_numpy(values), device)

    inputs = {"input_ids": tensor(ids)[None], "position_ids": tensor(positions)[None]}
    if not filler and (lengths == lengths[0]).all():
        return {**inputs, "lines": len(lengths)}
    if ragged:
        bounds = np.full(1 + (1 << (len(lengths) - 1).bit_length()), len(ids), np.int32)
        bounds[: len(lengths)] = starts
        return {**inputs, "bounds": tensor(bounds), "longest": max(LONGEST, 1 << (int(lengths.max()) - 1).bit_length())}
    bands = []
    octaves = np.ceil(np.log2(np.maximum(lengths, WIDTH)))  # so that at most half of a line is empty
    for octave in np.unique(octaves):
        members = np.flatnonzero(octaves == octave)
        width = int(-(-lengths[members].max() // WIDTH) * WIDTH)
        line = np.repeat(np.arange(len(members)), lengths[members])
        place = np.concatenate([positions[s : s + n] for s, n in zip(starts[members], lengths[members], strict=True)])
        tokens = np.repeat(starts[members], lengths[members]) + place
        bands.append(Band((len(members), width), tensor(tokens), tensor(line * width + place)))
    return {**inputs, "bands": bands}


def there(tensor: Tensor, device: torch.device | None) -> Tensor:
    """On the device; a GPU gets it in its turn, nobody waits for what it is at work on."""
    if device is not None and device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, total length, head size]; key and value with fewer heads (grouped queries)
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lines: int = 0,
    bands: Sequence[Band] = (),
    bounds: Tensor | None = None,
    longest: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence. For this step alone every sequence gets a line of its own, filled up on the
    right, where no token looks: the cost is the sum of their squared lengths, not the square of the sum. Sequences of one
    length are such lines already, and torch's own kernels for these are the fastest: of 8 x 2048 tokens on an H200, with
    16 heads of 128, forward and backward take 1.33 ms, `varlen_attn` 2.25."""
    dtype = value.dtype  # under autocast the rotary step leaves query and key in float32
    if bounds is not None:
        rows = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
        causal = {"scale": scaling, "window_size": (-1, 0), **GROUPED}
        return varlen_attn(*rows, bounds, bounds, longest, longest, **causal)[None], None
    compute = torch.float32 if value.device.type == "cpu" else dtype  # on CPU bfloat16's backward pass is slow
    states = [
        tensor[0].transpose(0, 1).to(compute) for tensor in (query, key, value)
    ]  # [total length, heads, head size]

    def attend(grid: tuple[int, int], states: Iterable[Tensor]) -> Tensor:
        rows = (tensor.unflatten(0, grid).transpose(1, 2) for tensor in states)  # [lines, heads, width, head size]
        with torch.autocast(query.device.type, enabled=False):
            out = F.scaled_dot_product_attention(*rows, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    if lines:
        return attend((lines, -1), states).to(dtype)[None], None
    parts = []
    for grid, tokens, slots in bands:
        filled = [
            tensor.new_zeros(grid[0] * grid[1], *tensor.shape[1:]).index_copy(0, slots, tensor[tokens])
            for tensor in states
        ]
        parts.append(attend(grid, filled)[slots])
    out = torch.empty_like(states[0]).index_copy(0, torch.cat([band.tokens for band in bands]), torch.cat(parts))
    return out.to(dtype)[None], None


AttentionInterface.register("packed", attention)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel, name: str = "packed") -> Iterator[None]:
    """Within it the model takes what `pack` gives, or attends by another function of that name."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
