"""What a report says: one row per run, paired comparisons along each axis, and what makes numbers incomparable.

Owns the numbers; `report_format` owns how they are written. Axes come from the recipe, scores from `result.json`.
Nothing that differs between two identical runs (clock times, attempts, hosts) is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Final, Literal

from runner.fsio import load_json
from runner.hf_fields import thaw
from runner.identity import build_digest_payload, diff_payloads
from runner.paths import RunPaths
from runner.recipe import Recipe
from runner.record import RunStatus, SplitScore, State, load_result

MAX_VALUES_ALL_PAIRS: Final = 4  # 4 values make 6 pairs of values; with more, each is compared with the first only
CONFIDENCE: Final = 0.95

Unit = Literal["nats per completion token", "bits per byte"]


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
    num_test_rows: int | None = None
    test_rows_hash: str | None = None  # None also where `samples.json` does not say
    base: Scores = Scores()
    tuned: Scores = Scores()
    best_step: int | None = None
    num_steps: int | None = None
    stop_reason: str | None = None

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
        return self.tuned.nll_per_completion_token is not None and self.tuned.bits_per_byte is not None

    def score(self, unit: Unit) -> float:
        """The tuned model on the test split; only where `is_scored`."""
        score = self.tuned.bits_per_byte if unit == "bits per byte" else self.tuned.nll_per_completion_token
        assert score is not None
        return score


@dataclass(frozen=True)
class AxisComparison:
    """Two values of one axis over all cells that are equal in every other axis (and in the grid)."""

    axis: str
    reference: Any
    compared: Any
    unit: Unit
    mean_difference: float | None  # compared minus reference: negative means that `compared` is better
    interval: tuple[float, float] | None  # paired t; None with fewer than two pairs
    num_pairs: int
    unpaired: tuple[str, ...]  # one reason for each cell that gives no pair
    recipe_differences: Mapping[str, int]  # dotted key -> number of pairs whose recipes differ there
    num_pairs_on_different_rows: int  # pairs whose two runs were scored on different test rows
    is_with_first_only: bool  # the axis has too many values to compare every two of them


@dataclass(frozen=True)
class BaseComparison:
    """How many completed runs are better than their own base model, on test NLL per completion token."""

    num_completed: int
    num_better: int
    not_better: tuple[str, ...]
    unknown: tuple[str, ...]  # completed, but without both scores


def build_rows(runs: Iterable[tuple[Recipe, RunPaths, RunStatus]]) -> list[ReportRow]:
    """One row per run, sorted by grid, then by axes: numbers as numbers, all else in the order of the input."""
    rows = [_build_row(position, *run) for position, run in enumerate(runs)]
    grids = list(dict.fromkeys(row.grid for row in rows))
    ranks = {
        axis: {_key(value): rank for rank, value in enumerate(list_values(rows, axis))} for axis in list_axes(rows)
    }

    def rank(row: ReportRow) -> tuple[int, ...]:
        cell = (ranks[axis][_key(row.axes[axis])] if axis in row.axes else -1 for axis in ranks)
        return grids.index(row.grid), *cell, row.position

    return sorted(rows, key=rank)


def list_axes(rows: Iterable[ReportRow]) -> list[str]:
    """Every axis that some run has, in the order of the input."""
    return list(dict.fromkeys(axis for row in _in_input_order(rows) for axis in row.axes))


def list_values(rows: Iterable[ReportRow], axis: str) -> list[Any]:
    """The different values of an axis: numbers first, ascending, then all else in the order of the input."""
    values: dict[str, Any] = {}
    for row in _in_input_order(rows):
        if axis in row.axes:
            values.setdefault(_key(row.axes[axis]), row.axes[axis])
    return sorted(values.values(), key=lambda value: (0, value) if is_number(value) else (1, 0))


def is_number(value: Any) -> bool:
    """Whether an axis value sorts as a number; a boolean does not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def axis_text(value: Any) -> str:
    """An axis value as people write it; never empty, because a blank means that a run lacks the axis.

    >>> [axis_text(value) for value in ("full", 60, True, None, "", ("q", "v"))]
    ['full', '60', 'true', 'null', '""', '["q", "v"]']
    """
    return value if isinstance(value, str) and value.strip() else json.dumps(thaw(value), ensure_ascii=False)


