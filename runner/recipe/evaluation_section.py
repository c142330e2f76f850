"""The sections of a recipe about scores during and after training: `evaluation` and
`early_stopping`.

Their docstrings and descriptions are written for users, as in `schema`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from runner.functions import Metric
from runner.recipe.schema import NLL_METRICS, MetricName, Positive
from runner.strict import Section


class GenerationOff(Section):
    """Rows are scored by likelihood only."""

    enabled: Literal[False]


class GenerationOn(Section):
    """The base model and the tuned model also answer the test prompts, greedily. The task's metrics
    judge the answers.
    """

    enabled: Literal[True]
    max_new_tokens: Positive = Field(
        description="The maximum length of an answer in tokens.", examples=[64]
    )
    num_samples: Positive | None = Field(
        default=None,
        description="Answer only the first so many rows of the split. null: all rows.",
        examples=[200],
    )
    batch_size: Positive | None = Field(
        default=None,
        description=(
            "Prompts that a process answers at the same time. null:"
            " `evaluation.per_device_eval_batch_size`."
        ),
        examples=[32],
    )
    during_training: bool = Field(
        default=False,
        description=(
            "Also answer the validation prompts at every evaluation; checkpoints and early stopping"
            " can then use the task's metrics."
        ),
        examples=[True],
    )


# Names that evaluations and reports already use.
_TAKEN_METRIC_NAMES: Final = frozenset(
    {
        *NLL_METRICS,
        *("bits_per_byte", "completion_nll_sum", "epoch", "generation", "grad_norm"),
        *("learning_rate", "loss", "nll_sum", "num_bytes", "num_completion_tokens"),
        *("num_rows", "num_tokens", "num_unfinished", "num_unreadable", "runtime", "split", "step"),
        "template_nll_sum",
    }
)


class EvaluationSection(Section):
    """The times at which the validation rows are scored, and the generated answers."""

    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        description=(
            "steps: every `eval_steps` steps. epoch: after every epoch. 'no' (in quotes; YAML reads"
            " a plain no as false): neither. Step 0 and the last step are always evaluated."
        ),
        examples=["epoch"],
    )
    eval_steps: Positive | None = Field(
        default=None,
        description=(
            "Optimizer steps between evaluations. Required with `eval_strategy: steps`; null with"
            " the others."
        ),
        examples=[50],
    )
    per_device_eval_batch_size: Positive = Field(
        description="Rows that a process scores at the same time.", examples=[8]
    )
    generation: Annotated[GenerationOff | GenerationOn, Field(discriminator="enabled")] = Field(
        default=GenerationOff(enabled=False),
        description="Answers that the models generate.",
        examples=[{"enabled": True, "max_new_tokens": 64}],
    )
    metrics: tuple[Metric, ...] = Field(
        default=(),
        description=(
            "Your own metrics of the generated answers, in addition to the task's. Needs"
            " `generation.enabled: true`."
        ),
    )

    @model_validator(mode="after")
    def _names_each_metric_once(self) -> Self:
        names = [metric.name for metric in self.metrics]
        for name in names:
            if name in _TAKEN_METRIC_NAMES:
                raise ValueError(f"`{name}` is measured already: give your metric another name")
            if names.count(name) > 1:
                raise ValueError(f"two metrics are called `{name}`")
        return self

    @model_validator(mode="after")
    def _has_steps_exactly_for_steps(self) -> Self:
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            raise ValueError("`eval_steps` goes with `eval_strategy: steps`, and only with it")
        return self


class EarlyStoppingOff(Section):
    """Training continues to the last step."""

    enabled: Literal[False]


class EarlyStoppingOn(Section):
    """Training stops after `patience` evaluations in a row without an improvement by more than
    `threshold`.
    """

    enabled: Literal[True]
    metric: MetricName = Field(
        description=(
            "The metric on the validation split: nll_per_completion_token or nll_per_token; with"
            " `evaluation.generation.during_training: true` also a metric of the task or of"
            " `evaluation.metrics`."
        ),
        examples=["nll_per_completion_token"],
    )
    mode: Literal["min", "max"] = Field(
        default="min",
        description=(
            "min: smaller is better, for likelihoods. max: larger is better, for the tasks'"
            " metrics."
        ),
    )
    patience: Positive = Field(
        description="Evaluations in a row without an improvement.", examples=[3]
    )
    threshold: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="An improvement must be larger than this, in the metric's unit.",
        examples=[0.001],
    )
