"""Variants of recipes: what overrides on a command line make of them, and the names of their
runs.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from runner.errors import RecipeError
from runner.files import hash_json
from runner.recipe.parse import Recipe, load_recipe

_PLAIN_OVERRIDE: Final = re.compile(r"[A-Za-z0-9_.]+=[A-Za-z0-9._]+(-[A-Za-z0-9._]+)*")
_OVERRIDE: Final = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*=.*", re.DOTALL)


def is_override(word: str) -> bool:
    """True for `key=value` where no file is called that, or matches it as a glob.

    >>> [is_override(word) for word in ("training.seed=1", "loss=", "recipes/a=b.yaml", "-x=1")]
    [True, True, False, False]
    """
    if _OVERRIDE.fullmatch(word) is None or os.path.exists(word):
        return False
    return next(glob.iglob(word), None) is None


def name_overridden(name: str, overrides: Sequence[str]) -> str:
    """The name of a run that differs from its recipe by overrides.

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
    """The recipe of the run that overrides make of a recipe file, and those of them that change
    something.

    Only these are in its name, so that without any it is the run of the recipe itself. `name` is
    given to it instead. `load` reads the file as it is.

    Raises:
        RecipeError: the recipe is wrong under its overrides.
    """
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


def _says_the_same(path: Path, overrides: Sequence[str], recipe: Recipe) -> bool:
    """True where the overrides make the same recipe, not only the same experiment."""
    try:
        other = load_recipe(path, overrides)
    except RecipeError:  # keys that go together
        return False
    return bool(_dump(other) == _dump(recipe))


def _dump(recipe: Recipe) -> Any:
    return recipe.model_dump(mode="json")
