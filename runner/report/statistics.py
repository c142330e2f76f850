"""Effects with their intervals: inference from differences between cells to recipes and rows.

A cell contains the runs that differ only in the seed. A contrast weights cells by numbers that sum
to 0; its interval treats seeds, rows or both as random. Everything here is a pure function of
arrays; `effects` and `comparability` decide which cells are compared, and if they may be.

Seeds and rows have separate errors, with few degrees of freedom for the seeds. The critical value
is a weighted average of theirs (Cochran and Cox): a single Satterthwaite number of degrees of
freedom trusts the rows too much if the runs happen to be close together. `benchmarks/intervals.py`
checks all of this on grids whose truth is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Final, Literal

import numpy as np
from scipy.special import fdtrc
from scipy.stats import binom

from runner.report.variances import (
    ROUNDING,
    CellScores,
    Errors,
    Floats,
    Ints,
    NotComparableError,
    Parts,
    check_comparable,
    measure,
    satterthwaite,
)
from runner.text import format_count

# Names of `variances` that callers need
__all__ = ["CellScores", "NotComparableError"]

# The random factors: both (this recipe, on rows like these), seeds (this recipe, on exactly these
# rows), or rows (these trained models, on rows like these)
Statement = Literal["seeds and rows", "seeds", "rows"]
Design = Literal["paired", "separate", "pooled", "per seed"]

# With at least this many shared seeds, cells of a grid are paired by seed
MIN_SEEDS_PER_SEED: Final = 5
# If an interaction has a smaller p, no mean over its levels is shown
INTERACTION_GATE: Final = 0.20
# Below this p, shared seeds seem to have a common effect on the cells of a contrast
SHARED_SEEDS_GATE: Final = 0.20
FEW_GROUPS: Final = 5


@dataclass(frozen=True)
class Interval:
    """An estimate of a contrast with its interval.

    `kind` is its scope: "seeds and rows" (both random), "seeds" (exactly these rows), "rows" (these
    trained models), or "identical" (no interval, because nothing varies between seeds or rows).
    """

    kind: Literal["seeds and rows", "seeds", "rows", "identical"]
    estimate: float
    half_width: float | None
    p: float | None
    level: float  # such as 0.95
    v_seed: float  # 0 if `df_seed` is None: unknown
    v_row: float
    v_res: float
    df_seed: float | None
    df_row: float
    num_groups: int
    num_seeds: tuple[int, ...]  # of each cell
    has_few_groups: bool = False  # at most 5 effective ones
    note: str = ""  # such as "2 seeds: only very large differences can be detected"
    design: str = ""  # sentence on the runs that were pooled or paired

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper end; None if there is no interval."""
        if self.half_width is None:
            return None
        return self.estimate - self.half_width, self.estimate + self.half_width

    @property
    def standard_error(self) -> float:
        """The square root of the variance of the estimate, given `kind`."""
        both = max(self.v_seed + self.v_row - self.v_res, self.v_seed, self.v_row)
        variances = {"seeds and rows": both, "seeds": self.v_seed, "rows": self.v_row}
        return math.sqrt(variances.get(self.kind, 0.0))


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

    Cells of weight 0 contribute only to the seed variance of their pool. `tokens` (rows,) are the
    units that each row's sum was taken over, 1 for a metric. `groups` (rows,) numbers rows that
    belong together, such as the turns of a conversation; None if each row is its own group. If a
    used pool has no replication, the statement is "rows" regardless of `statement`; if all rows
    are one group, it is "seeds".

    Raises:
        NotComparableError: cells were scored on other rows or tokens, or a weighted one is empty.
    """
    parts = measure(cells, weights, tokens, groups)
    num_seeds = tuple(
        len(cell.sums) for cell, weight in zip(cells, weights, strict=True) if weight != 0
    )
    kind, notes = _choose_statement(statement, parts)
    if kind != "rows" and max(num_seeds) == 2 and sum(nu for _, nu in parts.pools.values()) <= 2:
        notes.append("2 seeds: only very large differences can be detected")
    errors = Errors(
        v_seed=parts.v_seed if kind != "rows" else 0.0,
        v_row=parts.v_row if kind != "seeds" else 0.0,
        v_common=max(parts.v_row - parts.v_res, 0.0) if kind == "seeds and rows" else 0.0,
        df_seed=parts.df_seed or 1.0,
        df_row=parts.df_row,
    )
    varies = errors.v_seed + errors.v_row > 0
    if not varies and parts.estimate != 0:
        notes.append("the differences do not vary at all, so there is no interval")
    return Interval(
        kind=kind if varies else "identical",
        estimate=parts.estimate,
        half_width=errors.half_width(1 - level) if varies else None,
        p=errors.find_p(parts.estimate) if varies else None,
        level=level,
        v_seed=parts.v_seed,
        v_row=parts.v_row,
        v_res=parts.v_res,
        df_seed=parts.df_seed,
        df_row=parts.df_row,
        num_groups=parts.num_groups,
        num_seeds=num_seeds,
        has_few_groups=kind != "seeds" and parts.df_row + 1 <= FEW_GROUPS,
        note="; ".join(notes),
    )


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
    """The interval by the design that suits the cells; `design` and `note` describe it.

    See `choose_design` for `is_grid` and `is_same_start`. In a grid with 2 to 4 shared seeds, it is
    the wider of the pooled and the per-seed interval if seeds seem to have a common effect on
    several cells. For two single runs with scores of 0 and 1 and no groups, p is McNemar's exact p.
    """
    if statement == "rows":
        found = interval(cells, weights, tokens, groups, level=level, statement=statement)
        return _apply_mcnemar(found, cells, weights, tokens, groups)
    design = choose_design(cells, weights, is_grid=is_grid, is_same_start=is_same_start)
    if design in ("paired", "per seed"):
        check_comparable(cells, weights, tokens)
        return _interval_per_seed(cells, weights, tokens, groups, level, statement, design)
    if design == "separate":
        cells = [replace(cell, pool=f"cell {index}") for index, cell in enumerate(cells)]
    found = interval(cells, weights, tokens, groups, level=level, statement=statement)
    if found.kind == "rows":
        return _apply_mcnemar(found, cells, weights, tokens, groups)
    found = replace(found, design=_describe_pools(cells, weights, design))
    if design == "separate" or len(_list_shared_seeds(cells, weights)) < 2:
        return found
    per_seed = _interval_per_seed(cells, weights, tokens, groups, level, statement, "per seed")
    return _choose_wider(found, per_seed)


def choose_design(
    cells: Sequence[CellScores],
    weights: Sequence[float],
    *,
    is_grid: bool,
    is_same_start: bool,
) -> Design:
    """Choose the treatment of the seeds of a contrast, without using scores.

    `is_grid`: the cells of the contrast are part of a larger grid. `is_same_start`: in all cells of
    the contrast, runs of one seed started from the same initial weights and used the same row
    order, by their hashes. Two cells are paired only if every run has a partner.
    """
    num_shared = len(_list_shared_seeds(cells, weights))
    if is_grid:
        return "per seed" if num_shared >= MIN_SEEDS_PER_SEED else "pooled"
    is_each_shared = num_shared == max(
        len(cell.sums) for cell, weight in zip(cells, weights, strict=True) if weight != 0
    )
    return "paired" if is_same_start and is_each_shared and num_shared >= 2 else "separate"


def paired_cell(reference: Floats, compared: Floats, *, pool: str = "paired") -> CellScores:
    """One cell of the differences by seed, compared minus reference; its weight is 1.

    Both are (seeds, rows), with the same seeds in the same order.
    """
    if reference.shape != compared.shape:
        raise NotComparableError(
            f"{reference.shape} scores of seeds and rows cannot be paired with {compared.shape}"
        )
    return CellScores(compared - reference, pool)


def per_seed_cell(cells: Sequence[CellScores], weights: Sequence[float]) -> CellScores:
    """One cell with the contrast of each seed that all weighted cells share; weight 1."""
    shared = _list_shared_seeds(cells, weights)
    sums = sum(
        weight * cell.sums[[cell.seeds.index(seed) for seed in shared]]
        for cell, weight in zip(cells, weights, strict=True)
        if weight != 0
    )
    return CellScores(np.asarray(sums), "per seed", shared)


@dataclass(frozen=True)
class InteractionTest:
    """An F test for a different effect of an axis at the levels of another one."""

    p: float
    statistic: float
    df: tuple[float, float]


def interaction_test(
    cells: Sequence[CellScores],
    simple_weights: Sequence[Sequence[float]],
    tokens: Floats,
    groups: Ints | None = None,
) -> InteractionTest | None:
    """Test if the simple effects differ, given one row of weights per level of the other axis.

    None if a used pool has no replication, or if nothing varies.
    """
    simple = np.asarray(simple_weights, dtype=np.float64)
    contrasts = _orthonormal_contrasts(len(simple)) @ simple
    contrasts[np.abs(contrasts) < ROUNDING] = 0.0
    squares = variance = 0.0
    pools: Counter[str] = Counter()
    nus: dict[str, int] = {}
    for weights in contrasts:
        parts = measure(cells, weights.tolist(), tokens, groups)
        if parts.df_seed is None:
            return None
        squares += parts.estimate**2
        variance += max(parts.v_seed + parts.v_row - parts.v_res, parts.v_seed, parts.v_row)
        for pool, (v_pool, nu) in parts.pools.items():
            pools[pool] += v_pool  # type: ignore[assignment]
            nus[pool] = nu
    if variance == 0:
        return None
    df = (float(len(contrasts)), satterthwaite([(pools[pool], nus[pool]) for pool in pools]))
    statistic = squares / variance
    return InteractionTest(p=float(fdtrc(*df, statistic)), statistic=statistic, df=df)


def simple_level(num_levels: int, level: float = 0.95) -> float:
    """The level of each simple effect at which all of them hold jointly at `level`.

    >>> simple_level(2), simple_level(1)
    (0.975, 0.95)
    """
    return 1 - (1 - level) / num_levels


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values; below 0.05, at most 5% of families have a false positive.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(value) for value in np.minimum(adjusted, 1)]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values; of those below 0.05, at most 5% are false on average.

    >>> benjamini_hochberg([0.01, 0.04, 0.03])
    [0.03, 0.04, 0.04]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty_like(p)
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum.accumulate(scaled)
    return [float(value) for value in np.minimum(adjusted, 1)]


def is_equivalent(found: Interval, margin: float, *, level: float = 0.90) -> bool:
    """True if two one-sided tests (TOST) show a difference smaller than the margin: at 5%, from a
    90% interval; for several effects together, from intervals at level 1 - 0.10 / their number.

    False for single runs, which say nothing about recipes.
    """
    if not math.isclose(found.level, level):
        raise ValueError(f"got an interval of {found.level:.0%}, expected one of {level:.0%}")
    bounds = found.bounds
    if bounds is None or found.kind == "rows":
        return False
    return -margin < bounds[0] and bounds[1] < margin


def noise_floor(
    cells: Sequence[CellScores],
    tokens: Floats,
    groups: Ints | None = None,
    *,
    level: float = 0.95,
) -> float | None:
    """The difference that two single runs of one recipe stay below, from runs of one pool.

    The row variance is the mean over all pairs of runs in a cell. None if no cell has two runs, or
    if nothing varies.
    """
    differences = [first - second for cell in cells for first, second in combinations(cell.sums, 2)]
    if not differences:
        return None
    pairs = [CellScores(sums[np.newaxis], "") for sums in differences]
    v_row = fmean(measure([pair], [1.0], tokens, groups).v_row for pair in pairs)
    errors = _single_run_errors(cells, tokens, groups, v_row)
    return errors.half_width(1 - level) if errors.v_seed + v_row > 0 else None


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

    The seed variance is from `cells`, the replicated pool of both runs.
    """
    pair = CellScores((compared - reference)[np.newaxis], "")
    rows_only = interval([pair], [1.0], tokens, groups, level=level, statement="rows")
    if all(len(cell.sums) < 2 for cell in cells):
        return replace(rows_only, num_seeds=(1, 1))
    errors = _single_run_errors(cells, tokens, groups, rows_only.v_row)
    varies = errors.v_seed + errors.v_row > 0
    return replace(
        rows_only,
        kind="seeds and rows" if varies else "identical",
        half_width=errors.half_width(1 - level) if varies else None,
        p=errors.find_p(rows_only.estimate) if varies else None,
        v_seed=errors.v_seed,
        df_seed=errors.df_seed,
        num_seeds=(1, 1),
        design=(
            f"two single runs; seed variance from {format_count(len(cells), 'cell')} of the same"
            " pool"
        ),
        note="",
    )


