"""The Slurm engine: submits pending runs as array jobs, and finds earlier submissions in the queue.

Every task of an array executes `runner launch` for one run, so the run directory decides about the
run, however often it was submitted. The queue only shows which runs need not be submitted again.
Submissions are recorded below the output root before `sbatch` is called. A task is found again by
the path of its script, which Slurm keeps with the job.

The help of `sweep` imports this file for its options, so slow imports are inside functions.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.errors import CorruptFileError, RefusedError, RunnerError
from runner.files import load_json, write_json_atomic, write_text_atomic
from runner.run.lease import Lease
from runner.run.paths import SubmissionPaths, submission_lock_path, submissions_dir
from runner.text import format_count, positive

if TYPE_CHECKING:
    import argparse

    from runner.launch.placement import PlanRuns, Resources
    from runner.plan.decide import Launch
    from runner.plan.select import QueuedRun, Selected
    from runner.recipe.parse import Recipe
    from runner.run.record import SubmissionRecord

ONLY_WRITES_FILES: Final = False

# Options that the script sets itself; another value would lose runs or start them twice.
_OWN_OPTIONS: Final = (
    "array",
    "chdir",
    "nodes",
    "no-requeue",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
    "wait",
    "wrap",
)

_BODY: Final = """\
runs=(
{runs}
)
# USR1: the time limit is near, or a job of higher priority wants the machine. \
The run is asked to checkpoint, and the
# task is queued again. TERM (`scancel`, or the time limit itself) reaches all processes; \
it ends the task for good.
wants_requeue= runner=
trap 'trap : USR1; wants_requeue=yes; [ -z "$runner" ] || kill -USR1 "$runner"' USR1
trap 'wants_requeue=' TERM

run=${{runs[SLURM_ARRAY_TASK_ID]}}
submission={submission_dir}
cd -- {project_dir} || exit
{command} "$submission/recipes/$run.json" {options} &
runner=$!
[ -z "$wants_requeue" ] || kill -USR1 "$runner"
while wait "$runner"; kill -0 "$runner" 2>/dev/null; do :; done  \
# a signal ends the `wait`, not the run
wait "$runner"
code=$?

# {preempted}: the run has checkpointed. Above 128: it had not begun, or was killed; \
below 0: bash missed how it ended.
if [ -n "$wants_requeue" ] && \
{{ [ "$code" = {preempted} ] || [ "$code" -gt 128 ] || [ "$code" -lt 0 ]; }}; then
  for pause in 5 15 30 0; do  \
# many tasks reach their limit together, and the controller may be busy
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && exit 0
    sleep "$pause"
  done
