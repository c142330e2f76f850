"""Commits saved checkpoints (marker last), moves checkpoints aside and restores them.

Owns whether a checkpoint counts, not what Transformers writes into it. `retention` decides how long
it is kept, `choose` which one is resumed. The run's metrics and scores so far travel inside each
checkpoint, so that it can be resumed on an empty machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from runner.checkpoints.archive import TEMPORARY_GLOB
from runner.checkpoints.choose import WAS_BEING_WRITTEN, Move, Restore
from runner.checkpoints.marker import build_marker, list_unfinished, sync_folder, write_marker
from runner.files import follow_umask, fsync_dir, write_bytes_atomic
from runner.run.failures import is_full_disk
from runner.run.paths import STEP_PREFIX, RunPaths, marker_path

DELETING_PREFIX: Final = ".deleting-"
IMPORTING_PREFIX: Final = ".importing-"
# A pickle that holds the hub token in plain text; resuming does not need it.
_NEVER_KEPT: Final = ("training_args.bin",)


def commit_checkpoint(
    saved_dir: Path, paths: RunPaths, step: int, fingerprint: Mapping[str, Any]
) -> None:
    """Turn a folder that all ranks have finished writing into the checkpoint of `step`: sync,
    rename, then write the marker.

    Called on one rank, after a barrier.
    """
    for name in _NEVER_KEPT:
        (saved_dir / name).unlink(missing_ok=True)
    checkpoint_dir = paths.checkpoint_dir(step)
    assert not checkpoint_dir.exists(), (
        "every checkpoint newer than the one resumed from has been moved aside"
    )
    follow_umask(saved_dir)
    sync_folder(saved_dir)
    marker = build_marker(saved_dir, step, fingerprint)
    saved_dir.rename(checkpoint_dir)
    fsync_dir(paths.checkpoints_dir)
    write_marker(checkpoint_dir, marker)


@contextmanager
def delete_on_full_disk(*folders: Path, is_main: bool) -> Iterator[None]:
    """While a checkpoint is written into one of `folders`: if the disk is full, delete the partial
    checkpoint.

    It belongs to this attempt and was never committed; moved aside, it would occupy the space that
    the next attempt needs.
    """
    try:
        yield
    except Exception as error:
        for folder in folders if is_main and is_full_disk(error) else ():
            if not marker_path(folder).exists():
                shutil.rmtree(folder, ignore_errors=True)
        raise


def carry_out(paths: RunPaths, moves: Iterable[Move | Restore]) -> None:
    """Move aside and restore checkpoints as `choose` decided, in its order."""
    for move in moves:
        if isinstance(move, Move):
            quarantine(paths.checkpoints_dir / move.name, paths, move.why)
            continue
        checkpoint_dir = paths.checkpoint_dir(move.step)
        move.unpacked_dir.rename(checkpoint_dir)
        fsync_dir(paths.checkpoints_dir)
        archive_path = paths.archive_path(move.step)
        print(f"restored checkpoint {checkpoint_dir.name} from {archive_path}", flush=True)


def clean_up(paths: RunPaths) -> None:
    """Delete leftovers, and move aside unfinished checkpoints; lose nothing."""
    drop_leftovers(paths)
    carry_out(paths, [Move(folder.name, WAS_BEING_WRITTEN) for folder in list_unfinished(paths)])


def drop_leftovers(paths: RunPaths) -> None:
    """Finish the deletions that a killed attempt had begun, and delete its temporary files."""
    for doomed in paths.checkpoints_dir.glob(f"{DELETING_PREFIX}{STEP_PREFIX}*"):
        shutil.rmtree(doomed)
    # A copy of a checkpoint that is intact elsewhere.
    for staged in paths.checkpoints_dir.glob(f"{IMPORTING_PREFIX}*"):
        shutil.rmtree(staged)
    unfinished_markers = f"{STEP_PREFIX}*/.{marker_path(Path()).name}.*.tmp"
    for pattern in (TEMPORARY_GLOB, unfinished_markers):
        for temporary in paths.checkpoints_dir.glob(pattern):
            temporary.unlink()


def set_aside(paths: RunPaths, step: int, why: str) -> None:
    """Move the checkpoint of a step, and its archive, out of the way."""
    for path in (paths.archive_path(step), paths.checkpoint_dir(step)):
        if path.exists():
            quarantine(path, paths, why)


def quarantine(path: Path, paths: RunPaths, why: str) -> None:
    """Move a folder or archive aside under a free name and report it. We never read or delete it
    again.
    """
    paths.quarantine_dir.mkdir(exist_ok=True)
    number = 1
    while (target := paths.quarantine_dir / f"{path.name}.{number}").exists():
        number += 1
    path.rename(target)
    print(f"warning: moved checkpoint {path.name} to {target}: {why}", flush=True)


_RUN_FILES: Final = "run_files"


def carry_run_files(paths: RunPaths, saved_dir: Path) -> None:
    """Copy metrics and scores into a checkpoint that is not committed yet."""
    (saved_dir / _RUN_FILES).mkdir()
    for path in paths.list_row_files():
        shutil.copyfile(path, saved_dir / _RUN_FILES / path.name)


def restore_run_files(paths: RunPaths, step: int) -> None:
    """Reset metrics and scores to their state when the checkpoint of `step` was written."""
    for carried in sorted((paths.checkpoint_dir(step) / _RUN_FILES).glob("*.jsonl")):
        write_bytes_atomic(paths.run_dir / carried.name, carried.read_bytes())
