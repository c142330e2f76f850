"""`python -m runner.sft.worker HIDDEN...`, started by `accelerate launch` for a sweep: imports the
libraries for training, and forks one training process per attempt.

This process only imports and forks. It reads no file of a run, runs no user code, starts no thread
and never touches a GPU. `runner.launch.worker` is the sweep's side, and documents the messages.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import socket
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from runner.processes import (
    MESSAGE_BYTES,
    carry_owner,
    die_with_launcher,
    die_with_parent,
    write_stacks_on_request,
)

# Then the worker is replaced, so anything that forks leave behind in it stays small.
MAX_CHILDREN: Final = 100
_MAX_GROWTH: Final = 1.5  # of its memory since the imports
_STANDARD: Final = (0, 1, 2)
# NVML, which only counts devices, does not open these.
_GPU_FILES: Final = ("/dev/nvidia-uvm", "/dev/kfd")


def main() -> int:
    """Serve until the sweep closes the socket; in a child, train."""
    die_with_launcher()
    write_stacks_on_request()
    control = take_control()
    versions, why_not = _import(sys.argv[1:])
    run_dir = serve(control, {"versions": versions, "why_not": why_not})
    if run_dir is None:
        os._exit(0)  # nothing here needs a teardown
    from runner.sft import __main__ as trainer

    # Set up the same `__main__` as if the training process had been started directly.
    this = sys.modules["__main__"]
    this.__spec__, this.__file__ = trainer.__spec__, trainer.__file__
    sys.argv = [trainer.__file__, run_dir]
    return trainer.main(is_forked=True)


def _import(hidden: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The versions of the imported libraries, and the reason why forks are impossible, or None."""
    from runner.recipe.identity import list_library_versions
    from runner.recipe.libraries import hide_libraries
    from runner.secrets import scrub_output

    scrub_output()
    versions = list_library_versions()  # children report these, even if packages change later
    hide_libraries(hidden)
    from runner.errors import hide_bitsandbytes_warning

    hide_bitsandbytes_warning()
    import torch

    import runner.sft.train  # noqa: F401
    from runner.sft.startup import is_of_group

    _prepare_for_children()

    has_cuda = _try_fork(torch.cuda._is_in_bad_fork) or _has_gpu_open()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    if (count := count_threads()) > 1:
        return versions, f"after the imports there are {count} threads, and a fork keeps only one"
    if has_cuda:
        return versions, "an import has begun to use the GPU, which does not survive a fork"
    if is_of_group(os.environ):
        return versions, "its launch config starts the ranks of a process group"
    return versions, None


def _prepare_for_children() -> None:
    """Do once the work that every child would repeat and that does not depend on a run."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # Transformers builds the table of all architectures when it first loads a model, 0.04 s.
    get_checkpoint_conversion_mapping("")
    # Imports register work for the end of this process, such as deregistering operators, 0.03 s. A
    # child should not do it.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def take_control() -> socket.socket:
    """The socket that was passed as stdin; stdin is empty from now on."""
    control = socket.socket(fileno=os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return control


def serve(control: socket.socket, first_words: Mapping[str, Any]) -> str | None:
    """Fork on each request of the sweep.

    Returns None once the sweep has closed the socket. In each child, returns the run directory, as
    soon as the child is set up like a process that was started only for this run.
    """
    kept = _list_descriptors()
    num_children, size, pid = 0, _measure_memory(), 0
    ours = os.pidfd_open(os.getpid())
    _send(control, first_words, [ours])
    os.close(ours)
    while True:
        request, descriptors = _receive(control)
        if request is None:
            return None
        if "reap" in request:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            is_worn = (
                num_children >= MAX_CHILDREN
                or _measure_memory() > _MAX_GROWTH * size
                or count_threads() > 1
            )
            _send(control, {"status": status, "is_worn": is_worn})
            continue
        parent_pid = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            if len(descriptors) < 2:  # the kernel drops descriptors beyond the limit
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pid = os.fork()
        except OSError as error:
            _close(descriptors)  # before the sweep gets the error and acquires the lease again
            _send(control, {"error": str(error)})
            continue
        if pid == 0:
            keep = {*_STANDARD, *kept} - {control.detach()}
            _become_attempt(request, descriptors, parent_pid, keep)
            return str(request["run_dir"])
        _close(descriptors)
        num_children += 1
        pidfd = os.pidfd_open(pid)
        _send(control, {"pid": pid}, [pidfd])
        os.close(pidfd)


def _become_attempt(
    request: Mapping[str, Any], descriptors: Sequence[int], parent_pid: int, keep: set[int]
) -> None:
    """Set up the child as a separate process: session, death signal, stdin, output, environment."""
    die_with_parent(parent_pid)
    os.setsid()
    lease, log = descriptors
    os.dup2(lease, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _close([*(_list_descriptors() - keep)])  # otherwise it would hold the lease twice
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    carry_owner(request["owner"])


def count_threads() -> int:
    """Count the threads of this process, including those unknown to Python."""
    return len(os.listdir("/proc/self/task"))


def _try_fork(is_bad: Callable[[], bool]) -> bool:
    """True if `is_bad` holds in a fork.

    OpenBLAS, which comes with NumPy, ends its threads before any fork and starts them again when
    it has work, which never happens here.
    """
    if (pid := os.fork()) == 0:
        os._exit(int(is_bad()))
    return os.waitpid(pid, 0)[1] != 0


def _has_gpu_open() -> bool:
    """True if any library started the driver of CUDA or ROCm in this process."""
    for number in _list_descriptors():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(_GPU_FILES):
                return True
    return False


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _list_descriptors() -> set[int]:
    """The open descriptors, without the one through which the list was read."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found.add(int(name))
    return found


def _measure_memory() -> int:
    """Resident pages of this process."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1])


def _send(
    control: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()
) -> None:
    socket.send_fds(control, [json.dumps(message).encode()], descriptors)


def _receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message with its files; None once the sweep has closed the socket."""
    try:
        message, descriptors, _, _ = socket.recv_fds(
            control, MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:  # the sweep was killed before it had read everything
        return None, []
    return (json.loads(message) if message else None), descriptors


if __name__ == "__main__":
    sys.exit(main())
