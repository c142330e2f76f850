"""The runs of a grid: the cells that its axes, exclusions and inclusions give, each under its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import TemplateError

from runner.errors import GridError
from runner.grid import GridSpec, applies, find_label, get_label, show_label
from runner.hf_fields import freeze
from runner.recipe import NAME_PATTERN, Scalar
from runner.templating import compile_name

MAX_CELLS: Final = 20_000


@dataclass(frozen=True)
class RunKey:
    """One cell under its run name. `values` are as in grid.yaml; an axis that does not apply is absent."""

    grid: str
    name: str
    values: Mapping[str, Any]

    @property
    def axes(self) -> dict[str, Scalar]:
        """The labels, as `run.axes` of the recipe holds them."""
        return {axis: get_label(value) for axis, value in self.values.items()}


@dataclass(frozen=True)
class KeyList:
    """The runs of a grid; `num_excluded` has one count per exclusion, each cell counted under the first that fits."""

    keys: tuple[RunKey, ...]
    num_cells: int
    num_excluded: tuple[int, ...]
    num_included: int


def name_cell(labels: Mapping[str, Scalar]) -> str:
    """How messages call a cell.

    >>> name_cell({"model": "phi-2", "lora_r": 8})
    'model=phi-2, lora_r=8'
    """
    return ", ".join(f"{axis}={show_label(label)}" for axis, label in labels.items())


def derive_keys(spec: GridSpec, grid: str) -> KeyList:
    """Every run of a grid in the order of its axes, the first axis slowest; inclusions last.

    Raises:
        GridError: the name pattern fails or gives one name twice, or no run is left.
    """
    cells = _derive_cells(spec)
    num_excluded = [0] * len(spec.exclude)
    kept: list[dict[str, Any]] = []
    for cell in cells:
        rule = next((n for n, rule in enumerate(spec.exclude) if applies(rule.when, cell)), None)
        if rule is None:
            kept.append(cell)
        else:
            num_excluded[rule] += 1
    included = [_complete_cell(spec, cell) for cell in spec.include]
    if not kept and not included:
        raise GridError(f"the grid {grid} has no runs: all of its {len(cells)} cells are excluded")
    keys = tuple(_name_cells(spec, grid, [*kept, *included]))
    return KeyList(keys, len(cells), tuple(num_excluded), len(included))


def _derive_cells(spec: GridSpec) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{}]
    for name, axis in spec.axes.items():
        longer: list[dict[str, Any]] = []
        for cell in cells:
            longer += [{**cell, name: value} for value in axis.values] if applies(axis.when, cell) else [cell]
        if len(longer) > MAX_CELLS:
            raise GridError(f"the axes up to `{name}` give {len(longer):,} cells, more than {MAX_CELLS:,}")
        cells = longer
    return cells


def _complete_cell(spec: GridSpec, cell: Mapping[str, Any]) -> dict[str, Any]:
    """An included cell in the order of the axes, with the mapping that a label stands for."""
    values: dict[str, Any] = {}
    for name, axis in spec.axes.items():
        if name in cell:
            position = None if isinstance(cell[name], Mapping) else find_label(cell[name], axis.values)
            values[name] = cell[name] if position is None else axis.values[position]
    return values


def _name_cells(spec: GridSpec, grid: str, cells: Sequence[Mapping[str, Any]]) -> Iterator[RunKey]:
    pattern = f"the name pattern of the grid {grid}, {spec.name!r},"
    try:
        build_name = compile_name(spec.name)
    except TemplateError as error:
        raise GridError(f"{pattern} is wrong: {error}") from None
    cell_of_name: dict[str, str] = {}
    for values in cells:
        labels = {axis: get_label(value) for axis, value in values.items()}
        cell = name_cell(labels)
        try:
            name = build_name(labels)
        except Exception as error:  # an expression of the pattern may raise anything
            raise GridError(f"{pattern} fails for {cell}: {error}") from None
        if not re.fullmatch(NAME_PATTERN, name):
            accepted = "at most 200 letters, digits, dots, dashes and underscores, starting with a letter or digit"
            raise GridError(f"the grid {grid} names {cell} {name!r}, expected {accepted}")
        if (other := cell_of_name.setdefault(name.lower(), cell)) is not cell:  # some file systems ignore case
            message = (
                f"the grid {grid} gives the name {name!r} twice (letter case does not count):\n\n  {other}\n  {cell}"
            )
            raise GridError(message, hint="let the name pattern use every axis that differs")
        yield RunKey(grid, name, freeze(values))