fi
exit "$code"
"""


@dataclass(frozen=True)
class SlurmOptions:
    """The options of the jobs from the command line; they do not change an experiment."""

    output_root: Path
    is_dry_run: bool = False
    num_slots: int | None = None  # tasks of one array at the same time
    time_limit: str | None = None  # in the format of `sbatch --time`
    stop_before_seconds: int = 120  # between the request to checkpoint and the time limit
    extra: tuple[str, ...] = ()  # more options of `sbatch`, each `--name` or `--name=value`
    owns_base: bool = False  # each run scores the base model itself


OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "--time-limit": {
        "metavar": "TIME",
        "help": "slurm: time limit of one run, as in `sbatch --time`; default: the partition's",
    },
    "--stop-before-seconds": {
        "type": positive,
        "default": SlurmOptions.stop_before_seconds,
        "metavar": "N",
        "help": (
            "slurm: ask a run to checkpoint this long before its time limit; default:"
            f" {SlurmOptions.stop_before_seconds}"
        ),
    },
    "--slurm-option": {
        "dest": "slurm_options",
        "action": "append",
        "default": [],
        "metavar": "OPTION",
        "help": (
            "slurm: an option of sbatch, such as --slurm-option=--partition=long; may be repeated"
        ),
    },
}


def parse_options(arguments: argparse.Namespace) -> SlurmOptions:
    """Raises: RunnerError for options that are not for Slurm, or that would lose runs."""
    for name, value in (
        ("--gpus", arguments.gpus),
        ("--per-gpu", arguments.per_gpu),
        ("--fail-fast", arguments.fail_fast or None),
    ):
        if value is not None:
            raise RunnerError(
                f"`{name}` is for the local engine; Slurm itself assigns GPUs and starts runs"
            )
    options = SlurmOptions(
        output_root=arguments.output_root,
        is_dry_run=arguments.dry_run,
        num_slots=arguments.slots,
        time_limit=arguments.time_limit,
        stop_before_seconds=arguments.stop_before_seconds,
        extra=tuple(arguments.slurm_options),
        owns_base=arguments.own_base,
    )
    check_options(options)
    return options


def submit(plan: PlanRuns, options: SlurmOptions) -> int:
    """Submit the planned runs, or print the scripts in a dry run; returns an exit code.

    No other sweep can read the queue and submit for this output root meanwhile. A dry run needs
    neither that lock nor Slurm.
    """
    root = options.output_root
    if options.is_dry_run:
        queued, max_array_size = _load_queue_if_any(root)
        for array in _plan_arrays(plan, queued, options, max_array_size):
            print(array.script)
        return 0
    with hold_submissions(root) as lease:
        queued, max_array_size = load_queue(root), load_max_array_size()
        for array in _plan_arrays(plan, queued, options, max_array_size):
            job = submit_array(array, lease)
            print(
                f"submitted {format_count(len(array.selected), 'run')} as slurm {job}:"
                f" {array.paths.script_path}",
                flush=True,
            )
    return 0


def _load_queue_if_any(output_root: Path) -> tuple[dict[str, QueuedRun], int]:
    try:
        return load_queue(output_root), load_max_array_size()
    except RunnerError as error:
        print(f"runs that Slurm has already queued are unknown: {error.message}", file=sys.stderr)
        return {}, DEFAULT_MAX_ARRAY_SIZE


def _plan_arrays(
    plan: PlanRuns, queued: Mapping[str, QueuedRun], options: SlurmOptions, max_array_size: int
) -> list[ArrayJob]:
    def require(runs: Sequence[Launch]) -> None:
        build_arrays([run.selected for run in runs], options, max_array_size)

    # In a dry run, stdout is the script.
    planned = plan(queued, sys.stderr if options.is_dry_run else sys.stdout, require)
    arrays = build_arrays([run.selected for run in planned], options, max_array_size)
    if not arrays:
        print("nothing to submit", file=sys.stderr)
    return arrays


def divide_into_arrays(
    recipes: Iterable[Recipe], max_array_size: int
) -> list[tuple[Resources, list[Recipe]]]:
    """One array per kind of machine, in order, none larger than the cluster accepts."""
    from runner.launch.placement import derive_resources

    groups: dict[Resources, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(derive_resources(recipe), []).append(recipe)
    return [
        (resources, runs[start : start + max_array_size])
        for resources, runs in groups.items()
        for start in range(0, len(runs), max_array_size)
    ]


def check_options(options: SlurmOptions) -> None:
    """Raises: RefusedError for an option that the script sets or that has a wrong form, and for a
    time limit that leaves no time to run.
    """
    limit_seconds = _count_seconds(options.time_limit or "")
    if limit_seconds is not None and limit_seconds <= options.stop_before_seconds:
        raise RefusedError(
            f"`--time-limit {options.time_limit}` is {limit_seconds} s, but a run is asked to stop"
            f" {options.stop_before_seconds} s before that, so it would never begin",
            hint="use a longer `--time-limit` or a shorter `--stop-before-seconds`",
        )
    for option in options.extra:
        name = option.partition("=")[0].removeprefix("--")
        if not option.startswith("--") or not name or "\n" in option:
            raise RefusedError(
                f"`--slurm-option={option}` is not of the form --name or --name=value",
                hint="--slurm-option=--qos=long",
            )
        # `sbatch` accepts abbreviated option names.
        if any(own.startswith(name) for own in _OWN_OPTIONS):
            raise RefusedError(
                f"`--slurm-option={option}`: `runner` itself sets --{name}",
                hint="see `--slots`, `--time-limit` and `--stop-before-seconds`",
            )


def _count_seconds(time_limit: str) -> int | None:
    """The seconds of an `sbatch --time`, None for a value that only Slurm understands.

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
    options: SlurmOptions,
    *,
    python: str,
    project_dir: Path,
    submission: SubmissionPaths,
) -> str:
    """The script of one array job: task i executes run i.

    Raises:
        RefusedError: a path cannot be written into a script.
    """
    from runner.run.record import EXIT_CODES

    for path in (project_dir, submission.submission_dir, options.output_root):
        if "\n" in str(path):
            raise RefusedError(
                f"{str(path)!r} has a line break, which a batch script cannot contain"
            )
    if set(str(submission.submission_dir)) & set("%\\"):
        raise RefusedError(
            f"{submission.submission_dir} has a `%` or a backslash, which Slurm would expand, so"
            " it would not find its log",
            hint="choose an --output-root whose path has neither",
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
        "--output=%A_%a.txt",  # in the submission's folder, where `sbatch` is called
        *options.extra,
    ]
    words = [f"--output-root={options.output_root}"]
    words += ["--own-base"] if options.owns_base else []
    body = _BODY.format(
        runs="\n".join(f"  {name}" for name in full_names),
        submission_dir=shlex.quote(str(submission.submission_dir)),
        project_dir=shlex.quote(str(project_dir)),
        command=shlex.join([python, "-P", "-m", "runner", "launch"]),
        options=shlex.join(words),
        preempted=EXIT_CODES["preempted"],
    )
    return "\n".join(
        ["#!/bin/bash", *(f"#SBATCH {shlex.quote(one)}" for one in directives), "", body]
    )


