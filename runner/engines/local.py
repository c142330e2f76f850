"""The local engine: runs several attempts at a time on this machine, and shows where they are.

Owns when an attempt starts and on which slot or GPUs, the retries of failed runs, and the bars or
lines on stderr. One attempt is `launch.attempt`. `sweep --help` imports this file for its options:
what is slow is imported in functions.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.errors import RunnerError
from runner.processes import StopSignals
from runner.run.paths import AttemptPaths

if TYPE_CHECKING:
    import argparse

    from rich.progress import Progress, TaskID

    from runner.launch.attempt import RunningAttempt
    from runner.launch.command import LaunchCommand, Placement
    from runner.launch.placement import Allocation, Devices, PlanRuns
    from runner.launch.stall import StallWatch
    from runner.plan.decide import Launch
    from runner.run.record import Failure

ONLY_WRITES_FILES: Final = False
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {}  # beyond those of every sweep
STOPPED: Final = 130  # by Ctrl-C or another signal, as shells count it

_LINE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class LocalOptions:
    """What the command line says about this machine."""

    num_slots: int
    gpus: tuple[str, ...] | None  # each run gets its own of these; None: not asked for
    fail_fast: bool
    is_dry_run: bool


def parse_options(arguments: argparse.Namespace) -> LocalOptions:
    """Raises: RunnerError for `--gpus` that are not different devices."""
    from runner.launch.placement import parse_gpus

    gpus = parse_gpus(arguments.gpus)
    return LocalOptions(
        num_slots=len(gpus) if gpus is not None else arguments.slots or 1,
        gpus=tuple(gpus) if gpus is not None else None,
        fail_fast=arguments.fail_fast,
        is_dry_run=arguments.dry_run,
    )


def submit(plan: PlanRuns, options: LocalOptions) -> int:
    """Run what is planned until all of it has ended, or print the commands in a dry run; returns an
    exit code.
    """
    from runner.launch.placement import list_placements

    planned = plan({}, sys.stdout)
    if options.is_dry_run:
        for run in planned:
            for placement in list_placements(
                run.num_processes, run.recipe.launch.num_machines, None
            ):
                print(build_command(run, placement).as_shell(os.environ))
        return 0
    sys.stdout.flush()
    result = run_planned(
        planned,
        num_slots=options.num_slots,
        gpus=list(options.gpus) if options.gpus is not None else None,
        fail_fast=options.fail_fast,
    )
    if result.stopped_by is not None:
        return STOPPED
    return 1 if result.failed else 0


def run_planned(
    planned: list[Launch],
    *,
    num_slots: int,
    gpus: list[str] | None,
    fail_fast: bool,
    allocation: Allocation | None = None,
    again: str = "the same command",
) -> PoolResult:
    """How the runs ended; failures are printed. `again` is what goes on with them after a stop."""
    from runner.launch.placement import Devices

    if not planned:
        print("nothing to launch", file=sys.stderr)
        return PoolResult()
    with SweepDisplay(len(planned)) as display:
        result = run_pool(
            planned, Devices(num_slots, gpus, allocation), display, fail_fast=fail_fast
        )
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


class SweepDisplay:
    """Bars on a terminal; elsewhere one line per finished run and one every few seconds for the
    current ones.
    """

    def __init__(self, num_runs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._num_runs = num_runs
        self._num_finished = 0
        self._last_line_at = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[now]}"),
            )
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console)
            self._all = self._bars.add_task("runs", total=num_runs, now=f"0/{num_runs}")

    def __enter__(self) -> SweepDisplay:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line above the bars."""
        forget_closed_streams()
        # Closed since, or a file on a full disk: no reason to end a sweep.
        with contextlib.suppress(OSError):
            if self._bars is None:
                print(line, file=sys.stderr, flush=True)
            else:
                self._console.print(line, markup=False)

    def finished(self, name: str, outcome: str) -> None:
        """One run is done, for better or worse."""
        self._num_finished += 1
        self.say(f"[{self._num_finished}/{self._num_runs}] {name}  {outcome}")
        if self._bars is not None:
            self._drop_bar(name)
            self._bars.update(
                self._all,
                completed=self._num_finished,
                now=f"{self._num_finished}/{self._num_runs}",
            )

    def retried(self, name: str, why: str) -> None:
        """One run failed and will be tried again."""
        self.say(f"[{self._num_finished}/{self._num_runs}] {name}  {why}")
        self._drop_bar(name)

    def update(
        self,
        current: Mapping[str, AttemptPaths],
        waiting: Mapping[str, str],
        silent_seconds: Mapping[str, float],
    ) -> None:
        """Where the current runs stand, how long each has shown no sign of life, and which ones
        wait for what.
        """
        if self._bars is None:
            if time.monotonic() - self._last_line_at > _LINE_SECONDS:
                self._last_line_at = time.monotonic()
                now = [
                    f"{name} {_describe(files, silent_seconds[name])[0]}"
                    for name, files in current.items()
                ]
                now += [f"{name} {text}" for name, text in waiting.items()]
                self.say(f"[{self._num_finished}/{self._num_runs}] now: {'; '.join(now)}")
            return
        for name, files in current.items():
            text, step, max_steps = _describe(files, silent_seconds[name])
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=max_steps, now=text)
            self._bars.update(self._tasks[name], completed=step, total=max_steps or 1, now=text)
        for name, text in waiting.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=1, now=text)
            self._bars.update(self._tasks[name], completed=0, total=1, now=text)

    def _drop_bar(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))


