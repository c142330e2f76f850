"""Selected runs as read for the verbs that start nothing: their facts and states, and what is told
of them on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError, RunnerError, escape_controls
from runner.plan.select import Selected, UnreadableRun, select_recipes, suggest_path
from runner.plan.status import RunStatus, read_status, verify_records
from runner.recipe.cache import RecipeCache
from runner.recipe.contents import KnownContents, list_contents
from runner.recipe.parse import Recipe
from runner.run.base_scores import find_other_base_scores
from runner.run.facts import RunFacts
from runner.run.paths import RunPaths, find_output_root, recipe_cache_path
from runner.run.siblings import Loaded, find_moved, list_loaded

ReadRun = tuple[Recipe, RunFacts, RunStatus]
MAX_NAMED: Final = 8  # runs of one name in an error


def select(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    unreadable: list[UnreadableRun] | None = None,
) -> list[Selected]:
    """As `select_recipes`, by the cache: for verbs that start nothing and change no run."""
    cache = RecipeCache(recipe_cache_path(arguments.output_root))
    selected = select_recipes(
        paths, arguments.output_root, arguments.where, unreadable, load=cache.load
    )
    cache.save()
    return selected


def select_anew(arguments: argparse.Namespace, paths: Sequence[str]) -> list[Selected]:
    """As `select_recipes`, each recipe parsed."""
    return select_recipes(paths, arguments.output_root, arguments.where)


def read_runs(selected: Iterable[Selected], known: KnownContents) -> list[ReadRun]:
    """Recipe, facts with samples, and state of each run, hashing nothing but `result.json` and
    `recipe.json`, whose numbers and axes are shown.

    Of a run directory that is named itself the numbers are asked for, whatever became of the files
    that its recipe names.
    """
    runs = []
    for one in selected:
        facts = one.read_facts(with_samples=True)
        is_named_itself = one.source_path == one.paths.run_dir
        contents = {} if is_named_itself else known.find(list_contents(one.recipe))
        status = verify_records(facts, read_status(facts, one.recipe, contents))
        runs.append((one.recipe, facts, status))
    return runs


def find_grid(text: str, output_root: Path) -> str:
    """A path as it is, or the folder of the runs of a grid of that name, or that of its recipes.

    Raises:
        RunnerError: there is no such path and no such grid.
    """
    for folder in (Path(text), output_root / text, Path("recipes") / text):
        if folder.exists():
            return str(folder)
    roots = [root for root in (output_root, Path("recipes")) if root.is_dir()]
    names = {one.name for root in roots for one in root.iterdir() if one.is_dir()}
    grids = sorted(name for name in names if not name.startswith("."))
    raise RunnerError(
        f"there is no grid {text!r}", hint=f"the grids are {', '.join(grids)}" if grids else None
    )


def find_run(text: str, output_root: Path, grid: str | None = None, *, more: str = "") -> str:
    """The path of one run: a path as it is, or the run directory that `<grid>/<run name>` or the
    name alone stands for, or else its recipe. So is a run directory that is not there, or holds no
    recipe. `more` is named in the hint besides runs.

    Raises:
        RunnerError: there is no such run, or there are several.
    """
    path = Path(text)
    name = glob.escape(path.name)
    pattern = path.parent.name or grid or "*"
    pattern = pattern if pattern == "*" else glob.escape(pattern)
    recipes = sorted(map(str, Path("recipes").glob(f"{pattern}/{name}.yaml")))
    if path.exists():
        is_without_recipe = (
            path.is_dir()
            and len(recipes) == 1
            and not any(path.rglob(RunPaths(path).recipe_path.name))
        )
        return recipes[0] if is_without_recipe else text
    found = [
        str(one)
        for one in sorted(output_root.glob(f"{pattern}/{name}"))
        if RunPaths(one).recipe_path.exists()
    ]
    found = found or recipes
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(found[:MAX_NAMED]) + (", ..." if len(found) > MAX_NAMED else "")
        raise RunnerError(
            f"{text!r} is the name of {len(found)} runs: {names}",
            hint=f"name one of them: {found[0]}",
        )
    close = suggest_path(path)
    raise RunnerError(
        f"there is no run {text!r} in {output_root} and no such recipe",
        hint=(f"{close} Else " if close.startswith("did you mean") else "")
        + f"name a recipe, a run directory such as runs/demo/gemma_060_full{more};"
        " `runner status` lists the runs",
    )


def warn_of_other_base_scores(selected: Sequence[Selected]) -> None:
    """On stderr, once for each output root: scores that a run kept for others and that another one
    does not compute.
    """
    for root in sorted({find_output_root(one.paths.run_dir) for one in selected}):
        for one in find_other_base_scores(root):
            print(f"warning: {one.describe()}", file=sys.stderr)


def warn_of_moved_names(facts: Iterable[RunFacts]) -> None:
    """On stderr: names on the hub that are not the same commit in all runs of a grid."""
    loaded: list[Loaded] = []
    for one in facts:
        with contextlib.suppress(CorruptFileError, OSError):  # its state says so
            if one.stored is not None:
                loaded += list_loaded(one.paths.run_dir, one.stored)
    for moved in find_moved(loaded):
        print(f"warning: {moved.describe()}", file=sys.stderr)


def warn_of_outdated(known: KnownContents) -> None:
    """On stderr: files that were touched since they were hashed."""
    for path in sorted(known.outdated):
        print(
            f"warning: {path} was touched since its content was last read, and is not read here:"
            " runs that name it may be *changed*, as `runner sweep ... --dry-run` tells",
            file=sys.stderr,
        )


def warn_of_unreadable(unreadable: Iterable[UnreadableRun]) -> None:
    """On stderr: runs that cannot be read, and the reasons."""
    for lost in unreadable:
        why = escape_controls(f"{lost.full_name} is unreadable: {lost.why}")
        print(f"warning: {why}", file=sys.stderr)
