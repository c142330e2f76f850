"""The Slurm engine: array jobs over the pending runs, and what the queue says about runs that were submitted before.

Every task of an array executes `runner launch` of one run, so a run is what its directory says, however often it was
submitted: the queue only tells which runs need not be submitted again. What was submitted stands below the output root,
written before `sbatch` is called; a task is found again by the path of its script, which Slurm keeps with the job.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from runner.errors import CorruptFileError, RefusedError, RunnerError
from runner.fsio import Lease, load_json, write_json_atomic, write_text_atomic
from runner.identity import build_digest_payload, diff_payloads
from runner.paths import SubmissionPaths, submission_lock_path, submissions_dir
from runner.recipe import load_recipe
from runner.record import Fact, now_utc
from runner.selection import Selected, run_paths
from runner.slurm_script import ClusterOptions, build_script, group_runs

DEFAULT_MAX_ARRAY_SIZE: Final = 1001  # Slurm's own
# Variables of the shell that would win over the script.
_OVERRIDING: Final = ("ARRAY_INX", "NO_REQUEUE", "OPEN_MODE", "REQUEUE", "SIGNAL", "TEST_ONLY", "WAIT", "WRAP")


class Submission(Fact):
    """`submission.json`: which run is which task of an array. Without a job, the submission may have been killed."""

    submitted_at_utc: str
    runs: tuple[str, ...]  # grid and run name, by array index
    job: str | None = None


@dataclass(frozen=True)
class QueuedRun:
    """A run that Slurm has a task for."""

    task: str  # such as `17_3`
    state: str  # as squeue says it, with its reason where there is one
    recipe_path: Path  # as it was submitted

    def find_differences(self, selected: Selected) -> list[str]:
        """What makes the recipe another experiment than the one that was submitted."""
        submitted = load_recipe(self.recipe_path)
        return diff_payloads(build_digest_payload(submitted), build_digest_payload(selected.recipe))


@dataclass(frozen=True)
class ArrayJob:
    """One array to submit."""

    selected: tuple[Selected, ...]
    paths: SubmissionPaths
    script: str


@contextmanager
def hold_submissions(output_root: Path) -> Iterator[Lease]:
    """Nobody else looks at the queue and submits for this output root meanwhile."""
    lease = Lease(submission_lock_path(output_root))
    try:
        if not lease.try_acquire():
            raise RefusedError(f"another sweep is submitting runs of {output_root}", hint="wait for it, then repeat")
        yield lease
    finally:
        lease.close()


def load_queue(output_root: Path) -> dict[str, QueuedRun]:
    """Runs of this output root that Slurm has a task for, by grid and run name.

    Raises:
        RunnerError: Slurm does not answer.
    """
    lines = _ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F|%K|%T|%r|%o").splitlines()
    queued: dict[str, QueuedRun] = {}
    for line in lines:
        array, index, state, reason, command = line.split("|", 4)
        paths = SubmissionPaths(submissions_dir(output_root) / Path(command).parent.name)
        if not index.isdecimal() or (submission := _load_submission(paths)) is None:
            continue
        full_name = submission.runs[int(index)]
        why = state.lower() if reason in ("", "None") else f"{state.lower()} ({reason})"
        queued[full_name] = QueuedRun(f"{array}_{index}", why, paths.recipe_path(full_name))
    return queued


def build_arrays(
    selected: Sequence[Selected], options: ClusterOptions, output_root: Path, max_array_size: int
) -> list[ArrayJob]:
    """What is to be submitted; touches nothing.

    Raises:
        RefusedError: a run directory elsewhere, or a path that no script can hold.
    """
    for one in selected:
        if one.paths.run_dir.resolve() != run_paths(one.recipe, output_root).run_dir.resolve():
            raise RefusedError(
                f"{one.paths.run_dir} is not below {output_root}, where its job would write",
                hint="name the folder of its runs with --output-root",
            )
    by_name = {one.full_name: one for one in selected}
    arrays = []
    for resources, recipes in group_runs([one.recipe for one in selected], max_array_size):
        names = [f"{recipe.run.grid}/{recipe.run.name}" for recipe in recipes]
        number = f"{now_utc()[:19].replace(':', '').replace('-', '')}-{secrets.token_hex(4)}"
        paths = SubmissionPaths(submissions_dir(output_root).resolve() / number)
        script = build_script(
            names,
            resources,
            options,
            python=sys.executable,
            project_dir=Path.cwd(),
            submission=paths,
            output_root=output_root,
        )
        arrays.append(ArrayJob(tuple(by_name[name] for name in names), paths, script))
    return arrays


def submit(array: ArrayJob, lease: Lease) -> str:
    """Submit one array; returns its job number. The caller holds `hold_submissions`.

    A kill between any two instructions loses nothing: the record is there before the job, and `sbatch` has the lease as
    its stdin, so that nobody asks the queue before it has ended.

    Raises:
        RunnerError: Slurm does not take it.
    """
    for one in array.selected:
        path = array.paths.recipe_path(one.full_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.recipe.model_dump_json(indent=1))
        if load_recipe(path) != one.recipe:
            raise RefusedError(f"{one.source_path} does not read the same once it is written as {path}")
    write_text_atomic(array.paths.script_path, array.script)
    submission = Submission(submitted_at_utc=now_utc(), runs=tuple(one.full_name for one in array.selected))
    write_json_atomic(array.paths.record_path, submission.model_dump(mode="json"))
    answer = _ask("sbatch", "--parsable", str(array.paths.script_path), cwd=array.paths.submission_dir, stdin=lease)
    job = answer.strip().partition(";")[0]  # `17`, or `17;cluster`
    submitted = submission.model_copy(update={"job": job})
    write_json_atomic(array.paths.record_path, submitted.model_dump(mode="json"))
    return job


def load_max_array_size() -> int:
    """The most tasks that one array may have on this cluster."""
    config = _ask("scontrol", "show", "config")
    sizes = re.findall(r"^MaxArraySize\s*=\s*(\d+)|\bmax_array_tasks=(\d+)", config, re.MULTILINE)
    return max(1, min((int(size or tasks) for size, tasks in sizes), default=DEFAULT_MAX_ARRAY_SIZE))


def _load_submission(paths: SubmissionPaths) -> Submission | None:
    """None where the folder is none of ours. Raises: CorruptFileError for a record of another shape."""
    content = load_json(paths.record_path)
    try:
        return None if content is None else Submission.model_validate(content)
    except ValidationError as error:
        raise CorruptFileError(f"{paths.record_path} cannot be read: {error.errors()[0]['msg']}") from None


def _ask(*command: str, cwd: Path | None = None, stdin: Lease | None = None) -> str:
    """The standard output of one of Slurm's programs.

    Raises:
        RunnerError: it is not there, or it fails.
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
            f"there is no {command[0]} on this machine", hint="run this where jobs are submitted, or `--engine local`"
        ) from None
    if result.returncode != 0:
        said = result.stderr.strip() or f"exit status {result.returncode}"
        raise RunnerError(
            f"{command[0]} failed: {said}",
            hint="repeat the sweep once Slurm answers: what it took nevertheless is found in the queue",
        )
    return result.stdout


def _build_environment() -> dict[str, str]:
    """Ours, without what would filter `squeue`, override the script, or describe a job that we may be in ourselves."""
    dropped = {f"SBATCH_{name}" for name in _OVERRIDING}
    is_in_job = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if name not in dropped
        and not name.startswith("SQUEUE_")
        and not (is_in_job and name.startswith("SLURM_") and name != "SLURM_CONF")
    }
