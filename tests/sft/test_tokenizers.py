"""The pad token is never eos, and never changes the shape of a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import DataError
from runner.recipe_sections import ModelSection
from runner.sft.tokenizers import load_tokenizer

HUMAN_ASSISTANT = str(Path(__file__).parents[2] / "recipe_templates" / "chat" / "human_assistant.jinja")
TinyModel = Callable[[str], Path]


def test_a_model_keeps_its_own_pad_token(tiny_model: TinyModel) -> None:
    tokenizer = load_tokenizer(ModelSection(path=str(tiny_model("gemma")), dtype="float32"))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<pad>", "right")


def test_a_model_without_one_gets_a_spare_embedding_row(tiny_model: TinyModel) -> None:
    from transformers import AutoConfig

    path = str(tiny_model("phi"))
    tokenizer = load_tokenizer(ModelSection(path=path, dtype="float32", chat_template=HUMAN_ASSISTANT))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < AutoConfig.from_pretrained(path).vocab_size


def test_a_reserved_token_comes_before_a_new_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.pad_token = tokenizer.eos_token  # as many published tokenizers have it
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSection(path=str(tmp_path), dtype="float32")).pad_token == "<|finetune_right_pad_id|>"


def test_pad_tokens_that_cannot_be_are_refused(tiny_model: TinyModel) -> None:
    path = str(tiny_model("llama"))
    with pytest.raises(DataError, match="embedding rows are all taken"):
        load_tokenizer(ModelSection(path=path, dtype="float32", pad_token="<nope>"))
    with pytest.raises(DataError, match="is the end-of-sequence token"):
        load_tokenizer(ModelSection(path=path, dtype="float32", pad_token="<|eot_id|>"))


def test_a_model_without_a_chat_template_needs_one(tiny_model: TinyModel) -> None:
    with pytest.raises(DataError, match="has no chat template") as caught:
        load_tokenizer(ModelSection(path=str(tiny_model("phi")), dtype="float32"))
    assert "human_assistant.jinja" in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load the tokenizer of"):
        load_tokenizer(ModelSection(path=str(tmp_path), dtype="float32"))
