"""A model as it answers fastest here without losing what matters, and in words what was chosen."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from finetune import model as models
from finetune.errors import UserError

PROC_DRIVER = Path("/proc/driver/nvidia/version")
MEMORY_LIMITS = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")]
CPU_BYTES = 2_000_000_000  # of keys and values, at most


class Loaded(NamedTuple):
    model: PreTrainedModel
    fast: bool  # `Decoder` may take the weights out of the model, float32 ones as float16
    words: str


def load(base: Path, adapter: Path | None = None) -> Loaded:
    """On a GPU bfloat16 from Ampere on, else float16, 4-bit where these do not fit; on a CPU float16 weights where there is
    a kernel for them, which measured fastest (tests/bench/serving.py), else `inference_dtype`. Raises UserError."""
    if not torch.cuda.is_available():
        fast = "fbgemm" in torch.backends.quantized.supported_engines
        dtype = torch.float32 if fast else models.inference_dtype()
        if (need := models.weight_bytes(base, dtype)) > (free := free_memory()):
            raise UserError(
                f"The model's weights need {need / 1e9:.1f} GB of memory here and {free / 1e9:.1f} GB is free: choose larger "
                "hardware, a GPU or a smaller model."
            )
        weights = "float16 weights, float32 sums" if fast else f"{str(dtype).removeprefix('torch.')} weights"
        words = f"CPU, {torch.get_num_threads()} threads, {weights}."
        return Loaded(_whole(base, adapter, dtype), fast, words + gpu_trouble())
    dtype, name, free = models.inference_dtype(), torch.cuda.get_device_name(), models.free_memory()
    if models.holds(base, dtype):
        return Loaded(_whole(base, adapter, dtype), True, f"{name}, {str(dtype).removeprefix('torch.')} weights.")
    why = f"{models.weight_bytes(base, dtype) / 1e9:.1f} GB of weights do not fit into {free / 1e9:.1f} GB with what they need beside"
    return Loaded(models.load_for_inference(base, adapter, four_bit=True), False, f"{name}, 4-bit weights: {why}.")


def _whole(base: Path, adapter: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    return models.load_merged(base, adapter, dtype) if adapter else models.load(base, dtype)


def free_memory() -> int:
    """Bytes that this process may still take, a container's limit included."""
    memory, own = psutil.virtual_memory().available + psutil.swap_memory().free, psutil.Process().memory_info().rss
    for limit in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(limit.read_text()) - own)  # without what its cache of files takes, which gives way
    return memory


def gpu_trouble() -> str:
    """Why a GPU that is there is not used, as a further sentence; empty where there is none."""
    if not PROC_DRIVER.is_file():
        return ""
    driver = PROC_DRIVER.read_text().partition("Kernel Module")[2].split()[:1] or ["?"]
    wants = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    return (
        f" There is an NVIDIA GPU with driver {driver[0]}, and torch {torch.__version__} cannot use it: it {wants}. Update the "
        "driver, or install a torch whose CUDA is not newer than the driver's (nvidia-smi says which)."
    )


def pool_tokens(model: PreTrainedModel, most_rows: int) -> int:
    """How many tokens' keys and values are kept: half of a GPU's free memory, on a CPU a quarter but at most
    CPU_BYTES; no more than `most_rows` contexts."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize
    on_gpu = model.device.type == "cuda"
    memory = models.free_memory() // 2 if on_gpu else min(psutil.virtual_memory().available // 4, CPU_BYTES)
    return min(memory // token, most_rows * config.max_position_embeddings)
