"""The lease of a run, and two locks by which a launcher and its ranks on other machines notice each
other.

On one machine the training process inherits the lease as its stdin and dies with its launcher.
Neither works across machines, so:

- the launcher holds `attempts/<n>/launcher` while the attempt may continue; a rank waits for that
  lock and exits when it gets it;
- all ranks share `ranks`; while one of them lives, no other process gets the lease of the run.

A rank that starts after its launcher died finds the lock free and exits without touching the run.
The locks belong to the file system (`flock`), so they are free as soon as their holder dies,
however that happens, and nothing is polled.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO, Final

from runner.files import make_folder, open_plain
from runner.run.paths import AttemptPaths, RunPaths

# Separate from the generator that training draws from, because a training process also acquires
# such locks.
_RANDOM: Final = random.Random()
_LOOKING_SECONDS: Final = 5.0  # limit for one check of a lease on a slow file system


class Lease:
    """An exclusive `flock` on a run directory.

    The lock belongs to the open file, not to the process. A child that gets `fileno` as its stdin
    keeps it held while the child lives, even if the parent is killed; it is free as soon as the
    last holder dies.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = _open_in_new_folder(path)

    def try_acquire(self) -> bool:
        """True if the lease is now ours; False if a live process holds it or has moved the
        directory aside.

        A probe (`is_leased`) holds only a shared lock, so we wait and retry; a real holder's lock
        is exclusive, so we give up.
        """
        deadline = time.monotonic() + _LOOKING_SECONDS
        while not self._try_lock(fcntl.LOCK_EX):
            if not self._try_lock(fcntl.LOCK_SH):
                return False
            fcntl.flock(self._stream, fcntl.LOCK_UN)
            if time.monotonic() > deadline:
                return False
            # Random, so that two processes that probe each other get out of step.
            time.sleep(_RANDOM.uniform(0.001, 0.02))
        return self._is_in_place()

    def _try_lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def fileno(self) -> int:
        """The descriptor to pass to the training process as stdin."""
        return self._stream.fileno()

    def close(self) -> None:
        """Release our hold; the lease stays held while a child still has the descriptor."""
        self._stream.close()


def _open_in_new_folder(path: Path) -> BinaryIO:
    while True:
        make_folder(path.parent)
        with contextlib.suppress(FileNotFoundError):  # the folder was moved aside at this instant
            return os.fdopen(open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")


def is_leased(path: Path) -> bool:
    """True if a live process holds the lease. Takes a shared lock for an instant, so it never
    blocks a holder.

    Raises:
        CorruptFileError: the path is not a plain file.
    """
    try:
        stream = os.fdopen(open_plain(path), "rb")
    except FileNotFoundError:
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


ATTEMPT_VARIABLE: Final = "RUNNER_ATTEMPT"  # the attempt that the ranks belong to


def hold_launcher_lock(files: AttemptPaths) -> Lease:
    """The launcher's lock of a new attempt, taken before any rank starts; closing it ends all
    ranks.
    """
    lock = Lease(files.launcher_lock_path)
    lock.try_acquire()  # no other process knows the attempt yet
    return lock


def has_ranks(paths: RunPaths) -> bool:
    """True if a rank of an attempt on several machines is alive anywhere."""
    try:
        stream = os.fdopen(open_plain(paths.ranks_lock_path, os.O_RDWR), "r+b")
    except FileNotFoundError:
        return False
    with stream:
        # Another probe holds the lock for an instant.
        for pause_seconds in (0.02, 0.05, 0.13, 0.0):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(pause_seconds)
            else:
                return False
    return True


def wait_for_ranks(paths: RunPaths, timeout_seconds: float) -> None:
    """Wait until no rank is alive, at most `timeout_seconds`: the file system may take its own time
    to notice that a machine is unreachable.
    """
    if paths.ranks_lock_path.exists():
        waiting = threading.Thread(
            target=_wait_for_lock, args=(paths.ranks_lock_path, fcntl.LOCK_EX), daemon=True
        )
        waiting.start()
        waiting.join(timeout_seconds)


def join_attempt(paths: RunPaths, number: int) -> Lease:
    """In a rank: acquire the lock that shows other processes that this rank is alive. The process
    ends immediately if its launcher is gone, now or later.
    """
    lock_path = paths.attempt(number).launcher_lock_path
    ranks = Lease(paths.ranks_lock_path)
    fcntl.flock(ranks.fileno(), fcntl.LOCK_SH)
    if _is_free(lock_path):
        print(
            f"error: no process holds {lock_path}: `runner launch` has ended, or this file system"
            " does not share locks between machines (Lustre: mount with `-o flock`)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # record nothing: another process may own the run by now
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
