"""What the trainer adds to TRL's; that it trains is shown by the runs of `test_train.py`."""

from __future__ import annotations

import os

import pytest

from runner.sft.trainer import RunTrainer
from tests.conftest import Project
from tests.support.contexts import open_context


def test_each_micro_batch_is_a_sign_of_life(project: Project) -> None:
    """A trainer without a model does not come further than that."""
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.context = open_context(project)
    path = trainer.context.attempt.progress_path
    path.write_text("{}")
    os.utime(path, (1, 1))
    with pytest.raises(AttributeError):
        trainer.training_step(None, {})
    assert path.stat().st_mtime > 1
