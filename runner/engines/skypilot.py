"""Pending runs become one SkyPilot task: one machine in some cloud that sweeps them. Nothing here
talks to a cloud.

One task, and not one per run, because a sweep already is what a recovered machine needs: SkyPilot
starts `run` again, and what is done is skipped. Its other ways fit less: a file of several tasks is
a pipeline, one after the other, and a pool of workers would share the bucket between machines,
which carries no locks from one to the other.
"""

from __future__ import annotations

import shlex
from typing import Any, Final

from runner.engines.manifests import (
    Submission,
    build_label,
    check_submission,
    derive_machine,
    dump_documents,
    list_recipe_words,
)
from runner.errors import RefusedError

_RUNS_DIR: Final = "/recipe-runner-runs"


def build_task_file(submission: Submission) -> str:
    """The task as YAML for `sky jobs launch`.

    Raises:
        RefusedError: a run would not be found in the project folder, or the kind of GPU is missing.
    """
    check_submission(submission)
    slots = min(submission.num_slots or 1, len(submission.runs))
    num_gpus = slots * max(derive_machine(run).num_gpus for run in submission.runs)
    if num_gpus and submission.gpu_type is None:
        raise RefusedError(
            "the runs want GPUs, but of which kind?",
            hint="--gpu-type H100, or what your clouds have",
        )
    cores = [derive_machine(run).num_cores or run.launch.num_processes for run in submission.runs]
    machine = (
        {"accelerators": f"{submission.gpu_type}:{num_gpus}"}
        if num_gpus
        else {"cpus": f"{slots * max(cores)}+"}
    )
    task: dict[str, Any] = {
        "name": build_label(submission.grid, 40),
        "workdir": ".",
        "resources": {**machine, "image_id": f"docker:{submission.image}"},
        # Written to a local cache first, so that renames, appends and locks work as on a disk.
        "file_mounts": {_RUNS_DIR: {"source": submission.storage, "mode": "MOUNT_CACHED"}},
        "setup": "runner --help > /dev/null\n",  # an image without it fails here
        "run": _build_run(submission, num_gpus, slots),
    }
    comment = (
        f"{len(submission.runs)} runs, which {submission.storage} keeps. One machine, {slots} at a"
        " time."
    )
    return dump_documents([task], comment)


def _build_run(submission: Submission, num_gpus: int, slots: int) -> str:
    room = ["--gpus", ",".join(map(str, range(num_gpus)))] if num_gpus else ["--slots", str(slots)]
    flags = ["--fail-fast"] * submission.fail_fast + ["--retry-failed"] * submission.retry_failed
    words = [shlex.quote(word) for word in list_recipe_words(submission.runs)]
    options = shlex.join(["--output-root", _RUNS_DIR, *room, *flags])
    return " \\\n  ".join(["runner sweep", *words, options]) + "\n"
