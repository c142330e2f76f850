"""Classifies exceptions and logs into failure kinds.

Exceptions are recognized by type name and text, so that no library has to be imported. Owns the
hint for each kind (`HINTS`); `plan.decide` decides on retries.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from runner.errors import (
    CorruptFileError,
    DataError,
    DivergedError,
    PreemptedError,
    RunnerError,
    escape_controls,
)
from runner.files import open_plain
from runner.project_folder import pasteable
from runner.run.record import Failure, FailureKind
from runner.secrets import scrub

# The remedy for each kind, one line each.
HINTS: Final[Mapping[FailureKind, str]] = {
    "configuration": "fix the problem named above, then `runner sweep PATH --retry-failed`",
    "data": (
        "`runner check PATH` names the rows; fix them, then `runner sweep PATH --retry-failed`"
    ),
    "out_of_memory": (
        "set `launch.retries.out_of_memory: 2` in the recipe to halve the micro-batch automatically"
        " and keep the global batch; or lower `training.per_device_train_batch_size`"
    ),
    "diverged": (
        "lower `training.learning_rate`, clip gradients, or train in a wider dtype;"
        " a diverged run is not retried automatically"
    ),
    "preempted": "the same command resumes from the newest checkpoint",
    "transient": "the same command resumes from the newest checkpoint",
    "lost": (
        "it was killed from outside, perhaps because memory ran out: check `dmesg | tail` and the"
        " machine's memory; the same command resumes from the newest checkpoint"
    ),
    "crashed": "the last lines of the log show where; the same command tries again",
    "stalled": (
        "the stacks in the log show what hung; the same command resumes from the newest checkpoint;"
        " if work may be silent for longer, raise `launch.stall_minutes` in the recipe (null: no"
        " limit)"
    ),
}

_SAME_COMMAND: Final = "the same command"


def name_command(
    kind: FailureKind, run_dirs: Sequence[Path], sweep_folders: Sequence[Path] = ()
) -> str:
    """The hint for runs that failed or stopped with this kind, with the command that resumes them:
    the sweep over `sweep_folders`, if these hold runs that were never started.

    >>> name_command("preempted", [Path("runs/demo/a"), Path("runs/demo/b")])
    '`runner rerun runs/demo` resumes from the newest checkpoint'
    >>> name_command("transient", [Path("runs/demo/a")], [Path("recipes/demo")])
    '`runner sweep recipes/demo --retry-failed` resumes from the newest checkpoint'
    """
    if sweep_folders:
        # A sweep resumes interrupted runs without the option.
        retry = [] if kind in ("preempted", "lost") else ["--retry-failed"]
        words = ["runner", "sweep", *map(str, sweep_folders), *retry]
        return HINTS[kind].replace(_SAME_COMMAND, f"`{pasteable(shlex.join(words))}`")
    folders = run_dirs if len(run_dirs) == 1 else dict.fromkeys(one.parent for one in run_dirs)
    command = pasteable(shlex.join(["runner", "rerun", *map(str, folders)]))
    return HINTS[kind].replace(_SAME_COMMAND, f"`{command}`")


UNREADABLE_HINT: Final = (
    "`runner launch RECIPE --fresh` moves the run aside and starts from step 0; nothing is deleted"
)


_MAX_MESSAGE_CHARACTERS: Final = 4000
_TAIL_LINES: Final = 15
_TAIL_CHARACTERS: Final = 400
_READ_BYTES: Final = 32 * 2**10
_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT)
# With less free space, a record may not have been written.
_FULL_DISK_BYTES: Final = 2**20

# Kinds by text; the first match counts. Libraries raise most of these as a plain RuntimeError.
_TEXTS: Final[tuple[tuple[FailureKind, re.Pattern[str]], ...]] = (
    (
        # CUDA, HIP, XPU, MPS, bitsandbytes; cuBLAS and cuDNN; the host's allocators.
        "out_of_memory",
        re.compile(
            r"out of memory|_ALLOC_FAILED|(can't|cannot) allocate memory|std::bad_alloc",
            re.IGNORECASE,
        ),
    ),
    (
        "diverged",  # DeepSpeed's loss scaler, autograd's anomaly detection
        re.compile(r"loss scale already at minimum|returned nan values in its"),
    ),
    (
        "configuration",  # NCCL's misuse; the hub and Transformers about names that do not exist
        re.compile(
            r"ncclInvalidUsage|ncclInvalidArgument|Duplicate GPU detected"
            r"|is not a valid model identifier"
            r"|does not appear to have a file named"
            r"|Can't load (the )?(configuration|tokenizer|model|feature)"
            r"|offline mode is enabled|gated repo",
            re.IGNORECASE,
        ),
    ),
    (
        "transient",
        re.compile(
            r"no space left on device|disk quota exceeded"
            r"|stale (NFS )?file handle|input/output error"
            r"|address already in use|EADDRINUSE|another process is utilizing it"
            r"|failed to listen on"
            r"|connection (reset|refused|closed|aborted)|socket (closed|timeout)|broken pipe"
            r"|timed out|time-?out\b"
            r"|temporary failure in name resolution|name or service not known"
            r"|(couldn't|could not|failed to) connect"
            r"|\bNCCL error|ncclSystemError|ncclRemoteError|ncclInternalError"
            r"|connectFullMesh failed"
            r"|(HTTP|status)[ a-z:_-]*(429|5\d\d)\b"
            r"|\b(429|5\d\d) (Server Error|Too Many|Internal|Bad Gateway|Service)"
            r"|PytorchStreamWriter failed|file write failed|unexpected pos"  # torch, see below
            r"|busy or unavailable|uncorrectable (ECC|NVLink) error|fallen off the bus",
            re.IGNORECASE,
        ),
    ),
)
# Torch's only message when the disk is full; it does not include the system's error.
_TORCH_CANNOT_WRITE: Final = re.compile(
    r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs \d+"
)
_ADDRESS_IN_USE: Final = re.compile(
    r"address already in use|EADDRINUSE|another process is utilizing it", re.IGNORECASE
)
# Messages on the other ranks when one has gone.
_LOST_PEER: Final = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|DistError"
    r"|connection (reset|refused|closed|aborted)|broken pipe|socket (closed|timeout)"
    r"|timed out|timeout"
    r"|connectFullMesh|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL error",
    re.IGNORECASE,
)
# Kinds by the name of a type or of one of its bases, as the libraries name them.
_TYPES: Final[Mapping[str, FailureKind]] = {
    "OutOfMemoryError": "out_of_memory",  # torch, for every device
    "MemoryError": "out_of_memory",
    "FloatingPointError": "diverged",
    "OfflineModeIsEnabled": "configuration",  # huggingface_hub
    "RepositoryNotFoundError": "configuration",
    "RevisionNotFoundError": "configuration",
    "RemoteEntryNotFoundError": "configuration",
    "BadRequestError": "configuration",
    "HFValidationError": "configuration",
    "ImportError": "configuration",  # a package, or a part of one, is not installed
    "DistError": "transient",  # torch.distributed
    "TransportError": "transient",  # httpx
    "RequestException": "transient",  # requests
    "OSError": "transient",
}
# Their texts may hold arbitrary names, such as a file `timeout.json` or a key "connection refused".
_PLAIN_ERRORS: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    NameError,
    SyntaxError,
)
_LAUNCHER_OVER_A_DEAD_CHILD: Final = ("CalledProcessError", "ChildFailedError")
_EXCEPTION_LINE: Final = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception))\b(?:: (.*))?$"
)


def classify(error: BaseException) -> FailureKind:
    """The failure kind of an exception, from the exception or its causes; `crashed` if none is
    known.

    >>> classify(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    'out_of_memory'
    >>> classify(ValueError("shapes differ"))
    'crashed'
    """
    kinds = map(_classify_one, _list_causes(error))
    return next((kind for kind in kinds if kind != "crashed"), "crashed")


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        yield found
        seen.append(found)
        found = found.__cause__


def _classify_one(error: BaseException) -> FailureKind:
    if isinstance(error, RunnerError):
        own: tuple[tuple[type[RunnerError], FailureKind], ...] = (
            (DivergedError, "diverged"),
            (DataError, "data"),
            (PreemptedError, "preempted"),
        )
        return next(
            (kind for kind_of_error, kind in own if isinstance(error, kind_of_error)),
            "configuration",
        )
    if isinstance(error, KeyboardInterrupt):
        return "preempted"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "out_of_memory"
    # From the hub, or from any web server.
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return "transient" if status >= 500 or status in (408, 429) else "configuration"
    says_all_by_type = isinstance(error, _PLAIN_ERRORS) or (
        isinstance(error, OSError) and error.errno is not None
    )
    if not says_all_by_type and (by_text := classify_text(str(error))) is not None:
        return by_text
    names = [base.__name__ for base in type(error).__mro__]
    return next((kind for name, kind in _TYPES.items() if name in names), "crashed")


def classify_text(text: str) -> FailureKind | None:
    """The kind that a message indicates; None if it indicates none."""
    return next((kind for kind, pattern in _TEXTS if pattern.search(text)), None)


def is_address_in_use(failure: Failure) -> bool:
    """True if a port was taken: the next try need not wait."""
    return failure.kind == "transient" and _ADDRESS_IN_USE.search(failure.message) is not None


def build_failure(error: BaseException, run_dir: Path) -> Failure:
    """The failure to record for an exception; for a full disk the message includes the free
    space.
    """
    message = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}"
    if is_full_disk(error):
        message = describe_full_disk(error, run_dir)
    kind = classify(error)
    has_lost_peer = kind == "transient" and _LOST_PEER.search(message) is not None
    message = escape_controls(scrub(message))[:_MAX_MESSAGE_CHARACTERS]
    return Failure(kind=kind, message=message, has_lost_peer=has_lost_peer)


def is_full_disk(error: BaseException) -> bool:
    """True if the disk or a quota is full; safetensors and torch wrap the system's error in types
    of their own.
    """
    for one in _list_causes(error):
        if isinstance(one, OSError) and one.errno in _FULL_DISK:
            return True
        if isinstance(one, RuntimeError) and _TORCH_CANNOT_WRITE.search(str(one)) is not None:
            return True
        if _says_full_disk(str(one)):
            return True
    return False


def _says_full_disk(text: str) -> bool:
    return any(os.strerror(number) in text for number in _FULL_DISK)


def describe_full_disk(error: BaseException, run_dir: Path) -> str:
    """`disk full`, the place, the free space, and the system's message."""
    named = next(
        (one.filename for one in _list_causes(error) if isinstance(one, OSError) and one.filename),
        None,
    )
    place = str(named) if named else str(run_dir)
    return f"disk full: {place} ({_format_free(run_dir)}): {type(error).__name__}: {error}"


def _format_free(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f"the free space is unknown: {error}"
    return f"{usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB are free there"


def explain_silence(log_path: Path, exit_status: int | None) -> Failure:
    """The failure of an attempt that recorded none, from the last lines of its log, otherwise from
    the disk; otherwise the attempt is lost.

    Three causes leave only a log: a launcher that fails before a training process exists, a library
    that ends the process itself (bitsandbytes, out of memory), and a full disk.
    """
    lines = _read_last_lines(log_path)
    for line in reversed(lines):
        if classify_text(line) == "out_of_memory":
            return Failure(kind="out_of_memory", message=line)
    if (used := next((line for line in lines if _ADDRESS_IN_USE.search(line)), None)) is not None:
        return Failure(kind="transient", message=used)
    full = next(filter(_says_full_disk, lines), None)
    if full is not None or _is_full(log_path.parent):
        place = f"disk full: {log_path.parent} ({_format_free(log_path.parent)})"
        return Failure(kind="transient", message=f"{place}: {full}" if full else place)
    raised = next(filter(None, map(_EXCEPTION_LINE.match, reversed(lines))), None)
    # The launcher's own message, not its report of a dead training process.
    if raised is not None and raised[1] not in _LAUNCHER_OVER_A_DEAD_CHILD:
        line = raised.string
        return Failure(kind=classify_text(line) or "configuration", message=f"the launcher: {line}")
    how = "together with its worker" if exit_status is None else f"(exit status {exit_status})"
    return Failure(kind="lost", message=f"the training process died {how} without an error message")


def read_log_tail(log_path: Path) -> tuple[str, ...]:
    """The last lines of a log for a record, without secrets and each cut to a maximum length; empty
    if there is no log.
    """
    lines = _read_last_lines(log_path)[-_TAIL_LINES:]
    return tuple(
        line if len(line) <= _TAIL_CHARACTERS else f"{line[:_TAIL_CHARACTERS]} ..."
        for line in lines
    )


def _read_last_lines(log_path: Path) -> list[str]:
    """Up to `_READ_BYTES` of complete, non-blank lines, with secrets masked."""
    try:
        with os.fdopen(open_plain(log_path), "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _READ_BYTES))
            text = stream.read(_READ_BYTES).decode(errors="replace")
    except (CorruptFileError, OSError):
        return []
    lines = scrub(text).splitlines()
    whole = lines if size <= _READ_BYTES else lines[1:]
    stripped = (escape_controls(line).strip() for line in whole)
    return [line for line in stripped if line]


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_DISK_BYTES
    except OSError:
        return False
