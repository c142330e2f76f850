"""`runner launch`, from arguments to an exit code. Also finds the run that a verb is about."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from runner.checkpoints.compare import describe_obstacles, suggest_alternatives
from runner.cli.pushes import PushPlan, print_unpushed, send_pushes
from runner.cli.reading import note_edited, note_idle_overrides, note_unrendered
from runner.engines.local import note_how_to_start
from runner.errors import CorruptFileError, RefusedError, RunnerError
from runner.files import is_plain
from runner.launch.command import LaunchCommand
from runner.launch.outcome import PoolResult
from runner.launch.placement import (
    Allocation,
    Devices,
    find_allocation,
    is_in_cluster,
    list_placements,
)
from runner.launch.pool import STOPPED, build_command, run_planned
from runner.plan.decide import MAX_FRUITLESS, Launch, decide
from runner.plan.names import RECIPES_DIR, find_one
from runner.plan.select import Selected, load_selected, select_recipes
from runner.plan.status import (
    RunStatus,
    describe_change,
    find_divisor,
    read_status,
    suggest_fixes,
    verify_files,
)
from runner.project_folder import pasteable
from runner.recipe.contents import ContentHashes, find_contents
from runner.recipe.parse import Recipe
from runner.recipe.schema import NAME_PATTERN
from runner.run.allowed_code import require_allowed, suggest_allowing
from runner.run.facts import read_facts
from runner.run.failures import UNREADABLE_HINT
from runner.run.paths import RunPaths, content_cache_path, is_run_dir
from runner.run.record import EXIT_CODES, AskedBase, list_trained, load_progress, load_record
from runner.secrets import find_secret


def run_launch(arguments: argparse.Namespace) -> int:
    """`runner launch`."""
    selected, resume = _select_one(arguments), _parse_resume(arguments.resume)
    note_edited([selected])
    note_unrendered([selected])
    recipe, paths = selected.recipe, selected.paths
    allow = suggest_allowing(
        [str(arguments.recipe)], arguments.output_root, overrides=arguments.overrides
    )
    require_allowed([recipe], arguments.output_root, allow)
    num_processes = arguments.num_processes or recipe.launch.num_processes
    num_machines = recipe.launch.num_machines
    allocation = _find_allocation(recipe)
    placements = list_placements(num_processes, num_machines, allocation)
    commands = [
        build_command(Launch(selected, {}, num_processes), placement) for placement in placements
    ]
    contents = _find_contents(arguments, recipe, paths)
    base: AskedBase = "own" if arguments.own_base else "shared"
    planned = Launch(selected, contents, num_processes, resume, base=base)
    facts = selected.read_facts()
    status = read_status(
        facts, recipe, contents,
        num_processes=num_processes, resume=resume, named=contents,
    )  # fmt: skip
    if arguments.repair:
        return _run_repair(arguments, planned, status)
    pushes, is_fresh = PushPlan(), arguments.fresh and status.state != "pending"
    action = decide(status, retry_failed=True).action
    is_due = is_fresh or action in ("launch", "push")
    pushes.add(selected, facts, is_due=is_due, is_fresh=is_fresh)
    pushes.refuse()
    if arguments.fresh and resume == "auto":
        planned = replace(planned, resume="none")  # nor from remote storage
    if arguments.fresh and status.state != "pending":
        if not arguments.dry_run and not arguments.prepare:  # before it is moved aside
            Devices(1, None, allocation).check([planned])
        status = _start_fresh(arguments, selected, status, contents, num_processes)
    planned = replace(planned, num_attempts=status.num_attempts)
    decision = decide(status, retry_failed=True)
    if decision.action == "refuse":
        raise _refuse(paths, status, _same_launch(arguments))
    if decision.action == "push":
        print(f"{decision.action:<7} {planned.full_name}  {decision.why}")
        if arguments.dry_run or arguments.prepare:
            return 0
        result = send_pushes([selected])
        print_unpushed([selected])
        return _derive_exit_code(result, paths)
    if decision.action == "skip":
        advice = (
            ""
            if resume == "auto"
            else "; `--resume` resumes unfinished runs only, `--fresh` starts from step 0"
        )
        nothing = ": nothing would be started" if arguments.dry_run else ""
        print(f"{planned.full_name}  {decision.why}{nothing}{advice}")
        # A cluster counts a run with exit code 0 as done. A run that another process holds, perhaps
        # on a lost machine, may not be done.
        is_held = status.state == "running" and is_in_cluster(os.environ)
        return EXIT_CODES["transient"] if is_held else 0
    if arguments.dry_run or arguments.prepare:
        if arguments.prepare:
            _prepare(planned, commands[0])
        else:
            _note_refusal(planned, allocation)
        print("\n".join(command.as_shell(os.environ) for command in commands))
        if not arguments.prepare:
            note_how_to_start([planned])
        return 0
    # Leaves out --fresh and --resume, which would start over or rewind.
    again = f"`{_same_launch(arguments)}`"
    result = run_planned(
        [planned], num_slots=1, gpus=None, fail_fast=False, allocation=allocation, again=again
    )
    print_unpushed([selected])
    return _derive_exit_code(result, paths)


def _note_refusal(planned: Launch, allocation: Allocation | None) -> None:
    """Note in a preview, whose commands must be started by hand, that `launch` would refuse."""
    try:
        Devices(1, None, allocation).check([planned])
    except RefusedError as error:
        print(
            f"note: {error.message}: without `--dry-run` this is refused here; `--prepare`"
            " writes the run directory so that you can start these commands by hand",
            file=sys.stderr,
        )


def _find_contents(
    arguments: argparse.Namespace, recipe: Recipe, paths: RunPaths
) -> dict[str, str]:
    """The content hashes that the decision needs. A preview refuses the same files, reads only
    files that are compared with something, and stores no hash.
    """
    is_preview = arguments.dry_run
    hashes = ContentHashes(content_cache_path(arguments.output_root), is_kept=not is_preview)
    is_compared = not is_preview or arguments.prepare or paths.recipe_path.exists()
    return find_contents(recipe, hashes, is_compared=is_compared)


def _start_fresh(
    arguments: argparse.Namespace,
    selected: Selected,
    status: RunStatus,
    contents: Mapping[str, str],
    num_processes: int,
) -> RunStatus:
    """`--fresh`: the status after the run is moved aside; a preview moves nothing."""
    if not arguments.dry_run:
        _move_aside(selected)
        return read_status(
            selected.read_facts(), selected.recipe, contents,
            num_processes=num_processes, resume=_parse_resume(arguments.resume), named=contents,
        )  # fmt: skip
    run_dir = selected.paths.run_dir
    if status.state == "running":
        raise RefusedError(f"{run_dir} is running; stop it before starting from step 0")
    print(f"{run_dir} would be moved aside first", file=sys.stderr)
    return RunStatus(state="pending", why="never started")


def _find_allocation(recipe: Recipe) -> Allocation | None:
    num_machines = recipe.launch.num_machines
    return find_allocation(os.environ, num_machines) if num_machines > 1 else None


def _run_repair(arguments: argparse.Namespace, planned: Launch, status: RunStatus) -> int:
    """`runner launch --repair`."""
    from runner.plan.repair import find_repair_step

    if arguments.fresh or arguments.prepare or arguments.resume != "auto":
        raise RunnerError(
            "`--repair` rewrites `model/` of a completed run from its best checkpoint:"
            " it cannot be combined with --fresh, --prepare or --resume",
            hint=f"{_same_launch(arguments)} --repair",
        )
    paths, facts = planned.paths, planned.selected.read_facts()
    status = verify_files(facts, status)
    if status.state == "running":
        raise RefusedError(f"{paths.run_dir} is running", hint=f"runner why {paths.run_dir}")
    if status.state in ("changed", "unreadable"):
        raise _refuse(paths, status, _same_launch(arguments))
    if status.state not in ("completed", "damaged"):
        raise RefusedError(
            f"{paths.run_dir} is {status.state}: only a completed run has a model to repair",
            hint=f"{_same_launch(arguments)}  # resumes it",
        )
    step = find_repair_step(facts, status, planned.recipe)
    if step is None:
        print(f"{planned.full_name}  every byte is as recorded: nothing to repair")
        print_unpushed([planned.selected])
        return 0
    pushes = PushPlan()
    pushes.add(planned.selected, facts, is_due=True)
    pushes.refuse()
    would_be = "would be" if arguments.dry_run else "is"
    print(f"{planned.full_name}  model/ {would_be} rewritten from step {step}", file=sys.stderr)
    trained = list_trained(facts.attempts)
    if trained and arguments.num_processes is None:  # else DeepSpeed's files do not fit
        planned = replace(planned, num_processes=trained[-1].num_processes)
    planned = replace(planned, num_attempts=status.num_attempts, is_repair=True)
    allocation = _find_allocation(planned.recipe)
    if arguments.dry_run:
        _note_refusal(planned, allocation)
        for placement in list_placements(
            planned.num_processes, planned.recipe.launch.num_machines, allocation
        ):
            print(build_command(planned, placement).as_shell(os.environ))
        return 0
    result = run_planned(
        [planned], num_slots=1, gpus=None, fail_fast=False,
        allocation=allocation, again=f"`{_same_launch(arguments)} --repair`",
    )  # fmt: skip
    print_unpushed([planned.selected])
    return _derive_exit_code(result, paths)


def _derive_exit_code(result: PoolResult, paths: RunPaths) -> int:
    """The exit code for a cluster engine: the reason why the run has no result, 0 if it has one.
    A push that a signal left pending is no reason to allocate machines again.
    """
    if (
        result.failed
        and result.failed[0].failure.kind == "preempted"
        and _count_fruitless(paths) > MAX_FRUITLESS
    ):
        print(
            f"error: the last {MAX_FRUITLESS + 1} attempts were preempted before their first"
            " step\n\nhint: give the run more time,"
            " for example with `runner sweep ... --engine slurm --time-limit`",
            file=sys.stderr,
        )
        return EXIT_CODES["transient"]
    if result.stopped_by == signal.SIGINT:
        return STOPPED
    if result.stopped_by is not None and (result.not_started or result.held) and not result.failed:
        return EXIT_CODES["preempted"]
    if result.held and is_in_cluster(os.environ):
        return EXIT_CODES["transient"]
    return next((EXIT_CODES[failed.failure.kind] for failed in result.failed), 0)


def _count_fruitless(paths: RunPaths) -> int:
    """The number of last attempts in a row that were preempted before their first step."""
    count = 0
    for attempt in reversed(load_record(paths).attempts):
        if attempt.failure is None or attempt.failure.kind != "preempted":
            break
        progress = load_progress(paths.attempt(attempt.number).progress_path)
        if progress is not None and progress.step > 0:
            break
        count += 1
    return count


def select_run(arguments: argparse.Namespace) -> Selected:
    """The run of a recipe or name, with the overrides and the name that `launch` accepts, or the
    run of a run directory, as its recorded recipe describes it.

    Like `launch`, reads the recipe file of a name if it exists.
    """
    path = find_one(str(arguments.recipe), arguments.output_root, "recipe")
    if not path.is_dir():
        return _load_one(path, arguments)
    if arguments.overrides or arguments.name:
        raise RunnerError(f"{path} is a run directory: overrides and `--name` need a recipe file")
    try:
        found = select_recipes([str(path)], arguments.output_root)
    except CorruptFileError as error:
        raise RunnerError(
            f"{path} is unreadable: {error.message}", hint=error.hint or suggest_fresh(path)
        ) from error
    if len(found) > 1:
        raise RunnerError(
            f"{path} holds {len(found)} runs", hint=f"runner why {found[0].paths.run_dir}"
        )
    return found[0]


def suggest_fresh(run_dir: Path) -> str:
    """The hint for a run with a damaged file; it names the recipe if that exists."""
    if hint := _suggest_lease(RunPaths(run_dir)):
        return hint
    recipe = RECIPES_DIR / run_dir.parent.name / f"{run_dir.name}.yaml"
    if not recipe.exists():
        return UNREADABLE_HINT
    words, root = [str(recipe)], run_dir.parent.parent
    words += ["--output-root", str(root)] if root != Path("runs") else []
    return UNREADABLE_HINT.replace("RECIPE", shlex.join(words))


def _suggest_lease(paths: RunPaths) -> str | None:
    """The hint if the lease is not a plain file, so that the run cannot be moved aside; else
    None.
    """
    try:
        is_plain(paths.lease_path)
    except CorruptFileError as error:
        return error.hint
    except OSError:
        pass
    return None


def _select_one(arguments: argparse.Namespace) -> Selected:
    """The run of the recipe that `launch` names, by path or by name."""
    path = find_one(str(arguments.recipe), arguments.output_root, "recipe")
    if not path.is_dir():
        return _load_one(path, arguments)
    if not is_run_dir(path):
        raise RunnerError(f"{path} is a folder", hint=f"runner sweep {shlex.quote(str(path))}")
    recipe_path = RECIPES_DIR / path.parent.name / f"{path.name}.yaml"
    raise RunnerError(
        f"{path} is a run directory; `launch` needs a recipe",
        hint=(
            f"runner launch {shlex.quote(str(recipe_path))}"
            if recipe_path.exists()
            else f"runner sweep {shlex.quote(str(path))}  # uses the recipe that the run recorded"
        ),
    )


def _load_one(path: Path, arguments: argparse.Namespace) -> Selected:
    name: str | None = arguments.name
    if name is not None:
        if secret := find_secret(name):
            raise RunnerError(f"`--name` holds {secret[0]}: names are public")
        if not re.fullmatch(NAME_PATTERN, name):
            raise RunnerError(
                f"the name {name!r} may only have letters, digits and . _ -, and at most 200"
                " characters"
            )
    selected = load_selected(path, arguments.output_root, arguments.overrides, name)
    if name is None:
        note_idle_overrides([selected])
    return selected


def _refuse(paths: RunPaths, status: RunStatus, same_launch: str) -> RefusedError:
    if status.state == "changed":
        return RefusedError(
            f"{paths.run_dir} holds another experiment; {describe_change(status.differences)}:\n"
            + "\n".join(f"  {line}" for line in status.differences),
            hint=f"{same_launch} --fresh  # moves the old run aside and starts from step 0",
        )
    if status.state == "damaged":
        return RefusedError(
            f"{paths.run_dir} is damaged:\n"
            + "\n".join(f"  {name} {what}" for name, what in status.damage.items()),
            hint=suggest_fixes(status.damage).replace("runner launch RECIPE", same_launch),
        )
    if status.state == "unreadable":
        return RefusedError(
            f"{paths.run_dir} is unreadable: {status.why}",
            hint=_suggest_lease(paths)
            or f"{same_launch} --fresh  # moves the run aside and starts from step 0",
        )
    return RefusedError(
        f"{paths.run_dir}: {describe_obstacles(status.checkpoint_step, status.obstacles)}",
        hint=suggest_alternatives(status.obstacles, same_launch),
    )


def _same_launch(arguments: argparse.Namespace) -> str:
    words = ["runner", "launch", str(arguments.recipe), *arguments.overrides]
    words += ["--name", arguments.name] if arguments.name else []
    words += ["--own-base"] if arguments.own_base else []
    words += (
        ["--output-root", str(arguments.output_root)]
        if arguments.output_root != Path("runs")
        else []
    )
    return pasteable(shlex.join(words))


def _parse_resume(text: str) -> str:
    """`Attempt.resume`: a word, a URL, or the absolute path of an existing checkpoint."""
    if text in ("auto", "latest", "best") or "://" in text:
        if secret := find_secret(text):
            raise RunnerError(f"`--resume` holds {secret[0]}", hint="set it in the environment")
        return text
    if not Path(text).exists():
        raise RunnerError(
            f"`--resume {text}` does not exist; expected a folder or an archive",
            hint="use --resume with auto, latest, best, a path or a URL",
        )
    return str(Path(text).absolute())


def _move_aside(selected: Selected) -> None:
    from runner.launch.run_files import move_aside, take_lease

    lease = take_lease(selected.paths)
    if lease is None:
        raise RefusedError(
            f"{selected.paths.run_dir} is running; stop it before starting from step 0"
        )
    target = move_aside(selected.paths)
    lease.close()
    if target is not None:
        print(f"moved {selected.paths.run_dir} to {target}", file=sys.stderr)


def _prepare(planned: Launch, command: LaunchCommand) -> None:
    from runner.launch.names import NamesOnHub
    from runner.launch.provenance import read_git_state
    from runner.launch.run_files import open_attempt, prepare_run, refuse_unresumable, take_lease

    paths = planned.paths
    lease = take_lease(paths)
    if lease is None:
        raise RefusedError(f"{paths.run_dir} is running")
    with contextlib.closing(lease):
        facts = read_facts(paths, lease=lease)
        divisor = find_divisor(facts, planned.recipe)
        refuse_unresumable(planned, command, facts, divisor)
        prepare_run(planned.recipe, planned.contents, facts, NamesOnHub(), planned.resume)
        open_attempt(planned, command, facts, divisor, read_git_state())
