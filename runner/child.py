"""A child process that answers requests under limits, one JSON line each: the parent's side
(`LimitedChild`) and the child's (`serve`).

The child is a module of ours, run as a program. It has a limit on memory, and on CPU time for each
request. It inherits only a few environment variables, none of which is a token. Its prints go to
stderr, never between the answers. It runs in its own session, so that everything it starts ends
with it. It is not a sandbox: it has the user's files and network.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from runner.processes import OWNER_VARIABLE, die_with_parent

MEMORY_BYTES: Final = 4 << 30  # of address space
_REPLY_BYTES: Final = 64 << 20
_PATIENCE_SECONDS: Final = 5.0  # wait for the end of a process that has closed its output
# The variables by which a program finds its libraries and its owner; no others are inherited.
_KEPT_VARIABLES: Final = (
    "HOME",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONPATH",
    "TMPDIR",
    "VIRTUAL_ENV",
    OWNER_VARIABLE,
)
# The same on every machine: fixes the order of sets and the encoding of texts.
_FIXED_VARIABLES: Final = {
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "TZ": "UTC",
}


class ChildLostError(Exception):
    """The child ended without an answer; the text completes a sentence about it."""


class LimitedChild:
    """A context manager; `ask` sends requests to a module that calls `serve`. The process starts at
    the first request, and again at the first one after it was lost.

    `wall_seconds` limits the wall-clock time of one answer, None for no limit.
    """

    def __init__(
        self, module: str, *, wall_seconds: float | None = None, is_silent: bool = False
    ) -> None:
        self._module = module
        self._wall_seconds = wall_seconds
        self._is_silent = is_silent
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """True if the next request goes to a process that is already started."""
        return self._process is not None

    def ask(self, request: Any, *, cpu_seconds: int) -> Any:
        """The answer to one request.

        Raises:
            ChildLostError: the child ended, perhaps at a limit.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        line = json.dumps({"cpu_seconds": cpu_seconds, "request": request}).encode() + b"\n"
        try:
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                process.stdin.write(line)
                process.stdin.flush()
            return json.loads(self._read_line(process))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process and everything that it started."""
        if self._process is None:
            return
        process, self._process, self._unread = self._process, None, b""
        # It is not reaped yet, so the process group still belongs to it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            # -P: nothing in the working directory is imported by accident.
            [sys.executable, "-P", "-m", self._module, str(os.getpid())],
            env=build_child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self._is_silent else None,
            start_new_session=True,
        )
        return self._process

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        deadline = None if self._wall_seconds is None else time.monotonic() + self._wall_seconds
        pieces = [self._unread]
        num_bytes = len(self._unread)
        while b"\n" not in pieces[-1]:
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([process.stdout], [], [], patience)[0]:
                raise ChildLostError(f"gave no answer within {self._wall_seconds:g} s")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise ChildLostError(_explain_end(process))
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > _REPLY_BYTES:
                raise ChildLostError(f"answered with more than {_REPLY_BYTES >> 20} MiB")
        line, _, self._unread = b"".join(pieces).partition(b"\n")
        return line


def build_child_environment() -> dict[str, str]:
    """The environment of a limited child, with the same `runner` as here."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    own = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), own]))
    return {**kept, **_FIXED_VARIABLES}


def _explain_end(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed its output"
    if status == -signal.SIGXCPU:
        return "exceeded its limit of CPU time"
    if status == -signal.SIGKILL:
        return "was killed, perhaps because memory ran out"
    if status < 0:
        return f"was ended by the signal {signal.Signals(-status).name}"
    return f"ended its process with exit status {status}"


def serve(open_answer: Callable[[], Callable[[Any], Any]]) -> int:
    """Answer the requests of a `LimitedChild` until there are no more, or a limit ends the process.

    `open_answer` imports its libraries under the memory limit, and returns the function that
    answers a request. Prints of both go to stderr, and their stdin is empty.
    """
    die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = _take_streams()
    answer = open_answer()
    for line in requests:
        message = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + message["cpu_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        # Fails on surrogate halves, which no tokenizer can read: UTF-8 cannot encode them.
        reply = json.dumps(answer(message["request"]), ensure_ascii=False).encode()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        replies.write(reply + b"\n")
        replies.flush()
    return 0


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """The pipes from and to the parent, moved off stdin and stdout, which any code may use."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies
