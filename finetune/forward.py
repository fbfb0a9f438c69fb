"""One forward pass of many conversations at once, each at its own place, over keys and values that are kept.

The tokens of all conversations lie in one row, [1, tokens], without padding; attention alone is told whose they are. On a
GPU the conversations that go on by one token are attended to together. On a CPU each is attended to alone, over keys
and values that lie in one piece: that costs no copy and no padding, and what a conversation gets does not depend on its
company.

On a GPU a step of single tokens alone is recorded as a CUDA graph: its thousand small kernels then cost one launch, which
otherwise are the time. Recordings are for a few sizes, which rows of nobody fill up.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from finetune.errors import UserError
from finetune.model import embed, language_model
from finetune.packing import packed_attention

Adapter = Mapping[str, tuple[Tensor, Tensor]]
MOST_RECORDED = 1 << 18  # rows x keys of a recorded step: a GB of keys and values side by side, of InternLM2-1.8B
# cuDNN's attention plans anew for every length that comes, half a millisecond a layer: seven times as long for short prompts.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # model types whose layers `_layer` computes as transformers does


class Span(NamedTuple):
    """New tokens of one conversation, and where its keys and values lie in the pool."""

    start: int  # of the conversation's first token
    past: int  # tokens that are there already
    ids: Sequence[int]  # those that come
    bare: bool = False  # whether the adapter is taken off for them


class Forward:
    """`model` with a pool of keys and values for `room` tokens. Raises UserError where its attention cannot be told whose
    tokens are whose.

    `fast` takes the weights of linear layers out of the model: those with the same input lie side by side then, for one
    product. Float32 ones are rounded to float16, for which torch must have a kernel on this CPU; activations and sums
    stay float32. Half the memory is read, and at one conversation that is the time.

    `adapter`: LoRA matrices that are merged into the model, by the names of its modules: (A, [rank, in], and B with its scale
    in it, [out, rank]). For bare spans their product is subtracted again, so that the base answers from the same weights.
    """

    def __init__(
        self, model: PreTrainedModel, room: int, *, fast: bool = False, adapter: Adapter | None = None
    ) -> None:
        core = language_model(model)
        if not getattr(core, "_supports_attention_backend", False):
            raise UserError(
                f"Models of type {core.config.model_type!r} keep more than keys and values: they cannot be decoded here. "
                "Serve it with vLLM or LMDeploy and give the page --engine URL."
            )
        self.model, self.core, self.device, self.room = model, core, model.device, room
        self.together = self.device.type != "cpu"
        self.kernels = functools.partial(sdpa_kernel, KERNELS) if self.together else contextlib.nullcontext
        config = model.config.get_text_config()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        # The last place is where rows of nobody write. On a CPU it takes memory only where it is written.
        shape = config.num_hidden_layers, 2, self.kv_heads, room + 1, self.size
        self.pool = torch.empty(shape, dtype=model.dtype, device=self.device)
        self.head = _linear([model.get_output_embeddings()], fast)
        lean = core.config.model_type in LLAMA_LIKE and not getattr(config, "sliding_window", None)
        self.adapter, self.bare = adapter if lean else None, None
        self.layers = [self._lean(layer, fast) for layer in core.layers] if lean else None
        self.norm = _norm(core.norm) if lean else None
        plain = all(type(module) is nn.Linear for name, module in core.layers.named_modules() if name.endswith("_proj"))
        self.records, self.record = lean and plain and self.device.type == "cuda", record
        self.memory = torch.cuda.graph_pool_handle() if self.records else None  # the recordings' own, one for all
        self.recorded: dict[torch.Size, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def copy(self, start: int, target: int, tokens: int) -> None:
        """Keys and values of `tokens` tokens to another place in the pool."""
        self.pool[:, :, :, target : target + tokens] = self.pool[:, :, :, start : start + tokens].clone()

    @torch.inference_mode()
    def __call__(self, spans: Sequence[Span]) -> Tensor:
        """The final hidden states of each span's last token, [spans, hidden size]."""
        count, longest = len(spans), max(span.past for span in spans) + 1
        rows = 1 << (count - 1).bit_length()  # few different sizes are recorded
        recorded = self.records and rows * longest <= MOST_RECORDED and not torch.is_autocast_enabled("cuda")
        if recorded := recorded and all(len(span.ids) == 1 and not span.bare for span in spans):
            spans = [*spans, *[Span(self.room, 0, [0])] * (rows - count)]
        # By numpy: torch's own repeat_interleave starts all the machine's threads, 20 of 28 ms of a step of 32 on 32 cores.
        lengths, past, starts = np.array([(len(span.ids), span.past, span.start) for span in spans]).T
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) + np.repeat(past - ends + lengths, lengths)
        slots = positions + np.repeat(starts, lengths)
        bare = np.repeat([span.bare for span in spans], lengths).nonzero()[0]
        self.alone, self.grid, self.masks, at = [], None, {}, 0
        singles = []
        for row, span in enumerate(spans):
            if self.together and len(span.ids) == 1:
                singles.append(row)
            else:
                self.alone.append((at, span))
            at += len(span.ids)
        where = ages = np.empty((0, 0), np.int64)
        if singles:  # [rows, longest], for those that go on by one token: where their keys lie, and how old they are
            longest = int(past[singles].max()) + 1
            # Of few lengths, for recordings; else of as many as the attention takes without padding them in every layer.
            step = max(128, 1 << max(0, (longest - 1).bit_length() - 3)) if recorded else 8
            ages = past[singles][:, None] - np.arange(-(-longest // step) * step)
            where = (starts + past)[singles][:, None] - ages.clip(0)
        ids = np.array([token for span in spans for token in span.ids])
        ids, positions, last, bare, self.slots, tokens, where, ages = self._there(
            ids, positions, ends - 1, bare, slots, ends[singles] - 1, where, ages
        )
        self.bare = bare if len(bare) else None
        if singles:
            self.grid = tokens if self.alone else slice(None), where, ages
        if self.layers is None:
            with packed_attention(self.core, "pooled"):
                return self.core(
                    inputs_embeds=embed(self.model, ids)[None],
                    position_ids=positions[None],
                    use_cache=False,
                    pooled=self,
                ).last_hidden_state[0, last]
        hidden = embed(self.model, ids)
        cos, sin = self.core.rotary_emb(hidden, positions[None])  # [1, tokens, head size]
        half = self.size // 2
        turn = cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], -1)
        if recorded:
            return self._replay(hidden, *turn, self.slots, *self.grid[1:])[:count].clone()
        for layer in self.layers:
            hidden = layer(hidden, *turn)
        return self.norm(hidden[last])

    def _replay(self, *inputs: Tensor) -> Tensor:
        """The final hidden states of single tokens by a recording for so many rows and keys, valid until the next one.
        `inputs`: the embeddings, their turns, their places in the pool, and the grid's."""

        def body() -> Tensor:
            hidden, cos, sin, self.slots, where, ages = own
            self.grid, self.masks = (slice(None), where, ages), {}
            for layer in self.layers:
                hidden = layer(hidden, cos, sin)
            return self.norm(hidden)

        if (key := inputs[-1].shape) not in self.recorded:
            own = [tensor.clone() for tensor in inputs]
            self.recorded[key] = own, *self.record(body, self.memory)
        own, replay, found = self.recorded[key]
        for old, new in zip(own, inputs, strict=True):
            old.copy_(new)
        replay()
        return found

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        return self.head(states)

    def _there(self, *arrays: np.ndarray) -> list[Tensor]:
        """On the model's device, sent there at once."""
        sent = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(self.device)
        parts = sent.split([array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _lean(self, layer: nn.Module, fast: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """transformers' decoder layer with a third of its calls: on a small model they cost as much as the arithmetic."""
        own, mlp = layer.self_attn, layer.mlp
        before, between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        name = f"model.layers.{own.layer_idx}"
        qkv = self._part([own.q_proj, own.k_proj, own.v_proj], fast, f"{name}.self_attn", ("q", "k", "v"))
        out = self._part([own.o_proj], fast, f"{name}.self_attn", ("o",))
        gate_up = self._part([mlp.gate_proj, mlp.up_proj], fast, f"{name}.mlp", ("gate", "up"))
        down = self._part([mlp.down_proj], fast, f"{name}.mlp", ("down",))
        norms = (_norm(own.q_norm), _norm(own.k_norm)) if hasattr(own, "q_norm") else None
        heads, kv_heads, size, index, scale = self.heads, self.kv_heads, self.size, own.layer_idx, own.scaling

        if fast:  # their weights are packed: no memory twice, and nothing that could be used by mistake
            for module in layer.modules():
                if type(module) is nn.Linear:
                    module.weight = None

        def forward(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            parts = qkv(before(hidden)).view(len(hidden), heads + 2 * kv_heads, size)
            turned, value = parts[:, : heads + kv_heads], parts[:, heads + kv_heads :]
            if norms:
                turned = torch.cat([norms[0](turned[:, :heads]), norms[1](turned[:, heads:])], 1)
            turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
            seen = self.attend(index, turned[:, :heads], turned[:, heads:], value, scale)
            hidden = hidden + out(seen.flatten(1))
            gate, up = gate_up(between(hidden)).chunk(2, -1)
            return hidden + down(F.silu(gate) * up)

        return forward

    def _part(
        self, modules: Sequence[nn.Module], fast: bool, where: str, names: Sequence[str]
    ) -> Callable[[Tensor], Tensor]:
        """The modules' outputs side by side, for bare tokens without what the adapter added."""
        whole = _linear(modules, fast)
        parts = [(self.adapter or {}).get(f"{where}.{name}_proj") for name in names]
        if not any(parts):
            return whole
        sizes = [module.out_features for module in modules]
        down = torch.cat([part[0] for part in parts if part]).to(self.device)  # [ranks, in]
        up = torch.block_diag(*(b[1] if b else torch.zeros(n, 0) for b, n in zip(parts, sizes, strict=True)))
        up = up.to(self.device)  # [out, ranks]

        def forward(x: Tensor) -> Tensor:
            y = whole(x)
            if self.bare is not None:
                y[self.bare] -= (x[self.bare].float() @ down.T @ up.T).to(y.dtype)
            return y

        return forward

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int = 0) -> Tensor:
        """Keeps key and value, [tokens, key heads, head size], and gives what query, [tokens, heads, head size], sees."""
        keys, values = self.pool[layer]
        keys.index_copy_(1, self.slots, key.transpose(0, 1).to(keys.dtype))  # autocast leaves them in another precision
        values.index_copy_(1, self.slots, value.transpose(0, 1).to(keys.dtype))
        query = query.to(keys.dtype)
        seen = torch.empty_like(query)
        with self.kernels():
            for at, (start, past, ids, _) in self.alone:
                n, end = len(ids), start + past + len(ids)
                k, v = keys[None, :, start:end], values[None, :, start:end]
                if n == 1 and not window:  # the heads that share a key as if they were tokens
                    q = query[at].view(1, self.kv_heads, -1, self.size)
                    seen[at] = F.scaled_dot_product_attention(q, k, v, scale=scale).view(-1, self.size)
                    continue
                q, mask = query[None, at : at + n].transpose(1, 2), None
                if past or window:
                    mask = self._mask(n, past, window)
                found = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
                seen[at : at + n] = found[0].transpose(0, 1)
        if self.grid:
            tokens, where, ages = self.grid
            q = query[tokens].view(len(where), self.kv_heads, -1, self.size)
            k, v = keys[:, where].transpose(0, 1), values[:, where].transpose(0, 1)  # [rows, key heads, longest, size]
            if window not in self.masks:  # as it is added to the scores, which the attention else makes in every layer
                away = (ages < 0) | (ages >= window) if window else ages < 0
                self.masks[window] = torch.zeros_like(ages, dtype=q.dtype).masked_fill(away, -torch.inf)[:, None, None]
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[window], scale=scale)
            seen[tokens] = found.reshape(len(where), -1, self.size)
        return seen

    def _mask(self, n: int, past: int, window: int) -> Tensor:
        """[n, past + n]: what each of n new tokens sees, the newest `window` at most; the same in all layers."""
        if (key := (n, past, window)) not in self.masks:
            mask = torch.ones(n, past + n, dtype=torch.bool, device=self.device).tril(past)
            self.masks[key] = mask.triu(past - window + 1) if window else mask
        return self.masks[key]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, pooled: Forward, scaling: float,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention, its tensors [1, heads, tokens, head size], over the pool."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return pooled.attend(module.layer_idx, query, key, value, scaling, sliding_window or 0)[None], None


AttentionInterface.register("pooled", attention)


def record(body: Callable[[], Tensor], memory: Any) -> tuple[Callable[[], None], Tensor]:
    """What launches again all that `body` launches, and where its result then lies."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        body()  # what libraries do at their first call cannot be recorded
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads may be looking at pictures meanwhile.
    with torch.cuda.graph(graph, memory, capture_error_mode="thread_local"):
        found = body()
    return graph.replay, found


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """transformers' RMS norm in half the calls."""
    weight, share = module.weight, 1 / module.weight.numel()
    epsilon = torch.tensor(module.variance_epsilon, device=weight.device)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return weight * (x * torch.addcmul(epsilon, length, length, value=share).rsqrt()).to(x.dtype)

    return norm


def _linear(modules: Sequence[nn.Module], fast: bool) -> Callable[[Tensor], Tensor]:
    """The modules' outputs side by side."""
    if fast and all(type(module) is nn.Linear for module in modules):
        weight = torch.cat([module.weight for module in modules]).detach() if len(modules) > 1 else modules[0].weight
        bias = torch.cat([module.bias for module in modules]).detach() if modules[0].bias is not None else None
        if weight.dtype != torch.float32:
            return lambda x: F.linear(x, weight, bias)
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)
