"""Scores of runs drawn row by row, with effects of runs, rows and noise of known size, for
`intervals.py`. It measures nothing itself.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runner.report.statistics import CellScores
from runner.report.variances import Floats, Ints

SHARES = (0.30, 0.20, 0.15, 0.10, 0.10, 0.07, 0.05, 0.03)


@dataclass(frozen=True)
class Truth:
    """Standard deviations per scored token: of a run, of arm x row, of what is left."""

    name: str
    run: float
    row: float
    rest: float
    noise: str = "normal"
    has_tokens: bool = False
    slope: float = 0.0  # of the second arm over the logarithm of the tokens
    groups: str = ""  # "tens", "doubling", "shares"
    group: float = 0.0  # arm x group
    group_run: float = 0.0  # run x group
    correlation: float = 0.0  # of the runs of one seed
    is_binary: bool = False  # each row is 1 where its score exceeds that of the row


BASE = Truth("base", 0.05, 0.2, 0.3)
TRUTHS = (
    BASE,
    Truth("runs differ much", 0.2, 0.2, 0.3),
    Truth("rows differ much", 0.005, 0.5, 0.3),
    Truth("residual only", 0.0, 0.02, 0.5),
    Truth("t3 noise", 0.05, 0.3, 0.3, noise="t3"),
    Truth("lognormal noise", 0.05, 0.3, 0.3, noise="lognormal"),
    Truth("token counts", 0.05, 0.3, 0.3, has_tokens=True),
    Truth("token counts, t3 noise", 0.05, 0.3, 0.3, noise="t3", has_tokens=True),
    Truth("effect depends on length", 0.02, 0.3, 0.3, has_tokens=True, slope=0.1),
    Truth("groups of 10", 0.03, 0.2, 0.3, groups="tens", group=0.15, group_run=0.05),
    Truth(
        "groups of 1 to 16, tokens",
        *(0.03, 0.2, 0.3),
        has_tokens=True,
        groups="doubling",
        group=0.15,
        group_run=0.05,
    ),
    Truth(
        "the same, groups dominate",
        *(0.003, 0.2, 0.3),
        has_tokens=True,
        groups="doubling",
        group=0.2,
    ),
    Truth("8 unequal groups", 0.005, 0.2, 0.3, groups="shares", group=0.2),
    Truth("seeds correlated .5", 0.05, 0.2, 0.3, correlation=0.5),
    Truth("right or wrong", 0.05, 0.2, 0.3, is_binary=True),
)


def draw(rng: np.random.Generator, noise: str, *shape: int) -> Floats:
    """Noise of mean 0 and standard deviation 1."""
    if noise == "t3":
        drawn = rng.standard_t(3, shape) / math.sqrt(3)
    elif noise == "lognormal":
        drawn = (np.exp(rng.standard_normal(shape)) - math.exp(0.5)) / math.sqrt(
            math.e * (math.e - 1)
        )
    else:
        drawn = rng.standard_normal(shape)
    return np.asarray(drawn, dtype=np.float64)


def draw_tokens(rng: np.random.Generator, truth: Truth, num_rows: int) -> Floats:
    """Tokens of each row."""
    if not truth.has_tokens:
        return np.ones(num_rows)
    return np.maximum(np.round(np.exp(rng.normal(3.4, 0.8, num_rows))), 1)


def number_groups(truth: Truth, num_rows: int) -> Ints | None:
    """The group of each row; None where each row is its own."""
    if not truth.groups:
        return None
    if truth.groups == "tens":
        sizes = [10] * (num_rows // 10)
    elif truth.groups == "shares":
        sizes = [round(share * num_rows) for share in SHARES]
    else:
        sizes = [1, 2, 4, 8, 16] * num_rows
    return np.repeat(np.arange(len(sizes)), sizes)[:num_rows]


def draw_scores(
    rng: np.random.Generator,
    truth: Truth,
    shape: tuple[int, int, int],
    tokens: Floats,
    groups: Ints | None,
    run_sds: Floats | None = None,
) -> Floats:
    """(cells, seeds, rows) sums over the tokens of each row; no cell differs from another."""
    cells, seeds, rows = shape
    shared = draw(rng, truth.noise, 1, seeds, 1) * np.sqrt(truth.correlation)
    own = draw(rng, truth.noise, cells, seeds, 1) * np.sqrt(1 - truth.correlation)
    scores = (shared + own) * (truth.run if run_sds is None else run_sds[:, None, None])
    scores = scores + truth.row * draw(rng, truth.noise, cells, 1, rows)
    scores += truth.rest * draw(rng, truth.noise, cells, seeds, rows)
    if groups is not None:
        count = int(groups[-1]) + 1
        of_group = truth.group * draw(rng, truth.noise, cells, 1, count)
        of_group = of_group + truth.group_run * draw(rng, truth.noise, cells, seeds, count)
        scores += of_group[..., groups]
    if truth.slope:
        scores[1:] += truth.slope * (np.log(tokens) - 4.04)
    if truth.is_binary:
        return np.asarray(scores > rng.normal(0, 0.5, rows), dtype=np.float64)
    return np.asarray(scores * tokens, dtype=np.float64)


def weigh(shape: tuple[int, ...], reference: Any, compared: Any) -> list[float]:
    """Weights of the mean of some cells against that of others, chosen by index."""
    weights = np.zeros(shape)
    weights[reference] = -1 / np.size(weights[reference])
    weights[compared] = 1 / np.size(weights[compared])
    return [float(weight) for weight in weights.ravel()]


GRID = (2, 2, 3)  # loss, count, model
GRID_CONTRASTS = {
    "loss": weigh(GRID, np.s_[0], np.s_[1]),
    "loss at one count": weigh(GRID, np.s_[0, 0], np.s_[1, 0]),
    "loss in model 1": weigh(GRID, np.s_[0, :, 0], np.s_[1, :, 0]),
    "loss in model 3": weigh(GRID, np.s_[0, :, 2], np.s_[1, :, 2]),
    "model": weigh(GRID, np.s_[:, :, 0], np.s_[:, :, 2]),
    "two cells": weigh(GRID, np.s_[0, 0, 0], np.s_[1, 0, 0]),
}
# Without loss 1, count 1, model 1, which is missing
UNBALANCED_CONTRASTS = {
    "loss": [-0.2, -0.2, -0.2, 0.0, -0.2, -0.2, 0.2, 0.2, 0.2, 0.0, 0.2, 0.2],
    "loss in model 1": [-1.0, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 0],
    "loss in model 2": weigh(GRID, np.s_[0, :, 1], np.s_[1, :, 1]),
}


def draw_grid(
    rng: np.random.Generator, kind: str, num_seeds: int, num_rows: int
) -> list[CellScores]:
    """The cells of a grid of 2 x 2 x 3 in which nothing has an effect."""
    correlation = 0.5 if kind == "seeds correlated .5" else 0.0
    noise = "t3" if kind == "t3 noise" else "normal"
    truth = replace(BASE, correlation=correlation, noise=noise)
    run_sds = np.full(GRID, BASE.run)
    if kind == "one model x 4":
        run_sds[:, :, 2] *= 4
    is_axis_by_seed = kind == "axis x seed"
    if is_axis_by_seed:  # a quarter of the variance of a run
        run_sds *= np.sqrt(0.75)
    shape = (int(np.prod(GRID)), num_seeds, num_rows)
    sums = draw_scores(rng, truth, shape, np.ones(num_rows), None, run_sds.ravel())
    if is_axis_by_seed:
        common = rng.normal(0, BASE.run / 2, (2, num_seeds, 1))
        sums += np.repeat(common, len(sums) // 2, axis=0)
    seeds = tuple(range(num_seeds)) if correlation or is_axis_by_seed else ()
    counts = [num_seeds] * len(sums)
    if kind == "unbalanced":
        counts[9], counts[0], counts[7] = 0, 1, min(2, num_seeds)
    return [
        CellScores(one[:count], f"model {index % 3}", seeds)
        for index, (one, count) in enumerate(zip(sums, counts, strict=True))
    ]
