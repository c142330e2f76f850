"""Intervals and tests, against values by hand, by loops, by scipy and by statsmodels."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.contingency_tables import mcnemar as other_mcnemar
from statsmodels.stats.multitest import multipletests

from runner.report.statistics import (
    CellScores,
    NotComparableError,
    benjamini_hochberg,
    choose_design,
    compare_single_runs,
    contrast,
    holm,
    interaction_test,
    interval,
    is_equivalent,
    mcnemar,
    noise_floor,
    paired_cell,
    simple_level,
)
from runner.report.variances import describe_other_spread

Floats = npt.NDArray[np.float64]


def draw(*shape: int, seed: int = 0) -> Floats:
    """Scores with effects of runs, rows and noise: (cells, seeds, rows)."""
    rng = np.random.default_rng(seed)
    cells, seeds, rows = shape
    runs = rng.normal(2, 0.5, (cells, seeds, 1))
    return np.asarray(runs + rng.normal(0, 0.5, (cells, 1, rows)) + rng.normal(0, 0.3, shape))


def cells_of(scores: Floats, pool: str = "model") -> list[CellScores]:
    return [CellScores(one, pool) for one in scores]


def test_interval_by_hand() -> None:
    # Scores 3 and 4; row means 1, 2, 5, 6 around 3.5: V_seed = 0.5 / 2, V_row = 17 / 3 / 4.
    # What is left is +-0.5 in all 8 places: V_res = 4/3 x 2 / (2 x 1 x 16) = 1/12.
    cell = CellScores(np.array([[0.0, 2, 5, 5], [2, 2, 5, 7]]), "a")
    found = interval([cell], [1.0], np.ones(4))
    assert (found.kind, found.estimate, found.num_seeds) == ("seeds and rows", 3.5, (2,))
    assert (found.v_seed, found.v_row) == pytest.approx((1 / 4, 17 / 12))
    assert found.v_res == pytest.approx(1 / 12)
    assert (found.df_seed, found.df_row, found.num_groups) == (1.0, 3.0, 4)
    # t(0.975) is 12.706205 with 1 and 3.182446 with 3 degrees of freedom; R = 16/12
    by_hand = (12.706205 * 0.25 + 3.182446 * 4 / 3) / math.sqrt(0.25 + 4 / 3)
    assert found.half_width == pytest.approx(by_hand, rel=1e-6)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 4 + 16 / 12))
    assert found.bounds == pytest.approx((3.5 - by_hand, 3.5 + by_hand), rel=1e-6)


def test_rows_set_the_least_width() -> None:
    # Both runs score 3.5: no spread of seeds, and R is V_row less what is left
    cell = CellScores(np.array([[0.0, 3, 5, 6], [2, 1, 5, 6]]), "a")
    found = interval([cell], [1.0], np.ones(4))
    assert (found.kind, found.v_seed) == ("seeds and rows", 0)
    assert 0 < found.v_res < found.v_row
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(found.v_row), rel=1e-6)
    # What is left is larger than the rows: R = 0, yet the runs are not the same
    cell = CellScores(np.array([[1.0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1]]), "a")
    found = interval([cell], [1.0], np.ones(6))
    assert (found.v_seed, found.kind) == (0, "seeds and rows")
    assert 0 < found.v_row < found.v_res
    assert found.half_width == pytest.approx(2.570582 * math.sqrt(found.v_row), rel=1e-6)


def loop(
    cells: list[CellScores], weights: list[float], tokens: Floats, groups: list[int]
) -> tuple[float, ...]:
    """Estimate, V_seed, V_row, V_res, df_seed and df_row, by loops over numbers."""
    names = sorted(set(groups))
    members = {g: [n for n, other in enumerate(groups) if other == g] for g in names}
    t = {g: sum(tokens[n] for n in members[g]) for g in names}
    total = sum(t.values())

    def y(c: int, s: int, g: int) -> float:
        return float(sum(cells[c].sums[s, n] for n in members[g]))

    def score(c: int, s: int) -> float:
        return sum(y(c, s, g) for g in names) / total

    sizes = [len(cell.sums) for cell in cells]
    means = [sum(score(c, s) for s in range(n)) / n for c, n in enumerate(sizes)]
    m = {
        g: sum(
            w * sum(y(c, s, g) for s in range(sizes[c])) / sizes[c] for c, w in enumerate(weights)
        )
        for g in names
    }
    left_out = [(sum(m.values()) - m[g]) / (total - t[g]) for g in names]
    count = len(names)
    center = sum(left_out) / count
    v_row = (count - 1) / count * sum((one - center) ** 2 for one in left_out)
    parts = []
    for pool in {cell.pool for cell, w in zip(cells, weights, strict=True) if w}:
        inside = [c for c, cell in enumerate(cells) if cell.pool == pool]
        nu = sum(sizes[c] - 1 for c in inside)
        square = sum((score(c, s) - means[c]) ** 2 for c in inside for s in range(sizes[c]))
        parts.append((square / nu * sum(weights[c] ** 2 / sizes[c] for c in inside), nu))
    v_seed = sum(part for part, _ in parts)
    v_res = 0.0
    for c, w in enumerate(weights):
        if sizes[c] == 1:
            continue
        for s, g in product(range(sizes[c]), names):
            mean = sum(y(c, other, g) for other in range(sizes[c])) / sizes[c]
            e = y(c, s, g) - mean - (score(c, s) - means[c]) * t[g]
            v_res += w**2 * count / (count - 1) * e**2 / (sizes[c] * (sizes[c] - 1) * total**2)
    df_seed = max(1.0, v_seed**2 / sum(part**2 / nu for part, nu in parts))
    df_row = max(1.0, total**2 / sum(one**2 for one in t.values()) - 1)
    estimate = sum(w * mean for w, mean in zip(weights, means, strict=True))
    return estimate, v_seed, v_row, v_res, df_seed, df_row


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_interval_by_loops(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    num_cells, num_rows = data.draw(st.integers(2, 4)), data.draw(st.integers(3, 8))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=num_cells, max_size=num_cells))
    pools = ["a"] + [data.draw(st.sampled_from("ab")) for _ in range(num_cells - 1)]
    cells = [
        CellScores(rng.normal(0, 1, (size, num_rows)), pool)
        for size, pool in zip(sizes, pools, strict=True)
    ]
    cells += [CellScores(rng.normal(0, 1, (2, num_rows)), pool) for pool in "ab"]  # weight 0
    weights = [-1.0, 1.0] + [0.0] * num_cells
    tokens = rng.integers(1, 30, num_rows).astype(float)
    groups = [0, 1, *rng.integers(0, num_rows, num_rows - 2).tolist()]
    found = interval(cells, weights, tokens, np.array(groups))
    estimate, v_seed, v_row, v_res, df_seed, df_row = loop(cells, weights, tokens, groups)
    assert found.estimate == pytest.approx(estimate)
    assert (found.v_seed, found.v_row, found.v_res) == pytest.approx((v_seed, v_row, v_res))
    assert (found.df_seed, found.df_row) == pytest.approx((df_seed, df_row))
    t_seed, t_row = (stats.t.ppf(0.975, df) for df in (df_seed, df_row))
    rows = max(v_row - v_res, 0)
    weighted = (t_seed * v_seed + t_row * rows) / math.sqrt(v_seed + rows)
    assert found.half_width == pytest.approx(max(weighted, t_row * math.sqrt(v_row)))
    assert found.p is not None
    at_p = interval(cells, weights, tokens, np.array(groups), level=1 - found.p)
    assert at_p.half_width == pytest.approx(abs(found.estimate), rel=1e-5)


def reml_error(frame: Any, formula: str, parts: dict[str, str]) -> float:
    """The standard error of the last fixed effect, all other effects crossed."""
    frame["all"] = 1
    model = MixedLM.from_formula(
        formula, groups="all", vc_formula=parts, re_formula="0", data=frame
    )
    fitted = model.fit(reml=True, method=["bfgs", "lbfgs"], gtol=1e-8)
    return float(fitted.bse_fe.iloc[-1])


@pytest.mark.filterwarnings("ignore")
def test_standard_error_agrees_with_reml() -> None:
    first, second = draw(2, 4, 12, seed=5)
    found = interval([paired_cell(first, second)], [1.0], np.ones(12))
    rows = [
        {"seed": s, "row": n, "y": second[s, n] - first[s, n]} for s in range(4) for n in range(12)
    ]
    parts = {"seed": "0 + C(seed)", "row": "0 + C(row)"}
    error = reml_error(pd.DataFrame(rows), "y ~ 1", parts)
    assert found.v_row > found.v_res
    assert found.standard_error == pytest.approx(error, rel=1e-3)

    found = interval(cells_of(np.stack([first, second])), [-1.0, 1.0], np.ones(12))
    both = np.stack([first, second])
    rows = [
        {"cell": c, "run": f"{c} {s}", "row": n, "arm_row": f"{c} {n}", "y": both[c, s, n]}
        for c, s, n in product(range(2), range(4), range(12))
    ]
    parts = {"run": "0 + C(run)", "row": "0 + C(row)", "arm_row": "0 + C(arm_row)"}
    error = reml_error(pd.DataFrame(rows), "y ~ C(cell)", parts)
    assert found.standard_error == pytest.approx(error, rel=1e-3)


def test_statements_with_one_error_are_t_tests() -> None:
    reference, compared = draw(2, 4, 9, seed=1)
    tokens = np.ones(9)
    cells = [CellScores(reference, "a"), CellScores(compared, "b")]
    rows = interval(cells, [-1.0, 1.0], tokens, statement="rows")
    test = stats.ttest_rel(compared.mean(axis=0), reference.mean(axis=0))
    assert (rows.kind, rows.p) == ("rows", pytest.approx(test.pvalue))
    assert rows.bounds == pytest.approx(tuple(test.confidence_interval()))

    scores = compared.mean(axis=1), reference.mean(axis=1)
    welch = interval(cells, [-1.0, 1.0], tokens, statement="seeds")
    test = stats.ttest_ind(*scores, equal_var=False)
    assert (welch.kind, welch.p) == ("seeds", pytest.approx(test.pvalue))
    assert welch.bounds == pytest.approx(tuple(test.confidence_interval()))
    pooled = interval(cells_of(np.stack([reference, compared])), [-1, 1], tokens, statement="seeds")
    assert pooled.p == pytest.approx(stats.ttest_ind(*scores).pvalue)
    paired = interval([paired_cell(reference, compared)], [1.0], tokens, statement="seeds")
    assert paired.p == pytest.approx(stats.ttest_rel(*scores).pvalue)


SCORES = st.integers(0, 10**6).map(lambda seed: draw(2, 3, 8, seed=seed))
TOKENS = np.arange(1.0, 9)


@settings(max_examples=25, deadline=None)
@given(SCORES, st.floats(-3, 3))
def test_a_shift_moves_the_interval_and_nothing_else(scores: Floats, shift: float) -> None:
    before = interval(cells_of(scores), [-1, 1], TOKENS)
    scores = scores.copy()
    scores[1] += shift * TOKENS
    after = interval(cells_of(scores), [-1, 1], TOKENS)
    assert after.estimate == pytest.approx(before.estimate + shift)
    assert after.half_width == pytest.approx(before.half_width)


@settings(max_examples=25, deadline=None)
@given(SCORES, st.permutations(range(8)))
def test_sides_rows_and_seeds_may_be_in_any_order(scores: Floats, order: list[int]) -> None:
    groups = np.array([0, 0, 1, 2, 3, 3, 3, 4])
    before = interval(cells_of(scores), [-1, 1], TOKENS, groups)
    flipped = interval(cells_of(scores), [1, -1], TOKENS, groups)
    moved = interval(cells_of(scores[:, ::-1][..., order]), [-1, 1], TOKENS[order], groups[order])
    for other, sign in ((flipped, -1), (moved, 1)):
        assert other.estimate == pytest.approx(sign * before.estimate)
        assert (other.half_width, other.p) == pytest.approx((before.half_width, before.p))


@settings(max_examples=25, deadline=None)
@given(SCORES)
def test_groups_are_rows_that_are_summed(scores: Floats) -> None:
    groups = np.array([7, 7, 2, 2, 2, 5, 5, 1])
    summed = np.stack([scores[..., groups == g].sum(axis=-1) for g in (7, 2, 5, 1)], axis=-1)
    tokens = np.array([TOKENS[groups == g].sum() for g in (7, 2, 5, 1)])
    found = interval(cells_of(scores), [-1, 1], TOKENS, groups)
    other = interval(cells_of(summed), [-1, 1], tokens)
    assert (found.half_width, found.df_row) == pytest.approx((other.half_width, other.df_row))
    assert found.num_groups == 4
    each = interval(cells_of(scores), [-1, 1], TOKENS, np.arange(8))
    assert each == interval(cells_of(scores), [-1, 1], TOKENS)


def test_one_run_a_cell_says_something_of_rows_only() -> None:
    scores = draw(2, 1, 10)
    found = interval(cells_of(scores), [-1, 1], np.ones(10))
    assert (found.kind, found.num_seeds, found.df_seed) == ("rows", (1, 1), None)
    test = stats.ttest_rel(scores[1, 0], scores[0, 0])
    assert found.p == pytest.approx(test.pvalue)
    # Replicated in one of two pools: still not
    cells = [CellScores(draw(1, 3, 10)[0], "a"), CellScores(scores[1], "b")]
    assert interval(cells, [-1, 1], np.ones(10)).kind == "rows"
    # A third cell of the pool brings the spread of seeds
    cells.append(CellScores(draw(1, 3, 10)[0], "b"))
    assert interval(cells, [-1, 1, 0], np.ones(10)).kind == "seeds and rows"


def test_runs_that_do_not_vary_have_no_interval() -> None:
    same = np.full((2, 3, 6), 0.1)
    found = interval(cells_of(same), [-1, 1], np.ones(6))
    assert (found.kind, found.estimate, found.bounds, found.p) == ("identical", 0.0, None, None)
    assert found.standard_error == 0
    three = interval(cells_of(np.full((3, 3, 6), 0.1)), [-1, 1 / 3, 2 / 3], np.ones(6))
    assert three.kind == "identical"
    same[1] += 1
    found = interval(cells_of(same), [-1, 1], np.ones(6))
    assert (found.kind, found.half_width) == ("identical", None)
    assert found.estimate == pytest.approx(1) and "do not vary" in found.note


def test_scores_of_other_rows_or_tokens_are_refused() -> None:
    scores, tokens = draw(2, 3, 6), np.ones(6)
    cells = [
        CellScores(one, "a", tokens=tokens * (1 + index), name=f"arm {index}")
        for index, one in enumerate(scores)
    ]
    with pytest.raises(NotComparableError, match="arm 1 was scored on 12 tokens"):
        interval(cells, [-1, 1], tokens)
    with pytest.raises(NotComparableError, match="other rows"):
        interval([CellScores(scores[0], "a"), CellScores(scores[1, :, :5], "a")], [-1, 1], tokens)
    with pytest.raises(NotComparableError, match="no scored run"):
        interval([CellScores(scores[0], "a"), CellScores(scores[1, :0], "a")], [-1, 1], tokens)
    found = interval([*cells_of(scores), CellScores(scores[1, :0], "model")], [-1, 1, 0], tokens)
    assert found == interval(cells_of(scores), [-1, 1], tokens)
    shared = [replace(cell, seeds=(0, 1, 2), tokens=None) for cell in cells]
    shared[1] = replace(shared[1], tokens=tokens * 2)
    with pytest.raises(NotComparableError, match="12 tokens"):
        contrast(shared, [-1, 1], tokens, is_grid=False, is_same_start=True)
    with pytest.raises(NotComparableError, match="cannot be paired"):
        paired_cell(scores[0], scores[1, :2])


def test_few_groups_and_few_seeds_are_marked() -> None:
    scores, tokens = draw(2, 2, 12), np.ones(12)
    found = interval(cells_of(scores), [-1, 1], tokens)
    assert not found.has_few_groups
    assert found.note == "2 seeds: only very large differences can be detected"
    assert interval(cells_of(scores), [-1, 1], tokens, np.arange(12) // 2).has_few_groups is False
    assert interval(cells_of(scores), [-1, 1], tokens, np.arange(12) // 3).has_few_groups
    # Six groups of which one holds most rows count for fewer
    groups = np.array([0] * 7 + [1, 2, 3, 4, 5])
    assert interval(cells_of(scores), [-1, 1], tokens, groups).has_few_groups
    assert interval(cells_of(draw(4, 2, 12)), [-1, 1, 0, 0], tokens).note == ""
    one = interval(cells_of(scores), [-1, 1], tokens, np.zeros(12, dtype=int))
    assert one.kind == "seeds" and "one group of rows" in one.note
    one = interval(cells_of(scores[:, :1]), [-1, 1], tokens, np.zeros(12, dtype=int))
    assert (one.kind, one.half_width) == ("identical", None)


def seeded(scores: Floats, *seeds: tuple[int, ...], pool: str = "model") -> list[CellScores]:
    return [CellScores(one, pool, own) for one, own in zip(scores, seeds, strict=True)]


def test_designs_are_chosen_by_seeds_and_hashes_alone() -> None:
    three = seeded(draw(2, 3, 4), (0, 1, 2), (0, 1, 2))
    own = seeded(draw(2, 5, 4), (0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
    five = seeded(draw(2, 5, 4), (0, 1, 2, 3, 4), (4, 3, 2, 1, 0))

    def choose(cells: list[CellScores], **facts: bool) -> str:
        return choose_design(cells, [-1, 1], **{"is_grid": False, "is_same_start": False} | facts)

    assert choose(three) == choose(own, is_same_start=True) == "separate"
    assert choose(three, is_same_start=True) == "paired"
    assert choose(three, is_grid=True) == choose(own, is_grid=True) == "pooled"
    assert choose(three, is_grid=True, is_same_start=True) == "pooled"
    assert choose(five, is_grid=True) == "per seed"
    assert choose(five[:1] + own[:1], is_grid=True) == "per seed"
    with pytest.raises(ValueError, match="two runs of one seed"):
        choose(seeded(draw(2, 2, 4), (0, 0), (0, 1)))


def test_each_design_calls_the_interval_that_it_names() -> None:
    tokens = np.ones(20)
    scores = draw(4, 5, 20, seed=3)
    weights = [-1.0, 1.0, 0.0, 0.0]
    cells = seeded(scores, *[(0, 1, 2, 3, 4)] * 4)
    per_seed = contrast(cells, weights, tokens, is_grid=True)
    paired = interval([paired_cell(scores[0], scores[1])], [1.0], tokens)
    assert (per_seed.half_width, per_seed.p) == (paired.half_width, paired.p)
    assert per_seed.design == "paired by seed (5 shared)"
    assert per_seed.num_seeds == (5, 5)
    # In another order
    other = seeded(scores[:2, ::-1], (4, 3, 2, 1, 0), (4, 3, 2, 1, 0))
    found = contrast(other, [-1, 1], tokens, is_grid=False, is_same_start=True)
    assert found.half_width == pytest.approx(paired.half_width)
    assert found.design.startswith("paired by seed (5 shared, same initial weights")
    assert (found.note, per_seed.note) == ("", "")

    own = [replace(cell, seeds=()) for cell in cells]
    pooled = contrast(own, weights, tokens, is_grid=True)
    assert pooled == replace(interval(own, weights, tokens), design=pooled.design)
    assert pooled.design == "seed variance pooled over 4 cells of model"
    welch = contrast(own[:2], weights[:2], tokens, is_grid=False)
    apart = [CellScores(scores[0], "a"), CellScores(scores[1], "b")]
    assert welch == replace(interval(apart, weights[:2], tokens), design=welch.design)
    assert "Welch" in welch.design
    rows = contrast(cells, weights, tokens, is_grid=True, statement="rows")
    assert (rows.kind, rows.design) == ("rows", "")


def test_two_cells_that_share_only_some_seeds_keep_all_their_runs() -> None:
    """Pairing them would throw away 16 of 20 runs without a word."""
    tokens, scores = np.ones(20), draw(2, 10, 20, seed=3)
    cells = seeded(scores, tuple(range(10)), tuple(range(8, 18)))
    found = contrast(cells, [-1, 1], tokens, is_grid=False, is_same_start=True)
    assert found.num_seeds == (10, 10) and "Welch" in found.design
    assert found.estimate == pytest.approx(scores[1].mean() - scores[0].mean())
    more = [cells[0], CellScores(scores[1, :9], "model", tuple(range(9)))]
    found = contrast(more, [-1, 1], tokens, is_grid=False, is_same_start=True)
    assert found.num_seeds == (10, 9)


def test_a_grid_paired_by_seed_says_which_runs_it_leaves_out() -> None:
    tokens, scores = np.ones(20), draw(4, 7, 20, seed=3)
    seeds = tuple(range(7))
    cells = [CellScores(scores[0, :5], "model", seeds[:5])]
    cells += [CellScores(one, "model", seeds) for one in scores[1:]]
    found = contrast(cells, [-0.5, 0.5, -0.5, 0.5], tokens, is_grid=True)
    assert found.num_seeds == (5, 5, 5, 5)
    assert (
        found.note
        == "only 20 of 26 runs count here, because seeds missing from some cell are left out"
    )
    simple = contrast(cells, [0, 0, -1, 1], tokens, is_grid=True)
    assert (simple.num_seeds, simple.note) == ((7, 7), "")


def test_shared_seeds_that_act_in_common_widen_the_interval() -> None:
    tokens = np.ones(200)
    scores = draw(4, 3, 200, seed=2)
    scores -= scores.mean(axis=2, keepdims=True)  # no spread of seeds at all ...
    scores += np.random.default_rng(1).normal(0, 0.01, (4, 3, 1))
    scores[:2] += np.array([-1.0, 0, 1])[:, np.newaxis]  # ... but one that two cells share
    weights = [-0.5, -0.5, 0.5, 0.5]
    pooled = interval(cells_of(scores), weights, tokens)
    shared = contrast(seeded(scores, *[(0, 1, 2)] * 4), weights, tokens, is_grid=True)
    assert shared.half_width is not None and pooled.half_width is not None
    assert shared.half_width > pooled.half_width
    assert "shared seeds may affect cells alike" in shared.note and "wider than" in shared.design
    assert shared.p is not None and pooled.p is not None and shared.p >= pooled.p
    # An effect that all four share cancels
    scores[2:] += np.array([-1.0, 0, 1])[:, np.newaxis]
    shared = contrast(seeded(scores, *[(0, 1, 2)] * 4), weights, tokens, is_grid=True)
    assert "shared seeds" not in shared.note


def test_holm_and_benjamini_hochberg_agree_with_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 12, 60):
        p_values = (rng.random(size) ** 3).tolist()
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
        expected = multipletests(p_values, method="fdr_bh")[1]
        assert benjamini_hochberg(p_values) == pytest.approx(expected)
    assert holm([]) == benjamini_hochberg([]) == []


def test_equivalence_needs_the_whole_interval_inside_the_margin() -> None:
    scores = draw(2, 4, 30, seed=4)
    found = interval(cells_of(scores), [-1, 1], np.ones(30), level=0.9)
    assert found.half_width is not None
    edge = abs(found.estimate) + found.half_width
    assert is_equivalent(found, edge * 1.001) and not is_equivalent(found, edge * 0.999)
    # Two one-sided tests: the larger p of the two is 5% where the margin just reaches
    single = interval(cells_of(scores[:, :1]), [-1, 1], np.ones(30), level=0.9)
    assert not is_equivalent(single, 100.0), "single runs"
    same = interval(cells_of(scores[:1].repeat(2, axis=0)), [-1, 1], np.ones(30), level=0.9)
    assert not is_equivalent(replace(same, half_width=None), 1.0)
    with pytest.raises(ValueError, match="expected one of 90%"):
        is_equivalent(interval(cells_of(scores), [-1, 1], np.ones(30)), 1.0)


def test_mcnemar_agrees_with_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = (rng.random((2, 15)) < [[0.5], [0.8]]).astype(float)
        table = pd.crosstab(
            pd.Categorical(first, [0, 1]), pd.Categorical(second, [0, 1]), dropna=False
        )
        expected = other_mcnemar(table.to_numpy(), exact=True).pvalue
        assert mcnemar(first, second) == pytest.approx(min(1.0, expected))
    assert mcnemar(first, first) == 1.0


def test_single_runs_with_answers_that_are_right_or_wrong_use_mcnemar() -> None:
    first = np.array([[0.0, 0, 0, 0, 0, 0, 1, 1]])
    second = np.array([[1.0, 1, 1, 1, 1, 1, 1, 0]])
    cells = cells_of(np.stack([first, second]))
    found = contrast(cells, [-1, 1], np.ones(8), is_grid=False)
    assert (found.kind, found.p) == ("rows", mcnemar(first[0], second[0]))
    assert "McNemar" in found.note
    grouped = contrast(cells, [-1, 1], np.ones(8), np.arange(8) // 2, is_grid=False)
    assert "McNemar" not in grouped.note
    half = contrast(cells_of(np.stack([first / 2, second])), [-1, 1], np.ones(8), is_grid=False)
    assert "McNemar" not in half.note
    tokens = contrast(cells, [-1, 1], np.full(8, 2.0), is_grid=False)
    assert "McNemar" not in tokens.note


def test_two_single_runs_by_hand() -> None:
    cell = CellScores(np.array([[0.0, 2, 5, 5], [2, 2, 5, 7]]), "a")  # s2 = 0.5, nu = 1
    first, second = np.array([0.0, 1, 2, 3]), np.array([1.0, 3, 3, 5])  # 1 2 1 2
    found = compare_single_runs(first, second, [cell], np.ones(4))
    v_seed, v_row = 1.0, 0.25 / 3
    expected = (12.706205 * v_seed + 3.182446 * v_row) / math.sqrt(v_seed + v_row)
    assert (found.kind, found.estimate, found.df_seed) == ("seeds and rows", 1.5, 1)
    assert (found.v_seed, found.v_row) == pytest.approx((v_seed, v_row))
    assert found.half_width == pytest.approx(expected, rel=1e-6)
    # The two runs of the cell differ by 2 0 0 2: V_row = 4 / 3 / 4
    v_row = 1 / 3
    expected = (12.706205 * v_seed + 3.182446 * v_row) / math.sqrt(v_seed + v_row)
    assert noise_floor([cell], np.ones(4)) == pytest.approx(expected, rel=1e-6)
    lone = CellScores(cell.sums[:1], "a")
    assert noise_floor([lone], np.ones(4)) is None
    assert compare_single_runs(first, second, [lone], np.ones(4)).kind == "rows"
    with pytest.raises(ValueError, match="within one pool"):
        noise_floor([cell, replace(cell, pool="b")], np.ones(4))


def test_interaction_of_two_levels_is_the_test_of_their_difference() -> None:
    scores = draw(4, 3, 50, seed=6)
    cells, tokens = cells_of(scores), np.ones(50)
    found = interaction_test(cells, [[-1, 1, 0, 0], [0, 0, -1, 1]], tokens)
    difference = interval(cells, [-1, 1, 1, -1], tokens)
    assert found is not None
    assert found.statistic == pytest.approx((difference.estimate / difference.standard_error) ** 2)
    assert found.df == pytest.approx((1, 8))
    assert found.p == pytest.approx(stats.f.sf(found.statistic, 1, 8))


def test_interaction_does_not_depend_on_the_order_of_levels() -> None:
    cells, tokens = cells_of(draw(6, 3, 50, seed=7)), np.ones(50)
    cells[4:] = [replace(cell, pool="other") for cell in cells[4:]]
    levels = [[-1.0, 1, 0, 0, 0, 0], [0, 0, -1.0, 1, 0, 0], [0, 0, 0, 0, -1.0, 1]]
    found = interaction_test(cells, levels, tokens)
    moved = interaction_test(cells, [levels[2], levels[0], levels[1]], tokens)
    assert found is not None and moved is not None
    assert found.df[0] == 2 and 4 <= found.df[1] <= 12
    assert moved.p == pytest.approx(found.p)
    equal = np.stack([cell.sums for cell in cells])
    equal[3] += 2.0
    differing = interaction_test(cells_of(equal), levels, tokens)
    assert differing is not None and differing.p < found.p
    assert interaction_test(cells_of(draw(6, 1, 50)), levels, tokens) is None
    assert interaction_test(cells_of(np.ones((6, 2, 50))), levels, tokens) is None


def test_levels_of_simple_effects_hold_together() -> None:
    assert simple_level(3) == pytest.approx(1 - 0.05 / 3)


def test_p_reaches_far_into_the_tail() -> None:
    scores = draw(2, 10, 100, seed=8)
    scores[1] += 50
    found = interval(cells_of(scores), [-1, 1], np.ones(100))
    assert found.p is not None and 0 < found.p < 1e-12
    scores[1] += 1e9
    found = interval(cells_of(scores, "a"), [-1, 1], np.ones(100), statement="rows")
    assert found.p is not None and found.p >= 0


def test_cells_that_spread_otherwise_than_their_pool_are_told() -> None:
    quiet = [CellScores(np.array([[1.0], [1.01], [0.99]]) + at, "p") for at in range(4)]
    loud = [CellScores(np.array([[1.0], [1.2], [0.8]]) + at, "p") for at in range(4)]
    assert describe_other_spread(quiet[:2], quiet[2:]) == describe_other_spread(quiet, []) == ""
    told = describe_other_spread(loud, quiet)
    assert told.startswith("seeds vary 20 times more in these cells") and "too narrow" in told
    assert "vary 20 times less" in describe_other_spread(quiet, loud)
