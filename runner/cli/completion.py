"""Shell completion by argcomplete: verbs, options, paths, names of grids and runs, axes and their
values, and keys of recipes.

The shell starts `runner` with `_ARGCOMPLETE` set, and reads the completions from a separate
descriptor. Every Tab starts a process, so nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from argcomplete import autocomplete
from argcomplete.completers import FilesCompleter, SuppressCompleter

from runner.cli.arguments import build_parser
from runner.cli.shared_arguments import VerbParser
from runner.errors import RunnerError
from runner.plan.names import RECIPES_DIR
from runner.project_folder import TEMPLATES, entering, find_project_above, find_user_folder
from runner.run.paths import DEFAULT_OUTPUT_ROOT

Completer = Callable[..., Iterable[str]]
_files: Final = FilesCompleter()


def complete() -> None:
    """Answer the shell and end the process."""
    parser = build_parser()
    typed = os.environ.get("COMP_LINE", "").split()
    for verb, verb_parser in _list_verbs(parser):
        if verb in typed:
            verb_parser.add_late_options()
            for action in verb_parser._actions:
                completer = _find_completer(verb, action)
                if completer is not None:
                    action.completer = completer  # type: ignore[attr-defined]
    autocomplete(parser, always_complete_options=False, default_completer=SuppressCompleter())


def _list_verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, VerbParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _find_completer(verb: str, action: argparse.Action) -> Completer | None:
    """The completer of an argument; None leaves its choices to argcomplete."""
    if action.choices is not None or action.nargs == 0:
        return None
    if (verb, action.dest) in _BY_VERB:
        return _BY_VERB[verb, action.dest]
    if action.dest in _BY_NAME:
        return _BY_NAME[action.dest]
    return _files if action.type is Path else None


def _complete_paths(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterator[str]:
    """Paths, names of grids and, once something is typed, names of runs and keys of overrides."""
    yield from _files(prefix)
    with _in_project():
        root = _find_output_root(parsed_args)
        for grid in _list_grids(root):
            yield grid
            if prefix:
                for run in _list_runs(grid, root):
                    yield run
                    yield f"{grid}/{run}"
    if prefix and getattr(parsed_args, "takes_overrides", False):
        yield from _complete_override(prefix)


def _complete_override(prefix: str, **_: Any) -> Iterator[str]:
    """`key=value` with the keys of a recipe, and the choices of a key that has some."""
    from runner.recipe.keys import list_all_keys

    key, equals, _value = prefix.partition("=")
    for one in list_all_keys():
        if not equals:
            yield f"{one.path}="
        elif one.path == key:
            yield from (f"{key}={choice}" for choice in one.choices)


def _complete_key(prefix: str, **_: Any) -> Iterator[str]:
    from runner.recipe.keys import list_all_keys

    yield from (one.path for one in list_all_keys())


def _complete_grid(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterator[str]:
    with _in_project():
        yield from _list_grids(_find_output_root(parsed_args))


def _complete_axis(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterator[str]:
    yield from (axis for axis, _values in _load_axes(parsed_args).items())


def _complete_condition(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterator[str]:
    """`axis=value,value` with the axes and values of the recipes that are named."""
    axis, equals, values = prefix.partition("=")
    axes = _load_axes(parsed_args)
    if not equals:
        yield from (f"{one}=" for one in axes)
        return
    *typed, _last = values.split(",")
    for value in axes.get(axis, ()):
        if value not in typed:
            yield f"{axis}={','.join([*typed, value])}"


def _complete_stock_grid(prefix: str, **_: Any) -> Iterator[str]:
    from runner.grid.starter import find_stock_dir, list_stock_grids

    yield from list_stock_grids(find_stock_dir())


def _load_axes(parsed_args: argparse.Namespace) -> dict[str, list[str]]:
    """Axis -> values of the recipes that were typed so far, or of all."""
    from runner.plan.select import label_value, select_recipes
    from runner.recipe.cache import RecipeCache
    from runner.run.paths import recipe_cache_path

    grid = getattr(parsed_args, "grid", None)
    paths = getattr(parsed_args, "paths", None) or ([grid] if grid else [])
    here = Path.cwd()
    axes: dict[str, dict[str, None]] = {}
    with _in_project():
        root = _find_output_root(parsed_args)
        named = [str(here / path) if (here / path).exists() else path for path in paths]
        named = named or [str(folder) for folder in (RECIPES_DIR, root) if folder.is_dir()][:1]
        cache = RecipeCache(recipe_cache_path(root))
        try:
            # A damaged run among the others hides no axis.
            selected = select_recipes(named, root, unreadable=[], load=cache.load)
        except (RunnerError, OSError):
            return {}
    for one in selected:
        for axis, value in one.recipe.run.axes.items():
            axes.setdefault(axis, {})[label_value(value)] = None
    return {axis: list(values) for axis, values in axes.items()}


def _find_output_root(parsed_args: argparse.Namespace) -> Path:
    """The folder of runs that was typed, which is relative to the user's folder; else the project's
    own.
    """
    typed = getattr(parsed_args, "output_root", None)
    return DEFAULT_OUTPUT_ROOT if typed is None else (find_user_folder() or Path.cwd()) / typed


def _list_grids(root: Path) -> list[str]:
    found = [
        *(path.parent for path in Path(TEMPLATES).glob("*/grid.yaml")),
        *(path.parent for path in RECIPES_DIR.glob("*/*.yaml")),
        *(path.parent.parent for path in root.glob("*/*/recipe.json")),
    ]
    return sorted({path.name for path in found if not path.name.startswith(".")})


def _list_runs(grid: str, root: Path) -> list[str]:
    recipes = {path.stem for path in (RECIPES_DIR / grid).glob("*.yaml")}
    runs = {path.parent.name for path in (root / grid).glob("*/recipe.json")}
    return sorted(recipes | runs)


def _in_project() -> Any:
    here = Path.cwd()
    return entering(find_project_above(here) or here)


_BY_NAME: Final[dict[str, Completer]] = {
    "paths": _complete_paths,
    "recipe": _complete_paths,
    "run": _complete_paths,
    "run_dir": _complete_paths,
    "a": _complete_paths,
    "b": _complete_paths,
    "overrides": _complete_override,
    "where": _complete_condition,
    "grid": _complete_grid,
}
_BY_VERB: Final[dict[tuple[str, str], Completer]] = {
    ("init", "data"): _files,
    ("init", "models"): _files,
    ("init", "axes"): _complete_override,
    ("init", "from_grid"): _complete_stock_grid,
    ("compare", "axis"): _complete_axis,
    ("recipe", "key"): _complete_key,
}
