"""The first steps of a rank: it learns its place among the ranks, and removes the build locks of a
killed compilation.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Where the kernel of this machine knows everybody who has a file open. Elsewhere it may know of
# this machine alone.
_LOCAL_FILE_SYSTEMS: Final = frozenset(
    {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
)
# Of `mallopt(3)`.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_ORPHAN_SECONDS: Final = 120.0
# A maker that was just creating it may not be counted as having it open yet.
_MINIMAL_AGE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class WorldPlace:
    """The place of this process among the ranks of its attempt."""

    rank: int = 0
    local_rank: int = 0  # on this machine
    world_size: int = 1
    local_world_size: int = 1  # on this machine

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> WorldPlace:
        """The place that the launcher wrote into the environment; a process that it started alone
        finds nothing there.
        """
        return cls(
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            world_size=int(environment.get("WORLD_SIZE", "1")),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
        )


def is_of_group(environment: Mapping[str, str]) -> bool:
    """True where the launcher has started this process as one of a group, be it the only one."""
    return "RANK" in environment


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` has started this process for DeepSpeed; its own sign for it."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def keep_freed_memory() -> None:
    """From now on most memory that is freed stays with this process, for the next tensor.

    A trainer on the CPU allocates the same tensors in each step. glibc gives back to the kernel
    what is free at the end of its heap, and every block of more than 32 MiB; the kernel then clears
    and maps each page anew, 5 to 12% of the CPU seconds of small runs. Blocks of more than 128 MiB
    are still given back: with all of them in the heap a run held half as much again. Where the C
    library is another one, nothing changes.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Before glibc 2.35 32 MiB is the most.
        if mallopt(_M_MMAP_THRESHOLD, 2**27) or mallopt(_M_MMAP_THRESHOLD, 2**25):
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def remove_stale_build_locks() -> None:
    """Before DeepSpeed compiles or loads anything: remove what a killed process left, and say what
    had to stay.

    torch's `FileBaton` is a file named `lock` in the extension's build folder. The process that
    compiles makes it (`O_EXCL`) and keeps it open, and no child inherits that; every other process
    waits until it is gone, for ever if its maker is dead.

    Does nothing without DeepSpeed, and nothing to folders of other extensions.
    """
    if not uses_deepspeed():
        return
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    for folder in list_build_folders(ALL_OPS):
        if (said := remove_stale_lock(folder)) is not None:
            print(said, flush=True)


def list_build_folders(names: Iterable[str]) -> list[Path]:
    """Where torch builds extensions of these names, as far as the folders are there."""
    if (root := os.environ.get("TORCH_EXTENSIONS_DIR")) is not None:
        roots = [Path(root)]
    else:
        from torch.utils.cpp_extension import get_default_build_root

        roots = sorted(Path(get_default_build_root()).glob("*"))  # one per Python and accelerator
    return [root / name for root in roots for name in sorted(names) if (root / name).is_dir()]


def remove_stale_lock(folder: Path) -> str | None:
    """Remove the lock of a build folder if nobody compiles there; a line for the log, None where
    there is no lock.

    That nobody has it open is asked of the kernel: it grants a write lease (`fcntl(2)`, F_SETLEASE)
    only on a file that nobody else has open, processes of other users and of other containers
    counted. A lock that cannot be judged stays: on a network file system, of another user, or if
    what its maker had started still compiles after two minutes.
    """
    path = folder / "lock"
    if not path.exists():
        return None
    if (kind := find_file_system(path)) not in _LOCAL_FILE_SYSTEMS:
        return _say_stays(
            path,
            f"it lies on {kind or 'an unknown file system'}, where another machine may have it",
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # One at a time, so that nobody removes a lock made since its look. The others wait here,
        # not for the lock: who waits for that takes the extension for compiled as soon as it is
        # gone.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return _remove_if_nobody_has_it(path)
    except FileNotFoundError:
        return None  # released meanwhile
    except OSError as error:
        return _say_stays(path, f"it cannot be told who has it ({error.strerror})")
    finally:
        os.close(descriptor)


def _say_stays(path: Path, reason: str) -> str:
    return (
        f"{path} stays: {reason}; if nobody compiles there, remove it, or DeepSpeed waits for ever"
    )


def _remove_if_nobody_has_it(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            return _say_stays(path, "it is not a lock of torch's")
        if not _is_ours_alone(descriptor) or time.time() - found.st_mtime < _MINIMAL_AGE_SECONDS:
            return f"{path}: DeepSpeed waits for another process that compiles there"
        if (pid := _wait_for_orphans(path.parent)) is not None:
            return _say_stays(path, f"process {pid} still works there")
        if not os.path.samestat(found, path.stat()):
            return f"{path}: DeepSpeed waits for another process that compiles there"
        path.unlink()
        return f"removed {path}: nobody has it open, so its maker was killed while it compiled"
    finally:
        os.close(descriptor)  # gives the lease back


def _is_ours_alone(descriptor: int) -> bool:
    """Whether nobody else has the file open; nobody opens it, either, until the descriptor is
    closed.
    """
    # Who wants it is announced; SIGIO would end this process.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    return True


def find_file_system(path: Path) -> str | None:
    """The type of the file system on which a file lies, as the kernel names it."""
    real, found = path.resolve(), (0, "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        # \040 stands for a space
        point = Path(fields.split(" ")[4].encode().decode("unicode_escape"))
        if real.is_relative_to(point):
            # The later of equals.
            found = max((len(point.parts), source.split(" ")[0]), found, key=lambda one: one[0])
    return found[1] or None


def _wait_for_orphans(folder: Path) -> int | None:
    """Wait for what a killed maker had started (ninja, compilers: they run in the folder); one that
    has not ended.
    """
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while orphans := _list_processes_in(folder):
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                        return pid
                finally:
                    os.close(pidfd)
    return None


def _list_processes_in(folder: Path) -> list[int]:
    wanted, found = folder.stat(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is somebody else's, or has just ended
            if os.path.samestat((process / "cwd").stat(), wanted):
                found.append(int(process.name))
    return found
