"""Owns the weights of the small models of the tests and of the demo, before any training.

A tiny model is random and takes a fraction of a second to build, without a network. `demo_models`
trains larger ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from runner.sft.demo_corpus import general_exchanges
from runner.sft.model_plans import TINY, ModelSize
from runner.sft.tiny_families import FAMILIES, MODEL_MAX_LENGTH, build_tokenizer


def build_model(
    family_name: str, tokenizer: PreTrainedTokenizerFast, size: ModelSize, *, seed: int = 0
) -> PreTrainedModel:
    """A float32 model with random weights that fits the tokenizer; global random state stays as it was."""
    family = FAMILIES[family_name]
    head_dim = size.hidden_size // size.num_attention_heads
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "max_position_embeddings": MODEL_MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": family.ties_embeddings,
    }
    if family.config_class is PhiConfig:
        settings["vocab_size"] = len(tokenizer) // 64 * 64 + 64  # spare rows, as Phi-2 has
    else:
        settings["head_dim"] = head_dim
    if family.config_class is Gemma2Config:
        settings["query_pre_attn_scalar"] = head_dim
    config = family.config_class(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in family.stop_tokens],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def build_tiny_model(family: str, output_dir: Path, *, seed: int = 0) -> Path:
    """`output_dir`, filled with a random model of under 0.3M parameters and its tokenizer.

    `family` is one of `FAMILIES`. The same seed gives the same bytes; all seeds share one tokenizer.
    """
    texts = [message["content"] for messages in general_exchanges(1000) for message in messages]
    tokenizer = build_tokenizer(family, texts, vocab_size=TINY.vocab_size)
    build_model(family, tokenizer, TINY, seed=seed).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir
