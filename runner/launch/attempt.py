"""One attempt of one run: takes the lease, opens the record, starts `accelerate launch`, closes the
record.

Owns everything that is written of a run under its lease on the launch side: before an attempt is
started, after it has ended, and when it is refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

from runner.checkpoints.choose import find_commits, look_ahead, read_inventory
from runner.checkpoints.marker import list_committed
from runner.errors import CorruptFileError, RefusedError, RunnerError, put_in_words
from runner.files import make_folder, open_to_append, remove_file, write_json_atomic
from runner.launch.command import LaunchCommand
from runner.launch.names import NamesOnHub
from runner.launch.outcome import end_log
from runner.launch.placement import name_cluster_job
from runner.launch.process import AttemptProcess, LauncherProcess
from runner.launch.provenance import read_provenance
from runner.launch.worker import ForkedProcess, Worker
from runner.plan.decide import Launch
from runner.plan.status import describe_change, find_differences, find_divisor, suggest_mending
from runner.processes import OWNER_VARIABLE, die_with_parent, kill_processes_of
from runner.project_folder import name_project
from runner.recipe.identity import (
    RULES,
    derive_digest,
    list_library_versions,
    look_again_at_versions,
)
from runner.recipe.parse import Recipe, derive_accumulation
from runner.run.facts import RunFacts, read_facts
from runner.run.failures import build_failure, explain_silence, read_log_tail
from runner.run.lease import ATTEMPT_VARIABLE, Lease, has_ranks, hold_launcher_lock, wait_for_ranks
from runner.run.manifest import find_damage, is_model_removed
from runner.run.paths import AttemptPaths, RunPaths, old_run_dir
from runner.run.record import (
    DETERMINISTIC_KINDS,
    Attempt,
    Failure,
    FailureKind,
    RunRecord,
    StopRequest,
    StoredRecipe,
    TrainResult,
    load_failure,
    load_progress,
    load_stop_request,
    now_utc,
    write_record,
)
from runner.secrets import scrub_json, scrub_log


def prepare_run(
    recipe: Recipe,
    contents: Mapping[str, str],
    facts: RunFacts,
    names: NamesOnHub | None = None,
    resume: str = "auto",
) -> None:
    """Write `recipe.json` of a run that is not complete; refuse a directory that holds another
    experiment. `names` finds what names on the hub stand for; None: nobody is asked. `resume` is
    `Attempt.resume`.

    The caller holds the lease, under which the facts were read. `contents` is whole.
    """
    paths = facts.paths
    has_checkpoints = bool(read_inventory(paths).kept)
    differences = find_differences(
        facts, recipe, contents, has_checkpoints=has_checkpoints, is_whole=True
    )
    if differences:
        shown = "\n".join(f"  {line}" for line in differences)
        raise RefusedError(
            f"{paths.run_dir} holds another experiment, {describe_change(differences)}:\n{shown}",
            hint=(
                "change the recipe back, give the new one another name, or move the old run aside"
                " with `runner launch RECIPE --fresh`"
            ),
        )
    if facts.is_result_lost:
        raise RefusedError(
            f"{paths.run_dir} is damaged: an attempt completed it, and {paths.result_path.name} is"
            " missing",
            hint=suggest_mending({paths.result_path.name: "is missing"}),
        )
    if facts.result is None:
        stored = facts.stored
        if stored is not None:
            recipe = stored.state_as_before(recipe)
        digest = derive_digest(recipe, contents)
        known = {} if stored is None else dict(stored.commits)
        if names is not None:
            known = names.settle(recipe, facts, find_commits(paths, resume, digest))
        content = StoredRecipe(
            recipe=_keep_first(recipe, facts),
            recipe_digest=digest,
            contents=dict(contents),
            rules=RULES,
            commits=known,
            project=name_project(Path.cwd(), paths.run_dir),
        )
        write_json_atomic(paths.recipe_path, content.model_dump(mode="json"))


def _keep_first(recipe: Recipe, facts: RunFacts) -> Recipe:
    """The recipe with what counts as it was when the first attempt was opened: the contrasts, since
    what is stated once something has run is no declaration, and where the model is pushed to.
    """
    if not facts.attempts:
        return recipe
    first = facts.stored.recipe if facts.stored is not None else None
    declared = first.run.declared if first is not None else ()
    update: dict[str, Any] = {"run": recipe.run.model_copy(update={"declared": declared})}
    if first is not None:
        update["tracking"] = first.tracking.copy_push(recipe.tracking)
    return recipe.model_copy(update=update)


def refuse_uncontinuable(
    launch: Launch, command: LaunchCommand, facts: RunFacts, divisor: int
) -> None:
    """Refuse what the trainer would refuse once it has started: to continue a checkpoint of another
    launch.

    The caller holds the lease, under which the facts were read, and has written nothing yet:
    `recipe.json` still says how the run was launched before.

    Raises:
        RefusedError: with what differs, and the ways out.
    """
    stored = facts.stored
    if stored is None:  # a new run
        return
    recipe = stored.state_as_before(launch.recipe)
    digest = derive_digest(recipe, launch.contents)
    if stored.digest_today != digest:  # another experiment, which is refused as such
        return
    threads = command.environment.get("OMP_NUM_THREADS")
    choice = look_ahead(
        read_inventory(facts.paths),
        recipe,
        digest,
        launch.num_processes,
        divisor=divisor,
        threads=threads,
        resume=launch.resume,
    )
    if choice.refusal is not None:
        raise choice.refusal


def open_attempt(
    launch: Launch,
    command: LaunchCommand,
    facts: RunFacts,
    divisor: int,
    git_state: tuple[str | None, bool | None],
    worker: Worker | None = None,
) -> Attempt:
    """Append an attempt to `run.json` and make its folder, before anything is started. The caller
    holds the lease, under which the facts were read.

    A request to stop an earlier attempt goes first, and what a kill left half written.
    """
    paths, attempts = facts.paths, facts.attempts
    remove_file(paths.stop_path)
    for leftover in paths.list_temporaries():
        leftover.unlink(missing_ok=True)
    for earlier in attempts:
        if earlier.ended_at_utc is None:  # its launcher was killed before it could do this
            with contextlib.suppress(OSError):
                scrub_log(paths.attempt(earlier.number).log_path)
    made_by = read_provenance()
    # A worker ends where versions or source change, so that the rest is its own, too.
    own_versions = {} if worker is None else worker.versions
    attempt = Attempt(
        number=attempts[-1].number + 1 if attempts else 1,
        started="cold" if worker is None else "warm",
        started_at_utc=now_utc(),
        command=command.argv,
        environment=scrub_json(dict(command.environment)),
        num_processes=launch.num_processes,
        host=socket.gethostname(),
        cluster_job=name_cluster_job(os.environ),
        resume=launch.resume,
        base=launch.base,
        is_repair=launch.is_repair,
        retry=launch.retry,
        micro_batch_divisor=divisor,
        devices={**os.environ, **command.environment}.get("CUDA_VISIBLE_DEVICES"),
        runs_per_gpu=command.runs_per_gpu,
        git_commit=git_state[0],
        git_is_dirty=git_state[1],
        runner_version=made_by.runner_version,
        runner_commit=made_by.runner_commit,
        runner_is_dirty=made_by.runner_is_dirty,
        source_hash=made_by.source_hash,
        versions={**made_by.versions, **own_versions},
        hardware=made_by.hardware,
    )
    make_folder(paths.attempt(attempt.number).attempt_dir)
    write_record(paths, RunRecord(attempts=(*attempts, attempt)))
    return attempt


def take_lease(paths: RunPaths) -> Lease | None:
    """The lease of a run, or None when somebody else holds it.

    Raises:
        RefusedError: a part of the run directory is a link: what is written there would be written
            elsewhere.
    """
    for path in (paths.run_dir, *_list_parts(paths)):
        if path.is_symlink():
            raise RefusedError(
                f"{path} is a link to {os.readlink(path)}: a run is one directory, for itself",
                hint="move what it leads to here, or choose another place with --output-root",
            )
    lease = Lease(paths.lease_path)
    if lease.try_acquire() and not has_ranks(paths):
        return lease
    lease.close()
    return None


def _list_parts(paths: RunPaths) -> list[Path]:
    return [
        path
        for folder in (paths.run_dir, paths.attempts_dir, paths.checkpoints_dir)
        for path in folder.glob("*")
    ]


def request_stop(paths: RunPaths, attempt: int, why: str, *, is_of_its_sweep: bool = False) -> None:
    """Ask an attempt to checkpoint at the end of its step and to leave; it need not be ours."""
    request = StopRequest(attempt=attempt, why=why, is_of_its_sweep=is_of_its_sweep)
    write_json_atomic(paths.stop_path, request.model_dump())


def close_attempt(facts: RunFacts, exit_status: int | None, failure: Failure | None) -> None:
    """Write the end of the last attempt. The caller holds the lease, under which the facts were
    read.
    """
    *earlier, last = facts.attempts
    closed = last.model_copy(
        update={"ended_at_utc": now_utc(), "exit_status": exit_status, "failure": failure}
    )
    write_record(facts.paths, RunRecord(attempts=(*earlier, closed)))


def move_aside(paths: RunPaths, target: Path | None = None) -> Path | None:
    """`--fresh`: rename the run directory to `target`, else to a free name in a hidden folder
    beside it; nothing is deleted. Returns the new name, None where there is nothing to move.

    The caller holds the lease.
    """
    if not paths.run_dir.exists() or set(paths.run_dir.iterdir()) <= {paths.lease_path}:
        return None  # never begun, or another process has just moved it aside
    number = 1
    while target is None or target.exists():
        target = old_run_dir(paths.run_dir, number)
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    paths.run_dir.rename(target)
    return target


def read_git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the work tree differs from it; None outside a git checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None, None
    if commit.returncode != 0:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


def name_owner(paths: RunPaths) -> str:
    """The run in `OWNER_VARIABLE`: its lease, because a container may have another run under the
    same path.
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
        self.was_asked_to_stop = was_asked_to_stop  # by somebody, not with the sweep that ran it
        self.attempts = facts.attempts
        self.files = facts.paths.attempt(facts.attempts[-1].number)


