"""Selects the recipes that a command applies to: files, folders, globs and run directories,
filtered by axis values.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from runner.errors import (
    CorruptFileError,
    Problem,
    RecipeError,
    RefusedError,
    RunnerError,
    put_in_words,
)
from runner.files import hash_json
from runner.plan.names import RECIPES_DIR, Prefer, find_named
from runner.plan.variants import find_same_run, load_variant, refuse_repeated
from runner.project_folder import is_project
from runner.recipe.habits import find_answer
from runner.recipe.identity import build_digest_payload, diff_payloads
from runner.recipe.parse import Recipe, load_recipe
from runner.run.facts import Found, Part, RunFacts, read_facts, read_stored_recipe
from runner.run.failures import UNREADABLE_HINT
from runner.run.paths import RunPaths, is_run_dir, is_without_recipe
from runner.run.record import StoredRecipe


@dataclass(frozen=True)
class Selected:
    """One recipe, the file it came from, and the files of its run."""

    recipe: Recipe
    source_path: Path
    paths: RunPaths
    # The parts of the run directory read to select it.
    known: Mapping[Part, Found] = field(default_factory=dict, compare=False, repr=False)
    # From the command line: the overrides that changed the recipe, and those that changed nothing.
    overrides: tuple[str, ...] = ()
    idle_overrides: tuple[str, ...] = ()
    # True if the run was named under another spelling of its overrides.
    is_respelled: bool = False

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return self.recipe.run.full_name

    def read_facts(self, *, with_samples: bool = False) -> RunFacts:
        """The current content of the run directory."""
        return read_facts(self.paths, self.known, with_samples=with_samples)


@dataclass(frozen=True)
class QueuedRun:
    """A run that a cluster has a task for."""

    task: str  # its usual name, such as `slurm 17_3`
    cancel: str  # the command that removes it from the queue
    state: str  # as the queue reports it, with its reason if there is one
    recipe_path: Path  # as it was submitted

    def find_differences(self, selected: Selected) -> list[str]:
        """The differences that make the recipe a different experiment from the submitted one."""
        submitted = load_recipe(self.recipe_path)
        return diff_payloads(build_digest_payload(submitted), build_digest_payload(selected.recipe))


@dataclass(frozen=True)
class UnreadableRun:
    """A run directory whose `recipe.json` does not show which run it is."""

    paths: RunPaths
    why: str

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`, from the folder names."""
        return f"{self.paths.run_dir.parent.name}/{self.paths.run_dir.name}"


def select_recipes(
    arguments: Sequence[str],
    output_root: Path,
    where: Sequence[str] = (),
    unreadable: list[UnreadableRun] | None = None,
    *,
    load: Callable[[Path], Recipe] = load_recipe,
    prefer: Prefer = "recipe",
    overrides: Sequence[str] = (),
) -> list[Selected]:
    """Every recipe that the arguments name, in order and without repeats, with overrides applied,
    if its axes match `where`.

    Run directories that cannot be read are added to `unreadable`, unless their recipe is also
    named. `load` reads a recipe file; `prefer` decides the meaning of a bare name.

    Raises:
        RunnerError: an argument names nothing, a recipe is wrong (all of them are listed), or
            `where` matches nothing; without `unreadable`, also a run directory that cannot be read.
    """
    refuse_repeated(overrides)
    damaged: list[UnreadableRun] = []
    found: dict[Path, Selected] = {}
    errors: list[RecipeError] = []
    paths = _expand(arguments, output_root, prefer)
    if where and overrides and (narrowed := _narrow(paths, output_root, load, where)) is not None:
        paths, where = narrowed, ()  # overrides need to fit only these
    for path in paths:
        # A run whose recipe was also named: the recipe says more, and it shows a damaged run too.
        if unreadable is not None and path.is_dir() and _locate(path) in found:
            continue
        try:
            selected = _load_selected(path, output_root, load, overrides)
        except RecipeError as error:
            errors.append(error)
            continue
        except (CorruptFileError, OSError) as error:
            if unreadable is None or not path.is_dir():
                raise
            damaged.append(UnreadableRun(RunPaths(path), put_in_words(error)))
            continue
        other = found.setdefault(_locate(selected.paths.run_dir), selected)
        if path.is_dir():  # a run directory: its recipe file, if also named, says more
            continue
        if other.source_path != path and _locate(other.source_path) != _locate(path):
            raise RefusedError(
                f"{other.source_path} and {path} are both named {selected.recipe.run.name!r} in the"
                f" grid {selected.recipe.run.grid!r}, so they would share a run directory",
                hint="give one of them another `run.name`",
            )
    if errors:
        raise combine_errors(errors)
    if unreadable is not None:
        unreadable += [one for one in damaged if _locate(one.paths.run_dir) not in found]
    matching = _match_axes(list(found.values()), where)
    if overrides:
        _refuse_equal_variants(matching)
    return matching


