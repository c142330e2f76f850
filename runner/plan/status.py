"""What a run is now: derived from its facts, its lease and the recipe each time it is asked for,
and stored nowhere.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec

from runner.checkpoints.choose import list_obstacles, look_ahead
from runner.errors import (
    CorruptFileError,
    RefusedError,
)
from runner.files import load_jsonl
from runner.recipe.identity import build_digest_payload, diff_payloads
from runner.recipe.parse import Recipe
from runner.run.failures import HINTS, UNREADABLE_HINT
from runner.run.lease import has_ranks, is_leased
from runner.run.paths import RunPaths
from runner.run.record import (
    Attempt,
    Fact,
    Failure,
    RunRecord,
    Shown,
    load_failure,
    load_progress,
    load_record,
    load_result,
    load_stored_recipe,
    now_utc,
)

State = Literal["pending", "running", "completed", "interrupted", "failed", "changed", "unreadable"]


class RunStatus(Fact):
    """What a run is now and why; derived, never stored."""

    state: State
    why: Shown
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    num_attempts: int = 0
    seconds: float | None = None  # over all attempts that ended, plus the running one
    failure: Failure | None = None
    differences: tuple[Shown, ...] = ()  # dotted keys that changed since the run was made
    # Of the newest checkpoint of a run that is neither running nor completed.
    checkpoint_step: int | None = None
    # Dotted keys by which the launch is not that of the checkpoint.
    obstacles: tuple[Shown, ...] = ()
    # Of libraries since the checkpoint, where they are allowed.
    version_changes: tuple[Shown, ...] = ()
    micro_batch_divisor: int = 1  # of the last attempt: above 1, the run has gone out of memory
    quarantined: tuple[Shown, ...] = ()  # checkpoints that were moved aside
    pending_uploads: tuple[Shown, ...] = ()  # archives that have not reached remote storage
    upload_failure: Shown | None = None  # of the newest of those that failed

    @property
    def notes(self) -> str:
        """What else somebody should know, empty where there is nothing."""
        notes = [f"{len(self.quarantined)} in quarantine"] if self.quarantined else []
        if self.obstacles:
            notes.append(
                f"step {self.checkpoint_step} cannot be continued: {', '.join(self.obstacles)}"
            )
        elif self.version_changes:
            notes.append(
                f"changed since step {self.checkpoint_step}: {', '.join(self.version_changes)}"
            )
        if self.micro_batch_divisor > 1:
            notes.append(f"micro-batch / {self.micro_batch_divisor} since it ran out of memory")
        if self.pending_uploads:
            failure = f" ({self.upload_failure})" if self.upload_failure else ""
            notes.append(f"not in remote storage: {', '.join(self.pending_uploads)}{failure}")
        return "; ".join(notes)


Asked = ParamSpec("Asked")


def find_differences(paths: RunPaths, recipe: Recipe, contents: Mapping[str, str]) -> list[str]:
    """What makes `recipe` another experiment than the one in the run directory; empty where there
    is no run.

    `contents` may leave files out: those are taken as unchanged.
    """
    stored, result = load_stored_recipe(paths), load_result(paths)
    if stored is None:
        return (
            []
            if result is None
            else [f"{paths.recipe_path.name}: lost, but there is a {paths.result_path.name}"]
        )
    if result is not None and result.recipe_digest != stored.recipe_digest:
        return [
            f"recipe_digest: {stored.recipe_digest[:12]}, but the result is of"
            f" {result.recipe_digest[:12]}"
        ]
    return diff_payloads(build_digest_payload(stored.recipe), build_digest_payload(recipe)) + [
        f"content of {path}: {stored.contents.get(path, '(not used)')[:12]} -> {digest[:12]}"
        for path, digest in contents.items()
        if stored.contents.get(path) != digest
    ]


def or_unreadable(derive: Callable[Asked, RunStatus]) -> Callable[Asked, RunStatus]:
    """`derive`, for which a file that cannot be read is a state and no reason to say nothing of the
    other runs.
    """

    @functools.wraps(derive)
    def derive_whatever_is_there(*arguments: Asked.args, **keywords: Asked.kwargs) -> RunStatus:
        try:
            return derive(*arguments, **keywords)
        except CorruptFileError as error:
            return RunStatus(state="unreadable", why=error.message)
        except OSError as error:
            return RunStatus(state="unreadable", why=str(error))

    return derive_whatever_is_there


@or_unreadable
def derive_status(
    paths: RunPaths,
    recipe: Recipe,
    contents: Mapping[str, str],
    *,
    num_processes: int | None = None,
    resume: str = "auto",
) -> RunStatus:
    """The status of one run, from its files, its lease and the recipe as it is now.

    The launch that is thought of has `num_processes` (None: the recipe's own) and the
    `Attempt.resume` that is given.
    """
    # first: without a holder, what is read is final
    is_running = is_leased(paths.lease_path) or has_ranks(paths)
    record = load_record(paths)
    last = record.attempts[-1] if record.attempts else None
    progress = load_progress(paths.attempt(last.number).progress_path) if last else None
    known: dict[str, Any] = {
        "num_attempts": len(record.attempts),
        "micro_batch_divisor": last.micro_batch_divisor if last else 1,
        "seconds": _sum_seconds(record, is_running),
        "step": progress.step if progress else None,
        "max_steps": progress.max_steps if progress else None,
        "loss": progress.loss if progress else None,
        **_look_at_checkpoints(paths, last),
    }
    if is_running:
        phase = progress.phase if progress else "starting"
        return RunStatus(state="running", why=phase, **known)
    if differences := find_differences(paths, recipe, contents):
        why = f"the recipe changed since the run was made: {differences[0]}"
        return RunStatus(state="changed", why=why, differences=tuple(differences), **known)
    if (result := load_result(paths)) is not None:
        known |= {"step": result.num_steps, "max_steps": result.num_steps}
        return RunStatus(state="completed", why=f"stopped by {result.stop_reason}", **known)
    known |= _look_ahead(paths, recipe, num_processes or recipe.launch.num_processes, resume)
    if last is None:
        return RunStatus(state="pending", why="never started", **known)
    files = paths.attempt(last.number)
    failure = last.failure or load_failure(files)
    if (
        failure is None
        and progress is None
        and last.ended_at_utc is None
        and not files.log_path.exists()
    ):
        return RunStatus(state="pending", why="prepared, to be started by hand", **known)
    if failure is None or failure.kind in ("lost", "preempted"):
        why = (
            failure.message
            if failure
            else f"attempt {last.number} was killed together with its launcher"
        )
        return RunStatus(state="interrupted", why=why, failure=failure, **known)
    if failure.kind == "configuration" and last.resume not in ("auto", "none"):
        # What was asked for, not the recipe, was wrong.
        why = f"--resume {last.resume} was refused: {failure.message}"
        return RunStatus(state="interrupted", why=why, **known)
    return RunStatus(
        state="failed", why=f"{failure.kind}: {failure.message}", failure=failure, **known
    )


def find_divisor(paths: RunPaths, recipe: Recipe) -> int:
    """What the next attempt's micro-batch is divided by: as in the last one, while the recipe
    states the same one.

    Asked before the run is prepared: `recipe.json` still is that of the last attempt.
    """
    attempts, stored = load_record(paths).attempts, load_stored_recipe(paths)
    if not attempts or stored is None:
        return 1
    sizes = [one.training.per_device_train_batch_size for one in (stored.recipe, recipe)]
    return attempts[-1].micro_batch_divisor if sizes[0] == sizes[1] else 1


def _look_ahead(paths: RunPaths, recipe: Recipe, num_processes: int, resume: str) -> dict[str, Any]:
    stored = load_stored_recipe(paths)
    if stored is None:
        return {}
    divisor = find_divisor(paths, recipe)
    try:
        choice = look_ahead(
            paths, recipe, stored.recipe_digest, num_processes, divisor=divisor, resume=resume
        )
    except RefusedError as error:  # the global batch cannot be kept like that
        return {"obstacles": (error.message,)}
    found = choice.comparison
    obstacles = list_obstacles(found, recipe) if found is not None else ()
    changes = found.version_changes if found is not None and not obstacles else ()
    # What stands in the way is that of the checkpoint that decides, perhaps an older one.
    step = found.step if found is not None and (obstacles or changes) else choice.newest_step
    return {"checkpoint_step": step, "obstacles": obstacles, "version_changes": changes}


def _look_at_checkpoints(paths: RunPaths, last: Attempt | None) -> dict[str, Any]:
    names = (path.name for path in paths.uploads_dir.glob("*.zip"))
    pending = tuple(sorted(names, key=lambda name: (len(name), name)))  # by step
    rows = (
        load_jsonl(paths.attempt(last.number).uploads_path) if last is not None and pending else []
    )
    messages = [
        str(row["message"]) for row in rows if row.get("outcome") != "uploaded" and "message" in row
    ]
    quarantined = sorted(path.name for path in paths.quarantine_dir.glob("*"))
    return {
        "quarantined": tuple(quarantined),
        "pending_uploads": pending,
        "upload_failure": messages[-1].partition("\n")[0] if messages else None,
    }


def _sum_seconds(record: RunRecord, is_running: bool) -> float | None:
    ends = [attempt.ended_at_utc for attempt in record.attempts]
    if is_running and ends:
        ends[-1] = ends[-1] or now_utc()
    spans = [
        datetime.datetime.fromisoformat(end)
        - datetime.datetime.fromisoformat(attempt.started_at_utc)
        for attempt, end in zip(record.attempts, ends, strict=True)
        if end
    ]
    return sum(span.total_seconds() for span in spans) if spans else None


def find_hint(status: RunStatus) -> str | None:
    """What to do about a run in this status, None where nothing is wrong with it."""
    if status.state == "unreadable":
        return UNREADABLE_HINT
    return HINTS[status.failure.kind] if status.failure is not None else None