def mcnemar(reference: Floats, compared: Floats) -> float:
    """The exact p of two models' scores of 0 and 1 on the same rows (rows,).

    >>> mcnemar(np.array([0.0, 0, 0, 0, 0, 1]), np.array([1.0, 1, 1, 1, 1, 1]))
    0.0625
    """
    gained = int(np.sum(compared > reference))
    lost = int(np.sum(compared < reference))
    return min(1.0, 2 * float(binom.cdf(min(gained, lost), gained + lost, 0.5)))


def _choose_statement(statement: Statement, parts: Parts) -> tuple[Statement, list[str]]:
    """The statement that these seeds and rows allow, with the reason if it is reduced."""
    if parts.df_seed is None:
        statement = "rows"
    if parts.num_groups > 1 or statement == "seeds":
        return statement, []
    if statement == "seeds and rows":
        return "seeds", ["only one group of rows: no conclusion about other rows"]
    return "rows", ["only one group of rows"]


def _interval_per_seed(
    cells: Sequence[CellScores],
    weights: Sequence[float],
    tokens: Floats,
    groups: Ints | None,
    level: float,
    statement: Statement,
    design: Design,
) -> Interval:
    cell = per_seed_cell(cells, weights)
    count = len(cell.sums)
    found = interval([cell], [1.0], tokens, groups, level=level, statement=statement)
    same = ", same initial weights and row order" if design == "paired" else ""
    used = [len(one.sums) for one, weight in zip(cells, weights, strict=True) if weight != 0]
    notes = [found.note] if found.note else []
    if (num_used := count * len(used)) < sum(used):
        notes.append(
            f"only {num_used} of {sum(used)} runs count here, because seeds missing from some cell"
            " are left out"
        )
    return replace(
        found,
        design=f"paired by seed ({count} shared{same})",
        num_seeds=(count,) * len(used),
        note="; ".join(notes),
    )


