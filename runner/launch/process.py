"""The first process of an attempt on this machine as who started it sees it: one that leads a
session, and that can be signalled and waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import Protocol


class AttemptProcess(Protocol):
    """What starts an attempt returns this; the id of the process is also that of its group."""

    def open_pidfd(self) -> int:
        """A descriptor of the caller's own that is readable once the process has ended."""

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the group; nothing once it was waited for."""

    def wait(self) -> int | None:
        """End what is left of the group once the process has ended.

        Its exit status, negative for a signal, None where nobody is left who could tell.
        """


@dataclass
class LauncherProcess:
    """An `accelerate launch`, or an `srun`, that is a child of this process: a cold start."""

    popen: subprocess.Popen[bytes]

    def open_pidfd(self) -> int:
        """See `AttemptProcess`."""
        return os.pidfd_open(self.popen.pid)

    def signal_group(self, number: signal.Signals) -> None:
        """See `AttemptProcess`; the ranks of several processes are in sessions of their own."""
        if self.popen.returncode is None:  # once it is reaped, its id may be somebody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)

    def wait(self) -> int | None:
        """See `AttemptProcess`."""
        if self.popen.returncode is None:
            os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
            # What the launcher may have left; its own id is not free yet.
            self.signal_group(signal.SIGKILL)
        return self.popen.wait()
