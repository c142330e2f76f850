"""Learning curves: the metric that selects the best step, on the validation rows, over steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Final

from runner.errors import CorruptFileError
from runner.report.contrasts import build_metric
from runner.report.drawing import PALETTE, Drawing, drawing_figure, label
from runner.report.effects import Cell, Report
from runner.report.figures import FIGURE_WIDTH, choose_style, is_at, split
from runner.report.labels import (
    describe_source,
    list_cell_axes,
    list_model_axes,
    list_places,
    name_panel,
)
from runner.report.rows import ReportRow, axis_key, axis_text
from runner.text import format_count

MAX_CURVES: Final = 40  # in a figure
MAX_CURVE_FIGURES: Final = 8


def draw_curves(report: Report) -> list[Drawing]:
    """Draw the validation metric over steps: one color for each value of an axis, one panel for
    each combination of the others.
    """
    panels: list[tuple[str, str, list[tuple[int, str, ReportRow]]]] = []
    for grid, task in list_places(report):
        cells = [cell for cell in report.cells if (cell.grid, cell.task) == (grid, task)]
        source = describe_source(report, grid, task)
        panels += [(source, *one) for one in _list_curve_panels(report, cells)]
    chunks: list[list[tuple[str, str, list[tuple[int, str, ReportRow]]]]] = []
    size = 0
    for panel in panels:
        for part in split(panel[2], MAX_CURVES):
            is_new = not chunks or size + len(part) > MAX_CURVES or chunks[-1][0][0] != panel[0]
            if is_new or len(chunks[-1]) == 9:
                chunks.append([])
                size = 0
            chunks[-1].append((panel[0], panel[1], list(part)))
            size += len(part)
    left_out = sum(len(part) for chunk in chunks[MAX_CURVE_FIGURES:] for _, _, part in chunk)
    return [
        _draw_curve_figure(f"curves-{number + 1}", chunk, left_out)
        for number, chunk in enumerate(chunks[:MAX_CURVE_FIGURES])
    ]


def load_curve(run: ReportRow) -> list[tuple[int, float]]:
    """Steps and validation scores of the metric that selects the best step; may be empty.

    The base model (step 0) is left out: its score would flatten the rest of the curve.
    """
    name = name_curve_metric(run)
    try:
        rows = run.load_curve()
    except (CorruptFileError, OSError):
        return []
    points = [
        (row["step"], float(row[name]))
        for row in rows
        if row.get("split") == "validation"
        and isinstance(row.get(name), int | float)
        and isinstance(row.get("step"), int)
    ]
    return points[1:] if len(points) > 2 and points[0][0] == 0 else points


def name_curve_metric(run: ReportRow) -> str:
    """The metric that selected the best step of a run."""
    return run.recipe.checkpoints.metric


def _list_curve_panels(
    report: Report, cells: Sequence[Cell]
) -> Iterator[tuple[str, list[tuple[int, str, ReportRow]]]]:
    values = list_cell_axes(cells)
    models = list_model_axes(cells)
    wanted = [effects.axis for effects in report.effects if effects.axis in values]
    wanted.sort(key=lambda axis: axis in models)  # scores across models are less comparable
    color = next((axis for axis in wanted if len(values[axis]) <= len(PALETTE)), None)
    if color is None:
        color = min(values, key=lambda axis: len(values[axis]), default=None)
    others = [axis for axis in values if axis != color]
    for chosen in product(*(values[axis] for axis in others)):
        facet = dict(zip(others, chosen, strict=True))
        curves = []
        for cell in cells:
            if is_at(cell, facet):
                number, name = 0, "all runs"
                if color is not None and color in cell.axes:
                    keys = [axis_key(value) for value in values[color]]
                    number = keys.index(axis_key(cell.axes[color]))
                    name = f"{color}={axis_text(cell.axes[color])}"
                curves += [(number, name, run) for run in cell.runs if load_curve(run)]
        if curves:
            yield name_panel(facet), curves


def _draw_curve_figure(
    name: str, panels: Sequence[tuple[str, str, list[tuple[int, str, ReportRow]]]], left_out: int
) -> Drawing:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    handles: dict[str, Any] = {}
    runs = [run for _, _, those in panels for _, _, run in those]
    metrics = list(dict.fromkeys(build_metric(name_curve_metric(run), {}).title for run in runs))
    with drawing_figure(FIGURE_WIDTH if columns > 1 else 5.2, 0.6 + 2.0 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, (_, facet, curves) in zip(grid.flat, panels, strict=False):
            for number, text, run in curves:
                handles.setdefault(text, _draw_curve(axes, number, run))
            axes.set_title(label(facet, 30), fontweight="normal")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel(label(" or ".join(metrics), 34))
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step")
        texts = [label(text, 30) for text in handles]
        figure.legend(list(handles.values()), texts, loc="outside lower center", ncols=4)
    stopped = sum(run.stop_reason == "early_stopping" for run in runs)
    last = sum(run.best_step is not None and run.best_step == run.num_steps for run in runs)
    caption = "One line per run. Dot: its best step, whose model is tested. Cross: the step at"
    caption += " which early stopping ended it. The base model (step 0) is not drawn."
    if last:
        caption += (
            f" In {format_count(last, 'run')} the last step was the best, so more steps might help."
        )
    if left_out:
        caption += f" {format_count(left_out, 'more run')} left out of these figures."
    return Drawing(
        name,
        f"Learning curves, {panels[0][0]}",
        f"{' or '.join(map(label, metrics))} on the validation rows over optimizer steps of"
        f" {format_count(len(runs), 'run')}; {stopped} stopped early.",
        caption,
        figure,
    )


def _draw_curve(axes: Any, number: int, run: ReportRow) -> Any:
    steps, scores = zip(*load_curve(run), strict=True)
    style = choose_style(number)
    color = style["color"]
    [line] = axes.plot(steps, scores, color=color, linestyle=style["linestyle"], linewidth=1.1)
    by_step = dict(zip(steps, scores, strict=True))
    if run.best_step in by_step:
        axes.plot(run.best_step, by_step[run.best_step], marker="o", markersize=4, color=color)
    if run.stop_reason == "early_stopping":
        axes.plot(steps[-1], scores[-1], marker="x", markersize=6, markeredgewidth=1.5, color=color)
    return line
