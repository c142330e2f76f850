"""The scores of one run row by row: of `eval_rows.jsonl` and `predictions.jsonl`, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


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
