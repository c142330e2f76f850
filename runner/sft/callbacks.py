"""When a run evaluates, saves and stops. Each decision is taken once, at the end of a step, from restored state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from runner.fsio import load_json
from runner.recipe import Recipe
from runner.recipe_sections import CheckpointsSection, EarlyStoppingOn
from runner.record import Progress
from runner.sft.context import RunContext

LogHistory = Sequence[Mapping[str, Any]]


def list_evaluations(history: LogHistory, metric: str) -> list[tuple[int, float]]:
    """`(step, value)` of every evaluation of trained weights; step 0, the base model, is left out.

    >>> list_evaluations([{"step": 0, "eval_m": 9.0}, {"step": 5, "loss": 1.0}, {"step": 5, "eval_m": 2.0}], "m")
    [(5, 2.0)]
    """
    key = f"eval_{metric}"
    return [(int(row["step"]), float(row[key])) for row in history if key in row and row["step"] > 0]


def find_best_step(evaluations: Sequence[tuple[int, float]], mode: Literal["min", "max"]) -> int | None:
    """The step of the best value, the first one among equals.

    >>> find_best_step([(5, 2.0), (10, 1.0), (15, 1.0)], "min")
    10
    """
    sign = 1 if mode == "min" else -1
    return min(evaluations, key=lambda pair: sign * pair[1])[0] if evaluations else None


def read_best_step(checkpoint_dir: Path, checkpoints: CheckpointsSection) -> int | None:
    """The best step as the checkpoint knows it, None before the first evaluation."""
    history = load_json(checkpoint_dir / TRAINER_STATE_NAME)["log_history"]
    return find_best_step(list_evaluations(history, checkpoints.metric), checkpoints.mode)


def is_out_of_patience(values: Sequence[float], rule: EarlyStoppingOn) -> bool:
    """Whether the last `patience` values in a row failed to better the best before them by more than `threshold`.

    A function of the values alone, so patience cannot be lost or doubled by an interruption.

    >>> rule = EarlyStoppingOn(enabled=True, metric="nll_per_token", patience=2)
    >>> is_out_of_patience([3.0, 2.0, 2.5, 2.1], rule), is_out_of_patience([3.0, 2.0, 2.5, 1.9], rule)
    (True, False)
    """
    best: float | None = None
    num_without_improvement = 0
    for value in values:
        score = value if rule.mode == "min" else -value
        if best is None or score < best - rule.threshold:
            best, num_without_improvement = score, 0
        else:
            num_without_improvement += 1
        if num_without_improvement >= rule.patience:
            return True
    return False


class FlowCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves and stops as the recipe says; the last step always evaluates and saves."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def is_stopped_early(self, state: TrainerState) -> bool:
        """Whether the evaluations so far ask for an early stop."""
        rule = self._recipe.early_stopping
        if not isinstance(rule, EarlyStoppingOn):
            return False
        return is_out_of_patience([value for _, value in list_evaluations(state.log_history, rule.metric)], rule)

    def best_step(self, state: TrainerState) -> int | None:
        """The step whose weights are the best so far."""
        checkpoints = self._recipe.checkpoints
        return find_best_step(list_evaluations(state.log_history, checkpoints.metric), checkpoints.mode)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide what this step does beyond its update."""
        evaluation, checkpoints = self._recipe.evaluation, self._recipe.checkpoints
        is_last = state.global_step >= state.max_steps
        control.should_log = True
        control.should_evaluate = is_last or _is_due(evaluation.eval_strategy, evaluation.eval_steps, state)
        control.should_save = is_last or _is_due(checkpoints.save_strategy, checkpoints.save_steps, state)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save what is the best so far, and stop when patience is out."""
        if state.global_step > 0:
            control.should_save |= self.best_step(state) == state.global_step
            if self.is_stopped_early(state):
                control.should_training_stop = True
                control.should_save = True
        return control


def _is_due(strategy: str, every_steps: int | None, state: TrainerState) -> bool:
    if strategy == "epoch":
        return bool(float(state.epoch).is_integer())
    return every_steps is not None and state.global_step % every_steps == 0


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the launch side and the log where training stands."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """After each step and each evaluation."""
        if not self._context.is_main or not logs:
            return
        if "loss" in logs:
            progress = Progress(
                phase="training", step=state.global_step, max_steps=state.max_steps, loss=float(logs["loss"])
            )
            self._context.report_progress(progress, is_forced=state.global_step >= state.max_steps)
        shown = "  ".join(f"{key} {value:.6g}" for key, value in logs.items() if isinstance(value, int | float))
        print(f"step {state.global_step}/{state.max_steps}  {shown}", flush=True)
