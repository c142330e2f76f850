"""Runs several attempts at a time on this machine: decides when each one starts, on which slot or
GPUs and from which worker, and retries failed runs.

`launch.attempt` runs one attempt.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from runner.errors import CorruptFileError, RunnerError
from runner.launch.attempt import FailedElsewhere, HeldElsewhere, RunningAttempt, start_attempt
from runner.launch.command import LaunchCommand, Placement, build_launch_command
from runner.launch.display import SweepDisplay
from runner.launch.held import HeldRuns
from runner.launch.names import NamesOnHub
from runner.launch.outcome import FailedRun, PoolResult, print_failures, print_stop
from runner.launch.placement import Allocation, Devices
from runner.launch.pushes import Pushes, RunningPush
from runner.launch.stall import Silence, StallWatch
from runner.launch.worker import Worker
from runner.launch.workers import Workers
from runner.plan.decide import Launch, Retry, decide_retry, foresee_retry
from runner.plan.select import Selected
from runner.processes import StopSignals
from runner.run.failures import build_failure
from runner.run.record import Attempt, Failure, load_stop_request
from runner.text import format_count

STOPPED: Final = 130  # exit code after Ctrl-C or another signal, as in shells

_REFRESH_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Later:
    """A run that waits for its retry, with its failure."""

    run: Launch
    due_at: float  # `time.monotonic`
    failed: FailedRun


def run_planned(
    planned: list[Launch],
    *,
    num_slots: int,
    gpus: Sequence[str] | None,
    fail_fast: bool,
    per_gpu: int = 1,
    allocation: Allocation | None = None,
    again: str = "the same command",
    uses_workers: bool = False,
    awaits_held: bool = False,
    to_push: Sequence[Selected] = (),
) -> PoolResult:
    """Run everything; returns how the runs ended, and prints those that are not done.

    `again` is the command that runs the rest after a stop. `uses_workers` forks the runs that can
    be forked. `awaits_held` starts runs that another sweep holds once they are free. The models of
    the completed runs `to_push` are pushed meanwhile.
    """
    if not planned and not to_push:
        print("nothing to launch", file=sys.stderr)
        return PoolResult()
    with SweepDisplay(len(planned)) as display:
        devices = Devices(num_slots, gpus, allocation, per_gpu)
        result = run_pool(
            planned,
            devices,
            display,
            fail_fast=fail_fast,
            uses_workers=uses_workers,
            awaits_held=awaits_held,
            to_push=to_push,
        )
    print_failures(result)
    print_stop(result, again)
    return result


def run_pool(
    planned: list[Launch],
    devices: Devices,
    display: SweepDisplay,
    *,
    fail_fast: bool = False,
    uses_workers: bool = False,
    awaits_held: bool = False,
    to_push: Sequence[Selected] = (),
) -> PoolResult:
    """Run all planned runs, as many at a time as there is room for.

    The first signal asks the running ones to checkpoint and exit, a second one kills them; no more
    runs are started.

    All attempts are ended and recorded, even after an exception.
    """
    devices.check(planned)
    with StopSignals() as signals, selectors.DefaultSelector() as selector:
        selector.register(signals.fileno(), selectors.EVENT_READ)
        workers = Workers(display.say, are_wanted=uses_workers)
        pushes = Pushes(display.say, display.pushed, selector, awaits_held=awaits_held)
        pool = _Pool(
            list(planned), devices, display, fail_fast, awaits_held, selector, signals, workers,
            pushes,
        )  # fmt: skip
        try:
            for one in to_push:
                pushes.add(one)
            while not signals.received and pool.has_work():
                pool.queue_due_runs()
                pool.wait(is_urgent=pool.start_next())
            if signals.received:
                pool.leave(
                    f"the runner was stopped by {signal.Signals(signals.received[0]).name}",
                    num_signals=1,
                )
        except BaseException as error:
            pool.leave(f"the runner ended with {error!r}", num_signals=len(signals.received))
            raise
        finally:
            pool.close()
    result = pool.result
    result.not_started += pool.waiting
    result.held += pool.held.runs.values()
    # Otherwise the signal came after everything was done.
    is_left = result.not_started or result.held or result.failed or pushes.was_ended
    if signals.received and is_left:
        result.stopped_by = signals.received[0]
    return result


@dataclass
class _Pool:
    """The waiting runs, the active ones (by the descriptor that becomes readable at their end), and
    the results of the others.
    """

    waiting: list[Launch]
    devices: Devices
    display: SweepDisplay
    fail_fast: bool
    awaits_held: bool
    selector: selectors.BaseSelector
    signals: StopSignals
    workers: Workers
    pushes: Pushes
    # Runs with the worker that each waits for, by the worker's socket.
    starting: dict[int, tuple[Launch, LaunchCommand, Worker, Placement]] = field(
        default_factory=dict
    )
    active: dict[int, tuple[Launch, RunningAttempt, Placement]] = field(default_factory=dict)
    watches: dict[int, StallWatch] = field(default_factory=dict)  # of the active attempts
    later: list[Later] = field(default_factory=list)
    held: HeldRuns = field(default_factory=HeldRuns)  # by another sweep
    failures: dict[str, list[Failure]] = field(default_factory=dict)  # consecutive ones, by run
    result: PoolResult = field(default_factory=PoolResult)
    names: NamesOnHub = field(default_factory=NamesOnHub)

    def has_work(self) -> bool:
        """True while anything runs or still has to run."""
        is_any_left = bool(self.starting or self.active or self.later) or self.pushes.has_work()
        return is_any_left or self.has_runs_to_start()

    def has_runs_to_start(self) -> bool:
        return bool(self.waiting or self.held) and not self.is_given_up()

    def is_given_up(self) -> bool:
        return self.fail_fast and any(
            failed.failure.kind != "preempted" for failed in self.result.failed
        )

    def queue_due_runs(self) -> None:
        """Put runs whose retry is due, or whose lease is free again, ahead of those that never
        started.
        """
        now = time.monotonic()
        ended = [one for one in self.later if self.is_given_up() or _is_stopped(one)]
        due = [one for one in self.later if one.due_at <= now and one not in ended]
        self.later = [one for one in self.later if one not in ended and one not in due]
        for one in ended:
            self._record(one.failed)
        self.waiting[:0] = [*(one.run for one in due), *self.held.take_free()]

    def pause_seconds(self) -> float:
        """Seconds during which only the display needs updates."""
        now = time.monotonic()
        return max(0.0, min([_REFRESH_SECONDS, *(one.due_at - now for one in self.later)]))

    def start_next(self) -> bool:
        """Start the next run if there is room; True if it is worth trying again immediately."""
        placement = (
            self.devices.take(self.waiting[0].num_processes)
            if self.waiting and self.has_runs_to_start()
            else None
        )
        if placement is None:
            return False
        run = self.waiting.pop(0)
        try:
            command = build_command(run, placement)
        except RunnerError as error:
            self._record_refused(run, error)
            self.devices.release(placement)
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

    def _begin_after_imports(self, worker: Worker) -> None:
        """Start the run that waited for a worker, once its imports have ended or failed."""
        self.selector.unregister(worker)
        run, command, _, placement = self.starting.pop(worker.fileno())
        is_fit = self.workers.begin(worker)
        self._begin(run, command, placement, worker if is_fit else None)

    def _end_starting(self) -> None:
        """End the importing workers, and put the runs that wait for them back in the queue."""
        for descriptor, (run, _, worker, placement) in self.starting.items():
            self.selector.unregister(descriptor)
            worker.end()
            self.devices.release(placement)
            self.waiting.append(run)
        self.starting = {}

    def _begin(
        self, run: Launch, command: LaunchCommand, placement: Placement, worker: Worker | None
    ) -> None:
        """Start a run at a placement; if that fails, wait, retry or record the failure."""
        attempt = self._start(run, command, worker)
        if attempt is None:
            self.devices.release(placement)
            self._keep(worker)
            return
        self._keep(None)
        self.display.started(run.full_name, attempt.attempt.number)
        pidfd = attempt.process.open_pidfd()
        self.active[pidfd] = (run, attempt, placement)
        self.watches[pidfd] = self._watch(run, attempt)
        self.selector.register(pidfd, selectors.EVENT_READ)

    def _start(
        self, run: Launch, command: LaunchCommand, worker: Worker | None
    ) -> RunningAttempt | None:
        try:
            attempt = start_attempt(run, command, worker, self.names)
        except HeldElsewhere:
            self._wait_for_holder(run)
        except FailedElsewhere as error:
            self._take_over(run, error)
        except RunnerError as error:
            self._record_refused(run, error)
        # No space or no permission: other run directories may not have this problem.
        except OSError as error:
            failure = build_failure(error, run.paths.run_dir)
            self._retry_or_record(run, FailedRun(run, failure, None), None)
        else:
            if attempt is None:
                self.result.elsewhere.append(run.full_name)
                self.display.finished(run.full_name, "completed by another sweep")
                # The other sweep may have been killed before it pushed the model.
                self.pushes.add(run.selected)
            return attempt
        return None

    def _wait_for_holder(self, run: Launch) -> None:
        """Wait for the lease of a run. A `launch`, of which a cluster runs many, only waits after
        its own first attempt.
        """
        if self.awaits_held:
            self.held.add(run)
        elif run.retry > 0:  # locks of an unreachable machine, for example, are not free yet
            message = "processes of an earlier attempt, or another sweep, hold the run"
            failure = Failure(kind="transient", message=message)
            self._retry_or_record(run, FailedRun(run, failure, None), None)
        else:
            self.result.held.append(run)
            self.display.finished(run.full_name, "run by another sweep or launch", is_done=False)

    def _take_over(self, run: Launch, error: FailedElsewhere) -> None:
        """Retry a run that failed in another sweep, as that sweep would: it may be gone. If both
        live, one of them finds the other's attempt and waits for it.
        """
        message = f"(by another sweep) {error.failure.message}"
        failure = error.failure.model_copy(update={"message": message})
        failed = FailedRun(run, failure, error.files.log_path)
        retry = None
        if self.awaits_held and not error.was_asked_to_stop:
            retry = foresee_retry(run.recipe, error.attempts)
        if retry is None:
            self._record(failed)
            return
        last = error.attempts[-1]
        in_a_row = error.attempts[-(last.retry + 1) :]
        self.failures[run.full_name] = [one.failure for one in in_a_row if one.failure is not None]
        self._retry(failed, retry, last, has_made_steps=True)

    def _keep(self, worker: Worker | None) -> None:
        """Give back an idle worker, and end workers that no waiting run needs."""
        if worker is not None:
            self.workers.release(worker)
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

    def wait(self, *, is_urgent: bool = False) -> None:
        """Wait until something ends, a signal comes, or the display is due for an update."""
        for key, _ in self.selector.select(0 if is_urgent else self.pause_seconds()):
            if key.fd == self.signals.fileno():
                self.signals.drain()
            elif isinstance(key.data, RunningPush):
                self.pushes.finish(key.fd)
            elif isinstance(key.data, Worker):
                if not self.is_given_up():
                    self._begin_after_imports(key.data)
            else:
                self.finish(key.fd)
        now = time.monotonic()
        for worker in [one for _, _, one, _ in self.starting.values() if one.is_overdue(now)]:
            self._begin_after_imports(worker)
        if self.is_given_up():
            self._end_starting()
        for watch in self.watches.values():
            watch.look(now)
        self.pushes.look(now)
        waiting = {
            one.run.full_name: f"retries in {max(0.0, one.due_at - now):.0f} s"
            for one in self.later
        }
        waiting |= {
            run.full_name: "waits for a worker to import libraries"
            for run, *_ in self.starting.values()
        }
        waiting |= {name: "is run by another sweep" for name in self.held.runs}
        is_busy = self.active or self.starting or self.later or self.waiting
        if not is_busy and not self.signals.received and (line := self.held.describe_unreported()):
            self.display.say(line)
        waiting |= self.pushes.describe()
        self.display.update(
            {run.full_name: attempt.files for run, attempt, _ in self.active.values()},
            waiting,
            {
                run.full_name: self.watches[pidfd].silence.seconds
                for pidfd, (run, _, _) in self.active.items()
            },
        )

    def leave(self, why: str, *, num_signals: int) -> None:
        """Ask the active runs to checkpoint and exit, and wait; any signal beyond `num_signals`
        kills them.
        """
        self.pushes.end()
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
            runs = format_count(len(attempts), "run")
            self.display.say(
                f"stopping: waiting for {runs} to checkpoint and exit;"
                " a second Ctrl-C kills them immediately"
            )
        while self.active:
            if len(self.signals.received) > num_signals:
                num_signals = len(self.signals.received)
                second = signal.Signals(self.signals.received[-1]).name
                for _, attempt, _ in self.active.values():
                    attempt.kill(f"{why}; a second signal ({second}) killed the run")
            self.wait()

    def finish(self, pidfd: int) -> None:
        """Close the record of a run whose process has ended."""
        self.selector.unregister(pidfd)
        os.close(pidfd)
        run, attempt, placement = self.active.pop(pidfd)
        del self.watches[pidfd]
        failure = attempt.finish()
        self.devices.release(placement)
        if failure is not None:
            self._retry_or_record(run, FailedRun(run, failure, attempt.files.log_path), attempt)
        else:
            self.result.completed.append(run.full_name)
            self.display.finished(run.full_name, "repaired" if run.is_repair else "completed")
            self.pushes.add(run.selected)
        self._keep(attempt.worker)

    def close(self) -> None:
        """End the workers and pushes, and close the descriptors of the processes."""
        self.pushes.end()
        self.workers.close()
        for pidfd in self.active:
            os.close(pidfd)

    def _retry_or_record(
        self, run: Launch, failed: FailedRun, attempt: RunningAttempt | None
    ) -> None:
        failures = self.failures.setdefault(run.full_name, [])
        # Progress clears earlier failures: a run of weeks may lose its network once a day.
        if attempt is not None and attempt.has_newer_checkpoint():
            failures[:] = [failure for failure in failures if failure.kind == "out_of_memory"]
        failures.append(failed.failure)
        has_made_steps = attempt is not None and attempt.has_made_steps()
        retry = None
        if attempt is None or not attempt.was_asked_to_stop():
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
        self._retry(
            failed, retry, attempt.attempt if attempt else None, has_made_steps=has_made_steps
        )

    def _retry(
        self, failed: FailedRun, retry: Retry, last: Attempt | None, *, has_made_steps: bool
    ) -> None:
        """Plan the next attempt. `last` is the attempt that failed, None if none was recorded."""
        run = failed.run
        again = replace(
            run,
            resume=_resume_again(run.resume, failed.failure, has_made_steps=has_made_steps),
            retry=retry.number,
            micro_batch_divisor=retry.micro_batch_divisor if last else run.micro_batch_divisor,
            num_attempts=last.number if last else None,
        )
        self.later.append(Later(again, time.monotonic() + retry.delay_seconds, failed))
        first_line = failed.failure.message.partition("\n")[0]
        self.display.retried(run.full_name, f"{failed.failure.kind}: {first_line}; {retry.why}")

    def _record_refused(self, run: Launch, error: RunnerError) -> None:
        failure = Failure(kind="configuration", message=str(error))
        self._record(FailedRun(run, failure, None))

    def _record(self, failed: FailedRun) -> None:
        self.result.failed.append(failed)
        first_line = failed.failure.message.partition("\n")[0]
        is_done = failed.failure.kind != "preempted"  # it resumes
        outcome = f"{failed.failure.kind}: {first_line}"
        self.display.finished(failed.name, outcome, is_done=is_done)


def _is_stopped(one: Later) -> bool:
    """True if `runner stop` was called while the run waited for its retry."""
    request = load_stop_request(one.run.paths)
    return request is not None and request.attempt == one.run.num_attempts


def _resume_again(resume: str, failure: Failure, *, has_made_steps: bool) -> str:
    """`Attempt.resume` of a retry: the requested value again, until an attempt has followed it."""
    if resume == "none" or failure.kind == "out_of_memory":
        return "none"  # checkpoints in remote storage have another micro-batch
    return "auto" if has_made_steps else resume


def build_command(run: Launch, placement: Placement) -> LaunchCommand:
    """The command of one planned run at a placement."""
    return build_launch_command(
        run.recipe, run.paths.run_dir, placement, path=os.environ.get("PATH", os.defpath)
    )
