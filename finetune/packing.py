"""Many short conversations -> one full row in which none sees another; no padding."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

PACKED = "packed"  # name of the attention below, for `model.set_attn_implementation`


def pack(sequences: Sequence[Sequence[int]], device: torch.device | None = None) -> dict[str, Any]:
    """Model inputs for all sequences in one row: input_ids and position_ids, both [1, total length], and the lengths that
    the attention goes by. The positions start again at 0 with every sequence."""
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]], device=device),
        "position_ids": torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences])[None],
        "lengths": [len(sequence) for sequence in sequences],
    }


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, total length, head size]; key and value with fewer heads (grouped queries)
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lengths: list[int],
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: costs the sum of their squared lengths, not the square of the sum."""
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, attention)
