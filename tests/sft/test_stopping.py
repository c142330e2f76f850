"""Real runs that are asked to stop, or whose processes get signals: all ranks stop at the same
step, nothing stays alive, and interrupted runs end with the same bytes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from runner.files import load_json
from runner.launch.attempt import name_owner
from runner.processes import OWNER_VARIABLE
from runner.run.paths import RunPaths, marker_path
from runner.run.record import EXIT_CODES, load_progress, load_record
from tests.conftest import RUNNER, Project, build_environment
from tests.support.killed_sweeps import name_role
from tests.support.local_slurm import read, wait_until
from tests.support.training_runs import (
    DEADLINE_SECONDS,
    RUNS,
    assert_dies,
    assert_same_outputs,
    end,
    launch,
    launch_arguments,
    list_descendants,
    open_descendants,
    read_attempts,
    read_log,
    snapshot,
)

pytestmark = pytest.mark.slow

# LoRA with dropout and accumulation. Seconds of training, of which a request to stop may take half
# of one to be seen.
LONG: Final = (*RUNS["gemma-lora"], "training.num_train_epochs=30")
DDP: Final = (*LONG, "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml")
ZERO_3: Final = (
    *RUNS["gemma-full"],
    "training.num_train_epochs=10",
    "launch.accelerate_config=accelerate_configs/zero3.yaml",
)
LAST_STEP: Final = 180


@pytest.fixture(scope="module")
def alone(workplace: Project) -> RunPaths:
    """One process, uninterrupted."""
    workplace.add_model()
    return launch(workplace, "alone-one-rank", *LONG)


@pytest.fixture(scope="module")
def ddp_alone(workplace: Project) -> RunPaths:
    """Two processes, uninterrupted."""
    workplace.add_model()
    return launch(workplace, "alone-two-ranks", *DDP, num_processes=2)


def start(project: Project, *arguments: str) -> subprocess.Popen[bytes]:
    """`runner ARGUMENTS` in the background; its output goes to a file of the project."""
    with (project.root / "printed.txt").open("ab") as printed:
        return subprocess.Popen(
            [str(RUNNER), *arguments],
            cwd=project.root,
            env=build_environment(),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )


@contextmanager
def started_in_training(
    project: Project, paths: RunPaths, *arguments: str, steps: int = 2
) -> Iterator[subprocess.Popen[bytes]]:
    """Such a process once its attempt has made some steps more; it is killed in the end if it still
    runs.
    """
    number = len(load_record(paths).attempts) + 1
    process = start(project, *arguments)
    try:
        wait_for_steps(paths, number, steps, process)
        yield process
    finally:
        end(process)


def wait_for_steps(
    paths: RunPaths, attempt: int, steps: int, process: subprocess.Popen[bytes]
) -> None:
    """Wait until an attempt has made some steps, counted from the first one that it reports."""
    deadline, first = time.monotonic() + DEADLINE_SECONDS, None
    while True:
        assert process.poll() is None, f"the run ended too early:\n{read_log(paths)}"
        assert time.monotonic() < deadline, f"it never trained:\n{read_log(paths)}"
        progress = load_progress(paths.attempt(attempt).progress_path)
        # In any phase: a step takes less time than a report.
        if progress is not None and progress.step > 0:
            first = progress.step if first is None else first
            if progress.step >= first + steps:
                return
        time.sleep(0.005)


def find_processes(runner_pid: int) -> dict[str, int]:
    """The process ids of the launcher, of the worker of a warm start, and of each rank below
    `runner`: `launcher`, `worker`, `0`, `1`.
    """
    found = {}
    for pid in list_descendants(runner_pid):
        role = name_role(pid)
        if role == "trainer":
            environment = read(Path(f"/proc/{pid}/environ")).split("\0")
            role = next((one[5:] for one in environment if one.startswith("RANK=")), "0")
        found[role] = pid
    return found


def step_left(paths: RunPaths, attempt: int, rank: int = 0) -> int:
    """The step at which a rank reports that it left."""
    failure = load_json(paths.attempt(attempt).failure_path(rank))
    found = re.search(r": stopped at step (\d+), which is saved", failure["message"])
    assert failure["kind"] == "preempted" and found, failure
    return int(found[1])


def test_ctrl_c_and_runner_stop_save_the_step_and_the_run_ends_with_the_same_bytes(
    workplace: Project, alone: RunPaths
) -> None:
    name = "stopped-twice"
    paths, arguments = workplace.paths(name), launch_arguments(name, LONG)
    with started_in_training(workplace, paths, *arguments) as process:
        pidfds = open_descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 130, read_log(paths)
        assert_dies(pidfds)
    first = step_left(paths, 1)
    assert marker_path(paths.checkpoint_dir(first)).exists()
    with started_in_training(workplace, paths, *arguments) as process:
        asked = workplace.cli("stop", paths.run_dir)
        assert asked.returncode == 0 and f"tests/{name}  asked attempt 2" in asked.stdout, asked
        assert process.wait(DEADLINE_SECONDS) == EXIT_CODES["preempted"], read_log(paths)
    assert f"resuming from step {first}" in read_log(paths)
    second = step_left(paths, 2)
    assert 2 <= first < second < LAST_STEP
    launch(workplace, name, *LONG)
    assert f"resuming from step {second}" in read_log(paths)
    said = [
        attempt["failure"] and attempt["failure"]["message"] for attempt in read_attempts(paths)
    ]
    assert said[0].startswith("the runner was stopped by SIGINT: stopped at step ")
    assert said[1].startswith("asked by `runner stop`: stopped at step ") and said[2] is None
    assert_same_outputs(paths, alone)


@pytest.mark.torture
def test_term_to_one_rank_ends_both_at_the_same_step_and_the_run_goes_on_exactly(
    workplace: Project, ddp_alone: RunPaths
) -> None:
    assert_ranks_leave_together(workplace, "ddp-term", DDP, ddp_alone)


@pytest.mark.torture
@pytest.mark.parametrize("number", range(20))
def test_term_to_one_rank_twenty_times(
    workplace: Project, ddp_alone: RunPaths, number: int
) -> None:
    """At another step each time."""
    assert_ranks_leave_together(
        workplace, f"ddp-term-{number}", DDP, ddp_alone, steps=2 + number, rank=number % 2
    )


@pytest.mark.torture
def test_term_to_one_rank_of_zero_3(workplace: Project) -> None:
    workplace.add_model()
    reference = launch(workplace, "alone-zero", *ZERO_3, num_processes=2)
    assert_ranks_leave_together(workplace, "zero-term", ZERO_3, reference)


def assert_ranks_leave_together(
    project: Project,
    name: str,
    overrides: tuple[str, ...],
    reference: RunPaths,
    *,
    steps: int = 2,
    rank: int = 1,
) -> None:
    """A run that was not stopped through `runner` resumes automatically, in the same launch."""
    paths = project.paths(name)
    with started_in_training(
        project, paths, *launch_arguments(name, overrides, 2), steps=steps
    ) as process:
        os.kill(find_processes(process.pid)[str(rank)], signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == 0, read_log(paths)
    step = step_left(paths, 1, rank=0)
    assert step == step_left(paths, 1, rank=1) and step >= steps
    first, second = read_attempts(paths)
    assert (
        first["failure"]["message"].startswith(f"SIGTERM on rank {rank}: ")
        and second["failure"] is None
    )
    assert f"resuming from step {step}" in read_log(paths)
    assert_same_outputs(paths, reference)


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1)


@pytest.mark.torture
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("ranks", "victim"),
    [
        *((1, victim) for victim in ("sweep", "launcher", "worker", "trainer")),
        *((2, victim) for victim in ("sweep", "launcher", "trainer")),
    ],
)
def test_any_signal_to_any_process_leaves_nothing_alive_and_no_trace(
    workplace: Project,
    request: pytest.FixtureRequest,
    ranks: int,
    victim: str,
    number: signal.Signals,
) -> None:
    reference = request.getfixturevalue("alone" if ranks == 1 else "ddp_alone")
    name = f"grid-{ranks}-{victim}-{number.name.lower()}"
    paths = workplace.paths(name)
    recipe = workplace.write_recipe(
        f"signals/{name}.yaml", *(LONG if ranks == 1 else DDP), f"launch.num_processes={ranks}"
    )
    # Behind the first checkpoint, of step 4: SIGKILL leaves no other.
    with started_in_training(workplace, paths, "sweep", str(recipe), steps=6) as process:
        found, last_rank = find_processes(process.pid), str(ranks - 1)
        pidfds = open_descendants(process.pid)
        assert sum(role.isdecimal() for role in found) == ranks and list_owned(paths)
        role = last_rank if victim == "trainer" else victim
        os.kill(process.pid if victim == "sweep" else found[role], number)
        status = process.wait(DEADLINE_SECONDS)
    assert_dies(pidfds)
    # One may have been started just before its parent died.
    wait_until(lambda: list_owned(paths) == [], "nothing of the run is alive")
    if victim == "sweep":
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    else:
        assert status == (0 if read_attempts(paths)[0]["failure"]["kind"] == "preempted" else 1), (
            read_attempts(paths)
        )
    before = snapshot(paths.run_dir)
    time.sleep(1.5)
    assert snapshot(paths.run_dir) == before
    if victim == "sweep" or status == 1:
        assert not paths.result_path.exists()
    again = workplace.cli("sweep", recipe)
    assert again.returncode == 0, f"{again.stdout}\n{again.stderr}\n{read_log(paths)}"
    first, *_, last = read_attempts(paths)
    assert (
        len(read_attempts(paths)) == 2
        and last["failure"] is None
        and first["started"] == ("warm" if ranks == 1 else "cold")
        and last["started"] == ("cold" if last["retry"] else first["started"])
        and "resuming from step" in read_log(paths)
    )
    print(
        name, status, first["failure"] and (first["failure"]["kind"], first["failure"]["message"])
    )
    assert_same_outputs(paths, reference)


def list_owned(paths: RunPaths) -> list[int]:
    """Processes that carry an attempt of a run in their environment, no matter which parent they
    have.
    """
    needle, found = f"{OWNER_VARIABLE}={name_owner(paths)}:".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(
                one.startswith(needle) for one in (folder / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(folder.name))
    return found
