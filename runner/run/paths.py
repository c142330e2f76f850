"""Every file name inside a run directory. No path is joined anywhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEFAULT_OUTPUT_ROOT: Final = Path("runs")
STEP_PREFIX: Final = "step-"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run, `runs/<grid>/<run name>/`."""

    run_dir: Path

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe, its digest and the content hashes behind it; written by
        `launch.run_files`.
        """
        return self.run_dir / "recipe.json"

    @property
    def record_path(self) -> Path:
        """All attempts; written by `launch.run_files`."""
        return self.run_dir / "run.json"

    @property
    def lease_path(self) -> Path:
        """Locked by the process that executes or trains this run."""
        return self.run_dir / "lease"

    @property
    def stop_path(self) -> Path:
        """A request to the running attempt to save a checkpoint and stop; any shell may
        write it.
        """
        return self.run_dir / "stop"

    @property
    def result_path(self) -> Path:
        """Written last by the training process: the run is complete."""
        return self.run_dir / "result.json"

    @property
    def push_path(self) -> Path:
        """The last requested push to the hub, without clock values. Written by the process that
        pushes; not part of the run's result.
        """
        return self.run_dir / "push.json"

    @property
    def push_lock_path(self) -> Path:
        """Locked by the process that pushes."""
        return self.run_dir / "push"

    @property
    def samples_path(self) -> Path:
        """Ids and hashes of the rows used for training and evaluation."""
        return self.run_dir / "samples.json"

    @property
    def metrics_path(self) -> Path:
        """Losses and evaluations, one row per step, no clock values."""
        return self.run_dir / "metrics.jsonl"

    @property
    def eval_rows_path(self) -> Path:
        """Per test row: summed NLLs and token counts of the base and of the tuned model."""
        return self.run_dir / "eval_rows.jsonl"

    @property
    def tracking_path(self) -> Path:
        """State that experiment trackers need in the next attempt: run ids, and the steps already
        sent.
        """
        return self.run_dir / "tracking.json"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard's event files, of all attempts."""
        return self.run_dir / "tensorboard"

    @property
    def predictions_path(self) -> Path:
        """Per test row: the answers of the base and of the tuned model, and their scores. Exists
        only if texts are generated.
        """
        return self.run_dir / "predictions.jsonl"

    @property
    def ranks_lock_path(self) -> Path:
        """Shared by all living ranks of an attempt on several machines; explained in `lease`."""
        return self.run_dir / "ranks"

    @property
    def checkpoints_dir(self) -> Path:
        """`step-N/` folders, each of which counts only if it has its marker."""
        return self.run_dir / "checkpoints"

    @property
    def quarantine_dir(self) -> Path:
        """Checkpoints that failed verification, moved aside and never read again."""
        return self.run_dir / "quarantine"

    @property
    def model_dir(self) -> Path:
        """The exported best model or adapter."""
        return self.run_dir / "model"

    @property
    def model_partial_dir(self) -> Path:
        """The export while it is being written and verified."""
        return self.run_dir / ".model-partial"

    @property
    def attempts_dir(self) -> Path:
        """One folder per attempt."""
        return self.run_dir / "attempts"

    def checkpoint_dir(self, step: int) -> Path:
        """The checkpoint of one optimizer step."""
        return self.checkpoints_dir / f"{STEP_PREFIX}{step}"

    def list_row_files(self) -> list[Path]:
        """The files of rows that grow with the run: metrics, scores, answers."""
        return sorted(self.run_dir.glob("*.jsonl"))

    def list_temporaries(self) -> list[Path]:
        """Leftovers of atomic writes by processes that were killed."""
        return [*self.run_dir.glob(".*.tmp"), *self.attempts_dir.glob("*/.*.tmp")]

    def archive_path(self, step: int) -> Path:
        """The same checkpoint as one ZIP file."""
        return self.checkpoints_dir / f"{STEP_PREFIX}{step}.zip"

    @property
    def uploads_dir(self) -> Path:
        """Archives that have yet to reach the remote storage, `step-N.zip`."""
        return self.checkpoints_dir / ".uploads"

    def attempt(self, number: int) -> AttemptPaths:
        """The files of attempt `number`, counted from 1."""
        return AttemptPaths(self.attempts_dir / str(number))


@dataclass(frozen=True)
class AttemptPaths:
    """The files of one attempt. Everything that differs between two identical runs is
    stored here.
    """

    attempt_dir: Path

    @property
    def log_path(self) -> Path:
        """Everything that `accelerate launch` and the training process print."""
        return self.attempt_dir / "log.txt"

    @property
    def launcher_lock_path(self) -> Path:
        """Locked by the launcher of an attempt on several machines while the attempt may continue;
        explained in `lease`.
        """
        return self.attempt_dir / "launcher"

    @property
    def logs_path(self) -> Path:
        """One line per step: loss, learning rate, speed."""
        return self.attempt_dir / "logs.txt"

    @property
    def progress_path(self) -> Path:
        """The training process's current phase, step and loss."""
        return self.attempt_dir / "progress.json"

    def failure_path(self, rank: int = 0) -> Path:
        """The kind and message of the failure, as one rank saw it."""
        return self.attempt_dir / ("failure.json" if rank == 0 else f"failure-rank-{rank}.json")

    def list_failure_paths(self) -> list[Path]:
        """The failure files of the ranks, in rank order."""
        found = self.attempt_dir.glob("failure*.json")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    @property
    def training_args_path(self) -> Path:
        """Every effective field of the training arguments."""
        return self.attempt_dir / "resolved_training_args.json"

    @property
    def timing_path(self) -> Path:
        """Seconds and tokens per second of the phases of this attempt."""
        return self.attempt_dir / "timing.json"

    @property
    def base_path(self) -> Path:
        """The source of the base scores at step 0."""
        return self.attempt_dir / "base.json"

    @property
    def push_log_path(self) -> Path:
        """The output of the push that followed this attempt."""
        return self.attempt_dir / "push.txt"

    @property
    def uploads_path(self) -> Path:
        """The outcome of each upload to the remote storage."""
        return self.attempt_dir / "uploads.jsonl"


