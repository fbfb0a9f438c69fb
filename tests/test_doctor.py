"""What `check` says of the machine: real servers that answer, refuse and stay silent; quotas and drivers that are made here."""

import http.server
import os
import socket
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch

from finetune import doctor
from finetune.run_folder import Run
from finetune.settings import Settings


@pytest.fixture
def hub(monkeypatch):
    """Addresses of three hubs: one answers 404, one accepts and is silent, at one nobody listens."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 to all
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        ports = {"hf": server.server_port, "modelscope": silent.getsockname()[1], "openxlab": port}
        addresses = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        monkeypatch.setattr(doctor, "hub_addresses", lambda: addresses)
        yield addresses
    server.shutdown()
    server.server_close()


def test_hubs_are_asked_at_once_and_within_a_bound(hub, monkeypatch):
    """Each waits until all are asked: one after the other none would be."""
    ask, all_asked = doctor._ask, threading.Barrier(3)
    monkeypatch.setattr(doctor, "_ask", lambda *about: all_asked.wait() is None or ask(*about))
    answers, silent, closed = doctor.hubs(seconds=3.0)
    assert answers.found.startswith(f"{hub['hf']}: answers in ")
    assert answers.advice == ""
    assert silent.found.removeprefix(f"{hub['modelscope']}: ") in ("no answer within 3 s", "not reachable (timed out)")
    assert "Connection refused" in closed.found
    assert (
        silent.advice == "What is called modelscope:... cannot be fetched: give a local folder or a hub that answers."
    )


def test_the_mirror_is_asked_where_one_is_set(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert doctor.hub_addresses()["hf"] == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.test")
    assert doctor.hub_addresses()["hf"] == "http://mirror.test"


def test_offline_no_hub_is_asked(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.hubs() == [("hubs", "not asked: HF_HUB_OFFLINE is set", "")]


@pytest.mark.parametrize("text, cores", [("150000 100000\n", 1.5), ("max 100000\n", None), (None, None)])
def test_a_containers_quota_counts(text, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CPU_MAX", tmp_path / "cpu.max")
    if text:
        (tmp_path / "cpu.max").write_text(text)
    every = len(os.sched_getaffinity(0))
    assert doctor.usable_cores() == min(every, cores or every)


@pytest.mark.parametrize(
    "usable, threads, load, advice",
    [
        (2.0, 64, 0.1, "64 threads share 2 cores and wait for each other: set OMP_NUM_THREADS=2."),
        (4.0, 1, 0.1, "Only 1 of 4 cores are used: unset or raise OMP_NUM_THREADS."),
        (4.0, 4, 3.0, "Other programs keep 3.0 cores busy: all takes longer than estimated unless they end."),
        (4.0, 4, 0.1, "Training runs on the processor"),
    ],
)
def test_what_makes_the_processor_slow_is_told(usable, threads, load, advice, monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: usable)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.processor()
    assert finding.advice.startswith(advice)
    assert f"{threads} threads" in finding.found


def test_a_gpu_that_torch_does_not_see_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpu() == [("GPU", "none", "")]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 535.104.05'\necho 'NVIDIA H100, 535.104.05'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (finding,) = doctor.gpu()
    assert finding.found == "NVIDIA H100, 535.104.05; torch does not see it"
    assert finding.advice.startswith(f"torch {torch.__version__} is ")
    assert "update the driver, or install" in finding.advice


def test_a_gpu_that_others_use_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10e9, 24e9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(doctor, "hardware", lambda: {"gpus": ["Tesla T4"]})
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "Tesla T4, 550.1")
    (finding,) = doctor.gpu()
    assert finding.found.startswith("Tesla T4, 10.0 of 24.0 GB free, driver 550.1, CUDA")
    assert finding.advice == (
        "Other programs hold 14.0 GB: end them for longer rows and fewer passes. It has no bfloat16: training computes in "
        "float32, several times slower."
    )


def test_memory_and_both_disks_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache" / "not" / "there"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=40e9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9, total=8e9))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=2e9))
    memory, run, cache = doctor.memory_and_disk(Run(tmp_path / "runs" / "a", Settings()))
    assert memory.found == "3.0 of 8.0 GB free"
    assert memory.advice == "2.0 GB are swapped to disk, which is slow: close other programs."
    assert run.found == f"40 GB free in {tmp_path / 'runs' / 'a'}"
    assert cache.found == f"40 GB free in {tmp_path / 'cache' / 'not' / 'there'}"
    assert cache.advice.startswith("A 7B model with its merge takes 45 GB")
