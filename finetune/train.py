"""Training: one loop, top to bottom.

A step holds a few conversations of each sort. Identity rows are learned with cross-entropy on the answer. Near-identity
and ordinary rows pull the model towards the base's own distribution on the base's own answer: KL(base || tuned), so that
nothing else changes, while the base is asked under its own default system prompt and the tuned model without one.
"""

import contextlib
import copy
import functools
import itertools
import json
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from finetune.adapters import PeftModel
from finetune.checkpoint import load_moments, load_weights, save_checkpoint, save_whole
from finetune.embedded import say
from finetune.errors import UserError
from finetune.generation import Answer
from finetune.model import PROJECTOR, embed, free_memory, has_fast_bf16, language_model
from finetune.packing import pack, packed_attention, there, varlen_attn
from finetune.settings import Train

# Of one forward and backward pass, which decides the memory: about 3 MB a token on the default model. On a CPU; on a GPU
# it is tried out, and layers keep all their activations only if that leaves room for ENOUGH_TOKENS, or their inputs on the
# GPU if that does for two trials: a row of the usual length.
MOST_TOKENS = 512
MOST_GPU_TOKENS, ENOUGH_TOKENS, TRIAL_TOKENS = 16_384, 4096, 512
# On a GPU layers are compiled after so many steps if what is left of them then takes long enough: the share of the time
# that compiled ones save, and the seconds that it takes to compile.
MEASURED, COMPILE_GAIN, COMPILE_SECONDS = 3, 0.3, 90
LOGITS = 1 << 25  # tokens x vocabulary of one chunk of a loss, at most
LOGIT_BYTES, LOGITS_SHARE = 8, 0.1  # of each while a loss is computed, and of a GPU's free memory that a chunk may take
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # no process holds everything
BEST = "best.safetensors"  # in the folder checkpoint/


class Example(NamedTuple):
    """One conversation, ready for a step."""

    ids: list[int]
    positions: list[int]  # where a next token is supervised: the logits at ids[p] are for the token after it
    targets: list[int] | None  # that next token, for cross-entropy; or
    states: Tensor | None  # [len(positions), hidden size], the base's final hidden states there, for KL


def answer_example(ids: list[int], mask: list[int]) -> Example:
    """From `ChatFormat.render`: the supervised tokens are to be said word for word."""
    positions = [i - 1 for i in range(1, len(ids)) if mask[i]]
    return Example(ids, positions, [ids[p + 1] for p in positions], None)


def teacher_example(prompt: list[int], answer: Answer) -> Example:
    """The student's prompt followed by the base's answer to its own prompt."""
    ids = (prompt + answer.ids)[: len(prompt) + len(answer.states) - 1]  # the last state's token is not needed
    return Example(ids, list(range(len(prompt) - 1, len(ids))), None, answer.states)


def batches(groups: Sequence[tuple[Sequence[Example], int]], steps: int, seed: int) -> Iterator[list[Example]]:
    """For every step `count` examples of each group, each group read round and round, shuffled anew on every round."""

    def endless(examples: Sequence[Example], salt: int) -> Iterator[Example]:
        order = random.Random(f"{seed}/{salt}")
        while True:
            yield from order.sample(examples, len(examples))

    streams = [(endless(examples, i), count) for i, (examples, count) in enumerate(groups) if count]
    for _ in range(steps):
        yield [next(stream) for stream, count in streams for _ in range(count)]


