"""The contents of a finished run, for five model families, full fine-tunes and LoRA: results,
scores and loadable models.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from runner.checkpoints.marker import list_committed
from runner.files import load_json, load_jsonl
from runner.sft.callbacks import FlowCallback
from tests.conftest import Project
from tests.support.exported_models import assert_export_gives_recorded_scores, recipe_of
from tests.support.training_runs import (
    RUNS,
    launch_arguments,
    read_evaluations,
    read_losses,
    read_result,
    snapshot,
    try_launch,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", RUNS)
def test_exported_model_loads_plainly_and_gives_the_recorded_scores(
    finished: Project, name: str
) -> None:
    assert_export_gives_recorded_scores(finished, finished.paths(name))


@pytest.mark.parametrize("name", RUNS)
def test_result_is_complete(finished: Project, name: str) -> None:
    paths = finished.paths(name)
    result, evaluations, losses = read_result(paths), read_evaluations(paths), read_losses(paths)
    recipe = recipe_of(paths)
    assert result.recipe_digest == load_json(paths.recipe_path)["recipe_digest"]
    assert list(losses) == list(range(1, result.num_steps + 1)), "each step once"
    assert min(evaluations) == 0 and max(evaluations) == result.num_steps
    for split, row in (
        ("validation", evaluations[0]),
        ("test", read_evaluations(paths, "test")[0]),
    ):
        assert result.base[split].nll_sum == row["nll_sum"], "step 0 is the base model"
    # scored again after its weights were loaded from the checkpoint
    assert result.tuned["validation"].nll_sum == evaluations[result.best_step]["nll_sum"]
    values = {
        step: row["nll_per_completion_token"] for step, row in evaluations.items() if step > 0
    }
    choose = min if recipe.checkpoints.mode == "min" else max
    assert values[result.best_step] == choose(values.values()) == result.best_metric
    base_rows = [row for row in load_jsonl(paths.eval_rows_path) if row["model"] == "base"]
    assert math.fsum(row["nll_sum"] for row in base_rows) == result.base["test"].nll_sum
    assert not paths.model_partial_dir.exists() and not paths.quarantine_dir.exists()
    assert not list(paths.run_dir.rglob("training_args.bin")), (
        "a pickle that can hold the hub token"
    )
    arguments = load_json(paths.attempt(1).training_args_path)
    assert arguments["gradient_accumulation_steps"] == 2 and arguments["use_cpu"] is True


def test_every_second_of_an_attempt_is_of_one_phase(finished: Project) -> None:
    timing = load_json(finished.paths("gemma-lora").attempt(1).timing_path)
    seconds = timing["phase_seconds"]
    # Such a run uploads, downloads and compiles nothing.
    assert set(seconds) == {
        *("setting up", "loading the tokenizer", "reading rows", "masking rows"),
        *("choosing a checkpoint", "loading the model", "building the trainer"),
        *("preparing to train", "evaluating base", "training", "evaluating", "saving"),
        *("evaluating best", "exporting"),
    }
    assert 0.8 * timing["total_seconds"] < sum(seconds.values()) <= timing["total_seconds"] + 0.01


def test_each_epoch_has_the_same_rows_in_another_order(finished: Project) -> None:
    paths = finished.paths("gemma-full")
    history = load_json(paths.checkpoint_dir(12) / "trainer_state.json")["log_history"]
    totals = [
        0,
        *(int(row["num_tokens"]) for row in history if "num_tokens" in row and "loss" in row),
    ]
    per_step = [after - before for before, after in pairwise(totals)]
    num_tokens = load_json(paths.samples_path)["splits"]["train"]["num_tokens"]
    assert sum(per_step[:6]) == sum(per_step[6:]) == num_tokens and per_step[:6] != per_step[6:]


def test_training_learns(finished: Project) -> None:
    for name in set(RUNS) - {"llama-lora"}:  # which exports its worst checkpoint
        result = read_result(finished.paths(name))
        assert result.best_metric < result.base["validation"].nll_per_completion_token


def test_arms_of_one_cell_see_the_same_tokens_under_different_masks(finished: Project) -> None:
    completion, full = (
        load_json(finished.paths(name).samples_path) for name in ("gemma-lora", "gemma-full")
    )
    assert (completion["loss"], full["loss"]) == ("completion", "full")
    for split in ("train", "validation", "test"):
        one, other = completion["splits"][split], full["splits"][split]
        assert one["ids"] == other["ids"] and one["input_ids_hash"] == other["input_ids_hash"]
        assert one["mask_hash"] != other["mask_hash"]
        assert one["num_completion_tokens"] == other["num_completion_tokens"] == one["num_labels"]
        assert other["num_labels"] == other["num_tokens"]


def test_samples_are_nested_across_models_and_splits_are_disjoint(finished: Project) -> None:
    small, large = (
        load_json(finished.paths(name).samples_path)["splits"]
        for name in ("gemma-full", "mistral-full")
    )
    assert large["train"]["ids"][: small["train"]["num_rows"]] == small["train"]["ids"]
    assert (small["train"]["num_rows"], large["train"]["num_rows"]) == (22, 44)
    assert [small[split]["ids"] for split in ("validation", "test")] == [
        large[split]["ids"] for split in ("validation", "test")
    ]
    everything = [row_id for split in large.values() for row_id in split["ids"]]
    assert len(set(everything)) == len(everything) == 44 + 12 + 15


def test_early_stopping_stops_after_its_patience_and_exports_the_best(finished: Project) -> None:
    paths = finished.paths("llama-early")
    result, evaluations = read_result(paths), read_evaluations(paths)
    values = {
        step: row["nll_per_completion_token"] for step, row in evaluations.items() if step > 0
    }
    best = min(values, key=values.__getitem__)
    assert result.best_step == best and result.num_steps == best + 3 * 2, (
        "three evaluations, two steps apart"
    )
    assert result.stop_reason == "early_stopping" and result.num_steps < 40
    exported = load_file(paths.model_dir / "model.safetensors")
    kept = {
        step: load_file(paths.checkpoint_dir(step) / "model.safetensors")
        for step in (best, result.num_steps)
    }
    assert sorted(path.name for path in paths.checkpoints_dir.iterdir()) == sorted(
        f"step-{step}" for step in kept
    )
    assert all(torch.equal(exported[name], kept[best][name]) for name in exported)
    assert not all(torch.equal(exported[name], kept[result.num_steps][name]) for name in exported)


def test_lora_exports_the_checkpoint_that_was_chosen(finished: Project) -> None:
    paths = finished.paths("llama-lora")
    result = read_result(paths)
    assert result.best_step < result.num_steps
    exported = load_file(paths.model_dir / "adapter_model.safetensors")
    chosen = load_file(paths.checkpoint_dir(result.best_step) / "adapter_model.safetensors")
    embeddings = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert exported.keys() == chosen.keys() | embeddings, (
        "a checkpoint does without: the base gets its row each time"
    )
    assert all(torch.equal(exported[name], chosen[name]) for name in chosen)


def test_launching_a_completed_run_again_changes_nothing(finished: Project) -> None:
    before = {name: snapshot(finished.paths(name).run_dir) for name in RUNS}
    again = finished.cli(*launch_arguments("gemma-lora", RUNS["gemma-lora"]))
    assert again.returncode == 0 and "completed" in again.stdout
    for _ in range(3):
        swept = finished.cli("sweep", "recipes", "--slots", "2")
        assert swept.returncode == 0 and swept.stdout.count("skip") == len(RUNS)
    assert {name: snapshot(finished.paths(name).run_dir) for name in RUNS} == before


@pytest.mark.parametrize("name", RUNS)
def test_what_a_checkpoint_restores_is_what_the_recipe_says_of_the_metrics(
    finished: Project, name: str
) -> None:
    """Patience, best step and stop are functions of the evaluations in it and of the recipe, and of
    nothing else.
    """
    paths = finished.paths(name)
    recipe, result, flow = recipe_of(paths), read_result(paths), FlowCallback(recipe_of(paths))
    values = {
        step: row[recipe.checkpoints.metric]
        for step, row in read_evaluations(paths).items()
        if step > 0
    }
    for step in list_committed(paths):
        state = TrainerState.load_from_json(str(paths.checkpoint_dir(step) / "trainer_state.json"))
        assert flow.evaluations(state) == [
            (at, value) for at, value in values.items() if at <= step
        ]
        assert flow.is_stopped_early(state) == (
            step == result.num_steps and result.stop_reason == "early_stopping"
        )
    assert flow.best_step(state) == result.best_step and state.global_step == result.num_steps


def test_a_wrong_number_of_processes_is_a_configuration_failure(finished: Project) -> None:
    result = try_launch(finished, "wrong-world", num_processes=2)
    paths = finished.paths("wrong-world")
    failure = load_json(paths.attempt(1).failure_path())
    assert result.returncode == 10 and failure["kind"] == "configuration"
    assert (
        "this attempt has 1 process, expected 2" in failure["message"]
        and "cpu.yaml" in failure["message"]
    )
    status = finished.cli("status", str(paths.run_dir), "--json")
    assert [row["failure"]["kind"] for row in json.loads(status.stdout)] == ["configuration"]
    assert "this attempt has 1 process" in finished.cli("status", str(paths.run_dir)).stdout


def test_divergence_is_named_and_never_committed(finished: Project) -> None:
    # Adam moves each weight by the learning rate: after one step they are about 1e30, whose squares
    # overflow.
    finished.write_recipe(
        "diverging/diverged.yaml",
        "adapter.method=none",
        "training.learning_rate=1e30",
        "checkpoints.save_steps=1",
        "evaluation={eval_strategy: 'no', eval_steps: null}",
    )
    first = finished.cli("sweep", "diverging")
    paths = finished.paths("diverged")
    failure = load_json(paths.attempt(1).failure_path())
    assert first.returncode == 1 and failure["kind"] == "diverged"
    assert "not finite" in failure["message"] or "is nan" in failure["message"]
    for weights in paths.checkpoints_dir.glob("step-*/*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(weights).values())
    second = finished.cli("sweep", "diverging")
    assert second.returncode == 1 and "skip" in second.stdout and "diverged" in second.stdout
    assert "--retry-failed" in second.stdout and not paths.attempt(2).attempt_dir.exists()
