"""What training writes: checkpoints to go on from, the adapter or the whole model at its end. Each file or folder is there as a
whole or not at all. With several processes all call these, and the main one writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from finetune.chat_format import ChatFormat
from finetune.model import PROJECTOR, save

STATE = "state.safetensors"  # in the folder checkpoint/


def save_checkpoint(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"weight.{name}": whole(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        for key, value in optimizer.state[weight].items():
            if key != "step":
                tensors[f"{key}.{name}"] = whole(value).clone() if key.startswith("qmap") else whole(value)  # shared
    save_whole(tensors, folder / STATE, step=str(step))


def save_whole(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    if PartialState().is_main_process:
        file.parent.mkdir(exist_ok=True)
        new = file.with_suffix(".tmp")
        save_file(tensors, new, metadata=metadata)
        new.replace(file)


def whole(tensor: Tensor) -> Tensor:
    """Of FSDP's processes each holds a part; all must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The other way round: of a whole tensor what this process holds."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_checkpoint(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restore the last checkpoint, if there is one. Returns the number of steps done."""
    file = folder / STATE
    if not file.exists():
        return 0
    with safe_open(file, "pt") as saved, torch.no_grad():
        step = int(saved.metadata()["step"])
        adamw = isinstance(optimizer.optimizer, torch.optim.AdamW)
        for weight in weights.values():
            optimizer.state[weight] = {"step": torch.tensor(float(step)) if adamw else step}
        for key in saved.keys():  # noqa: SIM118 - safetensors has no other way
            kind, _, name = key.partition(".")
            value = saved.get_tensor(key)
            if kind == "weight":
                weights[name].copy_(part_of(value, weights[name]))
            else:
                same = value.shape == weights[name].shape
                optimizer.state[weights[name]][kind] = (
                    part_of(value, weights[name]) if same else value.to(weights[name].device)
                )
    return step


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
