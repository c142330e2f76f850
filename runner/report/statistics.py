"""Effects with their intervals: what a difference between cells says about recipes and rows.

A cell holds the runs that differ in nothing but the seed. A contrast weighs cells by numbers that
sum to 0; its interval treats seeds, rows or both as random. Everything here is a pure function of
arrays; which cells are compared, and whether they may be, is decided by `effects` and
`comparability`.

Seeds and rows each have an error of their own, with few degrees of freedom for the seeds. The
critical value is weighted between the two (Cochran and Cox): one Satterthwaite number of degrees of
freedom trusts the rows too much where the runs happen to lie close together. `benchmarks/
statistics.py` holds all of this against grids whose truth is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import fdtrc, stdtrit
from scipy.stats import binom

from runner.errors import RunnerError
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

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# What is random: both (this recipe, on rows like these), the seeds (this recipe, on these very
# rows), or the rows (these trained models, on rows like these).
Statement = Literal["seeds and rows", "seeds", "rows"]
Design = Literal["paired", "separate", "pooled", "per seed"]

# From so many shared seeds on, cells of a grid are paired by seed
MIN_SEEDS_PER_SEED: Final = 5
# An interaction below this p is believed: no mean over its levels is shown
INTERACTION_GATE: Final = 0.20
# Below this p, shared seeds of a grid seem to act in common on the cells of a contrast
SHARED_SEEDS_GATE: Final = 0.20
FEW_GROUPS: Final = 5
# Of a score: standard errors below it are rounding
_ROUNDING: Final = 1e-12


class NotComparableError(RunnerError):
    """Scores of which no difference may be taken."""


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
    v_seed: float  # 0 where `df_seed` is None: not known
    v_row: float
    v_res: float
    df_seed: float | None
    df_row: float
    num_groups: int
    num_seeds: tuple[int, ...]  # of each cell
    has_few_groups: bool = False  # at most 5 effective ones
    note: str = ""  # such as "2 seeds: only very large differences show"
    design: str = ""  # which runs were pooled or paired, in words

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        if self.half_width is None:
            return None
        return self.estimate - self.half_width, self.estimate + self.half_width

    @property
    def standard_error(self) -> float:
        """The root of the variance of the estimate, by the statement that `kind` makes."""
        both = max(self.v_seed + self.v_row - self.v_res, self.v_seed, self.v_row)
        variances = {"seeds and rows": both, "seeds": self.v_seed, "rows": self.v_row}
        return math.sqrt(variances.get(self.kind, 0.0))


@dataclass(frozen=True, eq=False)
class CellScores:
    """The runs of one cell, row by row.

    `sums` are (seeds, rows): nats over the scored tokens of a row, or its score by a metric.
    Cells of one `pool` share the spread of their seeds: those of one base model and task.
    """

    sums: Floats
    pool: str
    # Of each run its `training.seed`, by which cells share seeds; () where none is shared.
    seeds: tuple[Hashable, ...] = ()
    # (rows,): where given, it must be equal to the tokens of the comparison
    tokens: Floats | None = None
    name: str = ""  # for errors


def interval(
    cells: Sequence[CellScores],
    weights: Sequence[float],
    tokens: Floats,
    groups: Ints | None = None,
    *,
    level: float = 0.95,
    statement: Statement = "seeds and rows",
) -> Interval:
    """The interval of sum_c weights[c] * (mean score of the runs of cell c).

    Cells of weight 0 take part in the spread of their pool only. `tokens` (rows,) are what each
    row's sum was taken over, 1 for a metric; `groups` (rows,) numbers rows that belong together,
    such as the turns of a conversation: None where each row stands for itself. Where a pool that
    is used has no replication, the statement is "rows", whatever was asked for.

    Raises:
        NotComparableError: cells were scored on other rows or tokens, or one that counts is empty.
    """
    raise NotImplementedError


def contrast(
    cells: Sequence[CellScores],
    weights: Sequence[float],
    tokens: Floats,
    groups: Ints | None = None,
    *,
    is_grid: bool,
    is_same_start: bool = False,
    level: float = 0.95,
    statement: Statement = "seeds and rows",
) -> Interval:
    """The interval by the design that the cells call for, which `design` and `note` name.

    See `choose_design` for `is_grid` and `is_same_start`. In a grid with 2 to 4 shared seeds the
    wider of two intervals, pooled and per seed, where seeds seem to act on several cells in common.
    Two single runs with a metric of 0 and 1 and no groups: p is McNemar's, exact.
    """
    raise NotImplementedError


def choose_design(
    cells: Sequence[CellScores],
    weights: Sequence[float],
    *,
    is_grid: bool,
    is_same_start: bool,
) -> Design:
    """The way that the seeds of a contrast are treated; scores play no part in it.

    `is_grid`: the two cells are part of a grid with others. `is_same_start`: runs of one seed began
    with the same initial weights and saw the rows in the same order in both cells, by their hashes.
    """
    raise NotImplementedError


def paired_cell(reference: Floats, compared: Floats, *, pool: str = "paired") -> CellScores:
    """One cell of the differences, compared minus reference, seed by seed: its weight is 1.

    Both are (seeds, rows), with the same seeds in the same order.
    """
    raise NotImplementedError


def per_seed_cell(cells: Sequence[CellScores], weights: Sequence[float]) -> CellScores:
    """One cell of the contrast of each seed that all cells of a weight share: its weight is 1."""
    raise NotImplementedError


@dataclass(frozen=True)
class InteractionTest:
    """An F test whether an axis acts alike at the levels of another one."""

    p: float
    statistic: float
    df: tuple[float, float]


def test_interaction(
    cells: Sequence[CellScores],
    simple_weights: Sequence[Sequence[float]],
    tokens: Floats,
    groups: Ints | None = None,
) -> InteractionTest | None:
    """The test that the simple effects differ, one row of weights for each level of the other axis.

    None where a pool that is used has no replication, or nothing varies.
    """
    raise NotImplementedError


def simple_level(num_levels: int, level: float = 0.95) -> float:
    """The level of each of so many simple effects, such that all hold together at `level`.

    >>> simple_level(2), simple_level(1)
    (0.975, 0.95)
    """
    return 1 - (1 - level) / num_levels


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: below 0.05 at most 5% of families have any false positive."""
    raise NotImplementedError


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: of those below 0.05, at most 5% are false on average."""
    raise NotImplementedError


def is_equivalent(interval_of_90: Interval, margin: float) -> bool:
    """True where two one-sided tests show a difference smaller than the margin (TOST).

    False for single runs: they say nothing about recipes.
    """
    raise NotImplementedError


def noise_floor(
    cells: Sequence[CellScores],
    tokens: Floats,
    groups: Ints | None = None,
    *,
    level: float = 0.95,
) -> float | None:
    """The difference that two single runs of one recipe stay below, by the runs of one pool.

    None where no cell has two runs.
    """
    raise NotImplementedError


def compare_single_runs(
    reference: Floats,
    compared: Floats,
    cells: Sequence[CellScores],
    tokens: Floats,
    groups: Ints | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """The interval of the difference of two runs (rows,), compared minus reference.

    The spread of seeds is that of `cells`: the replicated pool to which both runs belong.
    """
    raise NotImplementedError


def mcnemar(reference: Floats, compared: Floats) -> float:
    """The exact p of two models' scores of 0 and 1 on the same rows (rows,)."""
    raise NotImplementedError


# The comparisons of before, until nothing uses them any more


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
