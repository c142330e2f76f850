"""Sessions, parents and signals: finds and ends the processes of an attempt, finds the processes
that have a file open, and notes the signals that stop `runner launch` and `runner sweep`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import shlex
import signal
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any, Final

# Holds `<run>:<attempt>`, with the run as `launch.attempt` names it, in the environment of every
# process that an attempt starts.
OWNER_VARIABLE: Final = "RUNNER_OWNER"

# The limit of one message between a sweep and its worker; a path has up to 4,096.
MESSAGE_BYTES: Final = 65536

# The size of an owner's value that leaves room for the owners of forks.
_OWNER_BYTES: Final = 4608

_PATIENCE_SECONDS: Final = 30.0  # a process that waits for a disk cannot be ended
_PR_SET_PDEATHSIG: Final = 1
_PRCTL: Final = ctypes.CDLL(None, use_errno=True).prctl  # looked up before any fork
_GETENV: Final = ctypes.CDLL(None).getenv
_GETENV.restype = ctypes.c_void_p


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux `prctl(2)`).

    `parent_pid` is the parent at the start; if it has already ended, this process exits
    immediately. Safe between fork and exec.
    """
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def leave_room_for_owners(name: str) -> str:
    """A value of `OWNER_VARIABLE` for a process whose forks will each have another owner."""
    return name.ljust(_OWNER_BYTES, ".")


def carry_owner(owner: str) -> None:
    """Make this fork, and everything that it starts, processes of an attempt.

    `/proc/PID/environ` shows the environment with which the forking process was executed, whatever
    was set since. So the owner overwrites the value of `leave_room_for_owners`.

    Raises:
        ValueError: there is not enough room.
    """
    value = os.fsencode(owner)
    address = _GETENV(OWNER_VARIABLE.encode())
    if address is None or len(value) >= (room := len(ctypes.string_at(address))):
        raise ValueError(f"the environment has no room for {owner!r}")
    ctypes.memmove(address, value.ljust(room, b"\0"), room)
    os.environ[OWNER_VARIABLE] = owner


