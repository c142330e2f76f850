"""Short texts for the parts of a report, and the choice of parts that figures and pages show."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from runner.report.contrasts import build_metric
from runner.report.effects import AxisEffects, Cell, Effect, Metric, Report
from runner.report.rows import axis_key, axis_text, is_number
from runner.report.wording import name_cell


def describe_contrast(effect: Effect | AxisEffects) -> str:
    """Format the axis and its two values, the reference first."""
    return f"{effect.axis}: {axis_text(effect.reference)} → {axis_text(effect.compared)}"


def describe_place(effect: Effect) -> str:
    """Describe the cells of an effect."""
    if effect.at:
        return f"at {name_cell(effect.at)}"
    return f"mean over {len(effect.pairs)} pairs of cells" if len(effect.pairs) != 1 else "one pair"


def list_places(report: Report) -> list[tuple[str, str]]:
    """Each grid and task, in order; numbers are never combined across them."""
    return list(dict.fromkeys((cell.grid, cell.task) for cell in report.cells))


def describe_source(report: Report, grid: str, task: str) -> str:
    """Format the grid, with the task if the grid has several."""
    tasks = {cell.task for cell in report.cells if cell.grid == grid}
    return f"{grid}, task {task}" if len(tasks) > 1 else grid


def list_cell_axes(cells: Iterable[Cell]) -> dict[str, list[Any]]:
    """Axes with several values: numbers ascending, then other values."""
    values: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for axis, value in cell.axes.items():
            values.setdefault(axis, {}).setdefault(axis_key(value), value)
    return {
        axis: sorted(found.values(), key=lambda value: (0, value) if is_number(value) else (1, 0))
        for axis, found in values.items()
        if len(found) > 1
    }


def find_cell(cells: Iterable[Cell], axes: Mapping[str, Any]) -> Cell | None:
    """The cell with these values on these axes."""
    wanted = {axis: axis_key(value) for axis, value in axes.items()}
    for cell in cells:
        if all(
            axis in cell.axes and axis_key(cell.axes[axis]) == key for axis, key in wanted.items()
        ):
            return cell
    return None


def list_main_metrics(report: Report, grid: str, task: str) -> list[Metric]:
    """The metrics that figures draw: those of declared contrasts; if there are none, the
    first likelihood with scores and the first metric of answers.
    """
    known = {metric.name: metric for metric in report.metrics}
    cells = [cell for cell in report.cells if (cell.grid, cell.task) == (grid, task)]
    scored = [metric for metric in known.values() if any(metric.name in c.scores for c in cells)]
    declared = {
        effects.metric.name
        for effects in report.effects
        if (effects.grid, effects.task) == (grid, task)
        and any(effect.is_confirmatory for effect in list_all(effects))
    }
    chosen = [metric for metric in scored if metric.name in declared]
    if not chosen:
        chosen = [metric for metric in scored if not metric.is_of_answers][:1]
        chosen += [metric for metric in scored if metric.is_of_answers][:1]
    return chosen


def list_scored_metrics(report: Report) -> tuple[Metric, ...]:
    """Every metric for which some cell has a score."""
    modes = {name: mode for row in report.rows for name, mode in row.recipe.metric_modes.items()}
    names = dict.fromkeys(name for cell in report.cells for name in cell.scores)
    return tuple(build_metric(name, modes) for name in names)


def list_all(effects: AxisEffects) -> list[Effect]:
    """All effects of two axis values, each once: pooled, simple, single pairs of cells."""
    pooled = [effects.pooled] if effects.pooled is not None else []
    simple = [effect for those in effects.simple.values() for effect in those]
    return [*pooled, *simple, *effects.cells]


def choose_effects(report: Report, grid: str, task: str) -> list[AxisEffects]:
    """The effects that figures draw for each two values of an axis: by the main metrics, or
    by another one if these give no number, such as bits per byte across two tokenizers.
    """
    main = {metric.name for metric in list_main_metrics(report, grid, task)}
    groups: dict[tuple[str, str, str], list[AxisEffects]] = {}
    for effects in report.effects:
        if (effects.grid, effects.task) == (grid, task):
            key = (effects.axis, axis_key(effects.reference), axis_key(effects.compared))
            groups.setdefault(key, []).append(effects)
    chosen: list[AxisEffects] = []
    for those in groups.values():
        wanted = [one for one in those if one.metric.name in main]
        if not any(_has_number(one) for one in wanted):
            wanted = [one for one in those if _has_number(one)][:1] or wanted[:1] or those[:1]
        chosen += wanted
    return chosen


def _has_number(effects: AxisEffects) -> bool:
    return any(effect.interval is not None for effect in effects.shown)


def is_per_token(metric: Metric) -> bool:
    """True if a score is per token, so that it depends on the tokenizer of the base model."""
    return not metric.is_of_answers and metric.name != "bits_per_byte"


def list_model_axes(cells: Sequence[Cell]) -> list[str]:
    """The axes that change the base model; NLL per token is not comparable along them."""
    found = []
    for axis in list_cell_axes(cells):
        models: dict[str, set[str]] = {}
        for cell in cells:
            others = {name: value for name, value in cell.axes.items() if name != axis}
            names = {run.recipe.model.path for run in cell.runs}
            models.setdefault(axis_key(others), set()).update(names)
        if any(len(names) > 1 for names in models.values()):
            found.append(axis)
    return found


def name_panel(axes: Mapping[str, Any], width: int = 26) -> str:
    """Format the axis values of a panel, with the names of the axes if they fit.

    >>> name_panel({"loss": "full"}), name_panel({"num_train_samples": 60, "model": "gemma"})
    ('loss=full', '60 · gemma')
    """
    whole = hide_paths(name_cell(axes))
    if len(whole) <= width:
        return whole
    return " · ".join(hide_paths(axis_text(value)) for value in axes.values())


# Not after a letter, a scheme or another path
_ABSOLUTE: Final = re.compile(r"(?<![\w.:/…~])/(?:[^\s'\"`,;:()<>/]+/)+[^\s'\"`,;:()<>/]*")


def hide_paths(text: str) -> str:
    """Make absolute paths relative to the current folder, or keep only their last name.

    >>> hide_paths("model=/home/ann/models/gemma"), hide_paths("https://a.org/b/c")
    ('model=…/gemma', 'https://a.org/b/c')
    """
    here = f"{os.getcwd()}/"

    def relate(match: re.Match[str]) -> str:
        path = match[0].rstrip("/")
        return path.removeprefix(here) if path.startswith(here) else f"…/{path.rpartition('/')[2]}"

    return _ABSOLUTE.sub(relate, text)
