"""A run's context inside a process that does not train."""

from __future__ import annotations

from typing import Final

from runner.data.draw import LeftOut
from runner.data.rows import Samples, Split
from runner.sft.context import RunContext
from runner.sft.preemption import Preemption
from runner.sft.recorder import Recorder
from runner.sft.startup import WorldPlace
from tests.conftest import Project

ALONE: Final = WorldPlace()


def open_context(project: Project, *overrides: str, place: WorldPlace = ALONE) -> RunContext:
    """One rank of the first attempt of a run."""
    paths = project.paths("base")
    paths.attempt(1).attempt_dir.mkdir(parents=True, exist_ok=True)
    return RunContext(
        project.recipe(*overrides),
        "digest",
        paths,
        paths.attempt(1),
        place,
        resume="auto",
        micro_batch_divisor=1,
        preemption=Preemption(paths, 1, place),
    )


def make_recorder(context: RunContext) -> Recorder:
    """The recorder of a run without rows."""
    split = Split((), ())
    return Recorder(context, Samples(split, split, split, LeftOut()))
