"""The start, order, updates and tokens in `result.json`, compared with the run itself, and
`resolved_training_args.json`, compared with the launch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from runner.data.rows import Split, build_samples
from runner.data.tokenizer import load_tokenizer
from runner.files import load_json, load_jsonl
from runner.recipe.schedule import derive_schedule
from runner.run.paths import RunPaths
from runner.run.scores import find_score_contradictions
from runner.sft.order import EpochSampler
from tests.conftest import Project
from tests.support.exported_models import recipe_of
from tests.support.training_runs import RUNS, read_result

pytestmark = pytest.mark.slow


def load_train_rows(project: Project, paths: RunPaths) -> Split:
    recipe = recipe_of(paths)
    with contextlib.chdir(project.root):
        return build_samples(recipe.data, load_tokenizer(recipe.model)).train


def read_last_state(paths: RunPaths, step: int) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint, be it a folder or an archive."""
    if (folder := paths.checkpoint_dir(step)).exists():
        return dict(load_json(folder / "trainer_state.json"))
    with zipfile.ZipFile(paths.archive_path(step)) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith("/trainer_state.json")]
        return dict(json.loads(archive.read(name)))


@pytest.mark.parametrize("name", RUNS)
def test_a_result_says_what_was_trained(finished: Project, name: str) -> None:
    paths = finished.paths(name)
    recipe, result, train = recipe_of(paths), read_result(paths), load_train_rows(finished, paths)
    sampler = EpochSampler(
        train.list_lengths(),
        global_batch_size=recipe.global_batch_size,
        seed=recipe.training.seed,
        strategy=recipe.training.train_sampling_strategy,
    )
    batches = list(sampler.list_batches(result.num_steps))
    # TRL adds up the tokens of what it was really given.
    history = read_last_state(paths, result.num_steps)["log_history"]
    totals = [0, *(row["num_tokens"] for row in history if "num_tokens" in row and "loss" in row)]
    lengths = train.list_lengths()
    assert [after - before for before, after in pairwise(totals)] == [
        sum(lengths[row] for row in batch) for batch in batches
    ]
    ids = load_json(paths.samples_path)["splits"]["train"]["ids"]
    text = "".join(
        json.dumps([ids[row] for row in batch], separators=(",", ":")) + "\n" for batch in batches
    )
    assert result.row_order_hash == hashlib.sha256(text.encode()).hexdigest()
    # As Transformers counts what the loss is divided by.
    labels = [row.labels(recipe.loss)[1:] for row in train.rows]
    num_labels = [sum(label != -100 for label in one) for one in labels]
    assert result.num_trained_tokens == sum(num_labels[row] for batch in batches for row in batch)
    assert result.num_updates == result.num_steps
    assert result.schedule_steps == derive_schedule(recipe, len(train.rows)).num_updates
    is_early = result.stop_reason == "early_stopping"
    assert is_early == (name == "llama-early") == (result.num_updates < result.schedule_steps)
    assert find_score_contradictions(result, load_jsonl(paths.eval_rows_path)) == []
    effective = load_json(paths.attempt(1).training_args_path)
    assert effective["train_sampling_strategy"] == recipe.training.train_sampling_strategy
    assert effective["deepspeed"] is None
    resolved = effective["resolved"]
    assert resolved["schedule_steps"] == result.schedule_steps
    assert (resolved["num_processes"], resolved["distributed_type"]) == (1, "NO")
    assert (resolved["mixed_precision"], resolved["trained_dtypes"]) == ("no", ["float32"])
    assert resolved["global_batch_size"] == recipe.global_batch_size
    assert resolved["device"].startswith("cpu, ")


def test_a_full_fine_tune_starts_with_the_weights_of_its_base(finished: Project) -> None:
    paths = finished.paths("mistral-full")
    model = AutoModelForCausalLM.from_pretrained(
        finished.root / recipe_of(paths).model.path, dtype=torch.float32
    )
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(json.dumps([name, "torch.float32", list(weight.shape)]).encode() + b"\n")
        digest.update(weight.detach().numpy().tobytes())
    assert read_result(paths).initial_weights_hash == digest.hexdigest()


def test_arms_that_differ_in_loss_alone_start_and_go_alike_and_other_seeds_do_not(
    finished: Project,
) -> None:
    arms = {"gemma-lora-full": "loss=full", "gemma-lora-seed": "training.seed=4"}
    for name, other in arms.items():
        finished.write_recipe(f"arms/{name}.yaml", *RUNS["gemma-lora"], other)
    done = finished.cli("sweep", "arms")
    assert done.returncode == 0, done.stderr
    reference = read_result(finished.paths("gemma-lora"))
    full, seeded = (read_result(finished.paths(name)) for name in arms)
    assert full.initial_weights_hash == reference.initial_weights_hash is not None
    assert full.row_order_hash == reference.row_order_hash
    assert (full.num_updates, full.schedule_steps) == (
        reference.num_updates,
        reference.schedule_steps,
    )
    assert full.num_trained_tokens > reference.num_trained_tokens > 0
    assert seeded.initial_weights_hash != reference.initial_weights_hash
    assert seeded.row_order_hash != reference.row_order_hash
    assert seeded.num_updates == reference.num_updates
