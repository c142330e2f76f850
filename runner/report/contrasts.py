"""Aligns the scores of cells as arrays, and computes the intervals of their contrasts.

Runs of a cell are aligned by row id. Cells scored on other rows or over other tokens are refused;
nothing is imputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runner.report.cells import list_counted, name_runs
from runner.report.comparability import Runs
from runner.report.effects import Cell, Metric
from runner.report.row_scores import BITS_PER_BYTE, LIKELIHOODS, NLL_PER_COMPLETION_TOKEN, RowScores
from runner.report.statistics import (
    InteractionTest,
    Interval,
    Statement,
    contrast,
    interaction_test,
    noise_floor,
)
from runner.report.variances import CellScores, Floats, Ints, describe_other_spread


@dataclass(frozen=True, eq=False)
class Aligned:
    """One cell by one metric, without the rows that the metric does not score."""

    cell: Cell
    runs: Runs
    scores: CellScores
    row_ids: tuple[str, ...]
    units: Floats  # (rows,): scored tokens or bytes, or ones
    groups: Ints | None

    @property
    def pool(self) -> str:
        """The base model; its cells share one seed variance."""
        return self.scores.pool


class Contrasts:
    """The cells of one grid and task by one metric, and contrasts of them."""

    def __init__(
        self, cells: Sequence[Cell], metric: Metric, seed_axis: str | None, statement: Statement
    ) -> None:
        self.metric = metric
        self._seed_axis, self._statement = seed_axis, statement
        # Decided by design, not by results: cells without a score count too
        self._is_grid = len(cells) > 2
        self._rows = _Rows()
        self._found = {id(cell): self._align(cell) for cell in cells}
        self._cells = [one for one in self._found.values() if isinstance(one, Aligned)]
        self._floors: dict[tuple[int, int, str], float | None] = {}

    def get(self, cell: Cell) -> Aligned | str:
        """A cell, or the reason why it has no per-row scores."""
        return self._found[id(cell)]

    def list_runs(self, cell: Cell) -> Runs:
        """The runs of a cell that count."""
        found = self._found[id(cell)]
        if isinstance(found, Aligned):
            return found.runs
        return tuple(list_counted(cell, self.metric.name, self._seed_axis))

    def find_difference(self, cells: Sequence[Aligned]) -> str:
        """Describe the difference in rows, tokens or groups that rules out a contrast, if any."""
        first = cells[0]
        for other in cells[1:]:
            names = f"{name_runs(first.cell)} and {name_runs(other.cell)}"
            if first.row_ids != other.row_ids:
                return f"{names} were scored on different test rows"
            if not np.array_equal(first.units, other.units):
                return self._describe_other_units(names, first.units, other.units)
            if first.groups is not other.groups:
                return _describe_other_groups(names, first.groups, other.groups, len(first.row_ids))
        return ""

    def _describe_other_units(self, names: str, first: Floats, second: Floats) -> str:
        name = self.metric.name
        if name not in LIKELIHOODS:
            return f"{names} were judged by {name} on different rows"
        what = "bytes" if name == BITS_PER_BYTE else "scored tokens"
        hint = "" if name == BITS_PER_BYTE else "; bits per byte may be"
        counts = f"{first.sum():,.0f} and {second.sum():,.0f} {what}"
        if first.sum() == second.sum():
            counts += ", but not the same number in each row,"
        return (
            f"{names} have {counts} under the same row ids: {self.metric.unit} are not comparable"
            f"{hint}"
        )

    def find_interval(
        self, cells: Sequence[Aligned], weights: Sequence[float], level: float
    ) -> Interval:
        """The interval of a contrast of comparable cells."""
        first = cells[0]
        with_pool = self._add_pool(cells)
        all_weights = [*weights, *[0.0] * (len(with_pool) - len(cells))]
        found = contrast(
            with_pool,
            all_weights,
            first.units,
            first.groups,
            is_grid=self._is_grid,
            is_same_start=not self._is_grid and _has_same_start(cells),
            level=level,
            statement=self._statement,
        )
        if found.kind == "rows" or found.df_seed is None:
            return found
        other = describe_other_spread(with_pool[: len(cells)], with_pool[len(cells) :])
        return replace(found, note="; ".join(filter(None, (found.note, other))))

    def test_interaction(
        self, cells: Sequence[Aligned], simple_weights: Sequence[Sequence[float]]
    ) -> InteractionTest | None:
        """Test if simple effects differ; None if that cannot be tested."""
        first = cells[0]
        with_pool = self._add_pool(cells)
        zeros = [0.0] * (len(with_pool) - len(cells))
        return interaction_test(
            with_pool, [[*weights, *zeros] for weights in simple_weights], first.units, first.groups
        )

    def find_noise_floor(self, cells: Sequence[Aligned]) -> float | None:
        """The largest noise floor of the pools of some cells; None if there is none."""
        floors = [floor for cell in cells if (floor := self._find_floor_of_pool(cell)) is not None]
        return max(floors, default=None)

    def find_overall_noise_floor(self) -> float | None:
        """The largest noise floor of all pools."""
        return self.find_noise_floor(self._cells)

    def _find_floor_of_pool(self, cell: Aligned) -> float | None:
        key = (id(cell.units), id(cell.groups), cell.pool)
        if key not in self._floors:
            pool = [one.scores for one in self._cells if self._shares_pool(one, cell)]
            self._floors[key] = noise_floor(pool, cell.units, cell.groups)
        return self._floors[key]

    def _add_pool(self, cells: Sequence[Aligned]) -> list[CellScores]:
        """The cells, followed by all others that share their pools and tokens."""
        used = {id(cell) for cell in cells}
        pools = {cell.pool for cell in cells}
        others = [
            one.scores
            for one in self._cells
            if one.pool in pools and id(one) not in used and self._is_comparable(one, cells[0])
        ]
        return [cell.scores for cell in cells] + others

    def _shares_pool(self, one: Aligned, other: Aligned) -> bool:
        is_alike = one.groups is other.groups and self._is_comparable(one, other)
        return one.pool == other.pool and is_alike

    def _is_comparable(self, one: Aligned, other: Aligned) -> bool:
        return one.row_ids is other.row_ids and one.units is other.units

    def _align(self, cell: Cell) -> Aligned | str:
        name = self.metric.name
        runs = list_counted(cell, name, self._seed_axis)
        if not runs:
            return f"{name_runs(cell)} has no {name}"
        scores = []
        for run in runs:
            found = run.load_scores("tuned")
            if found is None:
                return run.why_no_scores("tuned")
            if name not in found.sums:
                return f"{name} of {run.name} is not a mean over rows, so it has no interval"
            scores.append(found)
        return self._rows.align(cell, tuple(runs), name, scores)


class _Rows:
    """Row ids, units and groups of runs, each stored once so that they compare by `is`."""

    def __init__(self) -> None:
        self._orders: dict[tuple[str, ...], tuple[tuple[str, ...], Ints]] = {}
        self._ids: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._units: dict[bytes, Floats] = {}
        self._groups: dict[tuple[str, ...], Ints | None] = {}
        self._partitions: dict[bytes, Ints] = {}
        self._sorted_groups: dict[tuple[tuple[str, ...], tuple[str, ...]], Ints | None] = {}

    def align(
        self, cell: Cell, runs: Runs, name: str, scores: Sequence[RowScores]
    ) -> Aligned | str:
        sums = []
        first: tuple[tuple[str, ...], Floats, Ints | None] | None = None
        for run, score in zip(runs, scores, strict=True):
            row_ids, order = self._sort(score.row_ids)
            units = score.units[name][order]
            groups = self._sort_groups(score, order)
            if first is None:
                first = row_ids, units, groups
            elif row_ids is not first[0]:
                return f"{runs[0].name} and {run.name} were scored on different test rows"
            elif not np.array_equal(units, first[1]):
                what = "bytes" if name == BITS_PER_BYTE else "tokens"
                what = what if name in LIKELIHOODS else "judged rows"
                return (
                    f"{runs[0].name} and {run.name}, which differ only in the seed, have"
                    f" {first[1].sum():,.0f} and {units.sum():,.0f} {what} under the same row ids"
                )
            elif groups is not first[2]:
                names = f"{runs[0].name} and {run.name}"
                return _describe_other_groups(names, first[2], groups, len(row_ids))
            sums.append(score.sums[name][order])
        assert first is not None
        row_ids, units, groups = first
        counted = units > 0
        if not counted.all():
            row_ids = self._hold(tuple(np.array(row_ids, dtype=object)[counted]))
            groups = None if groups is None else self._number(tuple(map(str, groups[counted])))
        if not row_ids:
            return f"{runs[0].name} has no row that {name} scores"
        seeds = tuple(run.seed for run in runs)
        return Aligned(
            cell,
            runs,
            CellScores(
                np.array(sums)[:, counted],
                pool=runs[0].model_name,
                seeds=seeds if len(set(seeds)) == len(seeds) else (),
                name=name_runs(cell),
            ),
            row_ids,
            self._units.setdefault(units[counted].tobytes(), units[counted]),
            groups,
        )

    def _sort(self, row_ids: tuple[str, ...]) -> tuple[tuple[str, ...], Ints]:
        if row_ids not in self._orders:
            order = sorted(range(len(row_ids)), key=row_ids.__getitem__)
            self._orders[row_ids] = (
                self._hold(tuple(row_ids[at] for at in order)),
                np.array(order, dtype=np.int64),
            )
        return self._orders[row_ids]

    def _sort_groups(self, score: RowScores, order: Ints) -> Ints | None:
        key = score.row_ids, score.groups
        if key not in self._sorted_groups:
            groups = tuple(score.groups[at] for at in order)
            self._sorted_groups[key] = self._number(groups)
        return self._sorted_groups[key]

    def _hold(self, row_ids: tuple[str, ...]) -> tuple[str, ...]:
        return self._ids.setdefault(row_ids, row_ids)

    def _number(self, groups: tuple[str, ...]) -> Ints | None:
        """Numbers the groups. Equal partitions share one array, whatever the groups are called;
        None if each row is its own group.
        """
        if groups not in self._groups:
            numbers: Mapping[str, int] = {name: at for at, name in enumerate(dict.fromkeys(groups))}
            found = np.array([numbers[name] for name in groups], dtype=np.int64)
            are_rows = len(numbers) == len(groups)
            self._groups[groups] = (
                None if are_rows else self._partitions.setdefault(found.tobytes(), found)
            )
        return self._groups[groups]


def _describe_other_groups(
    names: str, first: Ints | None, second: Ints | None, num_rows: int
) -> str:
    counts = [num_rows if groups is None else len(np.unique(groups)) for groups in (first, second)]
    return (
        f"{names} group the same test rows differently ({counts[0]} and {counts[1]} groups), so the"
        " variation of the difference between groups is unknown"
    )


def _has_same_start(cells: Sequence[Aligned]) -> bool:
    """True if runs of one seed started from the same weights and used the same row order, by their
    hashes; False if a run did not record them.
    """
    starts: dict[int, set[tuple[str | None, str | None]]] = {}
    for cell in cells:
        for run in cell.runs:
            start = (run.initial_weights_hash, run.row_order_hash)
            starts.setdefault(run.seed, set()).add(start)
    return all(len(found) == 1 and None not in next(iter(found)) for found in starts.values())


def build_metric(name: str, modes: Mapping[str, str]) -> Metric:
    """A metric by its name; `modes` are those of metrics of answers."""
    likelihoods = {
        NLL_PER_COMPLETION_TOKEN: ("NLL per completion token", "nats per completion token"),
        "nll_per_token": ("NLL per token", "nats per token"),
        BITS_PER_BYTE: ("bits per byte", "bits per byte"),
    }
    if name in likelihoods:
        title, unit = likelihoods[name]
        return Metric(name, title, unit, "min")
    return Metric(
        name, name, name, "min" if modes.get(name) == "min" else "max", is_of_answers=True
    )
