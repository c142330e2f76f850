"""The local engine: runs several attempts at a time on one machine. Decides only where and when `execute` runs."""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from runner.display import SweepDisplay
from runner.errors import RefusedError
from runner.execute import RunningAttempt, start_attempt, stop_attempts
from runner.launch import LaunchCommand, Placement, build_launch_command
from runner.record import Failure
from runner.selection import Selected

_REFRESH_SECONDS: Final = 0.5


class Stopped(Exception):
    """Ctrl-C or TERM reached the sweep."""


@dataclass(frozen=True)
class Planned:
    """One run to launch, with the content hashes that belong to its digest."""

    selected: Selected
    contents: Mapping[str, str]
    num_processes: int

    @property
    def name(self) -> str:
        """Grid and run name."""
        return f"{self.selected.recipe.run.grid}/{self.selected.recipe.run.name}"


@dataclass
class Devices:
    """What is free: slots, or GPUs of which a run takes one per process."""

    num_slots: int
    gpus: list[str] | None = None
    _num_free_slots: int = field(init=False)

    def __post_init__(self) -> None:
        self._num_free_slots = self.num_slots

    def check(self, planned: Iterable[Planned]) -> None:
        """Raises: RefusedError for a run that could never start."""
        for run in planned:
            if self.gpus is not None and run.num_processes > len(self.gpus):
                raise RefusedError(f"{run.name} wants {run.num_processes} GPUs, `--gpus` names {len(self.gpus)}")

    def take(self, num_processes: int) -> Placement | None:
        """A placement, or None while there is no room."""
        num_cores = max(1, (os.cpu_count() or 1) // self.num_slots)
        if self.gpus is not None:
            if len(self.gpus) < num_processes:
                return None
            taken, self.gpus = tuple(self.gpus[:num_processes]), self.gpus[num_processes:]
            return Placement(num_processes, taken, num_cores)
        if self._num_free_slots == 0:
            return None
        self._num_free_slots -= 1
        return Placement(num_processes, None, num_cores)

    def give_back(self, placement: Placement) -> None:
        """Undo `take`."""
        if placement.devices is not None and self.gpus is not None:
            self.gpus += placement.devices
        else:
            self._num_free_slots += 1


@dataclass(frozen=True)
class PoolResult:
    """How the launched runs ended, by name."""

    completed: tuple[str, ...]
    failed: Mapping[str, Failure]
    elsewhere: tuple[str, ...]  # taken over or finished by another sweep meanwhile
    not_started: tuple[str, ...]  # after `--fail-fast`


def run_pool(planned: list[Planned], devices: Devices, display: SweepDisplay, *, fail_fast: bool = False) -> PoolResult:
    """Run everything that is planned, as many at a time as there is room.

    Raises:
        Stopped: after Ctrl-C or TERM; all attempts are ended and recorded.
    """
    devices.check(planned)
    waiting = list(planned)
    active: dict[int, tuple[Planned, RunningAttempt, Placement]] = {}
    completed: list[str] = []
    failed: dict[str, Failure] = {}
    elsewhere: list[str] = []
    selector = selectors.DefaultSelector()
    previous = signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        while active or (waiting and not (fail_fast and failed)):
            while waiting and not (fail_fast and failed):
                placement = devices.take(waiting[0].num_processes)
                if placement is None:
                    break
                run = waiting.pop(0)
                attempt = _start(run, placement)
                if attempt is None:
                    devices.give_back(placement)
                    elsewhere.append(run.name)
                    display.finished(run.name, None)
                    continue
                pidfd = os.pidfd_open(attempt.process.pid)
                selector.register(pidfd, selectors.EVENT_READ)
                active[pidfd] = (run, attempt, placement)
            for key, _ in selector.select(_REFRESH_SECONDS):
                selector.unregister(key.fd)
                os.close(key.fd)
                run, attempt, placement = active.pop(key.fd)
                devices.give_back(placement)
                failure = attempt.finish()
                if failure is None:
                    completed.append(run.name)
                else:
                    failed[run.name] = failure
                display.finished(run.name, failure)
            display.update({run.name: attempt.files for run, attempt, _ in active.values()})
    except (KeyboardInterrupt, Stopped):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the children are being ended already; do not leave halfway
        stop_attempts([attempt for _, attempt, _ in active.values()], "the sweep was stopped")
        raise Stopped from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        for fd in active:
            os.close(fd)
        selector.close()
    return PoolResult(tuple(completed), failed, tuple(elsewhere), tuple(run.name for run in waiting))


def build_command(run: Planned, placement: Placement) -> LaunchCommand:
    """The command of one planned run at a placement."""
    selected = run.selected
    return build_launch_command(
        selected.recipe, selected.paths.run_dir, placement, path=os.environ.get("PATH", os.defpath)
    )


def _start(run: Planned, placement: Placement) -> RunningAttempt | None:
    selected = run.selected
    command = build_command(run, placement)
    return start_attempt(selected.recipe, run.contents, selected.paths, command, run.num_processes)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped
