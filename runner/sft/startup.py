"""The first steps of a rank: it reads its place among the ranks, and removes the build locks of a
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

# File systems on which the kernel of this machine knows every process that has a file open. On
# others, it may know only the processes of this machine.
_LOCAL_FILE_SYSTEMS: Final = frozenset(
    {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
)
# From `mallopt(3)`.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_ORPHAN_SECONDS: Final = 120.0
# A process that is just creating the lock may not count as having it open yet.
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
        """The place that the launcher wrote to the environment. For a process that was started
        alone, the variables are missing and the defaults apply.
        """
        return cls(
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            world_size=int(environment.get("WORLD_SIZE", "1")),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
        )


def is_of_group(environment: Mapping[str, str]) -> bool:
    """True if the launcher started this process as part of a group, even as its only member."""
    return "RANK" in environment


def uses_deepspeed() -> bool:
    """True if `accelerate launch` started this process for DeepSpeed, by the variable it sets."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def keep_freed_memory() -> None:
    """From now on, keep most freed memory in this process for the next tensor.

    Training on the CPU allocates the same tensors in each step. By default, glibc returns free
    memory at the end of its heap, and every block of more than 32 MiB, to the kernel. The kernel
    then clears and maps each page again, which took 5 to 12% of the CPU seconds of small runs.
    Blocks of more than 128 MiB are still returned: with all of them in the heap, a run held 50%
    more memory. With another C library, nothing changes.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Before glibc 2.35, 32 MiB is the maximum.
        if mallopt(_M_MMAP_THRESHOLD, 2**27) or mallopt(_M_MMAP_THRESHOLD, 2**25):
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def remove_stale_build_locks() -> None:
    """Remove the locks that killed processes left, and log those that had to stay. Call it before
    DeepSpeed compiles or loads anything.

    torch's `FileBaton` is a file named `lock` in the extension's build folder. The process that
    compiles creates it (`O_EXCL`) and keeps it open, and no child inherits the descriptor. Every
    other process waits until the file is gone: for ever, if its creator is dead.

    Does nothing without DeepSpeed, and does not touch folders of other extensions.
    """
    if not uses_deepspeed():
        return
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    for folder in list_build_folders(ALL_OPS):
        if (said := remove_stale_lock(folder)) is not None:
            print(said, flush=True)


def list_build_folders(names: Iterable[str]) -> list[Path]:
    """The existing folders in which torch builds the extensions with these names."""
    if (root := os.environ.get("TORCH_EXTENSIONS_DIR")) is not None:
        roots = [Path(root)]
    else:
        from torch.utils.cpp_extension import get_default_build_root

        roots = sorted(Path(get_default_build_root()).glob("*"))  # one per Python and accelerator
    return [root / name for root in roots for name in sorted(names) if (root / name).is_dir()]


def remove_stale_lock(folder: Path) -> str | None:
    """Remove the lock of a build folder if no process compiles there. Returns a line for the log;
    None if there is no lock.

    The kernel grants a write lease (`fcntl(2)`, F_SETLEASE) only on a file that no other process
    has open, including processes of other users and containers. A lock stays if this check is not
    possible (on a network file system, or for another user's file), or if processes started by its
    creator still compile after two minutes.
    """
    path = folder / "lock"
    if not path.exists():
        return None
    if (kind := find_file_system(path)) not in _LOCAL_FILE_SYSTEMS:
        return _describe_kept(
            path,
            f"it is on {kind or 'an unknown file system'}, so another machine may hold it",
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # One process at a time, so that none removes a lock created after its check. The others
        # wait here and not for the lock itself: a process that waits for the lock assumes, once it
        # is gone, that the extension is compiled.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return _remove_if_unused(path)
    except FileNotFoundError:
        return None  # released meanwhile
    except OSError as error:
        return _describe_kept(path, f"its holder cannot be determined ({error.strerror})")
    finally:
        os.close(descriptor)


def _describe_kept(path: Path, reason: str) -> str:
    return (
        f"{path} stays: {reason}; remove it if no process compiles there, else DeepSpeed waits for"
        " ever"
    )


def _remove_if_unused(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            return _describe_kept(path, "it is not a lock made by torch")
        if not _is_ours_alone(descriptor) or time.time() - found.st_mtime < _MINIMAL_AGE_SECONDS:
            return f"{path}: DeepSpeed waits for another process that compiles there"
        if (pid := _wait_for_orphans(path.parent)) is not None:
            return _describe_kept(path, f"process {pid} is still working there")
        if not os.path.samestat(found, path.stat()):
            return f"{path}: DeepSpeed waits for another process that compiles there"
        path.unlink()
        return f"removed {path}: no process has it open, so a killed compilation left it"
    finally:
        os.close(descriptor)  # releases the lease


def _is_ours_alone(descriptor: int) -> bool:
    """True if no other process has the file open; none can open it, either, until the descriptor
    is closed.
    """
    # The kernel sends us a signal if another process opens the file. Its default, SIGIO, would end
    # this process.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    return True


def find_file_system(path: Path) -> str | None:
    """The kernel's name for the type of the file system that holds a file."""
    real, found = path.resolve(), (0, "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        # \040 means a space.
        point = Path(fields.split(" ")[4].encode().decode("unicode_escape"))
        if real.is_relative_to(point):
            # Of equal depths, the later mount wins.
            found = max((len(point.parts), source.split(" ")[0]), found, key=lambda one: one[0])
    return found[1] or None


def _wait_for_orphans(folder: Path) -> int | None:
    """Wait for the processes that a killed creator had started in the folder, such as ninja and
    compilers. Returns the id of one that has not ended, or None.
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
        with contextlib.suppress(OSError):  # it belongs to another user, or has just ended
            if os.path.samestat((process / "cwd").stat(), wanted):
                found.append(int(process.name))
    return found
