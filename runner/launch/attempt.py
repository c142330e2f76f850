"""One attempt of one run: takes the lease, opens the record, starts `accelerate launch`, closes the
record.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final

from runner.checkpoints.marker import list_committed
from runner.errors import CorruptFileError, RefusedError, RunnerError, put_in_words
from runner.files import open_to_append
from runner.launch.command import LaunchCommand
from runner.launch.names import NamesOnHub
from runner.launch.outcome import end_log
from runner.launch.process import AttemptProcess, LauncherProcess
from runner.launch.provenance import read_git_state
from runner.launch.run_files import (
    close_attempt,
    open_attempt,
    prepare_run,
    refuse_unresumable,
    request_stop,
    take_lease,
)
from runner.launch.worker import ForkedProcess, Worker
from runner.plan.decide import Launch
from runner.plan.status import find_divisor
from runner.processes import (
    OWNER_VARIABLE,
    die_with_parent,
    has_ending_processes,
    kill_processes_of,
)
from runner.recipe.contents import list_changed
from runner.recipe.identity import (
    forget_versions,
    list_library_versions,
)
from runner.recipe.parse import derive_accumulation
from runner.run.facts import RunFacts, read_facts
from runner.run.failures import build_failure, explain_silence, read_log_tail
from runner.run.lease import (
    ATTEMPT_VARIABLE,
    Lease,
    hold_launcher_lock,
    is_leased,
    wait_for_ranks,
)
from runner.run.manifest import find_damage, is_model_removed
from runner.run.paths import AttemptPaths, RunPaths, content_cache_path
from runner.run.record import (
    DETERMINISTIC_KINDS,
    Attempt,
    Failure,
    FailureKind,
    RunRecord,
    load_failure,
    load_progress,
    load_stop_request,
    write_record,
)
from runner.run.result import TrainResult
from runner.secrets import scrub_log


def name_owner(paths: RunPaths) -> str:
    """The name of the run in `OWNER_VARIABLE`. It includes the lease, because a container may have
    another run under the same path.
    """
    lease = paths.lease_path.stat()
    return f"{lease.st_dev}.{lease.st_ino}@{paths.run_dir.resolve()}"


class HeldElsewhere(Exception):
    """Another process holds the lease of the run."""


class FailedElsewhere(Exception):
    """Another process ran this run after we planned it, and it failed or was asked to stop."""

    def __init__(self, failure: Failure, facts: RunFacts, *, was_asked_to_stop: bool) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.was_asked_to_stop = was_asked_to_stop  # by a user, not together with its sweep
        self.attempts = facts.attempts
        self.files = facts.paths.attempt(facts.attempts[-1].number)


def refuse_failed_since(facts: RunFacts, num_attempts: int | None) -> None:
    """Refuse a run that failed, or that a user stopped, after it was planned. A run that was killed
    or stopped together with its sweep is not refused.

    The caller holds the lease, under which the facts were read.

    Raises:
        FailedElsewhere: the last attempt failed or was stopped; has the failure.
    """
    attempts = facts.attempts
    if num_attempts is None or len(attempts) <= num_attempts:
        return
    last, request = attempts[-1], facts.stop_request
    is_asked = (
        request is not None and request.attempt == last.number and not request.is_of_its_sweep
    )
    failure = last.failure
    if failure is None and request is not None and is_asked:  # killed before it could exit
        failure = Failure(kind="preempted", message=request.why)
    if failure is not None and (is_asked or failure.kind != "preempted"):
        raise FailedElsewhere(failure, facts, was_asked_to_stop=is_asked)


_RANKS_SECONDS: Final = 10.0  # until ranks on other machines notice that their launcher is gone
_ENDING_SECONDS: Final = 30.0  # for a killed process to return its memory
_LOOK_SECONDS: Final = 0.02


@dataclass
class RunningAttempt:
    """A started attempt; the training process holds the lease as its stdin."""

    paths: RunPaths
    attempt: Attempt
    process: AttemptProcess
    lease: Lease
    owner: str  # of all its processes on this machine, in `OWNER_VARIABLE`
    launcher_lock: Lease | None = None  # of an attempt on several machines
    worker: Worker | None = None  # the one that was meant to fork it
    stop_reason: str | None = None
    stall: str | None = None  # the message, if it was killed because it showed no sign of life
    first_step: int = 0  # of the newest checkpoint when it was started

    @property
    def files(self) -> AttemptPaths:
        """The files of this attempt."""
        return self.paths.attempt(self.attempt.number)

    def has_made_steps(self) -> bool:
        """True if the training process has finished an optimizer step in this attempt."""
        progress = load_progress(self.files.progress_path)
        return progress is not None and progress.step > 0

    def has_newer_checkpoint(self) -> bool:
        """True if the run has a newer checkpoint than before this attempt."""
        return _find_newest_step(self.paths) > self.first_step

    def was_asked_to_stop(self) -> bool:
        """True if someone asked this attempt to stop, so it is not retried automatically."""
        request = load_stop_request(self.paths)
        return self.stop_reason is not None or (
            request is not None and request.attempt == self.attempt.number
        )

    def request_stop(self, why: str) -> None:
        """Ask it to checkpoint at the end of its step and exit, because its sweep exits. An earlier
        request by someone else applies to every sweep and is kept.
        """
        if not self.was_asked_to_stop():
            request_stop(self.paths, self.attempt.number, why, is_of_its_sweep=True)

    def kill(self, why: str) -> None:
        """Kill it; the record gets the reason."""
        self.stop_reason = why
        self.process.signal_group(signal.SIGKILL)

    def kill_stalled(self, why: str) -> None:
        """Kill it because it hangs."""
        self.stall = why
        self.process.signal_group(signal.SIGKILL)

    def finish(self) -> Failure | None:
        """Wait for its process, close the record and release the lease. Returns None if the run is
        complete.
        """
        try:
            status = self.process.wait()
            if self.launcher_lock is not None:
                self.launcher_lock.close()
                wait_for_ranks(self.paths, _RANKS_SECONDS)
            kill_processes_of(self.owner.__eq__)
            with contextlib.suppress(OSError):  # no space for a second copy of the log
                scrub_log(self.files.log_path)
            facts = read_facts(self.paths, lease=self.lease)
            failure = self._find_failure(facts, status)
            if failure is not None:
                failure = failure.model_copy(
                    update={
                        "message": failure.message + self._describe_sharing(failure),
                        "log_tail": read_log_tail(self.files.log_path),
                    }
                )
                with contextlib.suppress(OSError):
                    step = _find_newest_step(self.paths)
                    end_log(self.files.log_path, self.attempt.number, failure, step)
            self._close(facts, status, failure)
        finally:
            self.lease.close()
            self._wait_for_ending()
        return failure

    def _wait_for_ending(self) -> None:
        """Wait until processes of this attempt that are still ending have released the lease.

        A killed process first returns its memory, which takes seconds for many GiB, and then closes
        its files. Its environment is unreadable meanwhile, so `kill_processes_of` does not find it.
        Nobody waits here for another sweep that has already acquired the lease.
        """
        deadline = time.monotonic() + _ENDING_SECONDS
        with contextlib.suppress(OSError, CorruptFileError):  # the next attempt reports it
            while is_leased(self.paths.lease_path) and has_ending_processes():
                if time.monotonic() > deadline:
                    break
                time.sleep(_LOOK_SECONDS)

    def _describe_sharing(self, failure: Failure) -> str:
        """The part of an out-of-memory message about other runs on the same GPU; else empty."""
        num_runs = self.attempt.runs_per_gpu
        if failure.kind != "out_of_memory" or num_runs == 1:
            return ""
        return (
            f"\nup to {num_runs} runs at a time shared the memory of GPU {self.attempt.devices};"
            f" `--per-gpu {num_runs - 1}` leaves more for each"
        )

    def _close(self, facts: RunFacts, exit_status: int | None, failure: Failure | None) -> None:
        try:
            close_attempt(facts, exit_status, failure)
        # The other runs continue; the next sweep finds out itself how this one ended.
        except (OSError, CorruptFileError) as error:
            with contextlib.suppress(OSError):
                why = put_in_words(error)
                print(
                    f"warning: the end of {self.files.attempt_dir} was not recorded: {why}",
                    file=sys.stderr,
                )

    def _find_failure(self, facts: RunFacts, exit_status: int | None) -> Failure | None:
        try:
            result, stored = facts.result, facts.stored
            if (
                result is not None
                and stored is not None
                and result.recipe_digest == stored.recipe_digest
                and not (self.attempt.is_repair and _needs_repair(facts, result))
            ):
                return None
            failure = load_failure(self.files)
        except CorruptFileError as error:
            return Failure(kind="crashed", message=error.message)
        except OSError as error:
            return build_failure(error, self.paths.run_dir)
        if self.stop_reason is not None and (
            failure is None or failure.kind not in DETERMINISTIC_KINDS
        ):
            return Failure(kind="preempted", message=self.stop_reason)
        # A failure that a rank wrote while its peers were killed explains less than the stall.
        if self.stall is not None and (
            failure is None or failure.has_lost_peer or failure.kind in ("lost", "preempted")
        ):
            return Failure(kind="stalled", message=self.stall)
        return failure or explain_silence(self.files.log_path, exit_status)


def _needs_repair(facts: RunFacts, result: TrainResult) -> bool:
    manifest = result.files or {}
    is_removed = is_model_removed(manifest, facts.file_sizes)
    return is_removed or bool(find_damage(facts.paths, manifest))


def start_attempt(
    launch: Launch,
    command: LaunchCommand,
    worker: Worker | None = None,
    names: NamesOnHub | None = None,
) -> RunningAttempt | None:
    """Start one attempt under the run's lease, cold or from a worker that has begun. Returns None
    if another process has just completed the run. `names` are those of the sweep.

    Raises:
        HeldElsewhere: another process runs it.
        FailedElsewhere: another attempt since then failed or was asked to stop.
        RefusedError: the directory holds another experiment, files of the recipe changed since they
            were hashed, the micro-batch cannot be divided, or a name on the hub points to a commit
            that the run may not load.
        OSError: the run cannot be prepared, or the launcher cannot be started.
    """
    recipe, paths = launch.recipe, launch.paths
    lease = take_lease(paths)
    if lease is None:
        raise HeldElsewhere
    forget_versions()
    try:
        facts = read_facts(paths, lease=lease)
        divisor = launch.micro_batch_divisor or find_divisor(facts, recipe)
        derive_accumulation(recipe, launch.num_processes, divisor)
        if facts.result is None or launch.is_repair:
            _refuse_changed_inputs(launch)
        if facts.result is None:
            refuse_unresumable(launch, command, facts, divisor)
        prepare_run(recipe, launch.contents, facts, names or NamesOnHub(), launch.resume)
        if launch.is_repair and facts.result is None:
            raise RefusedError(f"{paths.run_dir} is no longer completed: nothing to repair")
        if facts.result is not None and not launch.is_repair:
            lease.close()
            return None
        refuse_failed_since(facts, launch.num_attempts)
        owner = name_owner(paths)
        # Kill processes that outlived an earlier attempt.
        kill_processes_of(lambda value: value.rpartition(":")[0] == owner)
        attempt = open_attempt(launch, command, facts, divisor, read_git_state(), worker)
        lock = hold_launcher_lock(paths.attempt(attempt.number)) if command.spans_machines else None
        owner = f"{owner}:{attempt.number}"
        attempt, process = _start_process(paths, attempt, command, lease, owner, worker)
    except BaseException:
        lease.close()
        raise
    return RunningAttempt(
        paths, attempt, process, lease, owner, lock, worker, first_step=_find_newest_step(paths)
    )


def _refuse_changed_inputs(launch: Launch) -> None:
    """Refuse to record hashes of files that changed after the run was planned, which may be days
    ago.
    """
    cache_path = content_cache_path(launch.paths.run_dir.parent.parent)
    changed = list_changed(launch.recipe, launch.contents, cache_path)
    if changed:
        shown = "\n".join(f"  {path} {what}" for path, what in changed.items())
        raise RefusedError(
            f"inputs of {launch.full_name} changed after it was planned:\n{shown}",
            hint="repeat the command: it reads the files again",
        )


def _say_removed(names: list[str]) -> bytes:
    line = f"removed from the environment of this attempt: {', '.join(names)}\n"
    return line.encode(errors="surrogateescape")


def _find_newest_step(paths: RunPaths) -> int:
    return max(list_committed(paths), default=0)


def _start_process(
    paths: RunPaths,
    attempt: Attempt,
    command: LaunchCommand,
    lease: Lease,
    owner: str,
    worker: Worker | None,
) -> tuple[Attempt, AttemptProcess]:
    try:
        with open_to_append(paths.attempt(attempt.number).log_path) as log:
            if removed := command.list_removed(os.environ):
                log.write(_say_removed(removed))
                log.flush()
            if worker is not None:
                if (process := _fork(paths, lease, owner, log, worker)) is not None:
                    return attempt, process
                attempt = _record_cold(paths, lease)
            return attempt, _start_launcher(attempt, command, lease, owner, log)
    except CorruptFileError as error:  # the log is a folder, for example
        failure = Failure(kind="configuration", message=error.message)
        close_attempt(read_facts(paths, lease=lease), 127, failure)
        raise
    except OSError as error:
        message = f"{command.argv[0]} cannot be started: {put_in_words(error)}"
        is_absent = isinstance(error, FileNotFoundError | PermissionError)
        kind: FailureKind = "configuration" if is_absent else "transient"
        facts = read_facts(paths, lease=lease)
        close_attempt(facts, 127, Failure(kind=kind, message=message))
        if not is_absent:  # no memory or no process is free
            raise
        raise RunnerError(
            message, hint="run `pip install accelerate` with the Python that runs `runner`"
        ) from None


def _fork(
    paths: RunPaths, lease: Lease, owner: str, log: BinaryIO, worker: Worker
) -> ForkedProcess | None:
    """The forked process; None if the worker is gone or cannot fork, in which case it is ended."""
    if said := worker.read_output():
        shown = "".join(f"  | {line}\n" for line in said.splitlines())
        log.write(f"while its worker imported the libraries:\n{shown}".encode())
        log.flush()
    try:
        return worker.fork(paths.run_dir, owner, lease.fileno(), log.fileno())
    except OSError as error:
        worker.end()  # also ends a child that it may have forked without an answer
        log.write(f"starting cold, because its worker could not fork it: {error}\n".encode())
        log.flush()
        return None


def _record_cold(paths: RunPaths, lease: Lease) -> Attempt:
    """Rewrite the open attempt, recorded as forked, as a cold start; returns it."""
    *earlier, last = read_facts(paths, lease=lease).attempts
    versions = {**last.versions, **list_library_versions()}
    cold = last.model_copy(update={"started": "cold", "versions": versions})
    write_record(paths, RunRecord(attempts=(*earlier, cold)))
    return cold


def _start_launcher(
    attempt: Attempt, command: LaunchCommand, lease: Lease, owner: str, log: BinaryIO
) -> LauncherProcess:
    variables = {OWNER_VARIABLE: owner}
    if command.spans_machines:
        variables[ATTEMPT_VARIABLE] = str(attempt.number)
    return LauncherProcess(
        subprocess.Popen(
            command.argv,
            env={**command.derive_environment(os.environ), **variables},
            stdin=lease.fileno(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    )
