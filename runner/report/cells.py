"""The cells of a report (runs that differ only in the seed), and their pairs along an axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.grid.spec import SEED_AXIS
from runner.report.effects import Cell
from runner.report.row_scores import BITS_PER_BYTE, NLL_PER_COMPLETION_TOKEN, NLL_PER_TOKEN
from runner.report.rows import Model, ReportRow, Scores, axis_key, axis_text, list_axes, list_values
from runner.report.wording import name_some


def find_seed_axis(rows: Sequence[ReportRow]) -> str | None:
    """The axis of the replicates: the one that changes only `training.seed` in the recipes.
    None if there is none; if there are several, `seed` is preferred.
    """
    # The numbers of a changed run are not from its present recipe
    rows = [row for row in rows if row.state != "changed"] or rows
    axes = list_axes(rows)
    found = [axis for axis in axes if _changes_only_the_seed(rows, axis)]
    return next((axis for axis in found if axis == SEED_AXIS), found[0] if found else None)


def split_variants(rows: Sequence[ReportRow]) -> tuple[list[ReportRow], list[ReportRow]]:
    """The runs of a grid, and the runs that command-line overrides turned into other
    experiments. If all runs have overrides, they are the grid.
    """
    planned = [row for row in rows if not row.recipe.run.overrides]
    if not planned:
        return list(rows), []
    return planned, [row for row in rows if row.recipe.run.overrides]


def find_seed_warnings(rows: Sequence[ReportRow]) -> list[str]:
    """Warnings about an axis called `seed`, or values of the seed axis, that do not
    replicate runs."""
    seed_axis = find_seed_axis(rows)
    found = []
    if seed_axis != SEED_AXIS and SEED_AXIS in list_axes(rows):
        found.append(
            f"`{SEED_AXIS}` changes more in the recipes than `training.seed`, so it counts as an"
            " ordinary axis and not as replication"
        )
    copies = [run.name for _, others in _list_copies(rows, seed_axis) for run in others]
    if copies and seed_axis is not None:
        found.append(
            f"`{seed_axis}` does not set `training.seed` in every run:"
            f" {name_some(copies)} {'has' if len(copies) == 1 else 'have'} the seed of another run"
            " in the same cell and so cannot count as replication"
        )
    return found


def _changes_only_the_seed(rows: Sequence[ReportRow], axis: str) -> bool:
    groups: dict[tuple[str, ...], list[ReportRow]] = {}
    for row in rows:
        if axis in row.axes:
            groups.setdefault((row.grid, *_key_others(row.axes, axis)), []).append(row)
    varied = [group for group in groups.values() if len(group) > 1]
    if not varied:
        return axis == SEED_AXIS
    pure = [group for group in varied if is_one_recipe(group)]
    has_seeds = axis == SEED_AXIS or any(len({row.seed for row in group}) > 1 for group in pure)
    # A single cell with deviating recipes is refused by name; its seeds do not become arms
    return has_seeds and 2 * len(pure) > len(varied)


def is_one_recipe(runs: Sequence[ReportRow]) -> bool:
    """True if the recipes differ only in `training.seed`."""
    return len({row.hash_without_seed for row in runs}) <= 1


def _list_copies(
    runs: Iterable[ReportRow], seed_axis: str | None
) -> list[tuple[ReportRow, list[ReportRow]]]:
    """Runs of one cell with equal recipes, `training.seed` included, that the axis counts
    as replicates: the first, and all others. Together they are one replicate.
    """
    found: dict[tuple[Any, ...], dict[str, list[ReportRow]]] = {}
    for run in runs:
        cell = (run.grid, run.task, *_key_others(run.axes, seed_axis))
        by_value = found.setdefault((*cell, run.seed, run.hash_without_seed), {})
        by_value.setdefault(axis_key(get_seed(run, seed_axis)), []).append(run)
    return [
        (first[0], [run for same in others for run in same])
        for first, *others in (list(by_value.values()) for by_value in found.values())
        if others
    ]


def _key_others(axes: Mapping[str, Any], *left_out: str | None) -> tuple[str, ...]:
    return tuple(
        f"{name}={axis_key(value)}" for name, value in sorted(axes.items()) if name not in left_out
    )


def build_cells(rows: Sequence[ReportRow], seed_axis: str | None) -> list[Cell]:
    """The cells of one grid, in the order of the rows."""
    groups: dict[tuple[str, ...], list[ReportRow]] = {}
    for row in rows:
        key = (row.grid, row.task, *_key_others(row.axes, seed_axis))
        groups.setdefault(key, []).append(row)
    seeds = list_values(rows, seed_axis) if seed_axis is not None else []
    return [_build_cell(runs, seed_axis, seeds) for runs in groups.values()]


def _build_cell(runs: Sequence[ReportRow], seed_axis: str | None, seeds: Sequence[Any]) -> Cell:
    by_seed: dict[str, list[ReportRow]] = {}
    for row in runs:
        by_seed.setdefault(axis_key(get_seed(row, seed_axis)), []).append(row)
    scores: dict[str, dict[Any, float]] = {}
    base_scores: dict[str, float] = {}
    scored_runs = [row for row in runs if list_scores(row, "tuned")]
    copies = {
        id(copy): f"{copy.name} has the same training.seed as {first.name}"
        for first, others in _list_copies(scored_runs, seed_axis)
        for copy in others
    }
    missing = list(copies.values())
    for every in by_seed.values():
        same = [row for row in every if id(row) not in copies]
        scored = [row for row in same if list_scores(row, "tuned")]
        missing += [_say_why(row) for row in same if row not in scored]
        if len(scored) > 1:
            missing.append(f"{' and '.join(row.name for row in scored)} are in the same cell")
            continue
        for row in scored:
            for name, score in list_scores(row, "tuned").items():
                scores.setdefault(name, {})[get_seed(row, seed_axis)] = score
            for name, score in list_scores(row, "base").items():
                base_scores.setdefault(name, score)
    missing += [
        f"there is no run with {seed_axis} {axis_text(seed)}"
        for seed in seeds
        if axis_key(seed) not in by_seed
    ]
    first = runs[0]
    return Cell(
        grid=first.grid,
        task=first.task,
        axes={name: value for name, value in first.axes.items() if name != seed_axis},
        runs=tuple(runs),
        scores=scores,
        base_scores=base_scores,
        missing=tuple(missing),
    )


def get_seed(row: ReportRow, seed_axis: str | None) -> Any:
    """The replicate number of a run: its value on the seed axis, else its seed."""
    return row.seed if seed_axis is None else row.axes.get(seed_axis, row.seed)


def list_counted(cell: Cell, metric: str, seed_axis: str | None) -> list[ReportRow]:
    """The runs of a cell that count for a metric, one for each seed."""
    counted = {axis_key(seed) for seed in cell.scores.get(metric, {})}
    return [
        row
        for row in cell.runs
        if axis_key(get_seed(row, seed_axis)) in counted and metric in list_scores(row, "tuned")
    ]


def list_scores(row: ReportRow, model: Model) -> dict[str, float]:
    """Every score of a run's model, by metric name."""
    scores: Scores = row.tuned if model == "tuned" else row.base
    found = {
        NLL_PER_COMPLETION_TOKEN: scores.nll_per_completion_token,
        NLL_PER_TOKEN: scores.nll_per_token,
        BITS_PER_BYTE: scores.bits_per_byte,
        **(row.answers[model].metrics if model in row.answers else {}),
    }
    return {name: score for name, score in found.items() if score is not None}


