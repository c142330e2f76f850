"""Resolves names on the hub to commits before a run's first attempt; later attempts keep them."""

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
    """The commits of hub names in one sweep; each name is looked up once."""

    def __init__(self) -> None:
        self._finder = CommitFinder()
        self._grids: dict[Path, list[Loaded]] = {}

    def settle(
        self, recipe: Recipe, facts: RunFacts, carried: Mapping[str, Any] | None = None
    ) -> dict[str, str]:
        """The commits of a run, by dotted key: the recorded ones and, for a run without any
        checkpoint, those of all its names. Unknown commits are left out. `carried` are the commits
        stated by the checkpoint to resume from; a run without its own checkpoint uses all of them.

        Raises:
            RefusedError: a recorded commit is gone; or a branch or tag that the recipe states is
                another commit than in the other runs of the grid; or the commit with which
                checkpoints were made is unknown, and the hub may return another one.
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
                # Without the hub, the cache still has the same commit.
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
    """Warn that a run would resume checkpoints of an unknown commit; allowed if an older version
    wrote them.

    Raises:
        RefusedError: this version wrote them, without the hub.
    """
    message = (
        f"`{key}`: the commit at which {facts.paths.run_dir} loaded {name} is unknown, and its"
        " checkpoints would be resumed with whatever commit the name points to now"
    )
    if may_warn:
        print(f"warning: {message}", file=sys.stderr, flush=True)
        return
    raise RefusedError(
        message,
        hint="set HF_HUB_OFFLINE=1 to resume from the cache alone, or start from step 0"
        " with `runner launch RECIPE --fresh`",
    )


def refuse_moved(key: str, new: Loaded, loaded: Iterable[Loaded]) -> None:
    """Refuse a stated branch or tag that has moved to another commit since other runs of the grid
    loaded it. If the recipe states none, `check`, `status` and the report warn instead.

    Raises:
        RefusedError: it has moved; the hint has the line that states the earlier commit.
    """
    if not new.may_be_refused:
        return
    alike = [one for one in loaded if _is_alike(one, new)]
    if not alike or any(one.commit == new.commit for one in alike):
        return
    (loaded_by_others,) = find_runs_by_commit(alike)
    raise RefusedError(
        f"`{key}`: {new.name} is the commit {new.commit} now, but other runs of the grid"
        f" {new.run_dir.parent.name} loaded another one: {loaded_by_others.summary}",
        hint=f"to load the same commit, state it next to the name:\n  {loaded_by_others.line}",
    )


def _is_alike(one: Loaded, new: Loaded) -> bool:
    """True if the other run loaded the same name, kind and branch."""
    names = [(each.name.kind, each.name.name, each.name.branch) for each in (one, new)]
    return names[0] == names[1] and one.run_dir.name != new.run_dir.name
