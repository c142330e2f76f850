"""A new pad token gets rows that are the mean of the others; ends of turns are in the generation
settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from runner.data.tokenizer import load_tokenizer
from runner.model.load import add_pad_row, build_generation_config, load_model
from runner.recipe.parse import Recipe
from tests.conftest import ROOT, Project

TinyModel = Callable[[str], Path]
IDS = torch.arange(3, 60)[None]


@pytest.fixture
def recipe_of(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    monkeypatch.chdir(project.root)
    template = ROOT / "recipe_templates" / "chat" / "human_assistant.jinja"

    def build(family: str, *overrides: str) -> Recipe:
        project.add_model(family)
        chat = (f"model.chat_template={template}",) if family == "phi" else ()
        return project.recipe(f"model.path=models/{family}", *chat, *overrides)

    return build


def load(recipe: Recipe) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(recipe.model)
    return load_model(recipe, tokenizer).eval(), tokenizer


@torch.no_grad()
def log_probs(model: Any) -> torch.Tensor:
    return torch.log_softmax(model(IDS).logits[0, :-1].double(), dim=-1)[
        torch.arange(IDS.shape[1] - 1), IDS[0, 1:]
    ]


@pytest.mark.parametrize(("family", "is_tied"), [("gemma", True), ("llama", False)])
def test_a_new_row_is_the_mean_of_the_others(
    recipe_of: Callable[..., Recipe], family: str, is_tied: bool
) -> None:
    plain, _ = load(recipe_of(family))
    state = torch.get_rng_state()
    model, tokenizer = load(recipe_of(family, "model.pad_token=add"))
    assert torch.equal(torch.get_rng_state(), state), (
        "or the adapter would start from other random numbers"
    )
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(plain, layer)().weight, getattr(model, layer)().weight
        assert (old.shape[0], new.shape[0], model.config.vocab_size) == (512, 513, 513)
        assert torch.equal(new[:512], old)
        assert torch.equal(new[512], old.double().mean(dim=0).float())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied
    assert tokenizer.pad_token_id == 512


def test_a_bias_of_the_output_grows_too(
    tiny_model: TinyModel, recipe_of: Callable[..., Recipe]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("phi"))
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    bias = model.get_output_embeddings().bias.detach().clone()
    tokenizer = load_tokenizer(recipe_of("phi", "model.pad_token=add").model)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(64)])
    tokenizer.add_special_tokens({"pad_token": "<|last|>"})
    add_pad_row(model, tokenizer)
    grown = model.get_output_embeddings().bias
    assert torch.equal(grown[:576], bias) and torch.equal(grown[576], bias.double().mean().float())


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_the_base_scores_the_same_under_every_policy(
    recipe_of: Callable[..., Recipe], family: str
) -> None:
    expected = log_probs(load(recipe_of(family))[0])
    for policy in ("reserved", "e"):
        assert torch.equal(
            log_probs(load(recipe_of(family, f"model.pad_token={policy}"))[0]), expected
        )
    change = expected - log_probs(load(recipe_of(family, "model.pad_token=add"))[0])
    assert float(change.min()) >= 0 and float(change.max()) <= math.log1p(1 / 512), (
        "one more token in the softmax"
    )


def test_a_spare_row_is_taken_as_it_is(
    recipe_of: Callable[..., Recipe], tiny_model: TinyModel
) -> None:
    model, tokenizer = load(recipe_of("phi", "model.pad_token=add"))
    assert tokenizer.pad_token_id == 512 and model.config.vocab_size == 576
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("phi"), attn_implementation="eager")
    assert torch.equal(log_probs(model), log_probs(plain.eval()))
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [("gemma", ["<end_of_turn>", "<eos>"]), ("llama", ["<|eot_id|>", "<|end_of_text|>"])],
)
def test_generation_ends_where_a_turn_does(
    recipe_of: Callable[..., Recipe], family: str, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(recipe_of(family).model)
    base = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(expected[1]), temperature=0.7, top_p=0.9
    )
    config = build_generation_config(base, tokenizer)
    config.save_pretrained(tmp_path)  # a temperature without `do_sample` would be refused here
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == expected
    assert (config.pad_token_id, config.bos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    )
    assert (config.temperature, config.do_sample) == (0.7, True)
