"""The verbs that start many runs, `sweep` and `rerun`, from parsed arguments to an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from runner.cluster_files import FILE_ENGINES, check_file_engine, print_cluster_file
from runner.devices import Devices, list_placements, parse_gpus
from runner.failures import UNREADABLE_HINT
from runner.identity import ContentHashes, hash_contents, known_contents
from runner.paths import content_cache_path
from runner.plan import Decision, decide, decide_queued
from runner.selection import Selected, UnreadableRun, select_recipes
from runner.status import derive_status

if TYPE_CHECKING:
    from runner.machines import Allocation
    from runner.pool import Planned, PoolResult
    from runner.slurm import QueuedRun

STOPPED: Final = 130  # by Ctrl-C or another signal, as shells count it


def run_sweep(arguments: argparse.Namespace, *, only_unfinished: bool = False) -> int:
    """`runner sweep`."""
    unreadable: list[UnreadableRun] = []
    selected = select_recipes(arguments.paths, arguments.output_root, arguments.where, unreadable)
    for lost in unreadable:
        print(f"warning: {lost.full_name} is unreadable: {lost.why}\n  {UNREADABLE_HINT}", file=sys.stderr)
    if arguments.list:
        print("\n".join(str(one.source_path) for one in selected))
        return 0
    if arguments.engine in FILE_ENGINES:
        check_file_engine(arguments)
    parse_gpus(arguments.gpus)  # a wrong word is told before anything is looked at
    if arguments.engine == "slurm":
        from runner.slurm_sweep import hold_queue, sweep_on_slurm

        with hold_queue(arguments) as queue:
            planned, num_unhappy = _decide_all(selected, arguments, queue.runs, only_unfinished=only_unfinished)
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
) -> tuple[list[Planned], int]:
    """What is to be launched, and how many of the others are failed or changed; each decision is printed."""
    from runner.pool import Planned

    hashes = ContentHashes(content_cache_path(arguments.output_root))
    planned: list[Planned] = []
    num_unhappy = 0
    is_talk = arguments.engine in FILE_ENGINES or (arguments.engine == "slurm" and arguments.dry_run)
    for one in selected:
        contents = hash_contents(one.recipe, hashes) if not arguments.dry_run else known_contents(one.recipe, hashes)
        status = derive_status(one.paths, one.recipe, contents)
        decision = decide(status, retry_failed=arguments.retry_failed, only_unfinished=only_unfinished)
        differences = (*status.differences, *status.obstacles)
        if decision.action == "launch" and (task := queued.get(one.full_name)) is not None:
            differences = tuple(task.find_differences(one))
            decision = decide_queued(task.task, task.state, differences)
        # stdout is the file
        print(_describe_decision(one, decision, differences), file=sys.stderr if is_talk else sys.stdout)
        if decision.action == "launch":
            num_processes = one.recipe.launch.num_processes
            planned.append(Planned(one, contents, num_processes, num_attempts=status.num_attempts))
        elif decision.action == "refuse" or (status.state == "failed" and one.full_name not in queued):
            num_unhappy += 1
    return planned, num_unhappy


def _sweep_here(planned: list[Planned], arguments: argparse.Namespace) -> int:
    from runner.pool import build_command

    gpus = parse_gpus(arguments.gpus)
    if arguments.dry_run:
        for run in planned:
            for placement in list_placements(run.num_processes, run.selected.recipe.launch.num_machines, None):
                print(build_command(run, placement).as_shell())
        return 0
    sys.stdout.flush()
    slots = len(gpus) if gpus is not None else arguments.slots or 1
    result = run_planned(planned, num_slots=slots, gpus=gpus, fail_fast=arguments.fail_fast)
    if result.stopped_by is not None:
        return STOPPED
    return 1 if result.failed else 0


# Each decides only where and when the planned runs are launched, and returns an exit code.
_ENGINES: Final[Mapping[str, Callable[[list[Planned], argparse.Namespace], int]]] = {
    "local": _sweep_here,
    "kubernetes": print_cluster_file,
    "skypilot": print_cluster_file,
}


def run_rerun(arguments: argparse.Namespace) -> int:
    """`runner rerun`."""
    return run_sweep(arguments, only_unfinished=True)


def run_planned(
    planned: list[Planned],
    *,
    num_slots: int,
    gpus: list[str] | None,
    fail_fast: bool,
    allocation: Allocation | None = None,
    again: str = "the same command",
) -> PoolResult:
    """How the runs ended; failures are printed. `again` is what goes on with them after a stop."""
    from runner.display import SweepDisplay
    from runner.pool import PoolResult, run_pool

    if not planned:
        print("nothing to launch", file=sys.stderr)
        return PoolResult()
    with SweepDisplay(len(planned)) as display:
        result = run_pool(planned, Devices(num_slots, gpus, allocation), display, fail_fast=fail_fast)
    _print_failures(result)
    if result.stopped_by is not None:
        print(f"stopped; {again} goes on from the newest checkpoints", file=sys.stderr)
    return result


def _print_failures(result: PoolResult) -> None:
    for failed in result.failed:
        what = "left" if failed.failure.kind == "preempted" else "failed"
        print(f"\n{failed.name} {what}, {failed.failure.kind}: {failed.failure.message}", file=sys.stderr)
        if failed.log_path is None:
            continue
        if failed.failure.kind in ("crashed", "lost", "transient", "out_of_memory"):
            print("\n".join(f"  | {line}" for line in failed.failure.log_tail), file=sys.stderr)
        print(f"  log: {failed.log_path}", file=sys.stderr)
    if result.not_started and result.stopped_by is None:
        print(f"{len(result.not_started)} runs were not started because of --fail-fast", file=sys.stderr)


def _describe_decision(one: Selected, decision: Decision, differences: Sequence[str]) -> str:
    why = decision.why.partition("\n")[0]
    lines = [f"{decision.action:<7} {one.full_name}  {why}"]
    if decision.action == "refuse":
        lines += [f"          {line}" for line in differences]
    return "\n".join(lines)
