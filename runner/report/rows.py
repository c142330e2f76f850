"""The numbers of each run in a report, and what makes those of two runs incomparable.

Axes come from the recipe, scores from `result.json`. Nothing that differs between two identical
runs (clock times, attempts, hosts) is read. `statistics` pairs the rows, `format` writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from runner.errors import CorruptFileError, escape_controls
from runner.files import hash_json
from runner.plan.status import RunStatus, State
from runner.recipe.parse import Recipe
from runner.run.base_scores import OtherBaseScores
from runner.run.facts import RunFacts
from runner.run.record import GenerationScore, SplitScore
from runner.strict import thaw

LikelihoodUnit = Literal["nats per completion token", "bits per byte"]


@dataclass(frozen=True)
class Scores:
    """One model on the test split; None where there is no score or nothing to divide by."""

    nll_per_completion_token: float | None = None
    nll_per_token: float | None = None
    bits_per_byte: float | None = None  # of the completions; comparable across tokenizers


@dataclass(frozen=True, eq=False)
class ReportRow:
    """One run. Everything that is measured is None unless the run is completed."""

    recipe: Recipe
    position: int  # in the input, from 0
    state: State
    rules: int | None = None  # by which its rows were drawn and masked
    contents: Mapping[str, str] = field(default_factory=dict)  # path -> SHA-256, as recorded
    num_test_rows: int | None = None
    test_rows_hash: str | None = None  # None also where `samples.json` does not say
    base: Scores = Scores()
    tuned: Scores = Scores()
    # Of "base" and "tuned"; empty: none generated.
    answers: Mapping[str, GenerationScore] = field(default_factory=dict)
    # Metric of answers -> what computes it; two numbers compare only where this is equal.
    metric_keys: Mapping[str, str] = field(default_factory=dict)
    best_step: int | None = None
    num_steps: int | None = None
    stop_reason: str | None = None
    # Of the base's scores that it kept for others, or found: another run computed others.
    base_warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.recipe.run.name

    @property
    def grid(self) -> str:
        """The grid that the run belongs to."""
        return self.recipe.run.grid

    @property
    def axes(self) -> Mapping[str, Any]:
        """The cell of the grid, in the grid's own order of axes."""
        return self.recipe.run.axes

    @property
    def change(self) -> float | None:
        """Tuned minus base in nats per completion token: negative is better."""
        base, tuned = self.base.nll_per_completion_token, self.tuned.nll_per_completion_token
        return None if base is None or tuned is None else tuned - base

    @property
    def is_scored(self) -> bool:
        """Whether the tuned model can be compared with another, in either unit."""
        return (
            self.tuned.nll_per_completion_token is not None and self.tuned.bits_per_byte is not None
        )

    def metric(self, model: Literal["base", "tuned"], name: str) -> float | None:
        """A metric of a model's answers on the test split; None where there is none."""
        return self.answers[model].metrics.get(name) if model in self.answers else None

    def score(self, unit: LikelihoodUnit) -> float:
        """The tuned model on the test split; only where `is_scored`."""
        score = (
            self.tuned.bits_per_byte
            if unit == "bits per byte"
            else self.tuned.nll_per_completion_token
        )
        assert score is not None
        return score


@dataclass(frozen=True)
class BaseComparison:
    """How many completed runs are better than their own base model, on test NLL per completion
    token.
    """

    num_completed: int
    num_better: int
    not_better: tuple[str, ...]
    unknown: tuple[str, ...]  # completed, but without both scores


def build_rows(runs: Iterable[tuple[Recipe, RunFacts, RunStatus]]) -> list[ReportRow]:
    """One row per run, sorted by grid, then by axes: numbers as numbers, all else in the order of
    the input. The facts are those that were read `with_samples`.
    """
    rows = [_build_row(position, *run) for position, run in enumerate(runs)]
    grids = list(dict.fromkeys(row.grid for row in rows))
    keys = {axis: list(map(axis_key, list_values(rows, axis))) for axis in list_axes(rows)}

    def rank(row: ReportRow) -> tuple[int, ...]:
        cell = []
        for axis, values in keys.items():
            cell.append(values.index(axis_key(row.axes[axis])) if axis in row.axes else -1)
        return grids.index(row.grid), *cell, row.position

    return sorted(rows, key=rank)


def name_other_base_scores(
    rows: Iterable[ReportRow], found: Sequence[OtherBaseScores]
) -> list[ReportRow]:
    """The rows, each with what was found of the base scores that its run kept or looked at."""
    return [
        replace(
            row,
            base_warnings=tuple(
                one.describe() for one in found if row.recipe.run.full_name in one.runs
            ),
        )
        for row in rows
    ]


def list_axes(rows: Iterable[ReportRow]) -> list[str]:
    """Every axis that some run has, in the order of the input."""
    return list(dict.fromkeys(axis for row in _in_input_order(rows) for axis in row.axes))


