"""Shared by the engines that write a job file instead of submitting it: the pending runs, and the
options that only the user knows.

The other machines see the project folder as it is here: recipes, launch configs and data under the
same relative paths.

Not an engine itself. The help of `sweep` imports this file, so slow imports are inside functions.
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
    from runner.recipe.launch_section import LaunchSection

# From TERM to KILL: enough for the current step and a checkpoint.
GRACE_SECONDS: Final = 300


@dataclass(frozen=True)
class PendingRun:
    """One run to launch elsewhere."""

    selected: Selected
    num_attempts: int  # so far

    @property
    def launch(self) -> LaunchSection:
        """The settings for starting its processes."""
        return self.selected.recipe.launch


@dataclass(frozen=True)
class ManifestOptions:
    """The user's options, in addition to the runs."""

    output_root: Path
    image: str  # container image with `runner` on its PATH
    # kubernetes: the claim of the project's volume; skypilot: the bucket that keeps the runs
    storage: str
    num_slots: int | None = None  # runs at the same time; None leaves it to the engine
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
    """The fields of `ManifestOptions`. `submit` is the shell command that submits the file,
    `storage` the meaning of `--storage`.

    Raises:
        RunnerError: the options do not allow a file.
    """
    engine = arguments.engine
    if not arguments.dry_run:
        raise RunnerError(
            f"`--engine {engine}` starts nothing;"
            " with `--dry-run` it prints a file for you to submit",
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
            f"`--gpus` names GPUs of this machine; `--engine {engine}` requests GPUs by count"
        )
    if arguments.per_gpu is not None:
        raise RunnerError(
            f"`--per-gpu` is for the local engine; with `--engine {engine}` each run gets its own"
            " GPUs"
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
    """The planned runs, in order. Decisions go to stderr, because stdout is for the file."""
    planned = plan({}, sys.stderr)
    if not planned:
        print("nothing to launch", file=sys.stderr)
    return tuple(PendingRun(run.selected, run.num_attempts or 0) for run in planned)


def check_runs(runs: Iterable[PendingRun]) -> None:
    """Raises: RefusedError for a run that cannot be started from the project folder on another
    machine, or needs several machines.
    """
    for run in runs:
        path = run.selected.source_path
        if path.is_dir():
            raise RefusedError(f"{path} is a run directory; another machine needs its recipe file")
        _check_relative(path, "the recipe")
        if run.launch.num_machines > 1:
            raise RefusedError(
                f"{run.selected.full_name} needs {run.launch.num_machines} machines, but this"
                " engine gives each run only one",
                hint=(
                    "`runner launch` inside a Slurm allocation starts a run"
                    " on several machines; see docs/several_machines.md"
                ),
            )


def check_output_root(output_root: Path) -> None:
    """Raises: RefusedError for a folder of runs that is not on the project's volume."""
    _check_relative(output_root, "`--output-root`")


def list_recipe_words(runs: Iterable[PendingRun]) -> list[str]:
    """The recipe files as words of a command line; none can be mistaken for an option."""
    paths = [str(run.selected.source_path) for run in runs]
    return [f"./{path}" if path.startswith("-") else path for path in paths]


def build_label(text: str, max_length: int) -> str:
    """A name of lower-case letters, digits and inner hyphens, as in DNS.

    >>> build_label("Summaries_v2.1-", 40)
    'summaries-v2-1'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:max_length].strip("-") or "runs"


def dump_documents(documents: Sequence[dict[str, Any]], comment: str) -> str:
    """YAML that keeps the order of the keys; texts of several lines stay readable."""
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
        """Writes no anchors: a repeated value is written again."""

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
            f"{what}, {path}, is outside the project folder, which is all that other machines see",
            hint="start `runner` in the project folder, and use paths below it",
        )
