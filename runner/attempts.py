"""What is written of a run, under its lease, before an attempt is started and after it has ended, or refuses it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from runner.cluster import name_cluster_job
from runner.continuation import look_ahead, refuse_to_continue
from runner.errors import RefusedError
from runner.fsio import Lease, write_json_atomic
from runner.identity import derive_digest, list_library_versions
from runner.launch import LaunchCommand
from runner.log_scrubbing import scrub_log
from runner.paths import AttemptPaths, RunPaths, old_run_dir
from runner.ranks import has_ranks
from runner.recipe import Recipe
from runner.record import (
    Attempt,
    Failure,
    RunRecord,
    StopRequest,
    StoredRecipe,
    load_record,
    load_result,
    load_stored_recipe,
    now_utc,
    write_record,
)
from runner.secrets import scrub_json
from runner.status import find_differences


def prepare_run(recipe: Recipe, contents: Mapping[str, str], paths: RunPaths) -> None:
    """Write `recipe.json` of a run that is not complete; refuse a directory that holds another experiment.

    The caller holds the lease. `contents` is whole.
    """
    digest = derive_digest(recipe, contents)
    differences = find_differences(paths, recipe, contents)
    if not differences and (stored := load_stored_recipe(paths)) is not None and stored.recipe_digest != digest:
        gone = [path for path in stored.contents if path not in contents]
        differences = [f"content of {path}: not there any more" for path in gone] or ["recipe_digest: another one"]
    if differences:
        shown = "\n".join(f"  {line}" for line in differences)
        raise RefusedError(
            f"{paths.run_dir} holds another experiment, the recipe changed since:\n{shown}",
            hint="change the recipe back, give the new one another name, or move the old run aside with "
            "`runner launch RECIPE --fresh`",
        )
    if load_result(paths) is None:
        content = StoredRecipe(recipe=recipe, recipe_digest=digest, contents=dict(contents))
        write_json_atomic(paths.recipe_path, content.model_dump(mode="json"))


def refuse_uncontinuable(
    recipe: Recipe,
    contents: Mapping[str, str],
    paths: RunPaths,
    command: LaunchCommand,
    num_processes: int,
    resume: str,
    divisor: int,
) -> None:
    """Refuse what the trainer would refuse once it has started: to continue a checkpoint of another launch.

    The caller holds the lease, and has written nothing yet: `recipe.json` still says how the run was launched before.

    Raises:
        RefusedError: with what differs, and the ways out.
    """
    stored, digest = load_stored_recipe(paths), derive_digest(recipe, contents)
    if stored is None or stored.recipe_digest != digest:  # a new run, or another experiment, which is refused as such
        return
    threads = command.environment.get("OMP_NUM_THREADS")
    found = look_ahead(paths, recipe, digest, num_processes, divisor=divisor, threads=threads, resume=resume)
    refuse_to_continue(found, recipe)


def open_attempt(
    paths: RunPaths,
    command: LaunchCommand,
    num_processes: int,
    git_state: tuple[str | None, bool | None],
    resume: str = "auto",
    retry: int = 0,
    micro_batch_divisor: int = 1,
) -> Attempt:
    """Append an attempt to `run.json` and make its folder, before anything is started. The caller holds the lease.

    A request to stop an earlier attempt goes first, and what a kill left half written.
    """
    paths.stop_path.unlink(missing_ok=True)
    for leftover in paths.list_temporaries():
        leftover.unlink(missing_ok=True)
    record = load_record(paths)
    for earlier in record.attempts:
        if earlier.ended_at_utc is None:  # its launcher was killed before it could do this
            with contextlib.suppress(OSError):
                scrub_log(paths.attempt(earlier.number).log_path)
    attempt = Attempt(
        number=record.attempts[-1].number + 1 if record.attempts else 1,
        started_at_utc=now_utc(),
        command=command.argv,
        environment=scrub_json(dict(command.environment)),
        num_processes=num_processes,
        host=socket.gethostname(),
        cluster_job=name_cluster_job(os.environ),
        resume=resume,
        retry=retry,
        micro_batch_divisor=micro_batch_divisor,
        devices={**os.environ, **command.environment}.get("CUDA_VISIBLE_DEVICES"),
        git_commit=git_state[0],
        git_is_dirty=git_state[1],
        versions=list_library_versions(),
    )
    paths.attempt(attempt.number).attempt_dir.mkdir(parents=True, exist_ok=True)
    write_record(paths, RunRecord(attempts=(*record.attempts, attempt)))
    return attempt


def take_lease(paths: RunPaths) -> Lease | None:
    """The lease of a run, or None when somebody else holds it.

    Raises:
        RefusedError: a part of the run directory is a link: what is written there would be written elsewhere.
    """
    for path in (paths.run_dir, *_list_parts(paths)):
        if path.is_symlink():
            raise RefusedError(
                f"{path} is a link to {os.readlink(path)}: a run is one directory, for itself",
                hint="move what it leads to here, or choose another place with --output-root",
            )
    lease = Lease(paths.lease_path)
    if lease.try_acquire() and not has_ranks(paths):
        return lease
    lease.close()
    return None


def _list_parts(paths: RunPaths) -> list[Path]:
    return [path for folder in (paths.run_dir, paths.attempts_dir, paths.checkpoints_dir) for path in folder.glob("*")]


def request_stop(paths: RunPaths, attempt: int, why: str) -> None:
    """Ask an attempt to checkpoint at the end of its step and to leave; it need not be ours."""
    write_json_atomic(paths.stop_path, StopRequest(attempt=attempt, why=why).model_dump())


def close_attempt(paths: RunPaths, exit_status: int, failure: Failure | None) -> None:
    """Write the end of the last attempt."""
    *earlier, last = load_record(paths).attempts
    closed = last.model_copy(update={"ended_at_utc": now_utc(), "exit_status": exit_status, "failure": failure})
    write_record(paths, RunRecord(attempts=(*earlier, closed)))


def move_aside(paths: RunPaths) -> Path | None:
    """`--fresh`: rename the run directory to a free name in a hidden folder beside it; nothing is deleted.

    The caller holds the lease.
    """
    if not paths.run_dir.exists() or set(paths.run_dir.iterdir()) <= {paths.lease_path}:
        return None  # never begun, or another process has just moved it aside
    number = 1
    while (target := old_run_dir(paths.run_dir, number)).exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    paths.run_dir.rename(target)
    return target


def read_git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the work tree differs from it; None outside a git checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None, None
    if commit.returncode != 0:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


def name_owner(paths: RunPaths) -> str:
    """The run in `OWNER_VARIABLE`: its lease, because a container may have another run under the same path."""
    lease = paths.lease_path.stat()
    return f"{lease.st_dev}.{lease.st_ino}@{paths.run_dir.resolve()}"


class FailedElsewhere(Exception):
    """Another process has tried the run since this one decided to: what came of it is its to retry or to leave."""

    def __init__(self, failure: Failure, files: AttemptPaths) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.files = files


def refuse_what_failed_since(paths: RunPaths, num_attempts: int | None) -> None:
    """Refuse to repeat a failure that nobody has seen yet; what was killed or stopped meanwhile is free to go on.

    The caller holds the lease.

    Raises:
        FailedElsewhere: with how the last attempt failed.
    """
    attempts = load_record(paths).attempts
    if num_attempts is None or len(attempts) <= num_attempts:
        return
    failure = attempts[-1].failure
    if failure is not None and failure.kind != "preempted":
        raise FailedElsewhere(failure, paths.attempt(attempts[-1].number))
