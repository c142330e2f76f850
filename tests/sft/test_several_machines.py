"""One run on two machines of a real Slurm: the same bytes as on one, and no rank continues after a
kill.

The two machines are two slurmd of this one: the ranks share the file system, the job and a port.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from runner.run.lease import has_ranks, is_leased
from runner.run.paths import RunPaths
from runner.run.record import EXIT_CODES
from tests.conftest import RUNNER, Project, build_environment
from tests.support.local_slurm import (
    LocalSlurm,
    list_descendants,
    local_slurm,
    needs_slurm,
    read,
    wait_until,
)
from tests.support.training_runs import assert_same_outputs, launch, read_attempts, read_log

pytestmark = [needs_slurm, pytest.mark.slow]

DDP: Final = (
    "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml",
    "training.num_train_epochs=6",
)
DEATH_SECONDS: Final = 60.0


@pytest.fixture(scope="module")
def reference(workplace: Project) -> RunPaths:
    """Two processes on one machine, uninterrupted."""
    workplace.add_model()
    return launch(workplace, "one-machine", *DDP, num_processes=2)


@pytest.fixture
def cluster() -> Iterator[LocalSlurm]:
    with local_slurm(num_nodes=2, slurmd_timeout=5) as cluster:
        yield cluster


def submit(cluster: LocalSlurm, project: Project, name: str) -> str:
    """`runner launch` on two machines, as the process of a batch script; the job's number."""
    machines = ("launch.num_processes=2", "launch.num_machines=2")
    project.write_recipe(f"recipes/{name}.yaml", *DDP, *machines)
    script = project.root / f"{name}.sh"
    script.write_text(
        f"#!/bin/bash\ncd {project.root}; echo $$ > {name}.pid; exec {RUNNER} launch"
        f" recipes/{name}.yaml\n"
    )
    environment = {
        name: value for name, value in build_environment().items() if not name.startswith("SLURM_")
    }
    keys = ("PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    exported = "--export=ALL," + ",".join(f"{key}={environment[key]}" for key in keys)
    options = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--no-requeue",
        f"--output={project.root}/{name}.out",
        exported,
    )
    return cluster.run("sbatch", "--parsable", *options, str(script)).strip()


def wait_for_end(cluster: LocalSlurm, job: str) -> None:
    wait_until(lambda: job not in cluster.list_jobs(), f"job {job} ends")


def finish(cluster: LocalSlurm, project: Project, name: str) -> RunPaths:
    wait_for_end(cluster, submit(cluster, project, name))
    paths = project.paths(name)
    output = (project.root / f"{name}.out").read_text()
    assert paths.result_path.exists(), f"{output}\n{read_log(paths)}"
    return paths


def find_ranks(run_dir: Path) -> dict[int, int]:
    """Process ids of the ranks, by rank."""
    ranks = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = read(path).split("\0")
        if "runner.sft" in words or any(word.endswith("runner/sft/__main__.py") for word in words):
            environment = dict(
                line.partition("=")[::2] for line in read(path.parent / "environ").split("\0")
            )
            if "RANK" in environment and str(run_dir.name) in " ".join(words):
                ranks[int(environment["RANK"])] = int(path.parent.name)
    return ranks


Kill = Callable[[LocalSlurm, int, dict[int, int]], None]


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_srun(_: LocalSlurm, runner: int, __: dict[int, int]) -> None:
    kill(*[pid for pid in list_descendants(runner) if read(Path(f"/proc/{pid}/comm")) == "srun\n"])


def lose_second_machine(cluster: LocalSlurm, _: int, __: dict[int, int]) -> None:
    """Kill all processes of the second machine, as in a power loss; Slurm's own daemon is gone too,
    until it is started again.
    """
    cluster.kill("node1")
    cluster.kill_jobs("node1")


KILLS: Final[dict[str, Kill]] = {
    "runner": lambda cluster, runner, ranks: kill(runner),
    "srun": kill_srun,
    "rank 0": lambda cluster, runner, ranks: kill(ranks[0]),
    "rank 1": lambda cluster, runner, ranks: kill(ranks[1]),
    "everything on the first machine": lambda cluster, runner, ranks: cluster.kill_jobs("node0"),
    "everything on the second machine": lambda cluster, runner, ranks: cluster.kill_jobs("node1"),
    "the second machine": lose_second_machine,
}
MATRIX: Final = [
    pytest.param(name, marks=[] if name == "runner" else pytest.mark.torture) for name in KILLS
]


@pytest.mark.parametrize("victim", MATRIX)
def test_no_rank_outlives_a_kill_and_the_next_launch_ends_with_the_same_bytes(
    cluster: LocalSlurm, workplace: Project, reference: RunPaths, victim: str
) -> None:
    name = f"killed-{victim.replace(' ', '-')}"
    job, paths = submit(cluster, workplace, name), workplace.paths(name)
    marker = paths.checkpoint_dir(4) / "COMMITTED.json"
    wait_until(
        lambda: marker.exists() or job not in cluster.list_jobs(),
        f"{marker} is written, or the job ends",
    )
    ranks = find_ranks(paths.run_dir)
    assert ranks.keys() == {0, 1}, (workplace.root / f"{name}.out").read_text() + read_log(paths)
    pidfds = [os.pidfd_open(pid) for pid in ranks.values()]
    KILLS[victim](cluster, int((workplace.root / f"{name}.pid").read_text()), ranks)
    deadline = time.monotonic() + DEATH_SECONDS
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0], (
            "a rank trains on"
        )
        os.close(pidfd)
    if victim == "everything on the second machine":
        cluster.run(
            "scancel", job
        )  # its Slurm is alive, has lost the tasks and never reports it to `srun`
    wait_until(
        lambda: not has_ranks(paths) and not is_leased(paths.lease_path), "the run is let go of"
    )
    assert not paths.result_path.exists()
    cluster.start_node("node1")  # nothing, where it was not lost
    cluster.run("scancel", job)
    wait_for_end(cluster, job)
    assert_same_outputs(finish(cluster, workplace, name), reference)
    killed, last = read_attempts(paths)
    assert last["failure"] is None and "resuming from step" in read_log(paths)
    if victim in ("runner", "everything on the first machine"):
        assert killed["ended_at_utc"] is None
    elif "second machine" not in victim:
        assert killed["failure"]["kind"] in (
            "lost",
            "transient",
        ), "recorded by the launcher that lived on"


@pytest.mark.torture
def test_all_ranks_leave_at_the_same_step_when_the_launcher_is_asked_to_stop(
    cluster: LocalSlurm, workplace: Project, reference: RunPaths
) -> None:
    job, paths = submit(cluster, workplace, "stopped"), workplace.paths("stopped")
    marker = paths.checkpoint_dir(4) / "COMMITTED.json"
    wait_until(
        lambda: marker.exists() or job not in cluster.list_jobs(),
        f"{marker} is written, or the job ends",
    )
    os.kill(int((workplace.root / "stopped.pid").read_text()), signal.SIGUSR1)
    wait_for_end(cluster, job)
    (attempt,) = read_attempts(paths)
    assert attempt["failure"]["kind"] == "preempted" and not paths.result_path.exists()
    assert f"ExitCode={EXIT_CODES['preempted']}:0" in cluster.run("scontrol", "show", "job", job)
    left_at = max(
        int(path.name.removeprefix("step-")) for path in paths.checkpoints_dir.glob("step-*")
    )
    assert_same_outputs(finish(cluster, workplace, "stopped"), reference)
    assert f"resuming from step {left_at}" in read_log(paths)
