"""The static parts of the memory estimate against real tensors of a real step, the sharing of GPUs,
and warnings.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from runner.data.row_entries import MIN_STORED_ROWS
from runner.data.tokenizer import load_tokenizer
from runner.model.load import build_lora_config, load_model
from runner.model.memory import (
    Sharding,
    estimate_answer_memory,
    estimate_disk,
    estimate_memory,
    free_bytes,
    load_sharding,
)
from runner.model.size import ActivationCurve, load_config, measure_model
from runner.preflight.sizes import (
    describe_sizes,
    estimate_sizes,
    estimate_stored_rows,
    warn_of_shortage,
)
from runner.preflight.survey import check_recipes
from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.schedule import derive_schedule
from runner.text import format_bytes
from tests.conftest import RECIPE_TEXT, ROOT, Project

NO_ACTIVATIONS = ActivationCurve((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def recipe_of(model_dir: Path, *overrides: str) -> Recipe:
    overrides = (f"model.path={model_dir}", *overrides)
    return parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=overrides)


def measured(recipe: Recipe) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(recipe.model)
    return measure_model(recipe, load_config(recipe, tokenizer)), tokenizer


def build_optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters)
    return OPTIMIZERS[name](parameters)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(
    tiny_model: Callable[[str], Path], adapter: str, optim: str
) -> None:
    rank = ("adapter.r=64",) if adapter == "lora" else ("adapter.method=none",)
    recipe = recipe_of(tiny_model("llama"), f"training.optim={optim}", *rank)
    size, tokenizer = measured(recipe)
    estimate = estimate_memory(recipe, size, NO_ACTIVATIONS, Sharding(uses_cpu=True), longest_row=0)

    model = load_model(recipe, tokenizer)
    lora = build_lora_config(recipe)
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model = model if lora is None else get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(optim, trained)
    ids = torch.ones((1, 8), dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        # Shared by all.
        if isinstance(value, torch.Tensor) and value.numel() > 1 and not name.startswith("qmap")
    ]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert estimate.weights == pytest.approx(base_bytes, abs=1024)  # rotary frequencies
    assert estimate.adapter == (sum(p.numel() * p.element_size() for p in trained) if lora else 0)
    assert estimate.gradients == sum(
        gradient.numel() * gradient.element_size() for gradient in gradients
    )
    assert estimate.optimizer == sum(state.numel() * state.element_size() for state in states)


def test_processes_share_as_the_launch_config_says(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def sharding(name: str, num_processes: int) -> Sharding:
        path = f"launch.accelerate_config=accelerate_configs/{name}.yaml"
        return load_sharding(
            recipe_of(tiny_model("llama"), path, f"launch.num_processes={num_processes}")
        )

    assert sharding("cpu", 1) == Sharding(uses_cpu=True)
    assert sharding("single_gpu", 1) == Sharding()
    assert sharding("zero2", 2) == Sharding(num_processes=2, zero_stage=2)
    assert (
        sharding("zero3_offload", 2).offloads_parameters
        and sharding("zero3_offload", 2).offloads_optimizer
    )

    recipe = recipe_of(tiny_model("llama"), "adapter.method=none")
    size, _ = measured(recipe)
    one, ddp, zero2, zero3, offload = (
        estimate_memory(recipe, size, NO_ACTIVATIONS, sharding(name, count), longest_row=0)
        for name, count in (
            ("single_gpu", 1),
            ("multi_gpu", 2),
            ("zero2", 2),
            ("zero3", 2),
            ("zero3_offload", 2),
        )
    )
    assert ddp.gradients == 2 * one.gradients and ddp.weights == one.weights, "DDP shares nothing"
    assert zero2.gradients == one.gradients // 2 and zero2.weights == one.weights
    assert zero2.optimizer == 12 * size.num_trained_parameters // 2
    many = Sharding(num_processes=8, zero_stage=3)
    assert estimate_memory(recipe, size, NO_ACTIVATIONS, many, longest_row=0).weights < one.weights
    assert offload.optimizer == 0 and offload.offloaded > zero3.optimizer


def test_gradient_checkpointing_keeps_less(tiny_model: Callable[[str], Path]) -> None:
    curve = ActivationCurve(tuple(1e6 * width for width in (64, 128, 192)), (0.0, 0.0, 0.0))
    kept = []
    for checkpointing in ("false", "true"):
        recipe = recipe_of(tiny_model("llama"), f"training.gradient_checkpointing={checkpointing}")
        size, _ = measured(recipe)
        kept.append(estimate_memory(recipe, size, curve, Sharding(), longest_row=100).activations)
    assert kept[0] == 3 * 100 * 10**6, "two layers, and one that goes backward"
    assert kept[1] == 2 * 100 * 10**6 + 2 * 2 * 100 * 64 * 4, (
        "and the inputs of two layers, 2 rows of 100 tokens"
    )


def test_answers_need_what_training_keeps_and_a_cache(tiny_model: Callable[[str], Path]) -> None:
    recipe = recipe_of(
        tiny_model("llama"), "evaluation.generation={enabled: true, max_new_tokens: 40}"
    )
    size, _ = measured(recipe)

    def answers(batch_size: int, token_bytes: int = 1000) -> int:
        return estimate_answer_memory(
            recipe,
            size,
            NO_ACTIVATIONS,
            Sharding(uses_cpu=True),
            cache_token_bytes=token_bytes,
            num_prompt_tokens=60,
            batch_size=batch_size,
        )

    kept = estimate_memory(recipe, size, NO_ACTIVATIONS, Sharding(uses_cpu=True), longest_row=0)
    assert answers(0) == kept.weights + kept.adapter + kept.gradients + kept.optimizer
    # 60 tokens of a prompt and 40 of its answer, each twice, and the logits of a token.
    assert answers(8) - answers(0) == 8 * (2 * 100 * 1000 + 12 * size.vocab_size)


def test_sizes_of_a_checked_grid(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    recipes = [
        project.recipe("run.name=lora"),
        project.recipe("run.name=full", "adapter.method=none"),
        project.recipe(
            "run.name=huge", "checkpoints.keep_latest=1000000000", "training.num_train_epochs=1e9"
        ),
    ]
    result = check_recipes(recipes)
    sizes = estimate_sizes(result)
    assert set(sizes) == {"tests/lora", "tests/full", "tests/huge"}
    assert (
        sizes["tests/full"].size.num_base_parameters
        == sizes["tests/full"].size.num_trained_parameters
    )
    text = "\n".join(describe_sizes(result.runs, sizes))
    assert text.count("of memory per process") == 2 and "estimate, not a measurement" in text
    warn_of_shortage(result, sizes, finished=["tests/lora"], output_root=Path("runs"))
    (warning,) = [text for text in result.warnings if "of disk" in text]
    assert set(result.warnings[warning]) == {"tests/full", "tests/huge"}
    assert free_bytes(Path("not/there/yet")) > 0


def test_masked_rows_are_counted_once_where_they_are_stored(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    names = ("one", "two", "three")
    overrides = {"two": ["loss=full"], "three": ["data.seed=8"]}
    recipes = [project.recipe(f"run.name={name}", *overrides.get(name, [])) for name in names]
    result = check_recipes(recipes)
    assert estimate_stored_rows(result.runs) == 0, "they are few"
    for at, run in enumerate(result.runs):
        train = replace(run.splits["train"], num_rows=MIN_STORED_ROWS, num_tokens=10**9)
        result.runs[at] = replace(run, splits={"train": train})
    whole = estimate_stored_rows(result.runs)
    assert whole == 2 * estimate_stored_rows(result.runs[:2]) > 2 * 4 * 10**9
    sizes = estimate_sizes(result)
    (line,) = [line for line in describe_sizes(result.runs, sizes) if line.startswith("disk: ")]
    assert line.endswith(f", {format_bytes(whole)} for masked rows that runs share")
    free = sum(size.disk_bytes for size in sizes.values()) + whole
    for missing in (0, 1):
        usage = shutil._ntuple_diskusage(10**12, 0, free - missing)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        warn_of_shortage(result, sizes, finished=[], output_root=Path("runs"))
        assert any("of disk" in text for text in result.warnings) == bool(missing)


def test_a_model_that_cannot_be_measured_is_a_warning(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = project.root / "models" / "unknown"
    project.add_model("gemma")
    model_dir.mkdir()
    for file in (project.root / "models" / "gemma").iterdir():
        (model_dir / file.name).symlink_to(file)
    (model_dir / "config.json").unlink()
    (model_dir / "config.json").write_text('{"model_type": "vit"}')
    monkeypatch.chdir(project.root)
    result = check_recipes([project.recipe("model.path=models/unknown")])
    assert len(result.runs) == 1, result.errors
    assert estimate_sizes(result) == {}
    assert any(
        "memory and disk of models/unknown are not estimated" in text for text in result.warnings
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-lora", "gemma-full"])
def test_a_finished_run_takes_the_disk_that_was_estimated(
    finished: Project, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from tests.support.training_runs import RUNS, list_files

    monkeypatch.chdir(finished.root)
    recipe = finished.recipe(*RUNS[name])
    size, _ = measured(recipe)
    paths = finished.paths(name)
    newest = max(
        paths.checkpoints_dir.iterdir(), key=lambda folder: int(folder.name.removeprefix("step-"))
    )
    optimizer = (newest / "optimizer.pt").stat().st_size
    weights = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    names = 2_000 * len(size.trained)  # the file formats' own bytes a tensor
    assert 2 * size.trained_bytes <= optimizer <= 2 * size.trained_bytes + names
    assert size.trained_bytes <= weights <= size.trained_bytes + names
    real = sum(path.stat().st_size for path in list_files(paths.run_dir))
    assert real < estimate_disk(recipe, size, Sharding(), derive_schedule(recipe, 22))
