"""The verbs that start many runs, `sweep` and `rerun`, from parsed arguments to an exit code.

The engines that only write a file, `--engine kubernetes|skypilot`: from parsed arguments to the
file on stdout.

`--engine slurm`: from parsed arguments and planned runs to array jobs, under one lock from the
queue to `sbatch`.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from runner.engines.slurm import (
    DEFAULT_MAX_ARRAY_SIZE,
    ClusterOptions,
    QueuedRun,
    build_arrays,
    check_options,
    hold_submissions,
    load_max_array_size,
    load_queue,
    submit,
)
from runner.errors import RunnerError
from runner.launch.placement import Devices, list_placements, parse_gpus
from runner.plan.decide import Decision, Launch, decide, decide_queued
from runner.plan.select import Selected, UnreadableRun, select_recipes
from runner.plan.status import derive_status
from runner.recipe.identity import ContentHashes, hash_contents, known_contents
from runner.run.failures import UNREADABLE_HINT
from runner.run.paths import content_cache_path
from runner.run.record import load_record

if TYPE_CHECKING:
    from runner.engines.local import PoolResult
    from runner.launch.placement import Allocation
    from runner.run.lease import Lease


FILE_ENGINES: Final = ("kubernetes", "skypilot")


def check_file_engine(arguments: argparse.Namespace) -> None:
    """Raises: RunnerError for options that a file for `arguments.engine` cannot be made of."""
    engine = arguments.engine
    submit = {
        "kubernetes": "| kubectl apply -f -",
        "skypilot": "> task.yaml; sky jobs launch task.yaml",
    }[engine]
    if not arguments.dry_run:
        raise RunnerError(
            f"`--engine {engine}` starts nothing: with `--dry-run` it prints the file that you"
            " submit",
            hint=(
                f"runner sweep {shlex.join(arguments.paths)} --engine {engine} --dry-run ..."
                f" {submit}"
            ),
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
        raise RunnerError(
            f"`--gpus` names GPUs of this machine; `--engine {engine}` counts them itself"
        )


def print_cluster_file(planned: list[Launch], arguments: argparse.Namespace) -> int:
    """The file that a scheduler beyond this machine takes, on stdout."""
    from runner.engines.kubernetes import build_jobs_file
    from runner.engines.manifests import PendingRun, Submission
    from runner.engines.skypilot import build_task_file

    if not planned:
        print("nothing to launch", file=sys.stderr)
        return 0
    submission = Submission(
        runs=tuple(
            PendingRun(run.selected, len(load_record(run.selected.paths).attempts))
            for run in planned
        ),
        output_root=arguments.output_root,
        image=arguments.image,
        storage=arguments.storage,
        num_slots=arguments.slots,
        gpu_type=arguments.gpu_type,
        fail_fast=arguments.fail_fast,
        retry_failed=arguments.retry_failed,
    )
    print(
        {"kubernetes": build_jobs_file, "skypilot": build_task_file}[arguments.engine](submission),
        end="",
    )
    return 0


STOPPED: Final = 130  # by Ctrl-C or another signal, as shells count it


def run_sweep(arguments: argparse.Namespace, *, only_unfinished: bool = False) -> int:
    """`runner sweep`."""
    unreadable: list[UnreadableRun] = []
    selected = select_recipes(arguments.paths, arguments.output_root, arguments.where, unreadable)
    for lost in unreadable:
        print(
            f"warning: {lost.full_name} is unreadable: {lost.why}\n  {UNREADABLE_HINT}",
            file=sys.stderr,
        )
    if arguments.list:
        print("\n".join(str(one.source_path) for one in selected))
        return 0
    if arguments.engine in FILE_ENGINES:
        check_file_engine(arguments)
    parse_gpus(arguments.gpus)  # a wrong word is told before anything is looked at
    if arguments.engine == "slurm":
        with hold_queue(arguments) as queue:
            planned, num_unhappy = _decide_all(
                selected, arguments, queue.runs, only_unfinished=only_unfinished
            )
            code = sweep_on_slurm(planned, arguments, queue)
    else:
        planned, num_unhappy = _decide_all(selected, arguments, {}, only_unfinished=only_unfinished)
        code = _ENGINES[arguments.engine](planned, arguments)
    return code or (1 if (num_unhappy or unreadable) and not arguments.dry_run else 0)


def _decide_all(
    selected: list[Selected],
    arguments: argparse.Namespace,
    queued: Mapping[str, QueuedRun],
    *,
    only_unfinished: bool,
) -> tuple[list[Launch], int]:
    """What is to be launched, and how many of the others are failed or changed; each decision is
    printed.
    """
    hashes = ContentHashes(content_cache_path(arguments.output_root))
    planned: list[Launch] = []
    num_unhappy = 0
    is_talk = arguments.engine in FILE_ENGINES or (
        arguments.engine == "slurm" and arguments.dry_run
    )
    for one in selected:
        contents = (
            hash_contents(one.recipe, hashes)
            if not arguments.dry_run
            else known_contents(one.recipe, hashes)
        )
        status = derive_status(one.read_facts(), one.recipe, contents)
        decision = decide(
            status, retry_failed=arguments.retry_failed, only_unfinished=only_unfinished
        )
        differences = (*status.differences, *status.obstacles)
        if decision.action == "launch" and (task := queued.get(one.full_name)) is not None:
            differences = tuple(task.find_differences(one))
            decision = decide_queued(task.task, task.state, differences)
        # stdout is the file
        print(
            _describe_decision(one, decision, differences),
            file=sys.stderr if is_talk else sys.stdout,
        )
        if decision.action == "launch":
            num_processes = one.recipe.launch.num_processes
            planned.append(Launch(one, contents, num_processes, num_attempts=status.num_attempts))
        elif decision.action == "refuse" or (
            status.state == "failed" and one.full_name not in queued
        ):
            num_unhappy += 1
    return planned, num_unhappy


def _sweep_here(planned: list[Launch], arguments: argparse.Namespace) -> int:
    from runner.engines.local import build_command

    gpus = parse_gpus(arguments.gpus)
    if arguments.dry_run:
        for run in planned:
            for placement in list_placements(
                run.num_processes, run.selected.recipe.launch.num_machines, None
            ):
                print(build_command(run, placement).as_shell())
        return 0
    sys.stdout.flush()
    slots = len(gpus) if gpus is not None else arguments.slots or 1
    result = run_planned(planned, num_slots=slots, gpus=gpus, fail_fast=arguments.fail_fast)
    if result.stopped_by is not None:
        return STOPPED
    return 1 if result.failed else 0


# Each decides only where and when the planned runs are launched, and returns an exit code.
_ENGINES: Final[Mapping[str, Callable[[list[Launch], argparse.Namespace], int]]] = {
    "local": _sweep_here,
    "kubernetes": print_cluster_file,
    "skypilot": print_cluster_file,
}


def run_rerun(arguments: argparse.Namespace) -> int:
    """`runner rerun`."""
    return run_sweep(arguments, only_unfinished=True)


def run_planned(
    planned: list[Launch],
    *,
    num_slots: int,
    gpus: list[str] | None,
    fail_fast: bool,
    allocation: Allocation | None = None,
    again: str = "the same command",
) -> PoolResult:
    """How the runs ended; failures are printed. `again` is what goes on with them after a stop."""
    from runner.engines.local import PoolResult, SweepDisplay, run_pool

    if not planned:
        print("nothing to launch", file=sys.stderr)
        return PoolResult()
    with SweepDisplay(len(planned)) as display:
        result = run_pool(
            planned, Devices(num_slots, gpus, allocation), display, fail_fast=fail_fast
        )
    _print_failures(result)
    if result.stopped_by is not None:
        print(f"stopped; {again} goes on from the newest checkpoints", file=sys.stderr)
    return result


def _print_failures(result: PoolResult) -> None:
    for failed in result.failed:
        what = "left" if failed.failure.kind == "preempted" else "failed"
        print(
            f"\n{failed.name} {what}, {failed.failure.kind}: {failed.failure.message}",
            file=sys.stderr,
        )
        if failed.log_path is None:
            continue
        if failed.failure.kind in ("crashed", "lost", "transient", "out_of_memory"):
            print("\n".join(f"  | {line}" for line in failed.failure.log_tail), file=sys.stderr)
        print(f"  log: {failed.log_path}", file=sys.stderr)
    if result.not_started and result.stopped_by is None:
        print(
            f"{len(result.not_started)} runs were not started because of --fail-fast",
            file=sys.stderr,
        )


def _describe_decision(one: Selected, decision: Decision, differences: Sequence[str]) -> str:
    why = decision.why.partition("\n")[0]
    lines = [f"{decision.action:<7} {one.full_name}  {why}"]
    if decision.action == "refuse":
        lines += [f"          {line}" for line in differences]
    return "\n".join(lines)


@dataclass(frozen=True)
class Queue:
    """What Slurm has of these runs already, its limit, and the lease under which more may be
    submitted.
    """

    runs: Mapping[str, QueuedRun]
    max_array_size: int
    lease: Lease | None  # None: a dry run


@contextlib.contextmanager
def hold_queue(arguments: argparse.Namespace) -> Iterator[Queue]:
    """The queue, which nobody else submits to for this output root meanwhile. A dry run does
    without Slurm.
    """
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


def sweep_on_slurm(planned: list[Launch], arguments: argparse.Namespace, queue: Queue) -> int:
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
        print(
            f"submitted {len(array.selected)} runs as slurm {job}: {array.paths.script_path}",
            flush=True,
        )
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("--gpus", "--fail-fast"):
        if getattr(arguments, name[2:].replace("-", "_")):
            raise RunnerError(
                f"`{name}` is for the local engine; Slurm gives GPUs to runs, and starts them"
            )
    check_options(_parse_options(arguments))


def _parse_options(arguments: argparse.Namespace) -> ClusterOptions:
    return ClusterOptions(
        num_slots=arguments.slots,
        time_limit=arguments.time_limit,
        stop_before_seconds=arguments.stop_before_seconds,
        extra=tuple(arguments.slurm_options),
    )
