"""QLoRA on the CPU: NF4 weights, double quantization, bfloat16 compute, paged optimizers,
evaluations in the middle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runner.data.tokenizer import load_tokenizer
from runner.files import load_json
from runner.model.load import build_lora_config, build_quantization_config, load_model
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.training_runs import (
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_log,
    read_losses,
    read_result,
)

NF4 = (
    "quantization={method: 4bit, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true,"
    " bnb_4bit_compute_dtype: bfloat16}"
)
QLORA = (
    NF4,
    "model.path=models/llama",
    "model.pad_token=add",
    "model.dtype=bfloat16",
    "training.bf16=true",
    "training.optim=paged_adamw_8bit",
    "adapter.lora_dropout=0.1",
)
OTHER_OPTIMIZER = (
    *(one for one in QLORA if "optim" not in one),
    "training.optim=paged_adamw_32bit",
    "training.max_grad_norm=0.3",
)


@pytest.fixture(scope="session")
def qlora(workplace: Project) -> RunPaths:
    """A QLoRA run, uninterrupted. The same worker forks one with the other optimizer."""
    workplace.add_model("llama")
    workplace.write_recipe("qlora/qlora.yaml", *QLORA)
    workplace.write_recipe("qlora/qlora-32bit.yaml", *OTHER_OPTIMIZER)
    done = workplace.cli("sweep", "qlora")
    assert done.returncode == 0, done.stdout + done.stderr
    return workplace.paths("qlora")


@pytest.fixture
def four_bit_model(project: Project, monkeypatch: pytest.MonkeyPatch) -> Any:
    project.add_model("llama")
    monkeypatch.chdir(project.root)
    recipe = project.recipe(*QLORA)
    model = get_peft_model(
        load_model(recipe, load_tokenizer(recipe.model)), build_lora_config(recipe)
    )
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # of the dropout
    ids = torch.arange(3, 40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def evaluate_once(model: torch.nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None])


def test_gradients_survive_an_evaluation(four_bit_model: Any) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks a 4-bit layer at its first evaluation; no
    gradient passes then.
    """
    for name, module in four_bit_model.named_modules():
        # Zero at first, which would hide the layers below from the gradient.
        if name.endswith("lora_B.default"):
            torch.nn.init.normal_(module.weight, std=0.1)
    before = gradients(four_bit_model)
    evaluate_once(four_bit_model)
    after = gradients(four_bit_model)
    layers = [module for module in four_bit_model.modules() if isinstance(module, Linear4bit)]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * len(layers)
    assert before.keys() == after.keys() and len(before) == 2 * len(layers)
    assert all(float(gradient.abs().max()) > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_qlora_trains_and_exports_a_float32_adapter(workplace: Project, qlora: RunPaths) -> None:
    result, losses = read_result(qlora), read_losses(qlora)
    assert result.num_steps == 12 and len(losses) == 12
    assert result.best_metric < result.base["validation"].nll_per_completion_token - 0.02
    tensors = load_file(qlora.model_dir / "adapter_model.safetensors")
    adapter = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    assert len(adapter) == 28 and {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    embeddings = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert tensors.keys() - adapter.keys() == embeddings, "with the row of the added pad token"
    assert {(tensors[name].shape[0], tensors[name].dtype) for name in embeddings} == {
        (513, torch.bfloat16)
    }
    recipe = workplace.recipe(*QLORA)
    base = AutoModelForCausalLM.from_pretrained(
        workplace.root / recipe.model.path,
        quantization_config=build_quantization_config(recipe),
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    base.resize_token_embeddings(513)
    model = PeftModel.from_pretrained(base, qlora.model_dir)
    loaded = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert len(loaded) == 28
    for name, weight in loaded.items():
        torch.testing.assert_close(
            weight.float(), adapter[name.replace(".default", "")], rtol=1e-2, atol=1e-3
        )


@pytest.mark.slow
def test_qlora_merges_into_weights_that_are_not_quantized(
    workplace: Project, qlora: RunPaths
) -> None:
    done = workplace.cli("export", qlora.run_dir, "--output", "merged-qlora", "--merge")
    assert done.returncode == 0, done.stderr
    weights = load_file(workplace.root / "merged-qlora" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "quantization_config" not in load_json(workplace.root / "merged-qlora" / "config.json")
    model = AutoModelForCausalLM.from_pretrained(workplace.root / "merged-qlora")
    assert model.get_input_embeddings().weight.shape == (513, 64)


@pytest.mark.slow
def test_qlora_resumes_exactly(workplace: Project, qlora: RunPaths) -> None:
    paths = launch_killed_at(
        workplace, "qlora-killed", *QLORA, event="os.rename", path="step-8/COMMITTED.json"
    )
    launch(workplace, "qlora-killed", *QLORA)
    assert "resuming from step 4" in read_log(paths)
    assert_same_outputs(paths, qlora)


@pytest.mark.slow
def test_other_paged_optimizer(workplace: Project, qlora: RunPaths) -> None:
    result = read_result(workplace.paths("qlora-32bit"))
    assert result.best_metric < result.base["validation"].nll_per_completion_token - 0.02
    assert result.base == read_result(qlora).base
