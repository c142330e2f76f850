"""Checkpoints that count only with a marker, written last; finding the newest one that verifies; deleting our own.

Owns nothing of what Transformers writes into a checkpoint: only whether it counts, and how long it stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from runner.errors import RefusedError
from runner.fsio import fsync_dir, hash_file, hash_json, load_json, write_json_atomic
from runner.identity import diff_payloads
from runner.paths import STEP_PREFIX, RunPaths, marker_path

_DELETING_PREFIX: Final = ".deleting-"
# A pickle that holds the hub token in clear; nothing of it is needed to resume.
_NEVER_KEPT: Final = ("training_args.bin",)


def commit_checkpoint(saved_dir: Path, paths: RunPaths, step: int, fingerprint: Mapping[str, Any]) -> None:
    """Turn a folder that all ranks have finished writing into the checkpoint of `step`: sync, rename, then the marker.

    Called on one rank, after a barrier.
    """
    for name in _NEVER_KEPT:
        (saved_dir / name).unlink(missing_ok=True)
    checkpoint_dir = paths.checkpoint_dir(step)
    assert not checkpoint_dir.exists(), "everything newer than what was resumed from has been moved aside"
    sync_folder(saved_dir)
    files = {
        str(path.relative_to(saved_dir)): {"num_bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in _list_files(saved_dir)
    }
    saved_dir.rename(checkpoint_dir)
    fsync_dir(paths.checkpoints_dir)
    marker = {"step": step, "fingerprint": dict(fingerprint), "files": files}
    write_json_atomic(marker_path(checkpoint_dir), marker | {"marker_sha256": hash_json(marker)})


def list_committed(paths: RunPaths) -> list[int]:
    """Steps whose checkpoint carries a marker, oldest first; contents are not verified."""
    return sorted(
        int(folder.name.removeprefix(STEP_PREFIX))
        for folder in _list_checkpoint_dirs(paths)
        if marker_path(folder).exists()
    )


def find_resume_step(
    paths: RunPaths, fingerprint: Mapping[str, Any], find_best: Callable[[Path], int | None] = lambda _: None
) -> int | None:
    """The step of the newest checkpoint that verifies, None where there is none. Everything newer is moved aside.

    `find_best` gives the step of the best weights as one checkpoint knows it: those are exported in the end, so a
    checkpoint is of use only while that other one verifies too.

    Raises:
        RefusedError: the checkpoint was written under another world size, micro-batch or recipe, so that continuing
            it would not be the same run.
    """
    _finish_deletions(paths)
    committed = set(list_committed(paths))
    for folder in _list_checkpoint_dirs(paths):
        step = folder.name.removeprefix(STEP_PREFIX)
        if not step.isdecimal() or int(step) not in committed:
            quarantine(folder, paths, "it was still being written when its attempt died")
    for number in sorted(committed, reverse=True):
        checkpoint_dir = paths.checkpoint_dir(number)
        if not checkpoint_dir.exists():  # the best one of a newer checkpoint, found damaged already
            continue
        if not is_intact(checkpoint_dir):
            quarantine(checkpoint_dir, paths, "its files are not those that were committed")
            continue
        _refuse_other_fingerprint(load_json(marker_path(checkpoint_dir))["fingerprint"], fingerprint, number)
        best = find_best(checkpoint_dir)
        if best is None or best == number or is_intact(paths.checkpoint_dir(best)):
            return number
        if paths.checkpoint_dir(best).exists():
            quarantine(paths.checkpoint_dir(best), paths, "its files are not those that were committed")
        quarantine(checkpoint_dir, paths, f"the best weights so far, of step {best}, are lost")
    return None


def is_intact(checkpoint_dir: Path) -> bool:
    """Whether the marker is as it was written and every file has the size and checksum that it states."""
    try:
        marker = dict(load_json(marker_path(checkpoint_dir)))
        return marker.pop("marker_sha256") == hash_json(marker) and all(
            (path := checkpoint_dir / name).is_file()
            and path.stat().st_size == stated["num_bytes"]
            and hash_file(path) == stated["sha256"]
            for name, stated in marker["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged marker
        return False


def sync_folder(folder: Path) -> None:
    """Make every file below `folder`, and its name, survive a power loss."""
    for path in _list_files(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)


def quarantine(folder: Path, paths: RunPaths, why: str) -> None:
    """Move a folder aside under a free name and say so; it is never read or deleted by us again."""
    paths.quarantine_dir.mkdir(exist_ok=True)
    number = 1
    while (target := paths.quarantine_dir / f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(target)
    print(f"warning: moved checkpoint {folder.name} to {target}: {why}", flush=True)


def prune_checkpoints(paths: RunPaths, *, keep_latest: int, best_step: int | None) -> None:
    """Delete committed checkpoints beyond the newest `keep_latest`, but for the best; foreign folders stay."""
    for step in list_committed(paths)[:-keep_latest]:
        if step != best_step:
            doomed = paths.checkpoints_dir / f"{_DELETING_PREFIX}{STEP_PREFIX}{step}"
            paths.checkpoint_dir(step).rename(doomed)
            shutil.rmtree(doomed)


def _finish_deletions(paths: RunPaths) -> None:
    for doomed in paths.checkpoints_dir.glob(f"{_DELETING_PREFIX}{STEP_PREFIX}*"):
        shutil.rmtree(doomed)


def _list_checkpoint_dirs(paths: RunPaths) -> list[Path]:
    """Our folders: committed ones, and what Transformers was writing when it was killed."""
    if not paths.checkpoints_dir.is_dir():
        return []
    return [
        folder
        for folder in paths.checkpoints_dir.iterdir()
        if folder.is_dir() and folder.name.startswith((STEP_PREFIX, "checkpoint-"))
    ]


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _refuse_other_fingerprint(stored: Mapping[str, Any], current: Mapping[str, Any], step: int) -> None:
    differences = diff_payloads(
        {key: value for key, value in stored.items() if key != "versions"},
        {key: value for key, value in current.items() if key != "versions"},
    )
    if differences:
        shown = "\n".join(f"  {line}" for line in differences)
        raise RefusedError(
            f"the checkpoint of step {step} cannot be continued exactly, something changed since:\n{shown}",
            hint="launch as before, or start over with `--fresh`, which moves the old run aside",
        )
    for line in diff_payloads(stored["versions"], current["versions"], "versions."):
        print(f"warning: resuming under another version, the result may differ in the last bits: {line}", flush=True)
