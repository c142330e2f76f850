"""The variances behind an interval: of seeds, of rows, and the residual.

`measure` reduces the cells of a contrast to a few numbers; `Errors` turns them into the half-width
of an interval, or into a p.
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
# Relative to a score: smaller standard errors are rounding
ROUNDING: Final = 1e-12
# Below this p, a note says that the seed variance of a contrast differs from that of its pool
OTHER_SPREAD: Final = 0.01


class NotComparableError(RunnerError):
    """Raised for scores that must not be subtracted."""


@dataclass(frozen=True, eq=False)
class CellScores:
    """The per-row scores of the runs of one cell.

    `sums` (seeds, rows) are nats over the scored tokens of a row, or its score by a metric. Cells
    of one `pool` (one base model and task) share one seed variance.
    """

    sums: Floats
    pool: str
    # `training.seed` of each run, to find shared seeds; () if none is shared
    seeds: tuple[Hashable, ...] = ()
    # (rows,): if given, must equal the tokens of the comparison
    tokens: Floats | None = None
    name: str = ""  # for errors

    @cached_property
    def deviations(self) -> Floats:
        """(seeds,): the sum over all rows of each run, minus the mean of the cell.

        Computed once, because every contrast uses the other cells of its pool.
        """
        totals = self.sums.sum(axis=1)
        # Relative to the first run, so that equal runs differ by exactly 0
        deviations = totals - totals[0]
        return np.asarray(deviations - deviations.mean())

    @cached_property
    def squares(self) -> float:
        """The sum of the squared deviations."""
        return float(self.deviations @ self.deviations)


@dataclass(frozen=True)
class Parts:
    """The variances of one contrast. `pools`: variance and nu of each used pool."""

    estimate: float
    v_seed: float
    v_row: float
    v_res: float
    df_seed: float | None  # None if a used pool has no replication
    df_row: float
    num_groups: int
    pools: Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class Errors:
    """The variances behind an interval; `v_common` is R, the row variance without the residual."""

    v_seed: float
    v_row: float
    v_common: float
    df_seed: float
    df_row: float

    def half_width(self, alpha: float) -> float:
        """The half-width of the interval at level 1 - alpha; larger for smaller alpha."""
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

        # Quantiles of t are not reliable below exp(-200)
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
        NotComparableError: cells were scored on other rows or tokens, or a weighted one is empty.
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
    """A warning if the seed variance of a contrast's cells differs from the rest of their
    pools (two-sided F test at 1%); empty if it does not, or if there are no other cells.
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
        f"seeds vary {times:.2g} times {more} in these cells than in the cells they are pooled"
        f" with (p = {p:.2g}), so the interval may be too {wrong}"
    )


def check_comparable(cells: Sequence[CellScores], weights: Sequence[float], tokens: Floats) -> None:
    """Refuse scores on other rows or tokens than those of the comparison.

    Raises:
        NotComparableError: with the cell and the difference.
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
                f" {tokens.sum():,.0f} as the others, so scores per token cannot be subtracted"
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
        """Sum (..., rows) to (..., groups)."""
        if self._order is None:
            return values
        return np.add.reduceat(values[..., self._order], self._starts, axis=-1)


def _leave_one_out_variance(sums: Floats, tokens: Floats) -> float:
    """The jackknife variance of a ratio of sums, leaving out one group at a time."""
    count = len(sums)
    if count < 2:
        return 0.0
    left = (sums.sum() - sums) / (tokens.sum() - tokens)
    left -= left.mean()
    return (count - 1) / count * float(left @ left)


def satterthwaite(pools: Sequence[tuple[float, int]]) -> float:
    """The degrees of freedom of a sum of variances, from those of each; at least 1.

    >>> satterthwaite([(1.0, 2), (1.0, 2)]), satterthwaite([(1.0, 2), (0.0, 2)])
    (4.0, 2.0)
    """
    total = sum(variance for variance, _ in pools)
    parts = sum(variance**2 / nu for variance, nu in pools)
    # If nothing varies, all degrees of freedom count
    return max(1.0, total**2 / parts if parts > 0 else float(sum(nu for _, nu in pools)))
