"""The tokenizer of a recipe, with its chat template and a pad token that is never silently the
end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from runner.data.chat_template import ChatFormat, get_chat_format
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.hub import load_arguments
from runner.recipe.schema import ModelSection
from runner.strict import thaw

# Tokens that model families reserve and never train, in the order of preference.
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
    """The fast tokenizer with the recipe's chat template and pad token, and its chat format.

    Raises:
        DataError: there is no such tokenizer, no chat template, or no pad token that fits
            `model.pad_token`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, trust_remote_code=False, **load_arguments(model)
        )
    # Transformers raises a dozen unrelated kinds of errors, depending on the content of the folder.
    except Exception as error:
        raise DataError(
            f"cannot load the tokenizer of {model.path!r}:"
            f" {str(error).strip().partition(chr(10))[0]}",
            hint=(
                "set `model.path` to a local folder or a hub id; gated models need a token in the"
                " environment; models with custom code are not supported"
            ),
        ) from error
    if model.chat_template is not None:
        tokenizer.chat_template = Path(model.chat_template).read_text()
    if not tokenizer.chat_template:
        raise DataError(
            f"{model.path} has no chat template of its own",
            hint=(
                "name one in `model.chat_template`, for example"
                " recipe_templates/chat/human_assistant.jinja"
            ),
        )
    set_pad_token(tokenizer, model)
    tokenizer.padding_side = "right"
    set_chat_format(tokenizer, model)
    return tokenizer


def hash_tokenizer(tokenizer: Any) -> str:
    """A hash of everything in a fast tokenizer, as it is in memory, that the text and the tokens of
    a chat depend on.
    """
    chat_format = get_chat_format(tokenizer)
    kind = type(tokenizer)
    return hash_json(
        {
            # Vocabulary, added tokens, normalization and everything else that tokenizes a text.
            "tokens": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "settings": {
                name: value
                for name, value in tokenizer.init_kwargs.items()
                if isinstance(value, bool | int)
            },
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "all_special": [str(token) for token in tokenizer.all_special_tokens],
            "template": tokenizer.chat_template,
            "template_kwargs": dict(chat_format.template_kwargs),
            "moment": str(chat_format.moment),
            "end_of_turn": chat_format.end_of_turn,
            "stop_tokens": sorted(chat_format.stop_tokens),
        }
    )


def set_chat_format(tokenizer: Any, model: ModelSection) -> None:
    """Store the recipe's chat format in the tokenizer, where every rendering finds it.

    Raises:
        DataError: `model.end_of_turn` is not a single token of the tokenizer.
    """
    end = model.end_of_turn
    if end is not None and tokenizer.tokenize(end) != [end]:
        raise DataError(
            f"`model.end_of_turn` {end!r} is not a token of {model.path}: a model could not learn"
            " to stop at it",
            hint=f"use a token of the model; its end-of-text token is {tokenizer.eos_token!r}",
        )
    day = model.template_date
    tokenizer.chat_format = ChatFormat(
        template_kwargs=thaw(model.chat_template_kwargs),
        moment=None if day is None else datetime.fromisoformat(day),
        end_of_turn=end,
        stop_tokens=frozenset(load_stop_tokens(tokenizer, model)),
    )


def load_stop_tokens(tokenizer: Any, model: ModelSection) -> list[str]:
    """The tokens at which generation with the base model's own settings stops: eos, and those in
    its generation config.
    """
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    try:
        stated = GenerationConfig.from_pretrained(model.path, **load_arguments(model)).eos_token_id
    except (OSError, ValueError):
        stated = None
    ids |= set(stated) if isinstance(stated, list) else {stated}
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids - {None}))]


def set_pad_token(tokenizer: Any, model: ModelSection) -> None:
    """Set the pad token that `model.pad_token` selects; it is never eos.

    A token that is not in the vocabulary gets the next id. If the embedding has a spare row for it
    (Phi-2 has 51,200 rows for 50,295 tokens), no weight changes; otherwise `model.add_pad_row` adds
    a row.

    Raises:
        DataError: the token is eos, or `reserved` finds none.
    """
    vocabulary = tokenizer.get_vocab()
    usable = [
        token
        for token in (tokenizer.pad_token, *_RESERVED_PAD_TOKENS)
        if token in vocabulary and token != tokenizer.eos_token
    ]
    policy = model.pad_token
    if policy == "reserved" and not usable:
        raise DataError(
            f"the vocabulary of {model.path} has no reserved token to pad with",
            hint=(
                "name a token that your data never uses in `model.pad_token`, or set"
                " `model.pad_token: add`"
            ),
        )
    if policy in ("auto", "reserved") and usable:
        token = usable[0]
    elif policy in ("auto", "add"):
        token = next(name for name in _new_names() if name not in vocabulary)
    else:
        token = policy
    if token == tokenizer.eos_token:
        raise DataError(
            f"`model.pad_token` {token!r} is the end-of-sequence token of {model.path}: masking"
            " padding would also mask the ends of answers",
            hint="set `model.pad_token: auto`, which finds or adds another token",
        )
    tokenizer.add_special_tokens({"pad_token": token})


def _new_names() -> Iterator[str]:
    return (
        _NEW_PAD if number == 1 else _NEW_PAD.replace("pad", f"pad_{number}")
        for number in itertools.count(1)
    )
