"""Decides whether `model/` of a completed run can be written again, and from which checkpoint.

Reads every byte of the checkpoint and changes nothing; a repair is an attempt, see `sft.train`.
"""

from __future__ import annotations

from runner.checkpoints.archive import verify_archive
from runner.checkpoints.marker import find_damage
from runner.errors import CorruptFileError, RefusedError
from runner.plan.status import NOT_VERIFIABLE, RunStatus, is_verifiable, suggest_fixes
from runner.recipe.parse import Recipe
from runner.run.facts import RunFacts
from runner.run.manifest import is_of_model
from runner.run.paths import RunPaths


def find_repair_step(facts: RunFacts, status: RunStatus, recipe: Recipe) -> int | None:
    """The step of the best checkpoint, which verifies; None if there is nothing to repair.

    The run was completed, and `status` comes from `verify_files`.

    Raises:
        RefusedError: `model/` cannot be written again, or that would not repair the run.
    """
    paths, result = facts.paths, facts.result
    if result is None:
        raise _refuse_others(paths, status.damage)
    if not is_verifiable(facts) or result.files is None:
        raise RefusedError(
            f"{paths.run_dir} {NOT_VERIFIABLE}, so a repaired model could not be verified either",
            hint=f"runner export {paths.run_dir} --checkpoint best --output DIR",
        )
    if others := {name: what for name, what in status.damage.items() if not is_of_model(name)}:
        raise _refuse_others(paths, others)
    foreign = {name: what for name, what in status.damage.items() if name not in result.files}
    if foreign:
        raise RefusedError(
            f"{paths.model_dir} holds files that this run did not write:\n{_list(foreign)}",
            hint=f"move it elsewhere: mv {paths.run_dir}/{next(iter(foreign))} ...",
        )
    if not status.damage and not status.is_model_removed:
        return None
    if (obstacle := _find_obstacle(paths, result.best_step)) is not None:
        raise RefusedError(
            f"{paths.model_dir} cannot be written again, because the best checkpoint, of step"
            f" {result.best_step}, {obstacle}",
            hint=_suggest_checkpoint(paths, recipe, result.best_step),
        )
    return result.best_step


def _refuse_others(paths: RunPaths, others: dict[str, str]) -> RefusedError:
    return RefusedError(
        f"{paths.run_dir} has damage that `--repair` cannot fix:\n{_list(others)}",
        hint=suggest_fixes(others),
    )


def _list(damage: dict[str, str]) -> str:
    return "\n".join(f"  {name} {what}" for name, what in damage.items())


def _find_obstacle(paths: RunPaths, step: int) -> str | None:
    """The problem with the checkpoint of a step; None if its folder or its archive is intact."""
    folder, archive = paths.checkpoint_dir(step), paths.archive_path(step)
    damage = "no longer exists"
    if folder.is_dir():
        found = find_damage(folder, step)
        if found is None:
            return None
        damage = f"does not verify: {found}"
    if not archive.exists():
        return damage
    try:
        if verify_archive(archive).step == step:
            return None
        return f"{damage}, and {archive.name} holds another checkpoint"
    except CorruptFileError as error:
        return f"{damage}, and {error.message}"


def _suggest_checkpoint(paths: RunPaths, recipe: Recipe, step: int) -> str:
    name, remote = paths.checkpoint_dir(step).name, recipe.checkpoints.remote
    place = "from a copy" if remote is None else f"from {remote.url} or a copy"
    return (
        f"put {name} or {name}.zip back into {paths.checkpoints_dir}, {place}; without it,"
        " `runner launch RECIPE --fresh` moves the run aside and starts from step 0"
    )
