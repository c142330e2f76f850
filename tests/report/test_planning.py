"""Seeds and rows that a difference needs, against the table of known detectable differences."""

import math

import numpy as np
import pytest
from scipy import stats

from runner.report.planning import MAX_SEEDS, Pilot, PoolSpread, limit_factor, measure_pool
from runner.report.statistics import CellScores

RUN, ROW, REST = 0.05, 0.2, 0.3


def make_pilot(
    num_rows: int, num_cells: int, load: float = 2.0, *, has_shared_seeds: bool = False
) -> Pilot:
    """The pilot whose variances are the true ones, of runs with these standard deviations."""
    rest = REST**2 / num_rows
    pool = PoolSpread("m", num_cells, nu=num_cells * 2, variance=RUN**2 + rest, rest=rest)
    row_variance = load * ROW**2 / num_rows
    return Pilot(((load, pool),), row_variance, num_rows, num_rows - 1, has_shared_seeds)


@pytest.mark.parametrize(
    ("num_seeds", "paired", "welch", "pool_of_4", "axis"),
    [
        (2, (0.77, 0.72), (0.32, 0.28), (0.23, 0.20), (0.080, 0.066)),
        (3, (0.26, 0.23), (0.19, 0.16), (0.17, 0.14), (0.065, 0.052)),
        (5, (0.16, 0.13), (0.14, 0.11), (0.14, 0.10), (0.054, 0.041)),
        (10, (0.11, 0.08), (0.11, 0.08), (0.11, 0.08), (0.044, 0.030)),
    ],
)
def test_detectable_differences_of_known_variances(
    num_seeds: int,
    paired: tuple[float, float],
    welch: tuple[float, float],
    pool_of_4: tuple[float, float],
    axis: tuple[float, float],
) -> None:
    for expected, num_cells, load in ((paired, 1, 2.0), (welch, 2, 2.0), (pool_of_4, 4, 2.0)):
        for num_rows, difference in zip((100, 500), expected, strict=True):
            pilot = make_pilot(num_rows, num_cells, load)
            found = pilot.detectable_difference(num_seeds, num_rows, 0.8)
            assert found == pytest.approx(difference, abs=0.006), (num_cells, num_rows)
    for num_rows, difference in zip((100, 500), axis, strict=True):
        found = make_pilot(num_rows, 12, 2 / 6).detectable_difference(num_seeds, num_rows, 0.8)
        assert found == pytest.approx(difference, abs=0.0015)


def test_more_rows_are_what_a_pilot_of_so_many_rows_would_have_found() -> None:
    small, large = make_pilot(100, 4), make_pilot(500, 4)
    found = small.detectable_difference(3, 500, 0.8)
    assert found == pytest.approx(large.detectable_difference(3, 500, 0.8))


def test_fewest_seeds_reach_the_difference_and_one_less_does_not() -> None:
    pilot = make_pilot(500, 4)
    seeds = pilot.find_seeds(0.08, 500, 0.8)
    assert seeds is not None
    assert pilot.detectable_difference(seeds, 500, 0.8) <= 0.08
    assert pilot.detectable_difference(seeds - 1, 500, 0.8) > 0.08
    assert pilot.find_seeds(10.0, 500, 0.8) == 3, "no fewer are worth planning"
    more = pilot.find_seeds(0.08, 500, 0.8, factor=1.5)
    assert more is not None and more > seeds
    assert pilot.find_seeds(0.02, 500, 0.8) is None, "rows alone vary more"
    assert pilot.detectable_difference(MAX_SEEDS, 500, 0.8) > 0.02


def test_five_shared_seeds_have_fewer_degrees_of_freedom() -> None:
    own, shared = make_pilot(500, 4), make_pilot(500, 4, has_shared_seeds=True)
    assert shared.detectable_difference(4, 500, 0.8) == own.detectable_difference(4, 500, 0.8)
    assert shared.detectable_difference(5, 500, 0.8) > own.detectable_difference(5, 500, 0.8)


def test_limits_of_a_standard_deviation() -> None:
    for nu, low, high in ((1, 0.45, 31.9), (2, 0.52, 6.3), (4, 0.60, 2.9), (24, 0.78, 1.4)):
        assert limit_factor(nu, 0.025) == pytest.approx(low, abs=0.006)
        assert limit_factor(nu, 0.975) == pytest.approx(high, rel=0.01)
        assert limit_factor(nu, 0.8) == pytest.approx(math.sqrt(nu / stats.chi2.ppf(0.2, nu)))


def test_spread_of_a_pool_is_that_of_its_runs() -> None:
    rng = np.random.default_rng(0)
    runs = rng.normal(0, RUN, (400, 5, 1)) + rng.normal(0, ROW, (400, 1, 50))
    scores = runs + rng.normal(0, REST, (400, 5, 50))
    cells = [CellScores(one, "m") for one in scores] + [CellScores(scores[0, :1], "m")]
    pool = measure_pool("m", cells, np.ones(50), None)
    assert pool is not None and (pool.num_cells, pool.nu) == (401, 1600)
    assert pool.rest == pytest.approx(REST**2 / 50, rel=0.05)
    assert pool.variance == pytest.approx(RUN**2 + REST**2 / 50, rel=0.1)
    assert measure_pool("m", cells[-1:], np.ones(50), None) is None


def test_parts_of_the_variance() -> None:
    runs, rows, noise = make_pilot(100, 4).split_variance(3)
    total = 2 * (RUN**2 / 3 + ROW**2 / 100 + REST**2 / 300)
    assert (runs, rows, noise) == pytest.approx(
        (2 * RUN**2 / 3 / total, 2 * ROW**2 / 100 / total, 2 * REST**2 / 300 / total)
    )