def list_holders(path: Path) -> dict[int, str]:
    """`process id -> command line` of the other processes that have a file open, if `/proc` shows
    them to this user.
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
        except OSError:  # it belongs to another user, or has just ended
            continue
    return dict(sorted(holders.items()))


def find_commands(verbs: Collection[str]) -> dict[int, str]:
    """`process id -> command line` of the other `runner VERB` processes of this machine with the
    same current folder, if `/proc` shows them to this user. Finds a process from its first moment.
    """
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            if not os.path.samefile(process / "cwd", "."):
                continue
            content = (process / "cmdline").read_bytes().removesuffix(b"\0")
        except OSError:  # it belongs to another user, or has just ended
            continue
        words = [word.decode(errors="replace") for word in content.split(b"\0")]
        names = [os.path.basename(word) for word in words[:_MAX_START_WORDS]]
        if "runner" in names:
            rest = words[names.index("runner") + 1 :]
            verb = next((word for word in rest if not word.startswith("-")), None)
            if verb in verbs:
                found[int(process.name)] = shlex.join(["runner", *rest])
    return dict(sorted(found.items()))


_MAX_START_WORDS: Final = 6  # before the verb: Python, its options, `-m`, `runner`


def die_with_launcher() -> None:
    """Like `die_with_parent`, for the training process, even if its launcher died before this call.

    Then the parent is already another process, without the attempt in its environment. A parent
    that cannot be examined (typed by hand, another PID namespace, another user) counts as the
    launcher.
    """
    parent_pid = os.getppid()
    die_with_parent(parent_pid)
    attempt = os.environ.get(OWNER_VARIABLE)
    if attempt is not None and parent_pid != 0 and _carries(parent_pid, attempt.__eq__) is False:
        os._exit(1)


def bind_forks(lease_descriptor: int) -> None:
    """Make children that this process forks, such as a data loader's workers, close the lease and
    die with this process.

    Children die with the thread that forked them, so only those of the main thread are bound.
    """
    is_main: list[bool] = []

    def note_thread() -> None:
        is_main[:] = [threading.current_thread() is threading.main_thread()]

    def bind_child() -> None:
        with contextlib.suppress(OSError):
            os.close(lease_descriptor)
        if is_main[0]:
            die_with_parent()

    os.register_at_fork(before=note_thread, after_in_child=bind_child)


def kill_processes_of(is_meant: Callable[[str], bool]) -> int:
    """Kill every process on this machine whose attempt `is_meant`, and wait until they have ended;
    returns their number.

    The ranks of several processes have their own sessions, so a signal to the launcher's group
    misses the compilers and tracker daemons that they have started.
    """
    killed = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or not _carries(int(folder.name), is_meant):
            continue
        with contextlib.suppress(OSError):  # it has ended in the meantime
            pidfd = os.pidfd_open(int(folder.name))
            killed.append(pidfd)
            if _carries(int(folder.name), is_meant):  # its id may belong to another process by now
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd in killed:
        select.select([pidfd], [], [], _PATIENCE_SECONDS)
        os.close(pidfd)
    return len(killed)


def has_ending_processes() -> bool:
    """True if a process of this user on this machine is ending: it may still have files open, but
    neither its environment nor, to a user other than root, its files can be read.
    """
    return any(_is_ending(process) for process in Path("/proc").glob("[0-9]*"))


def _is_ending(process: Path) -> bool:
    states = []
    try:
        if process.stat().st_uid != os.geteuid():
            return False
        for thread in (process / "task").iterdir():
            # The last thread returns the memory; the others have already ended.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                states.append((thread / "stat").read_text().rpartition(") ")[2].split())
    except OSError:  # it has ended
        return False
    is_exiting = any(int(state[_FLAGS]) & _PF_EXITING for state in states)
    return is_exiting and any(state[0] not in "ZX" for state in states)


_FLAGS: Final = 6  # of the fields of `/proc/PID/stat` after the name
_PF_EXITING: Final = 0x4  # Linux `include/linux/sched.h`


def find_processes_of(is_meant: Callable[[str], bool]) -> list[int]:
    """The ids of the processes on this machine whose attempt `is_meant`, ascending."""
    found = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return sorted(pid for pid in found if _carries(pid, is_meant))


def signal_process_of(pid: int, is_meant: Callable[[str], bool], number: signal.Signals) -> None:
    """Send a signal to a process that was found, unless it has ended and its id was reused."""
    with contextlib.suppress(OSError):  # it has ended in the meantime
        pidfd = os.pidfd_open(pid)
        try:
            if _carries(pid, is_meant):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def is_stopped(pid: int) -> bool:
    """True if a signal stopped a process, so that only SIGCONT continues it."""
    return _read_state(pid) == "T"


# Requests the stacks of all threads of a training process.
STACKS_SIGNAL: Final = signal.SIGUSR2


def write_stacks_on_request() -> None:
    """Make `STACKS_SIGNAL` write the stacks of this process, or of one that it forks, to its
    standard error.

    The C code of `faulthandler` writes them immediately, even where Python would not run a handler:
    in a collective, or while waiting for a device.
    """
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)


def writes_stacks(pid: int) -> bool:
    """True if a process handles `STACKS_SIGNAL`, which would kill any other."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)


def has_lost_sibling(num_siblings: int) -> bool:
    """True if fewer than `num_siblings` children of this process's parent are alive, including this
    process.
    """
    try:
        tasks = Path(f"/proc/{os.getppid()}/task").glob("*/children")
        siblings = [pid for children in tasks for pid in children.read_text().split()]
    except OSError:
        return False  # the parent cannot be examined, or has ended
    # If the kernel does not list children, or another process sits between launcher and rank,
    # assume all ranks are alive.
    return str(os.getpid()) in siblings and sum(map(_is_alive, siblings)) < num_siblings


def _is_alive(pid: str) -> bool:
    return _read_state(pid) not in ("", "Z", "X")


def _read_state(pid: int | str) -> str:
    """The state letter of `/proc/PID/stat`, empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def _carries(pid: int, is_meant: Callable[[str], bool]) -> bool | None:
    """True if a process was started with an attempt in its environment that `is_meant`; None if its
    environment cannot be read.
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
    """Notes Ctrl-C, TERM, HUP and USR1 and makes `fileno` readable, so that a signal never
    interrupts the sweep's code.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._readable, self._writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            # It is ignored under `nohup`, or in a background process of a script.
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
        """A descriptor that is readable if a signal has arrived since `drain`."""
        return self._readable

    def drain(self) -> None:
        """Make `fileno` unreadable until the next signal."""
        os.read(self._readable, 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
