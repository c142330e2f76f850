"""`runner clean`: removes caches that runs share and any run can compute again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runner.errors import RefusedError
from runner.project_folder import describe_no_project
from runner.run.entries import list_notes, list_stored, remove_free_locks, remove_stored
from runner.run.lease import is_leased
from runner.run.paths import RunPaths, base_entries_dir, list_recipe_caches, row_entries_dir
from runner.text import format_bytes, format_count


def run_clean(arguments: argparse.Namespace) -> int:
    """`runner clean`: never touches run directories.

    Raises:
        RefusedError: a run may be reading the caches, stdin is not a terminal, or the answer is no.
    """
    root: Path = arguments.output_root
    if not root.is_dir():
        nowhere = describe_no_project()
        raise RefusedError(
            f"the folder {root} does not exist" + (f"; {nowhere}" if nowhere else ""),
            hint="name the folder of the runs with `--output-root`",
        )
    found = {
        folder: list_stored(folder) for folder in (base_entries_dir(root), row_entries_dir(root))
    }
    for folder, what in zip(
        found, ("scores and answers of base models", "masked rows"), strict=True
    ):
        if found[folder]:
            size = format_bytes(sum(one.num_bytes for one in found[folder]))
            print(f"{folder}: {what}, {format_count(len(found[folder]), 'folder')}, {size}")
    files = list_recipe_caches(root)
    if files:
        size = format_bytes(sum(path.stat().st_size for path in files))
        print(f"{files[0]}: parsed recipes, {format_count(len(files), 'file')}, {size}")
    if notes := list_notes(base_entries_dir(root)):
        print(
            f"{notes[0].parent}: reasons why scores are not shared,"
            f" {format_count(len(notes), 'file')}"
        )
        files += notes
    folders = [one for stored in found.values() for one in stored]
    if not folders and not files:
        print(f"{root}: nothing is shared between runs here")
        return 0
    if arguments.dry_run:
        return 0
    _refuse_while_running(root)
    if not arguments.yes:
        _confirm()
        _refuse_while_running(root)  # a run may have started while we waited for the answer
    for path in files:
        path.unlink(missing_ok=True)
    busy = [one.path for one in folders if not remove_stored(one)]
    for folder in found:
        remove_free_locks(folder)
    for path in busy:
        print(
            f"warning: {path} was kept: a run is writing it, or removal is not permitted",
            file=sys.stderr,
        )
    if len(busy) < len(folders) or files:
        print("removed; runs compute again what they need")
    return 1 if busy else 0


def _refuse_while_running(root: Path) -> None:
    for path in sorted(root.glob("*/*/lease")):
        if is_leased(RunPaths(path.parent).lease_path):
            raise RefusedError(
                f"{path.parent} is running and may be reading these caches",
                hint="wait for it, or stop it: `runner stop " + str(path.parent) + "`",
            )


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise RefusedError(
            "nothing was removed: stdin is not a terminal to ask on",
            hint="add `--yes`; `--dry-run` only lists the caches",
        )
    print("remove these? (y/N) ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("nothing was removed")
