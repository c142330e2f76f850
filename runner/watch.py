"""`runner status --watch`: the screen of `watch_screen`, drawn again and again on a terminal, else printed once."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.failures import find_hint
from runner.selection import Selected, UnreadableRun
from runner.watch_files import Reading, RunsReader
from runner.watch_model import ASCII, UNICODE, Glyphs, RunView
from runner.watch_screen import Screen
from runner.watch_table import Line

_REFRESH_SECONDS: Final = 1.0
_MAX_BUSY_PART: Final = 0.1  # of the time; with very many runs, or a slow file system, the screen is drawn less often
_PLAIN_WIDTH: Final = 120
_STYLES: Final = {
    "completed": "green",
    "running": "bold cyan",
    "failed": "bold red",
    "unreadable": "bold red",
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


def watch(selected: Sequence[Selected], cache_path: Path, unreadable: Sequence[UnreadableRun] = ()) -> int:
    """Show the runs until Ctrl-C, or until all are completed; without a terminal, once.

    It does not end when nothing runs any more: what is between two attempts, or in a queue, looks just like it.
    """
    for lost in unreadable:  # nothing is known of these, not even a grid to show them in
        print(f"{lost.full_name}  unreadable: {lost.why}", file=sys.stderr)
    if not selected:
        return 0
    reader, console = RunsReader(selected, cache_path), Console(highlight=False)
    views = build_views(reader.read())
    screen = Screen(views, choose_glyphs(console.encoding))
    is_live = sys.stdout.isatty() and not console.is_dumb_terminal  # rich calls a pipe a terminal under FORCE_COLOR
    if is_live:
        views = _follow(console, screen, reader, views)
    width = console.width if is_live or "COLUMNS" in os.environ else _PLAIN_WIDTH
    console.print(paint(screen.draw(views, width=width, height=None, now=_now())), soft_wrap=True)
    return 0


def build_views(readings: Sequence[Reading]) -> list[RunView]:
    """What is shown of each run."""
    views: list[RunView] = []
    for reading in readings:
        status, paths = reading.status, reading.selected.paths
        log_path = paths.attempt(status.num_attempts).log_path if status.num_attempts else None
        views.append(
            RunView(
                reading.selected.recipe,
                status,
                log_path=None if log_path is None else str(log_path),
                hint=find_hint(status),
                retry=None if reading.retry is None else f"{reading.retry.why}, while its sweep lives",
                progress=reading.progress,
                losses=reading.losses,
            )
        )
    return views


def choose_glyphs(encoding: str) -> Glyphs:
    """Symbols that an output of that encoding can show."""
    return UNICODE if encoding.lower().replace("-", "").startswith("utf") else ASCII


def paint(lines: Sequence[Line]) -> Text:
    """Lines with the colours of their states; rich leaves the colours out where none are wanted."""
    text = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(lines):
        if number:
            text.append("\n")
        for part, style in line:
            text.append(part, _STYLES.get(style, ""))
    return text


def _follow(console: Console, screen: Screen, reader: RunsReader, views: list[RunView]) -> list[RunView]:
    """Draw until all is completed or somebody ends it; the last views.

    Raises:
        SystemExit: TERM or HUP came.
    """
    woken_by = None
    with _signals_kept():
        while woken_by in (None, signal.SIGTSTP) and any(view.state != "completed" for view in views):
            woken_by = None
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while woken_by in (None, signal.SIGWINCH) and any(view.state != "completed" for view in views):
                    started = time.monotonic()
                    views = build_views(reader.read())
                    now = f"{_now()}  Ctrl-C leaves"
                    lines = screen.draw(views, width=console.width, height=console.height, now=now)
                    live.update(paint(lines), refresh=True)
                    woken_by = _wait(max(_REFRESH_SECONDS, (time.monotonic() - started) / _MAX_BUSY_PART))
            if woken_by == signal.SIGTSTP:  # Ctrl-Z, with the terminal as it was before; `fg` goes on
                os.kill(os.getpid(), signal.SIGSTOP)
    if woken_by in (signal.SIGTERM, signal.SIGHUP):
        sys.exit(128 + woken_by)
    return views


def _wait(seconds: float) -> int | None:
    """The signal that came within that time, if any did."""
    found = signal.sigtimedwait(_SIGNALS, seconds)
    return None if found is None else found.si_signo


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals come to `_wait` and nowhere else: in the middle of drawing, one would leave half a screen behind."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%H:%M:%S")
