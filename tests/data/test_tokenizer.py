"""Which pad token each policy gives; never eos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.data.tokenizer import load_tokenizer
from runner.errors import DataError
from runner.recipe.schema import ModelSection
from tests.conftest import ROOT

HUMAN_ASSISTANT = str(ROOT / "recipe_templates" / "chat" / "human_assistant.jinja")
TinyModel = Callable[[str], Path]


def test_a_model_keeps_its_own_pad_token(tiny_model: TinyModel) -> None:
    tokenizer = load_tokenizer(ModelSection(path=str(tiny_model("gemma")), dtype="float32"))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<pad>", "right")


def test_an_added_token_is_new_and_takes_the_next_id(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = str(tiny_model("llama"))
    tokenizer = load_tokenizer(ModelSection(path=path, dtype="float32", pad_token="add"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 512)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(ModelSection(path=str(tmp_path), dtype="float32", pad_token="add"))
    assert (again.pad_token, again.pad_token_id) == ("<|pad_2|>", 513)


def test_reserved_adds_nothing(tiny_model: TinyModel) -> None:
    def phi(policy: str) -> ModelSection:
        return ModelSection(
            path=str(tiny_model("phi")),
            dtype="float32",
            chat_template=HUMAN_ASSISTANT,
            pad_token=policy,
        )

    with pytest.raises(DataError, match="no reserved token to pad with") as caught:
        load_tokenizer(phi("reserved"))
    assert "`model.pad_token: add`" in str(caught.value)
    assert load_tokenizer(phi("auto")).pad_token == "<|pad|>"
    assert load_tokenizer(phi("\u0100")).pad_token_id < 512, "a token of the vocabulary"
    reserved = load_tokenizer(
        ModelSection(path=str(tiny_model("gemma")), dtype="float32", pad_token="reserved")
    )
    assert reserved.pad_token == "<pad>"


@pytest.mark.parametrize("policy", ["auto", "reserved"])
def test_a_reserved_token_comes_before_eos_and_before_a_new_one(
    tiny_model: TinyModel, tmp_path: Path, policy: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.pad_token = tokenizer.eos_token  # as many published tokenizers have it
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSection(path=str(tmp_path), dtype="float32", pad_token=policy))
    assert loaded.pad_token == "<|finetune_right_pad_id|>" and len(loaded) == 512


def test_eos_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(DataError, match="is the end-of-sequence token"):
        load_tokenizer(
            ModelSection(path=str(tiny_model("llama")), dtype="float32", pad_token="<|eot_id|>")
        )


def test_a_model_without_a_chat_template_needs_one(tiny_model: TinyModel) -> None:
    with pytest.raises(DataError, match="has no chat template") as caught:
        load_tokenizer(ModelSection(path=str(tiny_model("phi")), dtype="float32"))
    assert "human_assistant.jinja" in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load the tokenizer of"):
        load_tokenizer(ModelSection(path=str(tmp_path), dtype="float32"))
