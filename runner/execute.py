"""One attempt of one run: takes the lease, opens the record, starts `accelerate launch`, closes the record."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from runner.attempts import (
    close_attempt,
    name_owner,
    open_attempt,
    prepare_run,
    read_git_state,
    refuse_uncontinuable,
    refuse_what_failed_since,
    request_stop,
    take_lease,
)
from runner.errors import CorruptFileError, RunnerError
from runner.failures import build_failure, explain_silence, read_log_tail
from runner.fsio import Lease
from runner.launch import LaunchCommand
from runner.log_scrubbing import scrub_log
from runner.markers import list_committed
from runner.paths import AttemptPaths, RunPaths
from runner.processes import OWNER_VARIABLE, die_with_parent, kill_processes_of
from runner.ranks import ATTEMPT_VARIABLE, hold_launcher_lock, wait_for_ranks
from runner.recipe import Recipe, derive_accumulation
from runner.record import (
    DETERMINISTIC_KINDS,
    Attempt,
    Failure,
    load_failure,
    load_progress,
    load_result,
    load_stop_request,
    load_stored_recipe,
)
from runner.status import find_divisor

_RANKS_SECONDS: Final = 10.0  # for the ranks on other machines to see that their launcher is gone


@dataclass
class RunningAttempt:
    """A started attempt; the trainer holds the lease as its stdin."""

    paths: RunPaths
    attempt: Attempt
    process: subprocess.Popen[bytes]
    lease: Lease
    owner: str  # of all its processes on this machine, in `OWNER_VARIABLE`
    launcher_lock: Lease | None = None  # of an attempt on several machines
    stop_reason: str | None = None
    first_step: int = 0  # of the newest checkpoint when it was started

    @property
    def files(self) -> AttemptPaths:
        """The files of this attempt."""
        return self.paths.attempt(self.attempt.number)

    def has_made_steps(self) -> bool:
        """Whether the trainer has finished an optimizer step in this attempt."""
        progress = load_progress(self.files.progress_path)
        return progress is not None and progress.step > 0

    def has_gone_on(self) -> bool:
        """Whether the run has a newer checkpoint than before this attempt."""
        return _find_newest_step(self.paths) > self.first_step

    def was_asked_to_leave(self) -> bool:
        """Whether somebody wants this attempt to end, so that no other follows by itself."""
        request = load_stop_request(self.paths)
        return self.stop_reason is not None or (request is not None and request.attempt == self.attempt.number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the launcher and what is in its session; the ranks of several processes are not."""
        if self.process.returncode is None:  # once it is reaped, its id may be somebody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def request_stop(self, why: str) -> None:
        """Ask it to checkpoint at the end of its step and to leave."""
        request_stop(self.paths, self.attempt.number, why)

    def kill(self, why: str) -> None:
        """End it now; the record will say why."""
        self.stop_reason = why
        self.signal_group(signal.SIGKILL)

    def finish(self) -> Failure | None:
        """Wait for the launcher, close the record and let go of the lease; None when the run is complete."""
        try:
            if self.process.returncode is None:
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
                self.signal_group(signal.SIGKILL)  # what the launcher may have left; its own id is not free yet
            status = self.process.wait()
            if self.launcher_lock is not None:
                self.launcher_lock.close()
                wait_for_ranks(self.paths, _RANKS_SECONDS)
            kill_processes_of(self.owner.__eq__)
            with contextlib.suppress(OSError):  # no room for a second copy of it
                scrub_log(self.files.log_path)
            failure = self._find_failure(status)
            if failure is not None:
                failure = failure.model_copy(update={"log_tail": read_log_tail(self.files.log_path)})
            self._close(status, failure)
        finally:
            self.lease.close()
        return failure

    def _close(self, exit_status: int, failure: Failure | None) -> None:
        try:
            close_attempt(self.paths, exit_status, failure)
        except (OSError, CorruptFileError) as error:  # the others go on; the next sweep sees by itself how it ended
            with contextlib.suppress(OSError):
                print(f"warning: the end of {self.files.attempt_dir} is not recorded: {error}", file=sys.stderr)

    def _find_failure(self, exit_status: int) -> Failure | None:
        try:
            result, stored = load_result(self.paths), load_stored_recipe(self.paths)
            if result is not None and stored is not None and result.recipe_digest == stored.recipe_digest:
                return None
            failure = load_failure(self.files)
        except CorruptFileError as error:
            return Failure(kind="crashed", message=error.message)
        except OSError as error:
            return build_failure(error, self.paths.run_dir)
        if self.stop_reason is not None and (failure is None or failure.kind not in DETERMINISTIC_KINDS):
            return Failure(kind="preempted", message=self.stop_reason)
        return failure or explain_silence(self.files.log_path, exit_status)


def start_attempt(
    recipe: Recipe,
    contents: Mapping[str, str],
    paths: RunPaths,
    command: LaunchCommand,
    num_processes: int,
    resume: str = "auto",
    retry: int = 0,
    micro_batch_divisor: int | None = None,
    num_attempts: int | None = None,
) -> RunningAttempt | None:
    """Start one attempt under the run's lease; None when somebody else runs it or has just completed it.

    `micro_batch_divisor` is that of the last attempt where it is None. `num_attempts` is how many there were when this
    one was decided upon.

    Raises:
        FailedElsewhere: there was another attempt since, which failed.
        RefusedError: the directory holds another experiment, or the micro-batch cannot be divided.
        OSError: the run cannot be prepared, or the launcher not be started.
    """
    lease = take_lease(paths)
    if lease is None:
        return None
    try:
        divisor = micro_batch_divisor or find_divisor(paths, recipe)
        derive_accumulation(recipe, num_processes, divisor)
        if load_result(paths) is None:
            refuse_uncontinuable(recipe, contents, paths, command, num_processes, resume, divisor)
        prepare_run(recipe, contents, paths)
        if load_result(paths) is not None:
            lease.close()
            return None
        refuse_what_failed_since(paths, num_attempts)
        owner = name_owner(paths)
        kill_processes_of(lambda value: value.rpartition(":")[0] == owner)  # what outlived a kill
        attempt = open_attempt(paths, command, num_processes, read_git_state(), resume, retry, divisor)
        lock = hold_launcher_lock(paths.attempt(attempt.number)) if command.spans_machines else None
        owner = f"{owner}:{attempt.number}"
        process = _start_launcher(paths, attempt, command, lease, owner)
    except BaseException:
        lease.close()
        raise
    return RunningAttempt(paths, attempt, process, lease, owner, lock, first_step=_find_newest_step(paths))


def _find_newest_step(paths: RunPaths) -> int:
    return max(list_committed(paths), default=0)


def _start_launcher(
    paths: RunPaths, attempt: Attempt, command: LaunchCommand, lease: Lease, owner: str
) -> subprocess.Popen[bytes]:
    told = {OWNER_VARIABLE: owner}
    if command.spans_machines:
        told[ATTEMPT_VARIABLE] = str(attempt.number)
    try:
        with paths.attempt(attempt.number).log_path.open("ab") as log:
            return subprocess.Popen(
                command.argv,
                env={**os.environ, **command.environment, **told},
                stdin=lease.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
    except OSError as error:
        message = f"{command.argv[0]} cannot be started: {error}"
        is_absent = isinstance(error, FileNotFoundError | PermissionError)
        close_attempt(paths, 127, Failure(kind="configuration" if is_absent else "transient", message=message))
        if not is_absent:  # no memory or no process is free
            raise
        raise RunnerError(message, hint="pip install accelerate, into the Python that `runner` runs in") from None
