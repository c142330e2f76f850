"""Several machines for one attempt: what Slurm has allotted, and becoming `accelerate launch` on each of them.

Executed as `python -m runner.machines accelerate launch ...`, which `srun` starts once on each machine.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from runner.errors import RefusedError, RunnerError
from runner.launch import MACHINE_RANK, Machines, Placement
from runner.processes import die_with_parent


@dataclass(frozen=True)
class Allocation:
    """The machines of the Slurm job that this process runs in."""

    num_machines: int
    first_address: str  # of the machine that will have the main process
    num_cores: int  # of the machine that has the fewest

    def place(self, num_processes: int) -> Placement:
        """All machines for one attempt; the port is free on this one, which as a rule is the first."""
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
            f"the recipe wants {num_machines} machines, this Slurm job has {num_found}",
            hint=f"salloc --nodes={num_machines} --ntasks-per-node=1 ... runner launch ...",
        )
    first = _ask_slurm("show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()[0]
    return Allocation(num_machines, _find_address(first), count_cores(environment.get("SLURM_JOB_CPUS_PER_NODE", "1")))


def count_cores(text: str) -> int:
    """The fewest cores of a machine, from Slurm's list of them.

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
    """Become the command in the arguments, with this machine's rank in it; it dies with Slurm's step daemon."""
    die_with_parent(os.getppid())
    command = [os.environ["SLURM_PROCID"] if word == MACHINE_RANK else word for word in sys.argv[1:]]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
