"""Sessions, parents and signals: which processes belong to an attempt and end with it, who has a
file open, and which signals ask `runner launch` and `runner sweep` to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

# `<run>:<attempt>`, the run as `launch.attempt` names it, in the environment of everything that an
# attempt starts.
OWNER_VARIABLE: Final = "RUNNER_OWNER"

# Of one message between a sweep and its worker, at most; a path has up to 4,096.
MESSAGE_BYTES: Final = 65536

# Of an owner in an environment that leaves room for those of forks.
_OWNER_BYTES: Final = 4608

_PATIENCE_SECONDS: Final = 30.0  # a process that the kernel cannot end waits for a disk
_PR_SET_PDEATHSIG: Final = 1
_PRCTL: Final = ctypes.CDLL(None, use_errno=True).prctl  # looked up before any fork
_GETENV: Final = ctypes.CDLL(None).getenv
_GETENV.restype = ctypes.c_void_p


def die_with_parent(parent_pid: int | None = None) -> None:
    """SIGKILL for this process when the thread that started it is gone (Linux `prctl(2)`).

    `parent_pid` is the parent as it was at the start: if it is gone already, the process ends at
    once. Safe between fork and exec.
    """
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def leave_room_for_owners(name: str) -> str:
    """A value of `OWNER_VARIABLE` for a process whose forks will each carry another one."""
    return name.ljust(_OWNER_BYTES, ".")


def carry_owner(owner: str) -> None:
    """Make this fork, and what it starts, processes of an attempt.

    `/proc/PID/environ` shows the strings with which the process that forked was executed, whatever
    has been set since; so the owner is written over the one of `leave_room_for_owners`.

    Raises:
        ValueError: there is no such room.
    """
    value = os.fsencode(owner)
    address = _GETENV(OWNER_VARIABLE.encode())
    if address is None or len(value) >= (room := len(ctypes.string_at(address))):
        raise ValueError(f"the environment has no room for {owner!r}")
    ctypes.memmove(address, value.ljust(room, b"\0"), room)
    os.environ[OWNER_VARIABLE] = owner


def list_holders(path: Path) -> dict[int, str]:
    """`process id -> command line` of the other processes that have a file open, as far as `/proc`
    shows them to us.
    """
    holders: dict[int, str] = {}
    try:
        wanted = path.stat()
    except OSError:
        return holders
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            if any(
                os.path.samestat(os.stat(link), wanted)
                for link in (process / "fd").iterdir()
                if link.exists()
            ):
                words = (process / "cmdline").read_bytes().split(b"\0")
                holders[int(process.name)] = " ".join(
                    word.decode(errors="replace") for word in words
                ).strip()
        except OSError:  # it is somebody else's, or has just ended
            continue
    return dict(sorted(holders.items()))


def die_with_launcher() -> None:
    """`die_with_parent` for the trainer, also when its launcher has died before this was called.

    Then the parent is already another process, which does not carry the attempt in its environment.
    A parent that cannot be looked at (typed by hand, another PID namespace, another user) is taken
    for the launcher.
    """
    parent_pid = os.getppid()
    die_with_parent(parent_pid)
    attempt = os.environ.get(OWNER_VARIABLE)
    if attempt is not None and parent_pid != 0 and _carries(parent_pid, attempt.__eq__) is False:
        os._exit(1)


def bind_forks(lease_descriptor: int) -> None:
    """Children that this process forks, such as a data loader's workers, never hold the lease, and
    die with it.

    They die with the thread that forked them, so only those of the main thread are bound.
    """
    is_main: list[bool] = []

    def note_thread() -> None:
        is_main[:] = [threading.current_thread() is threading.main_thread()]

    def let_go() -> None:
        with contextlib.suppress(OSError):
            os.close(lease_descriptor)
        if is_main[0]:
            die_with_parent()

    os.register_at_fork(before=note_thread, after_in_child=let_go)


def kill_processes_of(is_meant: Callable[[str], bool]) -> int:
    """End every process on this machine whose attempt is meant, and wait until it is gone; how many
    there were.

    The ranks of several processes are in sessions of their own, so a signal to the launcher's group
    misses what they have started: compilers, a tracker's daemon.
    """
    killed = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or not _carries(int(folder.name), is_meant):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            pidfd = os.pidfd_open(int(folder.name))
            killed.append(pidfd)
            if _carries(int(folder.name), is_meant):  # its id may be somebody else's by now
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd in killed:
        select.select([pidfd], [], [], _PATIENCE_SECONDS)
        os.close(pidfd)
    return len(killed)


def find_processes_of(is_meant: Callable[[str], bool]) -> list[int]:
    """Ids of the processes on this machine whose attempt is meant, ascending."""
    found = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return sorted(pid for pid in found if _carries(pid, is_meant))


def signal_process_of(pid: int, is_meant: Callable[[str], bool], number: signal.Signals) -> None:
    """Send a signal to a process that was found, unless it has ended and its id is another's."""
    with contextlib.suppress(OSError):  # gone meanwhile
        pidfd = os.pidfd_open(pid)
        try:
            if _carries(pid, is_meant):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal, so that only SIGCONT makes it go on."""
    return _read_state(pid) == "T"


# Asks a trainer for the stacks of all its threads.
STACKS_SIGNAL: Final = signal.SIGUSR2


def write_stacks_on_request() -> None:
    """From now on `STACKS_SIGNAL` writes the stacks of this process, or of one that it forks, to
    its standard error.

    The C code of `faulthandler` writes them at once, also where Python would not run a handler: in
    a collective, or waiting for a device.
    """
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)


def writes_stacks(pid: int) -> bool:
    """Whether a process handles `STACKS_SIGNAL`: any other would die of it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)


def has_lost_sibling(num_siblings: int) -> bool:
    """Whether fewer than `num_siblings` children of this process's parent are alive, this one
    counted.
    """
    try:
        tasks = Path(f"/proc/{os.getppid()}/task").glob("*/children")
        siblings = [pid for children in tasks for pid in children.read_text().split()]
    except OSError:
        return False  # the parent cannot be looked at, or is gone
    # If the kernel does not list children, or another process sits between launcher and rank,
    # assume all ranks are alive.
    return str(os.getpid()) in siblings and sum(map(_is_alive, siblings)) < num_siblings


def _is_alive(pid: str) -> bool:
    return _read_state(pid) not in ("", "Z", "X")


def _read_state(pid: int | str) -> str:
    """The letter of `/proc/PID/stat`, empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def _carries(pid: int, is_meant: Callable[[str], bool]) -> bool | None:
    """Whether a process was started with an attempt in its environment that is meant; None where it
    cannot be seen.
    """
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except PermissionError:
        return None
    except OSError:
        return False
    prefix = f"{OWNER_VARIABLE}=".encode()
    values = [entry[len(prefix) :] for entry in content.split(b"\0") if entry.startswith(prefix)]
    return any(is_meant(os.fsdecode(value)) for value in values)


class StopSignals:
    """Notes Ctrl-C, TERM, HUP and USR1 and makes `fileno` readable, so that no line of a sweep is
    ever interrupted.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._readable, self._writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            # `nohup`, or a background process of a script
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._readable)
        os.close(self._writable)

    def fileno(self) -> int:
        """Readable when a signal has come since `drain`."""
        return self._readable

    def drain(self) -> None:
        """Not readable until the next signal."""
        os.read(self._readable, 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