DEFAULT_MAX_ARRAY_SIZE: Final = 1001  # the default of Slurm
# Suffixes of SBATCH_* variables that would override the script.
_OVERRIDING: Final = (
    "ARRAY_INX",
    "NO_REQUEUE",
    "OPEN_MODE",
    "REQUEUE",
    "SIGNAL",
    "TEST_ONLY",
    "WAIT",
    "WRAP",
)


@dataclass(frozen=True)
class ArrayJob:
    """One array to submit."""

    selected: tuple[Selected, ...]
    paths: SubmissionPaths
    script: str


@contextmanager
def hold_submissions(output_root: Path) -> Iterator[Lease]:
    """Keep other sweeps from reading the queue and submitting for this output root meanwhile."""
    lease = Lease(submission_lock_path(output_root))
    try:
        if not lease.try_acquire():
            raise RefusedError(
                f"another sweep is submitting runs of {output_root}",
                hint="wait for it, then repeat the command",
            )
        yield lease
    finally:
        lease.close()


def load_queue(output_root: Path) -> dict[str, QueuedRun]:
    """Runs of this output root that Slurm has a task for, by grid and run name.

    Raises:
        RunnerError: Slurm does not answer.
    """
    from runner.plan.select import QueuedRun

    lines = _ask(
        "squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%r|%o"
    ).splitlines()
    queued: dict[str, QueuedRun] = {}
    for line in lines:
        array, index, state, reason, command = line.split("|", 4)
        paths = SubmissionPaths(submissions_dir(output_root) / Path(command).parent.name)
        if not index.isdecimal() or (submission := _load_submission(paths)) is None:
            continue
        full_name = submission.runs[int(index)]
        why = state.lower() if reason in ("", "None") else f"{state.lower()} ({reason})"
        queued[full_name] = QueuedRun(
            task=f"slurm {array}_{index}",
            cancel=f"scancel {array}_{index}",
            state=why,
            recipe_path=paths.recipe_path(full_name),
        )
    return queued


def build_arrays(
    selected: Sequence[Selected], options: SlurmOptions, max_array_size: int
) -> list[ArrayJob]:
    """The arrays to submit; writes nothing.

    Raises:
        RefusedError: a run directory is outside the output root, or a path cannot be written into
            a script.
    """
    from runner.plan.select import run_paths
    from runner.run.record import now_utc

    output_root = options.output_root
    for one in selected:
        if one.paths.run_dir.resolve() != run_paths(one.recipe, output_root).run_dir.resolve():
            raise RefusedError(
                f"{one.paths.run_dir} is not below {output_root}, where its job would write",
                hint="name the folder that has its runs with --output-root",
            )
    by_name = {one.full_name: one for one in selected}
    arrays = []
    for resources, recipes in divide_into_arrays([one.recipe for one in selected], max_array_size):
        names = [recipe.run.full_name for recipe in recipes]
        number = f"{now_utc()[:19].replace(':', '').replace('-', '')}-{secrets.token_hex(4)}"
        paths = SubmissionPaths(submissions_dir(output_root).resolve() / number)
        script = build_script(
            names,
            resources,
            options,
            python=sys.executable,
            project_dir=Path.cwd(),
            submission=paths,
        )
        arrays.append(ArrayJob(tuple(by_name[name] for name in names), paths, script))
    return arrays