def refuse_what_failed_since(facts: RunFacts, num_attempts: int | None) -> None:
    """Refuse to repeat a failure that nobody has seen yet, and a run that somebody has stopped by
    itself; what was killed or stopped together with its sweep is free to go on.

    The caller holds the lease, under which the facts were read.

    Raises:
        FailedElsewhere: with how the last attempt failed.
    """
    attempts = facts.attempts
    if num_attempts is None or len(attempts) <= num_attempts:
        return
    last, request = attempts[-1], facts.stop_request
    is_asked = (
        request is not None and request.attempt == last.number and not request.is_of_its_sweep
    )
    failure = last.failure
    if failure is None and request is not None and is_asked:  # killed before it could leave
        failure = Failure(kind="preempted", message=request.why)
    if failure is not None and (is_asked or failure.kind != "preempted"):
        raise FailedElsewhere(failure, facts, was_asked_to_stop=is_asked)


_RANKS_SECONDS: Final = 10.0  # for the ranks on other machines to see that their launcher is gone


@dataclass
class RunningAttempt:
    """A started attempt; the trainer holds the lease as its stdin."""

    paths: RunPaths
    attempt: Attempt
    process: AttemptProcess
    lease: Lease
    owner: str  # of all its processes on this machine, in `OWNER_VARIABLE`
    launcher_lock: Lease | None = None  # of an attempt on several machines
    worker: Worker | None = None  # that was to fork it
    stop_reason: str | None = None
    stall: str | None = None  # why it was ended for want of a sign of life
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
        return self.stop_reason is not None or (
            request is not None and request.attempt == self.attempt.number
        )

    def request_stop(self, why: str) -> None:
        """Ask it to checkpoint at the end of its step and to leave, for its sweep leaves; a request
        by somebody else, which holds for every sweep, stays.
        """
        if not self.was_asked_to_leave():
            request_stop(self.paths, self.attempt.number, why, is_of_its_sweep=True)

    def kill(self, why: str) -> None:
        """End it now; the record will say why."""
        self.stop_reason = why
        self.process.signal_group(signal.SIGKILL)

    def kill_stalled(self, why: str) -> None:
        """End it now, because it hangs."""
        self.stall = why
        self.process.signal_group(signal.SIGKILL)

    def finish(self) -> Failure | None:
        """Wait for its process, close the record and let go of the lease; None when the run is
        complete.
        """
        try:
            status = self.process.wait()
            if self.launcher_lock is not None:
                self.launcher_lock.close()
                wait_for_ranks(self.paths, _RANKS_SECONDS)
            kill_processes_of(self.owner.__eq__)
            with contextlib.suppress(OSError):  # no room for a second copy of it
                scrub_log(self.files.log_path)
            facts = read_facts(self.paths, lease=self.lease)
            failure = self._find_failure(facts, status)
            if failure is not None:
                failure = failure.model_copy(
                    update={
                        "message": failure.message + self._tell_of_sharing(failure),
                        "log_tail": read_log_tail(self.files.log_path),
                    }
                )
                with contextlib.suppress(OSError):
                    step = _find_newest_step(self.paths)
                    end_log(self.files.log_path, self.attempt.number, failure, step)
            self._close(facts, status, failure)
        finally:
            self.lease.close()
        return failure

    def _tell_of_sharing(self, failure: Failure) -> str:
        """For a run that had no GPU to itself, what may have been in its way."""
        num_runs = self.attempt.runs_per_gpu
        if failure.kind != "out_of_memory" or num_runs == 1:
            return ""
        return (
            f"\nup to {num_runs} runs at a time shared the memory of GPU {self.attempt.devices}:"
            f" `--per-gpu {num_runs - 1}` leaves each of them more"
        )

    def _close(self, facts: RunFacts, exit_status: int | None, failure: Failure | None) -> None:
        try:
            close_attempt(facts, exit_status, failure)
        # The others go on; the next sweep sees by itself how it ended.
        except (OSError, CorruptFileError) as error:
            with contextlib.suppress(OSError):
                why = put_in_words(error)
                print(
                    f"warning: the end of {self.files.attempt_dir} is not recorded: {why}",
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
        # What a rank wrote when its peers were killed with it says less.
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
    """Start one attempt under the run's lease, from a worker that has begun or cold; None when
    somebody else has just completed it. `names` are those of the sweep.

    Raises:
        HeldElsewhere: somebody else runs it.
        FailedElsewhere: there was another attempt since, which failed or was asked to stop.
        RefusedError: the directory holds another experiment, the micro-batch cannot be divided, or
            a name on the hub stands for what the run may not load.
        OSError: the run cannot be prepared, or the launcher not be started.
    """
    recipe, paths = launch.recipe, launch.paths
    lease = take_lease(paths)
    if lease is None:
        raise HeldElsewhere
    look_again_at_versions()
    try:
        facts = read_facts(paths, lease=lease)
        divisor = launch.micro_batch_divisor or find_divisor(facts, recipe)
        derive_accumulation(recipe, launch.num_processes, divisor)
        if facts.result is None:
            refuse_uncontinuable(launch, command, facts, divisor)
        prepare_run(recipe, launch.contents, facts, names or NamesOnHub(), launch.resume)
        if launch.is_repair and facts.result is None:
            raise RefusedError(f"{paths.run_dir} is not completed any more: nothing to repair")
        if facts.result is not None and not launch.is_repair:
            lease.close()
            return None
        refuse_what_failed_since(facts, launch.num_attempts)
        owner = name_owner(paths)
        kill_processes_of(lambda value: value.rpartition(":")[0] == owner)  # what outlived a kill
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
    except CorruptFileError as error:  # its log is a folder, say
        failure = Failure(kind="configuration", message=error.message)
        close_attempt(read_facts(paths, lease=lease), 127, failure)
        raise
    except OSError as error:
        message = f"{command.argv[0]} cannot be started: {error}"
        is_absent = isinstance(error, FileNotFoundError | PermissionError)
        kind: FailureKind = "configuration" if is_absent else "transient"
        facts = read_facts(paths, lease=lease)
        close_attempt(facts, 127, Failure(kind=kind, message=message))
        if not is_absent:  # no memory or no process is free
            raise
        raise RunnerError(
            message, hint="pip install accelerate, into the Python that `runner` runs in"
        ) from None


def _fork(
    paths: RunPaths, lease: Lease, owner: str, log: BinaryIO, worker: Worker
) -> ForkedProcess | None:
    """None where the worker is gone or cannot fork, which ends it."""
    if said := worker.read_output():
        shown = "".join(f"  | {line}\n" for line in said.splitlines())
        log.write(f"while its worker imported the libraries:\n{shown}".encode())
        log.flush()
    try:
        return worker.fork(paths.run_dir, owner, lease.fileno(), log.fileno())
    except OSError as error:
        worker.end()  # and with it a child of which we have not heard
        log.write(f"starting cold, as its worker could not fork it: {error}\n".encode())
        log.flush()
        return None


def _record_cold(paths: RunPaths, lease: Lease) -> Attempt:
    """The open attempt, which the record says was forked, as one that was not."""
    *earlier, last = read_facts(paths, lease=lease).attempts
    versions = {**last.versions, **list_library_versions()}
    cold = last.model_copy(update={"started": "cold", "versions": versions})
    write_record(paths, RunRecord(attempts=(*earlier, cold)))
    return cold


def _start_launcher(
    attempt: Attempt, command: LaunchCommand, lease: Lease, owner: str, log: BinaryIO
) -> LauncherProcess:
    told = {OWNER_VARIABLE: owner}
    if command.spans_machines:
        told[ATTEMPT_VARIABLE] = str(attempt.number)
    return LauncherProcess(
        subprocess.Popen(
            command.argv,
            env={**command.derive_environment(os.environ), **told},
            stdin=lease.fileno(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    )
