"""An estimate of the disk that a run needs: the checkpoints that it keeps, one being written, and its export."""

from __future__ import annotations

import shutil
from pathlib import Path

from runner.recipe import Recipe
from runner.schedule import Schedule
from runner.sft.device_memory import Sharding, optimizer_bytes
from runner.sft.model_size import ModelSize

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
