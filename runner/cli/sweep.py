"""The verbs that start many runs, `sweep` and `rerun`, from parsed arguments to an exit code.

Decides which runs are launched; the engine decides where and when.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TextIO, get_args

from runner.cli.changed import (
    ChangedRun,
    choose_folders,
    confirm,
    describe_changed,
    describe_remote,
    move_changed,
)
from runner.cli.engines import load_engines
from runner.cli.pushes import PushPlan, print_unpushed, send_pushes
from runner.cli.reading import note_edited, note_idle_overrides, note_unrendered
from runner.errors import RefusedError
from runner.launch.placement import PlanRuns, RequireRuns
from runner.launch.pool import STOPPED
from runner.plan.decide import Decision, Launch, decide, decide_queued
from runner.plan.select import QueuedRun, Selected, UnreadableRun, select_recipes
from runner.plan.status import (
    RunStatus,
    State,
    find_hint,
    read_status,
    read_status_unverified,
    suggest_fixes,
)
from runner.project_folder import find_user_folder, pasteable
from runner.recipe.contents import ContentHashes, KnownContents, find_contents
from runner.recipe.identity import RULES
from runner.run.allowed_code import require_allowed, suggest_allowing
from runner.run.failures import UNREADABLE_HINT
from runner.run.paths import content_cache_path
from runner.run.record import AskedBase
from runner.text import format_count


def run_sweep(arguments: argparse.Namespace, *, only_unfinished: bool = False) -> int:
    """`runner sweep`."""
    unreadable: list[UnreadableRun] = []
    selected = select_recipes(
        arguments.paths, arguments.output_root, arguments.where, unreadable,
        overrides=arguments.overrides,
    )  # fmt: skip
    note_idle_overrides(selected)
    for lost in unreadable:
        print(
            f"warning: {lost.full_name} is unreadable: {lost.why}\n  {UNREADABLE_HINT}",
            file=sys.stderr,
        )
    if arguments.list:
        # The arguments of `launch`: the recipe and its overrides.
        is_elsewhere = find_user_folder() is not None
        for one in selected:
            path = one.source_path.absolute() if is_elsewhere else one.source_path
            words = [str(path), *one.overrides]
            print(shlex.join(words) if one.overrides else words[0])
        return 0
    note_edited(selected)
    note_unrendered(selected)
    engine = load_engines()[arguments.engine]
    if arguments.yes and not arguments.fresh:
        raise RefusedError("`--yes` answers the question of `--fresh`; it needs `--fresh`")
    if arguments.fresh and engine.ONLY_WRITES_FILES:
        raise RefusedError(
            f"`--engine {arguments.engine}` only prints a file, but `--fresh` moves runs",
            hint="runner launch RECIPE --fresh  # on the machine that has the runs",
        )
    options = engine.parse_options(arguments)
    num_problems = 0
    found: dict[str, RunStatus] = {}
    # For the engines that only write a file, the token is set elsewhere.
    pushes = PushPlan(needs_token=not engine.ONLY_WRITES_FILES)
    launched: list[Selected] = []

    def plan(
        queued: Mapping[str, QueuedRun], stream: TextIO, require: RequireRuns | None = None
    ) -> list[Launch]:
        nonlocal num_problems
        planned, num_problems = _decide_all(
            selected, arguments, queued, stream, found, pushes, require,
            only_unfinished=only_unfinished,
        )  # fmt: skip
        launched[:] = [launch.selected for launch in planned]
        return planned

    code = engine.submit(PlanRuns(plan, pushes.to_send), options)
    num_unpushed = 0
    if not arguments.dry_run:
        # Engines other than local only submit.
        if arguments.engine != "local" and pushes.to_send and code != STOPPED:
            code = STOPPED if send_pushes(pushes.to_send).stopped_by is not None else code
        num_unpushed = print_unpushed([*launched, *pushes.to_send])
    _print_damaged(found)
    if arguments.engine == "local" and not arguments.dry_run:
        statuses = _read_statuses(selected, arguments.output_root)
        _print_undone(found, statuses)
        counts = Counter(status.state for status in statuses.values())
        print(_describe_states(counts + Counter(unreadable=len(unreadable))), file=sys.stderr)
        # Counts some runs twice; only zero or not matters.
        num_problems += sum(counts[state] for state in _PROBLEM_STATES)
    # A file is written for the runs that can be launched, so it counts as a success.
    has_problems = num_problems or unreadable or num_unpushed
    return code or (1 if has_problems and not engine.ONLY_WRITES_FILES else 0)


_PROBLEM_STATES: Final = ("interrupted", "failed", "changed", "damaged", "unreadable")


def _read_statuses(selected: Sequence[Selected], output_root: Path) -> dict[str, RunStatus]:
    """The current status of each run, read after the sweep has ended."""
    known = KnownContents(content_cache_path(output_root))
    return {
        one.full_name: read_status_unverified(one.read_facts(), one.recipe, known.look(one.recipe))
        for one in selected
    }


def _print_undone(found: Mapping[str, RunStatus], statuses: Mapping[str, RunStatus]) -> None:
    """Print the runs that got into trouble during the sweep and were not reported yet. Failures of
    runs that the sweep launched were reported already.
    """
    for full_name, status in statuses.items():
        before = found[full_name].state
        is_left_alone = before in ("running", "completed")
        reported = _PROBLEM_STATES if is_left_alone else ("changed", "damaged")
        if status.state == before or status.state not in reported:
            continue
        why, hint = status.why.partition("\n")[0], find_hint(status)
        print(
            f"{full_name} was {before} when this sweep began and is {status.state} now: {why}",
            file=sys.stderr,
        )
        if hint is not None:
            print(f"  hint: {hint}", file=sys.stderr)


def _describe_states(states: Counter[str]) -> str:
    """The last line of a sweep.

    >>> _describe_states(Counter(running=1, completed=20))
    '21 runs: 20 completed, 1 running elsewhere'
    """
    order = ("completed", *(state for state in get_args(State) if state != "completed"))
    words = {"running": "running elsewhere"}
    counted = [f"{states[one]} {words.get(one, one)}" for one in order if states[one]]
    total = states.total()
    return f"{total} {'run' if total == 1 else 'runs'}: {', '.join(counted)}"


def _print_damaged(found: Mapping[str, RunStatus]) -> None:
    """Print the damaged runs last: a sweep cannot fix them."""
    for full_name, status in found.items():
        if status.state == "damaged":
            print(
                f"{full_name} is damaged: {status.why}\n  hint: {suggest_fixes(status.damage)}",
                file=sys.stderr,
            )


def _decide_all(
    selected: list[Selected],
    arguments: argparse.Namespace,
    queued: Mapping[str, QueuedRun],
    stream: TextIO,
    found: dict[str, RunStatus],
    pushes: PushPlan,
    require: RequireRuns | None,
    *,
    only_unfinished: bool,
) -> tuple[list[Launch], int]:
    """The runs to launch, and the number of other runs that are failed, changed or damaged. Prints
    each decision; all changed runs share one.

    Adds the status of each run to `found`, by name, and the runs to push to `pushes`.
    """
    is_preview = arguments.dry_run
    hashes = ContentHashes(content_cache_path(arguments.output_root), is_kept=not is_preview)
    planned: dict[str, Launch] = {}
    changed: list[ChangedRun] = []
    num_problems = num_of_other_rules = num_not_begun = 0
    for one in selected:
        # A run that was never started has nothing to compare its files with.
        is_compared = not is_preview or one.paths.recipe_path.exists()
        contents = find_contents(one.recipe, hashes, is_compared=is_compared)
        facts = one.read_facts()
        status = read_status(facts, one.recipe, contents, named=contents)
        found[one.full_name] = status
        if status.state == "changed":
            changed.append(ChangedRun(one, contents, status))
            if arguments.fresh:
                pushes.add(one, facts, is_due=True, is_fresh=True)
            continue
        if status.state == "completed" and facts.stored is not None:
            num_of_other_rules += facts.stored.rules != RULES
        decision = decide(
            status, retry_failed=arguments.retry_failed, only_unfinished=only_unfinished
        )
        differences = status.obstacles
        if decision.action == "launch" and (task := queued.get(one.full_name)) is not None:
            differences = tuple(task.find_differences(one))
            decision = decide_queued(task, differences)
        if only_unfinished and status.state == "pending" and decision.action == "skip":
            num_not_begun += 1
        else:
            print(_describe_decision(one.full_name, decision, differences), file=stream)
        pushes.add(one, facts, is_due=decision.action in ("launch", "push"))
        if decision.action == "push":
            pushes.to_send.append(one)
        if decision.action == "launch":
            planned[one.full_name] = _build_launch(one, contents, arguments, status.num_attempts)
        elif decision.action == "refuse" or (
            status.state == "failed" and one.full_name not in queued
        ):
            num_problems += 1
    fresh = {
        one.full_name: replace(
            _build_launch(one.selected, one.contents, arguments, 0), resume="none"
        )
        for one in changed
        if arguments.fresh and one.full_name not in queued
    }
    if num_not_begun:
        runs = "1 run was" if num_not_begun == 1 else f"{num_not_begun} runs were"
        what = f"{runs} never started (`rerun` runs only those that were started)"
        print(_describe_block("skip", what, ()), file=stream)
    pushes.refuse()
    allow = suggest_allowing(
        arguments.paths, arguments.output_root, arguments.where, arguments.overrides
    )
    # Before a run is moved aside.
    to_launch = [*planned.values(), *fresh.values()]
    require_allowed([launch.recipe for launch in to_launch], arguments.output_root, allow)
    if require is not None:
        stream.flush()
        require(to_launch)
    if changed and arguments.fresh:
        moved, num_refused = _start_fresh(changed, arguments, queued, stream)
        planned |= {name: fresh[name] for name in moved}
        num_problems += num_refused
    elif changed:
        print(_describe_changed(changed, arguments), file=stream)
        num_problems += len(changed)
    if planned and num_of_other_rules:
        print(
            f"note: {format_count(num_of_other_rules, 'completed run')} of this sweep"
            f" follow{'s' if num_of_other_rules == 1 else ''} other rules of rows and"
            f" masks than the runs launched now (rules {RULES}):"
            " a report compares only runs with the same rules",
            file=sys.stderr,
        )
    return [planned[one.full_name] for one in selected if one.full_name in planned], num_problems


def _start_fresh(
    changed: Sequence[ChangedRun],
    arguments: argparse.Namespace,
    queued: Mapping[str, QueuedRun],
    stream: TextIO,
) -> tuple[list[str], int]:
    """`--fresh`: move the changed runs aside. Returns the names of those to launch, and the number
    of those that cannot be moved.

    Raises:
        RefusedError: the user did not confirm.
    """
    num_refused = 0
    movable: list[ChangedRun] = []
    for one in changed:
        if (task := queued.get(one.full_name)) is None:
            movable.append(one)
            continue
        num_refused += 1
        why = f"queued: {task.task} is {task.state}; run `{task.cancel}` first"
        print(_describe_decision(one.full_name, Decision("refuse", why), ()), file=stream)
    if not movable:
        return [], num_refused
    folders = choose_folders(movable)
    about = [*describe_changed(movable, arguments), *describe_remote(movable)]
    where = ", ".join(str(folder) for folder in folders.values())
    what = "would be moved into" if arguments.dry_run else "will be moved into"
    print(_describe_block("fresh", f"{_count(movable)} {what} {where}", about), file=stream)
    stream.flush()
    moved = movable
    if not arguments.dry_run:
        confirm(movable, folders, is_sure=arguments.yes)
        moved = []
        for one in movable:
            obstacle = move_changed(one, folders[one.output_root])
            if obstacle is None:
                moved.append(one)
                continue
            num_refused += obstacle.action == "refuse"
            print(_describe_decision(one.full_name, obstacle, ()), file=stream)
        report = pasteable(shlex.join(["runner", "report", *map(str, folders.values())]))
        print(f"moved   {_count(moved)}; the numbers: {report}", file=stream)
    decision = Decision("launch", "pending: never started")
    for one in moved:
        print(_describe_decision(one.full_name, decision, ()), file=stream)
    return [one.full_name for one in moved], num_refused


def _build_launch(
    selected: Selected,
    contents: Mapping[str, str],
    arguments: argparse.Namespace,
    num_attempts: int,
) -> Launch:
    base: AskedBase = "own" if arguments.own_base else "shared"
    num_processes = selected.recipe.launch.num_processes
    return Launch(selected, contents, num_processes, base=base, num_attempts=num_attempts)


def run_rerun(arguments: argparse.Namespace) -> int:
    """`runner rerun`."""
    return run_sweep(arguments, only_unfinished=True)


def _describe_changed(changed: Sequence[ChangedRun], arguments: argparse.Namespace) -> str:
    first, *more = changed
    what = (
        f"{first.full_name}  {decide(first.status).why}"
        if not more
        else (f"{_count(changed)} are changed: their directories hold other experiments")
    )
    return _describe_block("refuse", what, describe_changed(changed, arguments))


def _count(runs: Sequence[ChangedRun]) -> str:
    return format_count(len(runs), "run")


def _describe_decision(full_name: str, decision: Decision, differences: Sequence[str]) -> str:
    why = decision.why.partition("\n")[0]
    more = differences if decision.action == "refuse" else ()
    return _describe_block(decision.action, f"{full_name}  {why}", more)


def _describe_block(action: str, what: str, more: Sequence[str]) -> str:
    return "\n".join([f"{action:<7} {what}", *(f"          {line}" for line in more)])