def _narrow(
    paths: Sequence[Path],
    output_root: Path,
    load: Callable[[Path], Recipe],
    where: Sequence[str],
) -> list[Path] | None:
    """The paths whose recipes, without overrides, match `where`; None if a recipe is wrong without
    them.
    """
    try:
        plain = [_load_selected(path, output_root, load, ()) for path in paths]
    except (RunnerError, OSError):
        return None
    return [one.source_path for one in _match_axes(plain, where)]


def require_any(selected: Sequence[Selected], unreadable: Sequence[UnreadableRun]) -> None:
    """Raise CorruptFileError if all selected runs are unreadable."""
    if unreadable and not selected:
        first, num_others = unreadable[0], len(unreadable) - 1
        more = f"; likewise {num_others} more" if num_others else ""
        raise CorruptFileError(
            f"{first.full_name} is unreadable: {first.why}{more}", hint=UNREADABLE_HINT
        )


def load_selected(
    path: Path,
    output_root: Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    *,
    load: Callable[[Path], Recipe] = load_recipe,
) -> Selected:
    """The run of a recipe file with overrides and, optionally, its own name."""
    recipe, kept = load_variant(path, overrides, name, load=load)
    idle = tuple(one for one in dict.fromkeys(overrides) if one not in kept)
    paths = run_paths(recipe, output_root)
    is_respelled = False
    if kept and name is None and not paths.run_dir.exists():
        base = load_recipe(path, overrides).run.name
        same = find_same_run(recipe, base, paths.run_dir.parent)
        if same is not None:
            named = {"name": same.run.name, "overrides": same.run.overrides}
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=named)})
            paths, is_respelled = run_paths(recipe, output_root), True
    return Selected(
        recipe, path, paths, overrides=kept, idle_overrides=idle, is_respelled=is_respelled
    )


def _refuse_equal_variants(selected: Sequence[Selected]) -> None:
    seen: dict[str, Selected] = {}
    for one in selected:
        other = seen.setdefault(hash_json(build_digest_payload(one.recipe)), one)
        if one.recipe.run.axes != other.recipe.run.axes and _differs_as_written(one, other):
            words = " ".join(one.overrides or other.overrides)
            raise RefusedError(
                f"{words!r} makes {other.source_path} and {one.source_path} the same experiment,"
                " which would run twice",
                hint="name one of them, or leave out the override that makes them equal",
            )


def _differs_as_written(one: Selected, other: Selected) -> bool:
    first, second = (build_digest_payload(load_recipe(it.source_path)) for it in (one, other))
    return first != second


def combine_errors(errors: Sequence[RecipeError]) -> RunnerError:
    """One error that lists the problems of several files; problems with overrides that files share
    are printed once.
    """
    if len(errors) == 1:
        return errors[0]
    hints = list(dict.fromkeys(error.hint for error in errors if error.hint))
    texts: list[str] = []
    of_overrides: dict[tuple[Problem, ...], list[RecipeError]] = {}
    for error in errors:
        if all(problem.line is None for problem in error.problems):
            of_overrides.setdefault(error.problems, []).append(error)
        else:
            texts.append(error.message)
    for first, *others in of_overrides.values():
        same = f"\n  the same in {len(others)} more, such as {others[0].where}" if others else ""
        texts.append(f"{first.message}{same}")
    return RunnerError(
        f"{len(errors)} recipes have problems\n\n" + "\n\n".join(texts),
        hint="\n      ".join(hints) or None,
    )


def run_paths(recipe: Recipe, output_root: Path) -> RunPaths:
    """`runs/<grid>/<run name>`."""
    return RunPaths(output_root / recipe.run.grid / recipe.run.name)


def _expand(arguments: Sequence[str], output_root: Path, prefer: Prefer) -> list[Path]:
    paths: list[Path] = []
    for argument in arguments:
        named = find_named(argument, output_root, prefer)
        files = [file for one in named for file in expand_folder(one)]
        if not files:
            is_unrendered = any(map(is_project, named))
            raise RunnerError(
                f"no recipe, run or grid is named {argument!r}: that folder has neither recipes nor"
                " run directories (folders with a recipe.json)",
                hint=(
                    "runner render"
                    if is_unrendered
                    else "give recipe files, folders of them, or globs, such as recipes/demo"
                ),
            )
        paths += files
    return paths


