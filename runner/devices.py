"""What a machine has free for runs: slots or GPUs, and the placements made of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from runner.cluster import count_allotted_cores
from runner.errors import RefusedError, RunnerError
from runner.launch import Machines, Placement

if TYPE_CHECKING:
    from runner.machines import Allocation
    from runner.pool import Planned

_PORT_BY_HAND: Final = 29500  # of the main process, where nobody can look for a free one


def parse_gpus(text: str | None) -> list[str] | None:
    """The names in `--gpus`. Raises: RunnerError, for one that is empty or stands there twice."""
    if text is None:
        return None
    gpus = [name.strip() for name in text.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise RunnerError(f"`--gpus {text}` must name different devices, such as 0,1")
    return gpus


def list_placements(num_processes: int, num_machines: int, allocation: Allocation | None) -> list[Placement]:
    """One, or, for several machines that Slurm does not give us, one for each, to be started there by hand."""
    if num_machines == 1:
        return [Placement(num_processes, num_cores=count_allotted_cores(os.environ))]
    if allocation is not None:
        return [allocation.place(num_processes)]
    num_cores = num_machines * (os.cpu_count() or 1)
    return [
        Placement(num_processes, None, num_cores, Machines(num_machines, "FIRST_MACHINE", _PORT_BY_HAND, rank))
        for rank in range(num_machines)
    ]


@dataclass
class Devices:
    """What is free: slots, or GPUs of which a run takes one per process."""

    num_slots: int
    gpus: list[str] | None = None
    allocation: Allocation | None = None  # several machines, all for one run at a time
    _num_free_slots: int = field(init=False)

    def __post_init__(self) -> None:
        self._num_free_slots = self.num_slots

    def check(self, planned: Iterable[Planned]) -> None:
        """Raises: RefusedError for a run that could never start."""
        for run in planned:
            num_machines = run.selected.recipe.launch.num_machines
            if num_machines > 1 and self.allocation is None:
                raise RefusedError(
                    f"{run.name} wants {num_machines} machines, this is one",
                    hint=f"sbatch or salloc {num_machines} nodes and `runner launch` it there, or start it by hand: "
                    f"runner launch {run.selected.source_path} --prepare",
                )
            if self.gpus is not None and run.num_processes > len(self.gpus):
                raise RefusedError(f"{run.name} wants {run.num_processes} GPUs, `--gpus` names {len(self.gpus)}")

    def take(self, num_processes: int) -> Placement | None:
        """A placement, or None while there is no room."""
        num_cores = max(1, count_allotted_cores(os.environ) // self.num_slots)  # of one slot, or of one GPU
        if self.gpus is not None:
            if len(self.gpus) < num_processes:
                return None
            taken, self.gpus = tuple(self.gpus[:num_processes]), self.gpus[num_processes:]
            return Placement(num_processes, taken, num_cores * num_processes)
        if self._num_free_slots == 0:
            return None
        self._num_free_slots -= 1
        if self.allocation is not None:
            return self.allocation.place(num_processes)
        return Placement(num_processes, None, num_cores)

    def give_back(self, placement: Placement) -> None:
        """Undo `take`."""
        if placement.devices is not None and self.gpus is not None:
            self.gpus += placement.devices
        else:
            self._num_free_slots += 1
