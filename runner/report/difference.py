"""The differences between two runs, and between their two cells, by every metric that both have.

For two single runs the interval is over rows only: it is about these two models and says nothing
about their recipes. Cells with several seeds have an interval over seeds and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from runner.report.cells import build_cells, find_seed_axis, list_scores
from runner.report.comparability import find_pair_refusal
from runner.report.contrasts import Aligned, Contrasts, build_metric
from runner.report.effects import Cell, Metric
from runner.report.rows import ReportRow
from runner.report.statistics import Interval, Statement


@dataclass(frozen=True, eq=False)
class Difference:
    """B minus A by one metric; if there is no interval, `refused` has the reason."""

    metric: Metric
    score_a: float | None  # mean over the seeds
    score_b: float | None
    interval: Interval | None
    refused: str = ""


def compare_runs(a: ReportRow, b: ReportRow) -> list[Difference]:
    """The differences of two runs, over rows only."""
    cells = [*build_cells([a], None), *build_cells([b], None)]
    return _compare(cells[0], cells[1], cells, None, "rows")


def compare_cells_of(
    a: ReportRow, b: ReportRow, rows: Sequence[ReportRow], *, rows_fixed: bool = False
) -> list[Difference]:
    """The differences of the cells of two runs, over seeds (and rows); empty if neither
    cell has another seed. `rows` are all runs of their grids: other cells with the same base model
    contribute to the seed variance.
    """
    found = []
    cells: list[Cell] = []
    seed_axis = find_seed_axis(rows)
    for grid in dict.fromkeys(row.grid for row in rows):
        cells += build_cells([row for row in rows if row.grid == grid], seed_axis)
    for run in (a, b):
        name = run.recipe.run.full_name
        found += [c for c in cells if any(one.recipe.run.full_name == name for one in c.runs)][:1]
    if len(found) < 2 or found[0] is found[1]:
        return []
    if not any(len(scores) > 1 for cell in found for scores in cell.scores.values()):
        return []
    same = [cell for cell in cells if cell.task == found[0].task or cell is found[1]]
    is_one_grid = a.grid == b.grid
    statement: Statement = "seeds" if rows_fixed else "seeds and rows"
    return _compare(found[0], found[1], same if is_one_grid else found, seed_axis, statement)


def _compare(
    a: Cell, b: Cell, cells: Sequence[Cell], seed_axis: str | None, statement: Statement
) -> list[Difference]:
    rows = [*a.runs, *b.runs]
    modes = {name: mode for row in rows for name, mode in row.recipe.metric_modes.items()}
    names_a = [name for row in a.runs for name in list_scores(row, "tuned")]
    names_b = {name for row in b.runs for name in list_scores(row, "tuned")}
    differences = []
    for name in dict.fromkeys(names_a):
        if name in names_b:
            metric = build_metric(name, modes)
            contrasts = Contrasts(cells, metric, seed_axis, statement)
            differences.append(_find_difference(a, b, metric, contrasts))
    return differences


def _find_difference(a: Cell, b: Cell, metric: Metric, contrasts: Contrasts) -> Difference:
    scores = [_find_mean(cell, metric) for cell in (a, b)]
    aligned, refused = [], ""
    runs_a, runs_b = contrasts.list_runs(a), contrasts.list_runs(b)
    if runs_a and runs_b:
        refused = find_pair_refusal(metric, runs_a, runs_b)
    for cell in (a, b):
        found = contrasts.get(cell)
        if isinstance(found, Aligned):
            aligned.append(found)
        else:
            refused = refused or found
    if not refused:
        refused = contrasts.find_difference(aligned)
    interval = None if refused else contrasts.find_interval(aligned, [-1.0, 1.0], 0.95)
    return Difference(metric, scores[0], scores[1], interval, refused)


def _find_mean(cell: Cell, metric: Metric) -> float | None:
    by_seed = cell.scores.get(metric.name, {})
    return fmean(by_seed.values()) if by_seed else None