def _choose_wider(pooled: Interval, per_seed: Interval) -> Interval:
    """The wider interval if seeds seem to have a common effect, else the pooled one."""
    assert pooled.df_seed is not None and per_seed.df_seed is not None
    if per_seed.v_seed == 0:
        return pooled
    ratio = per_seed.v_seed / pooled.v_seed if pooled.v_seed > 0 else math.inf
    p = float(fdtrc(per_seed.df_seed, pooled.df_seed, ratio)) if ratio < math.inf else 0.0
    if p >= SHARED_SEEDS_GATE:
        return pooled
    wider = max(pooled, per_seed, key=lambda one: one.half_width or 0.0)
    other = per_seed if wider is pooled else pooled
    note = f"shared seeds may affect cells alike (p = {p:.2f}): this is the wider of two intervals"
    return replace(
        wider,
        # At each level the wider of the two
        p=max(one.p for one in (pooled, per_seed) if one.p is not None),
        note="; ".join(filter(None, (wider.note, note))),
        design=f"{wider.design}, wider than {other.design}",
    )


def _apply_mcnemar(
    found: Interval,
    cells: Sequence[CellScores],
    weights: Sequence[float],
    tokens: Floats,
    groups: Ints | None,
) -> Interval:
    """The interval, with McNemar's p for two single runs with 0/1 scores and no groups."""
    used = [(weight, cell.sums) for weight, cell in zip(weights, cells, strict=True) if weight != 0]
    is_pair = sorted(weight for weight, _ in used) == [-1, 1] and found.num_seeds == (1, 1)
    has_groups = groups is not None and len(np.unique(groups)) < len(groups)
    if found.kind != "rows" or not is_pair or has_groups or not (tokens == 1).all():
        return found
    reference, compared = (sums[0] for _, sums in sorted(used, key=lambda one: one[0]))
    if not np.isin([reference, compared], (0.0, 1.0)).all():
        return found
    return replace(found, p=mcnemar(reference, compared), note="p from McNemar's exact test")


