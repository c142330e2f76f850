"""Checkpoints that count only with a marker, written last; finding the newest one that verifies and
can be continued.

Owns nothing of what Transformers writes into a checkpoint: only whether it counts. How long it
stays is in `retention`.

What the run has written so far travels inside each checkpoint, so that it can be continued on an
empty machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from runner.checkpoints.archive import TEMPORARY_GLOB, ArchiveError, extract_archive
from runner.checkpoints.choose import LAUNCH_AS_BEFORE, refuse_other_fingerprint
from runner.checkpoints.marker import (
    build_marker,
    find_damage,
    is_step,
    list_archived,
    list_checkpoint_dirs,
    list_committed,
    load_marker,
    sync_folder,
    write_marker,
)
from runner.files import fsync_dir, write_bytes_atomic
from runner.run.failures import is_full_disk
from runner.run.paths import STEP_PREFIX, RunPaths, marker_path

DELETING_PREFIX: Final = ".deleting-"
IMPORTING_PREFIX: Final = ".importing-"
# A pickle that holds the hub token in clear; nothing of it is needed to resume.
_NEVER_KEPT: Final = ("training_args.bin",)


def commit_checkpoint(
    saved_dir: Path, paths: RunPaths, step: int, fingerprint: Mapping[str, Any]
) -> None:
    """Turn a folder that all ranks have finished writing into the checkpoint of `step`: sync,
    rename, then the marker.

    Called on one rank, after a barrier.
    """
    for name in _NEVER_KEPT:
        (saved_dir / name).unlink(missing_ok=True)
    checkpoint_dir = paths.checkpoint_dir(step)
    assert not checkpoint_dir.exists(), (
        "everything newer than what was resumed from has been moved aside"
    )
    sync_folder(saved_dir)
    marker = build_marker(saved_dir, step, fingerprint)
    saved_dir.rename(checkpoint_dir)
    fsync_dir(paths.checkpoints_dir)
    write_marker(checkpoint_dir, marker)


@contextmanager
def give_back_on_full_disk(*folders: Path, is_main: bool) -> Iterator[None]:
    """While a checkpoint is written into one of `folders`: if the disk is full, what is there of it
    is deleted.

    It is this attempt's own and was never committed; moved aside, it would take the room that the
    next attempt needs.
    """
    try:
        yield
    except Exception as error:
        for folder in folders if is_main and is_full_disk(error) else ():
            if not marker_path(folder).exists():
                shutil.rmtree(folder, ignore_errors=True)
        raise


def find_resume_step(
    paths: RunPaths,
    fingerprint: Mapping[str, Any],
    find_best: Callable[[Path], int | None] = lambda _: None,
) -> int | None:
    """The step of the newest checkpoint that verifies, None where there is none. Everything newer
    is moved aside.

    A damaged or missing folder is restored from its archive where there is one. `find_best` gives
    the step of the best weights as one checkpoint knows it: those are exported in the end, so a
    checkpoint is of use only while that other one verifies too. A stripped checkpoint can only be
    that other one.

    Raises:
        RefusedError: the checkpoint was written under another world size, micro-batch or recipe, so
            that continuing it would not be the same run.
    """
    clean_up(paths)
    stripped: list[int] = []
    chosen: int | None = None
    for step in sorted({*list_committed(paths), *list_archived(paths)}, reverse=True):
        if not ensure_intact(paths, step):
            continue
        checkpoint_dir = paths.checkpoint_dir(step)
        marker = load_marker(checkpoint_dir)
        refuse_other_fingerprint(marker, fingerprint, LAUNCH_AS_BEFORE)
        if marker.is_stripped:
            stripped.append(step)
            continue
        best = find_best(checkpoint_dir)
        if best is None or best == step or ensure_intact(paths, best):
            chosen = step
            break
        set_aside(paths, step, f"the best weights so far, of step {best}, are lost")
    for step in stripped:
        set_aside(
            paths,
            step,
            "it was stripped of its optimizer state, and nothing newer can be continued",
        )
    return chosen


def ensure_intact(paths: RunPaths, step: int) -> bool:
    """Whether the checkpoint of `step` verifies; a damaged folder is moved aside, and restored from
    its archive.
    """
    checkpoint_dir, archive_path = paths.checkpoint_dir(step), paths.archive_path(step)
    if checkpoint_dir.exists():
        damage = find_damage(checkpoint_dir, step)
        if damage is None:
            return True
        quarantine(checkpoint_dir, paths, f"its files are not those that were committed: {damage}")
    if not archive_path.exists():
        return False
    staged_dir = paths.checkpoints_dir / f"{IMPORTING_PREFIX}{STEP_PREFIX}{step}"
    try:
        if extract_archive(archive_path, staged_dir).step != step:
            shutil.rmtree(staged_dir)
            raise ArchiveError("it holds the checkpoint of another step")
    except ArchiveError as error:
        quarantine(archive_path, paths, error.message)
        return False
    staged_dir.rename(checkpoint_dir)
    fsync_dir(paths.checkpoints_dir)
    print(f"restored checkpoint {checkpoint_dir.name} from {archive_path}", flush=True)
    return True


def clean_up(paths: RunPaths) -> None:
    """Finish what a killed attempt had begun to delete, drop what it had not finished to write;
    lose nothing.
    """
    for doomed in paths.checkpoints_dir.glob(f"{DELETING_PREFIX}{STEP_PREFIX}*"):
        shutil.rmtree(doomed)
    # A copy of what is whole elsewhere.
    for staged in paths.checkpoints_dir.glob(f"{IMPORTING_PREFIX}*"):
        shutil.rmtree(staged)
    unfinished_markers = f"{STEP_PREFIX}*/.{marker_path(Path()).name}.*.tmp"
    for pattern in (TEMPORARY_GLOB, unfinished_markers):
        for temporary in paths.checkpoints_dir.glob(pattern):
            temporary.unlink()
    committed = set(list_committed(paths))
    for folder in list_checkpoint_dirs(paths):
        if not is_step(folder.name) or int(folder.name.removeprefix(STEP_PREFIX)) not in committed:
            quarantine(folder, paths, "it was still being written when its attempt died")


def set_aside(paths: RunPaths, step: int, why: str) -> None:
    """Move the checkpoint of a step out of the way, and its archive with it."""
    for path in (paths.archive_path(step), paths.checkpoint_dir(step)):
        if path.exists():
            quarantine(path, paths, why)


def quarantine(path: Path, paths: RunPaths, why: str) -> None:
    """Move a folder or archive aside under a free name and say so; it is never read or deleted by
    us again.
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
    """Bring metrics and scores to where they stood when the checkpoint of `step` was written."""
    for carried in sorted((paths.checkpoint_dir(step) / _RUN_FILES).glob("*.jsonl")):
        write_bytes_atomic(paths.run_dir / carried.name, carried.read_bytes())
