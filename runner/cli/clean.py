"""`runner clean`: removes what many runs share and any of them can compute again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runner.errors import RefusedError
from runner.run.entries import list_stored, remove_stored
from runner.run.lease import is_leased
from runner.run.paths import RunPaths, base_entries_dir, row_entries_dir
from runner.text import format_bytes


def run_clean(arguments: argparse.Namespace) -> int:
    """`runner clean`: what runs themselves hold is never touched.

    Raises:
        RefusedError: a run may be reading it now, there is nobody to ask, or the answer is no.
    """
    root: Path = arguments.output_root
    found = {
        "scores and answers of base models": list_stored(base_entries_dir(root)),
        "masked rows": list_stored(row_entries_dir(root)),
    }
    for what, folders in found.items():
        if folders:
            size = format_bytes(sum(one.num_bytes for one in folders))
            print(f"{folders[0].path.parent}: {what}, {_count(len(folders))}, {size}")
    everything = [one for folders in found.values() for one in folders]
    if not everything:
        print(f"{root}: nothing is shared between runs here")
        return 0
    if arguments.dry_run:
        return 0
    _refuse_while_running(root)
    if not arguments.yes:
        _confirm()
    busy = [one.path for one in everything if not remove_stored(one)]
    for path in busy:
        print(f"warning: {path} stays: a run is writing it", file=sys.stderr)
    print(f"removed {_count(len(everything) - len(busy))}; runs that need it compute it again")
    return 1 if busy else 0


def _count(number: int) -> str:
    return "1 folder" if number == 1 else f"{number} folders"


def _refuse_while_running(root: Path) -> None:
    for path in sorted(root.glob("*/*/lease")):
        if is_leased(RunPaths(path.parent).lease_path):
            raise RefusedError(
                f"{path.parent} is running and may be reading what would be removed",
                hint="wait for it, or ask it to leave: `runner stop " + str(path.parent) + "`",
            )


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise RefusedError(
            "nothing was removed: there is nobody to ask",
            hint="add `--yes`; `--dry-run` only shows what there is",
        )
    print("remove it? (y/N) ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("nothing was removed")
