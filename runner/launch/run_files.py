"""Writes the files of a run under its lease on the launch side: its recipe, the record of its
attempts, and a stop request. Also moves its directory aside.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.checkpoints.choose import find_commits, look_ahead, read_inventory
from runner.errors import RefusedError
from runner.files import make_folder, remove_file, write_json_atomic
from runner.launch.command import LaunchCommand
from runner.launch.names import NamesOnHub
from runner.launch.placement import name_cluster_job
from runner.launch.provenance import read_provenance
from runner.launch.worker import Worker
from runner.plan.decide import Launch
from runner.plan.status import describe_change, find_differences, suggest_fixes
from runner.project_folder import name_project
from runner.recipe.identity import (
    RULES,
    derive_digest,
)
from runner.recipe.parse import Recipe
from runner.run.facts import RunFacts
from runner.run.lease import Lease, has_ranks
from runner.run.paths import RunPaths, old_run_dir
from runner.run.record import (
    Attempt,
    Failure,
    RunRecord,
    StopRequest,
    StoredRecipe,
    now_utc,
    write_record,
)
from runner.secrets import scrub_json, scrub_log


def prepare_run(
    recipe: Recipe,
    contents: Mapping[str, str],
    facts: RunFacts,
    names: NamesOnHub | None = None,
    resume: str = "auto",
) -> None:
    """Write `recipe.json` of a run that is not complete; refuse a directory that holds another
    experiment. `names` finds the commits of names on the hub; None: the hub is not queried.
    `resume` is `Attempt.resume`.

    The caller holds the lease, under which the facts were read. `contents` has all inputs.
    """
    paths = facts.paths
    has_checkpoints = bool(read_inventory(paths).kept)
    differences = find_differences(
        facts, recipe, contents, has_checkpoints=has_checkpoints, is_whole=True
    )
    if differences:
        shown = "\n".join(f"  {line}" for line in differences)
        raise RefusedError(
            f"{paths.run_dir} holds another experiment; {describe_change(differences)}:\n{shown}",
            hint=(
                "change the recipe back, rename the new one, or move the old run aside"
                " with `runner launch RECIPE --fresh`"
            ),
        )
    if facts.is_result_lost:
        raise RefusedError(
            f"{paths.run_dir} is damaged: an attempt completed it, but {paths.result_path.name} is"
            " missing",
            hint=suggest_fixes({paths.result_path.name: "is missing"}),
        )
    if facts.result is None:
        stored = facts.stored
        if stored is not None:
            recipe = stored.state_as_before(recipe)
        digest = derive_digest(recipe, contents)
        known = {} if stored is None else dict(stored.commits)
        if names is not None:
            known = names.settle(recipe, facts, find_commits(paths, resume, digest))
        content = StoredRecipe(
            recipe=_keep_first(recipe, facts),
            recipe_digest=digest,
            contents=dict(contents),
            rules=RULES,
            commits=known,
            project=name_project(Path.cwd(), paths.run_dir),
        )
        write_json_atomic(paths.recipe_path, content.model_dump(mode="json"))


def _keep_first(recipe: Recipe, facts: RunFacts) -> Recipe:
    """The recipe with the declared contrasts and the push destination as they were when the first
    attempt was opened. A contrast that is stated after something has run is not declared.
    """
    if not facts.attempts:
        return recipe
    first = facts.stored.recipe if facts.stored is not None else None
    declared = first.run.declared if first is not None else ()
    update: dict[str, Any] = {"run": recipe.run.model_copy(update={"declared": declared})}
    if first is not None:
        update["tracking"] = first.tracking.copy_push(recipe.tracking)
    return recipe.model_copy(update=update)


def refuse_unresumable(
    launch: Launch, command: LaunchCommand, facts: RunFacts, divisor: int
) -> None:
    """Refuse to resume a checkpoint of another launch, before the training process does so.

    The caller holds the lease, under which the facts were read, and has written nothing yet, so
    `recipe.json` still has the previous launch settings.

    Raises:
        RefusedError: the launch differs; lists the differences and the alternatives.
    """
    stored = facts.stored
    if stored is None:  # a new run
        return
    recipe = stored.state_as_before(launch.recipe)
    digest = derive_digest(recipe, launch.contents)
    if stored.current_digest != digest:  # another experiment, which `prepare_run` refuses
        return
    threads = command.environment.get("OMP_NUM_THREADS")
    choice = look_ahead(
        read_inventory(facts.paths),
        recipe,
        digest,
        launch.num_processes,
        divisor=divisor,
        threads=threads,
        resume=launch.resume,
    )
    if choice.refusal is not None:
        raise choice.refusal


def open_attempt(
    launch: Launch,
    command: LaunchCommand,
    facts: RunFacts,
    divisor: int,
    git_state: tuple[str | None, bool | None],
    worker: Worker | None = None,
) -> Attempt:
    """Append an attempt to `run.json` and create its folder, before anything is started. The caller
    holds the lease, under which the facts were read.

    First removes the stop request of an earlier attempt and files that a kill left half written.
    """
    paths, attempts = facts.paths, facts.attempts
    remove_file(paths.stop_path)
    for leftover in paths.list_temporaries():
        leftover.unlink(missing_ok=True)
    for earlier in attempts:
        if earlier.ended_at_utc is None:  # its launcher was killed before it could do this
            with contextlib.suppress(OSError):
                scrub_log(paths.attempt(earlier.number).log_path)
    made_by = read_provenance()
    # A worker ends if versions or source change, so the rest is also valid for it.
    own_versions = {} if worker is None else worker.versions
    attempt = Attempt(
        number=attempts[-1].number + 1 if attempts else 1,
        started="cold" if worker is None else "warm",
        started_at_utc=now_utc(),
        command=command.argv,
        environment=scrub_json(dict(command.environment)),
        num_processes=launch.num_processes,
        host=socket.gethostname(),
        cluster_job=name_cluster_job(os.environ),
        resume=launch.resume,
        base=launch.base,
        is_repair=launch.is_repair,
        retry=launch.retry,
        micro_batch_divisor=divisor,
        devices={**os.environ, **command.environment}.get("CUDA_VISIBLE_DEVICES"),
        runs_per_gpu=command.runs_per_gpu,
        git_commit=git_state[0],
        git_is_dirty=git_state[1],
        runner_version=made_by.runner_version,
        runner_commit=made_by.runner_commit,
        runner_is_dirty=made_by.runner_is_dirty,
        source_hash=made_by.source_hash,
        versions={**made_by.versions, **own_versions},
        hardware=made_by.hardware,
    )
    make_folder(paths.attempt(attempt.number).attempt_dir)
    write_record(paths, RunRecord(attempts=(*attempts, attempt)))
    return attempt


def take_lease(paths: RunPaths) -> Lease | None:
    """The lease of a run, or None if another process holds it.

    Raises:
        RefusedError: a part of the run directory is a link, so files would be written elsewhere.
    """
    for path in (paths.run_dir, *_list_parts(paths)):
        if path.is_symlink():
            raise RefusedError(
                f"{path} is a link to {os.readlink(path)}; runs must not be or contain links",
                hint="move the target of the link here, or choose another place with --output-root",
            )
    lease = Lease(paths.lease_path)
    if lease.try_acquire() and not has_ranks(paths):
        return lease
    lease.close()
    return None


def _list_parts(paths: RunPaths) -> list[Path]:
    return [
        path
        for folder in (paths.run_dir, paths.attempts_dir, paths.checkpoints_dir)
        for path in folder.glob("*")
    ]


def request_stop(paths: RunPaths, attempt: int, why: str, *, is_of_its_sweep: bool = False) -> None:
    """Ask an attempt to checkpoint at the end of its step and exit; it need not be ours."""
    request = StopRequest(attempt=attempt, why=why, is_of_its_sweep=is_of_its_sweep)
    write_json_atomic(paths.stop_path, request.model_dump())


def close_attempt(facts: RunFacts, exit_status: int | None, failure: Failure | None) -> None:
    """Write the end of the last attempt. The caller holds the lease, under which the facts were
    read.
    """
    *earlier, last = facts.attempts
    closed = last.model_copy(
        update={"ended_at_utc": now_utc(), "exit_status": exit_status, "failure": failure}
    )
    write_record(facts.paths, RunRecord(attempts=(*earlier, closed)))


def move_aside(paths: RunPaths, target: Path | None = None) -> Path | None:
    """`--fresh`: rename the run directory to `target`, else to a free name in a hidden folder
    next to it; nothing is deleted. Returns the new path, None if there is nothing to move.

    The caller holds the lease.
    """
    if not paths.run_dir.exists() or set(paths.run_dir.iterdir()) <= {paths.lease_path}:
        return None  # never started, or another process has just moved it aside
    number = 1
    while target is None or target.exists():
        target = old_run_dir(paths.run_dir, number)
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    paths.run_dir.rename(target)
    return target
