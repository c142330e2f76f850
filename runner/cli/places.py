"""Finds the project of a command from the paths among its arguments, and rewrites those paths
relative to it.

A verb runs with its project as the current folder, so relative paths start there. Arguments that
are not paths in the user's folder, such as names or paths in the project, stay as typed.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError, RefusedError, RunnerError, escape_controls
from runner.files import load_json
from runner.plan.select import expand_folder
from runner.project_folder import (
    check_settings,
    entering,
    find_project_above,
    is_project,
    is_same_folder,
    say_pasteable,
)
from runner.run.paths import DEFAULT_OUTPUT_ROOT, RunPaths, find_submission

# These verbs need no project; paths that they write are relative to the user's folder.
_WITHOUT_PROJECT: Final = ("init", "demo-models", "recipe")
# Arguments that name recipes and runs; they identify the project.
_NAMED: Final = ("paths", "recipe", "run", "run_dir", "a", "b", "grid")
# Arguments that are a word or a path to read, and paths to write.
_LOADED: Final = ("resume", "checkpoint")
_WRITTEN: Final = ("output_root", "html", "rows", "figures", "output")
# Beginnings that no name of a run or a grid has.
_SURELY_PATH: Final = ("/", "./", "../")
# These verbs read only what the runs recorded, so they accept runs of several projects.
_READ_RECORDS_ONLY: Final = ("report", "power", "compare")


@contextlib.contextmanager
def in_project(arguments: argparse.Namespace) -> Iterator[None]:
    """Make the project the current folder for the block, and its paths in the arguments relative.

    Raises:
        RunnerError: the paths are of several projects, or `runner.toml` has an unknown setting.
    """
    if arguments.verb in _WITHOUT_PROJECT:
        yield
        return
    here = _find_current_folder()
    project = _find_project(arguments, here)
    check_settings(project)
    is_here = is_same_folder(project, here)
    if not is_here:
        _say_from_inside(arguments, here, project)
    if getattr(arguments, "output_root", project) is None:
        arguments.output_root = DEFAULT_OUTPUT_ROOT
    if is_here:
        yield
        return
    print(
        escape_controls(f"note: the project is {project}; paths are relative to it"),
        file=sys.stderr,
    )
    with entering(project):
        try:
            yield
        except RunnerError as error:
            error.hint = error.hint and say_pasteable(error.hint)
            raise


def _find_current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise RunnerError("the current folder is gone", hint="cd to a folder that exists") from (
            None
        )


def _find_project(arguments: argparse.Namespace, here: Path) -> Path:
    above = find_project_above(here) or here
    finder = _Finder(here)
    found: dict[Path, list[str]] = {}  # project -> the arguments that name something in it
    for text in _list_named(arguments):
        projects = finder.find(text)
        if not projects and is_project(above) and _is_looked_up(text, arguments):
            projects = [above]
        for project in projects:
            same = next((one for one in found if is_same_folder(one, project)), project)
            found.setdefault(same, []).append(text)
    if len(found) > 1:
        if arguments.verb in _READ_RECORDS_ONLY and finder.has_runs_only:
            return above
        raise _refuse_several(arguments, found)
    root: Path | None = getattr(arguments, "output_root", None)
    if not found and above is here and root is not None and not is_project(here):
        found = {project: [] for project in finder.find(f"{root}/")}
    return next(iter(found)) if len(found) == 1 else above


def _list_named(arguments: argparse.Namespace) -> list[str]:
    named: list[str] = []
    for name in _list_present(arguments, _NAMED):
        value = getattr(arguments, name)
        named += map(str, value if isinstance(value, list) else [value])
    return named


def _list_present(arguments: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """The arguments that were given and are paths for this verb: `render` has the name of a grid,
    and `masks` a number of rows.
    """
    return [
        name
        for name in names
        if isinstance(getattr(arguments, name, None), str | list | Path)
        and (arguments.verb, name) != ("render", "grid")
    ]


def _is_looked_up(text: str, arguments: argparse.Namespace) -> bool:
    """True if a word that is not a path is looked up in the project above the current folder.

    Not so for arms of `compare` if `--grid` is a path: they are looked up in that grid.
    """
    grid = getattr(arguments, "grid", None)
    return grid is None or not (text == grid or "=" in text or _list_paths(grid))


def _refuse_several(arguments: argparse.Namespace, found: dict[Path, list[str]]) -> RefusedError:
    lines = [f"  {project}: {', '.join(texts)}" for project, texts in found.items()]
    hints, verb = ["one command for each project"], arguments.verb
    named = [text for texts in found.values() for text in texts]
    if verb != "compare" and len(named) == len(set(named)):
        # The command as typed, with all options, without the paths of the other projects.
        for texts in found.values():
            others = set(named) - set(texts)
            hints.append(shlex.join(["runner", *(w for w in arguments.typed if w not in others)]))
    roots = [project / DEFAULT_OUTPUT_ROOT for project in found]
    if verb in ("report", "power") and all(root.is_dir() for root in roots):
        together = shlex.join(["runner", verb, *map(str, roots)])
        hints.append(f"{together}  # run directories of several projects can be read together")
    return RefusedError(
        f"these paths belong to {len(found)} projects:\n" + "\n".join(lines),
        hint="\n      ".join(hints),
    )


class _Finder:
    """Finds the projects of paths. Notes each recorded project that is not entered only once."""

    def __init__(self, here: Path) -> None:
        self._here = here
        self._printed: set[str] = set()
        self.has_runs_only = True  # over all calls of `find`

    def find(self, text: str) -> list[Path]:
        """The projects of what a path or a glob names; none if it is not a path here, or a folder
        without recipes outside any project.
        """
        projects: dict[Path, None] = {}
        seen: set[Path] = set()  # folders in which everything is of one project
        for path in _list_paths(text):
            files = expand_folder(path)
            for file in files:
                is_run = file.is_dir()
                self.has_runs_only &= is_run
                if file.parent not in seen:
                    found, is_of_all = (
                        self._find_of_run(file) if is_run else self._find_of_file(file)
                    )
                    projects[found] = None
                    if is_of_all:
                        seen.add(file.parent)
            if not files and (above := find_project_above(path)) is not None:
                projects[above] = None
        return list(projects)

    def _find_above(self, folder: Path) -> Path:
        return find_project_above(folder) or self._here

    def _find_of_file(self, recipe: Path) -> tuple[Path, bool]:
        """The project of a recipe; all recipes in its folder have the same project."""
        submission = find_submission(recipe)
        if submission is None:
            return self._find_above(recipe.parent), True
        content = _load(submission.record_path)
        found = self._find_recorded(submission.submission_dir, content, is_submission=True)
        return found or self._find_above(recipe.parent), True

    def _find_of_run(self, run_dir: Path) -> tuple[Path, bool]:
        """The project of a run, and true if all runs in its folder have the same project: several
        projects may keep runs in a folder outside them.
        """
        content = _load(RunPaths(run_dir).recipe_path)
        found = self._find_recorded(run_dir, content) or find_project_above(run_dir)
        return found or self._here, found is not None and run_dir.is_relative_to(found)

    def _find_recorded(
        self, folder: Path, content: dict[str, Any], *, is_submission: bool = False
    ) -> Path | None:
        """The project that a record in `folder` names. None if it names none or one that no longer
        exists, or if a folder that someone else may have made must not lead into it.
        """
        text = content.get("project")
        if not isinstance(text, str) or not text or "\0" in text:
            return None
        project = Path(os.path.normpath(folder.resolve() / text))
        is_outside = os.path.isabs(text)
        if not os.path.isdir(project):
            if is_outside:
                self._print_once(text, f"{folder} records the project {text}, which does not exist")
            return None
        if is_outside:
            is_taken = is_submission or self._may_enter(project, folder)
            if not is_taken and not is_same_folder(project, self._here):
                self._print_once(text, f"{folder} records the project {text}, which is not entered")
        else:
            is_taken = is_project(project) or _holds_any(project, content)
        if not is_taken:
            return None
        # Prefer the name by which the user reached this folder, if the project is a parent of it.
        return next((one for one in folder.parents if is_same_folder(one, project)), project)

    def _may_enter(self, project: Path, run_dir: Path) -> bool:
        """True if a run directory, which may come from anyone, may name this absolute path as its
        project. The project needs a marker; the run must be outside all projects, or the run or the
        user inside this one.
        """
        if not is_project(project):
            return False
        places = find_project_above(run_dir), find_project_above(self._here)
        return places[0] is None or any(
            one is not None and is_same_folder(one, project) for one in places
        )

    def _print_once(self, recorded: str, note: str) -> None:
        if recorded not in self._printed:
            self._printed.add(recorded)
            print(escape_controls(f"note: {note}"), file=sys.stderr)


def _holds_any(project: Path, content: dict[str, Any]) -> bool:
    """True if a folder without a marker holds any file that the record says was there.

    The relative path up from a run directory that was copied elsewhere may lead to any folder.
    A submission is always trusted.
    """
    contents = content.get("contents", {".": ""})
    return isinstance(contents, dict) and any(
        os.path.exists(project / path) for path in contents if not os.path.isabs(path)
    )


def _load(path: Path) -> dict[str, Any]:
    """The content of a record; empty if it cannot be read, which the verb itself reports."""
    try:
        content = load_json(path)
    except (CorruptFileError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def _list_paths(text: str) -> list[Path]:
    """The absolute paths that a text names in the current folder; none for a name."""
    if os.path.exists(text):
        return [] if _is_name(text) else [_make_absolute(Path(text))]
    matches = _glob(text) or ([text] if text.startswith(_SURELY_PATH) else [])
    return [_make_absolute(Path(name)) for name in matches]


def _is_name(text: str) -> bool:
    """True if a word that is also a folder here means a grid or a run, because the folder holds no
    recipes and is not a project.
    """
    path = Path(text)
    return (
        "/" not in text
        and not text.startswith(".")
        and os.path.isdir(path)
        and not is_project(path)
        and not expand_folder(path)
    )


def _glob(text: str) -> list[str]:
    return sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []


def _make_absolute(path: Path) -> Path:
    """The absolute path. Links keep their names, except those before a `..`."""
    if ".." not in path.parts:
        return path.absolute()
    parent = path if path.name == ".." else path.parent
    real = Path(os.path.realpath(parent))  # `Path.resolve` fails on a circle of links
    return real if parent is path else real / path.name


def _say_from_inside(arguments: argparse.Namespace, here: Path, project: Path) -> None:
    """Rewrite every path in the arguments: relative if it is inside the project, else absolute."""
    for name in _list_present(arguments, _NAMED):
        value = getattr(arguments, name)
        if isinstance(value, list):
            said: Any = [_say_named(text, here, project) for text in value]
        else:
            said = type(value)(_say_named(str(value), here, project))
        setattr(arguments, name, said)
    for name in _list_present(arguments, _LOADED):
        text = getattr(arguments, name)
        if text not in ("auto", "latest", "best") and "://" not in text:
            setattr(arguments, name, _say_named(text, here, project))
    for name in _list_present(arguments, _WRITTEN):
        path = _make_absolute(getattr(arguments, name))
        setattr(arguments, name, Path(_say(path, project)))


def _say_named(text: str, here: Path, project: Path) -> str:
    if os.path.exists(text):
        return text if _is_name(text) else _say(_make_absolute(Path(text)), project)
    if _glob(text):
        # Only the user's text is a pattern, not the names of the folders above.
        pattern = os.path.normpath(os.path.join(glob.escape(str(here)), text))
        return pattern.removeprefix(f"{glob.escape(str(project))}/")
    return _say(_make_absolute(Path(text)), project) if text.startswith(_SURELY_PATH) else text


def _say(path: Path, project: Path) -> str:
    return str(path.relative_to(project) if path.is_relative_to(project) else path)