def submit_array(array: ArrayJob, lease: Lease) -> str:
    """Submit one array; returns its job number. The caller holds `hold_submissions`.

    A kill at any point loses nothing: the record is written before the job is submitted, and
    `sbatch` has the lease as its stdin, so no sweep reads the queue before it has ended.

    Raises:
        RunnerError: Slurm does not accept it.
    """
    from runner.project_folder import name_project
    from runner.recipe.parse import dump_recipe, load_recipe
    from runner.run.record import SubmissionRecord, now_utc

    for one in array.selected:
        path = array.paths.recipe_path(one.full_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(one.recipe, indent=1))
        if load_recipe(path) != one.recipe:
            raise RefusedError(f"{one.source_path} reads differently after it is written as {path}")
    write_text_atomic(array.paths.script_path, array.script)
    submission = SubmissionRecord(
        submitted_at_utc=now_utc(),
        runs=tuple(one.full_name for one in array.selected),
        project=name_project(Path.cwd(), array.paths.submission_dir),
    )
    write_json_atomic(array.paths.record_path, submission.model_dump(mode="json"))
    answer = _ask(
        "sbatch",
        "--parsable",
        str(array.paths.script_path),
        cwd=array.paths.submission_dir,
        stdin=lease,
    )
    job = answer.strip().partition(";")[0]  # `17`, or `17;cluster`
    submitted = submission.model_copy(update={"job": job})
    write_json_atomic(array.paths.record_path, submitted.model_dump(mode="json"))
    return job


def load_max_array_size() -> int:
    """The maximum number of tasks in one array on this cluster."""
    config = _ask("scontrol", "show", "config")
    sizes = re.findall(r"^MaxArraySize\s*=\s*(\d+)|\bmax_array_tasks=(\d+)", config, re.MULTILINE)
    return max(
        1, min((int(size or tasks) for size, tasks in sizes), default=DEFAULT_MAX_ARRAY_SIZE)
    )


def _load_submission(paths: SubmissionPaths) -> SubmissionRecord | None:
    """The record of a submission; None if the folder is not one of ours. Raises: CorruptFileError
    for an invalid record.
    """
    from pydantic import ValidationError

    from runner.run.record import SubmissionRecord

    content = load_json(paths.record_path)
    try:
        return None if content is None else SubmissionRecord.model_validate(content)
    except ValidationError as error:
        raise CorruptFileError(
            f"{paths.record_path} cannot be read: {error.errors()[0]['msg']}"
        ) from None


def _ask(*command: str, cwd: Path | None = None, stdin: Lease | None = None) -> str:
    """The standard output of a Slurm command.

    Raises:
        RunnerError: it is missing or fails.
    """
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            env=_build_environment(),
            stdin=subprocess.DEVNULL if stdin is None else stdin.fileno(),
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise RunnerError(
            f"there is no {command[0]} on this machine",
            hint="run this where jobs are submitted, or use `--engine local`",
        ) from None
    if result.returncode != 0:
        said = result.stderr.strip() or f"exit status {result.returncode}"
        raise RunnerError(
            f"{command[0]} failed: {said}",
            hint=(
                "repeat the sweep once Slurm answers; runs that it accepted are found in the queue"
            ),
        )
    return result.stdout


def _build_environment() -> dict[str, str]:
    """Our environment without variables that would filter `squeue`, override the script, or
    describe the job in which this process itself may run.
    """
    dropped = {f"SBATCH_{name}" for name in _OVERRIDING}
    is_in_job = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if name not in dropped
        and not name.startswith("SQUEUE_")
        and not (is_in_job and name.startswith("SLURM_") and name != "SLURM_CONF")
    }
