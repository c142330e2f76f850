"""The seeds and test rows needed to detect a difference, from the variances of existing runs.

A pilot estimates its variances only roughly, so plans use the upper 80% limit of the seed variance.
Plans from the estimate itself need far more seeds than planned in one of three pilots with four
degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scipy.special import chdtri, stdtrit

from runner.report.statistics import MIN_SEEDS_PER_SEED
from runner.report.variances import CellScores, Floats, Ints, measure, satterthwaite

# The fewest seeds worth planning, and the most that are tried
MIN_SEEDS: Final = 3
MAX_SEEDS: Final = 100
PLANNING_LIMIT: Final = 0.80


@dataclass(frozen=True)
class PoolSpread:
    """The seed variance of one pool, for single runs."""

    name: str
    num_cells: int
    nu: int
    variance: float  # between runs of one cell
    rest: float  # the part that more rows reduce

    @property
    def sd(self) -> float:
        """The standard deviation of runs that differ only in the seed."""
        return math.sqrt(self.variance)

    def limit(self, level: float) -> float:
        """The upper confidence limit of the standard deviation at `level`."""
        return self.sd * limit_factor(self.nu, level)


@dataclass(frozen=True)
class Pilot:
    """The variances of one contrast in a pilot of `num_rows` test rows."""

    pools: tuple[tuple[float, PoolSpread], ...]  # sum of squared weights in the pool, and the pool
    row_variance: float  # without the residual
    num_rows: int
    df_row: float
    has_shared_seeds: bool = False  # cells of a grid that also share future seeds

    @property
    def seed_variance(self) -> float:
        """The variance of the contrast with one seed per cell."""
        return sum(load * pool.variance for load, pool in self.pools)

    @property
    def nu(self) -> float:
        """The degrees of freedom of `seed_variance`."""
        return satterthwaite([(load * pool.variance, pool.nu) for load, pool in self.pools])

    def split_variance(self, num_seeds: int) -> tuple[float, float, float]:
        """The parts of the contrast's variance due to runs (more seeds reduce it), to rows
        (more rows reduce it), and to noise (both reduce it).
        """
        noise = min(sum(load * pool.rest for load, pool in self.pools), self.seed_variance)
        parts = (
            (self.seed_variance - noise) / num_seeds,
            self.row_variance,
            noise / num_seeds,
        )
        total = sum(parts) or 1.0
        return parts[0] / total, parts[1] / total, parts[2] / total

    def detectable_difference(
        self, num_seeds: int, num_rows: int, power: float, factor: float = 1.0
    ) -> float:
        """The difference that is detected with this power, two-sided at 5%.

        `factor` scales the standard deviation over seeds.
        """
        fewer = self.num_rows / num_rows
        rest = sum(load * pool.rest for load, pool in self.pools)
        runs = max(self.seed_variance * factor**2 - rest, 0.0)
        v_seed = (runs + rest * fewer) / num_seeds
        v_row = self.row_variance * fewer
        variance = v_seed + v_row
        if variance == 0:
            return 0.0
        df_seed = self._df_seed(num_seeds)
        df_row = max(1.0, (self.df_row + 1) / fewer - 1)
        t_seed, t_row = (_sum_of_t(df, power) for df in (df_seed, df_row))
        return (t_seed * v_seed + t_row * v_row) / variance * math.sqrt(variance)

    def find_seeds(
        self, effect: float, num_rows: int, power: float, factor: float = 1.0
    ) -> int | None:
        """The fewest seeds, at least `MIN_SEEDS`; None if `MAX_SEEDS` are too few."""
        for num_seeds in range(MIN_SEEDS, MAX_SEEDS + 1):
            if self.detectable_difference(num_seeds, num_rows, power, factor) <= effect:
                return num_seeds
        return None

    def _df_seed(self, num_seeds: int) -> float:
        if self.has_shared_seeds and num_seeds >= MIN_SEEDS_PER_SEED:
            return num_seeds - 1
        return satterthwaite(
            [(load * pool.variance, pool.num_cells * (num_seeds - 1)) for load, pool in self.pools]
        )


def limit_factor(nu: float, level: float) -> float:
    """The ratio of the upper limit at `level` to an estimated standard deviation.

    >>> round(limit_factor(4, 0.80), 3), round(limit_factor(4, 0.975), 2)
    (1.558, 2.87)
    """
    return math.sqrt(nu / float(chdtri(nu, level)))


def measure_pool(
    name: str, cells: Sequence[CellScores], units: Floats, groups: Ints | None
) -> PoolSpread | None:
    """The seed variance of cells of one pool; None if no cell has two runs."""
    replicated = [cell for cell in cells if len(cell.sums) > 1]
    if not replicated:
        return None
    nu = variance = rest = 0.0
    for cell in replicated:
        num_seeds = len(cell.sums)
        parts = measure([cell], [1.0], units, groups)
        nu += num_seeds - 1
        variance += (num_seeds - 1) * num_seeds * parts.v_seed
        rest += (num_seeds - 1) * num_seeds * parts.v_res
    return PoolSpread(name, len(cells), int(nu), variance / nu, rest / nu)


def _sum_of_t(df: float, power: float) -> float:
    return float(stdtrit(df, 0.975) + stdtrit(df, power))
