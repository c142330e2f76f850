"""Our additions to TRL's trainer; the runs of `test_train.py` show that it trains."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from runner.sft.trainer import RunTrainer
from tests.conftest import Project
from tests.support.contexts import open_context


def test_each_micro_batch_is_a_sign_of_life(project: Project) -> None:
    """Without a model, the trainer stops there."""
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.context = open_context(project)
    path = trainer.context.attempt.progress_path
    path.write_text("{}")
    os.utime(path, (1, 1))
    with pytest.raises(AttributeError):
        trainer.training_step(None, {})
    assert path.stat().st_mtime > 1


def test_the_floating_point_operations_are_those_that_transformers_counts() -> None:
    """They are in the state of each checkpoint."""
    trainer = RunTrainer.__new__(RunTrainer)
    trainer._flops_per_token, trainer.is_deepspeed_enabled = None, False
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    trainer.model = LlamaForCausalLM(config)
    for shape in ((1, 3), (4, 7), (2, 1)):
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 0
