"""What this machine brings, what will be slow here and why, with one line of advice each; changes nothing."""

import contextlib
import os
import platform
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune import embedded
from finetune.run_folder import Run
from finetune.stages import hardware, versions

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
SECONDS = 4.0  # for all hubs together, name resolution included


class Finding(NamedTuple):
    what: str
    found: str
    advice: str = ""  # empty: all is well


def show(run: Run) -> None:
    table = Table("", "here 本机", "advice 建议", title="This machine 这台机器", title_justify="left")
    for finding in findings(run):
        table.add_row(finding.what, Text(finding.found), Text(finding.advice, style="yellow"))
    Console(stderr=True, highlight=False).print(table)


def findings(run: Run) -> list[Finding]:
    return [*software(), *processor(), *gpu(), *memory_and_disk(run), *hubs()]


def software() -> list[Finding]:
    found = [f"{name} {version}" for name, version in versions().items()]
    return [Finding("versions", f"{', '.join(found)}, {platform.system()} {platform.machine()}")]


def processor() -> list[Finding]:
    import torch

    from finetune.model import has_fast_bf16

    cores, usable = psutil.cpu_count(logical=False) or os.cpu_count() or 1, usable_cores()
    threads, load = torch.get_num_threads(), psutil.getloadavg()[0]
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    advice = []
    if threads > usable + 0.5:
        advice.append(
            f"{threads} threads share {usable:g} cores and wait for each other: set OMP_NUM_THREADS={max(1, int(usable))}."
        )
    elif threads < min(cores, usable):
        advice.append(f"Only {threads} of {cores} cores are used: unset or raise OMP_NUM_THREADS.")
    if load > 0.5 * usable:
        advice.append(f"Other programs keep {load:.1f} cores busy: all takes longer than estimated unless they end.")
    if not torch.cuda.is_available():
        slow = "" if has_fast_bf16() else ", and this one computes in float32, at about half the speed of bfloat16"
        advice.append(f"Training runs on the processor{slow}: stay below a billion parameters, or use a GPU.")
    found = f"{cores} cores, {usable:g} usable, {threads} threads{', bfloat16' if bf16 else ', no bfloat16'}"
    return [Finding("processor", f"{found}, load {load:.1f}", " ".join(advice))]


def usable_cores() -> float:
    """What the scheduler and a container's quota leave."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):  # no cgroups of version 2, or no limit ("max")
        quota, period = CPU_MAX.read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def gpu() -> list[Finding]:
    import torch

    driver = nvidia_driver()
    if not torch.cuda.is_available():
        if not driver:
            return [Finding("GPU", "none")]
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__} is built for CUDA {built}"
            if built
            else f"torch {torch.__version__} is for CPUs"
        )
        return [
            Finding(
                "GPU",
                f"{driver}; torch does not see it",
                f"{why}: update the driver, or install a torch for it (2.6.0 runs on drivers from CUDA 12.2 on).",
            )
        ]
    found = []
    for i, name in enumerate(hardware()["gpus"]):
        free, total = torch.cuda.mem_get_info(i)
        advice = []
        if free < 0.8 * total:
            advice.append(
                f"Other programs hold {(total - free) / 1e9:.1f} GB: end them for longer rows and fewer passes."
            )
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            advice.append("It has no bfloat16: training computes in float32, several times slower.")
        text = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, driver {driver.rpartition(', ')[2] or 'unknown'}, CUDA {torch.version.cuda}"
        found.append(Finding(f"GPU {i}", text, " ".join(advice)))
    return found


def nvidia_driver() -> str:
    """Name and driver version of the first GPU; empty where there is none or no driver."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip().partition("\n")[0]
    return ""


def memory_and_disk(run: Run) -> list[Finding]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    slow = swap.used > 0.05 * memory.total
    advice = f"{swap.used / 1e9:.1f} GB are swapped to disk, which is slow: close other programs." if slow else ""
    lines = [Finding("memory", found, advice)]
    for name, place in {"run": run.folder.absolute(), "cache": embedded.cache_dir()}.items():
        there = next(path for path in (place, *place.parents) if os.access(path, os.F_OK))
        free = shutil.disk_usage(there).free
        advice = "" if free > 45e9 else "A 7B model with its merge takes 45 GB: choose another disk for large bases."
        lines.append(Finding(f"disk, {name}", f"{free / 1e9:.0f} GB free in {place}", advice))
    return lines


def hub_addresses() -> dict[str, str]:
    return {
        "hf": os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
        "modelscope": "https://www.modelscope.cn",
        "openxlab": "https://code.openxlab.org.cn",
    }


def hubs(seconds: float = SECONDS) -> list[Finding]:
    """Which answer, all asked at once, within `seconds`."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return [Finding("hubs", "not asked: HF_HUB_OFFLINE is set")]
    answers: dict[str, str] = {}
    until = time.monotonic() + seconds
    asking = {
        name: threading.Thread(target=_ask, args=(name, address, seconds, answers), daemon=True)
        for name, address in hub_addresses().items()
    }
    for thread in asking.values():
        thread.start()
    for thread in asking.values():
        thread.join(max(0.0, until - time.monotonic()))
    found = []
    for name, address in hub_addresses().items():
        answer = answers.get(name, f"no answer within {seconds:g} s")
        mirror = "set HF_ENDPOINT to a mirror, or " if name == "hf" else ""
        advice = f"What is called {name}:... cannot be fetched: {mirror}give a local folder or a hub that answers."
        found.append(Finding(f"hub {name}", f"{address}: {answer}", "" if answer.startswith("answers") else advice))
    return found


def _ask(name: str, address: str, seconds: float, answers: dict[str, str]) -> None:
    began = time.monotonic()
    try:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "namesake"})  # noqa: S310
        urllib.request.urlopen(request, timeout=seconds).close()  # noqa: S310 - only the addresses above
    except urllib.error.HTTPError:
        pass  # it refuses, so it is there
    except (OSError, ValueError) as error:
        answers[name] = f"not reachable ({getattr(error, 'reason', error)})"
        return
    answers[name] = f"answers in {time.monotonic() - began:.1f} s"
