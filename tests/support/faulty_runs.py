"""Runs whose training process raises a real exception at a chosen file operation; shared by the
slow tests of failures.
"""

from __future__ import annotations

import json
import os
import subprocess

from tests.conftest import Project
from tests.support.training_runs import launch_arguments

# Runs inside training: Python's audit events come before the operation and may raise, so nothing
# of the runner is replaced. Each fault is raised in one attempt only, unless it says otherwise.
_FAULTY = """\
import importlib, json, os, sys
from pathlib import Path

faults = json.loads(os.environ["FAULTS"])
seen = [0] * len(faults)


def poison():
    import gc, torch

    for one in gc.get_objects():
        if isinstance(one, torch.nn.Parameter) and one.requires_grad:
            one.data.fill_(float("nan"))


def _hook(name, arguments):
    for index, fault in enumerate(faults):
        if name != fault["event"] or os.environ.get("RANK", "0") != str(fault["rank"]):
            continue
        if not any(
            isinstance(one, (str, os.PathLike)) and str(one).endswith(fault["path"])
            for one in arguments
        ):
            continue
        seen[index] += 1
        spent = Path(os.environ["FAULTS_DIR"]) / f"spent-{index}"
        if seen[index] == fault["count"] and not spent.exists():
            seen[index] = 0
            spent.touch()
            if fault["error"] == "nan":
                poison()
                return
            module, _, kind = fault["error"].rpartition(".")
            raise getattr(importlib.import_module(module), kind)(*fault["arguments"])

is_trainer = "-m" in sys.orig_argv and "runner.sft" in sys.orig_argv
if "RANK" in os.environ or "LOCAL_RANK" in os.environ or is_trainer:
    if "accelerate" not in " ".join(sys.orig_argv[:2]):
        sys.addaudithook(_hook)
"""


def make_fault(
    event: str, path: str, error: str, *arguments: object, count: int = 1, rank: int = 0
) -> dict[str, object]:
    """A fault that raises `error` the `count`-th time that `event` touches a file whose path ends
    in `path`. `nan` raises nothing: the weights become NaN, and training continues.
    """
    return {
        "event": event,
        "path": path,
        "error": error,
        "arguments": arguments,
        "count": count,
        "rank": rank,
    }


def launch_faulty(
    project: Project,
    name: str,
    *overrides: str,
    faults: list[dict[str, object]],
    num_processes: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Launch a run with faults; the overrides set its retries."""
    hook_dir = project.root / f"faulty-{name}"
    hook_dir.mkdir(exist_ok=True)
    (hook_dir / "sitecustomize.py").write_text(_FAULTY)
    environment = {
        "FAULTS": json.dumps(faults),
        "FAULTS_DIR": str(hook_dir),
        "PYTHONPATH": f"{hook_dir}:{os.environ.get('PYTHONPATH', '')}",
    }
    return project.cli(*launch_arguments(name, overrides, num_processes), environment=environment)
