"""Which checkpoint an attempt goes on from: its own, a named one, or one that lies elsewhere.

What lies elsewhere (a folder, an archive) is copied into the run's own checkpoints after it verified, and only if it is
of this run. Whatever is newer than what is resumed from is moved aside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from runner.archives import ArchiveError, extract_archive, load_archived_marker
from runner.continuation import LAUNCH_AS_BEFORE, refuse_or_warn_of_versions
from runner.errors import CorruptFileError, RefusedError
from runner.evaluations import read_best_step, read_evaluations
from runner.markers import Marker, is_intact, list_archived, list_committed, load_marker
from runner.paths import STEP_PREFIX, RunPaths
from runner.recipe import Recipe
from runner.recipe_sections import CheckpointsSection
from runner.sft.checkpoints import clean_up, ensure_intact, find_resume_step, set_aside
from runner.sft.imports import (
    build_fetch,
    find_beside,
    has_other_micro_batch,
    import_checkpoint,
    import_newest,
    require_continuable,
    set_aside_after,
)
from runner.sft.retention import apply_retention
from runner.sft.storage import RemoteFolder, open_named_archive

_TRY_AUTO: Final = "launch without `--resume`: what is damaged is moved aside, and the newest that verifies is used"


def choose_resume_step(
    paths: RunPaths,
    recipe: Recipe,
    fingerprint: Mapping[str, Any],
    resume: str,
    remote: RemoteFolder | None = None,
    *,
    has_run_out_of_memory: bool = False,
) -> int | None:
    """The step that this attempt goes on from, `resume` being `Attempt.resume`; None to start at step 0.

    A run that `has_run_out_of_memory` and goes on in smaller micro-batches leaves behind what it wrote before.

    Raises:
        RefusedError: what was asked for cannot be continued.
        OSError: remote storage cannot be reached: to start at step 0 instead would be the greater loss.
    """
    checkpoints = recipe.checkpoints
    if has_run_out_of_memory and resume in ("auto", "none"):
        set_aside_other_micro_batches(paths, fingerprint)
    if resume in ("latest", "best"):
        rewind_to_named(paths, checkpoints, fingerprint, resume)
    elif "://" in resume:
        folder, wanted = open_named_archive(resume, recipe)
        import_checkpoint(paths, checkpoints, fingerprint, build_fetch(folder, wanted, recipe, paths))
    elif resume not in ("auto", "none"):
        import_checkpoint(paths, checkpoints, fingerprint, partial(find_beside, Path(resume)))
    step = find_auto_step(paths, checkpoints, fingerprint)
    if step is None and resume == "auto" and remote is not None and checkpoints.remote and checkpoints.remote.load:
        remote_step = import_newest(paths, recipe, fingerprint, remote, skip_other_micro_batches=has_run_out_of_memory)
        step = find_auto_step(paths, checkpoints, fingerprint) if remote_step is not None else None
    if step is not None:
        refuse_or_warn_of_versions(load_marker(paths.checkpoint_dir(step)), fingerprint, recipe)
        # What a killed attempt had not come to, under the limits of today's recipe.
        evaluations = read_evaluations(paths.checkpoint_dir(step), checkpoints)
        apply_retention(paths, checkpoints, evaluations, fingerprint["recipe_digest"])
    return step


def set_aside_other_micro_batches(paths: RunPaths, fingerprint: Mapping[str, Any]) -> None:
    """Move aside what was written in other micro-batches: to go on from it would not be bit-identical."""
    clean_up(paths)
    for step in sorted({*list_committed(paths), *list_archived(paths)}):
        marker = _load_either_marker(paths, step)
        if marker is not None and has_other_micro_batch(marker, fingerprint):
            set_aside(paths, step, "it was written in larger micro-batches, before the run went out of memory")


def _load_either_marker(paths: RunPaths, step: int) -> Marker | None:
    """None where neither folder nor archive can be read; that is found out again, and moved aside for that."""
    for load, path in ((load_marker, paths.checkpoint_dir(step)), (load_archived_marker, paths.archive_path(step))):
        with contextlib.suppress(CorruptFileError, OSError):
            return load(path)
    return None


def find_auto_step(paths: RunPaths, checkpoints: CheckpointsSection, fingerprint: Mapping[str, Any]) -> int | None:
    """`find_resume_step`, with the best step as the recipe's `checkpoints` choose it."""
    return find_resume_step(paths, fingerprint, lambda folder: read_best_step(folder, checkpoints))


