"""The figures of a report: effects with the noise floor, interactions, and two arms compared row by
row. Learning curves are in `curves`.

Each function takes a report and returns drawings in the order of its cells and effects. Items that
do not fit into a figure continue in the next one; captions count those left out of all figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Any, Final, TypeVar

from runner.report.drawing import (
    BAND,
    GREYED,
    INK,
    LINES,
    MARKERS,
    MUTED,
    PALETTE,
    Drawing,
    draw_dots,
    drawing_figure,
    label,
)
from runner.report.effects import AxisEffects, Cell, Effect, Metric, Report
from runner.report.labels import (
    choose_effects,
    describe_contrast,
    describe_place,
    describe_source,
    find_cell,
    is_per_token,
    list_cell_axes,
    list_main_metrics,
    list_model_axes,
    list_places,
    name_panel,
)
from runner.report.row_pages import RowComparison
from runner.report.rows import axis_text, is_number
from runner.text import format_count

MAX_EFFECTS: Final = 40
MAX_EFFECT_FIGURES: Final = 3  # per metric
MAX_INTERACTION_PANELS: Final = 12  # per metric
MAX_SCATTERS: Final = 12
MAX_DOTS: Final = 2_000  # in a scatter
_MAX_FACETS: Final = 6
_MAX_TICKS: Final = 5
FIGURE_WIDTH: Final = 7.4  # inches
Item = TypeVar("Item")


def draw_forests(report: Report) -> list[Drawing]:
    """Draw effects with their intervals, one figure for each grid, task and metric."""
    drawings: list[Drawing] = []
    for grid, task in list_places(report):
        by_metric: dict[str, list[AxisEffects]] = {}
        for effects in choose_effects(report, grid, task):
            by_metric.setdefault(effects.metric.name, []).append(effects)
        for those in by_metric.values():
            lines = [(effects, effect) for effects in those for effect in effects.shown]
            shown = lines[: MAX_EFFECTS * MAX_EFFECT_FIGURES]
            for chunk in split(shown, MAX_EFFECTS):
                name = f"effects-{len(drawings) + 1}"
                source = describe_source(report, grid, task)
                left_out = len(lines) - len(shown)
                drawings.append(_draw_forest(name, source, those[0].metric, chunk, left_out))
    return drawings


def _draw_forest(
    name: str,
    source: str,
    metric: Metric,
    lines: Sequence[tuple[AxisEffects, Effect]],
    left_out: int,
) -> Drawing:
    groups = list(dict.fromkeys(id(effects) for effects, _ in lines))
    height = 1.05 + 0.24 * (len(lines) + len(groups))
    with drawing_figure(FIGURE_WIDTH, height) as figure:
        axes = figure.subplots()
        at, ticks, texts = 0, [], []
        previous = None
        for effects, effect in lines:
            if effects is not previous:
                ticks.append(at)
                texts.append(label(describe_contrast(effects)))
                previous, at = effects, at + 1
            _draw_effect(axes, at, effect)
            ticks.append(at)
            texts.append(f"{label(describe_place(effect))}   ")
            at += 1
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(ticks, texts)
        for text, tick in zip(axes.get_yticklabels(), texts, strict=True):
            is_head = not tick.endswith(" ")
            text.set_fontweight("bold" if is_head else "normal")
        axes.set_ylim(at - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        better = "left" if metric.mode == "min" else "right"
        axes.set_xlabel(f"difference in {label(metric.unit)}\n{better} of 0 the second is better")
        axes.use_sticky_edges = False  # the ends of the bands do not limit the axis
        axes.margins(x=0.06)
        axes.autoscale_view(scaley=False)
    clear = [effect for _, effect in lines if effect.is_clear]
    below = [effect for _, effect in lines if effect.is_below_noise]
    return Drawing(
        name,
        f"Effects on {metric.title}, {source}",
        f"{format_count(len(lines), 'effect')} with intervals, {len(clear)} clear of 0"
        " after correction,"
        f" {len(below)} below the noise floor. The table below has the numbers.",
        "Dot: estimate. Line: interval. Grey band: the noise floor; two single runs that differ"
        " only in the seed stay within it in 95% of cases, and estimates within it are grey."
        " Filled: declared before the first launch; open: exploratory."
        " Dotted line: rows only, no verdict on the recipe."
        + (f" {format_count(left_out, 'effect')} in the table only." if left_out else ""),
        figure,
    )


def _draw_effect(axes: Any, at: float, effect: Effect) -> None:
    if effect.noise_floor is not None:
        floor = effect.noise_floor
        axes.barh(at, 2 * floor, left=-floor, height=0.82, color=BAND, linewidth=0)
    if effect.interval is None:
        axes.annotate(
            "no estimate: see the table",
            (0, at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
            fontsize=8,
        )
        return
    color = GREYED if effect.is_below_noise else PALETTE[0] if effect.is_confirmatory else INK
    bounds = effect.interval.bounds
    if bounds is not None:
        style = ":" if effect.interval.kind == "rows" else "-"
        axes.plot(bounds, (at, at), color=color, linewidth=1.6, linestyle=style)
    axes.plot(
        effect.interval.estimate,
        at,
        marker="D" if not effect.at and len(effect.pairs) > 1 else "o",
        markersize=5,
        color=color,
        markerfacecolor=color if effect.is_confirmatory else "white",
        markeredgewidth=1.3,
    )


@dataclass(frozen=True)
class _Panel:
    """Two axes in one facet: one line for each value of an axis, drawn along the other axis."""

    along: str
    lines: str
    facet: Mapping[str, Any]
    averaged: tuple[str, ...]  # other axes that the points average over
    cells: tuple[Cell, ...]
    p: float | None


def draw_interactions(report: Report) -> list[Drawing]:
    """Draw each pair of axes: the score along one axis, a line for each value of the other."""
    drawings: list[Drawing] = []
    for grid, task in list_places(report):
        cells = [cell for cell in report.cells if (cell.grid, cell.task) == (grid, task)]
        for metric in list_main_metrics(report, grid, task):
            panels = _list_panels(report, cells, metric)
            shown = panels[:MAX_INTERACTION_PANELS]
            for chunk in split(shown, 6):
                name = f"interactions-{len(drawings) + 1}"
                source = describe_source(report, grid, task)
                left_out = len(panels) - len(shown)
                drawings.append(_draw_panels(name, source, metric, chunk, left_out))
    return drawings


def _list_panels(report: Report, cells: Sequence[Cell], metric: Metric) -> list[_Panel]:
    values = list_cell_axes(cells)
    models = list_model_axes(cells) if is_per_token(metric) else []
    found: list[_Panel] = []
    names = list(values)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            along, lines = _choose_along(first, second, values)
            others = [axis for axis in names if axis not in (first, second)]
            others.sort(key=lambda axis: axis not in models)  # one panel per model, if possible
            facets: list[str] = []
            size = 1
            for axis in others:
                if axis in models or size * len(values[axis]) <= _MAX_FACETS:
                    facets.append(axis)
                    size *= len(values[axis])
            averaged = tuple(axis for axis in others if axis not in facets)
            p = _find_interaction(report, cells, metric, first, second)
            for chosen in product(*(values[axis] for axis in facets)):
                facet = dict(zip(facets, chosen, strict=True))
                those = tuple(cell for cell in cells if is_at(cell, facet))
                if _is_crossed(those, along, lines, metric):
                    found.append(_Panel(along, lines, facet, averaged, those, p))
    return sorted(found, key=lambda panel: 2.0 if panel.p is None else panel.p)


def _is_crossed(cells: Sequence[Cell], first: str, second: str, metric: Metric) -> bool:
    """True if lines can be drawn: two values of each axis have a score."""
    scored = [cell for cell in cells if cell.scores.get(metric.name)]
    values = list_cell_axes(scored)
    return first in values and second in values


def _choose_along(first: str, second: str, values: Mapping[str, list[Any]]) -> tuple[str, str]:
    """Order two axes; the numeric one, else the one with more values, goes along the bottom."""

    def rank(axis: str) -> tuple[bool, int]:
        return all(map(is_number, values[axis])), len(values[axis])

    return (first, second) if rank(first) > rank(second) else (second, first)


def _find_interaction(
    report: Report, cells: Sequence[Cell], metric: Metric, first: str, second: str
) -> float | None:
    """The smallest p of the tests for an interaction of the two axes."""
    place = (cells[0].grid, cells[0].task, metric.name)
    found = [
        interaction.p
        for effects in report.effects
        if (effects.grid, effects.task, effects.metric.name) == place
        for interaction in effects.interactions
        if {effects.axis, interaction.other} == {first, second}
    ]
    return min(found, default=None)


def _draw_panels(
    name: str, source: str, metric: Metric, panels: Sequence[_Panel], left_out: int
) -> Drawing:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with drawing_figure(FIGURE_WIDTH if columns > 1 else 4.2, 0.2 + 2.9 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, metric)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel(label(metric.unit, 34))
    averaged = sorted({axis for panel in panels for axis in panel.averaged})
    caption = "Point: mean over the seeds of a cell; bar: one standard deviation."
    if averaged:
        caption += f" Points are also means over {', '.join(map(label, averaged))}."
    caption += (
        " Lines that are not parallel suggest that the effect of one axis depends on the other."
    )
    if left_out:
        caption += f" {format_count(left_out, 'panel')} with the weakest interaction left out."
    pairs = dict.fromkeys(f"{panel.lines} along {panel.along}" for panel in panels)
    return Drawing(
        name,
        f"Interactions: {metric.title}, {source}",
        f"Lines of mean scores: {label('; '.join(pairs), 300)}. The table of cells has the"
        " numbers.",
        caption,
        figure,
    )


def _draw_panel(axes: Any, panel: _Panel, metric: Metric) -> None:
    values = list_cell_axes(panel.cells)
    along, lines = values.get(panel.along, []), values.get(panel.lines, [])
    places = range(len(along))
    for number, value in enumerate(lines):
        xs, means, spreads = [], [], []
        for at in places:
            point = {panel.along: along[at], panel.lines: value}
            scores = [
                list(cell.scores[metric.name].values())
                for cell in panel.cells
                if is_at(cell, point) and cell.scores.get(metric.name)
            ]
            if scores:
                xs.append(at + 0.04 * (number - (len(lines) - 1) / 2))
                means.append(fmean(fmean(those) for those in scores))
                spreads.append(fmean(stdev(those) if len(those) > 1 else 0.0 for those in scores))
        style = dict(choose_style(number), label=label(axis_text(value), 24))
        axes.errorbar(xs, means, yerr=spreads, capsize=2.5, elinewidth=0.9, markersize=4.5, **style)
    step = -(-len(along) // _MAX_TICKS)
    texts = [label(axis_text(value), 14) for value in along[::step]]
    axes.set_xticks(list(places)[::step], texts)
    axes.set_xlim(-0.35, len(along) - 0.65)
    axes.set_xlabel(label(panel.along, 30))
    facet = label(name_panel(panel.facet), 30)
    axes.set_title(f"{facet}\n" if facet else "", fontweight="normal")
    if panel.p is not None:
        style = {"fontsize": 7.5, "fontweight": "normal", "color": MUTED}
        axes.set_title(f"interaction p = {panel.p:.3f}", loc="right", **style)
    axes.legend(
        title=label(panel.lines, 24),
        loc="upper left",  # below the axes, so that it hides no points
        bbox_to_anchor=(-0.04, -0.27),
        ncols=2,
        title_fontsize=8,
        alignment="left",
        fontsize=8,
        handlelength=1.8,
        columnspacing=1.2,
    )


def draw_scatters(comparisons: Sequence[RowComparison]) -> list[Drawing]:
    """Draw the score of each test row under two arms, a panel for each comparison."""
    drawings: list[Drawing] = []
    shown = comparisons[:MAX_SCATTERS]
    for chunk in split_by_metric(shown):
        columns = min(3, len(chunk))
        rows = -(-len(chunk) // columns)
        with drawing_figure(FIGURE_WIDTH if columns > 1 else 4.0, 0.3 + 2.5 * rows) as figure:
            grid = figure.subplots(rows, columns, squeeze=False)
            for axes, one in zip(grid.flat, chunk, strict=False):
                _draw_scatter(axes, one)
            for axes in grid.flat[len(chunk) :]:
                axes.set_visible(False)
            unit = label(chunk[0].metric.unit)
            figure.supxlabel(f"score of a row, {unit}", fontsize=8, color=MUTED)
        left_out = len(comparisons) - len(shown)
        caption = (
            "One dot per test row: its mean score over the seeds of each arm. On the line, both"
            f" arms score the same. {'Below' if chunk[0].metric.mode == 'min' else 'Above'} it, the"
            " arm on the vertical axis is better."
        )
        if left_out:
            caption += f" {format_count(left_out, 'comparison')} left out of these figures."
        wins = [
            f"{one.title}: {one.num_wins} of {format_count(one.num_rows, 'row')} better"
            for one in chunk
        ]
        drawings.append(
            Drawing(
                f"rows-{len(drawings) + 1}",
                f"Two arms row by row, {chunk[0].metric.title}",
                label("; ".join(wins), 600) + ".",
                caption,
                figure,
            )
        )
    return drawings


def split_by_metric(comparisons: Sequence[RowComparison]) -> Iterator[Sequence[RowComparison]]:
    """Split comparisons by metric into figures of at most six."""
    by_metric: dict[str, list[RowComparison]] = {}
    for one in comparisons:
        by_metric.setdefault(one.metric.name, []).append(one)
    for those in by_metric.values():
        yield from split(those, 6)


def _draw_scatter(axes: Any, one: RowComparison) -> None:
    step = -(-len(one.reference_scores) // MAX_DOTS)
    xs, ys = one.reference_scores[::step], one.compared_scores[::step]
    low, high = float(min(xs.min(), ys.min())), float(max(xs.max(), ys.max()))
    margin = 0.04 * (high - low) or 0.1
    axes.plot((low - margin, high + margin), (low - margin, high + margin), color=MUTED, lw=0.8)
    draw_dots(axes, xs, ys, color=PALETTE[0])
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(low - margin, high + margin)
    axes.set_aspect("equal")
    axes.set_title(label(one.place, 30), fontweight="normal")
    axes.set_xlabel(label(one.reference_name, 30))
    axes.set_ylabel(label(one.compared_name, 30))


def choose_style(number: int) -> dict[str, Any]:
    """Color, marker and dash, since lines must differ in print and for color-blind readers."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def is_at(cell: Cell, axes: Mapping[str, Any]) -> bool:
    """True if a cell has these values on these axes."""
    return find_cell([cell], axes) is not None


def split(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Split items into chunks of at most `size`.

    >>> list(split("abcde", 2))
    ['ab', 'cd', 'e']
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]