def is_run_dir(folder: Path) -> bool:
    """True if a folder has a recipe.json, readable or not, or what is left of a run without one."""
    return os.path.lexists(RunPaths(folder).recipe_path) or is_without_recipe(folder)


def is_without_recipe(folder: Path) -> bool:
    """True if a folder has no recipe.json and at least two other things that only a run has. Other
    folders may have one with such a name.
    """
    paths = RunPaths(folder)
    files = (paths.record_path, paths.result_path, paths.lease_path)
    folders = (paths.attempts_dir, paths.checkpoints_dir)
    num_found = sum(map(os.path.isfile, files)) + sum(map(os.path.isdir, folders))
    return num_found >= 2 and not os.path.lexists(paths.recipe_path)


def marker_path(checkpoint_dir: Path) -> Path:
    """The file that makes a checkpoint count: sizes, checksums, digest, world size."""
    return checkpoint_dir / "COMMITTED.json"


def content_cache_path(output_root: Path) -> Path:
    """Content hashes by size, mtime, ctime and inode, shared by all runs under one output root."""
    return output_root / ".content_hashes.json"


def list_push_paths(output_root: Path) -> list[Path]:
    """`push.json` of every run under one output root, except runs that were moved aside."""
    found = output_root.glob(f"*/*/{RunPaths(Path()).push_path.name}")
    return sorted(path for path in found if not path.parent.parent.name.startswith("."))


def recipe_cache_path(output_root: Path) -> Path:
    """Recipes as read by verbs that only look at runs; written by `recipe.cache`."""
    return output_root / ".recipes.json"


def list_recipe_caches(output_root: Path) -> list[Path]:
    """The cache of recipes, if it exists, and its leftovers from processes that were killed."""
    path = recipe_cache_path(output_root)
    return [*output_root.glob(path.name), *output_root.glob(f".{path.name}.*.tmp")]


def allowed_code_path(output_root: Path) -> Path:
    """The hashes of the Python files that were allowed to run; written by `run.allowed_code`."""
    return output_root / ".allowed_code.json"


def base_entries_dir(output_root: Path) -> Path:
    """Scores and answers of base models, shared by all runs; hidden, because it is not a grid."""
    return output_root / ".base"


def row_entries_dir(output_root: Path) -> Path:
    """Masked rows of large data sets, shared by all runs; hidden likewise."""
    return output_root / ".rows"


def find_output_root(run_dir: Path) -> Path:
    """The folder of all runs, from one of them: `<output root>/<grid>/<run name>`."""
    return run_dir.absolute().parent.parent


def old_run_dir(run_dir: Path, number: int) -> Path:
    """The new place of a run that is moved aside; hidden, so that it is not counted as a run."""
    return run_dir.parent / ".old" / f"{run_dir.name}-{number}"


def changed_runs_dir(output_root: Path, date: str, number: int) -> Path:
    """The folder into which `sweep --fresh` moves changed runs, by grid; hidden as above, and read
    only if it is named. `number` distinguishes the folders of one day.
    """
    return output_root / (f".changed-{date}" if number == 1 else f".changed-{date}-{number}")


def submissions_dir(output_root: Path) -> Path:
    """The submissions to a cluster, one folder each; hidden, because it is not a grid."""
    return output_root / ".slurm"


def submission_lock_path(output_root: Path) -> Path:
    """Locked while a sweep checks the queue and submits."""
    return submissions_dir(output_root) / "lock"


@dataclass(frozen=True)
class SubmissionPaths:
    """The files of one array job, `runs/.slurm/<submission>/`."""

    submission_dir: Path

    @property
    def script_path(self) -> Path:
        """The script that every task of the array executes; its path in the queue shows which
        submission a task belongs to.
        """
        return self.submission_dir / "job.sh"

    @property
    def record_path(self) -> Path:
        """The runs by array index; written before the array is submitted, and again with its job
        number afterwards.
        """
        return self.submission_dir / "submission.json"

    @property
    def recipes_dir(self) -> Path:
        """The recipes at the time of submission."""
        return self.submission_dir / "recipes"

    def recipe_path(self, full_name: str) -> Path:
        """The recipe of one run."""
        return self.recipes_dir / f"{full_name}.json"


def find_submission(recipe_path: Path) -> SubmissionPaths | None:
    """The submission that a recipe belongs to; None for any other recipe."""
    recipes_dir = recipe_path.parent.parent  # of all grids
    paths = SubmissionPaths(recipes_dir.parent)
    is_one = recipes_dir == paths.recipes_dir and paths.record_path.exists()
    return paths if is_one else None
