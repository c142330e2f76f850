"""Pins recipes to the commits that their runs load: the recorded ones, or today's for runs that
have not loaded anything yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.data.sources import go_offline_without_network
from runner.errors import CorruptFileError, RefusedError, RunnerError
from runner.launch.names import refuse_moved
from runner.plan.select import run_paths
from runner.recipe.hub import CommitFinder, HubName, list_hub_names, name_at, pin
from runner.recipe.parse import Recipe
from runner.run.record import load_stored_recipe
from runner.run.siblings import Loaded, find_moved, read_grid


@dataclass
class PinnedRecipes:
    """The recipes in order, and the errors and warnings about their names, each with its run."""

    recipes: list[Recipe] = field(default_factory=list)
    errors: list[tuple[RunnerError, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def pin_recipes(recipes: Sequence[Recipe], output_root: Path) -> PinnedRecipes:
    """Resolve hub names to commits, and compare them with the commits that runs of the same grid
    loaded.
    """
    named = [(recipe, list_hub_names(recipe)) for recipe in recipes]
    if not any(names for _, names in named):
        return PinnedRecipes(list(recipes))
    go_offline_without_network()
    pinned, finder = PinnedRecipes(), CommitFinder()
    grids = {recipe.run.grid: output_root / recipe.run.grid for recipe in recipes}
    loaded = {grid: read_grid(grid_dir) for grid, grid_dir in grids.items()}
    new: list[Loaded] = []
    for recipe, names in named:
        recorded = _find_recorded(recipe, output_root)
        found = _find_new(names, recorded, finder)
        pinned.recipes.append(pin(recipe, {**recorded, **found}))
        for key, commit in found.items():
            one = Loaded(run_paths(recipe, output_root).run_dir, names[key], commit)
            try:
                refuse_moved(key, one, loaded[recipe.run.grid])
            except RefusedError as error:
                pinned.errors.append((error, recipe.run.full_name))
            else:
                new.append(one)
    _warn(pinned, [*new, *(one for those in loaded.values() for one in those)])
    return pinned


def _find_new(
    names: dict[str, HubName], recorded: dict[str, str], finder: CommitFinder
) -> dict[str, str]:
    """The commits of names that the run has not recorded, if they can be resolved."""
    found = {}
    for key, name in names.items():
        # If the hub does not answer, loading reports it.
        with contextlib.suppress(OSError):
            if key not in recorded and (commit := finder.find(name)) is not None:
                found[key] = commit
    return found


def _find_recorded(recipe: Recipe, output_root: Path) -> dict[str, str]:
    """The recorded commits of the recipe's run, for names that the recipe still states."""
    try:
        stored = load_stored_recipe(run_paths(recipe, output_root))
    except (CorruptFileError, OSError):
        return {}
    if stored is None:
        return {}
    recipe = stored.state_as_before(recipe)
    return {
        key: commit
        for key, commit in stored.commits.items()
        if name_at(recipe, key) == name_at(stored.recipe, key)
    }


def _warn(pinned: PinnedRecipes, loaded: Sequence[Loaded]) -> None:
    for moved in find_moved(one for one in loaded if not one.name.is_fixed):
        for recipe in pinned.recipes:
            if recipe.run.grid == moved.grid and moved.concerns(recipe.run.name):
                pinned.warnings.append((moved.describe(), recipe.run.full_name))
