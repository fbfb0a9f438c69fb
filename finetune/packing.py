"""Many short conversations -> one full row in which none sees another; no padding but within the attention."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

WIDTH = 16  # the attention's width is a multiple of this: few different shapes, which GPU kernels are built for


def pack(sequences: Sequence[Sequence[int]], device: torch.device | None = None) -> dict[str, Any]:
    """Model inputs for all sequences in one row: input_ids and position_ids, both [1, total length], and for the attention
    the grid (sequences, width) with each token's slot in it. The positions start again at 0 with every sequence."""
    width = -(-max(map(len, sequences)) // WIDTH) * WIDTH
    positions = [torch.arange(len(sequence)) for sequence in sequences]
    slots = torch.cat([row * width + position for row, position in enumerate(positions)])
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]], device=device),
        "position_ids": torch.cat(positions)[None].to(device),
        "grid": (len(sequences), width),
        "slots": slots.to(device),
    }


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, total length, head size]; key and value with fewer heads (grouped queries)
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    grid: tuple[int, int],
    slots: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence. For this step alone every sequence gets a line of its own, filled up on the
    right, where no token looks: the cost is the sum of their squared lengths, not the square of the sum."""
    dtype = value.dtype  # under autocast the rotary step leaves query and key in float32
    compute = torch.float32 if value.device.type == "cpu" else dtype  # on CPU bfloat16's backward pass is slow
    query, key, value = query.to(compute), key.to(compute), value.to(compute)
    lines = [
        tensor.new_zeros(grid[0] * grid[1], tensor.shape[1], tensor.shape[3])
        .index_copy(0, slots, tensor[0].transpose(0, 1))
        .unflatten(0, grid)
        .transpose(1, 2)  # [sequences, heads, width, head size]
        for tensor in (query, key, value)
    ]
    with torch.autocast(query.device.type, enabled=False):
        out = F.scaled_dot_product_attention(*lines, is_causal=True, scale=scaling, enable_gqa=True).to(dtype)
    return out.transpose(1, 2).flatten(0, 1)[slots][None], None


AttentionInterface.register("packed", attention)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel, name: str = "packed") -> Iterator[None]:
    """Within it the model takes what `pack` gives, or attends by another function of that name."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
