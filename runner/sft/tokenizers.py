"""The tokenizer of a recipe: its chat template and a pad token that is never silently the end-of-sequence token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from runner.errors import DataError
from runner.recipe import ModelSection

# Tokens that model families reserve and never train, in the order in which they are tried.
_RESERVED_PAD_TOKENS: Final = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<unused0>",
    "[control_8]",
    "<unk>",
)


def load_tokenizer(model: ModelSection) -> Any:
    """The fast tokenizer with the recipe's chat template and pad token.

    Raises:
        DataError: no such tokenizer, no chat template, or no pad token that differs from eos.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load the tokenizer of {model.path!r}: {str(error).splitlines()[0]}",
            hint="`model.path` is a local folder or a hub id; gated models need a token in the environment",
        ) from error
    if model.chat_template is not None:
        tokenizer.chat_template = Path(model.chat_template).read_text()
    if not tokenizer.chat_template:
        raise DataError(
            f"{model.path} has no chat template of its own",
            hint="name one in `model.chat_template`, for example recipe_templates/chat/human_assistant.jinja",
        )
    tokenizer.pad_token = choose_pad_token(tokenizer, model)
    tokenizer.padding_side = "right"
    return tokenizer


def choose_pad_token(tokenizer: Any, model: ModelSection) -> str:
    """The pad token: the recipe's, else the tokenizer's own, else a reserved one; in no case eos."""
    vocabulary = tokenizer.get_vocab()
    if model.pad_token != "auto":
        if model.pad_token not in vocabulary:
            raise DataError(f"`model.pad_token` {model.pad_token!r} is not in the vocabulary of {model.path}")
        if model.pad_token == tokenizer.eos_token:
            raise DataError(f"`model.pad_token` {model.pad_token!r} is the end-of-sequence token of {model.path}")
        return model.pad_token
    own = tokenizer.pad_token
    if own is not None and own != tokenizer.eos_token:
        return str(own)
    for token in _RESERVED_PAD_TOKENS:
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    spare = [t for t, i in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1]) if t.isspace()]
    if spare:  # Phi-2 has runs of spaces and tabs as added tokens; the longest hardly occurs in text
        return str(max(spare, key=len))
    raise DataError(
        f"{model.path} has no pad token that differs from its end-of-sequence token {tokenizer.eos_token!r}",
        hint="name a token of the vocabulary that your data never uses in `model.pad_token`",
    )