def rewind_to_named(
    paths: RunPaths, checkpoints: CheckpointsSection, fingerprint: Mapping[str, Any], which: str
) -> int:
    """The step of the `latest` or the `best` committed checkpoint; what is newer is moved aside.

    Raises:
        RefusedError: there is none, it does not verify, or nothing can be continued from it.
    """
    clean_up(paths)
    steps = sorted({*list_committed(paths), *list_archived(paths)})
    if not steps:
        raise RefusedError(f"{paths.checkpoints_dir} holds no checkpoint", hint="launch without `--resume`")
    step = steps[-1]
    _require_intact(paths, step)
    best = read_best_step(paths.checkpoint_dir(step), checkpoints)
    if best is not None and best != step:
        _require_intact(paths, best)
    if which == "best":
        if best is None:
            raise RefusedError(f"nothing was evaluated up to step {step}", hint="--resume latest")
        step = best
    require_continuable(load_marker(paths.checkpoint_dir(step)), fingerprint, LAUNCH_AS_BEFORE)
    set_aside_after(paths, step)
    return step


def _require_intact(paths: RunPaths, step: int) -> None:
    checkpoint_dir = paths.checkpoint_dir(step)
    if checkpoint_dir.exists():
        if not is_intact(checkpoint_dir, step):
            raise RefusedError(
                f"{checkpoint_dir} does not verify: its files are not those of its marker", hint=_TRY_AUTO
            )
    elif not ensure_intact(paths, step):
        raise RefusedError(f"{checkpoint_dir} is lost", hint=_TRY_AUTO)


def resolve_checkpoint(paths: RunPaths, checkpoints: CheckpointsSection, which: str, scratch_dir: Path) -> Path:
    """The folder with the weights of the `best` or `latest` checkpoint of a run, or of a folder or archive by its path.

    Verified, perhaps stripped of its optimizer state. Nothing in the run directory is changed: what is only there as an
    archive is unpacked into `scratch_dir`, which the caller removes when it is done.

    Raises:
        RefusedError: there is none that verifies.
    """
    if which not in ("best", "latest"):
        return _resolve_path(Path(which), scratch_dir)
    steps = sorted({*list_committed(paths), *list_archived(paths)}, reverse=True)
    for step in steps:
        folder = _find_sound(paths, step, scratch_dir)
        if folder is not None and which == "best":
            best = read_best_step(folder, checkpoints)
            folder = folder if best in (None, step) else _find_sound(paths, best or step, scratch_dir)
        if folder is not None:
            return folder
    raise RefusedError(f"{paths.checkpoints_dir} holds no checkpoint that verifies")


def _resolve_path(path: Path, scratch_dir: Path) -> Path:
    if path.is_dir():
        if not is_intact(path):
            raise RefusedError(f"{path} is not a whole checkpoint: its files are not those that its marker states")
        return path
    if not path.exists():
        raise RefusedError(f"there is no checkpoint {path}")
    target_dir = scratch_dir / path.stem
    try:
        extract_archive(path, target_dir)
    except ArchiveError as error:
        raise RefusedError(error.message) from None
    return target_dir


def _find_sound(paths: RunPaths, step: int, scratch_dir: Path) -> Path | None:
    if is_intact(paths.checkpoint_dir(step), step):
        return paths.checkpoint_dir(step)
    target_dir = scratch_dir / f"{STEP_PREFIX}{step}"
    try:
        if target_dir.exists() or extract_archive(paths.archive_path(step), target_dir).step == step:
            return target_dir
    except (ArchiveError, FileNotFoundError):
        pass
    return None
