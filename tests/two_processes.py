"""A worker of tests/test_train.py, one of those that `accelerate launch` starts: MODEL FOLDER METHOD STEPS; dies after STEPS."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate takes FSDP for GPUs only; torch's runs on CPUs too
    from accelerate import state

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state.PartialState._prepare_backend = lambda *_: ("gloo", state.DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")

import test_train as tests

torch.set_num_threads(1)
base, folder, method, steps = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
tests.work_by(method, base, folder, steps)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
