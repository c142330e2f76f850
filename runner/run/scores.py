"""Compares a result with the scores of its rows: `result.json` sums up `eval_rows.jsonl`.

The types in `result` check single scores (finite, not negative, consistent counts) when a result is
read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from runner.run.result import SplitScore, TrainResult
from runner.text import format_count

_COUNTS: Final = ("num_completion_tokens", "num_tokens", "num_bytes")
_SUMS: Final = ("completion_nll_sum", "template_nll_sum", "nll_sum")
_MODELS: Final = ("base", "tuned")
_NUM_SHOWN: Final = 5


def find_impossible(row: Mapping[str, Any]) -> str | None:
    """The first impossible number of a row, with its name; None if there is none. Missing fields
    are not checked, because older runs did not record all of them.

    >>> find_impossible({"nll_sum": -2.0, "num_tokens": 3})
    'nll_sum is -2.0, but a sum of negative log-likelihoods must be finite and at least 0'
    >>> find_impossible({"num_tokens": 3, "num_completion_tokens": 5})
    'num_completion_tokens is 5, more than the 3 of num_tokens'
    """
    for name in _SUMS:
        value = row.get(name, 0.0)
        if not _is_number(value) or not math.isfinite(value) or value < 0:
            return (
                f"{name} is {value!r}, but a sum of negative log-likelihoods must be finite and"
                " at least 0"
            )
    for name in _COUNTS:
        value = row.get(name, 0)
        if type(value) is not int or value < 0:
            return f"{name} is {value!r}, but a count must be a whole number and at least 0"
    for part, whole in (
        ("num_completion_tokens", "num_tokens"),
        ("completion_nll_sum", "nll_sum"),
        ("template_nll_sum", "completion_nll_sum"),
    ):
        if part in row and whole in row and row[part] > row[whole]:
            return f"{part} is {row[part]!r}, more than the {row[whole]!r} of {whole}"
    return None


def find_score_contradictions(
    result: TrainResult, eval_rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """One line for each test-split number in `result.json` that differs from the sum over the rows
    of `eval_rows.jsonl`, and for each impossible row; empty if everything agrees.

    Sums are compared to the last bit: both sides are `math.fsum`, which is exact in any order, and
    JSON keeps every bit.
    """
    lines = list(_find_impossible_rows(eval_rows))
    if lines:  # sums would be meaningless
        return lines
    ids = {}
    for model in _MODELS:
        rows = [row for row in eval_rows if row["model"] == model]
        ids[model] = [row["row_id"] for row in rows]
        if len(set(ids[model])) < len(ids[model]):
            lines.append(f"{model}: eval_rows.jsonl has a row twice")
        score: SplitScore | None = getattr(result, model).get("test")
        if score is None:
            lines.append(f"{model}: result.json has no score of the test split")
        else:
            lines += [f"{model}: {line}" for line in _compare(score, rows)]
    if ids["base"] != ids["tuned"]:
        lines.append("base and tuned: eval_rows.jsonl has different rows for the two models")
    return lines


def _find_impossible_rows(eval_rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = []
    for number, row in enumerate(eval_rows, start=1):
        if row.get("model") not in _MODELS or not isinstance(row.get("row_id"), str):
            why: str | None = "its model is neither base nor tuned, or it has no row_id"
        else:
            why = find_impossible(row)
        if why is not None:
            found.append(f"row {number} of eval_rows.jsonl: {why}")
    yield from found[:_NUM_SHOWN]
    if len(found) > _NUM_SHOWN:
        yield f"and {format_count(len(found) - _NUM_SHOWN, 'more row')} of eval_rows.jsonl"


def _compare(score: SplitScore, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if score.num_rows != len(rows):
        yield f"num_rows is {score.num_rows} in result.json, eval_rows.jsonl has {len(rows)}"
        return
    for name in (*_COUNTS, *_SUMS):
        stated = getattr(score, name)
        if stated is None or not any(name in row for row in rows):  # an older run
            continue
        values = [row.get(name, 0) for row in rows]
        added = sum(values) if name in _COUNTS else math.fsum(values)
        if stated != added:
            yield (
                f"{name} is {stated!r} in result.json,"
                f" the rows of eval_rows.jsonl add up to {added!r}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
