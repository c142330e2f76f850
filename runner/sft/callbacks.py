"""When a run evaluates, saves and stops. Each decision is taken once, at the end of a step, from restored state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runner.recipe import Recipe
from runner.recipe_sections import EarlyStoppingOn
from runner.record import Progress
from runner.sft.context import RunContext
from runner.sft.evaluations import find_best_step, list_evaluations, rank_steps


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
        return find_best_step(self.evaluations(state), self._recipe.checkpoints.mode)

    def evaluations(self, state: TrainerState) -> list[tuple[int, float]]:
        """What the checkpoints are judged by, so far."""
        return list_evaluations(state.log_history, self._recipe.checkpoints.metric)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide what this step does beyond its update."""
        evaluation, checkpoints = self._recipe.evaluation, self._recipe.checkpoints
        is_last = state.global_step >= state.max_steps
        control.should_log = True
        control.should_evaluate = is_last or _is_due(evaluation.eval_strategy, evaluation.eval_steps, 1, state)
        control.should_save = is_last or _is_due(
            checkpoints.save_strategy, checkpoints.save_steps, checkpoints.save_epochs or 1, state
        )
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save what is among the best that are kept, and stop when patience is out."""
        if state.global_step > 0:
            checkpoints = self._recipe.checkpoints
            best_steps = rank_steps(self.evaluations(state), checkpoints.mode)[: checkpoints.keep_best]
            control.should_save |= state.global_step in best_steps
            if self.is_stopped_early(state):
                control.should_training_stop = True
                control.should_save = True
        return control


def _is_due(strategy: str, every_steps: int | None, every_epochs: int, state: TrainerState) -> bool:
    if strategy == "epoch":
        return float(state.epoch) % every_epochs == 0
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
