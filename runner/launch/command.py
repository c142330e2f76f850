"""The exact command and environment of one attempt, from a recipe, a run directory and a placement.

Pure, but for the folder that a command is pasted in.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import RefusedError
from runner.project_folder import pasteable
from runner.recipe.parse import Recipe, derive_accumulation

# Output that is seen at once, and no thread pool of the tokenizers beside the trainer's own
# threads.
_ALWAYS: Final = {
    "ACCELERATE_LOG_LEVEL": "info",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# What tells a process that it is one rank of several, or how it is to train: left by another
# launcher in whose job or shell we are. `accelerate launch` sets what its own children need. The
# names are those that accelerate, torch's launcher (PET_*) and DeepSpeed read; the precision of a
# run, say, follows ACCELERATE_MIXED_PRECISION.
_OF_OTHER_LAUNCHERS: Final = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|NODE_RANK"
    r"|MPI_LOCALRANKID|MPI_LOCALNRANKS"
    r"|(ROLE|MASTER|TORCHELASTIC|PET|FSDP|PMI|OMPI|MV2_COMM_WORLD)_.*"
    r"|ACCELERATE_(?!LOG_LEVEL$).*"
)
# On several machines `srun` gives each of them its own.
_OF_SLURM_STEPS: Final = frozenset({"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"})

# On the command line of `runner.launch.placement`, for the number of each machine.
MACHINE_RANK: Final = "MACHINE_RANK"


@dataclass(frozen=True)
class Machines:
    """Several machines of one attempt, and where they find the main process."""

    num: int
    first_address: str
    port: int
    # Of the one machine that the command is for; None: `srun` starts it on all.
    rank: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where one attempt runs: nothing of it changes the experiment."""

    num_processes: int  # over all machines
    # Of CUDA_VISIBLE_DEVICES; None leaves the variable alone.
    devices: tuple[str, ...] | None = None
    num_cores: int = 1  # cores this attempt may use, over all machines
    machines: Machines | None = None  # None: this one alone
    runs_per_gpu: int = 1  # that may share each of the devices at a time


@dataclass(frozen=True)
class LaunchCommand:
    """What is executed: `argv`, the variables that are set on top of the environment, and those
    that are removed from it.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    # Its processes run on machines that no signal and no descriptor of ours reaches.
    spans_machines: bool = False
    is_one_machine: bool = True  # False also for the part of one machine that is started by hand
    runs_per_gpu: int = 1  # see `Placement`; for the record

    def list_removed(self, surroundings: Mapping[str, str]) -> list[str]:
        """The sorted names of the surroundings that an attempt must not see."""
        return sorted(
            name
            for name in surroundings
            if _OF_OTHER_LAUNCHERS.fullmatch(name)
            or (self.is_one_machine and name in _OF_SLURM_STEPS)
        )

    def derive_environment(self, surroundings: Mapping[str, str]) -> dict[str, str]:
        """The whole environment that the command is started with."""
        removed = self.list_removed(surroundings)
        kept = {name: value for name, value in surroundings.items() if name not in removed}
        return {**kept, **self.environment}

    def as_shell(self, surroundings: Mapping[str, str]) -> str:
        """One line that starts the same when it is pasted into a shell with these surroundings."""
        removed = [f"-u {shlex.quote(name)}" for name in self.list_removed(surroundings)]
        variables = [
            f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())
        ]
        tool = ["env", *removed] if removed else []
        return pasteable(" ".join([*tool, *variables, shlex.join(self.argv)]))


def build_launch_command(
    recipe: Recipe, run_dir: Path, placement: Placement, *, path: str
) -> LaunchCommand:
    """The `accelerate launch` of one attempt. `path` is the PATH to extend, so that this Python's
    tools are found.

    Raises:
        RefusedError: the global batch cannot be kept on that many processes.
    """
    derive_accumulation(recipe, placement.num_processes)
    argv = [
        *("accelerate", "launch"),
        *("--config_file", recipe.launch.accelerate_config),
        *("--num_processes", str(placement.num_processes)),
        *_build_meeting_point(placement),
        *("-m", "runner.sft", str(run_dir)),
    ]
    spans_machines = placement.machines is not None and placement.machines.rank is None
    if placement.machines is not None and spans_machines:
        argv = [*_build_srun(placement, placement.machines), *argv]
    threads = recipe.launch.num_cpu_threads_per_process or max(
        1, placement.num_cores // placement.num_processes
    )
    environment = {**_ALWAYS, "OMP_NUM_THREADS": str(threads)}
    tools_dir = str(Path(sys.executable).parent)
    # `.venv/bin/runner` was called without activating; DeepSpeed needs ninja too
    if tools_dir not in path.split(":"):
        environment["PATH"] = f"{tools_dir}:{path}"
    if placement.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
        # The numbers are those of nvidia-smi; CUDA's own order begins with the fastest GPU.
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return LaunchCommand(
        tuple(argv),
        environment,
        spans_machines,
        is_one_machine=placement.machines is None,
        runs_per_gpu=placement.runs_per_gpu,
    )


def _build_meeting_point(placement: Placement) -> list[str]:
    """Where the processes find each other; on one machine, port 0 is one that is free.

    Raises:
        RefusedError: the processes do not divide among the machines.
    """
    machines = placement.machines
    if machines is None:
        return ["--main_process_port", "0"]
    if placement.num_processes % machines.num:
        raise RefusedError(
            f"{placement.num_processes} processes do not divide among {machines.num} machines",
            hint="`--num-processes` counts the processes of all machines",
        )
    return [
        *("--num_machines", str(machines.num)),
        *("--machine_rank", MACHINE_RANK if machines.rank is None else str(machines.rank)),
        *("--main_process_ip", machines.first_address),
        *("--main_process_port", str(machines.port)),
    ]


def _build_srun(placement: Placement, machines: Machines) -> list[str]:
    """`runner.launch.placement` once on each machine of the Slurm job, all ended as soon as one
    fails.

    `srun` reads nothing from the lease that it has as its stdin, and is told the cores: since Slurm
    22.05 it no longer takes them from the job.
    """
    return [
        *("srun", f"--nodes={machines.num}", f"--ntasks={machines.num}", "--ntasks-per-node=1"),
        f"--cpus-per-task={max(1, placement.num_cores // machines.num)}",
        *("--kill-on-bad-exit=1", "--input=none", "--export=ALL", "--mpi=none"),
        *(sys.executable, "-P", "-m", "runner.launch.placement"),
    ]
