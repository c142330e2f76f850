"""Derives the current status of a run from its facts and the recipe; it is stored nowhere."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import Field

from runner.checkpoints.choose import Inventory, look_ahead, read_inventory
from runner.errors import CorruptFileError, RefusedError, put_in_words
from runner.files import load_jsonl
from runner.plan.pushes import find_recorded_push
from runner.recipe.contents import Inputs
from runner.recipe.identity import build_digest_payload, diff_payloads
from runner.recipe.parse import Recipe
from runner.run.fact import Fact, Shown
from runner.run.facts import RunFacts
from runner.run.failures import HINTS, UNREADABLE_HINT
from runner.run.manifest import (
    FOREIGN,
    describe_damage,
    find_damage,
    find_other_result,
    find_other_sizes,
    is_model_removed,
    is_of_model,
    select_recipe,
)
from runner.run.record import RULES_KEY, Failure, StoredRecipe, describe_phase, list_trained
from runner.run.scores import find_score_contradictions

State = Literal[
    "pending",
    "running",
    "completed",
    "interrupted",
    "failed",
    "changed",
    "damaged",
    "unreadable",
]


class RunStatus(Fact):
    """The current status of a run and its reason; derived, never stored."""

    state: State
    why: Shown
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    num_attempts: int = 0
    # Over all attempts that ended, plus the running one; None if any of them is unknown.
    seconds: float | None = None
    # Numbers of the attempts whose end is recorded before their start.
    set_back_attempts: tuple[int, ...] = ()
    failure: Failure | None = None
    differences: tuple[Shown, ...] = ()  # dotted keys that changed since the run was made
    # Files of a completed run that differ from their records, each with its problem.
    damage: dict[str, str] = Field(default_factory=dict)
    is_model_removed: bool = False  # of a completed run; not damage
    # Of the newest checkpoint of a run that is neither running nor completed.
    checkpoint_step: int | None = None
    # Dotted keys in which the launch differs from that of the checkpoint.
    obstacles: tuple[Shown, ...] = ()
    # Library versions that changed since the checkpoint, if that is allowed.
    version_changes: tuple[Shown, ...] = ()
    micro_batch_divisor: int = 1  # of the last attempt: above 1, the run ran out of memory
    quarantined: tuple[Shown, ...] = ()  # checkpoints that were moved aside
    pending_uploads: tuple[Shown, ...] = ()  # archives that have not reached remote storage
    upload_failure: Shown | None = None  # of the newest of those that failed
    # Paths that the recipe names and that this status does not cover: touched since they were last
    # read, or never read under this output root.
    inputs_touched: tuple[Shown, ...] = ()
    inputs_unread: tuple[Shown, ...] = ()
    inputs_missing: tuple[Shown, ...] = ()  # paths that do not exist; a launch needs them
    push_to: Shown | None = None  # the repository that a completed run is yet to be pushed to
    push_failure: Shown | None = None  # of the last attempt to push

    @property
    def notes(self) -> str:
        """Further notes for the user; empty if there are none."""
        inputs = {
            "inputs missing": self.inputs_missing,
            "inputs not verified (touched since)": self.inputs_touched,
            "inputs not verified (not read here yet)": self.inputs_unread,
        }
        notes = [f"{what}: {', '.join(paths)}" for what, paths in inputs.items() if paths]
        notes += ["model removed"] if self.is_model_removed else []
        notes += [f"{len(self.quarantined)} in quarantine"] if self.quarantined else []
        if self.obstacles:
            notes.append(
                f"step {self.checkpoint_step} cannot be resumed: {', '.join(self.obstacles)}"
            )
        elif self.version_changes:
            notes.append(
                f"changed since step {self.checkpoint_step}: {', '.join(self.version_changes)}"
            )
        if self.micro_batch_divisor > 1:
            notes.append(f"micro-batch / {self.micro_batch_divisor} since it ran out of memory")
        if self.set_back_attempts:
            numbers = ", ".join(map(str, self.set_back_attempts))
            notes.append(
                f"attempt {numbers}: its end is recorded before its start (the clock was set back),"
                " so the seconds are unknown"
            )
        if self.pending_uploads:
            failure = f" ({self.upload_failure})" if self.upload_failure else ""
            notes.append(f"not in remote storage: {', '.join(self.pending_uploads)}{failure}")
        if self.push_note is not None:
            notes.append(self.push_note)
        return "; ".join(notes)

    @property
    def push_note(self) -> str | None:
        """The push that a completed run still waits for; None if there is none."""
        if self.push_to is None:
            return None
        said = "is pending" if self.push_failure is None else f"failed: {self.push_failure}"
        return f"push to {self.push_to} {said}"


def find_differences(
    facts: RunFacts,
    recipe: Recipe,
    contents: Mapping[str, str],
    *,
    has_checkpoints: bool,
    is_whole: bool = False,
) -> list[str]:
    """The differences that make `recipe` a different experiment from the one in the run directory;
    empty if there is no run.

    Unless it `is_whole`, `contents` may leave files out, which are then treated as unchanged. Other
    rules of rows and masks, or a digest that no key explains, matter only if a checkpoint would be
    resumed: a completed run stays completed, and a run without a checkpoint starts from step 0.
    """
    stored, result, paths = facts.stored, facts.result, facts.paths
    if stored is None:
        return (
            []
            if result is None
            else [f"{paths.recipe_path.name}: missing, but there is a {paths.result_path.name}"]
        )
    if result is not None and result.recipe_digest != stored.recipe_digest:
        return [
            f"recipe_digest: {stored.recipe_digest[:12]}, but the result has"
            f" {result.recipe_digest[:12]}"
        ]
    recipe = stored.state_as_before(recipe)
    lines = diff_payloads(build_digest_payload(stored.recipe), build_digest_payload(recipe))
    lines += [
        f"content of {path}: {stored.contents.get(path, '(not used)')[:12]} -> {digest[:12]}"
        for path, digest in contents.items()
        if stored.contents.get(path) != digest
    ]
    if is_whole and not lines:
        lines += _list_gone(stored, contents)
    if result is not None or not has_checkpoints:
        return lines
    return lines + (stored.find_other_rules() or ([] if lines else stored.find_other_digest()))


def _list_gone(stored: StoredRecipe, named: Container[str]) -> list[str]:
    gone = [path for path in stored.contents if path not in named]
    return [f"content of {path}: no longer there" for path in gone]


def describe_change(differences: Sequence[str]) -> str:
    """A short description of the part that changed since the run was made.

    >>> describe_change(["training.max_steps: 2 -> 3"])
    'the recipe changed since'
    """
    is_of_runner = all(line.startswith(RULES_KEY) for line in differences)
    return f"the {'runner' if is_of_runner else 'recipe'} changed since"


def read_status(
    facts: RunFacts,
    recipe: Recipe,
    contents: Mapping[str, str],
    *,
    num_processes: int | None = None,
    resume: str = "auto",
    named: Container[str] | None = None,
) -> RunStatus:
    """`derive_status` with the run's checkpoints. They are read only if they can matter: not if the
    run is running or has its result.
    """
    try:
        is_asked = not facts.is_running and not facts.has_result
        inventory = read_inventory(facts.paths) if is_asked else Inventory(facts.paths)
    except (CorruptFileError, OSError) as error:
        return describe_unreadable(error)
    return derive_status(
        facts, inventory, recipe, contents, num_processes=num_processes, resume=resume, named=named
    )


def read_status_unverified(facts: RunFacts, recipe: Recipe, inputs: Inputs) -> RunStatus:
    """`read_status` from what is known without reading the files that the recipe names; the status
    lists the unknown ones.
    """
    status = read_status(facts, recipe, inputs.contents, named=inputs.named)
    update = {"inputs_missing": inputs.missing}
    # A run that was never started has nothing to be compared with.
    if status.state != "unreadable" and facts.stored is not None:
        update |= {"inputs_touched": inputs.touched, "inputs_unread": inputs.unread}
    return status.model_copy(update=update)


def derive_status(
    facts: RunFacts,
    inventory: Inventory,
    recipe: Recipe,
    contents: Mapping[str, str],
    *,
    num_processes: int | None = None,
    resume: str = "auto",
    named: Container[str] | None = None,
) -> RunStatus:
    """The status of one run, from its facts and the current recipe. Pure.

    The launch being considered has `num_processes` (None: the recipe's own) and the given
    `Attempt.resume`. `named` are all paths whose content counts now, including those missing in
    `contents`; None: unknown.

    An unreadable file is a status, so it does not prevent reporting other runs.
    """
    try:
        count = num_processes or recipe.launch.num_processes
        return _derive_readable(facts, inventory, recipe, contents, count, resume, named)
    except (CorruptFileError, OSError) as error:
        return describe_unreadable(error)


def describe_unreadable(error: CorruptFileError | OSError) -> RunStatus:
    """The status of a run with an unreadable part."""
    return RunStatus(state="unreadable", why=put_in_words(error))


def _derive_readable(
    facts: RunFacts,
    inventory: Inventory,
    recipe: Recipe,
    contents: Mapping[str, str],
    num_processes: int,
    resume: str,
    named: Container[str] | None,
) -> RunStatus:
    is_running, last, progress = facts.is_running, facts.last, facts.progress
    known: dict[str, Any] = {
        "num_attempts": len(facts.attempts),
        "micro_batch_divisor": last.micro_batch_divisor if last else 1,
        "seconds": _sum_seconds(facts),
        "set_back_attempts": _list_impossible(facts),
        "step": progress.step if progress else None,
        "max_steps": progress.max_steps if progress else None,
        "loss": progress.loss if progress else None,
        "quarantined": facts.quarantined,
        "pending_uploads": facts.pending_uploads,
        "upload_failure": facts.upload_failure,
    }
    if is_running:
        return RunStatus(state="running", why=describe_running(facts, facts.read_at_utc), **known)
    if (result := facts.result) is not None:
        # Check first: differences from an altered recipe.json say nothing about the recipe.
        recorded = select_recipe(facts.paths, result.files or {})
        if damage := find_other_sizes(recorded, facts.file_sizes):
            return RunStatus(state="damaged", why=describe_damage(damage), damage=damage, **known)
    has_checkpoints = bool(inventory.kept)
    differences = find_differences(facts, recipe, contents, has_checkpoints=has_checkpoints)
    if not differences and result is None and facts.stored is not None and named is not None:
        differences = _list_gone(facts.stored, named)  # the same comparison as the attempt makes
    if differences:
        why = f"{describe_change(differences)} the run was made: {differences[0]}"
        return RunStatus(state="changed", why=why, differences=tuple(differences), **known)
    if result is not None:
        known |= {"step": result.num_steps, "max_steps": result.num_steps}
        manifest, sizes = result.files or {}, facts.file_sizes
        if damage := find_other_sizes(manifest, sizes):
            return RunStatus(state="damaged", why=describe_damage(damage), damage=damage, **known)
        known["is_model_removed"] = is_model_removed(manifest, sizes)
        known |= _find_push(facts)
        return RunStatus(state="completed", why=f"stopped by {result.stop_reason}", **known)
    if facts.is_result_lost:
        damage = {facts.paths.result_path.name: "is missing"}
        return RunStatus(state="damaged", why=describe_damage(damage), damage=damage, **known)
    known |= _look_ahead(facts, inventory, recipe, num_processes, resume)
    if known["max_steps"] is None and known.get("checkpoint_step") is not None:
        # The last attempt stopped before it had resumed this checkpoint.
        known |= {"step": known["checkpoint_step"], "max_steps": recipe.training.max_steps}
    if last is None:
        return RunStatus(state="pending", why="never started", **known)
    failure = facts.failure
    if failure is None and progress is None and last.ended_at_utc is None and not facts.has_log:
        return RunStatus(state="pending", why="prepared, waiting for a manual start", **known)
    if failure is None or failure.kind in ("lost", "preempted"):
        why = (
            failure.message
            if failure
            else f"attempt {last.number} was killed together with its launcher"
        )
        return RunStatus(state="interrupted", why=why, failure=failure, **known)
    if failure.kind == "configuration" and last.resume not in ("auto", "none"):
        # The request was wrong, not the recipe.
        why = f"--resume {last.resume} was refused: {failure.message}"
        return RunStatus(state="interrupted", why=why, **known)
    return RunStatus(
        state="failed", why=f"{failure.kind}: {failure.message}", failure=failure, **known
    )


def _find_push(facts: RunFacts) -> dict[str, str | None]:
    """The push that a completed run still waits for, as requested by the recipe of its first
    attempt.
    """
    repo_id = find_recorded_push(facts)
    if repo_id is None:
        return {}
    return {"push_to": repo_id, "push_failure": facts.push.failure if facts.push else None}


def verify_records(facts: RunFacts, status: RunStatus) -> RunStatus:
    """The status, or *damaged* if `result.json` or `recipe.json` of a completed run differs from
    what was written. Used wherever its numbers and axes are shown. Reads only those files, a few
    kilobytes.

    A *changed* run is checked too: if its `recipe.json` was altered, the difference is not a change
    of the recipe.
    """
    if status.state not in ("completed", "damaged", "changed") or not facts.has_result:
        return status
    paths = facts.paths
    try:
        result = facts.result
        recorded = select_recipe(paths, (result.files if result is not None else None) or {})
        return _add_damage(status, find_other_result(paths) or find_damage(paths, recorded))
    except (CorruptFileError, OSError) as error:
        return describe_unreadable(error)


def _add_damage(status: RunStatus, damage: Mapping[str, str]) -> RunStatus:
    if not damage:
        return status
    update = {"state": "damaged", "why": describe_damage(damage), "damage": dict(damage)}
    return status.model_copy(update=update)


def verify_files(facts: RunFacts, status: RunStatus) -> RunStatus:
    """The status, or *damaged* if a byte of a completed run differs from its record, or if its
    result does not match the sum of its rows.

    Reads every file of the manifest. A run completed before there were manifests (see
    `is_verifiable`) has only the sums to check.
    """
    status = verify_records(facts, status)
    if status.state not in ("completed", "damaged"):
        return status
    result, paths = facts.result, facts.paths
    # Files cannot be compared with a result that is missing or altered.
    if result is None or paths.result_path.name in status.damage:
        return status
    try:
        damage = find_damage(paths, result.files or {})
        rows = [] if damage else load_jsonl(paths.eval_rows_path)
    except (CorruptFileError, OSError) as error:
        return describe_unreadable(error)
    if rows and (contradictions := find_score_contradictions(result, rows)):
        what = f"does not match the sums of eval_rows.jsonl: {'; '.join(contradictions)}"
        damage = {paths.result_path.name: what}
    return _add_damage(status, damage)


def is_verifiable(facts: RunFacts) -> bool:
    """True if the run has a result that recorded checksums."""
    return facts.result is not None and facts.result.files is not None


NOT_VERIFIABLE: Final = "cannot be verified: it was completed before checksums were recorded"


def suggest_fixes(damage: Mapping[str, str]) -> str:
    """The remedy for a damaged run."""
    if foreign := [name for name, what in damage.items() if what == FOREIGN]:
        moved = f"move {', '.join(foreign)} elsewhere"
        others = {name: what for name, what in damage.items() if what != FOREIGN}
        return f"{moved}; then {suggest_fixes(others)}" if others else moved
    from_start = "`runner launch RECIPE --fresh` moves the run aside and starts from step 0"
    if all(map(is_of_model, damage)):
        return (
            "`runner launch RECIPE --repair` rewrites model/ from the best checkpoint;"
            f" if that checkpoint is lost, {from_start}"
        )
    return f"restore the files from a copy of the run; without a copy, {from_start}"


def find_divisor(facts: RunFacts, recipe: Recipe) -> int:
    """The micro-batch divisor of the next attempt: the same as in the last one, while the recipe
    states the same micro-batch.

    Called before the run is prepared: `recipe.json` is still that of the last attempt.
    """
    attempts, stored = facts.attempts, facts.stored
    if not attempts or stored is None:
        return 1
    sizes = [one.training.per_device_train_batch_size for one in (stored.recipe, recipe)]
    return attempts[-1].micro_batch_divisor if sizes[0] == sizes[1] else 1


def describe_running(facts: RunFacts, at_utc: str) -> str:
    """`RunStatus.why` of a running run: its phase, and the duration of a long one or of the time
    without a sign of life.
    """
    last, progress = facts.last, facts.progress
    if progress is not None:
        phase, began_at_utc = progress.phase, progress.phase_began_at_utc
    else:  # `accelerate launch` itself is being loaded
        phase, began_at_utc = "starting", last.started_at_utc if last else None
    return describe_phase(phase, began_at_utc, at_utc, facts.measure_silence(at_utc))


def _look_ahead(
    facts: RunFacts, inventory: Inventory, recipe: Recipe, num_processes: int, resume: str
) -> dict[str, Any]:
    stored = facts.stored
    if stored is None:
        return {}
    divisor = find_divisor(facts, recipe)
    try:
        choice = look_ahead(
            inventory, recipe, stored.current_digest, num_processes, divisor=divisor, resume=resume
        )
    except RefusedError as error:  # the global batch cannot be kept like that
        return {"obstacles": (error.message,)}
    # The obstacles are those of the deciding checkpoint, which may be an older one.
    is_shown = choice.obstacles or choice.version_warnings
    return {
        "checkpoint_step": choice.decisive_step if is_shown else choice.newest_step,
        "obstacles": choice.obstacles,
        "version_changes": choice.version_warnings,
    }


def _sum_seconds(facts: RunFacts) -> float | None:
    # A repair's time is not training time, from which other runs are estimated.
    attempts = list_trained(facts.attempts)
    now = facts.read_at_utc if facts.is_running else None
    spans = [
        attempt.measure_seconds(now if attempt is attempts[-1] else None)
        for attempt in attempts
        if attempt.ended_at_utc or (now and attempt is attempts[-1])
    ]
    known = [span for span in spans if span is not None]
    return sum(known) if known and len(known) == len(spans) else None


def _list_impossible(facts: RunFacts) -> tuple[int, ...]:
    return tuple(attempt.number for attempt in facts.attempts if attempt.is_end_before_start)


def find_hint(status: RunStatus) -> str | None:
    """The remedy for a run in this status; None if there is nothing to fix."""
    if status.state == "unreadable":
        return UNREADABLE_HINT
    if status.state == "damaged":
        return suggest_fixes(status.damage)
    if status.state == "changed" or status.failure is None:
        return None  # a changed run is refused, so the hint of its last failure would be wrong
    return HINTS[status.failure.kind]
