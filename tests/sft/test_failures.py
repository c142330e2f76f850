"""Real exceptions in real trainers: told by kind, retried as the recipe says, and the result is the same to the bit."""

from __future__ import annotations

import json

import pytest
from conftest import Project
from faulty_runs import launch_faulty, make_fault
from training_runs import assert_same_outputs, launch, read_attempts, read_log

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
    return [(one["retry"], one["micro_batch_divisor"], one["failure"] and one["failure"]["kind"]) for one in attempts]


def test_out_of_memory_ends_with_the_bytes_of_a_smaller_micro_batch(project: Project) -> None:
    """And a lost connection after it goes on from the newest checkpoint, in the smaller micro-batch."""
    project.add_model()
    smaller = ("training.per_device_train_batch_size=1", "evaluation.per_device_eval_batch_size=4")
    reference = launch(project, "smaller", *SHORT, *smaller)
    done = launch_faulty(
        project,
        "halved",
        *SHORT,
        "launch.retries={out_of_memory: 1, transient: 1, backoff_seconds: 0}",
        faults=[
            make_fault("open", "logs.txt", "torch.OutOfMemoryError", "CUDA out of memory.", count=5),
            make_fault("open", "logs.txt", "torch.distributed.DistBackendError", "Connection closed by peer", count=6),
        ],
    )
    paths = project.paths("halved")
    assert done.returncode == 0, done.stderr + read_log(paths)
    assert list_ends(project, "halved") == [(0, 1, "out_of_memory"), (1, 2, "transient"), (2, 2, None)]
    assert sorted(path.name for path in paths.quarantine_dir.iterdir()) == ["step-2.1"]
    assert "before the run went out of memory" in paths.attempt(2).log_path.read_text()
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
