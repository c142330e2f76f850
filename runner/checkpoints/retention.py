"""Retention of checkpoints: the newest, the best, the archived ones, and the removal of optimizer
states.

A kill during any step is safe: the next call starts from what it finds and does the rest.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from runner.checkpoints.archive import ArchiveError, load_archived_marker, write_archive
from runner.checkpoints.commit import DELETING_PREFIX, quarantine
from runner.checkpoints.marker import (
    is_intact,
    list_committed,
    load_marker,
    rank_steps,
    write_marker,
)
from runner.errors import CorruptFileError
from runner.files import fsync_dir
from runner.recipe.launch_section import CheckpointsSection
from runner.run.paths import STEP_PREFIX, RunPaths

# Files that only resuming needs, as Transformers and DeepSpeed name them.
_STATE_FILES: Final = re.compile(
    r"optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|latest|zero_to_fp32\.py|global_step\d+/.*"
)


def apply_retention(
    paths: RunPaths,
    checkpoints: CheckpointsSection,
    evaluations: Sequence[tuple[int, float]],
    recipe_digest: str,
) -> None:
    """Prune, archive and strip committed checkpoints as the recipe says. Called on one rank, after
    each commit.

    Checkpoints that this run did not write are neither counted nor touched: another run's, or a
    copy under another step's name.
    """
    committed = _list_own(paths, recipe_digest)
    kept = choose_kept(committed, evaluations, checkpoints)
    for step in committed:  # first: on a full disk this makes room
        if step not in kept:
            delete_checkpoint(paths, step)
    for step in kept:
        try:
            _keep(paths, step, checkpoints, is_newest=step == kept[-1])
        except (CorruptFileError, OSError) as error:
            if step == kept[-1] or is_intact(paths.checkpoint_dir(step)):
                raise
            quarantine(
                paths.checkpoint_dir(step), paths, f"it was damaged after it was committed: {error}"
            )


def _list_own(paths: RunPaths, recipe_digest: str) -> list[int]:
    """Steps of the committed checkpoints that this run has written; unreadable ones are moved
    aside, not deleted.
    """
    own: list[int] = []
    for step in list_committed(paths):
        try:
            marker = load_marker(paths.checkpoint_dir(step))
        except CorruptFileError as error:
            quarantine(
                paths.checkpoint_dir(step), paths, f"it was damaged after it was committed: {error}"
            )
            continue
        if marker.step == step and marker.fingerprint.get("recipe_digest") == recipe_digest:
            own.append(step)
    return own


def _keep(paths: RunPaths, step: int, checkpoints: CheckpointsSection, *, is_newest: bool) -> None:
    """Archive a checkpoint, and strip it once it is superseded."""
    if checkpoints.archive == "zip":
        ensure_archive(paths, step)
    if not checkpoints.save_optimizer and not is_newest:
        strip_checkpoint(paths.checkpoint_dir(step))
        if checkpoints.archive == "zip":
            ensure_archive(paths, step)


def choose_kept(
    committed: Sequence[int],
    evaluations: Sequence[tuple[int, float]],
    checkpoints: CheckpointsSection,
) -> list[int]:
    """The steps to keep, oldest first: the newest `keep_latest` and the best `keep_best`, which may
    overlap.
    """
    evaluated = [(step, value) for step, value in evaluations if step in committed]
    best = rank_steps(evaluated, checkpoints.mode)[: checkpoints.keep_best]
    return sorted({*sorted(committed)[-checkpoints.keep_latest :], *best})


def ensure_archive(paths: RunPaths, step: int) -> None:
    """Write the archive of a committed checkpoint, unless there is one with the same marker."""
    checkpoint_dir, archive_path = paths.checkpoint_dir(step), paths.archive_path(step)
    if archive_path.exists():
        try:
            if load_archived_marker(archive_path) == load_marker(checkpoint_dir):
                return
        except ArchiveError as error:
            quarantine(archive_path, paths, error.message)
    write_archive(checkpoint_dir, archive_path)


def delete_checkpoint(paths: RunPaths, step: int) -> None:
    """Delete a committed checkpoint; its archive first, because an archive without a folder would
    be restored.
    """
    paths.archive_path(step).unlink(missing_ok=True)
    fsync_dir(paths.checkpoints_dir)
    doomed = paths.checkpoints_dir / f"{DELETING_PREFIX}{STEP_PREFIX}{step}"
    paths.checkpoint_dir(step).rename(doomed)
    shutil.rmtree(doomed)


def strip_checkpoint(checkpoint_dir: Path) -> None:
    """Remove the files that only resuming needs: the new marker is written first, so that the
    folder verifies at every instant.
    """
    marker = load_marker(checkpoint_dir)
    if not marker.is_stripped:
        gone = sorted(name for name in marker.files if _STATE_FILES.fullmatch(name))
        left = {name: entry for name, entry in marker.files.items() if name not in gone}
        if not gone or not any(name.endswith(".safetensors") for name in left):
            return  # weights that only DeepSpeed's own files hold are kept
        marker = marker.model_copy(update={"files": left, "stripped_files": gone})
        write_marker(checkpoint_dir, marker)
    for name in marker.stripped_files:  # also those that a killed attempt left behind
        path = checkpoint_dir / name
        path.unlink(missing_ok=True)
        for folder in list(path.parents)[: name.count("/")]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