def _describe_pools(cells: Sequence[CellScores], weights: Sequence[float], design: Design) -> str:
    if design == "separate":
        return "each cell with its own seed variance (Welch)"
    used = {cell.pool for cell, weight in zip(cells, weights, strict=True) if weight != 0}
    replicated = Counter(cell.pool for cell in cells if cell.pool in used and len(cell.sums) > 1)
    counts = ", ".join(
        f"{format_count(count, 'cell')} of {pool}" for pool, count in sorted(replicated.items())
    )
    return f"seed variance pooled over {counts}"


def _list_shared_seeds(
    cells: Sequence[CellScores], weights: Sequence[float]
) -> tuple[Hashable, ...]:
    """The seeds that all weighted cells share, in the order of the first cell."""
    lists = [cell.seeds for cell, weight in zip(cells, weights, strict=True) if weight != 0]
    if any(len(set(seeds)) < len(seeds) for seeds in lists):
        raise ValueError(f"a cell has two runs of one seed: {lists}")
    return tuple(seed for seed in lists[0] if all(seed in seeds for seeds in lists[1:]))


def _orthonormal_contrasts(count: int) -> Floats:
    """Helmert's contrasts (count - 1, count): orthogonal rows of length 1 that sum to 0."""
    rows = np.zeros((count - 1, count))
    for index in range(1, count):
        rows[index - 1, :index] = 1.0
        rows[index - 1, index] = -float(index)
        rows[index - 1] /= math.sqrt(index * (index + 1))
    return rows


def _single_run_errors(
    cells: Sequence[CellScores], tokens: Floats, groups: Ints | None, v_row: float
) -> Errors:
    """The errors of the difference of two single runs of the pool `cells`."""
    pools = {cell.pool for cell in cells}
    if len(pools) != 1:
        raise ValueError(f"single runs are compared within one pool, got {sorted(pools)}")
    # The weight is arbitrary: V is s2 / S
    [index] = [i for i, cell in enumerate(cells) if len(cell.sums) > 1][:1]
    weights = [float(i == index) for i in range(len(cells))]
    parts = measure(cells, weights, tokens, groups)
    assert parts.df_seed is not None
    v_seed = 2 * parts.v_seed * len(cells[index].sums)
    return Errors(v_seed, v_row, v_row, df_seed=parts.df_seed, df_row=parts.df_row)
