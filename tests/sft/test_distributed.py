"""Two processes on the CPU, DDP and ZeRO-3: the same experiment as one process, whole weights, an
exact resume.

22 training rows in micro-batches of 2 on 2 processes leave two rows short of a full pass, so each
epoch ends with rows without labels on one rank.
"""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runner.checkpoints.marker import list_committed, load_marker
from runner.files import load_json, load_jsonl
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.exported_models import assert_export_gives_recorded_scores
from tests.support.fake_checkpoints import quarantined
from tests.support.hanging_ranks import Watched, find_rank, start_hanging, wait_for_phase
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_attempts,
    read_evaluations,
    read_log,
    read_losses,
    read_result,
    try_launch,
    try_launch_killed_at,
)

pytestmark = pytest.mark.slow

DDP = "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml"
ZERO_3 = "launch.accelerate_config=accelerate_configs/zero3.yaml"
ACCUMULATING = "training.per_device_train_batch_size=1"

# Two processes add the same float32 numbers in another order. Measured, relative to one process:
# DDP nothing at all; ZeRO-3 1.6e-7 in a loss, 3e-9 in a split's score, 3e-8 in a row's; 3.2e-7
# absolute in a weight. Ten times that.
TOLERANCE = 2e-6
WEIGHT_TOLERANCE = 4e-6


@pytest.fixture(scope="session")
def zero_full(finished: Project) -> RunPaths:
    """A full fine-tune under ZeRO-3, uninterrupted."""
    return launch(finished, "zero-full", ZERO_3, *RUNS["gemma-full"], num_processes=2)


@pytest.fixture(scope="session")
def ddp_full(finished: Project) -> RunPaths:
    """A full fine-tune under DDP."""
    return launch(finished, "ddp-full", DDP, *RUNS["gemma-full"], num_processes=2)


@pytest.fixture(scope="session")
def zero_lora(finished: Project) -> RunPaths:
    """LoRA under ZeRO-3 with two micro-batches per step; exports a checkpoint that is not the last,
    and stripped.
    """
    stripping = "checkpoints.save_optimizer=false"
    return launch(
        finished, "zero-lora", ZERO_3, ACCUMULATING, stripping, *RUNS["llama-lora"], num_processes=2
    )


def assert_same_experiment(found: RunPaths, reference: RunPaths) -> None:
    """The same rows, losses, scores and choice of checkpoint, but for the order of float32 sums."""
    one, other = read_result(found), read_result(reference)
    assert load_json(found.samples_path) == load_json(reference.samples_path)
    assert (one.recipe_digest, one.num_steps, one.best_step) == (
        other.recipe_digest,
        other.num_steps,
        other.best_step,
    )
    recorded = {
        *("initial_weights_hash", "row_order_hash"),
        *("num_updates", "num_trained_tokens", "schedule_steps"),
    }
    facts = one.model_dump(include=recorded)
    assert facts == other.model_dump(include=recorded) and None not in facts.values()
    assert read_losses(found) == pytest.approx(read_losses(reference), rel=TOLERANCE)
    for split in ("validation", "test"):
        for before, after in ((one.base, other.base), (one.tuned, other.tuned)):
            counts = {"num_rows", "num_tokens", "num_completion_tokens", "num_bytes"}
            assert before[split].model_dump(include=counts) == after[split].model_dump(
                include=counts
            )
            assert before[split].nll_sum == pytest.approx(after[split].nll_sum, rel=TOLERANCE)
            assert before[split].completion_nll_sum == pytest.approx(
                after[split].completion_nll_sum, rel=TOLERANCE
            )
    assert load_json(found.attempt(1).training_args_path)["use_cpu"] is True
    found_rows, reference_rows = (
        load_jsonl(found.eval_rows_path),
        load_jsonl(reference.eval_rows_path),
    )
    assert [(row["model"], row["row_id"]) for row in found_rows] == [
        (row["model"], row["row_id"]) for row in reference_rows
    ]
    for row, expected in zip(found_rows, reference_rows, strict=True):
        assert row["completion_nll_sum"] == pytest.approx(
            expected["completion_nll_sum"], rel=TOLERANCE
        )
    assert read_evaluations(found).keys() == read_evaluations(reference).keys()


def assert_same_weights(found: RunPaths, reference: RunPaths, file_name: str) -> None:
    """Whole tensors under the same names, equal but for rounding."""
    one, other = (load_file(paths.model_dir / file_name) for paths in (found, reference))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=WEIGHT_TOLERANCE)


def test_ddp_is_the_same_experiment(finished: Project, ddp_full: RunPaths) -> None:
    assert_same_experiment(ddp_full, finished.paths("gemma-full"))
    assert_same_weights(ddp_full, finished.paths("gemma-full"), "model.safetensors")
    assert (ddp_full.checkpoint_dir(12) / "rng_state_1.pth").exists(), "there was a second rank"


def test_zero_3_full_fine_tune_is_the_same_experiment_and_exports_whole_weights(
    finished: Project, zero_full: RunPaths
) -> None:
    assert_same_experiment(zero_full, finished.paths("gemma-full"))
    assert_same_weights(zero_full, finished.paths("gemma-full"), "model.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(
        zero_full.model_dir, output_loading_info=True
    )
    assert not report["missing_keys"] and all(parameter.numel() for parameter in model.parameters())
    assert_export_gives_recorded_scores(finished, zero_full)


