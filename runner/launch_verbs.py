"""The verbs that start runs: `launch`, `sweep` and `rerun`, from parsed arguments to an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runner.cluster import count_allotted_cores, is_in_cluster
from runner.cluster_files import FILE_ENGINES, check_file_engine, print_cluster_file
from runner.continuation import describe_obstacles, suggest_ways_out
from runner.errors import RefusedError, RunnerError
from runner.failures import UNREADABLE_HINT
from runner.fsio import hash_json
from runner.identity import ContentHashes, hash_contents, known_contents
from runner.launch import LaunchCommand, Machines, Placement
from runner.paths import RunPaths, content_cache_path
from runner.plan import MAX_FRUITLESS, Decision, decide, decide_queued
from runner.recipe import NAME_PATTERN, load_recipe
from runner.record import EXIT_CODES, load_progress, load_record
from runner.secrets import find_secret
from runner.selection import Selected, UnreadableRun, run_paths, select_recipes, suggest_path
from runner.status import RunStatus, derive_status, find_divisor

if TYPE_CHECKING:
    from runner.machines import Allocation
    from runner.pool import Planned, PoolResult
    from runner.slurm import QueuedRun

_STOPPED: Final = 130  # by Ctrl-C or another signal, as shells count it
_PORT_BY_HAND: Final = 29500  # of the main process, where nobody can look for a free one
_PLAIN_OVERRIDE: Final = re.compile(r"[A-Za-z0-9_.]+=[A-Za-z0-9._]+(-[A-Za-z0-9._]+)*")


def run_launch(arguments: argparse.Namespace) -> int:
    """`runner launch`."""
    from runner.machines import find_allocation
    from runner.pool import Planned, build_command

    selected, resume = _select_one(arguments), _parse_resume(arguments.resume)
    recipe, paths = selected.recipe, selected.paths
    num_processes = arguments.num_processes or recipe.launch.num_processes
    num_machines = recipe.launch.num_machines
    allocation = find_allocation(os.environ, num_machines) if num_machines > 1 else None
    placements = _list_placements(num_processes, num_machines, allocation)
    commands = [build_command(Planned(selected, {}, num_processes), placement) for placement in placements]
    if arguments.dry_run:
        print("\n".join(command.as_shell() for command in commands))
        return 0
    contents = hash_contents(recipe, ContentHashes(content_cache_path(arguments.output_root)))
    planned = Planned(selected, contents, num_processes, resume)
    status = derive_status(paths, recipe, contents, num_processes=num_processes, resume=resume)
    if arguments.fresh and resume == "auto":
        planned = replace(planned, resume="none")  # nor from remote storage
    if arguments.fresh and status.state != "pending":
        _move_aside(selected)
        status = derive_status(paths, recipe, contents, num_processes=num_processes, resume=resume)
    planned = replace(planned, num_attempts=status.num_attempts)
    decision = decide(status, retry_failed=True)
    if decision.action == "refuse":
        raise _refuse(paths, status, _same_launch(arguments))
    if decision.action == "skip":
        advice = "" if resume == "auto" else "; `--resume` goes on with unfinished runs only, `--fresh` starts one anew"
        print(f"{planned.name}  {decision.why}{advice}")
        # A cluster takes 0 for a run that is done: not known of one that something else holds, a lost machine perhaps.
        is_held = status.state == "running" and is_in_cluster(os.environ)
        return EXIT_CODES["transient"] if is_held else 0
    if arguments.prepare:
        _prepare(planned, commands[0])
        print("\n".join(command.as_shell() for command in commands))
        return 0
    again = f"`{_same_launch(arguments)}`"  # without --fresh and --resume, which would start over or rewind
    result = _run_planned([planned], num_slots=1, gpus=None, fail_fast=False, allocation=allocation, again=again)
    if result.failed and result.failed[0].failure.kind == "preempted" and _count_fruitless(paths) > MAX_FRUITLESS:
        print(
            f"error: the last {MAX_FRUITLESS + 1} attempts were preempted before their first step\n\n"
            "hint: give the run more time, say by `runner sweep ... --engine slurm --time-limit`",
            file=sys.stderr,
        )
        return EXIT_CODES["transient"]
    if result.stopped_by == signal.SIGINT:
        return _STOPPED
    if result.stopped_by is not None and not result.failed:
        return EXIT_CODES["preempted"]
    return next((EXIT_CODES[failed.failure.kind] for failed in result.failed), 0)


def _count_fruitless(paths: RunPaths) -> int:
    """The last attempts in a row that were preempted before their first step."""
    attempts = load_record(paths).attempts
    fruitful = (
        number
        for number, one in enumerate(reversed(attempts))
        if one.failure is None
        or one.failure.kind != "preempted"
        or ((progress := load_progress(paths.attempt(one.number).progress_path)) is not None and progress.step > 0)
    )
    return next(fruitful, len(attempts))


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
    _parse_gpus(arguments.gpus)  # a wrong word is told before anything is looked at
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

    gpus = _parse_gpus(arguments.gpus)
    if arguments.dry_run:
        for run in planned:
            for placement in _list_placements(run.num_processes, run.selected.recipe.launch.num_machines, None):
                print(build_command(run, placement).as_shell())
        return 0
    sys.stdout.flush()
    slots = len(gpus) if gpus is not None else arguments.slots or 1
    result = _run_planned(planned, num_slots=slots, gpus=gpus, fail_fast=arguments.fail_fast)
    if result.stopped_by is not None:
        return _STOPPED
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


def name_overridden(name: str, overrides: list[str]) -> str:
    """The name of a run that differs from its recipe by overrides.

    >>> name_overridden("gemma_full", ["training.learning_rate=1e-4"])
    'gemma_full--training.learning_rate-1e-4'
    """
    if not overrides:
        return name
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "--".join(overrides)).strip("-")
    full = f"{name}--{slug}"
    is_readable_back = all(_PLAIN_OVERRIDE.fullmatch(override) for override in overrides) and len(full) <= 150
    return full if is_readable_back else f"{full[:130]}--{hash_json(overrides)[:12]}"


def select_run(arguments: argparse.Namespace) -> Selected:
    """The run of a recipe under overrides and a name as `launch` takes them, or that of a run directory."""
    if not arguments.recipe.is_dir():
        return _select_one(arguments)
    if arguments.overrides or arguments.name:
        raise RunnerError(f"{arguments.recipe} is a run directory: overrides and `--name` go with a recipe file")
    found = select_recipes([str(arguments.recipe)], arguments.output_root)
    if len(found) > 1:
        raise RunnerError(f"{arguments.recipe} holds {len(found)} runs", hint=f"runner why {found[0].paths.run_dir}")
    return found[0]


def _select_one(arguments: argparse.Namespace) -> Selected:
    overrides: list[str] = arguments.overrides
    if malformed := [override for override in overrides if "=" not in override]:
        raise RunnerError(f"{malformed[0]!r} is not an override of the form key=value")
    if arguments.recipe.is_dir():
        raise RunnerError(f"{arguments.recipe} is a folder", hint=f"runner sweep {arguments.recipe}")
    if not arguments.recipe.exists():
        raise RunnerError(f"there is no recipe {arguments.recipe}", hint=suggest_path(arguments.recipe))
    plain = load_recipe(arguments.recipe, overrides)
    name = arguments.name or name_overridden(plain.run.name, overrides)
    if secret := find_secret(name):
        raise RunnerError(f"`--name` holds {secret[0]}: names are public")
    if not re.fullmatch(NAME_PATTERN, name):
        raise RunnerError(f"the name {name!r} may hold letters, digits and . _ - only, and at most 200 of them")
    recipe = plain.model_copy(
        update={"run": plain.run.model_copy(update={"name": name, "overrides": (*plain.run.overrides, *overrides)})}
    )
    return Selected(recipe, arguments.recipe, run_paths(recipe, arguments.output_root))


def _refuse(paths: RunPaths, status: RunStatus, same_launch: str) -> RefusedError:
    if status.state == "changed":
        return RefusedError(
            f"{paths.run_dir} holds another experiment, the recipe changed since:\n"
            + "\n".join(f"  {line}" for line in status.differences),
            hint=f"{same_launch} --fresh  # moves the old run aside and starts anew",
        )
    if status.state == "unreadable":
        return RefusedError(
            f"{paths.run_dir} is unreadable: {status.why}",
            hint=f"{same_launch} --fresh  # moves the run aside and starts anew",
        )
    return RefusedError(
        f"{paths.run_dir}: {describe_obstacles(status.checkpoint_step, status.obstacles)}",
        hint=suggest_ways_out(status.obstacles, same_launch),
    )


def _same_launch(arguments: argparse.Namespace) -> str:
    words = ["runner", "launch", str(arguments.recipe), *arguments.overrides]
    words += ["--name", arguments.name] if arguments.name else []
    words += ["--output-root", str(arguments.output_root)] if arguments.output_root != Path("runs") else []
    return shlex.join(words)


def _parse_gpus(text: str | None) -> list[str] | None:
    if text is None:
        return None
    gpus = [name.strip() for name in text.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise RunnerError(f"`--gpus {text}` must name different devices, such as 0,1")
    return gpus


def _parse_resume(text: str) -> str:
    """`Attempt.resume`: a word, a URL, or the whole path of a checkpoint that is there."""
    if text in ("auto", "latest", "best") or "://" in text:
        if secret := find_secret(text):
            raise RunnerError(f"`--resume` holds {secret[0]}", hint="set it in the environment")
        return text
    if not Path(text).exists():
        raise RunnerError(
            f"`--resume {text}`: there is no such folder or archive",
            hint="--resume auto, latest, best, a path or a URL",
        )
    return str(Path(text).absolute())


def _placement(num_processes: int) -> Placement:
    return Placement(num_processes, num_cores=count_allotted_cores(os.environ))


def _list_placements(num_processes: int, num_machines: int, allocation: Allocation | None) -> list[Placement]:
    """One, or, for several machines that Slurm does not give us, one for each, to be started there by hand."""
    if num_machines == 1:
        return [_placement(num_processes)]
    if allocation is not None:
        return [allocation.place(num_processes)]
    num_cores = num_machines * (os.cpu_count() or 1)
    return [
        Placement(num_processes, None, num_cores, Machines(num_machines, "FIRST_MACHINE", _PORT_BY_HAND, rank))
        for rank in range(num_machines)
    ]


def _move_aside(selected: Selected) -> None:
    from runner.execute import move_aside, take_lease

    lease = take_lease(selected.paths)
    if lease is None:
        raise RefusedError(f"{selected.paths.run_dir} is running; stop it before starting anew")
    target = move_aside(selected.paths)
    lease.close()
    if target is not None:
        print(f"moved {selected.paths.run_dir} to {target}", file=sys.stderr)


def _prepare(planned: Planned, command: LaunchCommand) -> None:
    from runner.execute import open_attempt, prepare_run, read_git_state, refuse_uncontinuable, take_lease

    paths = planned.selected.paths
    lease = take_lease(paths)
    if lease is None:
        raise RefusedError(f"{paths.run_dir} is running")
    with contextlib.closing(lease):
        divisor = find_divisor(paths, planned.selected.recipe)
        refuse_uncontinuable(
            planned.selected.recipe, planned.contents, paths, command, planned.num_processes, planned.resume, divisor
        )
        prepare_run(planned.selected.recipe, planned.contents, paths)
        open_attempt(
            paths, command, planned.num_processes, read_git_state(), planned.resume, micro_batch_divisor=divisor
        )


def _run_planned(
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
    from runner.pool import Devices, PoolResult, run_pool

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
