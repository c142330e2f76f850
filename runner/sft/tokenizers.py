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
_NEW_PAD: Final = "<|pad|>"


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
    set_pad_token(tokenizer, model)
    tokenizer.padding_side = "right"
    return tokenizer


def set_pad_token(tokenizer: Any, model: ModelSection) -> None:
    """Give the tokenizer the recipe's pad token, else its own, else a reserved one, else a new one; in no case eos.

    A new token takes a row that the embedding has beyond the vocabulary (Phi-2 has 51,200 rows for 50,295 tokens), so
    no weight changes its shape.
    """
    own = None if tokenizer.pad_token == tokenizer.eos_token else tokenizer.pad_token
    vocabulary = tokenizer.get_vocab()
    reserved = [token for token in _RESERVED_PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
    token = model.pad_token if model.pad_token != "auto" else next(iter([*([own] if own else []), *reserved]), _NEW_PAD)
    if token == tokenizer.eos_token:
        raise DataError(f"`model.pad_token` {token!r} is the end-of-sequence token of {model.path}")
    if token not in vocabulary and len(tokenizer) >= (num_rows := _count_embedding_rows(model)):
        raise DataError(
            f"the pad token {token!r} is not in the vocabulary of {model.path}, whose {num_rows} embedding rows are "
            "all taken",
            hint="name a token of the vocabulary that your data never uses in `model.pad_token`",
        )
    tokenizer.add_special_tokens({"pad_token": token})


def _count_embedding_rows(model: ModelSection) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model.path, revision=model.revision).get_text_config().vocab_size)
