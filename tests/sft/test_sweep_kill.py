"""A sweep that is killed, and started again, ends with the report of one that was left alone."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import RUNNER, Project, build_environment
from training_runs import assert_dies, assert_same_outputs, list_descendants, wait_for_path

from runner.paths import RunPaths, marker_path

pytestmark = pytest.mark.slow

ARMS = ("full", "completion")


def paths_of(project: Project, output_root: str, loss: str) -> RunPaths:
    return RunPaths(project.root / output_root / "tests" / loss)


def test_a_killed_sweep_is_finished_by_the_same_command(project: Project) -> None:
    project.add_model("gemma")
    for loss in ARMS:
        overrides = (f"loss={loss}", f"run.axes.loss={loss}", "checkpoints.save_steps=2")
        project.write_recipe(f"recipes/tests/{loss}.yaml", *overrides)
    assert project.cli("sweep", "recipes/tests", "--slots", "2", "--output-root", "alone").returncode == 0

    command = [str(RUNNER), "sweep", "recipes/tests", "--slots", "2", "--output-root", "killed"]
    first = paths_of(project, "killed", "full")
    with subprocess.Popen(command, cwd=project.root, env=build_environment(), stdout=subprocess.DEVNULL) as sweep:
        wait_for_path(marker_path(first.checkpoint_dir(2)), sweep)
        pidfds = [os.pidfd_open(pid) for pid in list_descendants(sweep.pid)]
        sweep.kill()
    assert len(pidfds) >= 4, "two launchers and two trainers"
    assert_dies(pidfds, seconds=10)
    assert not first.result_path.exists()
    assert "interrupted" in project.cli("status", "recipes/tests", "--output-root", "killed").stdout

    assert project.cli(*command[1:]).returncode == 0
    for loss in ARMS:
        assert_same_outputs(paths_of(project, "killed", loss), paths_of(project, "alone", loss))
    reports = [project.cli("report", "recipes/tests", "--output-root", root).stdout for root in ("alone", "killed")]
    assert reports[0] == reports[1] and "2 of 2 completed runs" in reports[0]
    again = project.cli(*command[1:])
    assert again.returncode == 0 and again.stdout.count("skip") == 2
