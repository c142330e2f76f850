"""What the engines share that only write a file for machines elsewhere: which runs, and what only
the user knows.

The other machines see the project folder as it is here: recipes, launch configs and data under the
same relative paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from runner.engines.slurm import Resources, derive_resources
from runner.errors import RefusedError
from runner.plan.select import Selected
from runner.recipe.schema import LaunchSection

# From TERM to KILL: the step that is under way, and a checkpoint, must fit.
GRACE_SECONDS: Final = 300


@dataclass(frozen=True)
class PendingRun:
    """One run to launch elsewhere."""

    selected: Selected
    num_attempts: int  # so far

    @property
    def launch(self) -> LaunchSection:
        """How its processes start."""
        return self.selected.recipe.launch


@dataclass(frozen=True)
class Submission:
    """The runs to launch, in order, and what is asked for beside them."""

    runs: tuple[PendingRun, ...]
    output_root: Path
    image: str  # container image with `runner` on its PATH
    # kubernetes: the claim of the project's volume; skypilot: the bucket that keeps the runs
    storage: str
    num_slots: int | None = None  # runs at a time; None leaves it to the engine
    gpu_type: str | None = None  # as SkyPilot calls it
    fail_fast: bool = False
    retry_failed: bool = False

    @property
    def grid(self) -> str:
        """The grid of the first run, which names what is submitted."""
        return self.runs[0].selected.recipe.run.grid


def check_submission(submission: Submission) -> None:
    """Raises: RefusedError for a run that could not be started from the project folder on one other
    machine.
    """
    for run in submission.runs:
        path = run.selected.source_path
        if path.is_dir():
            raise RefusedError(
                f"{path} is a run directory; another machine needs the recipe file that it came"
                " from"
            )
        _check_relative(path, "the recipe")
        if run.launch.num_machines > 1:
            raise RefusedError(
                f"{run.selected.full_name} wants {run.launch.num_machines} machines, this engine"
                " gives each run one",
                hint=(
                    "`runner launch` inside a Slurm allocation starts a run on several machines;"
                    " see docs/runs.md"
                ),
            )


def check_output_root(output_root: Path) -> None:
    """Raises: RefusedError for a folder of runs that would not be on the project's volume."""
    _check_relative(output_root, "`--output-root`")


def derive_machine(run: PendingRun) -> Resources:
    """What the one machine of a run must have."""
    return derive_resources(run.selected.recipe)


def list_recipe_words(runs: Iterable[PendingRun]) -> list[str]:
    """The recipe files as words of a command line, never to be taken for an option."""
    paths = [str(run.selected.source_path) for run in runs]
    return [f"./{path}" if path.startswith("-") else path for path in paths]


def build_label(text: str, max_length: int) -> str:
    """A name of lower-case letters, digits and inner hyphens, as DNS has them.

    >>> build_label("Summaries_v2.1-", 40)
    'summaries-v2-1'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:max_length].strip("-") or "runs"


def dump_documents(documents: Sequence[dict[str, Any]], comment: str) -> str:
    """YAML with the keys in the order given; texts of several lines stay readable."""
    lines = [f"# {line}" for line in comment.splitlines()]
    bodies = [
        yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        for one in documents
    ]
    return "\n".join([*lines, "---\n".join(bodies)])


class _Dumper(yaml.SafeDumper):
    """No anchors: what occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _dump_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _dump_text)


def _check_relative(path: Path, what: str) -> None:
    if path.is_absolute() or ".." in path.parts:
        raise RefusedError(
            f"{what}, {path}, is outside the folder that other machines get to see",
            hint="start `runner` in the project folder, and give paths below it",
        )
