"""The conclusions that a set of runs allows: cells, the effects of each axis, and other differences
between the compared runs.

Runs that differ only in the seed form one `Cell`. An `Effect` compares two values of one axis over
the cells that have both. Numbers come from `statistics`; `format`, `tables`, `figures` and `html`
write them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runner.report.rows import ReportRow
from runner.report.statistics import Interval


@dataclass(frozen=True)
class Metric:
    """A number by which runs are compared, on the test split."""

    name: str  # such as "nll_per_completion_token", "bits_per_byte", or a metric of answers
    title: str  # for people: "NLL per completion token"
    unit: str  # "nats per completion token"
    mode: Literal["min", "max"]  # which end is better
    is_of_answers: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """The runs of one grid and task that differ only in the seed."""

    grid: str
    task: str
    axes: Mapping[str, Any]  # without the seed, in the grid's own order
    runs: tuple[ReportRow, ...]  # all, including those without a score
    scores: Mapping[str, Mapping[Any, float]]  # metric -> seed -> score of the tuned model
    base_scores: Mapping[str, float]  # metric -> score of the base model
    missing: tuple[str, ...] = ()  # "NAME (failed)": runs of the cell without a score


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST) against a margin that was declared before the first launch."""

    margin: float
    interval: tuple[float, float]
    is_shown: bool  # the interval lies inside the margin
    level: float = 0.90  # of the interval; for several effects together, 1 - 0.10 / their number


@dataclass(frozen=True, eq=False)
class Effect:
    """One value of an axis against another, as the mean over one or more pairs of cells.

    `interval` is None if and only if `refused` gives the reason.
    """

    metric: Metric
    axis: str
    reference: Any
    compared: Any
    # Values of other axes that it is restricted to: {} for the mean over all cells, one axis for a
    # simple effect, all axes for two cells.
    at: Mapping[str, Any]
    pairs: tuple[tuple[Cell, Cell], ...]  # reference and compared
    interval: Interval | None
    refused: tuple[str, ...] = ()
    # Axes that it averages over although the effect differs between their levels
    depends_on: tuple[str, ...] = ()
    # Each a whole sentence: updates, trained tokens, early stops, versions, missing cells, ...
    flags: tuple[str, ...] = ()
    design: str = ""  # sentence on the runs that were pooled or paired
    is_confirmatory: bool = False
    why_exploratory: str = ""  # reason why its present declaration cannot count
    p_adjusted: float | None = None  # by Holm if confirmatory, else by Benjamini-Hochberg
    equivalence: Equivalence | None = None  # if its declaration has a margin
    noise_floor: float | None = None  # two single runs differ by less in 95% of cases
    is_below_noise: bool = False

    @property
    def is_of_seeds(self) -> bool:
        """True if it is about the recipes and not only about single trained models."""
        return self.interval is not None and self.interval.kind != "rows"

    @property
    def is_clear(self) -> bool:
        """True if the adjusted p is below 0.05 and the interval excludes 0. Intervals of simple
        effects are wider, so that all of them hold jointly.
        """
        bounds = self.interval.bounds if self.interval is not None else None
        if self.p_adjusted is None or bounds is None:
            return False
        return self.p_adjusted < 0.05 and not bounds[0] <= 0 <= bounds[1]


@dataclass(frozen=True)
class Interaction:
    """The test of an interaction: a different effect at the levels of another axis."""

    other: str  # the other axis
    p: float
    statistic: float
    df: tuple[float, float]


@dataclass(frozen=True, eq=False)
class AxisEffects:
    """All effects of two values of one axis by one metric, in one grid and task."""

    grid: str
    task: str
    metric: Metric
    axis: str
    reference: Any
    compared: Any
    # The mean over all cells; None if the axis depends on another one (see `depends_on`), or if
    # there is nothing to average (a single pair of cells is in `cells`)
    pooled: Effect | None
    depends_on: tuple[str, ...]  # axes whose interaction has p < 0.20
    interactions: tuple[Interaction, ...]
    simple: Mapping[str, tuple[Effect, ...]]  # other axis -> one effect at each of its levels
    cells: tuple[Effect, ...]  # one effect for each pair of cells
    # Dotted key -> number of pairs whose recipes differ there, the seed left out
    recipe_differences: Mapping[str, int] = field(default_factory=dict)
    unpaired: tuple[str, ...] = ()  # one reason for each cell without a pair
    # All effects that may answer, shown or not. The results decide which of them do, so a declared
    # contrast counts with all of them.
    family: tuple[Effect, ...] = ()
    is_declared: bool = False  # by some run, before or after it started
    is_with_first_only: bool = False  # the axis has too many values to compare every two of them

    @property
    def main(self) -> tuple[Effect, ...]:
        """The effects that show if the axis makes a difference.

        This is the mean over all cells; if the axis depends on others, the effects at their levels.
        If there is no mean for another reason, it is the first set of simple effects that may all
        have a number, each one without a number followed by its pairs of cells; else all pairs of
        cells.
        """
        if self.pooled is not None and self.pooled.interval is not None:
            return (self.pooled,)
        if self.depends_on:
            return tuple(effect for axis in self.depends_on for effect in self.simple[axis])
        for effects in self.simple.values():
            if all(effect.interval is not None or effect.depends_on for effect in effects):
                return self._list_answers(effects)
        return self.cells or ((self.pooled,) if self.pooled is not None else ())

    def _list_answers(self, effects: Iterable[Effect]) -> tuple[Effect, ...]:
        answers = []
        for effect in effects:
            answers.append(effect)
            if effect.interval is None:
                asked = {tuple(map(id, pair)) for pair in effect.pairs}
                answers += [one for one in self.cells if tuple(map(id, one.pairs[0])) in asked]
        return tuple(answers)

    @property
    def shown(self) -> tuple[Effect, ...]:
        """The effects that a reader sees: the pooled effect if there is one, then the simple ones,
        then single pairs of cells that answer instead; if there are no others, all single pairs.
        """
        pooled = (self.pooled,) if self.pooled is not None else ()
        simple = tuple(effect for effects in self.simple.values() for effect in effects)
        if not pooled + simple:
            return self.cells
        known = {id(effect) for effect in pooled + simple}
        cells = [one for one in self.main if id(one) not in known and one.is_of_seeds]
        return (*pooled, *simple, *cells)


@dataclass(frozen=True, eq=False)
class Report:
    """The whole content of a report; each format writes all or part of it."""

    rows: tuple[ReportRow, ...]
    cells: tuple[Cell, ...]
    metrics: tuple[Metric, ...]
    effects: tuple[AxisEffects, ...]
    # One conclusion each, declared contrasts first
    verdicts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    # (grid, task, metric name) -> two single runs differ by less in 95% of cases, all else equal
    noise_floors: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
