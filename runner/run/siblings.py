"""Compares the commits that the runs of a grid loaded: if a branch moved between two runs, arms
differ in more than their axes state. Reads records only; no network access.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError
from runner.files import load_json
from runner.recipe.hub import HubName, is_commit, name_at
from runner.run.record import StoredRecipe
from runner.text import format_count

_NUM_NAMED: Final = 3


@dataclass(frozen=True)
class Loaded:
    """A name on the hub, and the commit at which a run loads it."""

    run_dir: Path
    name: HubName
    commit: str

    @property
    def may_be_refused(self) -> bool:
        """True if the recipe states a branch or a tag."""
        return self.name.revision is not None and not self.name.is_fixed


@dataclass(frozen=True)
class LoadedName:
    """A name on the hub, and the commits that it refers to in runs of one grid."""

    grid: str
    name: HubName
    runs: dict[str, tuple[str, ...]]  # commit -> names of runs, the most runs first

    @property
    def line(self) -> str:
        """The line for the recipe template that sets the most common commit for all runs."""
        return f"revision: {next(iter(self.runs))}"

    def concerns(self, run: str) -> bool:
        """True if a run of this name has loaded it."""
        return any(run in names for names in self.runs.values())

    @property
    def summary(self) -> str:
        """Each commit and the runs that load it."""
        parts = []
        for commit, runs in self.runs.items():
            more = "" if len(runs) <= _NUM_NAMED else ", ..."
            count = format_count(len(runs), "run")
            parts.append(f"{commit[:12]} in {count} ({', '.join(runs[:_NUM_NAMED])}{more})")
        return "; ".join(parts)

    def describe(self) -> str:
        """The message for users, with the line to paste."""
        return (
            f"{self.name} is not the same commit in all runs of {self.grid}: {self.summary}; to"
            f" load one commit everywhere, add this line next to the name:\n  {self.line}"
        )


def list_loaded(run_dir: Path, stored: StoredRecipe) -> list[Loaded]:
    """The commits that a run recorded for names that may move."""
    found = []
    for key, commit in stored.commits.items():
        name = name_at(stored.recipe, key)
        if name is not None and not name.is_fixed:
            found.append(Loaded(run_dir, name, commit))
    return found


def read_grid(grid_dir: Path) -> list[Loaded]:
    """The commits that all runs of a grid recorded for names that may move; runs with unreadable
    records are left out.

    Records are not parsed as recipes, because that is ten times as slow and grids have thousands of
    runs.
    """
    found = []
    for path in sorted(grid_dir.glob("*/recipe.json")):
        if path.parent.name.startswith("."):  # moved aside
            continue
        try:
            found += _read_loaded(path)
        except (CorruptFileError, OSError, LookupError, TypeError, ValueError, AttributeError):
            continue
    return found


def list_runs(grid_dir: Path, *, but: Collection[str]) -> list[str]:
    """The names of all launched runs of a grid, except those in `but`. Runs with overrides are left
    out, because they are not cells of the grid; so are runs with unreadable records.
    """
    found = []
    for path in sorted(grid_dir.glob("*/recipe.json")):
        if path.parent.name in but or path.parent.name.startswith("."):  # moved aside
            continue
        with contextlib.suppress(CorruptFileError, OSError, LookupError, TypeError):
            content: Any = load_json(path)
            if not content["recipe"]["run"].get("overrides"):
                found.append(path.parent.name)
    return found


def find_absent(runs: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """The names of launched runs, by grid, that share a folder with the given runs (grid, run
    directory) but are not among them.
    """
    known: dict[tuple[str, Path], set[str]] = {}
    for grid, run_dir in runs:
        known.setdefault((grid, run_dir.parent), set()).add(run_dir.name)
    absent: dict[str, list[str]] = {}
    for (grid, folder), names in known.items():
        absent.setdefault(grid, []).extend(list_runs(folder, but=names))
    return absent


def _read_loaded(path: Path) -> list[Loaded]:
    content: Any = load_json(path)
    found = []
    for key, commit in content.get("commits", {}).items():
        named = content["recipe"]
        for part in key.split(".")[:-1]:
            named = named[int(part)] if isinstance(named, list) else named[part]
        revision = named.get("revision")
        if is_commit(commit) and not is_commit(revision):
            kind: Any = "model" if key == "model.path" else "dataset"
            found.append(Loaded(path.parent, HubName(kind, named["path"], revision), commit))
    return found


def find_moved(loaded: Iterable[Loaded]) -> list[LoadedName]:
    """The names that do not have the same commit in all runs of their grid."""
    return [name for name in find_runs_by_commit(loaded) if len(name.runs) > 1]


def find_runs_by_commit(loaded: Iterable[Loaded]) -> list[LoadedName]:
    """Each name of each grid once. A name without a revision means the default branch."""
    groups: dict[tuple[Path, str, str, str], list[Loaded]] = {}
    for one in loaded:
        key = (one.run_dir.parent, one.name.kind, one.name.name, one.name.branch)
        groups.setdefault(key, []).append(one)
    found = []
    for (grid_dir, *_), those in groups.items():
        runs: dict[str, dict[str, None]] = {}
        for one in those:
            runs.setdefault(one.commit, {})[one.run_dir.name] = None
        ranked = sorted(runs.items(), key=lambda item: -len(item[1]))
        by_commit = {commit: tuple(names) for commit, names in ranked}
        found.append(LoadedName(grid_dir.name, those[0].name, by_commit))
    return found
