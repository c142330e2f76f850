"""`result.json`, which the training process writes last: the scores of a run, and a summary of its
training.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from runner.run.fact import Count, Fact, Number, Sha256, Shown, load_fact
from runner.run.manifest import FileRecord, InnerName
from runner.run.paths import RunPaths

StopReason = Literal["num_train_epochs", "max_steps", "early_stopping"]


def _require_possible(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"{value}: a sum of negative log-likelihoods must be finite and at least 0"
        )
    return value


def _require_finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value}: a score must be a finite number")
    return value


NllSum = Annotated[float, AfterValidator(_require_possible)]
Finite = Annotated[float, AfterValidator(_require_finite)]


class SplitScore(Fact):
    """The summed negative log-likelihood of one split over all its rows, in nats, and the counts
    that it covers.
    """

    num_rows: Number
    num_completion_tokens: Number
    num_tokens: Number  # of the full text, the first token of each row excluded
    num_bytes: Count  # UTF-8 bytes of the rows' own text in completions
    completion_nll_sum: NllSum
    # Of the completion tokens that hold no such byte; None: an older run did not separate them.
    template_nll_sum: NllSum | None = None
    nll_sum: NllSum

    @model_validator(mode="after")
    def _fit(self) -> SplitScore:
        if self.num_completion_tokens > self.num_tokens:
            raise ValueError(
                f"num_completion_tokens is {self.num_completion_tokens}, more than the"
                f" {self.num_tokens} of num_tokens"
            )
        return self

    @property
    def nll_per_completion_token(self) -> float:
        """Nats per completion token, end-of-turn tokens included."""
        return self.completion_nll_sum / self.num_completion_tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of the completion tokens that hold the rows' own text, per byte of it; comparable
        across tokenizers and templates. None if the completions are empty.
        """
        if not self.num_bytes:
            return None
        nll_sum = self.completion_nll_sum - (self.template_nll_sum or 0.0)
        return nll_sum / math.log(2) / self.num_bytes

    @property
    def nll_per_token(self) -> float:
        """Nats per token of the full text."""
        return self.nll_sum / self.num_tokens


class GenerationScore(Fact):
    """The task's metrics of generated texts, averaged over the rows that have a reference."""

    num_rows: Count
    num_judged: Count  # rows that have a reference to judge by
    num_unfinished: Count  # texts that reached `max_new_tokens` without an end of turn
    # Texts without a readable answer, such as a label or a final result; they count as wrong.
    num_unreadable: Count
    metrics: dict[str, Finite]  # of the task and of the project
    # For each of the project's own metrics: the rows that it judged.
    num_judged_by: dict[str, Count] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fit(self) -> GenerationScore:
        counts = {
            "num_judged": self.num_judged,
            "num_unfinished": self.num_unfinished,
            "num_unreadable": self.num_unreadable,
            **{f"num_judged_by.{name}": count for name, count in self.num_judged_by.items()},
        }
        for name, count in counts.items():
            if count > self.num_rows:
                raise ValueError(f"{name} is {count}, more than the {self.num_rows} of num_rows")
        return self


class TrainResult(Fact):
    """`result.json`: written last, so its presence with the right digest means that the run is
    complete.
    """

    recipe_digest: str
    outcome: Literal["completed"]
    stop_reason: StopReason
    num_steps: Count
    best_step: Count
    best_metric: Finite
    metric: Shown
    num_train_rows: Count
    base: dict[str, SplitScore]  # split -> score of the base model: "validation", "test"
    tuned: dict[str, SplitScore]  # split -> score of the exported model
    # "base" and "tuned" -> generated answers on the test split; empty if generation is off
    generation: dict[str, GenerationScore] = Field(default_factory=dict)
    # Of `model/` and of the files summarized here, by path in the run directory; None: an older run
    # recorded no checksums, so it cannot be verified.
    files: dict[InnerName, FileRecord] | None = None
    # None in the fields below: an older run did not record it.
    # Of the trained parameters, before step 1: `model.weights.hash_parameters`.
    initial_weights_hash: Sha256 | None = None
    # Of the row ids in training order: `sft.order.hash_order`.
    row_order_hash: Sha256 | None = None
    # Optimizer updates: steps, except those skipped because of float16 loss scaling.
    num_updates: Count | None = None
    num_trained_tokens: Count | None = None  # labeled tokens that entered the loss, over all steps
    schedule_steps: Count | None = None  # length of the learning-rate schedule

    @model_validator(mode="after")
    def _fit(self) -> TrainResult:
        if self.best_step > self.num_steps:
            raise ValueError(f"best_step is {self.best_step}, after the last of {self.num_steps}")
        return self


def load_result(paths: RunPaths) -> TrainResult | None:
    """The result, or None while there is none."""
    return load_fact(paths.result_path, TrainResult)
