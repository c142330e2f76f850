"""Pushes to the hub by the verbs that launch runs: impossible pushes are refused before anything
starts, pending ones are sent, and those still pending at the end are listed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from runner.errors import CorruptFileError
from runner.launch.outcome import PoolResult
from runner.launch.pool import run_planned
from runner.plan.pushes import (
    PlannedPush,
    describe_other_push,
    find_push_to,
    refuse_pushes,
)
from runner.plan.select import Selected
from runner.plan.status import read_status
from runner.run.facts import RunFacts
from runner.run.lease import is_leased
from runner.text import format_count

_NUM_NOTED: Final = 5


@dataclass
class PushPlan:
    """The pushes of the selected runs, collected while each run is decided on."""

    needs_token: bool = True  # in this environment
    planned: list[PlannedPush] = field(default_factory=list)
    to_send: list[Selected] = field(default_factory=list)  # completed runs
    notes: list[str] = field(default_factory=list)

    def add(
        self, selected: Selected, facts: RunFacts, *, is_due: bool, is_fresh: bool = False
    ) -> None:
        """Record the destination of a run's push. `is_due`: the run is launched or pushed now."""
        with contextlib.suppress(CorruptFileError, OSError):  # the run's state reports them
            repo_id = find_push_to(facts, selected.recipe, is_fresh=is_fresh)
            if repo_id is not None:
                self.planned.append(
                    PlannedPush(selected.full_name, selected.paths, repo_id, is_due)
                )
            if not is_fresh and (other := describe_other_push(facts, selected.recipe)):
                self.notes.append(f"{selected.full_name}: {other}")

    def refuse(self) -> None:
        """Print what differs from the recipes, and refuse pushes that cannot succeed.

        Raises:
            RefusedError: some pushes cannot succeed; lists every problem.
        """
        refuse_pushes(self.planned, os.environ if self.needs_token else None)
        for note in self.notes[:_NUM_NOTED]:
            print(f"note: {note}; `runner export RUN --push` pushes by hand", file=sys.stderr)
        if len(self.notes) > _NUM_NOTED:
            more = format_count(len(self.notes) - _NUM_NOTED, "more run")
            print(f"note: likewise for {more}", file=sys.stderr)


def send_pushes(selected: Sequence[Selected]) -> PoolResult:
    """Push completed runs without launching any, and print to stderr how each push ended."""
    return run_planned([], num_slots=1, gpus=None, fail_fast=False, to_push=selected)


def print_unpushed(selected: Iterable[Selected]) -> int:
    """Print to stderr the completed runs that are not pushed yet, each with the command to push it.
    Returns their number, without those that another process is pushing.
    """
    count = 0
    for one in selected:
        facts = one.read_facts()
        status = read_status(facts, one.recipe, {})
        if status.state != "completed" or status.push_to is None:
            continue
        with contextlib.suppress(CorruptFileError, OSError):  # then nobody is pushing it
            if is_leased(one.paths.push_lock_path):
                print(
                    f"{one.full_name} is completed and is being pushed to {status.push_to} by"
                    " another process",
                    file=sys.stderr,
                )
                continue
        count += 1
        again = shlex.join(["runner", "export", str(one.paths.run_dir), "--push"])
        print(
            f"{one.full_name} is completed, and its {status.push_note}\n"
            f"  hint: {again}  # or the same command again; --push OWNER/NAME sends it elsewhere",
            file=sys.stderr,
        )
    return count
