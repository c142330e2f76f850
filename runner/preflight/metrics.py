"""Preflight of a project's own metrics: each scores the rows' own answers, and empty ones, in two
processes.

This finds a function that fails on a row, or that returns other values when called again, before a
model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.data.draw import RawRow, RawSplits
from runner.data.rows import expand_turns
from runner.errors import DataError
from runner.functions import Metric
from runner.recipe.evaluation_section import GenerationOn
from runner.recipe.parse import Recipe


@dataclass(frozen=True)
class MetricFacts:
    """A metric's scores of the rows' own answers; `mean` is None if it judges none of them."""

    name: str
    mode: str
    split: str
    mean: float | None
    num_judged: int
    num_rows: int

    def describe(self) -> str:
        """One line.

        >>> MetricFacts("short", "max", "test", 0.5, 3, 4).describe()
        'metric short: 0.5 on the own answers of the test rows, 3 of 4 judged'
        """
        mean = "nothing" if self.mean is None else f"{self.mean:.4g}"
        return (
            f"metric {self.name}: {mean} on the own answers of the {self.split} rows,"
            f" {self.num_judged} of {self.num_rows} judged"
        )


def measure_metrics(recipe: Recipe, raw: RawSplits) -> tuple[MetricFacts, ...]:
    """The facts of every metric on every split that it judges.

    Raises:
        DataError: a function cannot be loaded, fails on a row, or is not deterministic.
    """
    generation = recipe.evaluation.generation
    if not isinstance(generation, GenerationOn):
        return ()
    facts = []
    for split in ("validation", "test") if generation.during_training else ("test",):
        rows = expand_turns(getattr(raw, split), recipe.data.turns)[: generation.num_samples]
        for metric in recipe.evaluation.metrics:
            scores = _score_twice(metric, rows)
            judged = [score for score in scores if score is not None]
            mean = math.fsum(judged) / len(judged) if judged else None
            facts.append(MetricFacts(metric.name, metric.mode, split, mean, len(judged), len(rows)))
    return tuple(facts)


def find_metric_doubts(facts: Sequence[MetricFacts]) -> Iterator[str]:
    """Yield a warning for each metric that judges no row."""
    for one in facts:
        if not one.num_judged:
            yield (
                f"the metric `{one.name}` judges none of the {one.split} rows' own answers: a"
                " metric without any judged row has no value"
            )


def _score_twice(metric: Metric, rows: Sequence[RawRow]) -> list[float | None]:
    """The scores of the rows' own answers."""
    first = _score(metric, rows)
    again = _score(metric, rows[::-1])[::-1]
    for row, scores, other in zip(rows, first, again, strict=True):
        if scores != other:
            raise DataError(
                f"{row.where}: {metric.function} returned {scores[0]} and {scores[1]} for the row's"
                f" own answer and an empty one, then {other[0]} and {other[1]} in a new process"
                " with the rows in reverse order",
                hint=(
                    "a metric may depend only on its arguments: not on chance, on the time, or on"
                    " earlier calls"
                ),
            )
    return [own for own, _ in first]


def _score(metric: Metric, rows: Sequence[RawRow]) -> list[tuple[float | None, float | None]]:
    """The scores of each row's own answer and of an empty one, in a new process."""
    scores = []
    with metric.open_score() as score:
        for row in rows:
            own = row.messages[row.completions[-1]]["content"]
            scored = [score(text, row.references, row.columns, row.where) for text in (own, "")]
            scores.append((scored[0], scored[1]))
    return scores
