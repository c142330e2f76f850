"""The results of the planned runs of one `launch` or `sweep`, and the messages about those that are
not done: in the terminal, and at the end of an attempt's log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runner.checkpoints.marker import list_committed
from runner.launch.held import describe_holder
from runner.plan.decide import Launch
from runner.run.lease import is_leased
from runner.run.record import Failure, FailureKind

# Kinds that the log explains better than the message.
_SHOWN_WITH_LOG: Final[tuple[FailureKind, ...]] = (
    "crashed",
    "lost",
    "stalled",
    "transient",
    "out_of_memory",
)


@dataclass(frozen=True)
class FailedRun:
    """A run that did not complete; if it has no log, it was never started."""

    run: Launch
    failure: Failure
    log_path: Path | None

    @property
    def name(self) -> str:
        """`<grid>/<run name>`."""
        return self.run.full_name


@dataclass
class PoolResult:
    """The results of the planned runs, each in one of the lists. Only the last attempt of a run
    counts, not those that were retried.
    """

    completed: list[str] = field(default_factory=list)
    failed: list[FailedRun] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # completed by another sweep meanwhile
    held: list[Launch] = field(default_factory=list)  # by another process until our end
    not_started: list[Launch] = field(default_factory=list)  # after `--fail-fast` or a signal
    stopped_by: int | None = None  # the signal that ended the sweep before everything was done


def print_failures(result: PoolResult) -> None:
    """Print each run that failed or was preempted, and the number that `--fail-fast` kept from
    starting. After a signal, `print_stop` lists the preempted ones.
    """
    for failed in result.failed:
        if result.stopped_by is not None and failed.failure.kind == "preempted":
            continue
        what = "stopped" if failed.failure.kind == "preempted" else "failed"
        print(
            f"\n{failed.name} {what}, {failed.failure.kind}: {failed.failure.message}",
            file=sys.stderr,
        )
        if failed.log_path is None:
            continue
        if failed.failure.kind in _SHOWN_WITH_LOG:
            print("\n".join(f"  | {line}" for line in failed.failure.log_tail), file=sys.stderr)
        print(f"  log: {failed.log_path}", file=sys.stderr)
    if result.stopped_by is not None:  # then `print_stop` says more
        return
    if num_left := len(result.not_started):
        what = "1 run was" if num_left == 1 else f"{num_left} runs were"
        print(f"{what} not started because of --fail-fast", file=sys.stderr)
    for run in result.held:
        print(f"{run.full_name} is held by {describe_holder(run.paths)}", file=sys.stderr)


def print_stop(result: PoolResult, again: str) -> None:
    """Print the runs that a signal left undone, the step from which each resumes, and the command
    that runs them again.
    """
    if result.stopped_by is None:
        return
    begun = [one.run for one in result.failed if one.failure.kind == "preempted"]
    new = [run for run in result.not_started if not run.paths.record_path.exists()]
    begun += [run for run in result.not_started if run not in new]
    lines = [f"{run.full_name}  {_describe_resume(run)}" for run in begun]
    lines += [
        f"{run.full_name}  is held by {describe_holder(run.paths)}, which continues"
        for run in result.held
    ]
    if new:
        lines.append(_describe_new(new))
    name = signal.Signals(result.stopped_by).name
    if not lines:  # the runs that are not done have failed, which is printed already
        print(f"stopped by {name}", file=sys.stderr)
        return
    text = "\n".join([f"stopped by {name}, not done:", *(f"  {one}" for one in lines)])
    print(f"{text}\n{again} continues from here", file=sys.stderr)


def _describe_resume(run: Launch) -> str:
    """The next step of a run that this sweep has left, read from its directory."""
    with contextlib.suppress(OSError):  # a file system that does not answer
        if is_leased(run.paths.lease_path):  # ours ended with its attempt
            return f"is now run by another sweep ({describe_holder(run.paths)})"
    if run.paths.result_path.exists() and not run.is_repair:
        return "was completed by another sweep"
    step = max(list_committed(run.paths), default=None)
    if step is None:
        return "has no checkpoint here yet, so it starts from step 0"
    return f"resumes from step {step}"


def _describe_new(runs: Sequence[Launch]) -> str:
    if len(runs) == 1:
        return f"{runs[0].full_name}  was not started"
    return f"{len(runs)} runs were not started: {runs[0].full_name} ... {runs[-1].full_name}"


def end_log(log_path: Path, number: int, failure: Failure, step: int) -> None:
    """Append to the log how an attempt without a result ended. Otherwise it would end with
    `accelerate`'s traceback, even after a requested stop. `step` is that of the newest checkpoint,
    0 if there is none.
    """
    first_line = failure.message.partition("\n")[0]
    line = f"runner: attempt {number} ended, {failure.kind}: {first_line}"
    if failure.kind == "preempted":
        following = f"resumes from step {step}" if step else "starts from step 0"
        line = (
            f"runner: attempt {number} was asked to stop and did not crash: {first_line};"
            f" the next attempt {following}"
        )
    with log_path.open("ab+") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - 1))
        is_line_open = size > 0 and log.read(1) != b"\n"
        log.write(f"{chr(10) * is_line_open}{line}\n".encode(errors="replace"))