def list_values(rows: Iterable[ReportRow], axis: str) -> list[Any]:
    """The different values of an axis: numbers first, ascending, then all else in the order of the
    input.
    """
    values: dict[str, Any] = {}
    for row in _in_input_order(rows):
        if axis in row.axes:
            values.setdefault(axis_key(row.axes[axis]), row.axes[axis])
    return sorted(values.values(), key=lambda value: (0, value) if is_number(value) else (1, 0))


def is_number(value: Any) -> bool:
    """Whether an axis value sorts as a number; a boolean does not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def axis_text(value: Any) -> str:
    """An axis value as people write it; never empty, because a blank means that a run lacks the
    axis.

    >>> [axis_text(value) for value in ("full", 60, True, None, "", ("q", "v"))]
    ['full', '60', 'true', 'null', '""', '["q", "v"]']
    """
    return (
        value
        if isinstance(value, str) and value.strip()
        else json.dumps(thaw(value), ensure_ascii=False)
    )


def list_metrics(rows: Iterable[ReportRow]) -> list[str]:
    """Every metric of answers that some run has, each task's in its own order."""
    return list(
        dict.fromkeys(
            name for row in rows for score in row.answers.values() for name in score.metrics
        )
    )


def list_smaller_is_better(rows: Iterable[ReportRow]) -> list[str]:
    """The metrics of answers that are better when they are smaller."""
    modes = {name: mode for row in rows for name, mode in row.recipe.metric_modes.items()}
    return [name for name, mode in modes.items() if mode == "min"]


def compare_with_base(rows: Iterable[ReportRow]) -> BaseComparison:
    """Each completed run against its step 0."""
    completed = [row for row in rows if row.state == "completed"]
    changes = [(row.name, row.change) for row in completed]
    return BaseComparison(
        num_completed=len(completed),
        num_better=sum(change is not None and change < 0 for _, change in changes),
        not_better=tuple(name for name, change in changes if change is not None and change >= 0),
        unknown=tuple(name for name, change in changes if change is None),
    )


def group_by_test_rows(rows: Iterable[ReportRow]) -> dict[str | None, list[ReportRow]]:
    """Completed runs by the hash of their test rows; under None those that do not say. Two hashes:
    not comparable.
    """
    groups: dict[str | None, list[ReportRow]] = {}
    for row in rows:
        if row.state == "completed":
            groups.setdefault(row.test_rows_hash, []).append(row)
    return groups


def group_by_rules(rows: Iterable[ReportRow]) -> dict[int, list[ReportRow]]:
    """Completed runs by the rules of their rows and masks, ascending. Two of them: not
    comparable.
    """
    groups: dict[int, list[ReportRow]] = {}
    for row in rows:
        if row.rules is not None:
            groups.setdefault(row.rules, []).append(row)
    return dict(sorted(groups.items()))


def _in_input_order(rows: Iterable[ReportRow]) -> list[ReportRow]:
    return sorted(rows, key=lambda row: row.position)


def axis_key(value: Any) -> str:
    """Equal for equal axis values: 1 and 1.0 are one value, 1 and "1" and true are three."""
    is_whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if is_whole else thaw(value), sort_keys=True)


def _build_row(position: int, recipe: Recipe, facts: RunFacts, status: RunStatus) -> ReportRow:
    try:
        result = facts.result if status.state == "completed" else None
        samples = facts.samples if result is not None else None
        stored = facts.stored if result is not None else None
    except (CorruptFileError, OSError):
        return ReportRow(recipe, position, "unreadable")
    if result is None:
        return ReportRow(recipe, position, status.state)
    base, tuned = result.base.get("test"), result.tuned.get("test")
    return ReportRow(
        recipe,
        position,
        status.state,
        rules=stored.rules if stored else None,
        contents=stored.contents if stored else {},
        num_test_rows=tuned.num_rows if tuned else None,
        test_rows_hash=_find_ids_hash(samples),
        base=_build_scores(base),
        tuned=_build_scores(tuned),
        answers=result.generation,
        metric_keys=_key_metrics(recipe, stored.contents if stored is not None else {}),
        best_step=result.best_step,
        num_steps=result.num_steps,
        stop_reason=result.stop_reason,
    )


def _key_metrics(recipe: Recipe, contents: Mapping[str, str]) -> dict[str, str]:
    """What computes each metric: the task, or a function by the content of its files."""
    keys = dict.fromkeys(recipe.data.task.METRICS, f"the task {recipe.data.task.name}")
    for metric in recipe.evaluation.metrics:
        hashes = [contents.get(path) for path in metric.list_files().values()]
        keys[metric.name] = hash_json([metric.model_dump(mode="json"), hashes])
    return keys


def _find_ids_hash(samples: Any) -> str | None:
    try:
        return escape_controls(str(samples["splits"]["test"]["ids_hash"]))
    except (TypeError, LookupError):
        return None


def _build_scores(score: SplitScore | None) -> Scores:
    if score is None:
        return Scores()
    return Scores(
        nll_per_completion_token=_divide(score.completion_nll_sum, score.num_completion_tokens),
        nll_per_token=_divide(score.nll_sum, score.num_tokens),
        bits_per_byte=score.bits_per_byte if math.isfinite(score.completion_nll_sum) else None,
    )


def _divide(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None
