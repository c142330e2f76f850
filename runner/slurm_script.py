"""Pure: runs that want equal machines become the batch script of one array job. Nothing here talks to Slurm."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from runner.errors import RefusedError, RunnerError
from runner.paths import SubmissionPaths
from runner.recipe import Recipe
from runner.record import EXIT_CODES

# What the script itself decides; another value would lose runs or start them twice.
_OWN_OPTIONS: Final = (
    *("array", "chdir", "nodes", "no-requeue", "ntasks-per-node", "open-mode", "output", "parsable", "requeue"),
    *("signal", "test-only", "wait", "wrap"),
)

_BODY: Final = """\
runs=(
{runs}
)
# USR1: the time limit is near, or a job of higher priority wants the machine. The run is asked to checkpoint, and the
# task is queued again. TERM (`scancel`, or the time limit itself) reaches all processes; it ends the task for good.
wants_requeue= runner=
trap 'trap : USR1; wants_requeue=yes; [ -z "$runner" ] || kill -USR1 "$runner"' USR1
trap 'wants_requeue=' TERM

run=${{runs[SLURM_ARRAY_TASK_ID]}}
submission={submission_dir}
cd -- {project_dir} || exit
{command} "$submission/recipes/$run.json" {options} &
runner=$!
[ -z "$wants_requeue" ] || kill -USR1 "$runner"
while wait "$runner"; kill -0 "$runner" 2>/dev/null; do :; done  # a signal ends the `wait`, not the run
wait "$runner"
code=$?

# {preempted}: the run has checkpointed. Above 128: it had not begun, or was killed; below 0: bash missed how it ended.
if [ -n "$wants_requeue" ] && {{ [ "$code" = {preempted} ] || [ "$code" -gt 128 ] || [ "$code" -lt 0 ]; }}; then
  for pause in 5 15 30 0; do  # many tasks reach their limit together, and the controller may be busy
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && exit 0
    sleep "$pause"
  done
fi
exit "$code"
"""


@dataclass(frozen=True)
class Resources:
    """What one run needs of each of its machines."""

    num_machines: int
    num_gpus: int
    num_cores: int | None  # None leaves it to the cluster


@dataclass(frozen=True)
class ClusterOptions:
    """What the command line says about the jobs; nothing of it changes an experiment."""

    num_slots: int | None = None  # tasks of one array at a time
    time_limit: str | None = None  # as `sbatch --time` takes it
    stop_before_seconds: int = 120  # between the request to checkpoint and the time limit
    extra: tuple[str, ...] = ()  # further options of `sbatch`, each `--name` or `--name=value`


def derive_resources(recipe: Recipe) -> Resources:
    """One GPU per process, none where the launch config asks for the CPU; cores where the recipe states threads."""
    launch = recipe.launch
    try:
        config = yaml.safe_load(Path(launch.accelerate_config).read_text())
    except FileNotFoundError:
        raise RunnerError(f"{recipe.run.grid}/{recipe.run.name}: there is no {launch.accelerate_config}") from None
    num_processes = launch.num_processes // launch.num_machines
    uses_cpu = isinstance(config, dict) and config.get("use_cpu") is True
    threads = launch.num_cpu_threads_per_process
    num_cores = threads * num_processes if threads is not None else None
    return Resources(launch.num_machines, 0 if uses_cpu else num_processes, num_cores)


def group_runs(recipes: Iterable[Recipe], max_array_size: int) -> list[tuple[Resources, list[Recipe]]]:
    """One array per kind of machine, in order, none larger than the cluster takes."""
    groups: dict[Resources, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(derive_resources(recipe), []).append(recipe)
    return [
        (resources, runs[start : start + max_array_size])
        for resources, runs in groups.items()
        for start in range(0, len(runs), max_array_size)
    ]


def check_options(options: ClusterOptions) -> None:
    """Raises: RefusedError for an option that the script decides or that is none, and for a limit without any time."""
    limit_seconds = _count_seconds(options.time_limit or "")
    if limit_seconds is not None and limit_seconds <= options.stop_before_seconds:
        raise RefusedError(
            f"`--time-limit {options.time_limit}` is {limit_seconds} s, and a run is asked to leave "
            f"{options.stop_before_seconds} s before that: it would never begin",
            hint="a longer `--time-limit`, or a shorter `--stop-before-seconds`",
        )
    for option in options.extra:
        name = option.partition("=")[0].removeprefix("--")
        if not option.startswith("--") or not name or "\n" in option:
            raise RefusedError(
                f"`--slurm-option={option}` is not of the form --name or --name=value", hint="--slurm-option=--qos=long"
            )
        if any(own.startswith(name) for own in _OWN_OPTIONS):  # sbatch takes the beginning of a name for the name
            raise RefusedError(
                f"`--slurm-option={option}`: --{name} is what `runner` itself decides",
                hint="see `--slots`, `--time-limit` and `--stop-before-seconds`",
            )


def _count_seconds(time_limit: str) -> int | None:
    """Seconds of an `sbatch --time`, None for what only Slurm understands.

    >>> [_count_seconds(text) for text in ("2", "2:30", "1:00:00", "1-0", "1-2:30", "UNLIMITED")]
    [120, 150, 3600, 86400, 95400, None]
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if found is None:
        return None
    days, *parts = found.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None or parts[2] is not None:
        return ((int(days or 0) * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def build_script(
    full_names: Sequence[str],
    resources: Resources,
    options: ClusterOptions,
    *,
    python: str,
    project_dir: Path,
    submission: SubmissionPaths,
    output_root: Path,
) -> str:
    """The script of one array job: task i executes run i.

    Raises:
        RefusedError: a path that no script can hold.
    """
    for path in (project_dir, submission.submission_dir, output_root):
        if "\n" in str(path):
            raise RefusedError(f"{str(path)!r} has a line break in it, which no batch script can hold")
    if set(str(submission.submission_dir)) & set("%\\"):
        raise RefusedError(
            f"{submission.submission_dir} holds a `%` or a backslash: Slurm would expand it, and not find its log",
            hint="--output-root, on a path without them",
        )
    grids = dict.fromkeys(name.partition("/")[0] for name in full_names)
    at_a_time = "" if options.num_slots is None else f"%{options.num_slots}"
    directives = [
        f"--job-name={','.join(grids)}",
        f"--array=0-{len(full_names) - 1}{at_a_time}",
        f"--nodes={resources.num_machines}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={resources.num_cores}"] if resources.num_cores is not None else []),
        *([f"--gres=gpu:{resources.num_gpus}"] if resources.num_gpus else []),
        *([f"--time={options.time_limit}"] if options.time_limit is not None else []),
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{options.stop_before_seconds}",
        "--output=%A_%a.txt",  # in the folder of the submission, where it is submitted
        *options.extra,
    ]
    body = _BODY.format(
        runs="\n".join(f"  {name}" for name in full_names),
        submission_dir=shlex.quote(str(submission.submission_dir)),
        project_dir=shlex.quote(str(project_dir)),
        command=shlex.join([python, "-P", "-m", "runner", "launch"]),
        options=shlex.quote(f"--output-root={output_root}"),
        preempted=EXIT_CODES["preempted"],
    )
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {shlex.quote(one)}" for one in directives), "", body])
