"""What the run has written so far travels inside each checkpoint, so that it can be continued on an empty machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from runner.fsio import write_bytes_atomic
from runner.paths import RunPaths

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
