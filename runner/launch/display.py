"""Shows the progress of a sweep's runs on stderr: bars on a terminal, elsewhere (`nohup`, cron,
Slurm) a line when something changes.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from runner.run.paths import AttemptPaths
from runner.run.record import describe_phase, is_silent_phase, load_progress, now_utc

_QUIET_SECONDS: Final = 600.0  # without a terminal: after this, print that runs are still running


class SweepDisplay:
    """Bars on a terminal; elsewhere a line when a run starts, begins to train, waits for something
    outside it, ends or is retried, and one after ten minutes without any line.
    """

    def __init__(self, num_runs: int, quiet_seconds: float = _QUIET_SECONDS) -> None:
        self._quiet_seconds = quiet_seconds
        self._console = Console(stderr=True, highlight=False)
        self._num_runs = num_runs
        self._num_finished = 0
        self._last_line_at = time.monotonic()
        self._printed: set[tuple[str, str]] = set()  # (attempt folder, phase) already printed
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
        """Print a line above the bars."""
        self._last_line_at = time.monotonic()
        forget_closed_streams()
        # A stream that closed meanwhile, or a full disk, is no reason to end a sweep.
        with contextlib.suppress(OSError):
            if self._bars is None:
                print(line, file=sys.stderr, flush=True)
            else:
                self._console.print(line, markup=False)

    def started(self, name: str, number: int) -> None:
        """Report that an attempt has started; on a terminal its bar shows that."""
        if self._bars is None:
            self._say_counted(f"{name}  starts, attempt {number}")

    def finished(self, name: str, outcome: str, *, is_done: bool = True) -> None:
        """Report that this sweep has finished with a run, completed or not. With `is_done` false,
        the run itself is not done and is not counted.
        """
        self._num_finished += is_done
        self._say_counted(f"{name}  {outcome}")
        if self._bars is not None:
            self._drop_bar(name)
            self._bars.update(
                self._all,
                completed=self._num_finished,
                now=f"{self._num_finished}/{self._num_runs}",
            )

    def retried(self, name: str, why: str) -> None:
        """Report that a run failed and will be retried."""
        self._say_counted(f"{name}  {why}")
        self._drop_bar(name)

    def pushed(self, name: str, outcome: str) -> None:
        """Report that the push of a completed run has succeeded or failed."""
        self.say(f"{name}  {outcome}")
        self._drop_bar(name)

    def update(
        self,
        current: Mapping[str, AttemptPaths],
        waiting: Mapping[str, str],
        silent_seconds: Mapping[str, float],
    ) -> None:
        """Show the progress of the current runs, the seconds since each one's last sign of life,
        and the reasons why others wait.
        """
        if self._bars is None:
            self._print_changes(current)
            if time.monotonic() - self._last_line_at >= self._quiet_seconds:
                now = [
                    f"{name} {_describe(files, silent_seconds[name])[0]}"
                    for name, files in current.items()
                ]
                now += [f"{name} {text}" for name, text in waiting.items()]
                self._say_counted(f"still running: {'; '.join(now)}")
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

    def _print_changes(self, current: Mapping[str, AttemptPaths]) -> None:
        for name, files in current.items():
            attempt = str(files.attempt_dir)
            progress = load_progress(files.progress_path)
            if progress is None or not _is_milestone(progress.phase):
                continue
            # "waiting for the other processes" occurs many times; print it once.
            kind = progress.phase.partition(" ")[0]
            if (attempt, kind) not in self._printed:
                self._printed.add((attempt, kind))
                is_known = progress.max_steps is not None
                step = f", step {progress.step}/{progress.max_steps}" if is_known else ""
                self._say_counted(f"{name}  {progress.phase}{step}")

    def _say_counted(self, text: str) -> None:
        self.say(f"[{self._num_finished}/{self._num_runs}] {text}")

    def _drop_bar(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))


def forget_closed_streams() -> None:
    """Redirect stdout and stderr to the null device if their readers are gone: a sweep outlives
    its terminal, and the `tee` behind its pipe.
    """
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), descriptor)


def _is_milestone(phase: str) -> bool:
    """True if a phase deserves a log line; evaluations and saves are too frequent."""
    return phase == "training" or is_silent_phase(phase)


def _describe(files: AttemptPaths, silent_seconds: float) -> tuple[str, int, int | None]:
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
