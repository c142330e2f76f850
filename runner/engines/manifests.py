"""Shared by the engines that write a job file instead of submitting it: which runs, and what only
the user knows.

The other machines see the project folder as it is here: recipes, launch configs and data under the
same relative paths.

No engine itself. The help of `sweep` imports this file: what is slow is imported in functions.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.errors import RefusedError, RunnerError

if TYPE_CHECKING:
    import argparse

    import yaml

    from runner.launch.placement import PlanRuns
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
class ManifestOptions:
    """What is asked for beside the runs."""

    output_root: Path
    image: str  # container image with `runner` on its PATH
    # kubernetes: the claim of the project's volume; skypilot: the bucket that keeps the runs
    storage: str
    num_slots: int | None = None  # runs at a time; None leaves it to the engine
    fail_fast: bool = False
    owns_base: bool = False  # each run scores the base model itself
    overrides: tuple[str, ...] = ()  # of each recipe


SHARED_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "--image": {"metavar": "IMAGE", "help": "container image with `runner` on its PATH"},
    "--storage": {
        "metavar": "NAME",
        "help": "kubernetes: the project's volume claim; skypilot: a bucket",
    },
}


def read_shared_options(
    arguments: argparse.Namespace, *, submit: str, storage: str
) -> dict[str, Any]:
    """The fields of `ManifestOptions`. `submit` is what a shell does with the file, `storage` what
    `--storage` means.

    Raises:
        RunnerError: no file can be made of these options.
    """
    engine = arguments.engine
    if not arguments.dry_run:
        raise RunnerError(
            f"`--engine {engine}` starts nothing:"
            " with `--dry-run` it prints the file that you submit",
            hint=(
                f"runner sweep {shlex.join([*arguments.paths, *arguments.overrides])}"
                f" --engine {engine} --dry-run ... {submit}"
            ),
        )
    for option, value, what in (
        ("image", arguments.image, "a container image with `runner` on its PATH"),
        ("storage", arguments.storage, storage),
    ):
        if value is None:
            raise RunnerError(f"`--engine {engine}` needs `--{option}`: {what}")
    if arguments.gpus is not None:
        raise RunnerError(
            f"`--gpus` names GPUs of this machine; `--engine {engine}` counts them itself"
        )
    if arguments.per_gpu is not None:
        raise RunnerError(
            f"`--per-gpu` is for the local engine; `--engine {engine}` gives each run GPUs of its"
            " own"
        )
    return {
        "output_root": arguments.output_root,
        "image": arguments.image,
        "storage": arguments.storage,
        "num_slots": arguments.slots,
        "fail_fast": arguments.fail_fast,
        "owns_base": arguments.own_base,
        "overrides": tuple(arguments.overrides),
    }


def plan_pending(plan: PlanRuns) -> tuple[PendingRun, ...]:
    """What is planned, in order; stdout stays free for the file."""
    planned = plan({}, sys.stderr)
    if not planned:
        print("nothing to launch", file=sys.stderr)
    return tuple(PendingRun(run.selected, run.num_attempts or 0) for run in planned)


def check_runs(runs: Iterable[PendingRun]) -> None:
    """Raises: RefusedError for a run that could not be started from the project folder on one other
    machine.
    """
    for run in runs:
        path = run.selected.source_path
        if path.is_dir():
            raise RefusedError(
                f"{path} is a run directory;"
                " another machine needs the recipe file that it came from"
            )
        _check_relative(path, "the recipe")
        if run.launch.num_machines > 1:
            raise RefusedError(
                f"{run.selected.full_name} wants {run.launch.num_machines} machines, this engine"
                " gives each run one",
                hint=(
                    "`runner launch` inside a Slurm allocation starts a run"
                    " on several machines; see docs/several_machines.md"
                ),
            )


def check_output_root(output_root: Path) -> None:
    """Raises: RefusedError for a folder of runs that would not be on the project's volume."""
    _check_relative(output_root, "`--output-root`")


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
    import yaml

    lines = [f"# {line}" for line in comment.splitlines()]
    dumper = _build_dumper()
    bodies = [
        yaml.dump(one, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
        for one in documents
    ]
    return "\n".join([*lines, "---\n".join(bodies)])


def _build_dumper() -> type[yaml.SafeDumper]:
    import yaml

    class Dumper(yaml.SafeDumper):
        """No anchors: what occurs twice is written twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

    Dumper.add_representer(str, _represent_text)
    return Dumper


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


def _check_relative(path: Path, what: str) -> None:
    if path.is_absolute() or ".." in path.parts:
        raise RefusedError(
            f"{what}, {path}, is outside the folder that other machines get to see",
            hint="start `runner` in the project folder, and give paths below it",
        )
