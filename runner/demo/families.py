"""Owns the tokenizer and the chat format of a model family: special tokens, BPE, chat template.

A family has the special tokens, the kind of tokenizer and the chat format of the real one, and a
vocabulary learned on the spot from any text. `weights` owns the weights.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

MODEL_MAX_LENGTH = 2048

_ROLES_ALTERNATE = """\
{%- for message in conversation %}
    {%- if message['role'] != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('Roles must alternate: user, assistant, user, assistant, ...') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA_CHAT_TEMPLATE = (
    """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- set conversation = messages %}
"""
    + _ROLES_ALTERNATE
    + """\
{%- for message in conversation %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""
)

LLAMA_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL_CHAT_TEMPLATE = (
    """\
{{- bos_token }}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- set conversation = messages[1:] if system else messages %}
"""
    + _ROLES_ALTERNATE
    + """\
{%- for message in conversation %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
)


@dataclass(frozen=True)
class Family:
    """One model family: its architecture, tokenizer and chat format."""

    config_class: type[PreTrainedConfig]
    special_tokens: tuple[str, ...]
    """The special tokens in the order of their ids, which start at 0."""
    bos_token: str
    eos_token: str
    pad_token: str | None
    unk_token: str | None
    stop_tokens: tuple[str, ...]
    """All tokens that end a generation: the end of a turn and the end of the text."""
    chat_template: str | None
    is_byte_level: bool
    """True for byte-level BPE as in Llama 3; false for BPE with a visible space and byte fallback,
    as in Gemma.
    """
    starts_with_space: bool = False
    """True if the first word gets a space, as in Mistral; only used if `is_byte_level` is false."""
    ties_embeddings: bool = False
    adds_bos: bool = True


_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def _gemma(config_class: type[PreTrainedConfig]) -> Family:
    return Family(
        config_class=config_class,
        special_tokens=_GEMMA_TOKENS,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        stop_tokens=("<eos>", "<end_of_turn>"),
        chat_template=GEMMA_CHAT_TEMPLATE,
        is_byte_level=False,
        ties_embeddings=True,
    )


FAMILIES: dict[str, Family] = {
    "gemma": _gemma(GemmaConfig),
    "gemma2": _gemma(Gemma2Config),
    "llama": Family(
        config_class=LlamaConfig,
        special_tokens=_LLAMA_TOKENS,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        unk_token=None,
        stop_tokens=("<|end_of_text|>", "<|eot_id|>"),
        chat_template=LLAMA_CHAT_TEMPLATE,
        is_byte_level=True,
    ),
    "mistral": Family(
        config_class=MistralConfig,
        special_tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        stop_tokens=("</s>",),
        chat_template=MISTRAL_CHAT_TEMPLATE,
        is_byte_level=False,
        starts_with_space=True,
    ),
    "phi": Family(
        config_class=PhiConfig,
        special_tokens=("<|endoftext|>",),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token=None,
        unk_token="<|endoftext|>",
        stop_tokens=("<|endoftext|>",),
        chat_template=None,
        is_byte_level=True,
        adds_bos=False,
    ),
}


def _byte_level_bpe(family: Family, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(family.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _visible_space_bpe(family: Family, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE as SentencePiece does it for Gemma and Mistral: `▁` for a space, lone digits, byte
    fallback.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE())
    space = pre_tokenizers.Metaspace(
        prepend_scheme="first" if family.starts_with_space else "never"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            space,
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(byte_tokens),
        special_tokens=list(family.special_tokens),
        initial_alphabet=list(string.digits + string.ascii_letters + string.punctuation),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    # Insert the byte tokens by hand: the trainer would add them as special tokens, which decoding
    # then skips.
    trained = json.loads(tokenizer.to_str())["model"]
    num_special = len(family.special_tokens)
    learned = sorted(trained["vocab"], key=trained["vocab"].__getitem__)[num_special:]
    pieces = [*family.special_tokens, *byte_tokens, *learned]
    tokenizer.model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=family.unk_token,
        byte_fallback=True,
        fuse_unk=True,
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family.starts_with_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def build_tokenizer(
    family_name: str, texts: Iterable[str], *, vocab_size: int
) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with at most `vocab_size` tokens, learned from `texts`; special
    tokens come first.
    """
    family = FAMILIES[family_name]
    build = _byte_level_bpe if family.is_byte_level else _visible_space_bpe
    tokenizer = build(family, texts, vocab_size)
    if family.adds_bos:
        bos_id = tokenizer.token_to_id(family.bos_token)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos_token} $A",
            pair=f"{family.bos_token} $A {family.bos_token} $B",
            special_tokens=[(family.bos_token, bos_id)],
        )
    named = {"bos_token": family.bos_token, "eos_token": family.eos_token}
    if family.pad_token:
        named["pad_token"] = family.pad_token
    if family.unk_token:
        named["unk_token"] = family.unk_token
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[
            token for token in family.special_tokens if token not in named.values()
        ],
        **named,
    )
    fast.chat_template = family.chat_template
    return fast
