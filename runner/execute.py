"""One attempt of one run: takes the lease, opens the record, starts `accelerate launch`, closes the record."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import RefusedError
from runner.fsio import Lease, write_json_atomic
from runner.identity import derive_digest, list_library_versions
from runner.launch import LaunchCommand
from runner.paths import AttemptPaths, RunPaths
from runner.recipe import Recipe
from runner.record import (
    Attempt,
    Failure,
    RunRecord,
    find_differences,
    load_failure,
    load_record,
    load_result,
    now_utc,
    write_record,
)

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
GRACE_SECONDS: Final = 10.0


def prepare_run(recipe: Recipe, contents: Mapping[str, str], paths: RunPaths) -> None:
    """Write `recipe.json` for a new run; refuse a directory that holds another experiment.

    The caller holds the lease.
    """
    if differences := find_differences(paths, recipe, contents):
        shown = "\n".join(f"  {line}" for line in differences)
        raise RefusedError(
            f"{paths.run_dir} holds another experiment, the recipe changed since:\n{shown}",
            hint="change the recipe back, give the new one another name, or move the old run aside with "
            "`runner launch RECIPE --fresh`",
        )
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": derive_digest(recipe, contents),
        "contents": dict(contents),
    }
    write_json_atomic(paths.recipe_path, content)


def open_attempt(
    paths: RunPaths, command: LaunchCommand, num_processes: int, git_state: tuple[str | None, bool | None]
) -> Attempt:
    """Append an attempt to `run.json` and make its folder, before anything is started. The caller holds the lease."""
    record = load_record(paths)
    attempt = Attempt(
        number=len(record.attempts) + 1,
        started_at_utc=now_utc(),
        command=command.argv,
        environment=dict(command.environment),
        num_processes=num_processes,
        host=socket.gethostname(),
        devices=command.environment.get("CUDA_VISIBLE_DEVICES"),
        git_commit=git_state[0],
        git_is_dirty=git_state[1],
        versions=list_library_versions(),
    )
    paths.attempt(attempt.number).attempt_dir.mkdir(parents=True, exist_ok=True)
    write_record(paths, RunRecord(attempts=(*record.attempts, attempt)))
    return attempt


def take_lease(paths: RunPaths) -> Lease | None:
    """The lease of a run, or None when somebody else holds it."""
    lease = Lease(paths.lease_path)
    if lease.try_acquire():
        return lease
    lease.close()
    return None


def close_attempt(paths: RunPaths, exit_status: int, failure: Failure | None) -> None:
    """Write the end of the last attempt."""
    *earlier, last = load_record(paths).attempts
    closed = last.model_copy(update={"ended_at_utc": now_utc(), "exit_status": exit_status, "failure": failure})
    write_record(paths, RunRecord(attempts=(*earlier, closed)))


def move_aside(paths: RunPaths) -> Path | None:
    """`--fresh`: rename the run directory to a free name beside it; nothing is deleted."""
    if not paths.run_dir.exists():
        return None
    number = 1
    while (target := paths.run_dir.with_name(f"{paths.run_dir.name}.old-{number}")).exists():
        number += 1
    paths.run_dir.rename(target)
    return target


def read_git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the work tree differs from it; None outside a git checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None, None
    if commit.returncode != 0:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


@dataclass
class RunningAttempt:
    """A started attempt; the trainer holds the lease as its stdin."""

    paths: RunPaths
    attempt: Attempt
    process: subprocess.Popen[bytes]
    lease: Lease
    stop_reason: str | None = None

    @property
    def files(self) -> AttemptPaths:
        """The files of this attempt."""
        return self.paths.attempt(self.attempt.number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to every process of the attempt: `accelerate launch` forwards none."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def finish(self) -> Failure | None:
        """Wait for the launcher, close the record and let go of the lease; None when the run is complete."""
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        self.signal_group(signal.SIGKILL)  # what the launcher may have left behind; its own id is not free yet
        status = self.process.wait()
        failure = None
        if load_result(self.paths) is None:
            failure = load_failure(self.files.failure_path)
            if self.stop_reason is not None:
                failure = Failure(kind="preempted", message=self.stop_reason)
            elif failure is None:
                failure = Failure(kind="lost", message=f"the trainer vanished (exit status {status}) without a word")
        close_attempt(self.paths, status, failure)
        self.lease.close()
        return failure


def start_attempt(
    recipe: Recipe, contents: Mapping[str, str], paths: RunPaths, command: LaunchCommand, num_processes: int
) -> RunningAttempt | None:
    """Start one attempt under the run's lease; None when somebody else runs it or has just completed it.

    Raises:
        RefusedError: the directory holds another experiment.
    """
    lease = take_lease(paths)
    if lease is None:
        return None
    try:
        prepare_run(recipe, contents, paths)
        if load_result(paths) is not None:
            lease.close()
            return None
        attempt = open_attempt(paths, command, num_processes, read_git_state())
        with paths.attempt(attempt.number).log_path.open("ab") as log:
            process = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.environment},
                stdin=lease.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
    except BaseException:
        lease.close()
        raise
    return RunningAttempt(paths, attempt, process, lease)


def stop_attempts(attempts: list[RunningAttempt], why: str) -> None:
    """End attempts: TERM to each process group, KILL to what is still there after a grace."""
    for attempt in attempts:
        attempt.stop_reason = why
        attempt.signal_group(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for attempt in attempts:
        pidfd = os.pidfd_open(attempt.process.pid)
        if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            attempt.signal_group(signal.SIGKILL)
        os.close(pidfd)
        attempt.finish()


def _die_with_parent() -> None:
    """In the child, before exec: SIGKILL when the thread that started it is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
