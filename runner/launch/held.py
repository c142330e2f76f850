"""Runs that another sweep or launch holds: finds the holder, and notices when they are free again.

Checks the locks every few seconds instead of waiting for them: a directory may be moved aside
meanwhile, its holder may be on another machine, and waiting for a lock cannot be cancelled.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Final

from runner.errors import CorruptFileError
from runner.plan.decide import Launch
from runner.processes import list_holders
from runner.run.lease import has_ranks, is_leased
from runner.run.paths import RunPaths
from runner.run.record import load_record
from runner.text import format_count

_LOOK_SECONDS: Final = 2.0  # between two checks; each is a few system calls


@dataclass
class HeldRuns:
    """The held runs, each with the time (`time.monotonic`) of its next check."""

    due_at: dict[str, float] = field(default_factory=dict)
    runs: dict[str, Launch] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.runs)

    def add(self, run: Launch) -> None:
        """Wait for the lease of a run."""
        self.runs[run.full_name] = run
        self.due_at[run.full_name] = time.monotonic() + _LOOK_SECONDS

    def take_free(self) -> list[Launch]:
        """Remove and return the runs whose leases are free now."""
        now = time.monotonic()
        free = []
        for name, run in list(self.runs.items()):
            if self.due_at[name] > now:
                continue
            if _is_held(run.paths):
                self.due_at[name] = now + _LOOK_SECONDS
                continue
            del self.runs[name], self.due_at[name]
            self._reported.discard(name)
            free.append(run)
        return free

    def describe_unreported(self) -> str | None:
        """A line with the runs that are waited for; None if all of them were reported before."""
        unreported = [run for name, run in self.runs.items() if name not in self._reported]
        if not unreported:
            return None
        self._reported |= self.runs.keys()
        what = format_count(len(unreported), "run")
        named = ", ".join(f"{run.full_name} ({describe_holder(run.paths)})" for run in unreported)
        return f"waiting for {what} that another sweep holds: {named}; Ctrl-C stops waiting"


def _is_held(paths: RunPaths) -> bool:
    try:
        return is_leased(paths.lease_path) or has_ranks(paths)
    except CorruptFileError:  # not a plain file; starting the run reports it
        return False
    except OSError:  # the file system does not answer; the next check may succeed
        return True


def describe_holder(paths: RunPaths) -> str:
    """The process that holds a run, if it is visible on this machine; else the machine on which the
    last attempt was started.
    """
    # The first holder is the sweep: it is older than the training process that it started.
    for pid in list_holders(paths.lease_path):
        return f"process {pid} on {socket.gethostname()}"
    try:
        attempts = load_record(paths).attempts
    except (CorruptFileError, OSError):
        attempts = ()
    return f"a process on {attempts[-1].host}" if attempts else "another process"
