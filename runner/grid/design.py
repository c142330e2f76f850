"""What a grid file says of the experiment as a whole, held against its recipes: the seeds of its
cells, and the contrasts that it declares.

`spec` has checked what can be said without the recipes.
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
    """The seed that a cell is to train with; None where it has none on the axis `seed`.

    With `seeds: own` it is the SHA-256 of the grid's name, of the labels on the other axes and of
    the number on the axis `seed`, cut to 31 bits: another value on an axis, or another number,
    leaves the seeds of the cells that were there before as they are.
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
    """Dotted key of the grid file, and what is wrong with it in view of all recipes."""
    for n, contrast in enumerate(spec.compare):
        yield from _check_contrast(f"compare.{n}", contrast, recipes)
    if spec.seeds == "own":
        yield from _check_seeds(recipes)


def _check_contrast(
    key: str, contrast: DeclaredContrast, recipes: Sequence[Recipe]
) -> Iterator[tuple[str, str]]:
    """Each end has runs that are measured so, and some of them differ in nothing but the axis."""
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
        what = f"`{contrast.metric}` is not measured by these runs, expected one of"
        yield f"{key}.metric", f"{what} {', '.join(known)}{suggest(contrast.metric, list(known))}"
    elif not found[ends[0]] & found[ends[1]]:
        yield (
            key,
            f"no two runs differ in `{contrast.axis}` alone, with {ends[0]} in one and {ends[1]} in"
            f" the other, and are measured by `{contrast.metric}`",
        )


def _check_seeds(recipes: Sequence[Recipe]) -> Iterator[tuple[str, str]]:
    """Runs of one cell differ in `training.seed` and in nothing else."""
    first_of: dict[str, Recipe] = {}
    for recipe in recipes:
        labels = {axis: label for axis, label in recipe.run.axes.items() if axis != SEED_AXIS}
        first = first_of.setdefault(json.dumps(labels, sort_keys=True), recipe)
        lines = diff_payloads(_leave_out_seed(first), _leave_out_seed(recipe))
        if lines:
            yield (
                "seeds",
                f"`own` is for `training.seed` alone, but {first.run.name} and {recipe.run.name}"
                f" also differ in {lines[0]}",
            )
            return


def _leave_out_seed(recipe: Recipe) -> dict[str, Any]:
    dumped = recipe.model_dump(mode="json")
    del dumped["run"], dumped["training"]["seed"]
    return dumped
