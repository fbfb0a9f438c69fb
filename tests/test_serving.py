import importlib
import re
from types import SimpleNamespace

import psutil
import pytest
import torch

from finetune import generation, model, serving
from finetune.errors import UserError


def test_what_a_cpu_decodes_with_is_said(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "PROC_DRIVER", tmp_path / "no driver")
    loaded = serving.load(tiny_model)
    assert loaded.fast == ("fbgemm" in torch.backends.quantized.supported_engines)
    assert loaded.model.dtype == (torch.float32 if loaded.fast else model.inference_dtype())
    assert re.fullmatch(rf"CPU, {torch.get_num_threads()} threads, \w+ weights(, float32 sums)?\.", loaded.words)


def test_a_gpu_that_torch_cannot_use_is_said(tiny_model, monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n"
    )
    monkeypatch.setattr(serving, "PROC_DRIVER", tmp_path / "version")
    if torch.cuda.is_available():
        pytest.fail("this test is for a machine whose torch sees no GPU")
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    assert serving.load(tiny_model).words.endswith(
        f"There is an NVIDIA GPU with driver 535.129.03, and torch {torch.__version__} cannot use it: it {built}. Update "
        "the driver, or install a torch whose CUDA is not newer than the driver's (nvidia-smi says which)."
    )


@pytest.mark.parametrize(
    ("ampere", "free", "dtype", "words"),
    [
        (True, 16e9, torch.bfloat16, "A card, bfloat16 weights."),
        (False, 16e9, torch.float16, "A card, float16 weights."),
        (
            True,
            90_000,
            torch.bfloat16,
            "A card, 4-bit weights: 0.0 GB of weights do not fit into 0.0 GB with what they need",
        ),
    ],
)
def test_a_card_decides_how_weights_are_kept(tiny_model, monkeypatch, ampere, free, dtype, words):
    """There is no card here: what it says of itself is made up, and the weights, 4-bit ones too, are real and answer."""
    kernels = importlib.import_module("bitsandbytes.nn.modules")  # it would look for those of a card
    monkeypatch.setattr(kernels, "has_avx512bf16", lambda: False)  # those of a CPU want larger layers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)
    monkeypatch.setattr(model, "free_memory", lambda: int(free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(model, "device", lambda: torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")  # one process alone leaves the embeddings on the host, which is a GPU's way
    loaded = serving.load(tiny_model)
    assert loaded.words.startswith(words)
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert (type(layer).__name__ == "Linear4bit") == ("4-bit" in words)
    assert loaded.model.dtype == dtype
    decoder = generation.Decoder(loaded.model, [0], 256, fast=loaded.fast)
    row = decoder.add([5, 6, 7], 4)
    while decoder.rows or decoder.waiting:
        decoder.step()
    assert len(row.ids) == 4


@pytest.mark.parametrize(
    ("free", "rows", "expected"),
    [
        (80_000, 64, 20_000 // 256),  # a quarter; 2 layers x keys and values x 2 heads x 8 numbers x 4 bytes a token
        (1e15, 10_000_000, 2_000_000_000 // 256),
        (1e15, 3, 3 * 1024),  # contexts
    ],
)
def test_the_pool_is_as_large_as_memory_allows(tiny_model, monkeypatch, free, rows, expected):
    monkeypatch.setattr(serving.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free)))
    assert serving.pool_tokens(model.load(tiny_model), rows) == expected


def test_a_containers_limit_is_told_before_the_weights_are_read(tiny_model, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(serving, "MEMORY_LIMITS", [tmp_path / "memory.max", tmp_path / "not there"])
    assert serving.free_memory() > 100_000_000
    (tmp_path / "memory.max").write_text(f"{psutil.Process().memory_info().rss}\n")
    with pytest.raises(UserError, match=r"need 0\.0 GB of memory here and -?0\.\d GB is free: choose larger hardware"):
        serving.load(tiny_model)


def test_bytes_of_the_weights(tiny_model):
    parameters = sum(p.numel() for p in model.load(tiny_model).parameters())
    assert model.weight_bytes(tiny_model, torch.bfloat16) == pytest.approx(2 * parameters, rel=0.1)
