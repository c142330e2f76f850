"""The disk that a run needs: the checkpoints that it keeps, one being written, and its export.

`runner check` estimates it for a whole grid; the trainer asks before it trains, and before each checkpoint.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from runner.errors import CorruptFileError
from runner.markers import list_committed, load_marker
from runner.paths import RunPaths
from runner.recipe import Recipe
from runner.schedule import Schedule, derive_schedule
from runner.sft.device_memory import Sharding, load_sharding, optimizer_bytes
from runner.sft.model_size import ModelSize, TrainedTensor

_SMALL_FILES_BYTES = 32 * 2**20  # tokenizer, records, scores


def estimate_disk(recipe: Recipe, size: ModelSize, sharding: Sharding, schedule: Schedule) -> int:
    """Bytes of one run at its fullest: while the last checkpoint that it may keep is written, or exported."""
    checkpoints = recipe.checkpoints
    weights = size.trained_bytes
    states = optimizer_bytes(recipe, size, sharding)
    written = schedule.num_checkpoints + schedule.num_evaluations
    num_kept = min(checkpoints.keep_latest + checkpoints.keep_best, written) + 1  # and the one being written
    num_with_states = num_kept if checkpoints.save_optimizer else min(2, num_kept)
    folders = num_kept * weights + num_with_states * states
    return folders * (2 if checkpoints.archive == "zip" else 1) + weights + _SMALL_FILES_BYTES


def free_bytes(output_root: Path) -> int:
    """Free bytes where the runs will be written; the folder need not be there yet."""
    folder = output_root.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(
    recipe: Recipe,
    paths: RunPaths,
    trained: Iterable[tuple[str, torch.nn.Parameter]],
    num_rows: int,
    num_processes: int,
) -> None:
    """Refuse to train where the checkpoints and the export cannot all be written, those that are there counted.

    Raises:
        OSError: ENOSPC, with what is needed and what is free.
    """
    tensors = tuple(
        TrainedTensor(name, int(getattr(one, "ds_numel", one.numel())), one.element_size()) for name, one in trained
    )
    size = ModelSize(0, 0, 0, tensors, 0, 0, 0, trains_output_embedding=False)
    whole = estimate_disk(recipe, size, load_sharding(recipe), derive_schedule(recipe, num_rows, num_processes))
    there = sum(path.stat().st_size for path in paths.checkpoints_dir.rglob("*") if path.is_file())
    require_space(paths.run_dir, whole - _SMALL_FILES_BYTES - there, "the checkpoints that are kept, and the export,")


def require_room_for_checkpoint(recipe: Recipe, paths: RunPaths, step: int) -> None:
    """Refuse to begin a checkpoint that would not fit, by the size of the newest one.

    Raises:
        OSError: ENOSPC, with what is needed and what is free.
    """
    for known in reversed(list_committed(paths)):
        try:
            marker = load_marker(paths.checkpoint_dir(known))
        except (CorruptFileError, OSError):
            continue
        if not marker.is_stripped:
            num_bytes = sum(entry.num_bytes for entry in marker.files.values())
            num_copies = 2 if recipe.checkpoints.archive == "zip" else 1
            require_space(paths.checkpoints_dir, num_bytes * num_copies, f"the checkpoint of step {step}")
            return


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises: OSError (ENOSPC) where fewer bytes are free."""
    free = free_bytes(folder)
    if free < num_bytes:
        words = f"{what} would take {num_bytes / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free"
        raise OSError(errno.ENOSPC, words, str(folder))
