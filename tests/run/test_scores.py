"""A result that its own rows contradict, and rows that cannot be, are named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from runner.run.result import SplitScore, TrainResult
from runner.run.scores import find_impossible, find_score_contradictions

SUMS = ("completion_nll_sum", "template_nll_sum", "nll_sum")
COUNTS = ("num_completion_tokens", "num_tokens", "num_bytes")


def make_rows() -> list[dict[str, Any]]:
    """Ten rows of each model; 0.1 and the like make sums that depend on the order in which they are
    added, unless they are exact.
    """
    return [
        {
            "model": model,
            "row_id": f"{at:016x}",
            "group": f"{at:016x}",
            "completion_nll_sum": 0.3 * scale + at * 1e-9,
            "template_nll_sum": 0.1 * scale,
            "num_completion_tokens": 3,
            "nll_sum": 0.7 * scale + at * 1e7,
            "num_tokens": 9,
            "num_bytes": 11,
        }
        for model, scale in (("base", 1.0), ("tuned", 0.1))
        for at in range(10)
    ]


def summarize_rows(rows: list[dict[str, Any]]) -> SplitScore:
    counts = {name: sum(row[name] for row in rows) for name in COUNTS}
    sums = {name: math.fsum(row[name] for row in rows) for name in SUMS}
    return SplitScore(num_rows=len(rows), **counts, **sums)


def make_result(rows: list[dict[str, Any]]) -> TrainResult:
    scores = {
        model: {"test": summarize_rows([row for row in rows if row["model"] == model])}
        for model in ("base", "tuned")
    }
    return TrainResult(
        recipe_digest="0" * 64,
        outcome="completed",
        stop_reason="max_steps",
        num_steps=4,
        best_step=4,
        best_metric=1.0,
        metric="nll_per_completion_token",
        num_train_rows=8,
        **scores,
    )


def test_a_result_agrees_with_its_rows_in_any_order_and_as_json() -> None:
    rows = make_rows()
    result = TrainResult.model_validate_json(make_result(rows).model_dump_json())
    stored = [json.loads(json.dumps(row)) for row in rows]
    assert find_score_contradictions(result, stored) == []
    reordered = [*reversed(stored[:10]), *reversed(stored[10:])]
    assert find_score_contradictions(result, reordered) == []


@pytest.mark.parametrize("name", SUMS)
def test_one_bit_of_a_sum_is_seen(name: str) -> None:
    rows = make_rows()
    result = make_result(rows)
    stated = getattr(result.tuned["test"], name)
    other = result.tuned["test"].model_copy(update={name: math.nextafter(stated, 0.0)})
    (line,) = find_score_contradictions(result.model_copy(update={"tuned": {"test": other}}), rows)
    assert line.startswith(f"tuned: {name} is {math.nextafter(stated, 0.0)!r} in result.json")
    assert line.endswith(f"add up to {stated!r}")


@pytest.mark.parametrize("name", COUNTS)
def test_another_count_is_seen(name: str) -> None:
    rows = make_rows()
    result = make_result(rows)
    rows[0][name] += 1
    (line,) = find_score_contradictions(result, rows)
    assert line.startswith(f"base: {name} is ")


def test_rows_that_are_missing_double_or_of_one_model_are_seen() -> None:
    rows = make_rows()
    result = make_result(rows)
    lines = find_score_contradictions(result, rows[:-1])
    assert lines == [
        "tuned: num_rows is 10 in result.json, eval_rows.jsonl has 9",
        "base and tuned: eval_rows.jsonl has different rows for the two models",
    ]
    assert find_score_contradictions(result, []) == [
        "base: num_rows is 10 in result.json, eval_rows.jsonl has 0",
        "tuned: num_rows is 10 in result.json, eval_rows.jsonl has 0",
    ]
    double = [*rows[:9], rows[0], *rows[10:]]
    assert find_score_contradictions(make_result(double), double) == [
        "base: eval_rows.jsonl has a row twice",
        "base and tuned: eval_rows.jsonl has different rows for the two models",
    ]
    without = result.model_copy(update={"base": {}})
    assert find_score_contradictions(without, rows) == [
        "base: result.json has no score of the test split"
    ]


def test_what_an_older_run_did_not_record_is_no_contradiction() -> None:
    rows = make_rows()
    result = make_result(rows)
    older = [{k: v for k, v in row.items() if k != "template_nll_sum"} for row in rows]
    assert find_score_contradictions(result, older) == []
    older_score = result.base["test"].model_copy(update={"template_nll_sum": None})
    older_result = result.model_copy(update={"base": {"test": older_score}})
    assert find_score_contradictions(older_result, rows) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("nll_sum", -1.0, "nll_sum is -1.0, but a sum of"),
        ("nll_sum", math.nan, "nll_sum is nan, but"),
        ("completion_nll_sum", math.inf, "completion_nll_sum is inf, but"),
        ("completion_nll_sum", "1", "completion_nll_sum is '1', but"),
        ("completion_nll_sum", True, "completion_nll_sum is True, but"),
        ("completion_nll_sum", None, "completion_nll_sum is None, but"),
        ("template_nll_sum", -1e-9, "template_nll_sum is -1e-09, but"),
        ("template_nll_sum", 0.5, "template_nll_sum is 0.5, more than the 0.3 of completion"),
        ("completion_nll_sum", 0.8, "completion_nll_sum is 0.8, more than the 0.7 of nll_sum"),
        ("num_tokens", -1, "num_tokens is -1, but a count"),
        ("num_tokens", 9.0, "num_tokens is 9.0, but a count"),
        ("num_completion_tokens", 10, "num_completion_tokens is 10, more than the 9 of num_tokens"),
        ("model", "other", "its model is neither base nor tuned"),
        ("row_id", None, "its model is neither base nor tuned, or it has no row_id"),
    ],
)
def test_rows_that_cannot_be_are_named(name: str, value: Any, said: str) -> None:
    rows = make_rows()
    result = make_result(rows)
    rows[0][name] = value
    (line,) = find_score_contradictions(result, rows)
    assert line.startswith(f"row 1 of eval_rows.jsonl: {said}")
    assert name in ("model", "row_id") or find_impossible(rows[0]) is not None


def test_of_many_rows_that_cannot_be_a_few_are_named() -> None:
    rows = [row | {"nll_sum": -1.0} for row in make_rows()]
    lines = find_score_contradictions(make_result(make_rows()), rows)
    assert len(lines) == 6 and lines[-1] == "and 15 more rows of eval_rows.jsonl"
