"""The cluster of the Slurm tests gives each task its own devices, and is gone at the end."""

from __future__ import annotations

import pytest

from tests.support.local_slurm import LocalSlurm, local_slurm, needs_slurm, shared_slurm, wait_until

__all__ = ["shared_slurm"]
pytestmark = [needs_slurm, pytest.mark.slow]


def test_tasks_that_run_together_see_different_gpus(shared_slurm: LocalSlurm) -> None:
    script = shared_slurm.root / "show.sh"
    script.write_text(
        "#!/bin/bash\necho $CUDA_VISIBLE_DEVICES\n"
        "until [ -e go-$SLURM_ARRAY_JOB_ID ]; do read -t 0.1 <> <(:); done\n"
    )
    array = shared_slurm.run(
        "sbatch", "--parsable", "--array=0-1", "--gres=gpu:1", str(script)
    ).strip()
    outputs = [shared_slurm.root / f"slurm-{array}_{task}.out" for task in (0, 1)]
    wait_until(
        lambda: all(path.exists() and path.read_text() for path in outputs), "both tasks run"
    )
    (shared_slurm.root / f"go-{array}").touch()
    wait_until(lambda: shared_slurm.list_jobs() == {}, "both tasks end")
    assert sorted(path.read_text() for path in outputs) == ["0\n", "1\n"]


def test_a_cluster_of_two_nodes_ends_with_its_jobs() -> None:
    with local_slurm(num_nodes=2) as cluster:
        job = cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--wrap=srun sleep 1000"
        ).strip()
        wait_until(lambda: cluster.list_jobs().get(job) == "RUNNING", "the job runs")
        wait_until(lambda: len(cluster.list_steps("node1")) == 1, "its second machine takes part")
        wait_until(
            lambda: len(cluster.list_steps("node0")) == 2,
            "the script, and the step of this machine",
        )
        root = cluster.root
    assert cluster.list_steps() == [] and not root.exists()
