"""Pushes completed runs to the hub in child processes of a sweep, and reports how each one ended.
The child is `publish.push_child`.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError
from runner.files import open_plain, open_to_append
from runner.plan.pushes import PUSHED_ELSEWHERE, find_push_to
from runner.plan.select import Selected
from runner.processes import die_with_parent
from runner.run.facts import read_facts
from runner.run.lease import is_leased
from runner.run.manifest import measure_model
from runner.run.paths import RunPaths
from runner.run.record import load_push

MAX_AT_A_TIME: Final = 2  # uploads share one network
# The time limit of a push, so that a hub that never answers does not block a sweep.
_PATIENCE_SECONDS: Final = 600.0
_BYTES_PER_SECOND: Final = 1e6
# For the child to end on its own: native code such as `hf_xet` does not react to a signal.
_GRACE_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 2.0  # between two checks of a push by another process
_MAX_SHOWN: Final = 500  # characters of a reason: a hub may answer with a web page
_MAX_READ: Final = 1_000_000  # bytes at the end of what a push printed


@dataclass
class RunningPush:
    """A push in progress."""

    selected: Selected
    repo_id: str
    process: subprocess.Popen[bytes]
    log_path: Path  # its output is appended to that of earlier pushes
    log_start: int
    limit_seconds: float
    kill_at: float  # `time.monotonic`
    was_killed: bool = False  # by `kill_overdue`

    def kill_overdue(self, now: float) -> None:
        """Kill it if its time is over; the push stays pending."""
        if now >= self.kill_at and not self.was_killed:
            self.was_killed = True
            self.process.kill()

    def is_left_to_other(self) -> bool:
        """True if it ended because another process pushes the run."""
        return self.process.wait() == PUSHED_ELSEWHERE

    def describe_end(self) -> str:
        """The outcome, once its process has ended."""
        status = self.process.wait()
        if status == 0:
            return _describe_pushed(self.selected.paths) or f"pushed to {self.repo_id}"
        if status == PUSHED_ELSEWHERE:
            return f"is being pushed to {self.repo_id} by another process"
        if self.was_killed:
            reason = (
                f"the hub did not accept it within {self.limit_seconds:.0f} s, so the push was"
                " killed"
            )
        else:
            reason = (
                self._find_reason() or f"the push ended with {_name(status)}, see {self.log_path}"
            )
        return f"completed, but not pushed to {self.repo_id}: {reason}"

    def _find_reason(self) -> str | None:
        """The last error that this push printed; `push.json` may have that of an earlier push."""
        try:
            with os.fdopen(open_plain(self.log_path), "rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self.log_start, size - _MAX_READ))
                lines = log.read(_MAX_READ).decode(errors="replace").splitlines()
        except (CorruptFileError, OSError):
            return None
        reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if not reasons:
            return None
        is_long = len(reasons[-1]) > _MAX_SHOWN
        return f"{reasons[-1][:_MAX_SHOWN]} ..., see {self.log_path}" if is_long else reasons[-1]


def _name(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _describe_pushed(paths: RunPaths) -> str | None:
    try:
        record = load_push(paths)
    except (CorruptFileError, OSError):
        record = None
    if record is None or record.state != "pushed":
        return None
    return f"pushed to {record.repo_id}, commit {record.commit}"


def start_push(selected: Selected) -> RunningPush | None:
    """Start the push of a completed run; returns None if there is nothing to push.

    Raises:
        CorruptFileError, OSError: the run cannot be read, or the process cannot be started.
    """
    paths = selected.paths
    facts = read_facts(paths)
    repo_id = find_push_to(facts, selected.recipe)
    if repo_id is None or facts.result is None or not facts.attempts:
        return None
    seconds = _PATIENCE_SECONDS + measure_model(facts.result.files or {}) / _BYTES_PER_SECOND
    log_path = paths.attempt(facts.attempts[-1].number).push_log_path
    with open_to_append(log_path) as log:
        log_start = os.fstat(log.fileno()).st_size
        process = subprocess.Popen(
            # -P: modules in the working directory are not imported by accident.
            [sys.executable, "-P", "-m", "runner.publish.push_child", paths.run_dir, str(seconds)],
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # only this process reacts to Ctrl-C
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    kill_at = time.monotonic() + seconds + _GRACE_SECONDS
    return RunningPush(selected, repo_id, process, log_path, log_start, seconds, kill_at)


@dataclass
class Pushes:
    """The pushes of a sweep, a few at a time, in the order in which their runs completed."""

    say: Callable[[str], None]
    report_end: Callable[[str, str], None]  # name of a run, and the outcome of its push
    selector: selectors.BaseSelector
    awaits_held: bool = False  # wait for pushes by other processes
    waiting: list[Selected] = field(default_factory=list)
    active: dict[int, RunningPush] = field(default_factory=dict)  # by pidfd
    # Pushes by other processes: name of the run -> the push, and the time of the next check.
    held: dict[str, tuple[RunningPush, float]] = field(default_factory=dict)
    was_ended: bool = False  # before all were done
    _reported: set[str] = field(default_factory=set)  # runs reported as waiting for another's push
    _is_closed: bool = False

    def has_work(self) -> bool:
        """True while a push is in progress or still to be made."""
        return bool(self.waiting or self.active or self.held)

    def add(self, selected: Selected) -> None:
        """Push a completed run if its recipe requests it; after `end` it stays pending."""
        if self._is_closed:
            self.was_ended = self.was_ended or _has_push(selected)
            return
        self.waiting.append(selected)
        self._start_next()

    def finish(self, pidfd: int) -> None:
        """Report how a push ended, and start the next one."""
        push = self._take(pidfd)
        name = push.selected.full_name
        if push.is_left_to_other() and self.awaits_held:
            if name not in self._reported:
                self._reported.add(name)
                self.say(
                    f"{name}  waiting for its push to {push.repo_id} by another process;"
                    " Ctrl-C stops waiting"
                )
            self.held[name] = (push, time.monotonic() + _LOOK_SECONDS)
        else:
            self.report_end(name, push.describe_end())
        self._start_next()

    def look(self, now: float) -> None:
        """Kill pushes that take too long, and retry those that another process has given up."""
        for push in self.active.values():
            push.kill_overdue(now)
        for name, (push, due_at) in list(self.held.items()):
            if due_at > now:
                continue
            if _is_held(push.selected.paths):
                self.held[name] = (push, now + _LOOK_SECONDS)
                continue
            del self.held[name]
            self.add(push.selected)

    def end(self) -> None:
        """Kill all pushes and start no more; they stay pending."""
        self.was_ended = self.was_ended or self.has_work()
        self._is_closed = True
        self.waiting, self.held = [], {}
        for pidfd in list(self.active):
            push = self._take(pidfd)
            push.process.kill()
            push.process.wait()

    def describe(self) -> dict[str, str]:
        """The pushes in progress, by the name of the run."""
        return {
            push.selected.full_name: f"is being pushed to {push.repo_id}"
            for push in self.active.values()
        } | {name: "is being pushed by another process" for name in self.held}

    def _take(self, pidfd: int) -> RunningPush:
        self.selector.unregister(pidfd)
        os.close(pidfd)
        return self.active.pop(pidfd)

    def _start_next(self) -> None:
        while self.waiting and len(self.active) < MAX_AT_A_TIME:
            selected = self.waiting.pop(0)
            try:
                push = start_push(selected)
            except (CorruptFileError, OSError) as error:  # a failed push never fails a run
                self.report_end(selected.full_name, f"completed, but not pushed: {error}")
                continue
            if push is not None:
                pidfd = os.pidfd_open(push.process.pid)
                self.active[pidfd] = push
                self.selector.register(pidfd, selectors.EVENT_READ, data=push)
            elif selected.full_name in self._reported:
                self.report_end(
                    selected.full_name,
                    _describe_pushed(selected.paths) or "has nothing left to push",
                )


def _is_held(paths: RunPaths) -> bool:
    try:
        return is_leased(paths.push_lock_path)
    except (CorruptFileError, OSError):  # the next attempt to push reports it
        return False


def _has_push(selected: Selected) -> bool:
    try:
        return find_push_to(read_facts(selected.paths), selected.recipe) is not None
    except (CorruptFileError, OSError):
        return False
