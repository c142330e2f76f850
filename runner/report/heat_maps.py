"""The cells of a grid as tables, shaded by score; missing cells are hatched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Final

from runner.report.effects import Cell, Metric, Report
from runner.report.labels import (
    describe_source,
    find_cell,
    is_per_token,
    list_cell_axes,
    list_main_metrics,
    list_model_axes,
    list_places,
)
from runner.report.rows import axis_key, axis_text
from runner.report.wording import decimal
from runner.text import format_count

NUM_SHADES: Final = 8  # classes q0 (worst) to q7 (best)
_MAX_COLUMNS: Final = 8


@dataclass(frozen=True)
class HeatCell:
    """One cell of a heat map: mean and spread over seeds, or the reasons for a missing score."""

    text: str = ""
    spread: str = ""
    seeds: str = ""
    style: str = "none"
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """The cells of one grid, task and metric, with axes down and across."""

    title: str
    note: str
    down: Sequence[str]
    across: Sequence[str]
    # One line of heads for each axis across: text and number of columns spanned
    heads: Sequence[Sequence[tuple[str, int]]]
    rows: Sequence[tuple[Sequence[str], Sequence[HeatCell]]]


def build_heat_maps(report: Report) -> tuple[list[HeatMap], list[HeatMap]]:
    """A heat map for each grid, task and scored metric: main metrics, then others."""
    main: list[HeatMap] = []
    others: list[HeatMap] = []
    for grid, task in list_places(report):
        cells = [cell for cell in report.cells if (cell.grid, cell.task) == (grid, task)]
        chosen = list_main_metrics(report, grid, task) or list(report.metrics[:1])
        for metric in report.metrics:
            maps = main if metric in chosen else others
            if metric in chosen or any(cell.scores.get(metric.name) for cell in cells):
                source = describe_source(report, grid, task)
                maps.append(_build_heat_map(source, metric, cells))
    return main, others


def _build_heat_map(source: str, metric: Metric, cells: Sequence[Cell]) -> HeatMap:
    values = list_cell_axes(cells)
    across: list[str] = []
    size = 1
    for axis in reversed(values):
        fits = size * len(values[axis]) <= _MAX_COLUMNS
        if fits and len(across) + 1 < max(2, len(values)):  # one axis goes down, if there are two
            across.insert(0, axis)
            size *= len(values[axis])
    down = [axis for axis in values if axis not in across]
    models = list_model_axes(cells) if is_per_token(metric) else []
    ranges = _find_ranges(metric, cells, models)
    heads, span = [], size
    repeated = 1
    for axis in across:
        span //= len(values[axis])
        heads.append([(axis_text(value), span) for value in values[axis]] * repeated)
        repeated *= len(values[axis])
    rows = []
    for chosen in product(*(values[axis] for axis in down)):
        line = []
        for others in product(*(values[axis] for axis in across)):
            point = dict(zip([*down, *across], [*chosen, *others], strict=True))
            line.append(_build_heat_cell(metric, find_cell(cells, point), models, ranges))
        rows.append(([axis_text(value) for value in chosen], line))
    better = "lower" if metric.mode == "min" else "higher"
    note = f"In {metric.unit}; {better} is better (darker). Mean ± standard deviation over"
    note += " seeds."
    if models:
        note += f" Compare shades only within one value of {', '.join(models)}: tokenizers count"
        note += " tokens differently."
    return HeatMap(f"{metric.title}, {source}", note, down, across, heads, rows)


def _key_models(cell: Cell, models: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis_key(cell.axes[axis]) for axis in models if axis in cell.axes)


def _find_ranges(
    metric: Metric, cells: Sequence[Cell], models: Sequence[str]
) -> dict[tuple[str, ...], tuple[float, float]]:
    """The worst and best mean of the cells that share a shading."""
    means: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        if scores := cell.scores.get(metric.name):
            means.setdefault(_key_models(cell, models), []).append(fmean(scores.values()))
    worst, best = (max, min) if metric.mode == "min" else (min, max)
    return {key: (worst(those), best(those)) for key, those in means.items()}


def _build_heat_cell(
    metric: Metric,
    cell: Cell | None,
    models: Sequence[str],
    ranges: Mapping[tuple[str, ...], tuple[float, float]],
) -> HeatCell:
    if cell is None:
        return HeatCell(missing=("not in the grid",))
    scores = list(cell.scores.get(metric.name, {}).values())
    if not scores:
        return HeatCell(missing=cell.missing or (f"no {metric.title}",))
    worst, best = ranges[_key_models(cell, models)]
    share = 1.0 if best == worst else (fmean(scores) - worst) / (best - worst)
    return HeatCell(
        decimal(fmean(scores)),
        f"± {decimal(stdev(scores))}" if len(scores) > 1 else "",
        format_count(len(scores), "seed"),
        f"q{min(NUM_SHADES - 1, int(share * NUM_SHADES))}",
        cell.missing,
    )
