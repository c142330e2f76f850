"""The local engine: runs several attempts at a time on this machine.

`sweep --help` imports this file for its options, so slow imports are inside functions.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.errors import RunnerError
from runner.project_folder import pasteable

if TYPE_CHECKING:
    import argparse

    from runner.launch.command import Placement
    from runner.launch.gpus import NamedGpu
    from runner.launch.placement import Devices, PlanRuns
    from runner.plan.decide import Launch

ONLY_WRITES_FILES: Final = False
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {}  # none beyond those of every sweep


@dataclass(frozen=True)
class LocalOptions:
    """The options for this machine from the command line."""

    num_slots: int  # the number of places on GPUs if `gpus` is set
    gpus: tuple[NamedGpu, ...] | None  # each run gets its own of these; None: not requested
    per_gpu: int  # runs at the same time on each of them
    fail_fast: bool
    is_dry_run: bool
    uses_workers: bool  # if false, each run imports its libraries itself
    again: str  # the command that resumes stopped runs
    output_root: Path

    @property
    def gpu_names(self) -> list[str] | None:
        """The names of the GPUs for `CUDA_VISIBLE_DEVICES`."""
        return None if self.gpus is None else [gpu.name for gpu in self.gpus]


def parse_options(arguments: argparse.Namespace) -> LocalOptions:
    """Raises: RunnerError for GPUs that do not exist, are hidden, or are named twice."""
    from runner.launch.gpus import choose_gpus, warn_of_cpu_build

    per_gpu = arguments.per_gpu or 1
    if arguments.per_gpu is not None and arguments.slots is not None:
        raise RunnerError(
            "`--slots` is the number of runs at a time on the whole machine, `--per-gpu` on"
            " each GPU; leave out one of them",
            hint=f"--per-gpu {per_gpu}",
        )
    gpus = None
    if arguments.gpus is not None or arguments.per_gpu is not None:
        gpus = choose_gpus(arguments.gpus, os.environ, with_memory=per_gpu > 1)
        warn_of_cpu_build()
    return LocalOptions(
        num_slots=len(gpus) * per_gpu if gpus is not None else arguments.slots or 1,
        gpus=gpus,
        per_gpu=per_gpu,
        fail_fast=arguments.fail_fast,
        is_dry_run=arguments.dry_run,
        uses_workers=not arguments.cold,
        output_root=arguments.output_root,
        again=_build_again(arguments.typed),
    )


_MAX_TYPED_LENGTH: Final = 1000  # a shell may expand one pattern to hundreds of paths


def _build_again(typed: Sequence[str]) -> str:
    """The command as typed, for the user to repeat.

    Leaves out `--fresh` and `--yes`: the changed runs are moved aside before anything runs.
    """
    again = shlex.join(["runner", *(word for word in typed if word not in ("--fresh", "--yes"))])
    return f"`{again}`" if len(again) <= _MAX_TYPED_LENGTH else "the same command"


def submit(plan: PlanRuns, options: LocalOptions) -> int:
    """Run the planned runs until all have ended, or print the commands in a dry run; returns an
    exit code.
    """
    from runner.engines.sharing import require_memory
    from runner.launch.placement import Devices
    from runner.launch.pool import STOPPED, build_command, run_planned

    devices = Devices(options.num_slots, options.gpu_names, per_gpu=options.per_gpu)

    def require(runs: Sequence[Launch]) -> None:
        devices.check(runs)
        if options.gpus is not None and options.per_gpu > 1:
            require_memory(runs, options.gpus, options.per_gpu, options.output_root)

    planned = plan({}, sys.stdout, require)
    sys.stdout.flush()
    if options.is_dry_run:
        for run, placement in _preview(planned, devices):
            print(build_command(run, placement).as_shell(os.environ))
        note_how_to_start(planned)
        return 0
    result = run_planned(
        planned,
        num_slots=options.num_slots,
        gpus=options.gpu_names,
        per_gpu=options.per_gpu,
        fail_fast=options.fail_fast,
        again=options.again,
        uses_workers=options.uses_workers,
        awaits_held=True,
        to_push=plan.to_push,
    )
    if result.stopped_by is not None:
        return STOPPED
    return 1 if result.failed else 0


def note_how_to_start(planned: Sequence[Launch]) -> None:
    """Tell a user at a terminal how to start a run by hand: the commands of a preview need the run
    directory, which a preview does not write.
    """
    run = next((run.selected for run in planned if not run.selected.source_path.is_dir()), None)
    if run is None or not sys.stderr.isatty():
        return
    words = ["runner", "launch", str(run.source_path), *run.overrides]
    if run.paths.run_dir.parent.parent != Path("runs"):
        words += ["--output-root", str(run.paths.run_dir.parent.parent)]
    print(
        f"note: nothing was written; to start a run by hand: {pasteable(shlex.join(words))}"
        " --prepare",
        file=sys.stderr,
    )


def _preview(planned: Sequence[Launch], devices: Devices) -> Iterator[tuple[Launch, Placement]]:
    """Each run with its placement, assuming that runs started together also end together."""
    taken: list[Placement] = []
    for run in planned:
        placement = devices.take(run.num_processes)
        if placement is None:
            while taken:
                devices.release(taken.pop())
            placement = devices.take(run.num_processes)
            assert placement is not None, "`require` refuses what never fits"
        taken.append(placement)
        yield run, placement
