"""Warm starts: a worker of the sweep has imported the libraries for training, and forks one
training process per attempt.

A worker is started like a training process, by `accelerate launch` in the same environment. It runs
`runner.sft.worker`; this module is the sweep's side. They exchange JSON messages over a socket
pair that is the worker's stdin; some messages carry open files:

    sweep                                          worker
                        once it has imported   <-  {"versions", "why_not"}, a pidfd of the worker
    {"run_dir", "owner", "environment"}, lease, log  ->
                                               <-  {"pid"}, a pidfd of the child, or {"error"}
    {"reap": true}, once the child has ended       ->
                                               <-  {"status", "is_worn"}
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import runner
from runner.files import FileState, look_at
from runner.launch.command import LaunchCommand
from runner.processes import (
    MESSAGE_BYTES,
    OWNER_VARIABLE,
    die_with_parent,
    leave_room_for_owners,
)
from runner.recipe.identity import (
    forget_versions,
    list_library_versions,
    load_launch_settings,
)
from runner.recipe.libraries import find_unused_libraries
from runner.recipe.parse import Recipe
from runner.secrets import scrub

# For the imports, which take minutes on a cold disk. After that its runs start cold, each with its
# own stall watch.
START_SECONDS: Final = 900.0
# For a fork and its answer on a machine that is short of memory; the sweep waits meanwhile.
_ANSWER_SECONDS: Final = 10.0
_SHOWN_LINES: Final = 5
_SAID_BYTES: Final = 16384
_PACKAGE_FOLDERS: Final = ("site-packages", "dist-packages")

# Set during the imports, so that they neither start threads nor touch a GPU, because neither
# survives a fork. The attempts get the original values.
_FOR_IMPORTS: Final = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@dataclass(frozen=True)
class Imports:
    """The settings of a recipe that decide how a training process imports its libraries."""

    launch_config: str  # a hash of the file's bytes
    hidden: tuple[str, ...]  # libraries that are made to look uninstalled


@dataclass(frozen=True)
class WorkerKey:
    """Identifies a kind of worker: an attempt may be forked from a worker with an equal key."""

    argv: tuple[str, ...]  # of `accelerate launch`, up to the module
    environment: tuple[tuple[str, str], ...]  # on top of the sweep's
    imports: Imports


def find_imports(recipe: Recipe) -> Imports | None:
    """The import settings of a recipe. None for runs that cannot be forked and must start cold:
    several processes or machines, DeepSpeed, or a launch config that starts a group of ranks.
    """
    config_path = Path(recipe.launch.accelerate_config)
    settings = load_launch_settings(config_path)
    if recipe.launch.num_processes != 1 or recipe.launch.num_machines != 1:
        return None
    if not isinstance(settings, dict) or "deepspeed_config" in settings:
        return None
    # YAML reads a plain NO as false.
    if str(settings.get("distributed_type", "NO")).upper() not in ("NO", "FALSE"):
        return None
    launch_config = hashlib.sha256(config_path.read_bytes()).hexdigest()
    return Imports(launch_config, tuple(find_unused_libraries(recipe)))


class WorkerError(Exception):
    """The reason why a worker cannot fork anything."""


@dataclass
class Worker:
    """One worker process with its launcher; it has at most one attempt at a time."""

    key: WorkerKey
    popen: subprocess.Popen[bytes]  # `accelerate launch`, the leader of their session
    control: socket.socket
    output: BinaryIO  # output of both processes; no other process can open it
    versions: Mapping[str, str]  # of the libraries, as they were before it was started
    sources: Mapping[Path, FileState | None]
    is_worn: bool = False  # the worker itself reports that it should be replaced
    _pidfd: int = -1  # set once it has begun
    deadline: float = field(default_factory=lambda: time.monotonic() + START_SECONDS)

    @classmethod
    def start(cls, key: WorkerKey, command: LaunchCommand) -> Worker:
        """A worker that starts its imports; `control` becomes readable once it has a message.

        Raises:
            OSError: it cannot be started.
        """
        forget_versions()
        versions, sources = list_library_versions(), _list_sources()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER_SECONDS)
        output = os.fdopen(os.memfd_create("worker's output"), "w+b")
        environment = command.derive_environment(os.environ)
        variables = {OWNER_VARIABLE: leave_room_for_owners(f"worker of process {os.getpid()}")}
        with theirs:
            try:
                popen = subprocess.Popen(
                    [*key.argv, "-m", "runner.sft.worker", *key.imports.hidden],
                    env={**_FOR_IMPORTS, **environment, **variables},
                    stdin=theirs.fileno(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=partial(die_with_parent, os.getpid()),
                )
            except BaseException:
                ours.close()
                output.close()
                raise
        return cls(key, popen, ours, output, versions, sources)

    def fileno(self) -> int:
        """A descriptor that is readable once the worker has a message or has ended."""
        return self.control.fileno()

    def is_overdue(self, now: float) -> bool:
        """True if its imports have taken too long."""
        return now > self.deadline

    def begin(self) -> None:
        """Receive its message after the imports.

        Raises:
            WorkerError: it has ended, or found that it must not fork.
        """
        try:
            said, (self._pidfd,) = self._receive()
        except (OSError, ValueError) as error:
            lines = self.read_output().splitlines()[-_SHOWN_LINES:]
            shown = "".join(f"\n  | {line}" for line in lines)
            raise WorkerError(f"{error}{shown}") from None
        if (why_not := said["why_not"]) is not None:
            raise WorkerError(why_not)
        if said["versions"] != self.versions:
            differences = _list_differences(said["versions"], self.versions)
            raise WorkerError(f"it has other versions than the sweep: {differences}")

    def find_change(self) -> str | None:
        """The reason why a new worker is needed, such as a changed library or source; else None."""
        if not self.is_alive():
            return "it has ended"
        forget_versions()
        if (versions := list_library_versions()) != self.versions:
            return f"{_list_differences(self.versions, versions)} was installed meanwhile"
        sources = _list_sources()
        for path in sorted({*sources, *self.sources}):
            if sources.get(path) != self.sources.get(path):
                return f"{path} has changed"
        return None

    def is_alive(self) -> bool:
        """False before it has begun, and once it has ended."""
        return self._pidfd >= 0 and not _wait_for_end(self._pidfd, 0.0)

    def fork(self, run_dir: Path, owner: str, lease: int, log: int) -> ForkedProcess:
        """Fork a process that trains the run; it has the lease as its stdin and prints to the log.

        Raises:
            OSError: it could not be forked, or the worker is gone.
        """
        environment = {name: os.environ.get(name) for name in _FOR_IMPORTS}
        request = {"run_dir": str(run_dir), "owner": owner, "environment": environment}
        answer, descriptors = self._ask(request, [lease, log])
        if "error" in answer:
            raise OSError(answer["error"])
        if not descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return ForkedProcess(self, answer["pid"], descriptors[0])

    def reap(self) -> int | None:
        """The exit status of its child, which has ended; None if the worker is gone, so the status
        is lost.
        """
        try:
            answer, _ = self._ask({"reap": True})
        except OSError:
            self.is_worn = True
            return None
        self.is_worn = answer["is_worn"]
        return int(answer["status"])

    def read_output(self) -> str:
        """The output of the worker and its launcher without secrets; only the end if it is long."""
        # They share the file offset with us; `pread` does not move it.
        size = os.fstat(self.output.fileno()).st_size
        begin = max(0, size - _SAID_BYTES)
        text = os.pread(self.output.fileno(), size - begin, begin).decode(errors="replace")
        whole = text if begin == 0 else text.partition("\n")[2]  # line 1 may be a cut-off secret
        return scrub(whole).strip()

    def end(self) -> None:
        """Kill it: nothing is lost, because it writes no file. A child dies with it."""
        if self.popen.returncode is None:  # not reaped yet, so the id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        if self._pidfd >= 0:
            _wait_for_end(self._pidfd, _ANSWER_SECONDS)
            os.close(self._pidfd)
            self._pidfd = -1
        self.control.close()
        self.output.close()

    def _ask(
        self, request: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Raises: OSError: the worker is gone, or does not answer."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)  # it may have been stopped
        socket.send_fds(self.control, [json.dumps(request).encode()], descriptors)
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        try:
            message, descriptors, _, _ = socket.recv_fds(
                self.control, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise OSError(f"the worker has not answered for {_ANSWER_SECONDS:.0f} s") from None
        if not message:
            raise OSError("the worker has ended")
        return json.loads(message), descriptors


@dataclass
class ForkedProcess:
    """The training process of one attempt, a child of a worker: a warm start."""

    worker: Worker
    pid: int
    _pidfd: int
    _is_reaped: bool = False

    def open_pidfd(self) -> int:
        """See `AttemptProcess`."""
        return os.dup(self._pidfd)

    def signal_group(self, number: signal.Signals) -> None:
        """See `AttemptProcess`.

        Only its worker reaps it, and only on request, so its id stays valid while the worker lives.
        """
        if self._is_reaped:
            return
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, number)
        if self.worker.is_alive():
            with contextlib.suppress(OSError):
                os.killpg(self.pid, number)

    def wait(self) -> int | None:
        """See `AttemptProcess`."""
        _wait_for_end(self._pidfd, None)
        self.signal_group(signal.SIGKILL)
        status = self.worker.reap()
        self._is_reaped = True
        os.close(self._pidfd)
        return status


def _list_sources() -> dict[Path, FileState | None]:
    """The state of every file of this program, and of the folders of installed packages, which
    change whenever something is installed.
    """
    files = Path(runner.__file__).parent.rglob("*.py")
    folders = [path for path in map(Path, sys.path) if path.name in _PACKAGE_FOLDERS]
    return {path: look_at(path) for path in (*files, *folders)}


def _list_differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def _wait_for_end(pidfd: int, seconds: float | None) -> bool:
    """True once the process has ended; False after the given time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))
