"""Changed runs in a sweep: describes all of them together, and moves them into one dated folder
for `--fresh`, so that they start from step 0.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError, RefusedError, put_in_words
from runner.plan.decide import Decision
from runner.plan.select import Selected
from runner.plan.status import RunStatus, read_status
from runner.project_folder import pasteable
from runner.run.facts import read_facts
from runner.run.paths import RunPaths, changed_runs_dir
from runner.run.record import now_utc
from runner.text import format_count

_MAX_NAMED: Final = 3
_MAX_KEYS: Final = 8


@dataclass(frozen=True)
class ChangedRun:
    """A run whose directory holds another experiment, and the place to which `--fresh` moves it."""

    selected: Selected
    contents: Mapping[str, str]
    status: RunStatus

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return self.selected.full_name

    @property
    def paths(self) -> RunPaths:
        """The files of the run."""
        return self.selected.paths

    @property
    def output_root(self) -> Path:
        """The folder of all grids."""
        return self.paths.run_dir.parent.parent

    def target(self, folder: Path) -> Path:
        """The place of the run in the dated folder."""
        return folder / self.paths.run_dir.parent.name / self.paths.run_dir.name


def describe_changed(changed: Sequence[ChangedRun], arguments: argparse.Namespace) -> list[str]:
    """Lines with the changed keys and the number of runs for each, the command that shows their
    numbers, and the command to run next.
    """
    command = ["runner", "sweep", *map(str, arguments.paths), *arguments.overrides]
    command += [word for condition in arguments.where for word in ("--where", condition)]
    if arguments.output_root != Path("runs"):
        command += ["--output-root", str(arguments.output_root)]
    grids = dict.fromkeys(str(one.paths.run_dir.parent) for one in changed)
    if len(changed) == 1:
        lines = list(changed[0].status.differences)
    else:
        # Variants of recipes are found through their run directories.
        named = [*grids] if arguments.overrides else command[2:]
        lines = [*_count_keys(changed), _name_some(changed, ["runner", "status", *named])]
    if not arguments.fresh:
        lines.append(f"the numbers: {pasteable(shlex.join(['runner', 'report', *grids]))}")
        lines.append(
            f"{pasteable(shlex.join([*command, '--fresh']))}"
            "  # moves the changed runs into one dated folder and starts them from step 0"
        )
    return lines


def _count_keys(changed: Sequence[ChangedRun]) -> list[str]:
    """One line per key, most frequent first, with the values if they are the same in all runs."""
    by_key: dict[str, Counter[str]] = {}
    for one in changed:
        for line in one.status.differences:
            by_key.setdefault(line.partition(": ")[0], Counter())[line] += 1
    ranked = sorted(by_key.items(), key=lambda item: -item[1].total())
    lines = []
    for key, found in ranked[:_MAX_KEYS]:
        count = found.total()
        shown = next(iter(found)) if len(found) == 1 else f"{key}: different values"
        lines.append(f"{count:>3} {'run ' if count == 1 else 'runs'}  {shown}")
    if len(ranked) > _MAX_KEYS:
        lines.append(f"and {format_count(len(ranked) - _MAX_KEYS, 'more key')}")
    return lines


def _name_some(changed: Sequence[ChangedRun], status: Sequence[str]) -> str:
    names = [one.full_name for one in changed]
    named = ", ".join(names[:_MAX_NAMED])
    if len(names) <= _MAX_NAMED:
        return named
    command = pasteable(shlex.join(status))
    return f"{named} and {len(names) - _MAX_NAMED} more; `{command}` names all"


def choose_folders(changed: Sequence[ChangedRun]) -> dict[Path, Path]:
    """`output root -> dated folder`: today's first folder in which all names of the runs are free.

    Raises:
        RefusedError: a run is on another file system than its output root, so it cannot be moved
            in one step.
    """
    date, folders = now_utc()[:10], {}
    for one in changed:
        if one.paths.run_dir.exists() and (
            one.paths.run_dir.stat().st_dev != one.output_root.stat().st_dev
        ):
            raise RefusedError(
                f"{one.paths.run_dir} is on another file system than {one.output_root},"
                " so it cannot be moved in one step",
                hint=f"runner launch {one.selected.source_path} --fresh  # moves it aside in place",
            )
        folders[one.output_root] = one.output_root
    for root in folders:
        for number in itertools.count(1):
            folder = changed_runs_dir(root, date, number)
            if not any(one.target(folder).exists() for one in changed if one.output_root == root):
                folders[root] = folder
                break
    return folders


def confirm(changed: Sequence[ChangedRun], folders: Mapping[Path, Path], *, is_sure: bool) -> None:
    """Ask on the terminal whether to move the runs.

    Raises:
        RefusedError: the answer is no, or stdin is not a terminal and `is_sure` is false.
    """
    if is_sure:
        return
    where = ", ".join(str(folder) for folder in folders.values())
    runs = format_count(len(changed), "changed run")
    if not sys.stdin.isatty():
        raise RefusedError(
            f"`--fresh` moves {runs} into {where}, but stdin is not a terminal to ask on",
            hint="add `--yes`; `--dry-run` shows what would be done",
        )
    print(
        f"move {runs} into {where} and start from step 0? (y/N) ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("nothing was moved or started")


def describe_remote(changed: Sequence[ChangedRun]) -> list[str]:
    """A line about runs with checkpoints in remote storage, which stay where they are."""
    num_remote = sum(one.selected.recipe.checkpoints.remote is not None for one in changed)
    if not num_remote:
        return []
    return [
        f"{num_remote} with `checkpoints.remote`: the stored checkpoints stay; the new runs"
        " neither load nor overwrite them, and store nothing next to them;"
        " set `checkpoints.remote.url` to another place first"
    ]


def move_changed(one: ChangedRun, folder: Path) -> Decision | None:
    """Rename a run into the dated folder under its lease. Returns the reason if it was left alone,
    None if it was moved.
    """
    from runner.launch.run_files import move_aside, take_lease

    try:
        lease = take_lease(one.paths)
        if lease is None:
            return Decision("skip", "running, so it is not moved")
        with contextlib.closing(lease):
            # Another sweep may have moved and restarted it since it was read.
            facts = read_facts(one.paths, lease=lease)
            status = read_status(facts, one.selected.recipe, one.contents, named=one.contents)
            if status.state == "unreadable":
                return Decision("refuse", f"cannot be moved: {status.why}")
            if status.state != "changed":
                return Decision("skip", "no longer changed: another sweep was faster")
            move_aside(one.paths, one.target(folder))
    # The other runs are still moved and started from step 0.
    except (RefusedError, CorruptFileError, OSError) as error:
        return Decision("refuse", f"cannot be moved: {put_in_words(error)}")
    return None
