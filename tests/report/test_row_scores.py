"""Scores of single rows: they are what the result says, or they are not used."""

import json
from pathlib import Path

import pytest

from runner.files import load_jsonl, write_jsonl_atomic
from runner.report.row_scores import RowScores
from runner.report.rows import ReportRow
from tests.support.reports import Run, completed, make_recipe, pending, rows_of
from tests.support.scored_runs import NUM_ROWS, scored

SQUAD = "data.task={name: squad_v2, prompt: '{context} {question}'}"
SST2 = "data.task={name: sst2, prompt: '{sentence}'}"


def row_of(run: Run) -> ReportRow:
    [row] = rows_of([run])
    return row


def scores_of(run: Run) -> RowScores:
    found = row_of(run).load_scores("tuned")
    assert found is not None, row_of(run).why_no_scores("tuned")
    return found


def test_ratios_of_sums_are_the_scores_of_the_result(tmp_path: Path) -> None:
    tokens = [1 + at % 7 for at in range(NUM_ROWS)]
    nll = [1 + at / 10 for at in range(NUM_ROWS)]
    run = scored(tmp_path, make_recipe("a", {}), nll, tokens=tokens, group_size=4)
    row, found = row_of(run), scores_of(run)
    for metric in ("nll_per_completion_token", "nll_per_token", "bits_per_byte"):
        assert found.score(metric) == pytest.approx(getattr(row.tuned, metric), rel=1e-12)
    assert found.row_ids[:2] == ("r000", "r001") and found.groups[:5] == ("g0",) * 4 + ("g1",)
    assert list(found.units["nll_per_completion_token"][:3]) == [1, 2, 3]
    base = row.load_scores("base")
    assert base is not None
    assert base.score("nll_per_completion_token") == pytest.approx(3.0)
    assert row.load_scores("tuned") is row.load_scores("tuned"), "read once"


def test_parts_of_a_metric_count_in_the_rows_that_it_is_defined_for(tmp_path: Path) -> None:
    references = [["yes"] if at % 4 else [] for at in range(NUM_ROWS)]
    scores = {
        "exact_match": [1.0 if at % 2 else 0.0 for at in range(NUM_ROWS)],
        "f1": [0.5] * NUM_ROWS,
    }
    run = scored(tmp_path, make_recipe("a", {}, SQUAD), 2.0, scores=scores, references=references)
    found = scores_of(run)
    answered = [name for name in found.sums if "nll" not in name and "bits" not in name]
    assert set(answered) == {
        "exact_match",
        "f1",
        "no_answer_accuracy",
        "has_answer_exact_match",
        "has_answer_f1",
    }
    assert found.units["no_answer_accuracy"].sum() == NUM_ROWS / 4
    assert found.score("no_answer_accuracy") == 0.0
    assert found.score("has_answer_exact_match") == pytest.approx(2 / 3)
    for name in answered:
        assert found.score(name) == pytest.approx(row_of(run).metric("tuned", name))


def test_a_metric_that_is_no_mean_over_rows_has_no_row_scores(tmp_path: Path) -> None:
    scores = {"accuracy": [1.0] * NUM_ROWS}
    run = scored(tmp_path, make_recipe("a", {}, SST2), 2.0, scores=scores, metrics={"f1": 0.7})
    assert "accuracy" in scores_of(run).sums and "f1" not in scores_of(run).sums


def test_a_row_that_a_metric_of_the_project_leaves_out_has_no_unit(tmp_path: Path) -> None:
    recipe = make_recipe(
        "a",
        {},
        "evaluation.generation={enabled: true, max_new_tokens: 4}",
        "evaluation.metrics=[{name: miss, function: 'scores.py:miss', mode: min}]",
    )
    own: list[float | None] = [None if at < 10 else float(at) for at in range(NUM_ROWS)]
    found = scores_of(scored(tmp_path, recipe, 2.0, own_scores={"miss": own}))
    assert found.units["miss"].sum() == 30 and found.score("miss") == 24.5


def test_answers_to_the_first_rows_only(tmp_path: Path) -> None:
    scores = {"accuracy": [1.0] * NUM_ROWS}
    run = scored(tmp_path, make_recipe("a", {}, SST2), 2.0, scores=scores)
    path = run[1].predictions_path
    write_jsonl_atomic(path, [row for row in load_jsonl(path) if row["row_id"] < "r020"])
    assert scores_of(run).units["accuracy"].sum() == 20


def test_answers_that_do_not_give_the_metric_of_the_result_are_left_out(tmp_path: Path) -> None:
    scores = {"accuracy": [1.0] * NUM_ROWS}
    run = scored(
        tmp_path, make_recipe("a", {}, SST2), 2.0, scores=scores, metrics={"accuracy": 0.5}
    )
    assert "accuracy" not in scores_of(run).sums


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "completion_nll_sum",
            1.0,
            "do not add up to its result: completion_nll_sum is 781, expected 8",
        ),
        ("num_completion_tokens", 11, "num_completion_tokens is 401, expected 400"),
        ("num_bytes", 1, "num_bytes is 1951, expected 2000"),
        ("completion_nll_sum", -1.0, "a negative NLL, which is impossible"),
        ("nll_sum", float("nan"), "whose score is not a number"),
        ("row_id", "r001", "two scores for one row"),
        ("num_tokens", "many", "have the wrong format"),
    ],
)
def test_rows_that_are_not_those_of_the_result_are_not_used(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    run = scored(tmp_path, make_recipe("a", {}), 2.0)
    path = run[1].eval_rows_path
    rows = load_jsonl(path)
    rows[NUM_ROWS][key] = value  # the first one of the tuned model
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = row_of(run)
    assert row.load_scores("tuned") is None
    assert said in row.why_no_scores("tuned")
    assert row.load_scores("base") is not None or key == "row_id" or key == "num_tokens"


def test_runs_without_row_scores_say_so(tmp_path: Path) -> None:
    waiting = row_of(pending(tmp_path, make_recipe("later", {})))
    assert waiting.load_scores("tuned") is None
    assert waiting.why_no_scores("tuned") == "later has status pending"
    older = row_of(completed(tmp_path, make_recipe("older", {}), 2.0))
    assert older.why_no_scores("tuned") == "older has no per-row scores"
    assert older.load_predictions("tuned") == [] == older.load_curve()
    run = scored(tmp_path, make_recipe("torn", {}), 2.0)
    run[1].eval_rows_path.write_text('{"model": "tuned"]\n')
    assert "cannot be read" in row_of(run).why_no_scores("tuned")


def test_predictions_and_curves_are_read_when_asked_for(tmp_path: Path) -> None:
    scores = {"accuracy": [1.0] * NUM_ROWS}
    run = scored(tmp_path, make_recipe("a", {}, SST2), 2.0, scores=scores)
    row = row_of(run)
    assert [one["row_id"] for one in row.load_predictions("tuned")][:2] == ["r000", "r001"]
    write_jsonl_atomic(run[1].metrics_path, [{"step": 1, "loss": 2.0}])
    assert row.load_curve() == [{"step": 1, "loss": 2.0}]
