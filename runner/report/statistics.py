"""Paired comparisons along each axis of the grids: which pairs there are, and what their
differences say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Final, Literal, get_args

from runner.recipe.identity import build_digest_payload, diff_payloads
from runner.report.rows import (
    LikelihoodUnit,
    ReportRow,
    axis_key,
    axis_text,
    list_axes,
    list_metrics,
    list_values,
)

# 4 values make 6 pairs of values; with more, each is compared with the first only
MAX_VALUES_ALL_PAIRS: Final = 4
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate of a contrast with the interval around it.

    `kind` says over what: "seeds and rows" (both random), "seeds" (these very rows), "rows" (these
    trained models); "identical" where the runs do not differ at all: no interval.
    """

    kind: Literal["seeds and rows", "seeds", "rows", "identical"]
    estimate: float
    half_width: float | None
    p: float | None
    level: float  # such as 0.95
    v_seed: float
    v_row: float
    v_res: float
    df_seed: float | None
    df_row: float
    num_groups: int
    num_seeds: tuple[int, ...]  # of each cell
    has_few_groups: bool = False  # at most 5 effective ones
    note: str = ""  # such as "2 seeds: only very large differences show"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        if self.half_width is None:
            return None
        return self.estimate - self.half_width, self.estimate + self.half_width


@dataclass(frozen=True)
class AxisComparison:
    """Two values of one axis over all cells that are equal in every other axis (and in the
    grid).
    """

    axis: str
    reference: Any
    compared: Any
    # A `LikelihoodUnit`, smaller is better; or a metric of answers, which says what is better.
    unit: str
    mean_difference: float | None  # compared minus reference
    interval: tuple[float, float] | None  # paired t; None with fewer than two pairs
    num_pairs: int
    unpaired: tuple[str, ...]  # one reason for each cell that gives no pair
    # Dotted key -> number of pairs whose recipes differ there.
    recipe_differences: Mapping[str, int]
    num_pairs_on_different_rows: int  # pairs whose two runs were scored on different test rows
    is_with_first_only: bool  # the axis has too many values to compare every two of them

    @property
    def is_of_answers(self) -> bool:
        """Whether a metric of answers is compared, whose unit says what is better."""
        return self.unit not in get_args(LikelihoodUnit)


def build_comparisons(rows: Sequence[ReportRow]) -> list[AxisComparison]:
    """Pairs of values of every axis that has at least two; the earlier one in `list_values` is the
    reference.
    """
    return [comparison for axis in list_axes(rows) for comparison in _compare_axis(rows, axis)]


def answer_unit(metric: str, mode: Literal["min", "max"] = "max") -> str:
    """A metric of answers as the unit of a comparison.

    >>> answer_unit("f1"), answer_unit("num_errors", "min")
    ('f1, larger is better', 'num_errors, smaller is better')
    """
    return f"{metric}, {'larger' if mode == 'max' else 'smaller'} is better"


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean difference by the paired t; None with fewer than two pairs."""
    if len(differences) < 2:
        return None
    half_width = (
        student_t_quantile(len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    )
    mean = fmean(differences)
    return mean - half_width, mean + half_width


def student_t_quantile(degrees_of_freedom: int) -> float:
    """The t that |T| stays below with probability `CONFIDENCE`.

    P(|T| > t) is the regularized incomplete beta I_x(df/2, 1/2) at x = df / (df + t^2), solved by
    bisection. mpmath comes with torch; scipy, once installed, is imported by every trainer and
    costs each 0.3 s.

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


def _compare_axis(rows: Sequence[ReportRow], axis: str) -> list[AxisComparison]:
    values = list_values(rows, axis)
    is_with_first_only = len(values) > MAX_VALUES_ALL_PAIRS
    chosen = (
        [(values[0], value) for value in values[1:]]
        if is_with_first_only
        else list(combinations(values, 2))
    )
    matches = [_match(rows, axis, reference, compared) for reference, compared in chosen]
    # One unit for the whole axis: token counts of two base models are not comparable, bytes are.
    across_models = any(
        a.recipe.model.path != b.recipe.model.path for pairs, _ in matches for a, b in pairs
    )
    unit: LikelihoodUnit = "bits per byte" if across_models else "nats per completion token"
    names = list_metrics(row for pairs, _ in matches for pair in pairs for row in pair)
    comparisons = []
    for (reference, compared), (pairs, unpaired) in zip(chosen, matches, strict=True):
        values_compared = {"axis": axis, "reference": reference, "compared": compared}
        values_compared["is_with_first_only"] = is_with_first_only
        differences = [b.score(unit) - a.score(unit) for a, b in pairs]
        comparisons.append(_compare_pairs(unit, pairs, differences, unpaired, values_compared))
        for name in names:
            both = [pair for pair in pairs if _why_not_comparable(name, *pair) is None]
            are_own = any(_is_own(name, row) for pair in pairs for row in pair)
            if not both and not are_own:  # different tasks; their names need not mean the same
                continue
            unit_of_answers = answer_unit(name, _find_mode(name, pairs))
            differences = [
                b.answers["tuned"].metrics[name] - a.answers["tuned"].metrics[name] for a, b in both
            ]
            others = (_why_not_comparable(name, *pair) for pair in pairs)
            reasons = [*unpaired, *filter(None, others)]
            comparisons.append(
                _compare_pairs(unit_of_answers, both, differences, reasons, values_compared)
            )
    return comparisons


