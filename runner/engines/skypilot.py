"""The SkyPilot engine: pending runs become one task, in which one cloud machine sweeps over them.
It never contacts a cloud.

One task rather than one per run, because a sweep can simply be repeated on a recovered machine:
SkyPilot starts `run` again, and completed runs are skipped. The alternatives fit less well: a file
with several tasks is a pipeline that runs one after the other, and a pool of workers would share
the bucket between machines, where locks do not work.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.engines.manifests import (
    SHARED_OPTIONS,
    ManifestOptions,
    PendingRun,
    build_label,
    check_runs,
    dump_documents,
    list_recipe_words,
    plan_pending,
    read_shared_options,
)
from runner.errors import RefusedError
from runner.project_folder import find_user_folder
from runner.text import format_count

if TYPE_CHECKING:
    import argparse

    from runner.launch.placement import PlanRuns

_RUNS_DIR: Final = "/recipe-runner-runs"

ONLY_WRITES_FILES: Final = True
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    **SHARED_OPTIONS,
    "--gpu-type": {"metavar": "TYPE", "help": "skypilot: type of GPU, such as H100"},
}


@dataclass(frozen=True)
class SkypilotOptions(ManifestOptions):
    """The user's options, in addition to the runs; only SkyPilot has the last three."""

    gpu_type: str | None = None  # SkyPilot's name of it
    retry_failed: bool = False
    is_cold: bool = False  # each run imports its libraries itself


def parse_options(arguments: argparse.Namespace) -> SkypilotOptions:
    """Raises: RunnerError for options that do not allow a file."""
    shared = read_shared_options(
        arguments,
        submit="> task.yaml; sky jobs launch task.yaml",
        storage="the bucket that keeps the runs, such as s3://my-bucket/runs",
    )
    return SkypilotOptions(
        **shared,
        gpu_type=arguments.gpu_type,
        retry_failed=arguments.retry_failed,
        is_cold=arguments.cold,
    )


def submit(plan: PlanRuns, options: SkypilotOptions) -> int:
    """Print the file for `sky` on stdout; returns an exit code."""
    runs = plan_pending(plan)
    if runs:
        print(build_task_file(runs, options), end="")
    return 0


def build_task_file(runs: Sequence[PendingRun], options: SkypilotOptions) -> str:
    """The task as YAML for `sky jobs launch`.

    Raises:
        RefusedError: a run is not in the project folder, or the type of GPU is missing.
    """
    from runner.launch.placement import derive_resources

    check_runs(runs)
    machines = [derive_resources(run.selected.recipe) for run in runs]
    slots = min(options.num_slots or 1, len(runs))
    num_gpus = slots * max(machine.num_gpus for machine in machines)
    if num_gpus and options.gpu_type is None:
        raise RefusedError(
            "the runs need GPUs, but no type is named",
            hint="add --gpu-type H100, or another type that your clouds have",
        )
    cores = [
        machine.num_cores or run.launch.num_processes
        for run, machine in zip(runs, machines, strict=True)
    ]
    resources = (
        {"accelerators": f"{options.gpu_type}:{num_gpus}"}
        if num_gpus
        else {"cpus": f"{slots * max(cores)}+"}
    )
    task: dict[str, Any] = {
        "name": build_label(runs[0].selected.recipe.run.grid, 40),
        # Relative to the folder where `sky` is started, which is the user's.
        "workdir": "." if find_user_folder() is None else str(Path.cwd()),
        "resources": {**resources, "image_id": f"docker:{options.image}"},
        # MOUNT_CACHED writes to a local cache first, so renames, appends and locks work.
        "file_mounts": {_RUNS_DIR: {"source": options.storage, "mode": "MOUNT_CACHED"}},
        "setup": "runner --help > /dev/null\n",  # an image without it fails here
        "run": _build_run(runs, options, num_gpus, slots),
    }
    comment = (
        f"{format_count(len(runs), 'run')}, stored in {options.storage}. One machine,"
        f" {slots} at a time."
    )
    return dump_documents([task], comment)


def _build_run(
    runs: Sequence[PendingRun], options: SkypilotOptions, num_gpus: int, slots: int
) -> str:
    room = ["--gpus", ",".join(map(str, range(num_gpus)))] if num_gpus else ["--slots", str(slots)]
    asked = {
        "--fail-fast": options.fail_fast,
        "--retry-failed": options.retry_failed,
        "--cold": options.is_cold,
        "--own-base": options.owns_base,
    }
    flags = [flag for flag, is_asked in asked.items() if is_asked]
    words = [shlex.quote(word) for word in [*list_recipe_words(runs), *options.overrides]]
    tail = shlex.join(["--output-root", _RUNS_DIR, *room, *flags])
    return " \\\n  ".join(["runner sweep", *words, tail]) + "\n"
