"""Reads the selected runs for the verbs that start nothing: their facts and states. Also prints
notes and warnings about them to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from runner.errors import CorruptFileError, escape_controls
from runner.plan.names import RECIPES_DIR, Prefer
from runner.plan.select import Selected, UnreadableRun, require_any, select_recipes
from runner.project_folder import TEMPLATES
from runner.recipe.cache import RecipeCache
from runner.recipe.contents import KnownContents
from runner.run.allowed_code import spell_command
from runner.run.base_scores import find_other_base_scores
from runner.run.facts import RunFacts
from runner.run.paths import find_output_root, recipe_cache_path
from runner.run.siblings import Loaded, find_moved, list_loaded
from runner.text import format_count


def select(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    unreadable: list[UnreadableRun] | None = None,
    prefer: Prefer = "recipe",
) -> list[Selected]:
    """Like `select_recipes`, through the cache: for verbs that start nothing and change no run."""
    cache = RecipeCache(recipe_cache_path(arguments.output_root))
    selected = select_recipes(
        paths, arguments.output_root, arguments.where, unreadable,
        load=cache.load, prefer=prefer, overrides=arguments.overrides,
    )  # fmt: skip
    cache.save()
    return selected


def select_uncached(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    unreadable: list[UnreadableRun] | None = None,
    prefer: Prefer = "recipe",
) -> list[Selected]:
    """Like `select_recipes`, parsing each recipe without the cache."""
    return select_recipes(
        paths, arguments.output_root, arguments.where, unreadable,
        prefer=prefer, overrides=arguments.overrides,
    )  # fmt: skip


def select_readable(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    prefer: Prefer = "recipe",
    *,
    is_uncached: bool = False,
) -> tuple[list[Selected], bool]:
    """The runs that can be read, through the cache unless `is_uncached`, and True if these are all.
    Prints a warning about each of the others to stderr.

    Raises:
        RunnerError: as `select_recipes`; also if no run can be read.
    """
    unreadable: list[UnreadableRun] = []
    choose = select_uncached if is_uncached else select
    selected = choose(arguments, paths, unreadable, prefer)
    require_any(selected, unreadable)
    warn_of_unreadable(unreadable)
    return selected, not unreadable


def note_edited(selected: Sequence[Selected]) -> None:
    """Print a note to stderr about recipes that were edited since they were rendered."""
    from runner.grid.recipe_files import word_edited

    if edited := word_edited([one.source_path for one in selected]):
        print(escape_controls(f"note: {edited}"), file=sys.stderr)


def note_unrendered(selected: Sequence[Selected]) -> None:
    """Print a note to stderr about recipes that their template now renders differently.

    A grid is rendered for this only if its template is newer than a recipe.
    """
    by_grid: dict[str, list[Path]] = {}
    recipes_dir = Path(RECIPES_DIR).resolve()
    for one in selected:
        # The folder may have been named in another way, such as by its absolute path.
        path = one.source_path.parent.resolve() / one.source_path.name
        if path.parent.parent == recipes_dir and path.is_file():
            by_grid.setdefault(path.parent.name, []).append(path)
    for grid, paths in by_grid.items():
        if _is_newer(grid, min(path.stat().st_mtime_ns for path in paths)):
            from runner.grid.render import word_unrendered

            if outdated := word_unrendered(Path(TEMPLATES), grid, paths):
                print(escape_controls(f"note: {outdated}"), file=sys.stderr)


def _is_newer(grid: str, than_ns: int) -> bool:
    """True if a file of the grid's template or a model card changed after a time."""
    folders = (Path(TEMPLATES) / grid, Path(TEMPLATES) / "models")
    if not (folders[0] / "grid.yaml").is_file():
        return False
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return any(path.stat().st_mtime_ns > than_ns for path in files)


def note_idle_overrides(selected: Sequence[Selected]) -> None:
    """Print notes to stderr about overrides that change nothing, which run names leave out, and
    about runs that were named after another spelling of the same overrides.
    """
    respelled = [one for one in selected if one.is_respelled]
    if respelled:
        first = respelled[0]
        others = len(respelled) - 1
        more = f", and likewise {others} more" if others else ""
        print(
            escape_controls(
                f"note: `{' '.join(first.overrides)}` is the run {first.full_name}, in another"
                f" spelling{more}"
            ),
            file=sys.stderr,
        )
    idle: dict[str, list[Selected]] = {}
    for one in selected:
        for override in one.idle_overrides:
            idle.setdefault(override, []).append(one)
    for override, those in idle.items():
        count = (
            ""
            if len(selected) == 1
            else f"{len(those)} of {format_count(len(selected), 'recipe')}, such as "
        )
        run = "the run is" if len(those) == 1 else "their runs are"
        print(
            escape_controls(
                f"note: {override} changes nothing in {count}{those[0].source_path}:"
                f" {run} not named after it"
            ),
            file=sys.stderr,
        )


def warn_of_other_base_scores(selected: Sequence[Selected]) -> None:
    """Warn on stderr, once per output root, of shared base scores that another run could not
    reproduce.
    """
    for root in sorted({find_output_root(one.paths.run_dir) for one in selected}):
        for one in find_other_base_scores(root):
            print(f"warning: {one.describe()}", file=sys.stderr)


def warn_of_moved_names(facts: Iterable[RunFacts]) -> None:
    """Warn on stderr of hub names that are not the same commit in all runs of a grid."""
    loaded: list[Loaded] = []
    for one in facts:
        with contextlib.suppress(CorruptFileError, OSError):  # the run's state reports them
            if one.stored is not None:
                loaded += list_loaded(one.paths.run_dir, one.stored)
    for moved in find_moved(loaded):
        print(f"warning: {moved.describe()}", file=sys.stderr)


def warn_of_outdated(known: KnownContents, arguments: argparse.Namespace) -> None:
    """Warn on stderr of files that were touched since they were hashed."""
    paths = arguments.paths or ["recipes"]
    command = spell_command(
        ["runner", "sweep", "--dry-run"], paths, arguments.output_root, arguments.where
    )
    for path in sorted(known.outdated):
        print(
            f"warning: {path} was touched since its content was last read, and is not read here;"
            f" runs that name it may be *changed*, which `{command}` shows;"
            " this warning disappears once a sweep or launch has read the file",
            file=sys.stderr,
        )


def warn_of_unreadable(unreadable: Iterable[UnreadableRun]) -> None:
    """Warn on stderr of runs that cannot be read, with the reasons."""
    for lost in unreadable:
        why = escape_controls(f"{lost.full_name} is unreadable: {lost.why}")
        print(f"warning: {why}", file=sys.stderr)