def forget_closed_streams() -> None:
    """Send to nowhere what nobody reads any more: a sweep outlives its terminal, and the `tee`
    behind its pipe.
    """
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), descriptor)


def _describe(files: AttemptPaths, silent_seconds: float) -> tuple[str, int, int | None]:
    from runner.run.record import describe_phase, load_progress, now_utc

    progress = load_progress(files.progress_path)
    if progress is None:
        return describe_phase("starting", None, now_utc(), silent_seconds), 0, None
    phase = describe_phase(progress.phase, progress.phase_began_at_utc, now_utc(), silent_seconds)
    if progress.max_steps is None:
        return phase, progress.step, None
    loss = "" if progress.loss is None else f" loss {progress.loss:.4f}"
    comma = "" if phase == progress.phase else ","
    return (
        f"{phase}{comma} step {progress.step}/{progress.max_steps}{loss}",
        progress.step,
        progress.max_steps,
    )


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


def run_pool(
    planned: list[Launch], devices: Devices, display: SweepDisplay, *, fail_fast: bool = False
) -> PoolResult:
    """Run everything that is planned, as many at a time as there is room.

    The first signal asks what runs to checkpoint and to leave, a second one ends it at once;
    nothing more is started.

    All attempts are ended and recorded, also after an exception.
    """
    devices.check(planned)
    with StopSignals() as signals, selectors.DefaultSelector() as selector:
        selector.register(signals.fileno(), selectors.EVENT_READ)
        pool = _Pool(list(planned), devices, display, fail_fast, selector, signals)
        try:
            while not signals.received and (pool.active or pool.wants_to_start() or pool.later):
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
    """What waits, what runs (by process id) and what became of the rest."""

    waiting: list[Launch]
    devices: Devices
    display: SweepDisplay
    fail_fast: bool
    selector: selectors.BaseSelector
    signals: StopSignals
    active: dict[int, tuple[Launch, RunningAttempt, Placement]] = field(default_factory=dict)
    watches: dict[int, StallWatch] = field(default_factory=dict)  # over what is active
    later: list[Later] = field(default_factory=list)
    failures: dict[str, list[Failure]] = field(default_factory=dict)  # in a row, of each run
    result: PoolResult = field(default_factory=PoolResult)

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
        from runner.launch.attempt import FailedElsewhere, start_attempt
        from runner.run.failures import build_failure
        from runner.run.record import Failure

        placement = (
            self.devices.take(self.waiting[0].num_processes) if self.wants_to_start() else None
        )
        if placement is None:
            return False
        run = self.waiting.pop(0)
        try:
            attempt = start_attempt(run, build_command(run, placement))
        except FailedElsewhere as error:
            self.devices.give_back(placement)
            message = f"(by another sweep) {error.failure.message}"
            failure = error.failure.model_copy(update={"message": message})
            self._record(FailedRun(run.full_name, failure, error.files.log_path))
            return True
        except RunnerError as error:
            self.devices.give_back(placement)
            self._record(
                FailedRun(run.full_name, Failure(kind="configuration", message=str(error)), None)
            )
            return True
        # No space, no permission: this run's directory may be the only one like that.
        except OSError as error:
            self.devices.give_back(placement)
            self._retry_or_record(
                run, FailedRun(run.full_name, build_failure(error, run.paths.run_dir), None), None
            )
            return True
        if attempt is None and run.retry > 0 and not run.paths.result_path.exists():
            # A machine out of reach, say: its locks are not free yet.
            self.devices.give_back(placement)
            held = Failure(
                kind="transient",
                message="processes of an earlier attempt, or another sweep, hold the run",
            )
            self._retry_or_record(run, FailedRun(run.full_name, held, None), None)
            return True
        if attempt is None:
            self.devices.give_back(placement)
            self.result.elsewhere.append(run.full_name)
            self.display.finished(run.full_name, "run or finished by another sweep")
            return True
        pid = attempt.process.pid
        self.active[pid] = (run, attempt, placement)
        self.watches[pid] = self._watch(run, attempt)
        self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, data=pid)
        return True

    def _watch(self, run: Launch, attempt: RunningAttempt) -> StallWatch:
        from runner.launch.stall import Silence, StallWatch

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
            else:
                self.finish(key)
        now = time.monotonic()
        for watch in self.watches.values():
            watch.look(now)
        waiting = {
            one.run.full_name: f"is tried again in {max(0.0, one.due_at - now):.0f} s"
            for one in self.later
        }
        self.display.update(
            {run.full_name: attempt.files for run, attempt, _ in self.active.values()},
            waiting,
            {
                run.full_name: self.watches[pid].silence.seconds
                for pid, (run, _, _) in self.active.items()
            },
        )

    def leave(self, why: str, *, num_signals: int) -> None:
        """Ask what runs to checkpoint and to leave, and wait; any signal beyond `num_signals` ends
        it at once.
        """
        self.waiting += [one.run for one in self.later]
        self.later = []
        attempts = [attempt for _, attempt, _ in self.active.values()]
        for attempt in attempts:
            try:
                attempt.request_stop(why)
            except OSError:  # no space
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

    def finish(self, key: selectors.SelectorKey) -> None:
        """Close the record of a run whose launcher has ended."""
        self.selector.unregister(key.fd)
        os.close(key.fd)
        run, attempt, placement = self.active.pop(key.data)
        del self.watches[key.data]
        failure = attempt.finish()
        self.devices.give_back(placement)
        if failure is not None:
            self._retry_or_record(
                run, FailedRun(run.full_name, failure, attempt.files.log_path), attempt
            )
        else:
            self.result.completed.append(run.full_name)
            self.display.finished(run.full_name, "completed")

    def close(self) -> None:
        """Let go of what watches the processes."""
        for key in self.selector.get_map().values():
            if key.data is not None:
                os.close(key.fd)

    def _retry_or_record(
        self, run: Launch, failed: FailedRun, attempt: RunningAttempt | None
    ) -> None:
        from runner.plan.decide import decide_retry

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

    def _record(self, failed: FailedRun) -> None:
        self.result.failed.append(failed)
        first_line = failed.failure.message.partition("\n")[0]
        self.display.finished(failed.name, f"{failed.failure.kind}: {first_line}")


def _is_stopped(one: Later) -> bool:
    """Whether `runner stop` asked, while the run waited, for no further attempt."""
    from runner.run.record import load_stop_request

    request = load_stop_request(one.run.paths)
    return request is not None and request.attempt == one.run.num_attempts


def _resume_again(resume: str, failure: Failure, *, has_made_steps: bool) -> str:
    """`Attempt.resume` of a retry: what was asked for is asked for again until it was done."""
    if resume == "none" or failure.kind == "out_of_memory":
        return "none"  # what lies in remote storage is of another micro-batch
    return "auto" if has_made_steps else resume


def build_command(run: Launch, placement: Placement) -> LaunchCommand:
    """The command of one planned run at a placement."""
    from runner.launch.command import build_launch_command

    return build_launch_command(
        run.recipe, run.paths.run_dir, placement, path=os.environ.get("PATH", os.defpath)
    )