def test_the_resolved_arguments_are_those_of_zero_3(
    zero_full: RunPaths, zero_lora: RunPaths
) -> None:
    for paths, micro_batch, accumulation in ((zero_full, 2, 1), (zero_lora, 1, 2)):
        arguments = load_json(paths.attempt(1).training_args_path)
        deepspeed, resolved = arguments["deepspeed"], arguments["resolved"]
        assert deepspeed["zero_optimization"]["stage"] == 3
        assert "auto" not in deepspeed.values() and deepspeed["train_batch_size"] == 4
        assert deepspeed["train_micro_batch_size_per_gpu"] == micro_batch
        assert deepspeed["gradient_accumulation_steps"] == accumulation
        assert (deepspeed["bf16"]["enabled"], deepspeed["fp16"]["enabled"]) == (False, False)
        assert arguments["train_sampling_strategy"] == "group_by_length"
        assert resolved["distributed_type"] == "DEEPSPEED" and resolved["num_processes"] == 2
        assert resolved["per_device_train_batch_size"] == micro_batch
        assert resolved["gradient_accumulation_steps"] == accumulation
        assert (resolved["global_batch_size"], resolved["schedule_steps"]) == (4, 12)


def test_zero_3_lora_is_the_same_experiment_and_exports_the_chosen_checkpoint(
    finished: Project, zero_lora: RunPaths
) -> None:
    result = read_result(zero_lora)
    assert result.best_step < result.num_steps
    assert load_marker(zero_lora.checkpoint_dir(result.best_step)).is_stripped
    assert not load_marker(zero_lora.checkpoint_dir(result.num_steps)).is_stripped
    assert_same_experiment(zero_lora, finished.paths("llama-lora"))
    assert_same_weights(zero_lora, finished.paths("llama-lora"), "adapter_model.safetensors")
    assert_export_gives_recorded_scores(finished, zero_lora)


def test_a_rank_that_dies_and_ranks_that_hang_before_a_commit_cost_no_bit(
    finished: Project, ddp_full: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first attempt, the second rank is killed before it writes its random state, which the
    first one waits for before the marker: the checkpoint never counts. In the next one, the second
    rank is stopped and continued; later it never comes to a collective for which the first one
    waits, and the attempt is ended with the stacks of both.
    """
    name, overrides = "ddp-killed-then-stalled", (DDP, *RUNS["gemma-full"])
    at = "os.mkdir /checkpoint-8 1"
    killed = try_launch_killed_at(finished, name, *overrides, at=at, rank="1", num_processes=2)
    paths = finished.paths(name)
    assert killed.returncode not in (0, 2) and not paths.result_path.exists()
    assert list_committed(paths) == [4] and (paths.checkpoints_dir / "checkpoint-8").exists(), (
        "the first rank's part"
    )
    attempt = start_hanging(finished, name, *overrides, at="/checkpoint-8", monkeypatch=monkeypatch)
    try:
        wait_for_phase(attempt, "evaluating", "training", "saving")
        stopped = find_rank(attempt, 1)
        os.kill(stopped, signal.SIGSTOP)
        watched = Watched(attempt, limit_seconds=3.0)
        watched.look_until_it_ends()
    finally:
        attempt.process.signal_group(signal.SIGKILL)
        failure = attempt.finish()
    assert f"process {stopped} was stopped; continued" in watched.said[0]
    assert list_committed(paths) == [4], "it went on, and hung later"
    assert failure is not None and failure.kind == "stalled"
    assert re.fullmatch(
        r"no sign of life for \d+ s while saving, step \d+/12; the stacks of 2 processes are in the"
        r" log",
        failure.message,
    )
    log = read_log(paths)
    assert "resuming from step 4" in log and "checkpoint-8.1" in quarantined(paths)
    parts = re.split(r"runner: stacks of rank (\d), process [^:]*:", log)
    stacks = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert "never_comes_back" in stacks["1"] and "never_comes_back" not in stacks["0"]
    assert "wait_for_everyone" in stacks["0"]
    monkeypatch.undo()
    launch(finished, name, *overrides, num_processes=2)
    assert "resuming from step 4" in read_log(paths)
    assert_same_outputs(paths, ddp_full)


def test_zero_3_resumes_exactly_and_refuses_another_number_of_processes(
    finished: Project, zero_full: RunPaths
) -> None:
    name, overrides = "zero-killed", (ZERO_3, *RUNS["gemma-full"])
    paths = launch_killed_at(
        finished, name, *overrides, event="os.rename", path="step-8/COMMITTED.json", num_processes=2
    )
    before = outputs_of_checkpoint(paths, 4)
    refused = try_launch(finished, name, *overrides, num_processes=1)
    assert refused.returncode == 2 and len(read_attempts(paths)) == 1, (
        "before any process was started"
    )
    assert "num_processes: 2 -> 1" in refused.stderr and "--num-processes 2" in refused.stderr
    assert outputs_of_checkpoint(paths, 4) == before
    launch(finished, name, *overrides, num_processes=2)
    assert "resuming from step 4" in read_log(paths)
    assert_same_outputs(paths, zero_full)


def outputs_of_checkpoint(paths: RunPaths, step: int) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in paths.checkpoint_dir(step).rglob("*")
        if path.is_file()
    }
