"""Runs that a sweep forks from a worker, beside runs that were started alone: by `launch`, or by
hand with the command that was recorded.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from importlib.util import find_spec

import pytest

from runner.checkpoints.marker import list_committed
from runner.files import load_json
from runner.run.paths import RunPaths, marker_path
from tests.conftest import Project, build_environment
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    kill_launcher,
    launch,
    list_files,
    read_attempts,
    read_log,
    started,
    started_by,
    wait_for_path,
)

pytestmark = pytest.mark.slow

NAME = "gemma-lora"


def list_starts(paths: RunPaths) -> list[str]:
    return [attempt["started"] for attempt in read_attempts(paths)]


def read_all(paths: RunPaths) -> dict[str, bytes]:
    """Every file of a run but what differs between any two attempts: their records, their folders,
    and the lease.
    """
    return {
        str(path.relative_to(paths.run_dir)): path.read_bytes()
        for path in list_files(paths.run_dir)
        if path not in (paths.record_path, paths.lease_path)
        and paths.attempts_dir not in path.parents
    }


def test_the_recorded_command_run_by_hand_gives_the_same_bytes(finished: Project) -> None:
    """Unchanged, in a shell, from the same folder: the run of the sweep is moved out of its way."""
    recipe = finished.write_recipe("by-hand.yaml", *RUNS[NAME])
    done = finished.cli("sweep", recipe, "--output-root", "hand")
    assert done.returncode == 0, done.stderr
    paths = RunPaths(finished.root / "hand" / "tests" / "by-hand")
    assert list_starts(paths) == ["warm"]
    [attempt] = read_attempts(paths)
    forked = read_all(paths)
    (finished.root / "hand").rename(finished.root / "hand-forked")

    prepared = finished.cli("launch", recipe, "--output-root", "hand", "--prepare")
    assert prepared.returncode == 0 and not paths.result_path.exists(), prepared.stderr
    words = [f"{name}={value}" for name, value in attempt["environment"].items()]
    typed = subprocess.run(
        ["bash", "-c", shlex.join(["env", *words, *attempt["command"]])],
        cwd=finished.root,
        env=build_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert typed.returncode == 0, typed.stderr
    by_hand = read_all(paths)
    assert by_hand.keys() == forked.keys()
    assert [name for name in forked if by_hand[name] != forked[name]] == []


# A trainer's own list of what it has imported, written when it writes its result, its last file.
_LIST_MODULES = """\
import json, os, sys
from pathlib import Path

def _hook(name, arguments):
    if name == "os.rename" and str(arguments[1]).endswith("result.json"):
        modules = sorted({name.partition(".")[0] for name, module in sys.modules.items() if module})
        Path(arguments[1]).with_name("modules.json").write_text(json.dumps(modules))

sys.addaudithook(_hook)
"""


def test_no_trainer_imports_what_its_recipe_has_no_use_for(project: Project) -> None:
    hidden = {"wandb", "bitsandbytes", "deepspeed", "scipy", "matplotlib"}
    assert find_spec("scipy") and find_spec("matplotlib"), "else nothing would be shown"
    project.add_model()
    (project.root / "sitecustomize.py").write_text(_LIST_MODULES)
    path = f"{project.root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    short = "training={max_steps: 1, num_train_epochs: null}"
    recipe = project.write_recipe("imports.yaml", *RUNS[NAME], short)
    for verb, start in (("sweep", "warm"), ("launch", "cold")):
        paths = RunPaths(project.root / verb / "tests" / "imports")
        where = ("--output-root", verb)
        done = project.cli(verb, recipe, *where, environment={"PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        assert list_starts(paths) == [start]
        modules = set(load_json(paths.run_dir / "modules.json"))
        assert {"runner", "torch", "transformers"} <= modules
        assert hidden & modules == set(), start


def test_a_killed_runner_takes_all_below_it_along_and_the_run_goes_on_exactly(
    finished: Project,
) -> None:
    """The launcher and the trainer of a launch; then the launcher, worker and trainer of a sweep,
    which resumes what was started cold; then the run ends cold.
    """
    name = "killed-cold-and-warm"
    paths, recipe = finished.paths(name), finished.write_recipe(f"warm/{name}.yaml", *RUNS[NAME])
    with started(finished, name, *RUNS[NAME]) as process:
        wait_for_path(marker_path(paths.checkpoint_dir(4)), process)
        kill_launcher(process)
    first = list_committed(paths)[-1]
    with started_by(finished, "sweep", str(recipe)) as process:
        wait_for_path(paths.attempt(2).logs_path, process)  # it trains
        kill_launcher(process)
    assert f"resuming from step {first}" in read_log(paths) and not paths.result_path.exists()
    assert [attempt["ended_at_utc"] for attempt in read_attempts(paths)] == [None, None]
    launch(finished, name, *RUNS[NAME])
    assert list_starts(paths) == ["cold", "warm", "cold"] and "resuming from step" in read_log(
        paths
    )
    assert_same_outputs(paths, finished.paths(NAME))
