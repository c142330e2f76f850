"""Real exceptions in real training processes: classified by kind, retried as the recipe says, with
the same result to the bit.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from runner.checkpoints.marker import list_committed
from tests.conftest import Project
from tests.support.faulty_runs import launch_faulty, make_fault
from tests.support.training_runs import (
    assert_same_outputs,
    launch,
    read_attempts,
    read_log,
    try_launch,
)

pytestmark = pytest.mark.slow

DDP = "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml"
SHORT = (
    "training={max_steps: 6, num_train_epochs: null}",
    "evaluation={eval_steps: 2}",
    "checkpoints={save_steps: 2}",
)


def list_ends(project: Project, name: str) -> list[tuple[int, int, str | None]]:
    """`(retry, micro_batch_divisor, kind)` of each attempt."""
    attempts = read_attempts(project.paths(name))
    return [
        (one["retry"], one["micro_batch_divisor"], one["failure"] and one["failure"]["kind"])
        for one in attempts
    ]


def test_out_of_memory_ends_with_the_bytes_of_a_smaller_micro_batch(project: Project) -> None:
    """And a lost connection after it resumes from the newest checkpoint, in the smaller
    micro-batch.
    """
    project.add_model()
    smaller = ("training.per_device_train_batch_size=1", "evaluation.per_device_eval_batch_size=4")
    reference = launch(project, "smaller", *SHORT, *smaller)
    done = launch_faulty(
        project,
        "halved",
        *SHORT,
        "launch.retries={out_of_memory: 1, transient: 1, backoff_seconds: 0}",
        faults=[
            make_fault(
                "open", "logs.txt", "torch.OutOfMemoryError", "CUDA out of memory.", count=5
            ),
            make_fault(
                "open",
                "logs.txt",
                "torch.distributed.DistBackendError",
                "Connection closed by peer",
                count=6,
            ),
        ],
    )
    paths = project.paths("halved")
    assert done.returncode == 0, done.stderr + read_log(paths)
    assert list_ends(project, "halved") == [
        (0, 1, "out_of_memory"),
        (1, 2, "transient"),
        (2, 2, None),
    ]
    assert sorted(path.name for path in paths.quarantine_dir.iterdir()) == ["step-2.1"]
    assert "before the run ran out of memory" in paths.attempt(2).log_path.read_text()
    assert "resuming from step 4" in read_log(paths)
    assert_same_outputs(paths, reference)
    status = project.cli("status", str(paths.run_dir), "--json")
    assert json.loads(status.stdout)[0]["micro_batch_divisor"] == 2
    assert "micro-batch / 2" in project.cli("status", str(paths.run_dir)).stdout


def test_the_rank_that_knows_why_is_believed(project: Project) -> None:
    project.add_model()
    fault = make_fault("open", "config.json", "builtins.ZeroDivisionError", "the reason", rank=1)
    done = launch_faulty(project, "two", *SHORT, DDP, faults=[fault], num_processes=2)
    [attempt] = read_attempts(project.paths("two"))
    assert (done.returncode, attempt["failure"]["kind"]) == (1, "crashed"), done.stderr
    assert attempt["failure"]["message"] == "ZeroDivisionError: the reason"


def test_weights_that_turn_nan_at_a_step_are_never_committed_and_never_retried(
    project: Project,
) -> None:
    """They turn NaN after the update of step 3, whose loss was finite, right before its
    checkpoint.
    """
    project.add_model()
    overrides = (
        *SHORT,
        "checkpoints.save_steps=1",
        "launch.retries={transient: 3, lost: 3, backoff_seconds: 0}",
    )
    fault = make_fault("open", "logs.txt", "nan", count=4)  # the heading, then a line for each step
    done = launch_faulty(project, "nan", *overrides, faults=[fault])
    paths = project.paths("nan")
    assert (done.returncode, list_ends(project, "nan")) == (12, [(0, 1, "diverged")]), done.stderr
    assert "the weights after step 3 are not finite" in read_log(paths)
    assert 2 in list_committed(paths) and 3 not in list_committed(paths)
    for weights in paths.checkpoints_dir.rglob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(weights).values())
    assert "would fail again" in project.cli("sweep", str(paths.run_dir)).stdout


def test_a_launch_config_that_accelerate_refuses_is_a_configuration_failure(
    project: Project,
) -> None:
    project.add_model()
    (project.root / "bad.yaml").write_text("use_cpu: true\ndistributed_type: NOPE\n")
    done = try_launch(
        project, "refused", "launch.accelerate_config=bad.yaml", "launch.retries={lost: 3}"
    )
    [attempt] = read_attempts(project.paths("refused"))
    assert (done.returncode, attempt["failure"]["kind"]) == (10, "configuration"), done.stderr
    assert "'NOPE' is not a valid DistributedType" in attempt["failure"]["message"]
