"""Pure: for each run, launch, skip or refuse, and the reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runner.record import DETERMINISTIC_KINDS, RunStatus

Action = Literal["launch", "skip", "refuse"]


@dataclass(frozen=True)
class Decision:
    """What happens to one run now, and why."""

    action: Action
    why: str


def decide(status: RunStatus, *, retry_failed: bool = False, only_unfinished: bool = False) -> Decision:
    """The decision for a run in `status`.

    `retry_failed` also launches what failed for a reason that will not go away by itself; `only_unfinished` (`rerun`)
    leaves alone what was never started.

    >>> decide(RunStatus(state="completed", why="stopped by max_steps"))
    Decision(action='skip', why='completed: stopped by max_steps')
    """
    first_line = status.why.partition("\n")[0]  # of a failure: its hint would come before what is said here
    why = f"{status.state}: {first_line}"
    if status.state in ("completed", "running"):
        return Decision("skip", why)
    if status.state == "changed":
        return Decision("refuse", why)
    if status.state == "pending":
        return (
            Decision("skip", f"{why} (rerun starts only what was begun)")
            if only_unfinished
            else Decision("launch", why)
        )
    if status.failure is not None and status.failure.kind in DETERMINISTIC_KINDS and not retry_failed:
        return Decision("skip", f"{why} (would fail again; `--retry-failed` tries all the same)")
    return Decision("launch", why)