def _why_not_comparable(metric: str, first: ReportRow, second: ReportRow) -> str | None:
    """Why two runs give no difference in a metric of their answers, empty where neither has it;
    None where they do.
    """
    lacking = [row.name for row in (first, second) if row.metric("tuned", metric) is None]
    if lacking:
        return f"{lacking[0]} has no {metric}" if len(lacking) == 1 else ""
    if first.metric_keys.get(metric) != second.metric_keys.get(metric):
        is_own = _is_own(metric, first) or _is_own(metric, second)
        what = f"functions for {metric}" if is_own else "tasks"
        return f"{first.name} and {second.name} have different {what}"
    return None


def _is_own(metric: str, row: ReportRow) -> bool:
    """Whether a function of the project computes it."""
    return any(metric == one.name for one in row.recipe.evaluation.metrics)


def _find_mode(metric: str, pairs: Sequence[tuple[ReportRow, ReportRow]]) -> Literal["min", "max"]:
    modes = [row.recipe.metric_modes for pair in pairs for row in pair]
    return next((mode[metric] for mode in modes if metric in mode), "max")


def _compare_pairs(
    unit: str,
    pairs: Sequence[tuple[ReportRow, ReportRow]],
    differences: Sequence[float],
    unpaired: Sequence[str],
    values_compared: Mapping[str, Any],
) -> AxisComparison:
    return AxisComparison(
        unit=unit,
        mean_difference=fmean(differences) if differences else None,
        interval=paired_interval(differences),
        num_pairs=len(pairs),
        unpaired=tuple(unpaired),
        recipe_differences=_count_recipe_differences(pairs),
        num_pairs_on_different_rows=sum(a.test_rows_hash != b.test_rows_hash for a, b in pairs),
        **values_compared,
    )


def _match(
    rows: Sequence[ReportRow], axis: str, reference: Any, compared: Any
) -> tuple[list[tuple[ReportRow, ReportRow]], list[str]]:
    """The pairs, and for each cell without one the reason. A cell is what two runs share: grid and
    all other axes.
    """
    sides = {axis_key(reference): axis_text(reference), axis_key(compared): axis_text(compared)}
    cells: dict[tuple[str, ...], dict[str, list[ReportRow]]] = {}
    for row in rows:
        if axis in row.axes and (side := axis_key(row.axes[axis])) in sides:
            others = (
                f"{name}={axis_key(value)}"
                for name, value in sorted(row.axes.items())
                if name != axis
            )
            cells.setdefault((row.grid, *others), {key: [] for key in sides})[side].append(row)
    pairs, unpaired = [], []
    for cell in cells.values():
        reasons: list[str] = []
        scored: list[ReportRow] = []
        for side, runs in cell.items():
            why = _why_no_partner(axis, sides[side], runs, cell)
            reasons += [why] if why else []
            scored += [row for row in runs if row.is_scored][:1]
        if not reasons and scored[0].rules != scored[1].rules:
            first, second = (f"{row.name} (rules {row.rules})" for row in scored)
            reasons.append(f"{first} and {second} follow different rules of rows and masks")
        if reasons:
            unpaired.append(", ".join(reasons))
        else:
            pairs.append((scored[0], scored[1]))
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
            f"{row.name} {'has no test score' if row.state == 'completed' else f'is {row.state}'}"
            for row in runs
        )
    others = " and ".join(row.name for other in cell.values() for row in other)
    return f"{others} has no partner with {axis} {value}"


def _count_recipe_differences(pairs: Sequence[tuple[ReportRow, ReportRow]]) -> dict[str, int]:
    """`dotted key -> number of pairs` whose recipes differ there, in the order of the recipe, then
    the files that both name and that held something else.
    """
    lines: list[str] = []
    for first, second in pairs:
        payloads = build_digest_payload(first.recipe), build_digest_payload(second.recipe)
        lines += diff_payloads(*payloads)
        shared = [path for path in first.contents if path in second.contents]
        lines += [
            f"content of {path}: "
            for path in shared
            if first.contents[path] != second.contents[path]
        ]
    return dict(Counter(line.partition(": ")[0] for line in lines))
