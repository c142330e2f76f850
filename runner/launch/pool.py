"""Runs several attempts at a time on this machine: when one starts, on which slot or GPUs and from
which worker, and the retries of failed runs.

One attempt is `launch.attempt`.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError, RunnerError
from runner.launch.attempt import FailedElsewhere, RunningAttempt, start_attempt
from runner.launch.command import LaunchCommand, Placement, build_launch_command
from runner.launch.display import SweepDisplay
from runner.launch.names import NamesOnHub
from runner.launch.placement import Allocation, Devices
from runner.launch.stall import Silence, StallWatch
from runner.launch.worker import Worker
from runner.launch.workers import Workers
from runner.plan.decide import Launch, decide_retry
from runner.processes import StopSignals
from runner.run.failures import build_failure
from runner.run.record import Failure, load_stop_request

STOPPED: Final = 130  # by Ctrl-C or another signal, as shells count it

_REFRESH_SECONDS: Final = 0.5


@dataclass(frozen=True)
class FailedRun:
    """A run that did not complete; without a log it was never started."""

    name: str
    failure: Failure
    log_path: Path | None


@dataclass(frozen=True)
class Later:
    """A run that waits for its retry, and what it failed of."""

    run: Launch
    due_at: float  # `time.monotonic`
    failed: FailedRun


@dataclass
class PoolResult:
    """How the planned runs ended, by name: the last attempt of each counts, not those that were
    retried.
    """

    completed: list[str] = field(default_factory=list)
    failed: list[FailedRun] = field(default_factory=list)
    # Taken over or finished by another sweep meanwhile.
    elsewhere: list[str] = field(default_factory=list)
    not_started: list[str] = field(default_factory=list)  # after `--fail-fast` or a signal
    stopped_by: int | None = None  # the signal that ended the sweep before everything was done


def run_planned(
    planned: list[Launch],
    *,
    num_slots: int,
    gpus: list[str] | None,
    fail_fast: bool,
    allocation: Allocation | None = None,
    again: str = "the same command",
    uses_workers: bool = False,
) -> PoolResult:
    """How the runs ended; failures are printed. `again` is what goes on with them after a stop;
    `uses_workers` forks what can be forked.
    """
    if not planned:
        print("nothing to launch", file=sys.stderr)
        return PoolResult()
    with SweepDisplay(len(planned)) as display:
        devices = Devices(num_slots, gpus, allocation)
        result = run_pool(planned, devices, display, fail_fast=fail_fast, uses_workers=uses_workers)
    _print_failures(result)
    if result.stopped_by is not None:
        print(f"stopped; {again} goes on from the newest checkpoints", file=sys.stderr)
    return result


def _print_failures(result: PoolResult) -> None:
    for failed in result.failed:
        what = "left" if failed.failure.kind == "preempted" else "failed"
        print(
            f"\n{failed.name} {what}, {failed.failure.kind}: {failed.failure.message}",
            file=sys.stderr,
        )
        if failed.log_path is None:
            continue
        if failed.failure.kind in ("crashed", "lost", "stalled", "transient", "out_of_memory"):
            print("\n".join(f"  | {line}" for line in failed.failure.log_tail), file=sys.stderr)
        print(f"  log: {failed.log_path}", file=sys.stderr)
    if result.not_started and result.stopped_by is None:
        print(
            f"{len(result.not_started)} runs were not started because of --fail-fast",
            file=sys.stderr,
        )


def run_pool(
    planned: list[Launch],
    devices: Devices,
    display: SweepDisplay,
    *,
    fail_fast: bool = False,
    uses_workers: bool = False,
) -> PoolResult:
    """Run everything that is planned, as many at a time as there is room.

    The first signal asks what runs to checkpoint and to leave, a second one ends it at once;
    nothing more is started.

    All attempts are ended and recorded, also after an exception.
    """
    devices.check(planned)
    with StopSignals() as signals, selectors.DefaultSelector() as selector:
        selector.register(signals.fileno(), selectors.EVENT_READ)
        workers = Workers(display.say, are_wanted=uses_workers)
        pool = _Pool(list(planned), devices, display, fail_fast, selector, signals, workers)
        try:
            while not signals.received and pool.has_work():
                pool.take_up_due()
                pool.wait(is_in_a_hurry=pool.start_next())
            if signals.received:
                pool.leave(
                    f"the runner was stopped by {signal.Signals(signals.received[0]).name}",
                    num_signals=1,
                )
        except BaseException as error:
            pool.leave(f"the runner ended by {error!r}", num_signals=len(signals.received))
            raise
        finally:
            pool.close()
    pool.result.not_started += [run.full_name for run in pool.waiting]
    if signals.received and (pool.waiting or pool.result.failed):  # else it came when all was done
        pool.result.stopped_by = signals.received[0]
    return pool.result


@dataclass
class _Pool:
    """What waits, what runs (by the descriptor that tells of its end) and what became of the
    rest.
    """

    waiting: list[Launch]
    devices: Devices
    display: SweepDisplay
    fail_fast: bool
    selector: selectors.BaseSelector
    signals: StopSignals
    workers: Workers
    # With the worker that it waits for, by the worker's socket.
    starting: dict[int, tuple[Launch, LaunchCommand, Worker, Placement]] = field(
        default_factory=dict
    )
    active: dict[int, tuple[Launch, RunningAttempt, Placement]] = field(default_factory=dict)
    watches: dict[int, StallWatch] = field(default_factory=dict)  # over what is active
    later: list[Later] = field(default_factory=list)
    failures: dict[str, list[Failure]] = field(default_factory=dict)  # in a row, of each run
    result: PoolResult = field(default_factory=PoolResult)
    names: NamesOnHub = field(default_factory=NamesOnHub)

    def has_work(self) -> bool:
        """True while anything runs, or still has to."""
        return bool(self.starting or self.active or self.later) or self.wants_to_start()

    def wants_to_start(self) -> bool:
        return bool(self.waiting) and not self.is_given_up()

    def is_given_up(self) -> bool:
        return self.fail_fast and any(
            failed.failure.kind != "preempted" for failed in self.result.failed
        )

    def take_up_due(self) -> None:
        """Put the runs whose time to wait is over in front of those that never began."""
        now = time.monotonic()
        ended = [one for one in self.later if self.is_given_up() or _is_stopped(one)]
        due = [one for one in self.later if one.due_at <= now and one not in ended]
        self.later = [one for one in self.later if one not in ended and one not in due]
        for one in ended:
            self._record(one.failed)
        self.waiting[:0] = [one.run for one in due]

    def pause_seconds(self) -> float:
        """How long nothing has to be done but to draw."""
        now = time.monotonic()
        return max(0.0, min([_REFRESH_SECONDS, *(one.due_at - now for one in self.later)]))

    def start_next(self) -> bool:
        """Start the next run if there is room; True when it is worth trying again at once."""
        placement = (
            self.devices.take(self.waiting[0].num_processes) if self.wants_to_start() else None
        )
        if placement is None:
            return False
        run = self.waiting.pop(0)
        try:
            command = build_command(run, placement)
        except RunnerError as error:
            self._record_refused(run, error)
            self.devices.give_back(placement)
            return True
        key = self.workers.find_key(run, command)
        worker = None if key is None else self.workers.take(key)
        if key is not None and worker is None:
            worker = self.workers.start(key, command)
            if worker is not None:
                self.starting[worker.fileno()] = (run, command, worker, placement)
                self.selector.register(worker, selectors.EVENT_READ, data=worker)
                return True
        self._begin(run, command, placement, worker)
        return True

    def _hear(self, worker: Worker) -> None:
        """A worker has imported everything, or never will: start the run that waited for it."""
        self.selector.unregister(worker)
        run, command, _, placement = self.starting.pop(worker.fileno())
        is_fit = self.workers.begin(worker)
        self._begin(run, command, placement, worker if is_fit else None)

    def _end_starting(self) -> None:
        """End the workers that import, and let the runs that wait for them wait for a place."""
        for descriptor, (run, _, worker, placement) in self.starting.items():
            self.selector.unregister(descriptor)
            worker.end()
            self.devices.give_back(placement)
            self.waiting.append(run)
        self.starting = {}

    def _begin(
        self, run: Launch, command: LaunchCommand, placement: Placement, worker: Worker | None
    ) -> None:
        """Start a run at a placement; where that cannot be, decide what becomes of it."""
        attempt = self._start(run, command, worker)
        if attempt is None:
            self.devices.give_back(placement)
            self._keep(worker)
            return
        self._keep(None)
        pidfd = attempt.process.open_pidfd()
        self.active[pidfd] = (run, attempt, placement)
        self.watches[pidfd] = self._watch(run, attempt)
        self.selector.register(pidfd, selectors.EVENT_READ)

    def _start(
        self, run: Launch, command: LaunchCommand, worker: Worker | None
    ) -> RunningAttempt | None:
        try:
            attempt = start_attempt(run, command, worker, self.names)
        except FailedElsewhere as error:
            message = f"(by another sweep) {error.failure.message}"
            failure = error.failure.model_copy(update={"message": message})
            self._record(FailedRun(run.full_name, failure, error.files.log_path))
            return None
        except RunnerError as error:
            self._record_refused(run, error)
            return None
        # No space, no permission: this run's directory may be the only one like that.
        except OSError as error:
            failure = build_failure(error, run.paths.run_dir)
            self._retry_or_record(run, FailedRun(run.full_name, failure, None), None)
            return None
        if attempt is None and run.retry > 0 and not run.paths.result_path.exists():
            # A machine out of reach, say: its locks are not free yet.
            held = Failure(
                kind="transient",
                message="processes of an earlier attempt, or another sweep, hold the run",
            )
            self._retry_or_record(run, FailedRun(run.full_name, held, None), None)
        elif attempt is None:
            self.result.elsewhere.append(run.full_name)
            self.display.finished(run.full_name, "run or finished by another sweep")
        return attempt

    def _keep(self, worker: Worker | None) -> None:
        """Give back a worker that has nothing to do, and end those that nobody needs any more."""
        if worker is not None:
            self.workers.give_back(worker)
        waiting = (
            [*self.waiting, *(one.run for one in self.later)] if not self.is_given_up() else []
        )
        self.workers.end_unneeded(waiting)

    def _watch(self, run: Launch, attempt: RunningAttempt) -> StallWatch:
        minutes = run.recipe.launch.stall_minutes
        return StallWatch(
            attempt.files,
            attempt.owner.__eq__,
            lambda line: self.display.say(f"{run.full_name}  {line}"),
            attempt.kill_stalled,
            Silence(None if minutes is None else 60 * minutes, time.monotonic(), None),
        )

    def wait(self, *, is_in_a_hurry: bool = False) -> None:
        """Until something ends, a signal comes, or it is time to show where the runs stand."""
        for key, _ in self.selector.select(0 if is_in_a_hurry else self.pause_seconds()):
            if key.fd == self.signals.fileno():
                self.signals.drain()
            elif isinstance(key.data, Worker):
                if not self.is_given_up():
                    self._hear(key.data)
            else:
                self.finish(key.fd)
        now = time.monotonic()
        for worker in [one for _, _, one, _ in self.starting.values() if one.is_overdue(now)]:
            self._hear(worker)
        if self.is_given_up():
            self._end_starting()
        for watch in self.watches.values():
            watch.look(now)
        waiting = {
            one.run.full_name: f"is tried again in {max(0.0, one.due_at - now):.0f} s"
            for one in self.later
        }
        waiting |= {
            run.full_name: "waits for a worker, which imports libraries"
            for run, *_ in self.starting.values()
        }
        self.display.update(
            {run.full_name: attempt.files for run, attempt, _ in self.active.values()},
            waiting,
            {
                run.full_name: self.watches[pidfd].silence.seconds
                for pidfd, (run, _, _) in self.active.items()
            },
        )

    def leave(self, why: str, *, num_signals: int) -> None:
        """Ask what runs to checkpoint and to leave, and wait; any signal beyond `num_signals` ends
        it at once.
        """
        self._end_starting()
        self.waiting += [one.run for one in self.later]
        self.later = []
        attempts = [attempt for _, attempt, _ in self.active.values()]
        for attempt in attempts:
            try:
                attempt.request_stop(why)
            except (CorruptFileError, OSError):  # no space, or a folder has its name
                attempt.kill(why)
        if attempts:
            runs = "1 run" if len(attempts) == 1 else f"{len(attempts)} runs"
            self.display.say(
                f"stopping: waiting for {runs} to checkpoint and leave;"
                " a second Ctrl-C ends them at once"
            )
        while self.active:
            if len(self.signals.received) > num_signals:
                num_signals = len(self.signals.received)
                for _, attempt, _ in self.active.values():
                    attempt.kill(
                        f"{why}, and at once by {signal.Signals(self.signals.received[-1]).name}"
                    )
            self.wait()

    def finish(self, pidfd: int) -> None:
        """Close the record of a run whose process has ended."""
        self.selector.unregister(pidfd)
        os.close(pidfd)
        run, attempt, placement = self.active.pop(pidfd)
        del self.watches[pidfd]
        failure = attempt.finish()
        self.devices.give_back(placement)
        if failure is not None:
            self._retry_or_record(
                run, FailedRun(run.full_name, failure, attempt.files.log_path), attempt
            )
        else:
            self.result.completed.append(run.full_name)
            self.display.finished(run.full_name, "repaired" if run.is_repair else "completed")
        self._keep(attempt.worker)

    def close(self) -> None:
        """Let go of the workers, and of what watches the processes."""
        self.workers.close()
        for pidfd in self.active:
            os.close(pidfd)

    def _retry_or_record(
        self, run: Launch, failed: FailedRun, attempt: RunningAttempt | None
    ) -> None:
        failures = self.failures.setdefault(run.full_name, [])
        # A run of weeks may lose its network once a day.
        if attempt is not None and attempt.has_gone_on():
            failures[:] = [failure for failure in failures if failure.kind == "out_of_memory"]
        failures.append(failed.failure)
        has_made_steps = attempt is not None and attempt.has_made_steps()
        retry = None
        if attempt is None or not attempt.was_asked_to_leave():
            retry = decide_retry(
                run.recipe,
                failures,
                num_processes=run.num_processes,
                micro_batch_divisor=(
                    attempt.attempt.micro_batch_divisor if attempt else run.micro_batch_divisor or 1
                ),
                has_made_steps=has_made_steps,
            )
        if retry is None:
            self._record(failed)
            return
        again = replace(
            run,
            resume=_resume_again(run.resume, failed.failure, has_made_steps=has_made_steps),
            retry=retry.number,
            micro_batch_divisor=retry.micro_batch_divisor if attempt else run.micro_batch_divisor,
            num_attempts=attempt.attempt.number if attempt else None,
        )
        self.later.append(Later(again, time.monotonic() + retry.delay_seconds, failed))
        first_line = failed.failure.message.partition("\n")[0]
        self.display.retried(run.full_name, f"{failed.failure.kind}: {first_line}; {retry.why}")

    def _record_refused(self, run: Launch, error: RunnerError) -> None:
        failure = Failure(kind="configuration", message=str(error))
        self._record(FailedRun(run.full_name, failure, None))

    def _record(self, failed: FailedRun) -> None:
        self.result.failed.append(failed)
        first_line = failed.failure.message.partition("\n")[0]
        self.display.finished(failed.name, f"{failed.failure.kind}: {first_line}")


def _is_stopped(one: Later) -> bool:
    """Whether `runner stop` asked, while the run waited, for no further attempt."""
    request = load_stop_request(one.run.paths)
    return request is not None and request.attempt == one.run.num_attempts


def _resume_again(resume: str, failure: Failure, *, has_made_steps: bool) -> str:
    """`Attempt.resume` of a retry: what was asked for is asked for again until it was done."""
    if resume == "none" or failure.kind == "out_of_memory":
        return "none"  # what lies in remote storage is of another micro-batch
    return "auto" if has_made_steps else resume


def build_command(run: Launch, placement: Placement) -> LaunchCommand:
    """The command of one planned run at a placement."""
    return build_launch_command(
        run.recipe, run.paths.run_dir, placement, path=os.environ.get("PATH", os.defpath)
    )
