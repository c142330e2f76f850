"""The weights of the small models: random ones for tests, trained ones for the demo.

A tiny model is random and takes a fraction of a second to build, without a network. A base model of
the demo is trained in a process with one thread, which `models` starts. It learns the English of
`corpus` in the chat format of its family: enough to know the words, to follow the format and to
copy a name from a prompt, but nothing about the task of the demo data set.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from runner.demo.corpus import Message, general_exchanges
from runner.demo.families import FAMILIES, MODEL_MAX_LENGTH, build_tokenizer
from runner.demo.plans import TINY, ModelShape, Pretraining


def build_model(
    family_name: str, tokenizer: PreTrainedTokenizerFast, size: ModelShape, *, seed: int = 0
) -> PreTrainedModel:
    """A float32 model with random weights that fits the tokenizer; the global random state is left
    unchanged.
    """
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
    """Fill `output_dir` with a random model of under 0.3M parameters and its tokenizer; returns it.

    `family` is one of `FAMILIES`. The same seed gives the same bytes; all seeds share one
    tokenizer.
    """
    texts = [message["content"] for messages in general_exchanges(1000) for message in messages]
    tokenizer = build_tokenizer(family, texts, vocab_size=TINY.vocab_size)
    build_model(family, tokenizer, TINY, seed=seed).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir


@dataclass(frozen=True)
class Example:
    """One exchange in the chat format; the first `num_prompt_tokens` ids are the prompt."""

    input_ids: list[int]
    num_prompt_tokens: int


def _encode(tokenizer: PreTrainedTokenizerFast, exchanges: list[list[Message]]) -> list[Example]:
    def token_ids(count: int, add_generation_prompt: bool) -> list[list[int]]:
        texts = [
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
            for messages in exchanges
        ]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    whole, prompts = token_ids(2, False), token_ids(1, True)
    return [Example(ids, len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)]


def _collate(
    examples: list[Example], pad_token_id: int, prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and loss weights, both [batch, longest example]; padding has weight 0."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)
    weights = torch.zeros(len(examples), longest)
    for row, example in enumerate(examples):
        num_tokens = len(example.input_ids)
        input_ids[row, :num_tokens] = torch.tensor(example.input_ids)
        weights[row, : example.num_prompt_tokens] = prompt_weight
        weights[row, example.num_prompt_tokens : num_tokens] = 1.0
    return input_ids, weights


def _batches(examples: list[Example], batch_size: int, seed: int) -> list[list[Example]]:
    """Batches in random order. Examples are sorted by length within pools of four batches, which is
    a quarter faster.
    """
    rng = random.Random(seed)
    batches = []
    for start in range(0, len(examples), 4 * batch_size):
        pool = sorted(
            examples[start : start + 4 * batch_size], key=lambda example: len(example.input_ids)
        )
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


def _pretrain(
    model: PreTrainedModel, batches: list[list[Example]], plan: Pretraining
) -> tuple[float, float]:
    """Train in place; returns the mean weighted losses (nats per token) of the first and of the
    last 20 steps.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = plan.num_warmup_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.05, 1 - step / plan.num_steps))
    )
    losses = []
    model.train()
    for batch in batches:
        input_ids, weights = _collate(batch, model.config.pad_token_id, plan.prompt_weight)
        logits = model(input_ids=input_ids).logits[:, :-1]
        token_losses = cross_entropy(
            logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
        )
        token_weights = weights[:, 1:].flatten()
        loss = (token_losses * token_weights).sum() / token_weights.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    first, last = losses[:20], losses[-20:]
    return sum(first) / len(first), sum(last) / len(last)


def train_base_model(family: str, output_dir: Path, plan: Pretraining) -> dict[str, float]:
    """Fill `output_dir` with a trained base model; returns its number of parameters and its loss
    before and after training.
    """
    disable_progress_bar()
    # Sums depend on the number of threads, and the models are too small to gain from two.
    torch.set_num_threads(1)
    exchanges = list(general_exchanges(plan.num_steps * plan.batch_size, seed=plan.seed))
    texts = [message["content"] for messages in exchanges for message in messages]
    tokenizer = build_tokenizer(family, texts, vocab_size=plan.size.vocab_size)
    model = build_model(family, tokenizer, plan.size, seed=plan.seed)
    batches = _batches(_encode(tokenizer, exchanges), plan.batch_size, plan.seed)
    first_loss, last_loss = _pretrain(model, batches, plan)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "first_loss": first_loss,
        "last_loss": last_loss,
    }
