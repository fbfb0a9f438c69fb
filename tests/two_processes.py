"""What tests/test_train.py runs, with DeepSpeed where it is importable from: each job (CONFIG MODEL FOLDER METHOD STEPS) by two
processes that `accelerate launch` starts, which die after STEPS. They are forked from one that has everything imported: that takes
a process longer than these trainings."""

import multiprocessing
import os
import sys
from pathlib import Path

import accelerate
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser

ROOT = Path(__file__).resolve().parent.parent


def on_cpus(cpu: bool, **options: bool) -> accelerate.Accelerator:
    accelerator = accelerate.Accelerator(**options)
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 0  # ZeRO-3 leaves small weights whole, here all of them
    return accelerator


def work(environment: dict[str, str], base: str, folder: str, method: str, steps: str) -> None:
    import test_train as tests

    os.environ.update(environment)  # the fork server has that of when it was started
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        # accelerate takes them for GPUs only; torch's and DeepSpeed's run on CPUs too
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        accelerate.PartialState._prepare_backend = lambda *_: ("gloo", accelerate.DistributedType.MULTI_GPU)
        torch.distributed.init_process_group("gloo")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        tests.training.Accelerator = on_cpus
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for minutes, faster than gloo
    torch.set_num_threads(1)
    tests.work_by(method, Path(base), Path(folder), int(steps))
    if accelerate.PartialState().is_main_process:
        tests.load(Path(base))  # the stages that follow are its own
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def forked(config: torch.distributed.run.LaunchConfig, entrypoint: str, launch=torch.distributed.run.elastic_launch):
    config.start_method = "forkserver"
    return lambda *command: launch(config, work)(dict(os.environ), *command[-4:])


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    multiprocessing.set_forkserver_preload(["deepspeed.comm", "test_train"])
    torch.distributed.run.elastic_launch = forked
    jobs = sys.argv[1:]
    for job in (jobs[i : i + 5] for i in range(0, len(jobs), 5)):
        command = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", "--config_file"]
        command += [str(ROOT / "assets" / "accelerate" / f"{job[0]}.yaml"), __file__, *job[1:]]
        launch_command(launch_command_parser().parse_args(command))
