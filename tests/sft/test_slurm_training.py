"""A real run that a real Slurm asks to leave is queued again, and ends with the bits of one that
was left alone.
"""

from __future__ import annotations

import pytest

from runner.run.paths import marker_path
from tests.conftest import Project
from tests.support.local_slurm import LocalSlurm, needs_slurm, shared_slurm, wait_until
from tests.support.training_runs import assert_same_outputs, launch, read_attempts

__all__ = ["shared_slurm"]
pytestmark = [needs_slurm, pytest.mark.slow]


def test_a_requeued_run_ends_with_the_same_bits(shared_slurm: LocalSlurm, project: Project) -> None:
    project.add_model("gemma")
    overrides = ("checkpoints.save_steps=2", "training.num_train_epochs=6")
    reference = launch(project, "alone", *overrides)
    project.write_recipe("recipes/tests/queued.yaml", *overrides)
    environment = {"SLURM_CONF": str(shared_slurm.root / "slurm.conf"), "HF_HUB_OFFLINE": "1"}
    result = project.cli("sweep", "recipes/tests", "--engine", "slurm", environment=environment)
    assert result.returncode == 0, result.stderr
    paths = project.paths("queued")
    wait_until(marker_path(paths.checkpoint_dir(2)).exists, "the run trains")
    (task,) = shared_slurm.list_jobs()
    # Slurm does this near the time limit.
    shared_slurm.run("scancel", "--batch", "--signal=USR1", task)
    wait_until(lambda: shared_slurm.list_jobs() == {}, "the task ends")
    assert [(one["failure"] or {}).get("kind") for one in read_attempts(paths)] == [
        "preempted",
        None,
    ]
    assert [one["started"] for one in read_attempts(paths)] == ["cold", "cold"]
    assert_same_outputs(paths, reference)
