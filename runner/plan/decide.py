"""Decides for each run: launch, skip or refuse, with the reason; and after a failure, whether to
retry.

Pure. A decision to launch passes on a `Launch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from runner.errors import RefusedError
from runner.plan.select import QueuedRun, Selected
from runner.plan.status import RunStatus
from runner.recipe.parse import Recipe, derive_accumulation, derive_micro_batch
from runner.run.failures import is_address_in_use
from runner.run.paths import RunPaths
from runner.run.record import DETERMINISTIC_KINDS, AskedBase, Attempt, Failure

Action = Literal["launch", "push", "skip", "refuse"]
MAX_BACKOFF_SECONDS: Final = 600.0
MAX_FRUITLESS: Final = 3  # consecutive preempted attempts without a newer checkpoint


@dataclass(frozen=True)
class Launch:
    """A planned attempt of one run: everything decided before it gets a place to run."""

    selected: Selected
    contents: Mapping[str, str]  # content hashes of the paths that the recipe names
    num_processes: int
    resume: str = "auto"  # `Attempt.resume`
    retry: int = 0  # `Attempt.retry`
    # `Attempt.micro_batch_divisor`; None: same as in the last attempt
    micro_batch_divisor: int | None = None
    base: AskedBase = "shared"  # `Attempt.base`
    num_attempts: int | None = None  # of the run at planning time; None: unknown
    is_repair: bool = False  # `Attempt.is_repair`

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.selected.recipe

    @property
    def paths(self) -> RunPaths:
        """The files of the run."""
        return self.selected.paths

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return self.selected.full_name


@dataclass(frozen=True)
class Decision:
    """The action for one run now, and the reason."""

    action: Action
    why: str


def decide(
    status: RunStatus, *, retry_failed: bool = False, only_unfinished: bool = False
) -> Decision:
    """The decision for a run in `status`.

    `retry_failed` also launches runs that failed for a reason that will not disappear without a
    change; `only_unfinished` (`rerun`) skips runs that were never started.

    >>> decide(RunStatus(state="completed", why="stopped by max_steps"))
    Decision(action='skip', why='completed: stopped by max_steps')
    """
    # The first line only: a failure's hint would come before the text added here.
    first_line = status.why.partition("\n")[0]
    why = f"{status.state}: {first_line}"
    if status.state == "completed" and status.push_to is not None:
        return Decision("push", f"to {status.push_to}")
    if status.state in ("completed", "running"):
        return Decision("skip", why)
    if status.state in ("changed", "damaged"):
        return Decision("refuse", why)
    if status.state == "unreadable":
        return Decision("refuse", f"{why} (`runner launch RECIPE --fresh` moves the run aside)")
    if status.state == "pending" and only_unfinished:
        return Decision("skip", f"{why} (rerun starts only runs that were started before)")
    if (
        status.failure is not None
        and status.failure.kind in DETERMINISTIC_KINDS
        and not retry_failed
    ):
        return Decision("skip", f"{why} (would fail again; `--retry-failed` tries anyway)")
    if status.obstacles:
        return Decision("refuse", f"{why}; its checkpoint was written by a different launch")
    return Decision("launch", why)


@dataclass(frozen=True)
class Retry:
    """The automatic next attempt of a run that failed."""

    number: int  # `Attempt.retry`
    delay_seconds: float
    micro_batch_divisor: int  # `Attempt.micro_batch_divisor`
    why: str


def decide_retry(
    recipe: Recipe,
    failures: Sequence[Failure],
    *,
    num_processes: int,
    micro_batch_divisor: int,
    has_made_steps: bool,
) -> Retry | None:
    """The retry after the last of `failures`, or None if the run stays failed.

    `failures` are the consecutive ones since a user started an attempt or a new checkpoint was
    written, oldest first. Each kind has its own budget, `launch.retries`. The other arguments are
    those of the last attempt.
    """
    kind, retries, number = failures[-1].kind, recipe.launch.retries, len(failures)
    num_alike = sum(failure.kind == kind for failure in failures)
    if kind == "preempted" and num_alike <= MAX_FRUITLESS:  # free: nothing is wrong with the run
        delay = 0.0 if has_made_steps else retries.backoff_seconds
        return Retry(number, delay, micro_batch_divisor, f"resumes{_in_seconds(delay)}")
    budget = {
        "transient": retries.transient,
        "lost": retries.lost,
        "stalled": retries.stalled,
        "out_of_memory": retries.out_of_memory,
    }.get(kind, 0)
    if num_alike > budget:
        return None
    if kind == "out_of_memory":
        halved = 2 * micro_batch_divisor
        if not can_divide(recipe, num_processes, halved):
            return None
        sizes = (
            f"{derive_micro_batch(recipe, micro_batch_divisor)} ->"
            f" {derive_micro_batch(recipe, halved)}"
        )
        why = f"retry {num_alike} of {budget} from step 0, micro-batch {sizes}, same global batch"
        return Retry(number, 0.0, halved, why)
    is_immediate = num_alike == 1 and is_address_in_use(failures[-1])
    delay = (
        0.0
        if is_immediate
        else min(MAX_BACKOFF_SECONDS, retries.backoff_seconds * 2.0 ** min(num_alike - 1, 60))
    )
    return Retry(
        number, delay, micro_batch_divisor, f"retry {num_alike} of {budget}{_in_seconds(delay)}"
    )


def foresee_retry(recipe: Recipe, attempts: Sequence[Attempt]) -> Retry | None:
    """The retry that the sweep which made the last attempt will start, if that sweep is still
    alive; the record does not say whether it is.

    None also if an attempt ended without a record: then its sweep was killed too.
    """
    # The origin of a preemption is unknown.
    if not attempts or (failure := attempts[-1].failure) is None or failure.kind == "preempted":
        return None
    last = attempts[-1]
    failures = [one.failure for one in attempts[-(last.retry + 1) :] if one.failure is not None]
    return decide_retry(
        recipe,
        failures,
        num_processes=last.num_processes,
        micro_batch_divisor=last.micro_batch_divisor,
        has_made_steps=True,
    )


def can_divide(recipe: Recipe, num_processes: int, micro_batch_divisor: int) -> bool:
    """True if the micro-batch can be divided like this with the global batch unchanged."""
    try:
        derive_accumulation(recipe, num_processes, micro_batch_divisor)
    except RefusedError:
        return False
    return True


def _in_seconds(delay: float) -> str:
    return f" in {delay:g} s" if delay else " right away"


def decide_queued(queued: QueuedRun, differences: Sequence[str]) -> Decision:
    """The decision for a run to be launched that a cluster already has a task for.

    >>> from pathlib import Path
    >>> decide_queued(QueuedRun("slurm 17_3", "scancel 17_3", "pending", Path("a.json")), [])
    Decision(action='skip', why='queued: slurm 17_3 is pending')
    """
    if differences:
        return Decision(
            "refuse",
            f"queued with another recipe; run `{queued.cancel}` first, or change the recipe back",
        )
    return Decision("skip", f"queued: {queued.task} is {queued.state}")
