"""The scores of one run row by row: of `eval_rows.jsonl` and `predictions.jsonl`, as arrays.

They are used only where they add up to what `result.json` says. A metric that is no mean over rows
(the F1 of a label) has no scores of rows.
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
# Sums are exact, so two of the same rows differ by the order of additions at most
_TOLERANCE: Final = 1e-9


@dataclass(frozen=True, eq=False)
class RowScores:
    """One model of one run on the test split, in the order of `row_ids`.

    For a likelihood `sums` are nats (bits) and `units` the tokens (bytes) they were summed over;
    for a metric of answers `sums` are the row's score and `units` 1 where it was judged, else 0.
    """

    row_ids: tuple[str, ...]
    groups: tuple[str, ...]
    sums: Mapping[str, Floats]  # metric name -> (rows,)
    units: Mapping[str, Floats]  # metric name -> (rows,)

    def score(self, metric: str) -> float | None:
        """The ratio of sums; None where there is nothing to divide by."""
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
    """The scores of `model`, or one sentence that says why there are none.

    `total` and `answers` are what `result.json` says of it: a metric of answers whose rows do not
    add up to that is left out; a likelihood that does not makes the whole file worthless.
    """
    name = paths.run_dir.name
    try:
        rows = load_rows(paths.eval_rows_path, model)
        if not rows:
            return f"{name} has no scores of single rows"
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
        return escape_controls(f"the row scores of {name} are not what a run writes: {error!r}")
    return _find_fault(scores, name, total) or scores


def load_rows(path: Path, model: str) -> list[dict[str, Any]]:
    """The whole rows of one model in a JSONL file; none where there is no file.

    Lines without the model's name are not parsed: half of those of thousands of runs.

    Raises:
        CorruptFileError: a line is no JSON object.
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
    """Runs of one report share their test rows: each id is held once."""
    return tuple(sys.intern(str(text)) for text in texts)


def _read_answers(
    metric: str,
    row_ids: Sequence[str],
    given: Mapping[str, Mapping[str, Any]],
    task: Task,
    own_metrics: Sequence[str],
) -> tuple[Floats, Floats] | None:
    """Scores and ones of a metric, 0 and 0 for a row that it does not judge; None where no row has
    a score by that name.
    """
    sums, units = np.zeros(len(row_ids)), np.zeros(len(row_ids))
    for at, row_id in enumerate(row_ids):
        row = given.get(row_id)
        if row is None:  # the answers may be to the first rows only
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
    """Why the likelihoods of a file cannot be used."""
    if len(set(scores.row_ids)) < len(scores.row_ids):
        return f"{name} has two scores of one row"
    for metric in LIKELIHOODS:
        if not np.isfinite(scores.sums[metric]).all():
            return f"{name} has a row whose score is no number"
    if (scores.sums[NLL_PER_COMPLETION_TOKEN] < 0).any() or (scores.sums[NLL_PER_TOKEN] < 0).any():
        return f"{name} has a row with a negative NLL, which no model gives"
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
                f" {key} is {added:.10g} and {expected:.10g}"
            )
    return None
