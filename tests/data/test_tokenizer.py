"""The pad token under each policy, which is never eos, and the format of chats."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from runner.data.chat_template import METHOD_TEXT, ChatFormat, ChatTemplate
from runner.data.masking import ConversationMasker, end_of_turn_ids
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


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DATED = (
    "{{- mood ~ ' ' ~ strftime_now('%d.%m.%Y') }}"
    "{% for m in messages %}{{- '<start_of_turn>' + m.content }}{% endfor %}"
)


def test_every_rendering_of_a_recipes_tokenizer_is_in_its_format(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text(DATED)
    model = ModelSection(
        path=str(tiny_model("gemma")),
        dtype="float32",
        chat_template=str(tmp_path / "chat.jinja"),
        chat_template_kwargs={"mood": "fine"},
        template_date="2001-02-03",
        end_of_turn="<end_of_turn>",
    )
    tokenizer = load_tokenizer(model)
    assert tokenizer.chat_format == ChatFormat(
        {"mood": "fine"},
        datetime(2001, 2, 3),
        "<end_of_turn>",
        frozenset({"<eos>", "<end_of_turn>"}),
    )
    expected = "fine 03.02.2001<start_of_turn>q<start_of_turn>a<end_of_turn>"
    masked = ConversationMasker(tokenizer).mask(CHAT)
    assert masked.text == expected == ChatTemplate(tokenizer).render(CHAT, METHOD_TEXT)
    assert masked.text[slice(*masked.completion_chars[0])] == "a<end_of_turn>"
    assert end_of_turn_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("<end_of_turn>"),)
    prompt = ChatTemplate(tokenizer).render(CHAT[:1], METHOD_TEXT, add_generation_prompt=True)
    assert prompt == "fine 03.02.2001<start_of_turn>q"
    # The saved template is that of the file, without changes by the recipe.
    tokenizer.save_pretrained(tmp_path / "saved")
    files = [file.read_text() for file in (tmp_path / "saved").glob("*.json*")]
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == DATED
    assert not any("mood" in text or "chat_format" in text for text in files)


def test_an_end_of_turn_is_a_token(tiny_model: TinyModel) -> None:
    def load(end_of_turn: str) -> None:
        path = str(tiny_model("gemma"))
        load_tokenizer(ModelSection(path=path, dtype="float32", end_of_turn=end_of_turn))

    load("<end_of_turn>")
    for text in ("<|never|>", "<eos><eos>"):
        with pytest.raises(DataError, match=r"`model.end_of_turn` .* is not a token of") as caught:
            load(text)
        assert "its end-of-text token is '<eos>'" in str(caught.value)
