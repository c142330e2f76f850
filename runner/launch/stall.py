"""Watches a running attempt: a suspended one is continued. For one that hangs, the stacks of
its ranks are requested, then it is killed.

A sign of life is any change of the attempt's `progress.json`, which the training process writes
or touches as part of its work. Signals reach only the processes on this machine; on other machines
the ranks end with their launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError
from runner.files import open_to_append
from runner.processes import (
    STACKS_SIGNAL,
    find_processes_of,
    is_stopped,
    signal_process_of,
    writes_stacks,
)
from runner.run.paths import AttemptPaths
from runner.run.record import Progress, is_silent_phase, load_progress
from runner.text import format_count, format_seconds

# The most silence that one look adds, two of a sweep's pauses: while the sweep itself was stopped
# (Ctrl-Z, a suspended job), it watched nothing.
MAX_LOOK_SECONDS: Final = 1.0
# For a phase that waits for a compiler, a network or another process.
SILENT_PHASE_SECONDS: Final = 3 * 3600.0
# Share of the limit that a stopped and continued attempt gets, but at least some seconds.
_GRACE_PART: Final = 0.25
_MIN_GRACE_SECONDS: Final = 2.0
# Between two requests for stacks: wait until the log stops growing, within these bounds. A process
# that waits for a disk does not answer.
_MIN_ANSWER_SECONDS: Final = 0.3
_MAX_ANSWER_SECONDS: Final = 5.0


@dataclass
class Silence:
    """The time since the last sign of life, added up over looks; pure.

    >>> silence = Silence(limit_seconds=1.5, looked_at=100.0, sign="a")
    >>> silence.look(101.0, "a"), silence.look(102.0, "a"), silence.is_overdue("training")
    (False, False, True)
    >>> silence.look(102.5, "b"), silence.seconds
    (True, 0.0)
    """

    limit_seconds: float | None
    looked_at: float  # `time.monotonic`
    sign: object
    seconds: float = 0.0
    grace_seconds: float = 0.0

    def look(self, now: float, sign: object) -> bool:
        """True if there was a sign of life since the last look."""
        self.seconds += min(max(0.0, now - self.looked_at), MAX_LOOK_SECONDS)
        self.looked_at = now
        if sign == self.sign:
            return False
        self.sign, self.seconds, self.grace_seconds = sign, 0.0, 0.0
        return True

    def is_overdue(self, phase: str) -> bool:
        """True if the attempt has been silent for longer than its recipe and its phase allow."""
        if self.limit_seconds is None:
            return False
        allowed = self.limit_seconds + self.grace_seconds
        return self.seconds >= (
            max(allowed, SILENT_PHASE_SECONDS) if is_silent_phase(phase) else allowed
        )

    def grant_grace(self) -> bool:
        """Allow a continued attempt some time to show a sign of life; False if it already had that
        time.
        """
        if self.limit_seconds is None or self.grace_seconds > 0.0:
            return False
        grace = max(_MIN_GRACE_SECONDS, _GRACE_PART * self.limit_seconds)
        self.grace_seconds = self.seconds - self.limit_seconds + grace
        return True


@dataclass
class StallWatch:
    """The watch over one running attempt; every `look` is short and leaves the rest to later
    ones.
    """

    files: AttemptPaths
    is_meant: Callable[[str], bool]  # the owner of the attempt's processes
    say: Callable[[str], None]  # prints a line for the user
    end: Callable[[str], None]  # kills the attempt; the text is its failure's message
    silence: Silence
    _to_ask: list[int] | None = None  # None while nothing is wrong
    _asked: list[int] = field(default_factory=list)
    _asked_at: float = 0.0
    _log_size: int = -1
    _is_over: bool = False

    def look(self, now: float) -> None:
        """Record signs of life, and act if there are none."""
        has_sign_of_life = self.silence.look(now, look_at_sign(self.files.progress_path))
        if self._is_over:
            return
        if self._to_ask is not None:
            if has_sign_of_life:
                self._to_ask = None
                self._note("there is a sign of life again; the attempt continues")
            else:
                self._ask_next(now, self._to_ask)
        elif self.silence.is_overdue("") and self.silence.is_overdue(self._find_phase()):
            self._act(now)

    def _find_phase(self) -> str:
        progress = self._load_progress()
        return "" if progress is None else progress.phase

    def _load_progress(self) -> Progress | None:
        with contextlib.suppress(OSError):
            return load_progress(self.files.progress_path)
        return None

    def _act(self, now: float) -> None:
        pids = find_processes_of(self.is_meant)
        stopped = [pid for pid in pids if is_stopped(pid)]
        for pid in stopped:
            signal_process_of(pid, self.is_meant, signal.SIGCONT)
        if stopped and self.silence.grant_grace():
            shown = ", ".join(map(str, stopped))
            self._report(f"{self._describe()}: process {shown} was stopped; continued")
            return
        self._to_ask = [pid for pid in pids if writes_stacks(pid)]
        self._asked, self._asked_at, self._log_size = [], now, -1
        stacks = f"stacks of {_count_processes(len(self._to_ask))}"
        self._report(f"{self._describe()}: asking for the {stacks}")

    def _ask_next(self, now: float, to_ask: list[int]) -> None:
        """Ask one process after another, each under its own heading, because `faulthandler` does
        not say whose stacks it writes. Then kill the attempt.
        """
        size = self._measure_log()
        is_growing, self._log_size = size != self._log_size, size
        waited = now - self._asked_at
        if waited < _MIN_ANSWER_SECONDS or (is_growing and waited < _MAX_ANSWER_SECONDS):
            return
        if to_ask:
            pid = to_ask.pop(0)
            self._note(f"stacks of {self._name(pid)}:")
            signal_process_of(pid, self.is_meant, STACKS_SIGNAL)
            self._asked.append(pid)
            self._asked_at = now
            return
        self._is_over = True
        stacks = f"stacks of {_count_processes(len(self._asked))}"
        why = f"{self._describe()}; the {stacks} are in the log"
        self._note(f"{why}; the attempt is killed")
        self.end(why)

    def _describe(self) -> str:
        progress = self._load_progress()
        where = "starting" if progress is None else progress.phase
        if progress is not None and progress.max_steps is not None:
            where += f", step {progress.step}/{progress.max_steps}"
        return f"no sign of life for {format_seconds(self.silence.seconds)} while {where}"

    def _name(self, pid: int) -> str:
        parent = _read_parent(pid)
        child = f", a child of process {parent}" if parent in self._asked else ""
        return f"rank {_read_rank(pid)}, process {pid}{child}"

    def _report(self, line: str) -> None:
        self._note(line)
        self.say(line)

    def _note(self, line: str) -> None:
        # The disk may be full; a rank may be writing at the same time.
        with (
            contextlib.suppress(CorruptFileError, OSError),
            open_to_append(self.files.log_path) as log,
        ):
            log.write(f"\nrunner: {line}\n".encode())

    def _measure_log(self) -> int:
        with contextlib.suppress(OSError):
            return self.files.log_path.stat().st_size
        return 0


def look_at_sign(progress_path: Path) -> object:
    """A value that changes with every sign of life; None before the first."""
    try:
        state = progress_path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ino, state.st_size


def _count_processes(number: int) -> str:
    return format_count(number, "process")


def _read_parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return None


def _read_rank(pid: int) -> str:
    """The rank of a process, or of the process that forked it."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return os.fsdecode(entry.removeprefix(b"RANK="))
    return "0"
