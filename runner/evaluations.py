"""Which steps were evaluated, and which of them are the best, from recorded values alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from runner.fsio import load_json
from runner.recipe_sections import CheckpointsSection

LogHistory = Sequence[Mapping[str, Any]]
TRAINER_STATE_NAME: Final = "trainer_state.json"  # as in `transformers.trainer`, which takes seconds to import


def list_evaluations(history: LogHistory, metric: str) -> list[tuple[int, float]]:
    """`(step, value)` of every evaluation of trained weights; step 0, the base model, is left out.

    >>> list_evaluations([{"step": 0, "eval_m": 9.0}, {"step": 5, "loss": 1.0}, {"step": 5, "eval_m": 2.0}], "m")
    [(5, 2.0)]
    """
    key = f"eval_{metric}"
    return [(int(row["step"]), float(row[key])) for row in history if key in row and row["step"] > 0]


def rank_steps(evaluations: Sequence[tuple[int, float]], mode: Literal["min", "max"]) -> list[int]:
    """The evaluated steps, the best first; among equals the first one is better.

    >>> rank_steps([(5, 2.0), (10, 1.0), (15, 1.0)], "min")
    [10, 15, 5]
    """
    sign = 1 if mode == "min" else -1
    return [step for step, value in sorted(evaluations, key=lambda pair: (sign * pair[1], pair[0]))]


def find_best_step(evaluations: Sequence[tuple[int, float]], mode: Literal["min", "max"]) -> int | None:
    """The step of the best value, the first one among equals; None where nothing was evaluated.

    >>> find_best_step([(5, 2.0), (10, 1.0), (15, 1.0)], "min")
    10
    """
    return next(iter(rank_steps(evaluations, mode)), None)


def read_evaluations(checkpoint_dir: Path, checkpoints: CheckpointsSection) -> list[tuple[int, float]]:
    """The evaluations by the metric of `checkpoints` up to the step of a checkpoint, as the checkpoint knows them."""
    return list_evaluations(load_json(checkpoint_dir / TRAINER_STATE_NAME)["log_history"], checkpoints.metric)


def read_best_step(checkpoint_dir: Path, checkpoints: CheckpointsSection) -> int | None:
    """The best step as the checkpoint knows it, None before the first evaluation."""
    return find_best_step(read_evaluations(checkpoint_dir, checkpoints), checkpoints.mode)
