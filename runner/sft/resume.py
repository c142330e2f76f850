"""Which checkpoint an attempt goes on from: its own, a named one, or one that lies elsewhere.

What lies elsewhere (a folder, an archive) is copied into the run's own checkpoints after it verified, and only if it is
of this run. Whatever is newer than what is resumed from is moved aside.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError, RefusedError
from runner.fsio import fsync_dir
from runner.paths import STEP_PREFIX, RunPaths
from runner.recipe_sections import CheckpointsSection
from runner.sft.archives import ArchiveError, extract_archive
from runner.sft.checkpoints import (
    IMPORTING_PREFIX,
    LAUNCH_AS_BEFORE,
    clean_up,
    ensure_intact,
    find_resume_step,
    list_archived,
    list_committed,
    refuse_other_fingerprint,
    set_aside,
)
from runner.sft.evaluations import read_best_step, read_evaluations
from runner.sft.markers import Marker, is_intact, load_marker, sync_folder, write_marker
from runner.sft.retention import apply_retention

_TRY_AUTO: Final = "launch without `--resume`: what is damaged is moved aside, and the newest that verifies is used"
_OTHER_RUN: Final = "only a checkpoint of the same recipe, data and number of processes can be continued"


def choose_resume_step(
    paths: RunPaths, checkpoints: CheckpointsSection, fingerprint: Mapping[str, Any], resume: str
) -> int | None:
    """The step that this attempt goes on from, `resume` being `Attempt.resume`; None to start at step 0.

    Raises:
        RefusedError: what was asked for cannot be continued.
    """
    if resume in ("latest", "best"):
        rewind_to_named(paths, checkpoints, fingerprint, resume)
    elif resume != "auto":
        import_checkpoint(paths, checkpoints, fingerprint, partial(find_beside, Path(resume)))
    step = find_auto_step(paths, checkpoints, fingerprint)
    if step is not None:  # what a killed attempt had not come to, under the limits of today's recipe
        apply_retention(paths, checkpoints, read_evaluations(paths.checkpoint_dir(step), checkpoints))
    return step


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
    _require_continuable(load_marker(paths.checkpoint_dir(step)), fingerprint, LAUNCH_AS_BEFORE)
    _set_aside_after(paths, step)
    return step


def import_checkpoint(
    paths: RunPaths,
    checkpoints: CheckpointsSection,
    fingerprint: Mapping[str, Any],
    fetch: Callable[[int | None], Path | None],
) -> int:
    """Copy a checkpoint, and the one with its best weights, into the run's own; the step of the first one.

    `fetch(None)` gives the folder or archive that was asked for, `fetch(step)` another one from the same place.

    Raises:
        RefusedError: it is not whole, not of this run, or its best weights are nowhere to be found.
    """
    clean_up(paths)
    source = fetch(None)
    assert source is not None
    staged_dir = _stage(source, paths, "asked-for")
    marker = load_marker(staged_dir)
    _require_continuable(marker, fingerprint, _OTHER_RUN)
    best = read_best_step(staged_dir, checkpoints)
    staged = [staged_dir]
    if best is not None and best != marker.step:
        best_source = fetch(best)
        if best_source is not None:
            staged.insert(0, _stage(best_source, paths, "best"))
            refuse_other_fingerprint(load_marker(staged[0]), fingerprint, _OTHER_RUN)
        elif not ensure_intact(paths, best):
            raise RefusedError(
                f"{source} would export the weights of step {best}, which are not beside it",
                hint=f"put {STEP_PREFIX}{best} or {STEP_PREFIX}{best}.zip into the same folder",
            )
    _set_aside_after(paths, marker.step)
    for folder in staged:
        _put_in_place(folder, paths)
    return marker.step


def find_beside(source: Path, step: int | None) -> Path | None:
    """What `import_checkpoint` fetches where the source is a local folder or archive."""
    if step is None:
        return source
    names = (f"{STEP_PREFIX}{step}", f"{STEP_PREFIX}{step}.zip")
    return next((path for name in names if (path := source.absolute().parent / name).exists()), None)


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
    if is_intact(paths.checkpoint_dir(step)):
        return paths.checkpoint_dir(step)
    target_dir = scratch_dir / f"{STEP_PREFIX}{step}"
    try:
        if target_dir.exists() or extract_archive(paths.archive_path(step), target_dir).step == step:
            return target_dir
    except (ArchiveError, FileNotFoundError):
        pass
    return None


def _require_intact(paths: RunPaths, step: int) -> None:
    checkpoint_dir = paths.checkpoint_dir(step)
    if checkpoint_dir.exists():
        if not is_intact(checkpoint_dir):
            raise RefusedError(
                f"{checkpoint_dir} does not verify: its files are not those of its marker", hint=_TRY_AUTO
            )
    elif not ensure_intact(paths, step):
        raise RefusedError(f"{checkpoint_dir} is lost", hint=_TRY_AUTO)


def _require_continuable(marker: Marker, fingerprint: Mapping[str, Any], hint: str) -> None:
    refuse_other_fingerprint(marker, fingerprint, hint)
    if marker.is_stripped:
        raise RefusedError(
            f"the checkpoint of step {marker.step} was stripped of its optimizer state and cannot be continued",
            hint="with `checkpoints.save_optimizer: true` every checkpoint can be continued",
        )


def _set_aside_after(paths: RunPaths, step: int) -> None:
    for newer in sorted({*list_committed(paths), *list_archived(paths)}):
        if newer > step:
            set_aside(paths, newer, f"the run goes on from step {step}")


def _stage(source: Path, paths: RunPaths, name: str) -> Path:
    """A verified copy of a folder or archive among the checkpoints, under a name that does not count yet."""
    if not source.exists():
        raise RefusedError(f"there is no checkpoint {source}")
    staged_dir = paths.checkpoints_dir / f"{IMPORTING_PREFIX}{name}"
    paths.checkpoints_dir.mkdir(exist_ok=True)
    try:
        if source.is_dir():
            _copy_checkpoint(source, staged_dir)
        else:
            extract_archive(source, staged_dir)
    except CorruptFileError as error:
        raise RefusedError(f"{source} cannot be resumed from: {error.message}") from None
    return staged_dir


def _copy_checkpoint(source_dir: Path, target_dir: Path) -> None:
    """Copy exactly the files that the marker states, then hold the copy against it."""
    marker = load_marker(source_dir)
    target_dir.mkdir()
    for name in marker.files:
        path = source_dir / name
        if not path.is_file() or path.is_symlink():
            raise CorruptFileError(f"{name} is missing, or is not a plain file")
        (target_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target_dir / name)
    write_marker(target_dir, marker)
    if not is_intact(target_dir):
        raise CorruptFileError("its files are not those that were committed")
    sync_folder(target_dir)


def _put_in_place(staged_dir: Path, paths: RunPaths) -> None:
    """Give a staged copy its name, unless the run has the very same checkpoint already."""
    marker = load_marker(staged_dir)
    checkpoint_dir = paths.checkpoint_dir(marker.step)
    if checkpoint_dir.exists() and is_intact(checkpoint_dir) and load_marker(checkpoint_dir) == marker:
        shutil.rmtree(staged_dir)
        return
    set_aside(paths, marker.step, "another one is put into its place")
    staged_dir.rename(checkpoint_dir)
    fsync_dir(paths.checkpoints_dir)
