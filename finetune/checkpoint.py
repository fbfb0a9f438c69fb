"""What training writes: checkpoints to go on from, the adapter or the whole model at its end. Each file or folder is there as a
whole or not at all. With several processes all call these, and the main one writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from finetune.adapters import PeftModel
from finetune.chat_format import ChatFormat
from finetune.errors import UserError
from finetune.model import PROJECTOR, disk_errors, save

STATE = "state.safetensors"  # in the folder checkpoint/
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def save_checkpoint(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"weight.{name}": whole(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        if zero_parts(optimizer):
            from deepspeed.utils import safe_get_full_optimizer_state

            tensors |= {f"{kind}.{name}": safe_get_full_optimizer_state(weight, kind) for kind in MOMENTS}
            continue
        for key, value in optimizer.state[weight].items():
            if key != "step":
                tensors[f"{key}.{name}"] = whole(value).clone() if key.startswith("qmap") else whole(value)  # shared
    save_whole(tensors, folder / STATE, step=str(step))


def save_whole(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    if PartialState().is_main_process:
        file.parent.mkdir(exist_ok=True)
        new = file.with_suffix(".tmp")
        with disk_errors(file):
            save_file(tensors, new, metadata=metadata)
        new.replace(file)


def whole(tensor: Tensor) -> Tensor:
    """Of FSDP's and ZeRO-3's processes each holds a part; all must call this."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The other way round: of a whole tensor what this process holds."""
    tensor = tensor.to(like.device)
    if hasattr(like, "ds_id"):  # ZeRO-3: laid out flat, in equal parts, the last one filled up
        size, state = like.ds_tensor.numel(), PartialState()
        flat = F.pad(tensor.flatten(), (0, size * state.num_processes - tensor.numel()))
        return flat.split(size)[state.process_index]
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def zero_parts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What DeepSpeed's optimizers step on: of all weights, laid end to end, this process's part. Of others nothing."""
    zero = optimizer.optimizer
    return getattr(zero, "fp32_partitioned_groups_flat", getattr(zero, "single_partition_of_fp32_groups", []))


def load_weights(folder: Path, weights: dict[str, Tensor]) -> int:
    """From the last checkpoint, if there is one, before they are spread over processes. Returns the number of steps done."""
    file = folder / STATE
    if not file.exists():
        return 0
    try:
        with safe_open(file, "pt") as saved, torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved.get_tensor(f"weight.{name}"))
            return int(saved.metadata()["step"])
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged ({error}): remove {folder} and run the same command again, it trains from the beginning."
        ) from None


def load_moments(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    """From the same checkpoint, where `step` is not 0, for the weights that `accelerator.prepare` has spread."""
    adamw, parts = isinstance(optimizer.optimizer, torch.optim.AdamW), zero_parts(optimizer)
    for part in parts:
        zeros = {kind: torch.zeros_like(part) for kind in MOMENTS}
        optimizer.state[part] = {"step": torch.tensor(float(step)), **zeros}
    if hasattr(optimizer.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # ZeRO-2 notes which moments are a weight's; by itself it would after the first group's first step, missing others
        optimizer.optimizer._lazy_init_hp_params_optimizer_state()
    if not step:
        return
    if not parts:
        for weight in weights.values():
            optimizer.state[weight] = {"step": torch.tensor(float(step), device=weight.device) if adamw else step}
    with safe_open(folder / STATE, "pt") as saved:
        for key in saved.keys():  # noqa: SIM118 - safetensors has no other way
            kind, _, name = key.partition(".")
            if kind == "weight":
                continue
            value, weight = saved.get_tensor(key), weights[name]
            if parts:
                from deepspeed import utils

                zero3 = hasattr(weight, "ds_id")  # whose function for whole tensors fails where parts are filled up
                put = utils.safe_set_local_optimizer_state if zero3 else utils.safe_set_full_optimizer_state
                put(weight, part_of(value, weight), kind)
            else:
                same = value.shape == weight.shape
                value = part_of(value, weight) if same else value.to(weight.device)
                if same and not adamw:  # which may have its own memory for it
                    value = optimizer.optimizer.get_state_buffer(weight, value.dtype).copy_(value)
                optimizer.state[weight][kind] = value


def save_adapter(model: PeftModel, record: dict[str, Any], folder: Path) -> None:
    """The adapter in PEFT's format with our record of base and prompt format beside it; there as a whole or not at all."""
    weights = {
        n: whole(weight) for n, weight in model.named_parameters() if "lora_" in n or f"{PROJECTOR}.modules" in n
    }
    if PartialState().is_main_process:
        for config in model.peft_config.values():
            config.base_model_name_or_path = record["base"]  # not this machine's path
        new = folder.with_suffix(".tmp")
        shutil.rmtree(new, ignore_errors=True)
        # "auto" looks for the base's config, on a hub too
        with disk_errors(folder):
            model.save_pretrained(new, state_dict=weights, save_embedding_layers=False)
        (new / "namesake.json").write_text(json.dumps(record, indent=1))
        new.rename(folder)


def save_full(model: PreTrainedModel, form: ChatFormat, folder: Path) -> None:
    """After full finetuning: an ordinary model folder; there as a whole or not at all."""
    weights = {name: whole(weight) for name, weight in model.named_parameters()}
    if PartialState().is_main_process:
        new = folder.with_suffix(".tmp")
        shutil.rmtree(new, ignore_errors=True)
        save(model, form, new, weights=weights)
        new.rename(folder)
