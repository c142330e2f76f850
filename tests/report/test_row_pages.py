"""Two arms row against row: the numbers by hand, the texts by id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runner.files import load_jsonl, write_jsonl_atomic
from runner.report.effects import Report
from runner.report.row_pages import RowComparison, RowTexts, TextSource, build_row_comparisons
from runner.run.paths import RunPaths
from tests.support.pages import make_report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Two losses of one model, two seeds each."""
    return make_report(
        tmp_path, models=("gemma",), counts=(60,), seeds=(1, 2), missing=0, answers=("yes", "no")
    )


def compare(report: Report) -> RowComparison:
    [one] = build_row_comparisons(report)
    return one


def test_a_row_is_the_mean_over_the_seeds_of_its_cell(report: Report) -> None:
    one = compare(report)
    assert (one.reference_name, one.compared_name, one.num_rows) == ("full", "completion", 40)
    for cell, scores in (
        (one.reference_cell, one.reference_scores),
        (one.compared_cell, one.compared_scores),
    ):
        sums, counts = np.zeros(40), np.zeros(40)
        for run in cell.runs:
            assert run.run_dir is not None
            rows = load_jsonl(RunPaths(run.run_dir).eval_rows_path)
            tuned = [row for row in rows if row["model"] == "tuned"]
            assert tuple(row["row_id"] for row in tuned) == one.row_ids
            sums += [row["completion_nll_sum"] for row in tuned]
            counts += [row["num_completion_tokens"] for row in tuned]
        assert scores == pytest.approx(sums / counts)
    assert one.num_wins == (one.compared_scores < one.reference_scores).sum() > 30
    sizes = [abs(one.differences[at]) for at in one.order]
    assert sizes == sorted(sizes, reverse=True)


def test_parts_hold_every_row_once(report: Report) -> None:
    parts = dict(compare(report).list_parts())
    assert list(parts) == ["length in tokens", "score of the base model", "group"]
    for those in parts.values():
        assert sum(part.num_rows for part in those) == 40
        assert sum(part.num_wins for part in those) == compare(report).num_wins
        mean = sum(part.mean_difference * part.num_rows for part in those) / 40
        assert mean == pytest.approx(compare(report).differences.mean())
    assert [part.name for part in parts["group"]] == [f"g{at}" for at in range(6)]


def test_many_groups_are_put_together(report: Report) -> None:
    one = replace(compare(report), groups=tuple(f"g{at // 2}" for at in range(40)))
    *named, others = dict(one.list_parts())["group"]
    assert len(named) == 8 and others.name == "12 other groups" and others.num_rows == 24


def test_a_larger_score_wins_where_larger_is_better(report: Report) -> None:
    one = compare(report)
    other = replace(one, metric=replace(one.metric, mode="max"))
    assert other.num_wins == 40 - one.num_wins


def test_rows_that_only_one_arm_has_are_left_out(report: Report) -> None:
    """The order of the other rows does not matter."""
    before = compare(report)
    for run in report.cells[1].runs:
        assert run.run_dir is not None
        path = RunPaths(run.run_dir).eval_rows_path
        rows = [row for row in load_jsonl(path) if row["row_id"] != before.row_ids[7]]
        write_jsonl_atomic(path, rows[::-1])
    fresh = [replace(cell, runs=tuple(replace(run) for run in cell.runs)) for cell in report.cells]
    [effects] = report.effects
    pair = (fresh[0], fresh[1])
    effect = replace(effects.cells[0], pairs=(pair,))
    again = compare(
        replace(report, cells=tuple(fresh), effects=(replace(effects, cells=(effect,)),))
    )
    assert again.row_ids == before.row_ids[:7] + before.row_ids[8:]
    assert again.differences == pytest.approx(np.delete(before.differences, 7))


def test_a_refused_effect_has_no_rows(report: Report) -> None:
    [effects] = report.effects
    refused = replace(effects.cells[0], refused=("other tokens",), interval=None)
    assert (
        build_row_comparisons(replace(report, effects=(replace(effects, cells=(refused,)),))) == []
    )


def test_texts_are_those_of_the_row(report: Report, tmp_path: Path) -> None:
    one = compare(report)
    texts = TextSource().find(one)
    assert list(texts) == list(one.row_ids)
    for number, text in enumerate(texts.values()):
        answer = ("yes", "no")[number % 2]
        assert text.prompt.startswith("What is ") and text.references == (answer,)
        assert (text.base, text.reference) == (f"base: {answer}", f"tuned: {answer}")
    prompts = {text.prompt for text in texts.values()}
    assert len(prompts) == 40, "each row has its own"


def test_data_that_changed_or_is_gone_gives_no_prompts(report: Report, tmp_path: Path) -> None:
    """An id is a hash of what a row says: other rows have other ids."""
    one = compare(report)
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("What is", "What was"))
    assert {text.prompt for text in TextSource().find(one).values()} == {""}
    data.write_text("no JSON\n")
    assert {text.prompt for text in TextSource().find(one).values()} == {""}
    data.unlink()
    found = TextSource().find(one)
    assert {text.prompt for text in found.values()} == {""}
    assert found[one.row_ids[0]].reference == "tuned: yes"


def test_answers_that_cannot_be_read_are_none(report: Report, tmp_path: Path) -> None:
    one = compare(report)
    (tmp_path / "data.jsonl").unlink()
    for row in report.rows:
        assert row.run_dir is not None
        RunPaths(row.run_dir).predictions_path.write_text('{"model": "tuned"}\nnot JSON\n')
    assert set(TextSource().find(one).values()) == {RowTexts()}