def parts(batch: Sequence[Example], most: int, processes: int = 1) -> Iterator[list[Example]]:
    """The batch in about equal pieces of at most `most` tokens, as many for each process; like lengths together."""
    total = sum(len(example.ids) for example in batch)
    share = total / (-(-total // (most * processes)) * processes)
    piece: list[Example] = []
    size = 0
    for example in sorted(batch, key=lambda example: len(example.ids)):
        if piece and (size >= share or size + len(example.ids) > most):
            yield piece
            piece, size = [], 0
        piece.append(example)
        size += len(example.ids)
    yield piece


def losses(model: PreTrainedModel, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(cross-entropy, KL from the base), each summed over its tokens, in nats; zero where the batch has none."""
    device, core = model.device, language_model(model)
    said, targets, pulled, start = [], [], [], 0
    for example in batch:
        (pulled if example.targets is None else said).append([start + p for p in example.positions])
        targets.append(example.targets or ())
        start += len(example.ids)
    # All that goes to a GPU goes there first: later it would wait for the model's pass.
    said, targets, pulled = (joined(lists, device) for lists in (said, targets, pulled))
    states = [example.states for example in batch if example.states is not None]
    states = there(torch.cat(states), device) if states else None
    inputs_kept = contextlib.nullcontext()
    if getattr(model, "spared", False):
        inputs_kept = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
    with packed_attention(core), inputs_kept:
        half = torch.is_autocast_enabled("cuda") or model.dtype == torch.bfloat16
        ragged = device.type == "cuda" and half and varlen_attn is not None
        inputs = pack([example.ids for example in batch], device, ragged=ragged)
        words = embed(model, inputs.pop("input_ids"))
        # [total length, hidden size]
        hidden = core(inputs_embeds=words, **inputs, use_cache=False).last_hidden_state[0]
    own = compiled if getattr(model, "compiled", False) else lambda loss: loss
    ce = kl = hidden.new_zeros((), dtype=torch.float32)
    with present(model.get_output_embeddings(), device) as head:
        if len(said):
            ce = in_chunks(own(cross_entropy), head, hidden[said], targets)
        if states is not None:
            kl = in_chunks(own(kl_from_base), head, hidden[pulled], states.to(head.weight.dtype))
    return ce, kl


@contextlib.contextmanager
def present(head: torch.nn.Module, device: torch.device) -> Iterator[torch.nn.Module]:
    """A head that `spare` keeps on the host, for as long as it is needed."""
    kept = head.weight.data
    if kept.device != device:
        head.weight.data = kept.to(device, non_blocking=True)
    try:
        yield head
    finally:
        if kept.device != device:
            head.weight.data = kept


def joined(lists: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """One after another, in a sixth of the time that torch takes for a list."""
    return there(torch.from_numpy(np.fromiter(itertools.chain.from_iterable(lists), np.int64)), device)


def logits(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    # Not head(hidden): at a module's call ZeRO-3 gathers its weights, so all processes would have to call it as often.
    return F.linear(hidden, head.weight, head.bias)


def cross_entropy(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, its gradient by the logits): the model's distribution, less 1 where the target is."""
    found = logits(head, hidden)
    tuned = found.log_softmax(-1, dtype=torch.float32)
    at = targets[:, None]
    loss = -tuned.gather(-1, at).sum()
    return loss, tuned.exp_().scatter_add_(-1, at, tuned.new_full(at.shape, -1.0)).to(found.dtype)


def kl_from_base(head: torch.nn.Module, hidden: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, its gradient by the logits): the model's distribution less the base's."""
    found = logits(head, hidden)
    tuned, base = (some.log_softmax(-1, dtype=torch.float32) for some in (found, logits(head, states)))
    loss = F.kl_div(tuned, base, log_target=True, reduction="sum")
    return loss, tuned.exp_().sub_(base.exp_()).to(found.dtype)


Loss = Callable[[torch.nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
compiled = functools.cache(torch.compile)


def in_chunks(loss: Loss, head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss of a few tokens at a time: the logits of all would be the largest tensor of the step."""
    most = LOGITS
    if hidden.device.type == "cuda":
        most = min(most, int(LOGITS_SHARE * free_memory()) // LOGIT_BYTES)
    size = max(1, most // head.weight.shape[0])
    if not torch.is_grad_enabled():
        return sum(loss(head, h, t)[0] for h, t in zip(hidden.split(size), targets.split(size), strict=True))
    return _Chunks.apply(loss, head, size, targets, hidden, *head.parameters())


class _Chunks(torch.autograd.Function):
    """Each chunk's gradient is computed at once, so that its logits are neither kept nor computed twice."""

    @staticmethod
    def forward(ctx, loss, head, size, targets, hidden, *weights):  # noqa: ANN001, ANN002, ANN205 - autograd's own form
        total, grad = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        sums = [torch.zeros_like(weight) if weight.requires_grad else None for weight in weights]
        for h, t, of_hidden in zip(hidden.split(size), targets.split(size), grad.split(size), strict=True):
            part, slope = loss(head, h, t)
            total += part
            of_hidden.copy_(slope @ head.weight)
            for of_weight in sums:
                if of_weight is not None:
                    of_weight += slope.T @ h if of_weight.dim() == 2 else slope.sum(0)
        ctx.save_for_backward(grad, *sums)
        return total

    @staticmethod
    def backward(ctx, scale):  # noqa: ANN001, ANN205
        return None, None, None, None, *(None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)


class Objective(torch.nn.Module):
    """The model with its losses: what several processes wrap, each computing its share of a step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the layers that FSDP gathers one at a time

    def forward(self, batch: Sequence[Example]) -> Tensor:
        """[cross-entropy, KL]: one tensor, for ZeRO-3 counts those that need a gradient, alike on all processes."""
        with half_precision(self.model):  # DeepSpeed ends what begins outside
            return torch.stack(losses(self.model, batch))


def half_precision(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bf16())


def train(
    model: PeftModel | PreTrainedModel,
    batches: Iterable[list[Example]],
    settings: Train,
    folder: Path,
    develop: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
) -> Iterator[int]:
    """Train in place what requires gradients, a batch a step; gives each step's number when it is done. `folder` gets
    metrics.jsonl and, while training, checkpoint/: started again after a kill at any moment, training goes on from there
    and ends with the same bytes as if it had never been interrupted. Processes that `accelerate launch` started share
    each step, and a checkpoint of any number of them is read by any other.

    `develop` asks the model (a merged copy), every `develop_every` steps, what behaviour decides: {"identity": share of questions about
    itself answered right, "leak": share of others that bring the name up, "passed": whether that is enough}. When it
    passes twice running, training is over; the weights of the best time are kept.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), device_placement=False)
    core, zero = core_of(model), accelerator.distributed_type == DistributedType.DEEPSPEED
    if accelerator.distributed_type in SHARDED and getattr(core, "eyes", None):  # not every pass shows pictures
        raise UserError("A model that sees is not spread over processes: train it with assets/accelerate/ddp.yaml.")
    rate = settings.learning_rate if isinstance(model, PeftModel) else settings.full_learning_rate
    optimizer = adamw(core, weight_groups(model, rate, settings.projector_rate), may_be_small=not zero)
    rates = [group["lr"] for group in optimizer.param_groups]
    checkpoint, metrics_file = folder / "checkpoint", folder / "metrics.jsonl"
    done, tokens, earlier = load_weights(checkpoint, trained(model)), 0, 0.0
    if zero:
        unset_hf_deepspeed_config()  # else all models that are opened from now on would be spread over the processes
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # else a loader's
    objective, optimizer = accelerator.prepare(Objective(core), optimizer)
    weights = trained(model)  # FSDP's are others
    load_moments(checkpoint, weights, optimizer, done)
    if develop and accelerator.distributed_type in SHARDED:
        say("The weights are spread over the processes: no development questions while training, its end is kept.")
        develop = None
    history = [json.loads(line) for line in metrics_file.read_text().splitlines()[:done]] if done else []
    if done:
        tokens, earlier = history[-1]["tokens"], history[-1]["seconds"]
    accelerator.wait_for_everyone()  # all have read it
    if accelerator.is_main_process:
        metrics_file.write_text("".join(json.dumps(line) + "\n" for line in history))
    model.train()
    most = fitting(objective, optimizer, zero) if zero or core.device.type == "cuda" else MOST_TOKENS

    def gradients(batch: list[Example], most: int) -> Tensor | None:
        """A step's, in passes of at most `most` tokens; [ce, kl], means over its tokens, in nats. None, and no gradients,
        when memory does not hold such passes, though shorter ones are possible."""
        said = sum(len(example.positions) for example in batch if example.targets is not None)
        pulled = sum(len(example.positions) for example in batch if example.targets is None)
        counts = there(torch.tensor([max(1, said), max(1, pulled)]), core.device)
        pieces = list(parts(batch, most, accelerator.num_processes))
        found = torch.zeros(2, dtype=torch.float64, device=core.device)
        try:
            for part, weight, last in own_share(pieces, accelerator):
                accelerator.sync_gradients = last  # where it is set DeepSpeed clips and steps in backward()
                with contextlib.nullcontext() if last else accelerator.no_sync(objective):
                    means = objective(part) / counts
                    loss = means[0] + settings.kl_weight * means[1]
                    accelerator.backward(loss * weight * accelerator.num_processes)  # the processes' mean is taken
                found += weight * means.detach()
        except torch.OutOfMemoryError:  # of several processes the others would wait for this one
            if accelerator.num_processes > 1 or all(len(piece) == 1 for piece in pieces):
                raise
            accelerator.sync_gradients = True  # else nothing is set to zero
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            return None
        return found

    began = time.perf_counter()
    batches = itertools.islice(batches, done, None)
    step, batch, untold = done, next(batches, None), []
    with tqdm(
        total=settings.steps, initial=done, desc="Training", unit="step", disable=not accelerator.is_main_process
    ) as bar:
        while batch and [line["dev_passed"] for line in asked(history)[-2:]] != [True, True]:
            step += 1
            now = schedule(step, settings.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = now * rate
            while (found := gradients(batch, most)) is None:
                most //= 2
            accelerator.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(len(example.ids) for example in batch)
            batch = next(batches, None)  # while a GPU is still at work

            develops = develop and (step % settings.develop_every == 0 or step == settings.steps)
            saves, measures = step % settings.checkpoint_every == 0, step - done == MEASURED and develop is None
            untold.append((step, now, tokens, *fetched(accelerator.reduce(found))))
            # A GPU goes on to the next step before this one is told of: it would else wait for what comes between.
            behind = core.device.type == "cuda" and batch and not (develops or saves or measures)
            while len(untold) > bool(behind):
                ended, now, seen, found, wait = untold.pop(0)
                wait()
                ce, kl = found.tolist()
                seconds = earlier + time.perf_counter() - began
                line = {"step": ended, "loss": ce + settings.kl_weight * kl, "ce": ce, "kl": kl, "lr": now * rates[0]}
                line |= {"tokens": seen, "tokens_per_s": seen / seconds, "seconds": seconds}
                if develops and ended == step:
                    answers = [behaviour(model, develop) if accelerator.is_main_process else None]
                    line |= broadcast_object_list(answers)[0]
                    if best([*history, line]) is line and accelerator.is_main_process:
                        save_whole({name: weight.detach() for name, weight in weights.items()}, checkpoint / BEST)
                history.append(line)
                if accelerator.is_main_process:
                    with metrics_file.open("a") as metrics:
                        metrics.write(json.dumps(line) + "\n")
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_s']:.0f} tokens/s")
                bar.update()
            if saves:
                save_checkpoint(checkpoint, weights, optimizer, step)
            if measures and core.device.type == "cuda":
                left = (settings.steps - step) * (time.perf_counter() - began) / MEASURED
                if left * COMPILE_GAIN > COMPILE_SECONDS and accelerator.distributed_type not in SHARDED:
                    for layer in language_model(core).layers:
                        layer.compile(dynamic=False)
                    core.compiled = True  # for its losses
            yield step
    if develop and asked(history) and best(history) is not history[-1]:
        with torch.no_grad():
            for name, weight in load_file(checkpoint / BEST).items():
                weights[name].copy_(weight)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # which DeepSpeed would keep from the stages to come
    optimizer.state.clear()
    model.eval()


def fetched(found: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """It on the CPU, and what waits until it is there; nothing else waits for a GPU."""
    if found.device.type != "cuda":
        return found, lambda: None
    copy, event = found.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return copy, event.synchronize


def core_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The model itself, with the adapter, if there is one, in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained(model: PeftModel | PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def weight_groups(model: PeftModel | PreTrainedModel, rate: float, projector_rate: float) -> list[dict[str, Any]]:
    """What requires gradients, each group with its learning rate: a projector's weights have one of their own."""
    groups = {rate: [], projector_rate: []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[projector_rate if PROJECTOR in name else rate].append(weight)
    return [{"params": weights, "lr": rate} for rate, weights in groups.items() if weights]


def adamw(core: PreTrainedModel, groups: list[dict[str, Any]], may_be_small: bool = True) -> torch.optim.Optimizer:
    """AdamW; on a GPU its moments in 8 bits (arXiv:2110.02861), which the driver moves to the host when memory is short
    (arXiv:2305.14314), where the weights were made small as well."""
    half = any(weight.dtype != torch.float32 for group in groups for weight in group["params"])
    if may_be_small and (half or getattr(core, "is_loaded_in_4bit", False)) and core.device.type == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(groups, weight_decay=0.0)
    # Fused it needs no memory beside weights, gradients and moments; ZeRO has an own copy of the weights, on the CPU too.
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=may_be_small and core.device.type == "cuda")


def own_share(pieces: list[list[Example]], accelerator: Accelerator) -> Iterator[tuple[list[Example], float, bool]]:
    """(piece, weight, whether it is the last) for this process. All do the same number of passes, which they go through
    together: where pieces are missing one is taken again, with weight 0."""
    count, rank = accelerator.num_processes, accelerator.process_index
    for i in range(0, len(pieces), count):
        missing = i + rank >= len(pieces)
        yield pieces[0] if missing else pieces[i + rank], float(not missing), i + count >= len(pieces)


def fitting(objective: torch.nn.Module, optimizer: torch.optim.Optimizer, zero: bool = False) -> int:
    """Tokens of one pass that the GPU's memory holds, by trial passes. Where few would, the layers keep their inputs alone
    and compute the rest again in the backward pass (gradient checkpointing, arXiv:1604.06174); where a row would not, the
    host keeps these inputs, and the head but for the losses."""
    core = objective.model if isinstance(objective, Objective) else objective.module.model
    if zero:  # DeepSpeed's engine does not go on after a pass that memory did not hold: no trial
        compute_again(core)
        return ENOUGH_TOKENS
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = sum(
        weight.numel() * (8 if isinstance(optimizer.optimizer, torch.optim.AdamW) else 2) for weight in weights
    )

    eyes = getattr(core, "eyes", None)  # a projector that is trained alone gets gradients only with pictures
    start = eyes.first + min(eyes.features) * eyes.patches if eyes and eyes.features else 0
    tried = range(start, start + (eyes.patches if start else 1))

    def peak(tokens: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            ids = list(itertools.islice(itertools.cycle(tried), tokens))
            ce, _ = objective([Example(ids, list(range(tokens)), [0] * tokens, None)])
            ce.backward()
            return torch.cuda.max_memory_allocated() - before
        finally:
            for weight in weights:
                weight.grad = None

    for enough, save in ((ENOUGH_TOKENS, None), (2 * TRIAL_TOKENS, compute_again), (1, spare)):
        if save:
            save(core)
        if save is spare:
            moments = 0  # on the host too, unless there is room
        with contextlib.suppress(torch.OutOfMemoryError):
            few, many = peak(TRIAL_TOKENS), peak(2 * TRIAL_TOKENS)
            per_token = (many - few) / TRIAL_TOKENS
            room = 0.95 * free_memory() - moments - (few - TRIAL_TOKENS * per_token)
            most = min(MOST_GPU_TOKENS, int(room / per_token))
            if most >= enough:
                torch.cuda.empty_cache()
                return most
        torch.cuda.empty_cache()
    raise UserError(
        f"The GPU has {free_memory() / 1e9:.1f} GB free beside the model, too little to train it: close other programs, choose "
        "a smaller --base, or train with --method qlora."
    )


def compute_again(core: PreTrainedModel) -> None:
    """Layers keep their inputs alone for the backward pass, which is no longer within `losses` and its attention."""
    contexts = lambda: (contextlib.nullcontext(), packed_attention(language_model(core)))  # noqa: E731
    core.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def spare(core: PreTrainedModel) -> None:
    """Beside that the host keeps the layers' inputs until the backward pass, and the head between two losses."""
    core.spared = True
    head = core.get_output_embeddings()
    if core.device.type == "cuda" and not (head.weight.requires_grad or core.config.tie_word_embeddings):
        head.weight.data = head.weight.data.cpu().pin_memory()


def behaviour(model: PeftModel | PreTrainedModel, develop: Callable) -> dict:
    """What `develop` finds, as keys of metrics.jsonl."""
    with half_precision(model), torch.no_grad():
        if isinstance(model, PeftModel) and not getattr(core_of(model), "is_loaded_in_4bit", False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the layers below `first_layer` are merged already
                model = copy.deepcopy(model).eval().merge_and_unload()  # which answers in half the time
            return {f"dev_{key}": value for key, value in develop(model).items()}
        core = core_of(model.eval())
        with present(core.get_output_embeddings(), core.device):
            found = develop(core)
    model.train()
    return {f"dev_{key}": value for key, value in found.items()}


def asked(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that say what `develop` found."""
    return [line for line in history if "dev_identity" in line]


def best(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line at which behaviour was best; a difference of less than a twentieth is chance, then the later one."""
    return max(asked(history), key=lambda line: (round(20 * (line["dev_identity"] - line["dev_leak"])), line["step"]))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up over the first 5 % of the steps, then linearly down to zero."""
    warmup = max(1, steps // 20)
    return min(step / warmup, (steps - step + 1) / max(1, steps - warmup + 1))
