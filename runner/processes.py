"""Binding a process to its parent, so that nothing goes on alone after a kill."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PRCTL: Final = ctypes.CDLL(None, use_errno=True).prctl  # looked up before any fork


def die_with_parent(parent_pid: int | None = None) -> None:
    """SIGKILL for this process when the thread that started it is gone (Linux `prctl(2)`).

    `parent_pid` is the parent as it was at the start: if it is gone already, the process ends at once. Safe between
    fork and exec.
    """
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
