"""The verbs that start many runs, `sweep` and `rerun`, from parsed arguments to an exit code.

Decides what is launched; where and when is up to the engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from runner.cli.engines import load_engines
from runner.plan.decide import Decision, Launch, decide, decide_queued
from runner.plan.select import QueuedRun, Selected, UnreadableRun, select_recipes
from runner.plan.status import read_status
from runner.recipe.contents import ContentHashes, hash_contents, known_contents
from runner.run.failures import UNREADABLE_HINT
from runner.run.paths import content_cache_path


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
    engine = load_engines()[arguments.engine]
    options = engine.parse_options(arguments)
    num_unhappy = 0

    def plan(queued: Mapping[str, QueuedRun], stream: TextIO) -> list[Launch]:
        nonlocal num_unhappy
        planned, num_unhappy = _decide_all(
            selected, arguments, queued, stream, only_unfinished=only_unfinished
        )
        return planned

    code = engine.submit(plan, options)
    return code or (1 if (num_unhappy or unreadable) and not arguments.dry_run else 0)


def _decide_all(
    selected: list[Selected],
    arguments: argparse.Namespace,
    queued: Mapping[str, QueuedRun],
    stream: TextIO,
    *,
    only_unfinished: bool,
) -> tuple[list[Launch], int]:
    """What is to be launched, and how many of the others are failed or changed; each decision is
    printed.
    """
    hashes = ContentHashes(content_cache_path(arguments.output_root))
    planned: list[Launch] = []
    num_unhappy = 0
    for one in selected:
        contents = (
            hash_contents(one.recipe, hashes)
            if not arguments.dry_run
            else known_contents(one.recipe, hashes)
        )
        status = read_status(one.read_facts(), one.recipe, contents)
        decision = decide(
            status, retry_failed=arguments.retry_failed, only_unfinished=only_unfinished
        )
        differences = (*status.differences, *status.obstacles)
        if decision.action == "launch" and (task := queued.get(one.full_name)) is not None:
            differences = tuple(task.find_differences(one))
            decision = decide_queued(task, differences)
        print(_describe_decision(one, decision, differences), file=stream)
        if decision.action == "launch":
            num_processes = one.recipe.launch.num_processes
            planned.append(Launch(one, contents, num_processes, num_attempts=status.num_attempts))
        elif decision.action == "refuse" or (
            status.state == "failed" and one.full_name not in queued
        ):
            num_unhappy += 1
    return planned, num_unhappy


def run_rerun(arguments: argparse.Namespace) -> int:
    """`runner rerun`."""
    return run_sweep(arguments, only_unfinished=True)


def _describe_decision(one: Selected, decision: Decision, differences: Sequence[str]) -> str:
    why = decision.why.partition("\n")[0]
    lines = [f"{decision.action:<7} {one.full_name}  {why}"]
    if decision.action == "refuse":
        lines += [f"          {line}" for line in differences]
    return "\n".join(lines)