def build_comparisons(rows: Sequence[ReportRow]) -> list[AxisComparison]:
    """Pairs of values of every axis that has at least two; the earlier one in `list_values` is the reference."""
    return [comparison for axis in list_axes(rows) for comparison in _compare_axis(rows, axis)]


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
    """Completed runs by the hash of their test rows; under None those that do not say. Two hashes: not comparable."""
    groups: dict[str | None, list[ReportRow]] = {}
    for row in rows:
        if row.state == "completed":
            groups.setdefault(row.test_rows_hash, []).append(row)
    return groups


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean difference by the paired t; None with fewer than two pairs."""
    if len(differences) < 2:
        return None
    half_width = student_t_quantile(len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    mean = fmean(differences)
    return mean - half_width, mean + half_width


def student_t_quantile(degrees_of_freedom: int) -> float:
    """The t that |T| stays below with probability `CONFIDENCE`.

    P(|T| > t) is the regularized incomplete beta I_x(df/2, 1/2) at x = df / (df + t^2), solved by bisection. mpmath
    comes with torch; scipy, once installed, is imported by every trainer and costs each 0.3 s.

    >>> round(student_t_quantile(5), 4), round(student_t_quantile(1), 3)
    (2.5706, 12.706)
    """
    from mpmath import betainc

    df = degrees_of_freedom
    low, high = 0.0, 1000.0
    for _ in range(60):
        t = (low + high) / 2
        tail = betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
        low, high = (low, t) if tail < 1 - CONFIDENCE else (t, high)
    return (low + high) / 2


def _in_input_order(rows: Iterable[ReportRow]) -> list[ReportRow]:
    return sorted(rows, key=lambda row: row.position)


def _key(value: Any) -> str:
    """Equal for equal axis values: 1 and 1.0 are one value, 1 and "1" and true are three."""
    is_whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if is_whole else thaw(value), sort_keys=True)


def _build_row(position: int, recipe: Recipe, paths: RunPaths, status: RunStatus) -> ReportRow:
    result = load_result(paths) if status.state == "completed" else None
    if result is None:
        return ReportRow(recipe, position, status.state)
    base, tuned = result.base.get("test"), result.tuned.get("test")
    samples = load_json(paths.samples_path) or {}
    return ReportRow(
        recipe,
        position,
        status.state,
        num_test_rows=tuned.num_rows if tuned else None,
        test_rows_hash=samples.get("splits", {}).get("test", {}).get("ids_hash"),
        base=_build_scores(base),
        tuned=_build_scores(tuned),
        best_step=result.best_step,
        num_steps=result.num_steps,
        stop_reason=result.stop_reason,
    )


def _build_scores(score: SplitScore | None) -> Scores:
    if score is None:
        return Scores()
    return Scores(
        nll_per_completion_token=_divide(score.completion_nll_sum, score.num_completion_tokens),
        nll_per_token=_divide(score.nll_sum, score.num_tokens),
        bits_per_byte=_divide(score.completion_nll_sum / math.log(2), score.num_bytes),
    )


def _divide(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None


def _compare_axis(rows: Sequence[ReportRow], axis: str) -> list[AxisComparison]:
    values = list_values(rows, axis)
    is_with_first_only = len(values) > MAX_VALUES_ALL_PAIRS
    chosen = [(values[0], value) for value in values[1:]] if is_with_first_only else list(combinations(values, 2))
    matches = [_match(rows, axis, reference, compared) for reference, compared in chosen]
    # One unit for the whole axis: token counts of two base models are not comparable, bytes are.
    across_models = any(a.recipe.model.path != b.recipe.model.path for pairs, _ in matches for a, b in pairs)
    unit: Unit = "bits per byte" if across_models else "nats per completion token"
    comparisons = []
    for (reference, compared), (pairs, unpaired) in zip(chosen, matches, strict=True):
        differences = [b.score(unit) - a.score(unit) for a, b in pairs]
        comparisons.append(
            AxisComparison(
                axis=axis,
                reference=reference,
                compared=compared,
                unit=unit,
                mean_difference=fmean(differences) if differences else None,
                interval=paired_interval(differences),
                num_pairs=len(pairs),
                unpaired=tuple(unpaired),
                recipe_differences=_count_recipe_differences(pairs),
                num_pairs_on_different_rows=sum(a.test_rows_hash != b.test_rows_hash for a, b in pairs),
                is_with_first_only=is_with_first_only,
            )
        )
    return comparisons


def _match(
    rows: Sequence[ReportRow], axis: str, reference: Any, compared: Any
) -> tuple[list[tuple[ReportRow, ReportRow]], list[str]]:
    """The pairs, and for each cell without one the reason. A cell is what two runs share: grid and all other axes."""
    sides = {_key(reference): axis_text(reference), _key(compared): axis_text(compared)}
    cells: dict[tuple[str, ...], dict[str, list[ReportRow]]] = {}
    for row in rows:
        if axis in row.axes and (side := _key(row.axes[axis])) in sides:
            others = (f"{name}={_key(value)}" for name, value in sorted(row.axes.items()) if name != axis)
            cells.setdefault((row.grid, *others), {key: [] for key in sides})[side].append(row)
    pairs, unpaired = [], []
    for cell in cells.values():
        reasons = [why for side, runs in cell.items() if (why := _why_no_partner(axis, sides[side], runs, cell))]
        if reasons:
            unpaired.append(", ".join(reasons))
        else:
            first, second = (next(row for row in runs if row.is_scored) for runs in cell.values())
            pairs.append((first, second))
    return pairs, unpaired


def _why_no_partner(
    axis: str, value: str, runs: Sequence[ReportRow], cell: Mapping[str, Sequence[ReportRow]]
) -> str | None:
    scored = [row.name for row in runs if row.is_scored]
    if len(scored) == 1:
        return None
    if scored:
        return f"{' and '.join(scored)} stand in the same cell"
    if runs:
        return ", ".join(
            f"{row.name} {'has no test score' if row.state == 'completed' else f'is {row.state}'}" for row in runs
        )
    others = " and ".join(row.name for other in cell.values() for row in other)
    return f"{others} has no partner with {axis} {value}"


def _count_recipe_differences(pairs: Sequence[tuple[ReportRow, ReportRow]]) -> dict[str, int]:
    """`dotted key -> number of pairs` whose recipes differ there, in the order of the recipe."""
    lines = (
        line
        for first, second in pairs
        for line in diff_payloads(build_digest_payload(first.recipe), build_digest_payload(second.recipe))
    )
    return dict(Counter(line.partition(": ")[0] for line in lines))