def _say_why(row: ReportRow) -> str:
    what = "(no test score)" if row.state == "completed" else f"({row.state})"
    return f"{row.name} {what}"


@dataclass(frozen=True, eq=False)
class Matches:
    """The pairs of cells of two values of an axis, and a sentence for each cell without a pair."""

    axis: str
    reference: Any
    compared: Any
    pairs: tuple[tuple[Cell, Cell], ...]  # reference and compared
    unpaired: tuple[tuple[str, str], ...]  # task and sentence


def match_cells(cells: Iterable[Cell], axis: str, reference: Any, compared: Any) -> Matches:
    """Pairs cells that are equal on every other axis, regardless of their tasks."""
    sides = {axis_key(reference): 0, axis_key(compared): 1}
    found: dict[tuple[str, ...], list[list[Cell]]] = {}
    for cell in cells:
        if axis in cell.axes and (key := axis_key(cell.axes[axis])) in sides:
            others = (cell.grid, *_key_others(cell.axes, axis))
            found.setdefault(others, [[], []])[sides[key]].append(cell)
    pairs, unpaired = [], []
    for both in found.values():
        first, second = ([cell for cell in side if cell.scores] for side in both)
        if len(first) == 1 == len(second):
            pairs.append((first[0], second[0]))
        else:
            task = (both[0] or both[1])[0].task
            unpaired.append((task, _say_why_unpaired(axis, (reference, compared), both)))
    return Matches(axis, reference, compared, tuple(pairs), tuple(unpaired))


def _say_why_unpaired(axis: str, values: tuple[Any, Any], both: Sequence[Sequence[Cell]]) -> str:
    reasons = []
    for value, side in zip(values, both, strict=True):
        if not side:
            others = [name_runs(cell) for cell in both[0] or both[1]]
            reasons.append(f"{' and '.join(others)} has no partner with {axis} {axis_text(value)}")
        elif sum(bool(cell.scores) for cell in side) > 1:
            names = " and ".join(name_runs(cell) for cell in side)
            reasons.append(f"{names} are in the same cell")
        else:
            reasons += [why for cell in side if not cell.scores for why in cell.missing]
    return ", ".join(reasons)


def name_runs(cell: Cell) -> str:
    """The name of a cell's run, or of the first run and the number of others."""
    more = len(cell.runs) - 1
    return cell.runs[0].name + (f" (and {more} more)" if more else "")


def describe_at(at: Mapping[str, Any]) -> str:
    """Format axis values for people.

    >>> describe_at({"model": "gemma", "num_train_samples": 60})
    'model=gemma, num_train_samples=60'
    """
    return ", ".join(f"{axis}={axis_text(value)}" for axis, value in at.items())
