"""Checks the seeds and the declared contrasts of a grid file against its recipes.

`spec` has checked everything that does not depend on the recipes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.files import hash_json
from runner.grid.spec import SEED_AXIS, GridSpec, is_seed
from runner.recipe.identity import diff_payloads
from runner.recipe.parse import Recipe
from runner.recipe.problems import suggest
from runner.recipe.schema import DeclaredContrast, Scalar


def derive_cell_seed(spec: GridSpec, grid: str, labels: Mapping[str, Scalar]) -> int | None:
    """The training seed of a cell; None if it has no number on the axis `seed`.

    With `seeds: own` it is the SHA-256 of the grid's name, the labels on the other axes and the
    number on the axis `seed`, cut to 31 bits. So adding a value to an axis, or a number, does not
    change the seeds of the existing cells.
    """
    number = labels.get(SEED_AXIS)
    if not is_seed(number):
        return None
    assert isinstance(number, int)
    if spec.seeds == "shared":
        return number
    others = {axis: label for axis, label in labels.items() if axis != SEED_AXIS}
    return int(hash_json([grid, others, number])[:8], 16) >> 1


def list_declared(spec: GridSpec) -> list[dict[str, Any]]:
    """The contrasts of a grid, as `run.declared` of each recipe holds them."""
    return [contrast.model_dump(mode="json") for contrast in spec.compare]


def find_design_problems(spec: GridSpec, recipes: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    """The dotted keys of the grid file that do not fit the recipes, each with its problem."""
    for n, contrast in enumerate(spec.compare):
        yield from _check_contrast(f"compare.{n}", contrast, recipes)
    if spec.seeds == "own":
        yield from _check_seeds(recipes)


def _check_contrast(
    key: str, contrast: DeclaredContrast, recipes: Sequence[Recipe]
) -> Iterator[tuple[str, str]]:
    """Check that both ends have runs with this metric, and that two of them differ only in the
    axis.
    """
    ends = (json.dumps(contrast.from_), json.dumps(contrast.to))
    found: dict[str, set[str]] = {end: set() for end in ends}
    known: dict[str, None] = {}
    for recipe in recipes:
        labels = dict(recipe.run.axes)
        end = json.dumps(labels.pop(contrast.axis)) if contrast.axis in labels else None
        if end not in found:
            continue
        known |= dict.fromkeys(recipe.measured_metrics)
        if contrast.metric in recipe.measured_metrics:
            found[end].add(json.dumps(labels, sort_keys=True))
    if contrast.metric not in known:
        what = f"these runs do not measure `{contrast.metric}`, expected one of"
        yield f"{key}.metric", f"{what} {', '.join(known)}{suggest(contrast.metric, list(known))}"
    elif not found[ends[0]] & found[ends[1]]:
        yield (
            key,
            f"no two runs differ only in `{contrast.axis}`, with {ends[0]} in one and {ends[1]} in"
            f" the other, and both measure `{contrast.metric}`",
        )


def _check_seeds(recipes: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    """Check that runs of one cell differ only in `training.seed`."""
    first_of: dict[str, Recipe] = {}
    for recipe in recipes:
        labels = {axis: label for axis, label in recipe.run.axes.items() if axis != SEED_AXIS}
        first = first_of.setdefault(json.dumps(labels, sort_keys=True), recipe)
        lines = diff_payloads(_leave_out_seed(first), _leave_out_seed(recipe))
        if lines:
            yield (
                "seeds",
                f"with `own`, seeds may change only `training.seed`, but {first.run.name} and"
                f" {recipe.run.name} also differ in {lines[0]}",
            )
            return


def _leave_out_seed(recipe: Recipe) -> dict[str, Any]:
    dumped = recipe.model_dump(mode="json")
    del dumped["run"], dumped["training"]["seed"]
    return dumped
