"""Commits that names on the hub stand for, settled before a run's first attempt and held from then
on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.checkpoints.choose import read_inventory
from runner.errors import RefusedError
from runner.recipe.hub import (
    CommitFinder,
    HubName,
    is_commit,
    is_offline,
    list_hub_names,
    require_commit,
)
from runner.recipe.parse import Recipe
from runner.run.facts import RunFacts
from runner.run.siblings import Loaded, find_runs_by_commit, read_grid


class NamesOnHub:
    """What names stand for in the runs of one sweep, each looked up once."""

    def __init__(self) -> None:
        self._finder = CommitFinder()
        self._grids: dict[Path, list[Loaded]] = {}

    def settle(
        self, recipe: Recipe, facts: RunFacts, carried: Mapping[str, Any] | None = None
    ) -> dict[str, str]:
        """The commits of a run, by dotted key: as recorded, and of a run without any checkpoint, of
        all its names. What nobody can tell is left out. `carried` are those that the checkpoint
        states which it goes on from; a run without one of its own takes all of them.

        Raises:
            RefusedError: a recorded commit is gone; or a branch or tag that the recipe states is
                another commit than in the other runs of the grid; or nobody knows the commit that
                checkpoints were made with, and the hub may give another one.
            OSError: the hub does not answer.
        """
        commits = {} if facts.stored is None else dict(facts.stored.commits)
        names = list_hub_names(recipe)
        has_own = bool(read_inventory(facts.paths).kept)
        for key, commit in (carried or {}).items():
            if key in names and is_commit(commit) and not (has_own and key in commits):
                commits[key] = commit
        for key in names.keys() & commits.keys():
            require_commit(key, names[key], commits[key])
        missing = sorted(names.keys() - commits.keys())
        if missing and has_own:
            for key in missing:
                # Without the hub, the cache has what it had.
                may_warn = carried is None or is_offline()
                _say_unknown(facts, key, names[key], may_warn=may_warn)
            return commits
        for key in missing:
            commit = self._finder.find(names[key])
            if commit is not None:
                new = Loaded(facts.paths.run_dir, names[key], commit)
                if new.may_be_refused:
                    refuse_moved(key, new, self._read(new.run_dir.parent))
                commits[key] = commit
        return commits

    def _read(self, grid_dir: Path) -> list[Loaded]:
        if grid_dir not in self._grids:
            self._grids[grid_dir] = read_grid(grid_dir)
        return self._grids[grid_dir]


def _say_unknown(facts: RunFacts, key: str, name: HubName, *, may_warn: bool) -> None:
    """Say that a run would go on from checkpoints of an unknown commit. Those that an older version
    wrote may go on so.

    Raises:
        RefusedError: this version wrote them, without the hub.
    """
    message = (
        f"`{key}`: nobody knows at which commit {facts.paths.run_dir} loaded {name}, and its"
        " checkpoints would be continued on whatever the name stands for now"
    )
    if may_warn:
        print(f"warning: {message}", file=sys.stderr, flush=True)
        return
    raise RefusedError(
        message,
        hint="go on from the cache alone, with HF_HUB_OFFLINE=1 in the environment, or start anew"
        " with `runner launch RECIPE --fresh`",
    )


def refuse_moved(key: str, new: Loaded, loaded: Iterable[Loaded]) -> None:
    """Refuse a commit that a stated branch or tag has moved to since other runs of the grid loaded
    it. Where the recipe states nothing, `check`, `status` and the report warn.

    Raises:
        RefusedError: with what they loaded, and the line that states it.
    """
    if not new.may_be_refused:
        return
    alike = [one for one in loaded if _is_alike(one, new)]
    if not alike or any(one.commit == new.commit for one in alike):
        return
    (loaded_by_others,) = find_runs_by_commit(alike)
    raise RefusedError(
        f"`{key}`: {new.name} is the commit {new.commit} now, and other runs of the grid"
        f" {new.run_dir.parent.name} loaded another one: {loaded_by_others.summary}",
        hint=f"to load what they loaded, state it beside the name:\n  {loaded_by_others.line}",
    )


def _is_alike(one: Loaded, new: Loaded) -> bool:
    """True where another run has loaded what is meant by the same name."""
    names = [(each.name.kind, each.name.name, each.name.branch) for each in (one, new)]
    return names[0] == names[1] and one.run_dir.name != new.run_dir.name
