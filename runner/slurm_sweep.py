"""`--engine slurm`: from parsed arguments and planned runs to array jobs, under one lock from the queue to `sbatch`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import RunnerError
from runner.slurm import (
    DEFAULT_MAX_ARRAY_SIZE,
    QueuedRun,
    build_arrays,
    hold_submissions,
    load_max_array_size,
    load_queue,
    submit,
)
from runner.slurm_script import ClusterOptions, check_options

if TYPE_CHECKING:
    from runner.fsio import Lease
    from runner.pool import Planned


@dataclass(frozen=True)
class Queue:
    """What Slurm has of these runs already, its limit, and the lease under which more may be submitted."""

    runs: Mapping[str, QueuedRun]
    max_array_size: int
    lease: Lease | None  # None: a dry run


@contextlib.contextmanager
def hold_queue(arguments: argparse.Namespace) -> Iterator[Queue]:
    """The queue, which nobody else submits to for this output root meanwhile. A dry run does without Slurm."""
    _check_arguments(arguments)
    root = arguments.output_root
    if not arguments.dry_run:
        with hold_submissions(root) as lease:
            yield Queue(load_queue(root), load_max_array_size(), lease)
        return
    try:
        queue = Queue(load_queue(root), load_max_array_size(), None)
    except RunnerError as error:
        print(f"without what Slurm has queued already: {error.message}", file=sys.stderr)
        queue = Queue({}, DEFAULT_MAX_ARRAY_SIZE, None)
    yield queue


def sweep_on_slurm(planned: list[Planned], arguments: argparse.Namespace, queue: Queue) -> int:
    """Submit what is planned, or print the scripts in a dry run; returns an exit code."""
    selected, options = [run.selected for run in planned], _parse_options(arguments)
    arrays = build_arrays(selected, options, arguments.output_root, queue.max_array_size)
    if not arrays:
        print("nothing to submit", file=sys.stderr)
    for array in arrays:
        if queue.lease is None:
            print(array.script)
            continue
        job = submit(array, queue.lease)
        print(f"submitted {len(array.selected)} runs as slurm {job}: {array.paths.script_path}", flush=True)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("--gpus", "--fail-fast"):
        if getattr(arguments, name[2:].replace("-", "_")):
            raise RunnerError(f"`{name}` is for the local engine; Slurm gives GPUs to runs, and starts them")
    check_options(_parse_options(arguments))


def _parse_options(arguments: argparse.Namespace) -> ClusterOptions:
    return ClusterOptions(
        num_slots=arguments.slots,
        time_limit=arguments.time_limit,
        stop_before_seconds=arguments.stop_before_seconds,
        extra=tuple(arguments.slurm_options),
    )
