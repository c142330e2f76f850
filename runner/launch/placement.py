"""Placements: the slots, GPUs, cores and machines that a run gets, on this machine or from Slurm.

Also a program: `srun` executes `python -m runner.launch.placement accelerate launch ...` once on
each machine of an attempt. It becomes that command, with the machine's rank filled in.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

import yaml

from runner.errors import RefusedError, RunnerError
from runner.launch.command import MACHINE_RANK, Machines, Placement
from runner.plan.decide import Launch
from runner.plan.select import QueuedRun, Selected
from runner.processes import die_with_parent
from runner.recipe.parse import Recipe
from runner.text import format_count

# Raises: RunnerError for runs that could never start.
RequireRuns = Callable[[Sequence[Launch]], None]


@dataclass(frozen=True)
class PlanRuns:
    """Chooses the runs to launch.

    An engine calls it once, with the runs that it has already queued, the stream on which to print
    the decisions, and its own checks of the runs to launch, which are made before any run is moved
    aside.
    """

    decide: Callable[[Mapping[str, QueuedRun], TextIO, RequireRuns | None], list[Launch]]
    to_push: Sequence[Selected]  # filled by the call: completed runs whose models must be pushed

    def __call__(
        self,
        queued: Mapping[str, QueuedRun],
        stream: TextIO,
        require: RequireRuns | None = None,
    ) -> list[Launch]:
        return self.decide(queued, stream, require)


@dataclass(frozen=True)
class Resources:
    """The resources that one run needs on each of its machines."""

    num_machines: int
    num_gpus: int
    num_cores: int | None  # None leaves it to the cluster


def derive_resources(recipe: Recipe) -> Resources:
    """One GPU per process, none if the launch config sets `use_cpu`; cores if the recipe states
    threads.
    """
    launch = recipe.launch
    try:
        config = yaml.safe_load(Path(launch.accelerate_config).read_text())
    except FileNotFoundError:
        raise RunnerError(
            f"{recipe.run.full_name}: {launch.accelerate_config} does not exist"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunnerError(
            f"{recipe.run.full_name}: {launch.accelerate_config} cannot be read: {error}"
        ) from None
    num_processes = launch.num_processes // launch.num_machines
    uses_cpu = isinstance(config, dict) and config.get("use_cpu") is True
    threads = launch.num_cpu_threads_per_process
    num_cores = threads * num_processes if threads is not None else None
    return Resources(launch.num_machines, 0 if uses_cpu else num_processes, num_cores)


def name_cluster_job(environment: Mapping[str, str]) -> str | None:
    """`Attempt.cluster_job`: the job that this process belongs to, None outside a cluster.

    >>> ids = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    >>> name_cluster_job(ids)
    'slurm 17_3'
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
    return f"slurm {job}" if job else None


def is_in_cluster(environment: Mapping[str, str]) -> bool:
    """True if Slurm or an Indexed Job of Kubernetes waits for the exit code."""
    return name_cluster_job(environment) is not None or "JOB_COMPLETION_INDEX" in environment


def count_allotted_cores(environment: Mapping[str, str]) -> int:
    """The number of cores that this process may use: those of its Slurm job on this machine, else
    all that it is bound to.
    """
    bound = len(os.sched_getaffinity(0))
    allotted = environment.get("SLURM_CPUS_ON_NODE", "")
    return min(bound, int(allotted)) if allotted.isdecimal() and int(allotted) else bound


_PORT_BY_HAND: Final = 29500  # of the main process, if we cannot search for a free one


def list_placements(
    num_processes: int, num_machines: int, allocation: Allocation | None
) -> list[Placement]:
    """One placement; for several machines outside a Slurm job, one for each, to be started there by
    hand.
    """
    if num_machines == 1:
        return [Placement(num_processes, num_cores=count_allotted_cores(os.environ))]
    if allocation is not None:
        return [allocation.place(num_processes)]
    num_cores = num_machines * (os.cpu_count() or 1)
    return [
        Placement(
            num_processes,
            None,
            num_cores,
            Machines(num_machines, "FIRST_MACHINE", _PORT_BY_HAND, rank),
        )
        for rank in range(num_machines)
    ]


