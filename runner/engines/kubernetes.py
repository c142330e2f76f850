"""The Kubernetes engine: pending runs become Indexed Jobs (`batch/v1`), one index per run. It never
contacts a cluster.

Fields and limits follow the checks of the API server, version 1.29 or newer
(`backoffLimitPerIndex`, `FailIndex`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from runner.engines.manifests import (
    GRACE_SECONDS,
    SHARED_OPTIONS,
    ManifestOptions,
    PendingRun,
    build_label,
    check_output_root,
    check_runs,
    dump_documents,
    list_recipe_words,
    plan_pending,
    read_shared_options,
)
from runner.files import hash_json
from runner.text import format_count

if TYPE_CHECKING:
    import argparse

    from runner.launch.placement import PlanRuns, Resources
    from runner.run.record import FailureKind

ONLY_WRITES_FILES: Final = True
OPTIONS: Final = SHARED_OPTIONS

_PROJECT_DIR: Final = "/project"
_CONTAINER: Final = "runner"
_LABELS: Final = {"app.kubernetes.io/name": "recipe-runner"}
_WRONG_USAGE: Final = 2

# `runner launch` retries before it gives up. The Job then starts another pod, perhaps on another
# node, for failures that may be temporary (counted, `backoffLimitPerIndex`) and for preemption (not
# counted).
Action = Literal["FailIndex", "Ignore", "Count"]
_ACTIONS: Final[Mapping[FailureKind, Action]] = {
    "configuration": "FailIndex",
    "data": "FailIndex",
    "out_of_memory": "FailIndex",
    "diverged": "FailIndex",
    "preempted": "Ignore",
    "transient": "Count",
    "lost": "Count",
    "stalled": "Count",
    "crashed": "FailIndex",
}


def parse_options(arguments: argparse.Namespace) -> ManifestOptions:
    """Raises: RunnerError for options that do not allow a file."""
    shared = read_shared_options(
        arguments,
        submit="| kubectl apply -f -",
        storage="the claim of the volume that holds the project folder, such as my-project",
    )
    return ManifestOptions(**shared)


def submit(plan: PlanRuns, options: ManifestOptions) -> int:
    """Print the file for the cluster on stdout; returns an exit code."""
    runs = plan_pending(plan)
    if runs:
        print(build_jobs_file(runs, options), end="")
    return 0


def build_jobs_file(runs: Sequence[PendingRun], options: ManifestOptions) -> str:
    """One Job for all runs that need equal machines, as YAML for `kubectl apply -f -`.

    Raises:
        RefusedError: a run, or the folder of runs, is not on the project's volume.
    """
    from runner.launch.placement import derive_resources

    check_runs(runs)
    check_output_root(options.output_root)
    groups: dict[Resources, list[PendingRun]] = {}
    for run in runs:
        groups.setdefault(derive_resources(run.selected.recipe), []).append(run)
    grid = runs[0].selected.recipe.run.grid
    jobs = [_build_job(grid, group, machine, options) for machine, group in groups.items()]
    comment = (
        f"{format_count(len(runs), 'run')}. The claim {options.storage} is the project folder: it"
        f" holds recipes, data, models and {options.output_root}/."
    )
    return dump_documents(jobs, comment)


def _build_job(
    grid: str, runs: list[PendingRun], machine: Resources, options: ManifestOptions
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": len(runs),
        "parallelism": min(options.num_slots or len(runs), len(runs)),
        "backoffLimitPerIndex": max(run.launch.retries.transient for run in runs),
        **({"maxFailedIndexes": 0} if options.fail_fast else {}),
        # Never two pods of one run: the second waits until the first is gone.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _build_failure_rules()},
        "template": {
            "metadata": {"labels": _LABELS},
            "spec": _build_pod(runs, machine, options),
        },
    }
    metadata = {"name": _build_name(grid, runs), "labels": _LABELS}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _build_name(grid: str, runs: list[PendingRun]) -> str:
    """A name that stays the same until an attempt of one of the runs begins, so applying the file
    twice creates one Job.
    """
    state = [[run.selected.full_name, run.num_attempts] for run in runs]
    return f"{build_label(grid, 40)}-{hash_json(state)[:8]}"


def _build_failure_rules() -> list[dict[str, Any]]:
    """The rules for a failed pod; the first that matches applies. A failure without a matching rule
    is counted.

    Failures that the training process is sure of come before a disruption of the pod, unexplained
    ones after it: a pod that is being evicted may well crash.
    """
    from runner.run.record import EXIT_CODES

    sure = {
        EXIT_CODES[kind]
        for kind, action in _ACTIONS.items()
        if action == "FailIndex" and kind != "crashed"
    }
    disrupted = {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    return [
        _build_exit_rule("FailIndex", {_WRONG_USAGE, *sure}),
        disrupted,
        _build_exit_rule("Ignore", _codes_of("Ignore")),
        _build_exit_rule("FailIndex", {EXIT_CODES["crashed"]}),
        _build_exit_rule("Count", _codes_of("Count")),
    ]


def _codes_of(action: Action) -> set[int]:
    from runner.run.record import EXIT_CODES

    return {EXIT_CODES[kind] for kind, its_action in _ACTIONS.items() if its_action == action}


def _build_exit_rule(action: Action, codes: set[int]) -> dict[str, Any]:
    condition = {"containerName": _CONTAINER, "operator": "In", "values": sorted(codes)}
    return {"action": action, "onExitCodes": condition}


def _build_pod(
    runs: list[PendingRun], machine: Resources, options: ManifestOptions
) -> dict[str, Any]:
    """The pod of every index: the index selects the recipe, and `runner` is the process that gets
    TERM.
    """
    overrides = "".join(f" {_quote(override)}" for override in options.overrides)
    script = (
        f'shift "$JOB_COMPLETION_INDEX"; exec runner launch "$1"{overrides} --output-root'
        f" {_quote(options.output_root)}{' --own-base' if options.owns_base else ''}"
    )
    resources = {
        **({"requests": {"cpu": machine.num_cores}} if machine.num_cores is not None else {}),
        **({"limits": {"nvidia.com/gpu": machine.num_gpus}} if machine.num_gpus else {}),
    }
    container = {
        "name": _CONTAINER,
        "image": options.image,
        "workingDir": _PROJECT_DIR,
        "command": ["sh", "-c", script, _CONTAINER, *map(_escape, list_recipe_words(runs))],
        **({"resources": resources} if resources else {}),
        "volumeMounts": [
            {"name": "project", "mountPath": _PROJECT_DIR},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "project", "persistentVolumeClaim": {"claimName": options.storage}},
            # The default 64 MiB of a pod are too few for several processes.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _quote(path: object) -> str:
    return _escape(shlex.quote(str(path)))


def _escape(word: str) -> str:
    """A word that Kubernetes passes unchanged to the container: it reads `$(NAME)` as a variable
    and `$$` as `$`.

    >>> _escape("a$(HOME)$$b$c")
    'a$$(HOME)$$$b$c'
    """
    return re.sub(r"\$(?=[$(])", "$$", word)