def expand_folder(path: Path) -> list[Path]:
    """The recipes in a folder, otherwise the run directories in it. Hidden folders are left out,
    because they were moved aside. The recipes of a project are those in its `recipes/`.
    """
    if not path.is_dir() or is_run_dir(path):
        return [path]
    if is_project(path):  # whose other files are templates, model cards and launch configs
        recipes = path / RECIPES_DIR
        found = expand_folder(recipes) if recipes.is_dir() else []
        return found or [folder for folder in _walk(path) if is_run_dir(folder)]
    folders = list(_walk(path))
    files = [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
    return files or [folder for folder in folders if is_run_dir(folder)]


def _walk(folder: Path) -> Iterator[Path]:
    """A folder and everything below it, in order, except hidden folders and the insides of run
    directories.
    """
    yield folder
    if not is_run_dir(folder):
        for child in sorted(
            child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
        ):
            yield from _walk(child)


def _locate(path: Path) -> Path:
    """The resolved path; a link to itself is used as it is."""
    return Path(os.path.realpath(path))


def _load_selected(
    path: Path, output_root: Path, load: Callable[[Path], Recipe], overrides: Sequence[str]
) -> Selected:
    if path.is_dir() and (path.suffix != ".yaml" or is_run_dir(path)):
        if overrides:
            raise RefusedError(
                f"{path} is a run directory: overrides such as {overrides[0]!r} apply only to"
                " recipe files"
            )
        paths = RunPaths(path)
        if is_without_recipe(path):
            raise CorruptFileError(
                f"{paths.recipe_path} is missing, but there are other files of a run"
            )
        found = read_stored_recipe(paths)
        stored: StoredRecipe | None = found.get()
        if stored is None:
            raise RefusedError(f"{path} is no longer a run directory: its recipe.json is gone")
        return Selected(stored.recipe, path, paths, {"recipe": found})
    return load_selected(path, output_root, overrides, load=load)


def _match_axes(selected: list[Selected], where: Sequence[str]) -> list[Selected]:
    """The recipes that meet every condition of a command line."""
    conditions = []
    for condition in where:
        name, equals, values = condition.partition("=")
        if not equals or not values:
            raise RunnerError(f"`--where {condition}` is not of the form axis=value[,value]")
        conditions.append((name, values.split(",")))
    return match_axes(selected, conditions, " and ".join(where))


def match_axes(
    selected: list[Selected], conditions: Iterable[tuple[str, Sequence[str]]], text: str
) -> list[Selected]:
    """The recipes that have one of the values of each named axis.

    Names and values are looked up among everything that was selected; `text` shows the conditions
    in an error.

    Raises:
        RunnerError: no such axis or value, or no recipe meets all conditions.
    """
    matching = selected
    for name, wanted in conditions:
        axis = find_axis(name, (axis for one in selected for axis in one.recipe.run.axes))
        known = [one.recipe.run.axes[axis] for one in selected if axis in one.recipe.run.axes]
        for value in wanted:
            if not any(is_value(value, one) for one in known):
                labels = dict.fromkeys(map(label_value, known))
                raise RunnerError(
                    f"the axis {axis!r} has no value {value!r}",
                    hint=f"its values are {', '.join(labels)}",
                )
        matching = [
            one
            for one in matching
            if axis in one.recipe.run.axes
            and any(is_value(value, one.recipe.run.axes[axis]) for value in wanted)
        ]
    if selected and not matching:
        raise RunnerError(
            f"no selected recipe has all of {text}",
            hint=(
                "a recipe must meet every condition;"
                " to accept several values of one axis: --where axis=value,value"
            ),
        )
    return matching


def find_axis(name: str, known: Iterable[str]) -> str:
    """The axis of that name. The last parts of a dotted axis are enough; so is a dotted name that
    ends in the axis.

    >>> find_axis("learning_rate", ["training.learning_rate"])
    'training.learning_rate'

    Raises:
        RunnerError: there is none, or there are several.
    """
    axes = list(dict.fromkeys(known))
    if name in axes:
        return name
    close = [one for one in axes if one.endswith(f".{name}") or name.endswith(f".{one}")]
    if len(close) == 1:
        return close[0]
    if close:
        raise RunnerError(
            f"{name!r} could be any of the axes {', '.join(close)}", hint="name one in full"
        )
    answer = find_answer(name, None, Recipe)
    meant = answer.overrides[0].partition("=")[0] if answer and answer.overrides else name
    same = [one for one in axes if meant == one or meant.endswith(f".{one}")]
    close = same or difflib.get_close_matches(name, axes, n=1)
    guess = f"did you mean `--where {close[0]}=...`? " if close else ""
    known_axes = f"the axes are {', '.join(axes)}" if axes else "they have no axes"
    raise RunnerError(f"no selected recipe has the axis {name!r}", hint=f"{guess}{known_axes}")


def is_value(text: str, value: Any) -> bool:
    """True if `text`, as typed on a command line, means the value of an axis. Numbers are compared
    by value, everything else by spelling.

    >>> is_value("1e-3", 0.001), is_value("0.0010", 1e-3), is_value("1", True), is_value("01", "1")
    (True, True, False, False)
    """
    if text == label_value(value):
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        number = Decimal(text)
    except InvalidOperation:
        return False
    return number.is_finite() and number == Decimal(str(value))


def label_value(value: object) -> str:
    """An axis value as a user types it on a command line, and as YAML has it.

    >>> label_value(True), label_value(None), label_value(1e-3)
    ('true', 'null', '0.001')
    """
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