@dataclass
class Devices:
    """The free slots, or the free places on GPUs. A run uses one place per process, each on another
    GPU, because NCCL refuses two ranks on the same GPU.
    """

    num_slots: int
    gpus: Sequence[str] | None = None
    allocation: Allocation | None = None  # several machines, all for one run at a time
    per_gpu: int = 1  # runs at a time on each GPU
    _num_free_slots: int = field(init=False)
    _free_places: dict[str, int] = field(init=False)  # by GPU, in the order of `gpus`

    def __post_init__(self) -> None:
        self._num_free_slots = self.num_slots
        self._free_places = dict.fromkeys(self.gpus or (), self.per_gpu)

    def check(self, launches: Iterable[Launch]) -> None:
        """Raises: RefusedError for a run that could never start."""
        for launch in launches:
            num_machines = launch.recipe.launch.num_machines
            if num_machines > 1 and self.allocation is None:
                raise RefusedError(
                    f"{launch.full_name} needs {num_machines} machines, but this is one machine",
                    hint=(
                        f"sbatch or salloc {num_machines} nodes and use `runner launch` there, or"
                        f" start it by hand: runner launch {launch.selected.source_path} --prepare"
                    ),
                )
            # Each process needs its own GPU.
            if self.gpus is not None and launch.num_processes > len(self.gpus):
                raise RefusedError(
                    f"{launch.full_name} needs {format_count(launch.num_processes, 'GPU')},"
                    f" one per process; the sweep has {len(self.gpus)}",
                    hint=f"name {launch.num_processes}: --gpus"
                    f" {','.join(map(str, range(launch.num_processes)))}",
                )

    def take(self, num_processes: int) -> Placement | None:
        """A placement, or None while there is no room. Uses the GPUs with the most free places."""
        # Cores of one slot, or of one place on a GPU.
        num_cores = max(1, count_allotted_cores(os.environ) // self.num_slots)
        if self.gpus is not None:
            free = [gpu for gpu in self.gpus if self._free_places[gpu] > 0]
            if len(free) < num_processes:
                return None
            most = sorted(free, key=lambda gpu: -self._free_places[gpu])[:num_processes]
            taken = tuple(gpu for gpu in self.gpus if gpu in most)
            for gpu in taken:
                self._free_places[gpu] -= 1
            return Placement(
                num_processes, taken, num_cores * num_processes, runs_per_gpu=self.per_gpu
            )
        if self._num_free_slots == 0:
            return None
        self._num_free_slots -= 1
        if self.allocation is not None:
            return self.allocation.place(num_processes)
        return Placement(num_processes, None, num_cores)

    def release(self, placement: Placement) -> None:
        """Undo `take`."""
        if placement.devices is not None and self.gpus is not None:
            for gpu in placement.devices:
                self._free_places[gpu] += 1
        else:
            self._num_free_slots += 1


@dataclass(frozen=True)
class Allocation:
    """The machines of the Slurm job that this process runs in."""

    num_machines: int
    first_address: str  # of the machine that will have the main process
    num_cores: int  # of the machine with the fewest cores

    def place(self, num_processes: int) -> Placement:
        """All machines for one attempt. The port is free on this machine, which is usually the
        first.
        """
        with socket.socket() as free:
            free.bind(("", 0))
            machines = Machines(self.num_machines, self.first_address, free.getsockname()[1])
        return Placement(num_processes, None, self.num_cores * self.num_machines, machines)


def find_allocation(environment: Mapping[str, str], num_machines: int) -> Allocation | None:
    """The allocation of this Slurm job, None outside Slurm.

    Raises:
        RefusedError: the job has another number of machines.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    num_found = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if num_found != num_machines:
        raise RefusedError(
            f"the recipe needs {num_machines} machines, but this Slurm job has {num_found}",
            hint=f"salloc --nodes={num_machines} --ntasks-per-node=1 ... runner launch ...",
        )
    first = _ask_slurm("show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()[0]
    return Allocation(
        num_machines,
        _find_address(first),
        count_cores(environment.get("SLURM_JOB_CPUS_PER_NODE", "1")),
    )


def count_cores(text: str) -> int:
    """The number of cores of the smallest machine, from Slurm's list.

    >>> count_cores("72(x2),36")
    36
    """
    return min(int(one) for one in re.sub(r"\(x\d+\)", "", text).split(","))


def _find_address(node: str) -> str:
    address = re.search(r"\bNodeAddr=(\S+)", _ask_slurm("show", "node", node, "--oneliner"))
    return address.group(1) if address else node


def _ask_slurm(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise RunnerError(f"`scontrol {' '.join(arguments)}`: {said}") from None
    return done.stdout


def main() -> None:
    """Become the command in the arguments, with this machine's rank filled in; it dies with Slurm's
    step daemon.
    """
    die_with_parent(os.getppid())
    command = [
        os.environ["SLURM_PROCID"] if word == MACHINE_RANK else word for word in sys.argv[1:]
    ]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
