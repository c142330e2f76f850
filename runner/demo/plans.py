"""The dimensions of the small models, and the training plan of the demo's base models. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a model. Multiples of 64 let 4-bit NF4 quantize every linear layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


TINY = ModelShape(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)

DEMO_SIZE = ModelShape(
    vocab_size=768,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
)


@dataclass(frozen=True)
class Pretraining:
    """The training plan of a base model. Measured: two wide layers learn to copy sooner than four
    narrow ones.
    """

    size: ModelShape = DEMO_SIZE
    num_steps: int = 300
    batch_size: int = 16
    learning_rate: float = 3e-3
    num_warmup_steps: int = 20
    prompt_weight: float = 0.2
    """Weight of a prompt token in the loss; a completion token has weight 1. Prompts are mostly
    random facts.
    """
    seed: int = 0
