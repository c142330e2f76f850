"""The per-row scores of one run, from `eval_rows.jsonl` and `predictions.jsonl`, as arrays.

They are used only if they add up to the scores in `result.json`. A metric that is not a mean over
rows (such as the F1 of a label) has no per-row scores.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from runner.data.tasks.base import Task
from runner.errors import CorruptFileError, escape_controls, put_in_words
from runner.files import load_jsonl
from runner.recipe.schema import LIKELIHOOD_METRICS
from runner.run.paths import RunPaths
from runner.run.result import GenerationScore, SplitScore

Floats = npt.NDArray[np.float64]

LIKELIHOODS: Final = LIKELIHOOD_METRICS
NLL_PER_COMPLETION_TOKEN, NLL_PER_TOKEN, BITS_PER_BYTE = LIKELIHOODS
_NATS_PER_BIT: Final = math.log(2)
# Row scores are exact, so two sums of the same rows differ at most by the order of addition
_TOLERANCE: Final = 1e-9


@dataclass(frozen=True, eq=False)
class RowScores:
    """One model of one run on the test split, in the order of `row_ids`.

    For a likelihood, `sums` are nats (bits) and `units` the tokens (bytes) they were summed over.
    For a metric of answers, `sums` are row scores and `units` are 1 if the row was judged, else 0.
    """

    row_ids: tuple[str, ...]
    groups: tuple[str, ...]
    sums: Mapping[str, Floats]  # metric name -> (rows,)
    units: Mapping[str, Floats]  # metric name -> (rows,)

    def score(self, metric: str) -> float | None:
        """The ratio of sums; None if the denominator is 0."""
        total = float(self.units[metric].sum())
        return float(self.sums[metric].sum()) / total if total else None


def read_row_scores(
    paths: RunPaths,
    model: str,
    *,
    task: Task,
    own_metrics: Sequence[str] = (),
    total: SplitScore | None = None,
    answers: GenerationScore | None = None,
) -> RowScores | str:
    """The scores of `model`, or a sentence with the reason why there are none.

    `total` and `answers` are its scores in `result.json`. A metric of answers whose rows do not add
    up to them is left out; if a likelihood does not, the whole file is rejected.
    """
    name = paths.run_dir.name
    try:
        rows = load_rows(paths.eval_rows_path, model)
        if not rows:
            return f"{name} has no per-row scores"
        scores = _read_likelihoods(rows)
        if answers is not None:
            given = {row["row_id"]: row for row in load_rows(paths.predictions_path, model)}
            for metric, expected in answers.metrics.items():
                found = _read_answers(metric, scores.row_ids, given, task, own_metrics)
                if found is not None and _agrees(found, expected):
                    scores = _add(scores, metric, *found)
    except (CorruptFileError, OSError) as error:
        return escape_controls(f"the row scores of {name} cannot be read: {put_in_words(error)}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return escape_controls(f"the row scores of {name} have the wrong format: {error!r}")
    return _find_fault(scores, name, total) or scores


def load_rows(path: Path, model: str) -> list[dict[str, Any]]:
    """The rows of one model in a JSONL file; none if there is no file.

    Lines without the model's name are not parsed, which saves half of the lines of each run.

    Raises:
        CorruptFileError: a line is not a JSON object.
    """
    rows = load_jsonl(path, holding=f'"{model}"'.encode())
    return [row for row in rows if row.get("model") == model]


def _read_likelihoods(rows: Sequence[Mapping[str, Any]]) -> RowScores:
    def column(key: str, default: float | None = None) -> Floats:
        values = (row[key] if default is None else row.get(key, default) for row in rows)
        return np.fromiter((float(value) for value in values), np.float64, len(rows))

    completion, template = column("completion_nll_sum"), column("template_nll_sum", 0.0)
    return RowScores(
        row_ids=_intern(row["row_id"] for row in rows),
        groups=_intern(row.get("group") or row["row_id"] for row in rows),
        sums={
            NLL_PER_COMPLETION_TOKEN: completion,
            NLL_PER_TOKEN: column("nll_sum"),
            BITS_PER_BYTE: (completion - template) / _NATS_PER_BIT,
        },
        units={
            NLL_PER_COMPLETION_TOKEN: column("num_completion_tokens"),
            NLL_PER_TOKEN: column("num_tokens"),
            BITS_PER_BYTE: column("num_bytes"),
        },
    )


def _intern(texts: Iterable[Any]) -> tuple[str, ...]:
    """Store each id once, since the runs of a report share their test rows."""
    return tuple(sys.intern(str(text)) for text in texts)


def _read_answers(
    metric: str,
    row_ids: Sequence[str],
    given: Mapping[str, Mapping[str, Any]],
    task: Task,
    own_metrics: Sequence[str],
) -> tuple[Floats, Floats] | None:
    """The scores and units of a metric (both 0 for a row that it does not judge); None if
    no row has a score of this name.
    """
    sums, units = np.zeros(len(row_ids)), np.zeros(len(row_ids))
    for at, row_id in enumerate(row_ids):
        row = given.get(row_id)
        if row is None:  # possibly only the first rows were answered
            continue
        if metric in own_metrics:
            score = row["own_scores"][metric]
        else:
            scores = row["scores"]
            parts = task.score_row(tuple(row["references"]), scores) if scores else {}
            score = parts.get(metric)
        if score is not None:
            sums[at], units[at] = float(score), 1.0
    return (sums, units) if units.any() else None


def _agrees(found: tuple[Floats, Floats], expected: float) -> bool:
    sums, units = found
    return math.isclose(
        float(sums.sum() / units.sum()), expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE
    )


def _add(scores: RowScores, metric: str, sums: Floats, units: Floats) -> RowScores:
    return RowScores(
        scores.row_ids,
        scores.groups,
        {**scores.sums, metric: sums},
        {**scores.units, metric: units},
    )


def _find_fault(scores: RowScores, name: str, total: SplitScore | None) -> str | None:
    """The reason why the likelihoods of a file cannot be used; None if they can."""
    if len(set(scores.row_ids)) < len(scores.row_ids):
        return f"{name} has two scores for one row"
    for metric in LIKELIHOODS:
        if not np.isfinite(scores.sums[metric]).all():
            return f"{name} has a row whose score is not a number"
    if (scores.sums[NLL_PER_COMPLETION_TOKEN] < 0).any() or (scores.sums[NLL_PER_TOKEN] < 0).any():
        return f"{name} has a row with a negative NLL, which is impossible"
    if total is None:
        return None
    stated = {
        "completion_nll_sum": (total.completion_nll_sum, scores.sums[NLL_PER_COMPLETION_TOKEN]),
        "num_completion_tokens": (
            total.num_completion_tokens,
            scores.units[NLL_PER_COMPLETION_TOKEN],
        ),
        "nll_sum": (total.nll_sum, scores.sums[NLL_PER_TOKEN]),
        "num_tokens": (total.num_tokens, scores.units[NLL_PER_TOKEN]),
        "num_bytes": (total.num_bytes, scores.units[BITS_PER_BYTE]),
    }
    for key, (expected, values) in stated.items():
        added = float(values.sum())
        if not math.isclose(added, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            return (
                f"the row scores of {name} do not add up to its result:"
                f" {key} is {added:.10g}, expected {expected:.10g}"
            )
    return None
