"""Resolves names given on a command line: paths, and the names of runs and grids.

Names are looked up only in `recipes/` and in the output root. Nothing is loaded.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from runner.errors import RunnerError
from runner.project_folder import describe_no_project
from runner.run.paths import RunPaths, is_run_dir

RECIPES_DIR: Final = Path("recipes")
MAX_NAMED: Final = 8  # of the meanings of one name, and of the existing grids
_MAX_NAME_BYTES: Final = 250  # of a file, without `.yaml`
# For a name that has both a recipe and a run directory: which one, or both.
Prefer = Literal["recipe", "run", "both"]


def find_named(
    text: str, output_root: Path, prefer: Prefer = "recipe", grid: str | None = None
) -> list[Path]:
    """The paths that an argument refers to: itself, its matches as a glob, or the recipe and the
    run directory of the grid (`<grid>`) or run (`<grid>/<run name>`, `<run name>`) of that name.

    A bare name is looked up in `grid`. If a run directory does not exist or holds no recipe, its
    recipe is used.

    Raises:
        RunnerError: there is no such path or name, or several have that name.
    """
    if not text:  # as of a shell variable that is not set; `Path("")` would be the whole project
        raise RunnerError(
            "an empty argument names no recipe, run or grid",
            hint="`runner status` lists the runs; `.` names everything in the current folder",
        )
    path = Path(text)
    found = [path] if os.path.exists(path) else []
    found = found or [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    if found and not _is_folder_without_recipes(path):
        return found
    meanings = list(_list_meanings(path, output_root, grid))
    if len(meanings) > 1 and not found:
        shown = [str(_choose(one, prefer)[0]) for one in meanings]
        more = f" and {len(shown) - MAX_NAMED} more" if len(shown) > MAX_NAMED else ""
        raise RunnerError(
            f"{text!r} is the name of {len(shown)} runs or grids:"
            f" {', '.join(shown[:MAX_NAMED])}{more}",
            hint=f"name one of them: {shown[0]}",
        )
    if len(meanings) == 1:
        return _choose(meanings[0], prefer)
    if found:
        return found
    what = f"no recipe, run or grid is named {text!r}"
    is_nothing_here = not RECIPES_DIR.is_dir() and not output_root.is_dir()
    if is_nothing_here and (nowhere := describe_no_project()) is not None:
        raise RunnerError(
            f"{what}; {nowhere}",
            hint="`cd` into the project's folder, or create one with `runner init DIR`",
        )
    raise RunnerError(what, hint=_suggest_names(path, output_root))


def find_one(text: str, output_root: Path, prefer: Prefer, grid: str | None = None) -> Path:
    """Like `find_named`, for verbs that accept one path.

    Raises:
        RunnerError: as there; also for a glob that matches several.
    """
    found = find_named(text, output_root, prefer, grid)
    if len(found) > 1:
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise RunnerError(
            f"{text!r} names {len(found)} recipes or runs:"
            f" {', '.join(map(str, found[:MAX_NAMED]))}{more}",
            hint=f"name one of them: {found[0]}",
        )
    return found[0]


def _is_folder_without_recipes(path: Path) -> bool:
    if not os.path.isdir(path):
        return False
    wanted = {RunPaths(path).recipe_path.name, RunPaths(path).record_path.name}
    return not any(
        name in wanted or name.endswith(".yaml") for _, _, names in os.walk(path) for name in names
    )


# The recipe and the run directory of one run, or the folders of one grid; None: missing.
_Meaning = tuple[Path | None, Path | None]


def _choose(meaning: _Meaning, prefer: Prefer) -> list[Path]:
    recipe, run = meaning
    both = [one for one in ((run, recipe) if prefer == "run" else (recipe, run)) if one is not None]
    return both if prefer == "both" else both[:1]


def _list_meanings(path: Path, output_root: Path, grid: str | None) -> Iterator[_Meaning]:
    """The possible meanings of the path as a name; empty if it leads elsewhere."""
    is_of_recipes, name = False, path
    if path.is_relative_to(RECIPES_DIR):
        is_of_recipes, name = True, path.relative_to(RECIPES_DIR)
    elif path.is_relative_to(output_root):
        name = path.relative_to(output_root)
    parts = name.parts
    is_bare = name == path
    if name.is_absolute() or any(part.startswith(".") for part in parts):
        return
    if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in parts):  # pathlib raises for it
        return
    if len(parts) == 1 and grid is None:
        folders = [RECIPES_DIR / name, output_root / name]
        recipe, run = (folder if os.path.isdir(folder) else None for folder in folders)
        if recipe or run:
            yield recipe, run
    if len(parts) == 2 or (len(parts) == 1 and is_bare):
        folder = parts[0] if len(parts) == 2 else grid or "*"
        found = _list_runs(output_root, folder if folder == "*" else glob.escape(folder), parts[-1])
        for recipe, run in found:
            # A missing recipe file is not replaced by an old run.
            if recipe is not None or not is_of_recipes:
                yield recipe, run


def _list_runs(output_root: Path, grids: str, name: str) -> Iterator[_Meaning]:
    stem = glob.escape(name.removesuffix(".yaml"))
    recipes = {(one.parent.name, one.stem): one for one in RECIPES_DIR.glob(f"{grids}/{stem}.yaml")}
    runs = {
        (one.parent.name, one.name): one
        for one in output_root.glob(f"{grids}/{glob.escape(name)}")
        if is_run_dir(one)
    }
    for key in sorted({*recipes, *runs}):
        if not key[0].startswith("."):  # those were moved aside
            yield recipes.get(key), runs.get(key)


def _suggest_names(path: Path, output_root: Path) -> str:
    """A hint for an unknown name: the closest known name, and the grids."""
    roots = [root for root in (RECIPES_DIR, output_root) if root.is_dir()]
    folders = [one for root in roots for one in root.iterdir() if one.is_dir()]
    grids = sorted({one.name for one in folders if not one.name.startswith(".")})
    runs = [(one.parent.name, one.stem) for one in RECIPES_DIR.glob("*/*.yaml")]
    runs += [
        (one.parent.parent.name, one.parent.name) for one in output_root.glob("*/*/recipe.json")
    ]
    known = [*_list_siblings(path), *grids]
    known += [f"{grid}/{name}" if len(path.parts) == 2 else name for grid, name in runs]
    close = [
        one
        for one in difflib.get_close_matches(str(path), dict.fromkeys(known), n=MAX_NAMED)
        # Two names in one folder share that much anyway.
        if difflib.get_close_matches(path.stem, [Path(one).stem])
    ]
    if close:
        return f"did you mean {close[0]}? `runner status` lists the runs"
    if not grids:
        return "give recipe files, folders of them, or globs, such as recipes/demo"
    shown = ", ".join(grids[:MAX_NAMED]) + (", ..." if len(grids) > MAX_NAMED else "")
    return (
        "give recipe files, folders, globs, or names of runs and grids:"
        f" the grid{' is' if len(grids) == 1 else 's are'} {shown};"
        " `runner status` lists the runs"
    )


def _list_siblings(path: Path) -> list[str]:
    if not os.path.isdir(path.parent):
        return []
    return [str(one) for one in path.parent.glob("*") if one != path]
