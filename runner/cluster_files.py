"""The engines that only write a file, `--engine kubernetes|skypilot`: from parsed arguments to the file on stdout."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Final

from runner.errors import RunnerError
from runner.record import load_record

if TYPE_CHECKING:
    from runner.pool import Planned

FILE_ENGINES: Final = ("kubernetes", "skypilot")


def check_file_engine(arguments: argparse.Namespace) -> None:
    """Raises: RunnerError for options that a file for `arguments.engine` cannot be made of."""
    engine = arguments.engine
    submit = {"kubernetes": "| kubectl apply -f -", "skypilot": "> task.yaml; sky jobs launch task.yaml"}[engine]
    if not arguments.dry_run:
        raise RunnerError(
            f"`--engine {engine}` starts nothing: with `--dry-run` it prints the file that you submit",
            hint=f"runner sweep {shlex.join(arguments.paths)} --engine {engine} --dry-run ... {submit}",
        )
    storage = {
        "kubernetes": "the claim of the volume that holds the project folder, such as my-project",
        "skypilot": "the bucket that keeps the runs, such as s3://my-bucket/runs",
    }[engine]
    for option, value, what in (
        ("image", arguments.image, "a container image with `runner` on its PATH"),
        ("storage", arguments.storage, storage),
    ):
        if value is None:
            raise RunnerError(f"`--engine {engine}` needs `--{option}`: {what}")
    if arguments.gpus is not None:
        raise RunnerError(f"`--gpus` names GPUs of this machine; `--engine {engine}` counts them itself")


def print_cluster_file(planned: list[Planned], arguments: argparse.Namespace) -> int:
    """The file that a scheduler beyond this machine takes, on stdout."""
    from runner.engines import PendingRun, Submission
    from runner.kubernetes import build_jobs_file
    from runner.skypilot import build_task_file

    if not planned:
        print("nothing to launch", file=sys.stderr)
        return 0
    submission = Submission(
        runs=tuple(PendingRun(run.selected, len(load_record(run.selected.paths).attempts)) for run in planned),
        output_root=arguments.output_root,
        image=arguments.image,
        storage=arguments.storage,
        num_slots=arguments.slots,
        gpu_type=arguments.gpu_type,
        fail_fast=arguments.fail_fast,
        retry_failed=arguments.retry_failed,
    )
    print({"kubernetes": build_jobs_file, "skypilot": build_task_file}[arguments.engine](submission), end="")
    return 0
