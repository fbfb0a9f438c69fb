"""A worker of tests/test_train.py, one of those that `accelerate launch` starts: MODEL FOLDER METHOD STEPS; dies after STEPS."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
import torch

if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
    # accelerate takes them for GPUs only; torch's and DeepSpeed's run on CPUs too
    os.environ["ACCELERATE_TORCH_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"
    accelerate.PartialState._prepare_backend = lambda *_: ("gloo", accelerate.DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")

import test_train as tests

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.comm  # noqa: F401

    def on_cpus(cpu: bool, **options: bool) -> accelerate.Accelerator:
        accelerator = accelerate.Accelerator(**options)
        zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0  # ZeRO-3 leaves small weights whole, here all of them
        return accelerator

    tests.training.Accelerator = on_cpus
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for minutes, faster than gloo

torch.set_num_threads(1)
base, folder, method, steps = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
tests.work_by(method, base, folder, steps)
if accelerate.PartialState().is_main_process:
    tests.load(base)  # the stages that follow are its own
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # gloo's threads may still run, and Python's end then aborts, once in hundreds of times
