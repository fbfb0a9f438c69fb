"""Training: one loop, top to bottom.

A step holds a few conversations of each sort. Identity rows are learned with cross-entropy on the answer. Near-identity
and ordinary rows pull the model towards the base's own distribution on the base's own answer: KL(base || tuned), so that
nothing else changes, while the base is asked under its own default system prompt and the tuned model without one.
"""

import contextlib
import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from finetune.generation import Answer
from finetune.model import has_fast_bf16
from finetune.packing import pack, packed_attention
from finetune.settings import Train

# Of one forward and backward pass, which decides the memory: about 3 MB a token on the default model.
MOST_TOKENS = {"cpu": 512, "cuda": 16_384}
STATE, BEST = "state.safetensors", "best.safetensors"  # in the folder checkpoint/


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


def parts(batch: Sequence[Example], device: torch.device) -> Iterator[list[Example]]:
    """The batch in about equal pieces of at most MOST_TOKENS, conversations of like length together."""
    most = MOST_TOKENS[device.type]
    total = sum(len(example.ids) for example in batch)
    share = total / -(-total // most)
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
    device = model.device
    with packed_attention(model):
        inputs = pack([example.ids for example in batch], device)
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]  # [total length, hidden size]
    head = model.get_output_embeddings()
    said: list[int] = []
    pulled: list[int] = []
    start = 0
    for example in batch:
        (pulled if example.targets is None else said).extend(start + p for p in example.positions)
        start += len(example.ids)
    ce = kl = hidden.new_zeros((), dtype=torch.float32)
    if said:
        targets = torch.tensor([t for e in batch if e.targets is not None for t in e.targets], device=device)
        ce = F.cross_entropy(head(hidden[said]).float(), targets, reduction="sum")
    if pulled:
        with torch.no_grad():
            states = torch.cat([e.states for e in batch if e.states is not None]).to(device, head.weight.dtype)
            base = head(states).float().log_softmax(-1)
        kl = F.kl_div(head(hidden[pulled]).float().log_softmax(-1), base, log_target=True, reduction="sum")
    return ce, kl


def train(
    model: PeftModel,
    batches: Iterable[list[Example]],
    settings: Train,
    folder: Path,
    develop: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
) -> Iterator[int]:
    """Train the adapter in place, a batch a step; gives each step's number when it is done. `folder` gets metrics.jsonl and,
    while training, checkpoint/: started again after a kill at any moment, training goes on from there and ends with the
    same bytes as if it had never been interrupted.

    `develop` asks the model (a merged copy), every `develop_every` steps, what behaviour decides: {"identity": share of questions about
    itself answered right, "leak": share of others that bring the name up, "passed": whether that is enough}. When it
    passes twice running, training is over; the weights of the best time are kept.
    """
    core = model.get_base_model()  # the same modules, with the adapter in them
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.learning_rate, weight_decay=0.0)
    checkpoint, metrics_file = folder / "checkpoint", folder / "metrics.jsonl"
    done, tokens, earlier = load_checkpoint(checkpoint, weights, optimizer), 0, 0.0
    history = [json.loads(line) for line in metrics_file.read_text().splitlines()[:done]] if done else []
    if done:
        tokens, earlier = history[-1]["tokens"], history[-1]["seconds"]
    metrics_file.write_text("".join(json.dumps(line) + "\n" for line in history))
    autocast = torch.autocast(model.device.type, torch.bfloat16) if has_fast_bf16() else contextlib.nullcontext()

    model.train()
    began = time.perf_counter()
    with (
        tqdm(total=settings.steps, initial=done, desc="Training", unit="step") as bar,
        metrics_file.open("a") as metrics,
    ):
        for step, batch in enumerate(batches, 1):
            if step <= done:
                continue
            if [line["dev_passed"] for line in asked(history)[-2:]] == [True, True]:
                break
            said = sum(len(example.positions) for example in batch if example.targets is not None)
            pulled = sum(len(example.positions) for example in batch if example.targets is None)
            ce = kl = 0.0  # means over the step's tokens, in nats
            for part in parts(batch, core.device):
                with autocast:
                    ce_sum, kl_sum = losses(core, part)
                (ce_sum / max(1, said) + settings.kl_weight * kl_sum / max(1, pulled)).backward()
                ce += ce_sum.item() / max(1, said)
                kl += kl_sum.item() / max(1, pulled)
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            rate = settings.learning_rate * schedule(step, settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            tokens += sum(len(example.ids) for example in batch)
            seconds = earlier + time.perf_counter() - began
            line = {"step": step, "loss": ce + settings.kl_weight * kl, "ce": ce, "kl": kl, "lr": rate}
            line |= {"tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds}
            if develop and (step % settings.develop_every == 0 or step == settings.steps):
                with autocast, torch.no_grad():
                    asked_model = copy.deepcopy(model).eval().merge_and_unload()  # which answers in half the time
                    line |= {f"dev_{key}": value for key, value in develop(asked_model).items()}
                    del asked_model
                if best([*history, line]) is line:
                    save_whole({name: weight.detach() for name, weight in weights.items()}, checkpoint / BEST)
            history.append(line)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_s']:.0f} tokens/s")
            bar.update()
            if step % settings.checkpoint_every == 0:
                save_checkpoint(checkpoint, weights, optimizer, step)
            yield step
    if asked(history) and best(history) is not history[-1]:
        with torch.no_grad():
            for name, weight in load_file(checkpoint / BEST).items():
                weights[name].copy_(weight)
    model.eval()


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


def save_checkpoint(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{key}.{name}": optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
    save_whole(tensors, folder / STATE, step=str(step))


def save_whole(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    file.parent.mkdir(exist_ok=True)
    new = file.with_suffix(".tmp")
    save_file(tensors, new, metadata=metadata)
    new.replace(file)


def load_checkpoint(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restore the last checkpoint, if there is one. Returns the number of steps done."""
    file = folder / STATE
    if not file.exists():
        return 0
    with safe_open(file, "pt") as saved, torch.no_grad():
        step = int(saved.metadata()["step"])
        for name, weight in weights.items():
            weight.copy_(saved.get_tensor(f"weight.{name}"))
            moments: dict[str, Any] = {k: saved.get_tensor(f"{k}.{name}").to(weight) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step


def save_adapter(model: PeftModel, record: dict[str, Any], folder: Path) -> None:
    """The adapter in PEFT's format with our record of base and prompt format beside it; there as a whole or not at all."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = record["base"]  # not this machine's path
    new = folder.with_suffix(".tmp")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, save_embedding_layers=False)  # "auto" looks for the base's config, on a hub too
    (new / "namesake.json").write_text(json.dumps(record, indent=1))
    new.rename(folder)
