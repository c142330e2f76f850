"""Callbacks that decide at which steps a run evaluates, saves and stops. Each decision is made
once, at the end of a step, and depends only on state that a checkpoint restores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runner.checkpoints.marker import find_best_step, list_evaluations, rank_steps
from runner.recipe.evaluation_section import EarlyStoppingOn
from runner.recipe.parse import Recipe
from runner.run.record import Progress
from runner.run.result import StopReason
from runner.sft.context import RunContext


def is_out_of_patience(values: Sequence[float], rule: EarlyStoppingOn) -> bool:
    """True if none of the last `patience` values improved on the best before them by more than
    `threshold`.

    The answer depends on the values alone, so an interruption cannot lose or double patience.

    >>> rule = EarlyStoppingOn(enabled=True, metric="nll_per_token", patience=2)
    >>> is_out_of_patience([3.0, 2.0, 2.5, 2.1], rule)
    True
    >>> is_out_of_patience([3.0, 2.0, 2.5, 1.9], rule)
    False
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
        """True if the evaluations so far require an early stop."""
        rule = self._recipe.early_stopping
        if not isinstance(rule, EarlyStoppingOn):
            return False
        return is_out_of_patience(
            [value for _, value in list_evaluations(state.log_history, rule.metric)], rule
        )

    def stop_reason(self, state: TrainerState) -> StopReason:
        """The reason why training ended at this step."""
        if self.is_stopped_early(state) and state.global_step < state.max_steps:
            return "early_stopping"
        return "max_steps" if self._recipe.training.max_steps is not None else "num_train_epochs"

    def best_step(self, state: TrainerState) -> int:
        """The step with the best weights so far; it exists after the first evaluation."""
        best = find_best_step(self.evaluations(state), self._recipe.checkpoints.mode)
        assert best is not None, "the last step is always evaluated"
        return best

    def evaluations(self, state: TrainerState) -> list[tuple[int, float]]:
        """`(step, value)` of each evaluation so far, by the metric that ranks checkpoints."""
        return list_evaluations(state.log_history, self._recipe.checkpoints.metric)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide whether this step logs, evaluates and saves."""
        evaluation, checkpoints = self._recipe.evaluation, self._recipe.checkpoints
        is_last = state.global_step >= state.max_steps
        control.should_log = True
        control.should_evaluate = is_last or _is_due(
            evaluation.eval_strategy, evaluation.eval_steps, 1, state
        )
        control.should_save = is_last or _is_due(
            checkpoints.save_strategy, checkpoints.save_steps, checkpoints.save_epochs or 1, state
        )
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save this step if it is among the best to keep, and stop if patience is exhausted."""
        if state.global_step > 0:
            checkpoints = self._recipe.checkpoints
            best_steps = rank_steps(self.evaluations(state), checkpoints.mode)[
                : checkpoints.keep_best
            ]
            control.should_save |= state.global_step in best_steps
            if self.is_stopped_early(state):
                control.should_training_stop = True
                control.should_save = True
        return control


class PreemptionCallback(TrainerCallback):  # type: ignore[misc]
    """Ends the attempt once all ranks agree that a stop was requested; runs after `FlowCallback`.

    Everything due at that step still happens, in Transformers' order: log, evaluate, save. If the
    request arrives during an evaluation or a save, the attempt ends right after it.
    """

    def __init__(self, context: RunContext) -> None:
        self._preemption = context.preemption

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save this step and stop after it, if a stop was requested."""
        if self._preemption.agree(args.device):
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Do the same as at the end of a step, except at step 0, which precedes training."""
        return self.on_step_end(args, state, control) if state.global_step > 0 else control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop if requested; the next attempt resumes from the checkpoint just saved."""
        if self._preemption.agree(args.device):
            control.should_training_stop = True
        return control


def _is_due(strategy: str, every_steps: int | None, every_epochs: int, state: TrainerState) -> bool:
    if strategy == "epoch":
        return float(state.epoch) % every_epochs == 0
    return every_steps is not None and state.global_step % every_steps == 0


LOG_COLUMNS: Final = ("step", "epoch", "loss", "learning_rate", "tokens/s")


def format_log_line(*cells: str) -> str:
    """One line of `logs.txt`: cells aligned to the right, in columns of 13 characters.

    >>> format_log_line("step", "loss")
    '         step          loss\\n'
    """
    return " ".join(f"{cell:>13}" for cell in cells) + "\n"


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Reports the progress and speed of training to the launch side, the log and `logs.txt`.

    The time of a step begins at the end of the previous step, evaluation or checkpoint, and ends
    when its loss is known. It includes fetching data. Its tokens are those of the global batch
    without padding, as TRL counts them. Only reading the loss waits for the device.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._since = time.perf_counter()
        self._num_seen_tokens = 0  # by TRL's count, which continues that of the last attempt
        # The step that this attempt resumed from, and the time.
        self._began: tuple[int, float] | None = None
        self.num_tokens = 0
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed over all steps of this attempt, without evaluations and checkpoints."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Write the header of `logs.txt`."""
        counts = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        self._num_seen_tokens = int(counts[-1]) if counts else 0
        if self._context.is_main:
            self._context.attempt.logs_path.write_text(format_log_line(*LOG_COLUMNS))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Start the clock; step 0 has been scored by now."""
        self._since = time.perf_counter()
        self._began = self._began or (state.global_step, self._since)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Restart the clock: the evaluation is not training time."""
        self._since = time.perf_counter()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Restart the clock: saving is not training time."""
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print and record each step and each evaluation."""
        if not self._context.is_main or not logs:
            return
        if "loss" in logs:
            tokens_per_second = self._log_step(state, logs)
            first_step, began = self._began or (0, self._since)
            progress = Progress(
                phase="training",
                step=state.global_step,
                max_steps=state.max_steps,
                loss=float(logs["loss"]),
                tokens_per_second=tokens_per_second,
                seconds_per_step=(self._since - began) / (state.global_step - first_step),
            )
            self._context.report_progress(progress, is_forced=state.global_step >= state.max_steps)
        shown = "  ".join(
            f"{key} {value:.6g}" for key, value in logs.items() if isinstance(value, int | float)
        )
        print(f"step {state.global_step}/{state.max_steps}  {shown}", flush=True)

    def _log_step(self, state: TrainerState, logs: Mapping[str, Any]) -> float:
        """Write the step's line of `logs.txt`; returns its tokens per second."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        num_tokens = int(logs["num_tokens"]) - self._num_seen_tokens
        self._num_seen_tokens += num_tokens
        self.num_tokens += num_tokens
        self.seconds += seconds
        line = format_log_line(
            f"{state.global_step}/{state.max_steps}",
            f"{state.epoch:.4f}",
            f"{logs['loss']:.6f}",
            f"{logs['learning_rate']:.4e}",
            f"{num_tokens / seconds:.1f}",
        )
        with self._context.attempt.logs_path.open("a") as stream:
            stream.write(line)
        return num_tokens / seconds
