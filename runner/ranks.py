"""How the launcher and the ranks of an attempt on several machines know of each other: two locks in the run directory.

On one machine the trainer inherits the lease as its stdin and dies with its launcher. Neither reaches another one, so:

- the launcher holds `attempts/<n>/launcher` while the attempt may go on; a rank waits for it and ends when it has it;
- all ranks share `ranks`; while one of them lives, nobody else gets the lease of the run.

Who is late finds the launcher's lock free and leaves before it has touched anything. The locks are the file system's
(`flock`): they are free the moment their holder dies, in whatever way, and nothing is polled.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

from runner.fsio import Lease
from runner.paths import AttemptPaths, RunPaths

ATTEMPT_VARIABLE: Final = "RUNNER_ATTEMPT"  # tells the ranks which attempt they belong to


def hold_launcher_lock(files: AttemptPaths) -> Lease:
    """The launcher's lock of a new attempt, before any rank is started; closing it ends all ranks."""
    lock = Lease(files.launcher_lock_path)
    lock.try_acquire()  # nobody else knows the attempt yet
    return lock


def has_ranks(paths: RunPaths) -> bool:
    """Whether a rank of an attempt on several machines is alive anywhere."""
    try:
        stream = paths.ranks_lock_path.open("r+b")
    except FileNotFoundError:
        return False
    with stream:
        for pause_seconds in (0.02, 0.05, 0.13, 0.0):  # another one that looks has it for an instant
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(pause_seconds)
            else:
                return False
    return True


def wait_for_ranks(paths: RunPaths, timeout_seconds: float) -> None:
    """Until no rank is alive, or for that long: a machine that is out of reach may take its file system's own time."""
    if paths.ranks_lock_path.exists():
        waiting = threading.Thread(target=_wait_for_lock, args=(paths.ranks_lock_path, fcntl.LOCK_EX), daemon=True)
        waiting.start()
        waiting.join(timeout_seconds)


def join_attempt(paths: RunPaths, number: int) -> Lease:
    """In a rank: what tells others that it is alive. The process ends at once if its launcher is gone, now or later."""
    lock_path = paths.attempt(number).launcher_lock_path
    ranks = Lease(paths.ranks_lock_path)
    fcntl.flock(ranks.fileno(), fcntl.LOCK_SH)
    if _is_free(lock_path):
        print(
            f"error: nobody holds {lock_path}: `runner launch` is gone, or the locks of this file system do not reach "
            "from one machine to another (Lustre: mount with `-o flock`)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # and nothing is recorded: the run may be somebody else's by now
    threading.Thread(target=_end_with_launcher, args=(lock_path,), daemon=True).start()
    return ranks


def _is_free(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # the run was moved aside
        return True
    return True


def _end_with_launcher(lock_path: Path) -> None:
    _wait_for_lock(lock_path, fcntl.LOCK_SH)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_lock(path: Path, kind: int) -> None:
    with path.open("r+b") as stream:
        fcntl.flock(stream, kind)
