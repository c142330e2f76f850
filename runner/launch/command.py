"""The exact command and environment of one attempt, from a recipe, a run directory and a placement.

Pure, except for the current folder, which matters for pasting a command.
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

# Unbuffered output, and no thread pool of the tokenizers in addition to those of training.
_ALWAYS: Final = {
    "ACCELERATE_LOG_LEVEL": "info",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# Variables left by another launcher whose job or shell we are in. They would tell a process that it
# is one rank of several, or how to train: ACCELERATE_MIXED_PRECISION, for example, sets the
# precision of a run. `accelerate launch` sets the variables that its children need. These are the
# names that accelerate, torch's launcher (PET_*) and DeepSpeed read.
_OF_OTHER_LAUNCHERS: Final = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|NODE_RANK"
    r"|MPI_LOCALRANKID|MPI_LOCALNRANKS"
    r"|(ROLE|MASTER|TORCHELASTIC|PET|FSDP|PMI|OMPI|MV2_COMM_WORLD)_.*"
    r"|ACCELERATE_(?!LOG_LEVEL$).*"
)
# On several machines, `srun` sets them for each machine.
_OF_SLURM_STEPS: Final = frozenset({"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"})

# Placeholder on the command line of `runner.launch.placement` for the number of each machine.
MACHINE_RANK: Final = "MACHINE_RANK"


@dataclass(frozen=True)
class Machines:
    """The machines of one attempt, and the address of the main process."""

    num: int
    first_address: str
    port: int
    # The machine that the command is for; None: `srun` starts it on all.
    rank: int | None = None


@dataclass(frozen=True)
class Placement:
    """The devices and machines of one attempt; they do not change the experiment."""

    num_processes: int  # over all machines
    # For CUDA_VISIBLE_DEVICES; None leaves the variable alone.
    devices: tuple[str, ...] | None = None
    num_cores: int = 1  # cores this attempt may use, over all machines
    machines: Machines | None = None  # None: only this one
    runs_per_gpu: int = 1  # runs that may share each device at the same time


@dataclass(frozen=True)
class LaunchCommand:
    """The command to execute: `argv`, the variables to set, and those to remove from the
    environment.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    # True if its processes run on other machines, where our signals and descriptors do not reach.
    spans_machines: bool = False
    is_one_machine: bool = True  # False also for one machine's part that is started by hand
    runs_per_gpu: int = 1  # see `Placement`; for the record

    def list_removed(self, surroundings: Mapping[str, str]) -> list[str]:
        """The sorted names of the variables that an attempt must not see."""
        return sorted(
            name
            for name in surroundings
            if _OF_OTHER_LAUNCHERS.fullmatch(name)
            or (self.is_one_machine and name in _OF_SLURM_STEPS)
        )

    def derive_environment(self, surroundings: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the command."""
        removed = self.list_removed(surroundings)
        kept = {name: value for name, value in surroundings.items() if name not in removed}
        return {**kept, **self.environment}

    def as_shell(self, surroundings: Mapping[str, str]) -> str:
        """One line that starts the same command when pasted into a shell with this environment."""
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
    # `.venv/bin/runner` may be called without activating the environment; DeepSpeed needs ninja.
    if tools_dir not in path.split(":"):
        environment["PATH"] = f"{tools_dir}:{path}"
    if placement.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
        # Use the numbers of nvidia-smi; CUDA's default order starts with the fastest GPU.
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return LaunchCommand(
        tuple(argv),
        environment,
        spans_machines,
        is_one_machine=placement.machines is None,
        runs_per_gpu=placement.runs_per_gpu,
    )


def _build_meeting_point(placement: Placement) -> list[str]:
    """The options by which the processes find each other; on one machine, port 0 is a free port.

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
    """An `srun` that runs `runner.launch.placement` once on each machine of the Slurm job, and ends
    all of them as soon as one fails.

    `srun` reads nothing from the lease that is its stdin. The cores are passed explicitly: since
    Slurm 22.05, `srun` no longer inherits them from the job.
    """
    return [
        *("srun", f"--nodes={machines.num}", f"--ntasks={machines.num}", "--ntasks-per-node=1"),
        f"--cpus-per-task={max(1, placement.num_cores // machines.num)}",
        *("--kill-on-bad-exit=1", "--input=none", "--export=ALL", "--mpi=none"),
        *(sys.executable, "-P", "-m", "runner.launch.placement"),
    ]
