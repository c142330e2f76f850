"""Binding a process to its parent, so that nothing goes on alone after a kill; and who has a file open."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
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


def list_holders(path: Path) -> dict[int, str]:
    """`process id -> command line` of the other processes that have a file open, as far as `/proc` shows them to us."""
    holders: dict[int, str] = {}
    try:
        wanted = path.stat()
    except OSError:
        return holders
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            if any(os.path.samestat(os.stat(link), wanted) for link in (process / "fd").iterdir() if link.exists()):
                words = (process / "cmdline").read_bytes().split(b"\0")
                holders[int(process.name)] = " ".join(word.decode(errors="replace") for word in words).strip()
        except OSError:  # it is somebody else's, or has just ended
            continue
    return dict(sorted(holders.items()))
