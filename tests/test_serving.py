import re
from types import SimpleNamespace

import pytest
import torch

from finetune import model, serving


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


def test_bytes_of_the_weights(tiny_model):
    parameters = sum(p.numel() for p in model.load(tiny_model).parameters())
    assert serving.weight_bytes(tiny_model, torch.bfloat16) == pytest.approx(2 * parameters, rel=0.1)
