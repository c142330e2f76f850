"""Variants of recipes: the recipes that overrides on a command line produce, and the names of their
runs.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from runner.errors import RecipeError, RefusedError
from runner.files import hash_json
from runner.recipe.identity import build_digest_payload
from runner.recipe.parse import Recipe, load_recipe
from runner.run.facts import read_stored_recipe
from runner.run.paths import RunPaths
from runner.run.record import StoredRecipe

_PLAIN_OVERRIDE: Final = re.compile(r"[A-Za-z0-9_.]+=[A-Za-z0-9._]+(-[A-Za-z0-9._]+)*")
_OVERRIDE: Final = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*=.*", re.DOTALL)


def is_override(word: str) -> bool:
    """True for `key=value` unless a file has that name or matches it as a glob.

    >>> [is_override(word) for word in ("training.seed=1", "loss=", "recipes/a=b.yaml", "-x=1")]
    [True, True, False, False]
    """
    if _OVERRIDE.fullmatch(word) is None or os.path.exists(word):
        return False
    return next(glob.iglob(word), None) is None


def name_overridden(name: str, overrides: Sequence[str]) -> str:
    """The name of a run whose recipe is changed by overrides.

    >>> name_overridden("gemma_full", ["training.learning_rate=1e-4"])
    'gemma_full--training.learning_rate-1e-4'
    """
    if not overrides:
        return name
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "--".join(overrides)).strip("-")
    full = f"{name}--{slug}"
    is_readable_back = (
        all(_PLAIN_OVERRIDE.fullmatch(override) for override in overrides) and len(full) <= 150
    )
    return full if is_readable_back else f"{full[:130]}--{hash_json(list(overrides))[:12]}"


def load_variant(
    path: Path,
    overrides: Sequence[str],
    name: str | None = None,
    *,
    load: Callable[[Path], Recipe] = load_recipe,
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of a recipe file under overrides, and the overrides that change something.

    Only these are in the run's name, so without any it is the run of the recipe itself. `name`
    replaces the derived name. `load` reads the file without overrides.

    Raises:
        RecipeError: the recipe is wrong under its overrides.
        RefusedError: two of them set the same key.
    """
    refuse_repeated(overrides)
    if not overrides and name is None:
        return load(path), ()
    recipe = load_recipe(path, overrides)
    kept = list(overrides)
    for override in overrides:
        others = list(kept)
        others.remove(override)
        if _says_the_same(path, others, recipe):
            kept = others
    own = recipe.run
    run = own.model_copy(
        update={
            "name": name or name_overridden(own.name, kept),
            "overrides": (*own.overrides, *kept),
        }
    )
    return recipe.model_copy(update={"run": run}), tuple(kept)


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Refuse two overrides of one key, because only the later one would count."""
    given: dict[str, list[str]] = {}
    for override in overrides:
        given.setdefault(override.partition("=")[0], []).append(override)
    for key, those in given.items():
        if len(those) > 1:
            often = "twice" if len(those) == 2 else f"{len(those)} times"
            raise RefusedError(
                f"{key} is given {often}: {', '.join(those)}",
                hint="give each key once; for several values, use several commands or an axis",
            )


def find_same_run(recipe: Recipe, base: str, grid_dir: Path) -> Recipe | None:
    """The recorded recipe of a variant of the run `base` that is the same experiment under another
    spelling of its overrides; None if there is none.

    If overrides set keys that are not part of the experiment, such as a micro-batch, their values
    must be equal too.
    """
    payload = build_digest_payload(recipe)
    for path in sorted(grid_dir.glob(f"{glob.escape(base)}--*/recipe.json")):
        found = read_stored_recipe(RunPaths(path.parent))
        stored: StoredRecipe | None = found.content  # an unreadable one does not count
        if stored is None or not stored.recipe.run.overrides:
            continue
        other, own = stored.recipe.run, recipe.run
        if (other.grid, other.name) != (own.grid, path.parent.name):
            continue
        keys = {one.partition("=")[0] for one in (*own.overrides, *other.overrides)}
        if build_digest_payload(stored.recipe) == payload and all(
            _find_value(stored.recipe, key) == _find_value(recipe, key) for key in keys
        ):
            return stored.recipe
    return None


def _find_value(recipe: Recipe, key: str) -> Any:
    value = _dump(recipe)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _says_the_same(path: Path, overrides: Sequence[str], recipe: Recipe) -> bool:
    """True if the overrides produce the same recipe, not only the same experiment."""
    try:
        other = load_recipe(path, overrides)
    except RecipeError:  # keys that depend on each other
        return False
    return bool(_dump(other) == _dump(recipe))


def _dump(recipe: Recipe) -> Any:
    return recipe.model_dump(mode="json")
