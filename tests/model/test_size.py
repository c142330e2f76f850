"""Sizes from configurations alone, against real models, real adapters, real quantized weights and a
real forward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from runner.data.tokenizer import load_tokenizer
from runner.model.load import build_lora_config, load_model
from runner.model.size import (
    extend_curve,
    load_config,
    measure_model,
    trace_activations,
    trace_cache,
)
from runner.recipe.parse import Recipe, parse_recipe
from tests.conftest import RECIPE_TEXT

FAMILIES = ("gemma", "gemma2", "llama", "mistral", "phi")
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
FULL = ("adapter.method=none",)
NF4 = "quantization={method: 4bit, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16, "
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": FULL,
    "full in bfloat16": (*FULL, "model.dtype=bfloat16"),
    "all-linear": (),
    "two modules": ("adapter.target_modules=[q_proj,v_proj]", "adapter.r=7"),
    "dora and bias": ("adapter.use_dora=true", "adapter.bias=lora_only"),
    "nf4": (NF4 + "bnb_4bit_use_double_quant: false}", "model.dtype=bfloat16"),
    "nf4, double": (NF4 + "bnb_4bit_use_double_quant: true}", "model.dtype=bfloat16"),
}


def recipe_of(model_dir: Path, folder: Path, *overrides: str) -> Recipe:
    (folder / "chat.jinja").write_text(TEMPLATE)
    return parse_recipe(
        RECIPE_TEXT,
        where="recipe.yaml",
        overrides=(
            f"model.path={model_dir}",
            f"model.chat_template={folder / 'chat.jinja'}",
            *overrides,
        ),
    )


def real_model(recipe: Recipe, tokenizer: Any) -> Any:
    return load_model(recipe, tokenizer)


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def stored_bytes(model: torch.nn.Module) -> int:
    """Parameters, buffers and the scales of quantized weights."""
    total = sum(map(tensor_bytes, model.parameters())) + sum(map(tensor_bytes, model.buffers()))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += tensor_bytes(state.absmax) + tensor_bytes(state.code)
            if state.nested:
                total += (
                    tensor_bytes(state.offset)
                    + tensor_bytes(state.state2.absmax)
                    + tensor_bytes(state.state2.code)
                )
    return total


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_bytes_are_those_of_the_real_model(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, setting: str
) -> None:
    recipe = recipe_of(tiny_model(family), tmp_path, *SETTINGS[setting])
    tokenizer = load_tokenizer(recipe.model)
    size = measure_model(recipe, load_config(recipe, tokenizer))
    model = real_model(recipe, tokenizer)
    if recipe.quantization.method == "none":
        assert size.num_base_parameters == model.num_parameters()
    assert size.base_bytes == stored_bytes(model)
    lora = build_lora_config(recipe)
    adapted = model if lora is None else get_peft_model(model, lora)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert {tensor.name: tensor.num_elements for tensor in size.trained} == trained


@pytest.mark.parametrize("setting", ["full", "all-linear"])
@pytest.mark.parametrize("family", ["gemma2", "llama", "phi"])
def test_activations_are_those_that_a_real_forward_keeps(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, setting: str
) -> None:
    recipe = recipe_of(tiny_model(family), tmp_path, *SETTINGS[setting])
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe, tokenizer)
    curve = trace_activations(recipe, config, batch_size=2)
    estimated = curve.rest_bytes(300) + config.num_hidden_layers * curve.layer_bytes(300)

    lora = build_lora_config(recipe)
    model = real_model(recipe, tokenizer)
    model = (model if lora is None else get_peft_model(model, lora)).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone = (model if lora is None else model.get_base_model()).base_model
        output = backbone(input_ids=torch.ones((2, 300), dtype=torch.long), use_cache=False)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept
    }
    real = sum(size for key, size in storages.items() if key not in own)
    assert output is not None
    assert estimated == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("family", "setting"),
    [("gemma2", ()), ("phi", ("adapter.method=none", "training.bf16=true"))],
)
def test_two_batches_say_what_autograd_keeps_of_any(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, setting: tuple[str, ...]
) -> None:
    recipe = recipe_of(tiny_model(family), tmp_path, *setting)
    config = load_config(recipe, load_tokenizer(recipe.model))
    one, two, seven = (trace_activations(recipe, config, size) for size in (1, 2, 7))
    extended = extend_curve(one, two, 6)
    assert extended.layer_bytes(700) == seven.layer_bytes(700) > one.layer_bytes(700)
    assert extended.rest_bytes(700) == seven.rest_bytes(700)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_an_answer_is_that_of_a_real_model(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, dtype: str
) -> None:
    recipe = recipe_of(tiny_model(family), tmp_path, f"model.dtype={dtype}")
    tokenizer = load_tokenizer(recipe.model)
    model = real_model(recipe, tokenizer).eval()
    num_rows, num_tokens = 3, 5  # shorter than any sliding window
    ids = torch.ones((num_rows, num_tokens), dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    real = sum(tensor_bytes(one) for layer in cache.layers for one in (layer.keys, layer.values))
    token_bytes = trace_cache(recipe, load_config(recipe, tokenizer))
    assert num_rows * num_tokens * token_bytes == real
