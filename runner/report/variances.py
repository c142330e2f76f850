"""The variances that an interval is made of: of the seeds, of the rows, and of what is left.

`measure` reduces the cells of a contrast to a few numbers; `Errors` turns them into half the width
of an interval, and back into a p.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import fdtr, fdtrc, stdtrit

from runner.errors import RunnerError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Of a score: standard errors below it are rounding
ROUNDING: Final = 1e-12
# Below this p, the spread of the seeds of a contrast is told to be another than that of its pool
OTHER_SPREAD: Final = 0.01


class NotComparableError(RunnerError):
    """Scores of which no difference may be taken."""


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

    @cached_property
    def deviations(self) -> Floats:
        """(seeds,): the sum over all rows of each run, from the mean of the cell.

        Computed once, for the other cells of a pool are looked at in every contrast.
        """
        totals = self.sums.sum(axis=1)
        # From the first run, such that equal runs differ by exactly 0
        deviations = totals - totals[0]
        return np.asarray(deviations - deviations.mean())

    @cached_property
    def squares(self) -> float:
        """The sum of the squared deviations."""
        return float(self.deviations @ self.deviations)


@dataclass(frozen=True)
class Parts:
    """The variances of one contrast. `pools`: of each pool that is used, the variance and nu."""

    estimate: float
    v_seed: float
    v_row: float
    v_res: float
    df_seed: float | None  # None where a pool that is used has no replication
    df_row: float
    num_groups: int
    pools: Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class Errors:
    """The variances that an interval is made of; `v_common` is R, rows without the residual."""

    v_seed: float
    v_row: float
    v_common: float
    df_seed: float
    df_row: float

    def half_width(self, alpha: float) -> float:
        """Half the width of the interval of level 1 - alpha; larger for smaller alpha."""
        t_row = -float(stdtrit(self.df_row, alpha / 2))
        half = t_row * math.sqrt(self.v_row)
        both = self.v_seed + self.v_common
        if both > 0:
            t_seed = -float(stdtrit(self.df_seed, alpha / 2))
            weighted = (t_seed * self.v_seed + t_row * self.v_common) / math.sqrt(both)
            half = max(weighted, half)
        return half

    def find_p(self, estimate: float) -> float:
        """The alpha whose interval just reaches 0."""
        if estimate == 0:
            return 1.0
        size = math.log(abs(estimate))

        def exceed(log_alpha: float) -> float:
            return math.log(self.half_width(math.exp(log_alpha))) - size

        # Below exp(-200) quantiles of t are not reliable
        smallest, largest = -200.0, -1e-6
        if exceed(smallest) <= 0:
            return 0.0
        if exceed(largest) >= 0:
            return 1.0
        return math.exp(brentq(exceed, smallest, largest, xtol=1e-9))


def measure(
    cells: Sequence[CellScores],
    weights: Sequence[float],
    tokens: Floats,
    groups: Ints | None,
) -> Parts:
    """The estimate of sum_c weights[c] * (mean score of cell c) and its variances.

    Raises:
        NotComparableError: cells were scored on other rows or tokens, or one that counts is empty.
    """
    check_comparable(cells, weights, tokens)
    by_group = _Groups(groups)
    group_tokens = by_group.sum(tokens)
    total, num_groups = float(tokens.sum()), len(group_tokens)
    contrast_sums = np.zeros(num_groups)
    scale = v_res = 0.0
    squares: dict[str, float] = {}
    nus: Counter[str] = Counter()
    loads: dict[str, float] = {}
    for cell, weight in zip(cells, weights, strict=True):
        count = len(cell.sums)
        if count == 0:
            continue
        squares[cell.pool] = squares.get(cell.pool, 0.0) + cell.squares / total**2
        nus[cell.pool] += count - 1
        if weight == 0:
            continue
        loads[cell.pool] = loads.get(cell.pool, 0.0) + weight**2 / count
        scale = max(scale, float(np.abs(cell.sums.sum(axis=1)).max()) / total)
        sums = by_group.sum(cell.sums)
        mean = sums[0] + (sums - sums[0]).mean(axis=0)
        contrast_sums += weight * mean
        if count > 1 and num_groups > 1:
            left = sums - mean - np.outer(cell.deviations / total, group_tokens)
            spread = num_groups / (num_groups - 1) * float(np.vdot(left, left))
            v_res += weight**2 * spread / (count * (count - 1) * total**2)
    pools = {
        pool: (squares[pool] / nus[pool] * load if nus[pool] else 0.0, nus[pool])
        for pool, load in loads.items()
    }
    smallest = (ROUNDING * scale) ** 2
    v_seed = sum(variance for variance, _ in pools.values())
    v_row = _leave_one_out_variance(contrast_sums, group_tokens)
    return Parts(
        estimate=float(contrast_sums.sum()) / total,
        v_seed=v_seed if v_seed > smallest else 0.0,
        v_row=v_row if v_row > smallest else 0.0,
        v_res=v_res if v_res > smallest else 0.0,
        df_seed=satterthwaite(list(pools.values())) if all(nus[p] for p in pools) else None,
        df_row=max(1.0, total**2 / float(group_tokens @ group_tokens) - 1),
        num_groups=num_groups,
        pools=pools,
    )


def describe_other_spread(used: Sequence[CellScores], others: Sequence[CellScores]) -> str:
    """A warning where the cells of a contrast spread otherwise over their seeds than the others of
    their pools: an F test, two-sided, at 1%. Empty where they do not, or where there are no others.
    """
    nus = [sum(len(cell.sums) - 1 for cell in cells if len(cell.sums)) for cells in (used, others)]
    squares = [sum(cell.squares for cell in cells if len(cell.sums)) for cells in (used, others)]
    if min(nus) == 0 or min(squares) == 0:
        return ""
    ratio = squares[0] / nus[0] / (squares[1] / nus[1])
    p = 2 * min(float(fdtr(*nus, ratio)), float(fdtrc(*nus, ratio)))
    if p >= OTHER_SPREAD:
        return ""
    more, wrong = ("more", "narrow") if ratio > 1 else ("less", "wide")
    times = math.sqrt(max(ratio, 1 / ratio))
    return (
        f"seeds vary {times:.2g} times {more} in these cells than in those that they are pooled"
        f" with (p = {p:.2g}): the interval may be too {wrong}"
    )


def check_comparable(cells: Sequence[CellScores], weights: Sequence[float], tokens: Floats) -> None:
    """Refuse scores of other rows or other tokens than those of the comparison.

    Raises:
        NotComparableError: naming the cell and what differs.
    """
    for cell, weight in zip(cells, weights, strict=True):
        name = cell.name or "a cell"
        if cell.sums.ndim != 2 or cell.sums.shape[1] != len(tokens):
            raise NotComparableError(
                f"{name} has scores of shape {cell.sums.shape}, expected (seeds, {len(tokens)}):"
                " its runs were scored on other rows"
            )
        own = cell.tokens
        if own is not None and own is not tokens and not np.array_equal(own, tokens):
            raise NotComparableError(
                f"{name} was scored on {own.sum():,.0f} tokens, not on the same"
                f" {tokens.sum():,.0f} as the others: no difference per token is taken"
            )
        if weight != 0 and len(cell.sums) == 0:
            raise NotComparableError(f"{name} has no scored run")


class _Groups:
    """Sums over the rows of each group."""

    def __init__(self, groups: Ints | None) -> None:
        self._order: Ints | None = None
        if groups is not None:
            self._order = np.argsort(groups, kind="stable")
            ordered = groups[self._order]
            self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])

    def sum(self, values: Floats) -> Floats:
        """(..., rows) to (..., groups)."""
        if self._order is None:
            return values
        return np.add.reduceat(values[..., self._order], self._starts, axis=-1)


def _leave_one_out_variance(sums: Floats, tokens: Floats) -> float:
    """The variance of a ratio of sums, each group left out in turn."""
    count = len(sums)
    if count < 2:
        return 0.0
    left = (sums.sum() - sums) / (tokens.sum() - tokens)
    left -= left.mean()
    return (count - 1) / count * float(left @ left)


def satterthwaite(pools: Sequence[tuple[float, int]]) -> float:
    """The degrees of freedom of a sum of variances, each with its own; at least 1.

    >>> satterthwaite([(1.0, 2), (1.0, 2)]), satterthwaite([(1.0, 2), (0.0, 2)])
    (4.0, 2.0)
    """
    total = sum(variance for variance, _ in pools)
    parts = sum(variance**2 / nu for variance, nu in pools)
    # Nothing varies: as many as there are
    return max(1.0, total**2 / parts if parts > 0 else float(sum(nu for _, nu in pools)))
