"""Selects the recipes that a command is about: files, folders, globs and run directories, narrowed
by axis values.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import CorruptFileError, RecipeError, RefusedError, RunnerError
from runner.recipe.identity import build_digest_payload, diff_payloads
from runner.recipe.parse import Recipe, load_recipe
from runner.run.facts import Found, Part, RunFacts, read_facts, read_stored_recipe
from runner.run.paths import RunPaths
from runner.run.record import StoredRecipe


@dataclass(frozen=True)
class Selected:
    """One recipe, the file it came from, and the files of its run."""

    recipe: Recipe
    source_path: Path
    paths: RunPaths
    # What was read of the run directory to select it.
    known: Mapping[Part, Found] = field(default_factory=dict, compare=False, repr=False)

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return self.recipe.run.full_name

    def read_facts(self, *, with_samples: bool = False) -> RunFacts:
        """What the run directory says now."""
        return read_facts(self.paths, self.known, with_samples=with_samples)


@dataclass(frozen=True)
class QueuedRun:
    """A run that a cluster has a task for."""

    task: str  # as people name it, such as `slurm 17_3`
    cancel: str  # the command that takes it out of the queue
    state: str  # as the queue says it, with its reason where there is one
    recipe_path: Path  # as it was submitted

    def find_differences(self, selected: Selected) -> list[str]:
        """What makes the recipe another experiment than the one that was submitted."""
        submitted = load_recipe(self.recipe_path)
        return diff_payloads(build_digest_payload(submitted), build_digest_payload(selected.recipe))


@dataclass(frozen=True)
class UnreadableRun:
    """A run directory whose `recipe.json` does not say which run it is."""

    paths: RunPaths
    why: str

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`, as the folders are named."""
        return f"{self.paths.run_dir.parent.name}/{self.paths.run_dir.name}"


def select_recipes(
    arguments: Sequence[str],
    output_root: Path,
    where: Sequence[str] = (),
    unreadable: list[UnreadableRun] | None = None,
    *,
    load: Callable[[Path], Recipe] = load_recipe,
) -> list[Selected]:
    """Every recipe that the arguments name, in order and each once, whose axes match `where`.

    Run directories that cannot be read go to `unreadable`, unless a recipe of theirs is named too.
    `load` reads a recipe file.

    Raises:
        RunnerError: an argument names nothing, a recipe is wrong (all of them are listed), or
            `where` matches nothing; without `unreadable`, also a run directory that cannot be read.
    """
    damaged: list[UnreadableRun] = []
    found: dict[Path, Selected] = {}
    errors: list[RecipeError] = []
    for path in _expand(arguments):
        # A run whose recipe was named too: the recipe says more, and a damaged run is shown by it.
        if unreadable is not None and path.is_dir() and path.resolve() in found:
            continue
        try:
            selected = _load_selected(path, output_root, load)
        except RecipeError as error:
            errors.append(error)
            continue
        except (CorruptFileError, OSError) as error:
            if unreadable is None or not path.is_dir():
                raise
            why = error.message if isinstance(error, CorruptFileError) else str(error)
            damaged.append(UnreadableRun(RunPaths(path), why))
            continue
        other = found.setdefault(selected.paths.run_dir.resolve(), selected)
        if path.is_dir():  # a run directory: its recipe file, where one was named too, says more
            continue
        if other.source_path != path and other.source_path.resolve() != path.resolve():
            raise RefusedError(
                f"{other.source_path} and {path} are both named {selected.recipe.run.name!r} in the"
                f" grid {selected.recipe.run.grid!r}, so they would share a run directory",
                hint="give one of them another `run.name`",
            )
    if errors:
        raise combine_errors(errors)
    if unreadable is not None:
        unreadable += [one for one in damaged if one.paths.run_dir.resolve() not in found]
    return _match_axes(list(found.values()), where)


def combine_errors(errors: Sequence[RecipeError]) -> RunnerError:
    """One error that prints all of several files."""
    if len(errors) == 1:
        return errors[0]
    hints = list(dict.fromkeys(error.hint for error in errors if error.hint))
    text = "\n\n".join(error.message for error in errors)
    return RunnerError(
        f"{len(errors)} recipes have problems\n\n{text}", hint="\n      ".join(hints) or None
    )


def run_paths(recipe: Recipe, output_root: Path) -> RunPaths:
    """`runs/<grid>/<run name>`."""
    return RunPaths(output_root / recipe.run.grid / recipe.run.name)


def _expand(arguments: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        named = (
            [path]
            if path.exists()
            else [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
        )
        files = [file for one in named for file in expand_folder(one)]
        if not files:
            raise RunnerError(f"{argument!r} names no recipe", hint=suggest_path(path))
        paths += files
    return paths


def expand_folder(path: Path) -> list[Path]:
    """The recipes in a folder, else the run directories in it; without hidden ones: those were
    moved aside.
    """
    if not path.is_dir() or RunPaths(path).recipe_path.exists():
        return [path]
    folders = list(_walk(path))
    files = [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
    return files or [folder for folder in folders if RunPaths(folder).recipe_path.exists()]


def _walk(folder: Path) -> Iterator[Path]:
    """A folder and all below it, in order, but for hidden ones and the insides of run
    directories.
    """
    yield folder
    if not RunPaths(folder).recipe_path.exists():
        for child in sorted(
            child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
        ):
            yield from _walk(child)


def suggest_path(path: Path) -> str:
    """A hint for a path that is not there."""
    siblings = [str(sibling) for sibling in path.parent.glob("*")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), siblings, n=1)
    return (
        f"did you mean {close[0]}?"
        if close
        else "give recipe files, folders of them, or globs, such as recipes/demo"
    )


def _load_selected(path: Path, output_root: Path, load: Callable[[Path], Recipe]) -> Selected:
    if path.is_dir():
        paths = RunPaths(path)
        found = read_stored_recipe(paths)
        stored: StoredRecipe | None = found.get()
        if stored is None:
            raise RefusedError(f"{path} is no longer a run directory: its recipe.json is gone")
        return Selected(stored.recipe, path, paths, {"recipe": found})
    recipe = load(path)
    return Selected(recipe, path, run_paths(recipe, output_root))


def _match_axes(selected: list[Selected], where: Sequence[str]) -> list[Selected]:
    """The recipes that meet every condition; names and values are looked up among all that were
    selected.
    """
    matching = selected
    for condition in where:
        axis, equals, values = condition.partition("=")
        if not equals or not values:
            raise RunnerError(f"`--where {condition}` is not of the form axis=value[,value]")
        known = list(
            dict.fromkeys(
                label_value(one.recipe.run.axes.get(axis))
                for one in selected
                if axis in one.recipe.run.axes
            )
        )
        if not known:
            axes = list(dict.fromkeys(name for one in selected for name in one.recipe.run.axes))
            raise RunnerError(
                f"no selected recipe has the axis {axis!r}", hint=f"the axes are {', '.join(axes)}"
            )
        wanted = values.split(",")
        if unknown := [value for value in wanted if value not in known]:
            raise RunnerError(
                f"the axis {axis!r} has no value {unknown[0]!r}",
                hint=f"its values are {', '.join(known)}",
            )
        matching = [one for one in matching if label_value(one.recipe.run.axes.get(axis)) in wanted]
    if selected and not matching:
        raise RunnerError(
            f"no selected recipe has all of {' and '.join(where)}",
            hint=(
                "conditions narrow each other down;"
                " values of one axis are alternatives: --where axis=value,value"
            ),
        )
    return matching


def label_value(value: object) -> str:
    """An axis value as it is typed on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
