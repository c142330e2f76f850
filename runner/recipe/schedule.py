"""Computes the optimizer updates of a run from its rows, and when it warms up, evaluates and saves.
Pure: no files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from runner.recipe.parse import Recipe, derive_accumulation
from runner.text import format_count

_FEW_UPDATES: Final = 10
_MAX_SHOWN_LENGTHS: Final = 3


@dataclass(frozen=True)
class Schedule:
    """The course of a run, in optimizer updates. `num_evaluations` counts the evaluations of the
    validation split after step 0.
    """

    num_rows: int
    global_batch_size: int
    accumulation: int
    updates_per_epoch: int
    last_batch_rows: int  # rows of the last update of an epoch
    num_epochs: float
    num_updates: int
    num_warmup_updates: int
    num_evaluations: int
    num_checkpoints: int


def derive_schedule(recipe: Recipe, num_rows: int, num_processes: int | None = None) -> Schedule:
    """The schedule as Transformers computes it: the incomplete last batch of an epoch is a separate
    update.

    60 rows at accumulation 16 and one row per device make 4 updates per epoch, the last of 12 rows.
    """
    training, evaluation, checkpoints = recipe.training, recipe.evaluation, recipe.checkpoints
    stated = training.hugging_face_arguments()
    processes = num_processes or recipe.launch.num_processes
    accumulation = derive_accumulation(recipe, processes)
    per_pass = training.per_device_train_batch_size * processes
    batch = recipe.global_batch_size
    if stated.get("dataloader_drop_last"):
        num_rows -= num_rows % per_pass
    num_passes = math.ceil(num_rows / per_pass)
    per_epoch = max(1, math.ceil(num_passes / accumulation))
    if training.max_steps is not None:
        num_updates = training.max_steps
    else:
        num_updates = math.ceil((training.num_train_epochs or 0) * per_epoch)
    warmup = 0 if _ignores_warmup(recipe) else stated.get("warmup_steps") or 0
    return Schedule(
        num_rows=num_rows,
        global_batch_size=batch,
        accumulation=accumulation,
        updates_per_epoch=per_epoch,
        last_batch_rows=num_rows - (per_epoch - 1) * batch,
        num_epochs=num_updates / per_epoch,
        num_updates=num_updates,
        num_warmup_updates=int(warmup) if warmup >= 1 else math.ceil(num_updates * warmup),
        num_evaluations=_count_due(
            evaluation.eval_strategy, evaluation.eval_steps or per_epoch, num_updates
        ),
        num_checkpoints=_count_due(
            checkpoints.save_strategy,
            checkpoints.save_steps or (checkpoints.save_epochs or 1) * per_epoch,
            num_updates,
        ),
    )


def _ignores_warmup(recipe: Recipe) -> bool:
    return recipe.training.hugging_face_arguments().get("lr_scheduler_type") == "constant"


def _count_due(strategy: str, every: int, num_updates: int) -> int:
    """The number of times that something is due, including the end of the run."""
    return 1 if strategy == "no" else math.ceil(num_updates / every)


def find_doubts(recipe: Recipe, schedule: Schedule) -> Iterator[str]:
    """Settings that are allowed but seldom intended. Each sentence is the same for all runs with
    the same numbers.
    """
    evaluation, checkpoints, stopping = recipe.evaluation, recipe.checkpoints, recipe.early_stopping
    updates, batch = schedule.num_updates, schedule.global_batch_size
    if schedule.num_warmup_updates >= updates:
        yield (
            f"warmup takes {format_count(schedule.num_warmup_updates, 'update')}, but the run has"
            f" {updates}: the learning rate never reaches `training.learning_rate`"
        )
    if _ignores_warmup(recipe) and recipe.training.hugging_face_arguments().get("warmup_steps"):
        yield (
            "`training.warmup_steps` has no effect under `lr_scheduler_type: constant`:"
            " `constant_with_warmup` warms up"
        )
    if updates < _FEW_UPDATES:
        yield f"only {format_count(updates, 'optimizer update')} in the whole run"
    if schedule.num_rows < batch:
        yield (
            f"the global batch of {batch} is larger than the"
            f" {format_count(schedule.num_rows, 'training row')}: one"
            " update per epoch"
        )
    if schedule.num_epochs < 1:
        yield (
            f"`max_steps` ends within the first epoch: the run sees {updates * batch} of"
            f" {format_count(schedule.num_rows, 'row')}"
        )
    if evaluation.eval_strategy == "steps" and (evaluation.eval_steps or 0) >= updates:
        yield (
            f"`evaluation.eval_steps: {evaluation.eval_steps}` is not below the"
            f" {format_count(updates, 'update')}"
            " of the run: it evaluates only at the end, so the best checkpoint is the last"
        )
    if checkpoints.save_strategy == "steps" and (checkpoints.save_steps or 0) >= updates:
        yield (
            f"`checkpoints.save_steps: {checkpoints.save_steps}` is not below the"
            f" {format_count(updates, 'update')}"
            " of the run: an interrupted run can resume only from its best checkpoint"
        )
    if stopping.enabled and schedule.num_evaluations <= stopping.patience:
        yield (
            f"`early_stopping.patience: {stopping.patience}` can never run out in"
            f" {format_count(schedule.num_evaluations, 'evaluation')}"
        )
    num_halvings = recipe.launch.retries.out_of_memory
    if num_halvings and recipe.training.per_device_train_batch_size % 2:
        yield (
            f"`launch.retries.out_of_memory: {num_halvings}` cannot help:"
            f" `per_device_train_batch_size: {recipe.training.per_device_train_batch_size}` cannot"
            " be halved"
        )


def find_changed_updates(
    runs: Sequence[tuple[Recipe, Schedule]],
) -> Iterator[tuple[str, list[str]]]:
    """A warning for each axis of a grid that changes the number of updates, with the runs
    concerned: its effect then includes that of longer training.

    An axis that sets the length itself, or changes the task, is expected to change it.
    """
    # Of the runs that are equal except for the axis: label -> updates
    lengths: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for recipe, schedule in runs:
        length = [recipe.training.num_train_epochs, recipe.training.max_steps]
        for axis, label in recipe.run.axes.items():
            others = {name: one for name, one in recipe.run.axes.items() if name != axis}
            key = json.dumps([others, length, recipe.data.task.name], sort_keys=True)
            of_axis = lengths.setdefault((recipe.run.grid, axis), {})
            of_axis.setdefault(key, {})[_show_label(label)] = schedule.num_updates
            names.setdefault((recipe.run.grid, axis), []).append(recipe.run.full_name)
    for (grid, axis), groups in lengths.items():
        changes = dict.fromkeys(
            (" -> ".join(group), " -> ".join(map(str, group.values())))
            for group in groups.values()
            if len(set(group.values())) > 1
        )
        if changes:
            (labels, updates), *elsewhere = changes
            rest = ", ".join(other for _, other in elsewhere[: _MAX_SHOWN_LENGTHS - 1])
            yield (
                f"`{axis}` {labels} changes the number of updates {updates}"
                f"{f' (elsewhere {rest})' if rest else ''}: the runs also differ in training"
                " length; set `training.max_steps` instead of `num_train_epochs` to compare"
                f" `{axis}` alone",
                names[grid, axis],
            )


def _show_label(label: object) -> str:
    return label if isinstance(label, str) else json.dumps(label)
