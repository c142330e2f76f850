"""The first process of an attempt on this machine, seen from the launcher: it leads a session, and
can be signalled and waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import Protocol


class AttemptProcess(Protocol):
    """The process of a started attempt; its id is also the id of its process group."""

    def open_pidfd(self) -> int:
        """A new descriptor, owned by the caller, that is readable once the process has ended."""

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the group; does nothing after `wait`."""

    def wait(self) -> int | None:
        """Wait for the process, then kill the rest of its group.

        Returns its exit status, negative for a signal, or None if the status is lost.
        """


@dataclass
class LauncherProcess:
    """An `accelerate launch` or `srun` that is a child of this process: a cold start."""

    popen: subprocess.Popen[bytes]

    def open_pidfd(self) -> int:
        """See `AttemptProcess`."""
        return os.pidfd_open(self.popen.pid)

    def signal_group(self, number: signal.Signals) -> None:
        """See `AttemptProcess`; with several processes, each rank is in its own session."""
        if self.popen.returncode is None:  # once it is reaped, its id may be reused
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)

    def wait(self) -> int | None:
        """See `AttemptProcess`."""
        if self.popen.returncode is None:
            os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
            # Kill processes that the launcher left; its id is not free for reuse yet.
            self.signal_group(signal.SIGKILL)
        return self.popen.wait()
