"""The rows of `metrics.jsonl`: one per step, numbers that JSON can hold, cut back for a resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from runner.data.masking import CompletionSpan
from runner.data.rows import LeftOut, Row, Samples, Split, describe_samples
from runner.data.stored_rows import StoredRows, StoredSplit, write_shard
from runner.errors import CorruptFileError, DataError, DivergedError
from runner.files import append_jsonl, load_json, load_jsonl, write_jsonl_atomic
from runner.sft.recorder import Recorder
from runner.sft.startup import WorldPlace
from tests.conftest import Project
from tests.run.test_scores import make_result
from tests.run.test_scores import make_rows as make_rows_of_scores
from tests.support.contexts import make_recorder, open_context
from tests.support.token_rows import make_row

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


def make_rows(*ids: str, length: int = 3) -> Split:
    spans = (CompletionSpan(1, 3),)
    rows = [Row(one, one, tuple(range(length)), spans, spans, 5, False) for one in ids]
    return Split(tuple(rows), ())


def record(project: Project, samples: Samples) -> Recorder:
    return Recorder(open_context(project), samples)


def test_a_resume_compares_the_rows_of_each_split_and_names_what_differs(project: Project) -> None:
    ours = Samples(make_rows("a", "b"), make_rows("c"), make_rows("d"), LeftOut())
    recorder = record(project, ours)
    recorder.record_samples(None)
    recorder.require_same_samples()
    path = recorder.context.paths.samples_path
    before = path.read_bytes()
    others: dict[str, tuple[Samples, str]] = {
        "order": (replace(ours, train=make_rows("b", "a")), "  train: differs in ids"),
        "row": (
            replace(ours, test=make_rows("d", "e")),
            "  test: differs in ids, input_ids_hash, mask_hash, num_bytes",
        ),
        "bytes": (
            replace(ours, test=Split((replace(ours.test.rows[0], num_bytes=99),), ())),
            "  test: differs in num_bytes",
        ),
        "token": (
            replace(ours, validation=make_rows("c", length=4)),
            "  validation: differs in input_ids_hash, mask_hash",
        ),
    }
    for other, line in others.values():
        with pytest.raises(DataError) as refused:
            record(project, other).require_same_samples()
        assert refused.value.message.splitlines()[1:] == [line]
        assert str(path) in refused.value.message and "--fresh" in str(refused.value.hint)
        assert path.read_bytes() == before
    full = open_context(project, "loss=full")
    with pytest.raises(
        DataError, match="train: differs in mask_hash\n  validation: differs in mask_hash"
    ):
        Recorder(full, ours).require_same_samples()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"splits": {"train": [1]}}', "3"])
def test_a_record_of_rows_that_cannot_be_read_is_told_and_left_alone(
    project: Project, content: str
) -> None:
    recorder = record(project, Samples(make_rows("a"), make_rows("b"), make_rows("c"), LeftOut()))
    path = recorder.context.paths.samples_path
    path.write_text(content)
    with pytest.raises(DataError, match=r"cannot|not JSON|train: not recorded"):
        recorder.require_same_samples()
    recorder.record_samples(4)
    assert path.read_text() == content
    recorder.record_samples(None)
    recorder.require_same_samples()


def test_without_a_record_of_rows_a_resume_says_so_and_writes_one(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """This happens if a checkpoint came from elsewhere."""
    recorder = record(project, Samples(make_rows("a"), make_rows("b"), make_rows("c"), LeftOut()))
    recorder.require_same_samples()
    assert "samples.json: the rows are assumed unchanged" in capsys.readouterr().out
    recorder.record_samples(4)
    recorder.require_same_samples()
    assert capsys.readouterr().out == ""


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


class Counting(StoredRows):
    """Rows that count how many of them were built."""

    num_built = 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            self.num_built += 1
        return super().__getitem__(index)


def test_only_the_rows_that_are_scored_again_are_built(project: Project, tmp_path: Path) -> None:
    rows = tuple(make_row(f"row-{at}", range(3, 30 - at), (2, 5)) for at in range(20))
    write_shard(tmp_path / "rows.arrow", rows, with_columns=False)
    stored = Counting([tmp_path / "rows.arrow"])
    split = StoredSplit(stored, (), {})
    recorder = record(project, Samples(Split((), ()), Split((), ()), split, LeftOut()))
    shortest = recorder.list_rows_scored_again()
    assert [row.row_id for row in shortest] == ["row-19", "row-18", "row-17", "row-16"]
    assert stored.num_built == 4


def test_a_result_that_its_rows_do_not_add_up_to_is_not_written(project: Project) -> None:
    context = open_context(project)
    rows = make_rows_of_scores()
    for row in rows:
        append_jsonl(context.paths.eval_rows_path, row)
    recorder, result = make_recorder(context), make_result(rows)
    recorder._require_agreement(result)
    write_jsonl_atomic(context.paths.eval_rows_path, [rows[0] | {"nll_sum": 99.0}, *rows[1:]])
    with pytest.raises(CorruptFileError, match=r"eval_rows.jsonl adds up to:\n  base: nll_sum is "):
        recorder._require_agreement(result)
