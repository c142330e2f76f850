"""Carries out the decisions of `choose` for an attempt, and imports checkpoints from elsewhere.

A folder, an archive, or an archive in remote storage is copied next to the run's own checkpoints,
verified, compared with the run's fingerprint, and only then given a name that counts. Newer
checkpoints are moved aside, so `choose` finds the imported one as the newest.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from runner.checkpoints.archive import ArchiveError, extract_archive
from runner.checkpoints.choose import (
    Choice,
    Policy,
    Verification,
    Wanted,
    build_policy,
    choose,
    describe_rewind,
    read_inventory,
)
from runner.checkpoints.commit import (
    IMPORTING_PREFIX,
    carry_out,
    clean_up,
    drop_leftovers,
    set_aside,
)
from runner.checkpoints.compare import (
    OtherMicroBatchError,
    UnusableError,
    refuse_other_fingerprint,
    require_resumable,
)
from runner.checkpoints.marker import (
    is_intact,
    load_marker,
    read_best_step,
    read_evaluations,
    sync_folder,
    write_marker,
)
from runner.checkpoints.remote import RemoteFolder, open_named_archive, retry
from runner.checkpoints.retention import apply_retention
from runner.errors import CorruptFileError, RefusedError, RunnerError
from runner.files import fsync_dir
from runner.recipe.launch_section import CheckpointsSection
from runner.recipe.parse import Recipe
from runner.run.paths import STEP_PREFIX, RunPaths

_OTHER_RUN: Final = (
    "only a checkpoint of the same recipe, data and number of processes can be resumed"
)

Result = TypeVar("Result")
# Shows the name of the current wait.
Phase = Callable[[str], AbstractContextManager[object]]


def import_checkpoint(
    paths: RunPaths,
    checkpoints: CheckpointsSection,
    fingerprint: Mapping[str, Any],
    fetch: Callable[[int | None], Path | None],
) -> int:
    """Copy a checkpoint, and the one with its best weights, into the run; return the step of the
    first one.

    `fetch(None)` returns the requested folder or archive, `fetch(step)` another one from the same
    place.

    Raises:
        RefusedError: it is damaged, belongs to another run, or its best weights cannot be found.
    """
    clean_up(paths)
    source = fetch(None)
    assert source is not None
    staged_dir = _stage(source, paths, "asked-for")
    marker = load_marker(staged_dir)
    require_resumable(marker, fingerprint, _OTHER_RUN)
    best = read_best_step(staged_dir, checkpoints)
    staged = [staged_dir]
    if best is not None and best != marker.step:
        best_source = fetch(best)
        if best_source is not None:
            staged.insert(0, _stage(best_source, paths, "best"))
            refuse_other_fingerprint(load_marker(staged[0]), fingerprint, _OTHER_RUN)
            _require_same_course(staged[0], staged_dir, best, checkpoints)
        elif _restore_own(paths, checkpoints, best):
            _require_same_course(paths.checkpoint_dir(best), staged_dir, best, checkpoints)
        else:
            raise UnusableError(
                f"{source} has its best weights at step {best}, which is not next to it",
                hint=f"put {STEP_PREFIX}{best} or {STEP_PREFIX}{best}.zip into the same folder",
            )
    set_aside_after(paths, marker.step)
    for folder in staged:
        _put_in_place(folder, paths)
    clean_up(paths)
    return marker.step


def _require_same_course(
    best_dir: Path, later_dir: Path, best: int, checkpoints: CheckpointsSection
) -> None:
    """Refuse a checkpoint of the best step whose recorded evaluations differ from those in the
    later checkpoint.

    A run that went back to an older checkpoint may have trained differently since (on a GPU), under
    the same names.
    """
    known, seen = read_evaluations(later_dir, checkpoints), read_evaluations(best_dir, checkpoints)
    if known[: len(seen)] != seen:
        raise UnusableError(
            f"the checkpoint of step {best} next to it comes from a different training history"
            " (its recorded evaluations differ)"
        )


def _restore_own(paths: RunPaths, checkpoints: CheckpointsSection, step: int) -> bool:
    """True if the run has an intact checkpoint of a step; a damaged folder is moved aside and
    restored from its archive.
    """
    found = read_inventory(paths)
    kept = {step: found.kept[step]} if step in found.kept else {}
    choice = choose(
        replace(found, kept=kept), "latest", None, Policy(_build_verification(paths, checkpoints))
    )
    carry_out(paths, choice.moves)
    return choice.step is not None


def require_step(paths: RunPaths, checkpoints: CheckpointsSection, step: int) -> None:
    """Ensure that the intact folder of a step exists, restored from the run's own archive if
    necessary.

    Raises:
        RefusedError: neither verifies.
    """
    drop_leftovers(paths)
    if not _restore_own(paths, checkpoints, step):
        raise RefusedError(f"{paths.checkpoint_dir(step)} is lost: no copy of it verifies")


def _build_verification(paths: RunPaths, checkpoints: CheckpointsSection) -> Verification:
    """A verification that unpacks next to the checkpoints, so that an archive's folder can be
    renamed into place.
    """
    return Verification(paths, checkpoints, paths.checkpoints_dir, IMPORTING_PREFIX)


def find_local_checkpoint(source: Path, step: int | None) -> Path | None:
    """The path of that step next to the source, a local folder or archive; without a step, the
    source.
    """
    if step is None:
        return source
    folder = source.absolute().parent
    paths = (folder / f"{STEP_PREFIX}{step}", folder / f"{STEP_PREFIX}{step}.zip")
    return next((path for path in paths if path.exists()), None)


def import_newest(
    paths: RunPaths,
    recipe: Recipe,
    fingerprint: Mapping[str, Any],
    remote: RemoteFolder,
    *,
    skip_other_micro_batches: bool = False,
    before_resuming: Callable[[], None],
    phase: Phase = nullcontext,
) -> int | None:
    """Import the newest checkpoint of this run from remote storage that can be resumed; None if
    it holds none, or only ignored ones.

    `skip_other_micro_batches`: ignore such checkpoints, in a run whose micro-batch has changed
    since. `before_resuming` and `phase` are those of `choose_resume_step`.

    Raises:
        RefusedError: there are checkpoints, but none can be resumed.
    """
    _read_with_retries(
        partial(remote.require_owner, fingerprint["recipe_digest"], claim=False), recipe
    )
    steps = _read_with_retries(remote.list_steps, recipe)
    if steps:
        before_resuming()
    skipped: list[int] = []
    for step in reversed(steps):
        try:
            fetch = build_fetch(remote, step, recipe, paths, phase)
            return import_checkpoint(paths, recipe.checkpoints, fingerprint, fetch)
        except UnusableError as error:
            print(f"warning: {remote.url}, step {step}: {error.message}", flush=True)
        except OtherMicroBatchError:
            if not skip_other_micro_batches:
                raise
            skipped.append(step)
            print(
                f"warning: {remote.url}, step {step}: from before the run ran out of memory",
                flush=True,
            )
    if len(skipped) < len(steps):
        raise RefusedError(
            f"{remote.url} holds checkpoints of this run, but none can be resumed (see the log)",
            hint="`runner launch RECIPE --fresh` starts at step 0",
        )
    return None


def build_fetch(
    folder: RemoteFolder,
    wanted: int,
    recipe: Recipe,
    paths: RunPaths,
    phase: Phase = nullcontext,
) -> Callable[[int | None], Path | None]:
    """The `fetch` of `import_checkpoint` for remote storage; `clean_up` removes the downloads."""

    def fetch(step: int | None) -> Path | None:
        number = wanted if step is None else step
        target = paths.checkpoints_dir / f"{IMPORTING_PREFIX}fetched" / f"{STEP_PREFIX}{number}.zip"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with phase(f"downloading step {number} from {folder.url}"):
                _read_with_retries(partial(folder.fetch, number, target), recipe)
        except CorruptFileError as error:
            raise UnusableError(error.message) from None
        except FileNotFoundError as error:
            if step is None:
                raise RefusedError(str(error)) from None
            return None
        return target

    return fetch


def _read_with_retries(function: Callable[[], Result], recipe: Recipe) -> Result:
    num_retries = recipe.checkpoints.remote.num_retries if recipe.checkpoints.remote else 0
    try:
        return retry(function, num_retries, threading.Event())[0]
    except (RunnerError, FileNotFoundError):
        raise
    except Exception as error:  # each file system has its own errors
        raise OSError(f"remote storage cannot be read: {type(error).__name__}: {error}") from error


def set_aside_after(paths: RunPaths, step: int) -> None:
    for newer in read_inventory(paths).kept:
        if newer > step:
            set_aside(paths, newer, describe_rewind(step))


def _stage(source: Path, paths: RunPaths, name: str) -> Path:
    """A verified copy of a folder or archive in the checkpoints folder, under a name that does not
    count yet.
    """
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
        raise UnusableError(f"{source} cannot be resumed from: {error.message}") from None
    return staged_dir


def _copy_checkpoint(source_dir: Path, target_dir: Path) -> None:
    """Copy exactly the files that the marker states, then verify the copy."""
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
        raise CorruptFileError("its files differ from those committed")
    sync_folder(target_dir)


def _put_in_place(staged_dir: Path, paths: RunPaths) -> None:
    """Give a staged copy its name, unless the run already has the same checkpoint."""
    marker = load_marker(staged_dir)
    checkpoint_dir = paths.checkpoint_dir(marker.step)
    if (
        checkpoint_dir.exists()
        and is_intact(checkpoint_dir)
        and load_marker(checkpoint_dir) == marker
    ):
        shutil.rmtree(staged_dir)
        return
    set_aside(paths, marker.step, "an imported checkpoint replaces it")
    staged_dir.rename(checkpoint_dir)
    fsync_dir(paths.checkpoints_dir)


def choose_resume_step(
    paths: RunPaths,
    recipe: Recipe,
    fingerprint: Mapping[str, Any],
    resume: str,
    remote: RemoteFolder | None = None,
    *,
    divisor: int = 1,
    before_resuming: Callable[[], None] = lambda: None,
    phase: Phase = nullcontext,
) -> int | None:
    """The step that this attempt resumes from, where `resume` is `Attempt.resume`; None to start
    from step 0.

    A `divisor` (`Attempt.micro_batch_divisor`) above 1 means that the run ran out of memory;
    checkpoints written in larger micro-batches are then left behind.

    `before_resuming` is called once a checkpoint is known to be resumed, and before any checkpoint
    is moved or imported: if it raises, the run stays as it is. `phase` is entered, with its name,
    while an archive is downloaded.

    Raises:
        RefusedError: the requested checkpoint cannot be resumed.
        OSError: remote storage cannot be reached: starting from step 0 instead would lose more.
    """
    checkpoints = recipe.checkpoints
    named: dict[str, Wanted] = {"latest": "latest", "best": "best"}
    wanted = named.get(resume, "auto")  # an imported checkpoint is then the newest one
    if resume not in ("auto", "none", *named):
        before_resuming()
    if "://" in resume:
        folder, step = open_named_archive(resume, recipe)
        fetch = build_fetch(folder, step, recipe, paths, phase)
        import_checkpoint(paths, checkpoints, fingerprint, fetch)
    elif resume not in ("auto", "none", *named):
        import_checkpoint(
            paths, checkpoints, fingerprint, partial(find_local_checkpoint, Path(resume))
        )
    policy = build_policy(recipe, resume, divisor, _build_verification(paths, checkpoints))
    choice = _choose_own(paths, wanted, fingerprint, policy, before_resuming)
    may_load = resume == "auto" and checkpoints.remote is not None and checkpoints.remote.load
    if choice.step is None and remote is not None and may_load:
        imported = import_newest(
            paths,
            recipe,
            fingerprint,
            remote,
            skip_other_micro_batches=divisor > 1,
            before_resuming=before_resuming,
            phase=phase,
        )
        if imported is not None:
            choice = _choose_own(paths, wanted, fingerprint, policy, before_resuming)
    for line in choice.version_warnings:
        print(
            "warning: resuming under a different version;"
            f" the result may differ in the last bits: {line}",
            flush=True,
        )
    if choice.step is not None:
        # Retention that a killed attempt did not reach, under the limits of the current recipe.
        evaluations = read_evaluations(paths.checkpoint_dir(choice.step), checkpoints)
        apply_retention(paths, checkpoints, evaluations, fingerprint["recipe_digest"])
    return choice.step


def _choose_own(
    paths: RunPaths,
    wanted: Wanted,
    fingerprint: Mapping[str, Any],
    policy: Policy,
    before_resuming: Callable[[], None],
) -> Choice:
    """Choose among the run's own checkpoints, and carry out the choice.

    Raises:
        RefusedError: if the choice is a refusal.
    """
    drop_leftovers(paths)
    choice = choose(read_inventory(paths), wanted, fingerprint, policy)
    if choice.step is not None:
        before_resuming()
    carry_out(paths, choice.moves)
    if choice.refusal is not None:
        raise choice.refusal
    return choice


def resolve_checkpoint(
    paths: RunPaths, checkpoints: CheckpointsSection, which: str, scratch_dir: Path
) -> Path:
    """The folder with the weights of a run's `best` or `latest` checkpoint, or of a folder or
    archive given by path.

    It is verified, but may be stripped of its optimizer state. Nothing in the run directory is
    changed: a checkpoint that exists only as an archive is unpacked into `scratch_dir`, which the
    caller removes afterwards.

    Raises:
        RefusedError: there is none that verifies.
    """
    if which not in ("best", "latest"):
        return _resolve_path(Path(which), scratch_dir)
    policy = Policy(Verification(paths, checkpoints, scratch_dir))
    wanted: Wanted = "best" if which == "best" else "latest"
    choice = choose(read_inventory(paths), wanted, None, policy)
    if choice.weights_dir is None:
        raise RefusedError(f"{paths.checkpoints_dir} holds no checkpoint that verifies")
    return choice.weights_dir


def _resolve_path(path: Path, scratch_dir: Path) -> Path:
    if path.is_dir():
        if not is_intact(path):
            raise RefusedError(
                f"{path} is not an intact checkpoint: its files do not match its marker"
            )
        return path
    if not path.exists():
        raise RefusedError(f"there is no checkpoint {path}")
    target_dir = scratch_dir / path.stem
    try:
        extract_archive(path, target_dir)
    except ArchiveError as error:
        raise RefusedError(error.message) from None
    return target_dir
