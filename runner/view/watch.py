"""`runner status --watch`: redraws `screen` on a terminal, or prints it once.

Reads files only. The status of a run is derived again if any name, size, time stamp or inode in its
directory, its last attempt or its checkpoints changed, if the lease changed hands, or if a file
that the recipe names changed. Of the run's facts, only the changed files are read again.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.errors import CorruptFileError
from runner.files import look_at, open_plain
from runner.plan.decide import Retry, foresee_retry
from runner.plan.select import Selected, UnreadableRun
from runner.plan.status import RunStatus, describe_running, find_hint, read_status_unverified
from runner.recipe.contents import Content, Inputs, KnownContents, list_contents
from runner.run.facts import RunFacts, read_facts
from runner.run.lease import is_leased
from runner.run.record import Progress, now_utc
from runner.view.progress import ASCII, UNICODE, Glyphs, RunView
from runner.view.screen import Line, Screen

FolderState = frozenset[tuple[str, int, int, int, int]]


@dataclass(frozen=True)
class Reading:
    """One run as it was read: `progress` and `losses` (one per step) belong to a running attempt
    only.

    `retry` is the next action of the sweep that made the last attempt, if that sweep is still
    alive.
    """

    selected: Selected
    status: RunStatus
    attempt: int | None = None  # the last one's number
    progress: Progress | None = None
    losses: Sequence[float] = ()
    retry: Retry | None = None


class RunsReader:
    """All runs of a view; recipes stay as they were when it was created."""

    def __init__(self, selected: Sequence[Selected], cache_path: Path) -> None:
        self._contents = KnownContents(cache_path)
        self._runs = [_RunReader(one, list_contents(one.recipe)) for one in selected]

    def read(self) -> list[Reading]:
        """The current state of all runs, in the given order."""
        self._contents.refresh()
        return [
            run.read(self._contents.look(run.selected.recipe, run.contents)) for run in self._runs
        ]


@dataclass
class _RunReader:
    selected: Selected
    contents: Sequence[Content]
    _seen: object = None
    _facts: RunFacts | None = None
    _status: RunStatus | None = None
    _retry: Retry | None = None
    _losses: LossReader | None = None
    _files: Sequence[str] = ()  # see `_list_files`
    _attempts: FolderState | None = None
    _folders: Sequence[str] = ()  # of these attempts

    def __post_init__(self) -> None:
        # Joining paths is slower than checking them.
        paths = self.selected.paths
        self._run_dir, self._attempts_dir = str(paths.run_dir), str(paths.attempts_dir)
        self._lease_path = paths.lease_path

    def read(self, inputs: Inputs) -> Reading:
        paths = self.selected.paths
        is_held = is_leased(self._lease_path)  # first: `facts` explains why
        seen = (is_held, self._look(), inputs)
        if self._facts is None or self._status is None or seen != self._seen:
            known = self.selected.known if self._facts is None else self._facts.found
            self._facts = read_facts(paths, known)
            self._status = read_status_unverified(self._facts, self.selected.recipe, inputs)
            # The earlier state: changes made during derivation are seen the next time.
            self._seen = seen
            self._look_at_less(seen)
            self._retry = None
            if self._status.failure is not None:
                self._retry = foresee_retry(self.selected.recipe, self._facts.attempts)
        # If the status counts attempts, their record could be read.
        last = self._facts.last if self._status.num_attempts else None
        number = None if last is None else last.number
        if self._status.state != "running":
            self._losses = None
            return Reading(self.selected, self._status, number, retry=self._retry)
        self._losses = self._losses or LossReader(paths.metrics_path)
        # A phase grows longer while no file changes.
        why = describe_running(self._facts, now_utc())
        status = self._status.model_copy(update={"why": why})
        return Reading(self.selected, status, number, self._facts.progress, self._losses.read())

    def _look(self) -> object:
        """The state to compare to see whether anything changed."""
        if self._files:
            return tuple(map(look_at, self._files))
        if look_at(self._run_dir) is None:
            return None
        attempts = _look_into(self._attempts_dir)
        if attempts != self._attempts:
            self._attempts, self._folders = attempts, self._list_folders(attempts)
        return attempts, *map(_look_into, self._folders)

    def _look_at_less(self, seen: tuple[bool, object, object]) -> None:
        """For a run with a result, check only the files that its status was read from."""
        files = _list_files(self._facts) if self._facts is not None else ()
        state = tuple(map(look_at, files))
        if files and self._look() == seen[1]:  # nothing changed since it was read
            self._seen = (seen[0], state, seen[2])
        self._files = files

    def _list_folders(self, attempts: FolderState) -> list[str]:
        paths = self.selected.paths
        folders = [paths.run_dir, paths.checkpoints_dir, paths.uploads_dir]
        if numbers := [int(name) for name, *_ in attempts if name.isdecimal()]:
            folders.append(paths.attempt(max(numbers)).attempt_dir)
        return list(map(str, folders))


def _list_files(facts: RunFacts) -> Sequence[str]:
    """The files from which the status of a run with a result is derived, as `read_facts` reads
    them; empty for other runs.
    """
    if not facts.has_result:
        return ()
    paths = facts.paths
    named = [paths.run_dir, paths.record_path, paths.recipe_path, paths.result_path]
    named += [paths.stop_path, paths.ranks_lock_path, paths.attempts_dir]
    named += [paths.uploads_dir, paths.quarantine_dir]
    record = facts.found["record"].content
    if record is not None and record.attempts:
        files = paths.attempt(record.attempts[-1].number)
        named += [files.attempt_dir, files.progress_path, files.uploads_path]
        named += files.list_failure_paths()
    result = facts.found["result"].content
    manifest = {} if result is None or result.files is None else result.files
    return [*map(str, named), *(f"{paths.run_dir}/{name}" for name in manifest)]


@dataclass
class LossReader:
    """The training loss of every step in `metrics.jsonl`; rows are not read again unless the file
    became shorter.
    """

    path: Path
    _losses: list[float] = field(default_factory=list)
    _num_bytes: int = 0
    _inode: int = 0

    def read(self) -> Sequence[float]:
        """The losses so far. A resume replaces the file by a shorter one, which is then read from
        the start.
        """
        try:
            with os.fdopen(open_plain(self.path), "rb") as stream:
                state = os.fstat(stream.fileno())
                if state.st_ino != self._inode or state.st_size < self._num_bytes:
                    self._losses, self._num_bytes, self._inode = [], 0, state.st_ino
                stream.seek(self._num_bytes)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except (CorruptFileError, OSError):
            return []
        self._num_bytes += len(whole) + len(newline)
        losses = map(_find_loss, whole.split(b"\n"))
        self._losses += [loss for loss in losses if loss is not None]
        return self._losses


def _find_loss(line: bytes) -> float | None:
    """The loss of a row that is a training step."""
    try:
        row: Any = json.loads(line)
        return float(row["loss"])
    except (ValueError, TypeError, KeyError):
        return None


def _look_into(folder: str) -> FolderState:
    """Name, size, times and inode of everything directly in a folder; empty if there is no
    folder.
    """
    found: list[tuple[str, int, int, int, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    state = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # a temporary file
                    continue
                times = (state.st_mtime_ns, state.st_ctime_ns)
                found.append((entry.name, state.st_size, *times, state.st_ino))
    except (FileNotFoundError, NotADirectoryError):
        pass
    return frozenset(found)


_REFRESH_SECONDS: Final = 1.0
# Fraction of the time; with very many runs, or a slow file system, the screen is redrawn less
# often.
_MAX_BUSY_PART: Final = 0.1
_PLAIN_WIDTH: Final = 120
_STYLES: Final = {
    "completed": "green",
    "running": "bold cyan",
    "failed": "bold red",
    "unreadable": "bold red",
    "damaged": "bold red",
    "waiting": "yellow",
    "interrupted": "yellow",
    "changed": "magenta",
    "queued": "blue",
    "pending": "dim",
    "dim": "dim",
    "bold": "bold",
    "": "",
}
_SIGNALS: Final = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def watch(
    selected: Sequence[Selected], cache_path: Path, unreadable: Sequence[UnreadableRun] = ()
) -> int:
    """Show the runs until Ctrl-C, or until all are completed; without a terminal, once.

    It does not end when nothing runs any more: a run between two attempts, or in a queue, looks the
    same.
    """
    for lost in unreadable:  # nothing is known about these, not even their grid
        print(f"{lost.full_name}  unreadable: {lost.why}", file=sys.stderr)
    if not selected:
        return 0
    reader, console = RunsReader(selected, cache_path), Console(highlight=False)
    views = build_views(reader.read())
    screen = Screen(views, choose_glyphs(console.encoding))
    # Rich treats a pipe as a terminal under FORCE_COLOR.
    is_live = sys.stdout.isatty() and not console.is_dumb_terminal
    if is_live:
        views = _follow(console, screen, reader, views)
    width = console.width if is_live or "COLUMNS" in os.environ else _PLAIN_WIDTH
    console.print(paint(screen.draw(views, width=width, height=None, now=_now())), soft_wrap=True)
    return 0


def build_views(readings: Sequence[Reading]) -> list[RunView]:
    """The view of each run."""
    views: list[RunView] = []
    for reading in readings:
        status, paths = reading.status, reading.selected.paths
        log_path = paths.attempt(reading.attempt).log_path if reading.attempt else None
        views.append(
            RunView(
                reading.selected.recipe,
                status,
                log_path=None if log_path is None else str(log_path),
                hint=find_hint(status),
                retry=None
                if reading.retry is None
                else f"{reading.retry.why}, if its sweep is still running",
                progress=reading.progress,
                losses=reading.losses,
            )
        )
    return views


def choose_glyphs(encoding: str) -> Glyphs:
    """Symbols that an output with this encoding can show."""
    return UNICODE if encoding.lower().replace("-", "").startswith("utf") else ASCII


def paint(lines: Sequence[Line]) -> Text:
    """Lines with the colors of their states; rich omits colors if they are not wanted."""
    text = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(lines):
        if number:
            text.append("\n")
        for part, style in line:
            text.append(part, _STYLES.get(style, ""))
    return text


def _follow(
    console: Console, screen: Screen, reader: RunsReader, views: list[RunView]
) -> list[RunView]:
    """Draw until all runs are completed or a signal ends it; return the last views.

    Raises:
        SystemExit: TERM or HUP came.
    """
    woken_by = None
    with _signals_kept():
        while woken_by in (None, signal.SIGTSTP) and any(
            view.state != "completed" for view in views
        ):
            woken_by = None
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while woken_by in (None, signal.SIGWINCH) and any(
                    view.state != "completed" for view in views
                ):
                    started = time.monotonic()
                    views = build_views(reader.read())
                    now = f"{_now()}  Ctrl-C quits"
                    lines = screen.draw(views, width=console.width, height=console.height, now=now)
                    live.update(paint(lines), refresh=True)
                    woken_by = _wait(
                        max(_REFRESH_SECONDS, (time.monotonic() - started) / _MAX_BUSY_PART)
                    )
            # Ctrl-Z, with the terminal restored; `fg` continues.
            if woken_by == signal.SIGTSTP:
                os.kill(os.getpid(), signal.SIGSTOP)
    if woken_by in (signal.SIGTERM, signal.SIGHUP):
        sys.exit(128 + woken_by)
    return views


def _wait(seconds: float) -> int | None:
    """The signal that arrived within that time, if any."""
    found = signal.sigtimedwait(_SIGNALS, seconds)
    return None if found is None else found.si_signo


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals reach only `_wait`: one that arrived during drawing would leave half a screen
    behind.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%H:%M:%S")
