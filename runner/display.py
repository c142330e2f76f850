"""What a sweep shows on stderr while it runs: a bar over runs, and the step and loss of each current one."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from runner.paths import AttemptPaths
from runner.record import load_progress

_LINE_SECONDS: Final = 5.0


class SweepDisplay:
    """Bars on a terminal; elsewhere one line per finished run and one every few seconds for the current ones."""

    def __init__(self, num_runs: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._num_runs = num_runs
        self._num_finished = 0
        self._last_line_at = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[now]}"))
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console)
            self._all = self._bars.add_task("runs", total=num_runs, now=f"0/{num_runs}")

    def __enter__(self) -> SweepDisplay:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def finished(self, name: str, outcome: str) -> None:
        """One run is done, for better or worse."""
        self._num_finished += 1
        line = f"[{self._num_finished}/{self._num_runs}] {name}  {outcome}"
        if self._bars is None:
            print(line, file=sys.stderr, flush=True)
            return
        self._console.print(line, markup=False)
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        self._bars.update(self._all, completed=self._num_finished, now=f"{self._num_finished}/{self._num_runs}")

    def update(self, current: Mapping[str, AttemptPaths]) -> None:
        """Where the current runs stand."""
        if self._bars is None:
            if time.monotonic() - self._last_line_at > _LINE_SECONDS:
                self._last_line_at = time.monotonic()
                shown = "; ".join(f"{name} {_describe(files)[0]}" for name, files in current.items())
                print(f"[{self._num_finished}/{self._num_runs}] now: {shown}", file=sys.stderr, flush=True)
            return
        for name, files in current.items():
            text, step, max_steps = _describe(files)
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=max_steps, now=text)
            self._bars.update(self._tasks[name], completed=step, total=max_steps or 1, now=text)


def _describe(files: AttemptPaths) -> tuple[str, int, int | None]:
    progress = load_progress(files.progress_path)
    if progress is None:
        return "starting", 0, None
    if progress.max_steps is None:
        return progress.phase, progress.step, None
    loss = "" if progress.loss is None else f" loss {progress.loss:.4f}"
    return f"{progress.phase} step {progress.step}/{progress.max_steps}{loss}", progress.step, progress.max_steps
