"""The local engine: runs several attempts at a time on this machine.

`sweep --help` imports this file for its options: what is slow is imported in functions.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import argparse

    from runner.launch.placement import PlanRuns

ONLY_WRITES_FILES: Final = False
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {}  # beyond those of every sweep


@dataclass(frozen=True)
class LocalOptions:
    """What the command line says about this machine."""

    num_slots: int
    gpus: tuple[str, ...] | None  # each run gets its own of these; None: not asked for
    fail_fast: bool
    is_dry_run: bool
    uses_workers: bool  # else each run imports for itself
    again: str  # the command that continues what was stopped


def parse_options(arguments: argparse.Namespace) -> LocalOptions:
    """Raises: RunnerError for `--gpus` that are not different devices."""
    from runner.launch.placement import parse_gpus

    gpus = parse_gpus(arguments.gpus)
    return LocalOptions(
        num_slots=len(gpus) if gpus is not None else arguments.slots or 1,
        gpus=tuple(gpus) if gpus is not None else None,
        fail_fast=arguments.fail_fast,
        is_dry_run=arguments.dry_run,
        uses_workers=not arguments.cold,
        again=_build_again(arguments.typed),
    )


_MAX_TYPED_LENGTH: Final = 1000  # hundreds of paths, which a shell made of one pattern


def _build_again(typed: Sequence[str]) -> str:
    """The command as it was typed, for people.

    Without what moves changed runs aside: that is done by the time that something runs.
    """
    again = shlex.join(["runner", *(word for word in typed if word not in ("--fresh", "--yes"))])
    return f"`{again}`" if len(again) <= _MAX_TYPED_LENGTH else "the same command"


def submit(plan: PlanRuns, options: LocalOptions) -> int:
    """Run what is planned until all of it has ended, or print the commands in a dry run; returns an
    exit code.
    """
    from runner.launch.placement import list_placements
    from runner.launch.pool import STOPPED, build_command, run_planned

    planned = plan({}, sys.stdout)
    if options.is_dry_run:
        for run in planned:
            for placement in list_placements(
                run.num_processes, run.recipe.launch.num_machines, None
            ):
                print(build_command(run, placement).as_shell(os.environ))
        return 0
    sys.stdout.flush()
    result = run_planned(
        planned,
        num_slots=options.num_slots,
        gpus=list(options.gpus) if options.gpus is not None else None,
        fail_fast=options.fail_fast,
        again=options.again,
        uses_workers=options.uses_workers,
        awaits_held=True,
    )
    if result.stopped_by is not None:
        return STOPPED
    return 1 if result.failed else 0
