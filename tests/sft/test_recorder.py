"""The rows of `metrics.jsonl`: one per step, numbers that JSON can hold, cut back for a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from runner.data.rows import describe_samples
from runner.errors import DivergedError
from runner.files import append_jsonl, load_json, load_jsonl
from runner.sft.startup import WorldPlace
from tests.conftest import Project
from tests.support.contexts import make_recorder, open_context

LOGS = {"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-4, "num_tokens": 77.0}


def make_state(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=12, epoch=step / 6)


def test_a_step_is_one_row_without_what_is_not_finite(project: Project) -> None:
    context = open_context(project)
    recorder = make_recorder(context)
    recorder.record_step(make_state(3), LOGS)
    recorder.record_step(make_state(6), {**LOGS, "grad_norm": math.inf})
    recorder.record_step(make_state(9), {"loss": 2.0})
    assert [list(row.values()) for row in load_jsonl(context.paths.metrics_path)] == [
        [3, 0.5, 2.5, 0.5, 1e-4],
        [6, 1.0, 2.5, None, 1e-4],
        [9, 1.5, 2.0, None, None],
    ]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_row(
    project: Project, loss: float
) -> None:
    context = open_context(project)
    with pytest.raises(DivergedError, match=f"the loss of step 3 is {loss}"):
        make_recorder(context).record_step(make_state(3), {**LOGS, "loss": loss})
    assert not context.paths.metrics_path.exists()


def test_a_resume_keeps_the_rows_up_to_its_step_and_a_new_start_none(project: Project) -> None:
    context = open_context(project)
    recorder, path = make_recorder(context), context.paths.metrics_path
    rows: list[dict[str, Any]] = [{"step": 0, "split": "test"}]
    rows += [{"step": step, "loss": 1.0} for step in range(1, 6)]
    for row in rows:
        append_jsonl(path, row)
    recorder.rewind(4)
    assert load_jsonl(path) == rows[:5]
    recorder.rewind(0)
    assert load_jsonl(path) == rows[:1], "the scores of step 0 are not computed again"
    recorder.rewind(None)
    assert load_jsonl(path) == []


def test_a_resume_takes_the_rows_that_its_checkpoint_carries(project: Project) -> None:
    context = open_context(project)
    carried = context.paths.checkpoint_dir(4) / "run_files" / "metrics.jsonl"
    carried.parent.mkdir(parents=True)
    append_jsonl(carried, {"step": 4, "loss": 1.0})
    append_jsonl(context.paths.metrics_path, {"step": 4, "loss": 9.0})
    make_recorder(context).rewind(4)
    assert load_jsonl(context.paths.metrics_path) == [{"step": 4, "loss": 1.0}]


def test_the_main_process_alone_writes(project: Project) -> None:
    def list_files() -> list[Path]:
        return [path for path in context.paths.run_dir.rglob("*") if path.is_file()]

    context = open_context(project, place=WorldPlace(rank=1, world_size=2))
    recorder = make_recorder(context)
    recorder.record_samples()
    recorder.rewind(None)
    recorder.record_step(make_state(3), LOGS)
    assert list_files() == []
    context = open_context(project)
    recorder = make_recorder(context)
    recorder.record_samples()
    assert list_files() == [context.paths.samples_path]
    facts = describe_samples(recorder.samples, context.recipe.loss)
    assert load_json(context.paths.samples_path) == facts
