"""The intervals and tests of `runner report`, on grids whose truth is known.

Draws scores row by row, with effects of runs, rows and noise of known size, calls the functions of
`runner.report.statistics` on them, and prints how often they find a difference where there is none,
how often an interval holds the true difference, and how often one of 0.1 is found. A figure beyond
its bar is marked, and the exit code is then 1.

    python benchmarks/intervals.py            # everything
    python benchmarks/intervals.py --quick    # a few seconds; wider bars

Numbers are fixed by `SEED` and the name of each simulation, whatever runs beside it.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import numpy as np
from known_truth import (
    BASE,
    GRID,
    GRID_CONTRASTS,
    TRUTHS,
    UNBALANCED_CONTRASTS,
    Truth,
    draw_grid,
    draw_scores,
    draw_tokens,
    number_groups,
    weigh,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runner.report.statistics import (
    INTERACTION_GATE,
    CellScores,
    Interval,
    benjamini_hochberg,
    compare_single_runs,
    contrast,
    holm,
    interaction_test,
    is_equivalent,
    simple_level,
)

Simulation = partial[list["Line"]]
SEED = 20261129
LEVEL = 0.95
DIFFERENCE = 0.1


# (seeds, rows) -> design -> (false positives, power): against needless width
REFERENCES: dict[tuple[int, int], dict[str, tuple[float, float]]] = {
    (3, 100): {"paired": (0.033, 0.21), "Welch": (0.029, 0.24), "pool of 4": (0.044, 0.37)},
    (3, 500): {"paired": (0.046, 0.28), "Welch": (0.033, 0.34), "pool of 4": (0.048, 0.52)},
    (5, 100): {"paired": (0.037, 0.42), "Welch": (0.038, 0.48), "pool of 4": (0.046, 0.54)},
    (5, 500): {"paired": (0.045, 0.60), "Welch": (0.041, 0.70), "pool of 4": (0.048, 0.77)},
    (10, 500): {"paired": (0.045, 0.94), "Welch": (0.046, 0.95), "pool of 4": (0.048, 0.96)},
}


@dataclass(frozen=True)
class Figure:
    """A share of draws, and the range that it must be in."""

    what: str
    value: float
    low: float
    high: float
    num_draws: int

    def is_missed(self, slack: float) -> bool:
        """True outside of the range, widened by so many standard errors of the count."""
        low = self.low - slack * self._error(self.low)
        high = self.high + slack * self._error(self.high)
        return not low <= self.value <= high

    def _error(self, share: float) -> float:
        return float(np.sqrt(share * (1 - share) / self.num_draws))


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    size: str  # seeds x rows
    figures: tuple[Figure, ...]


def find_two_cells(
    truth: Truth,
    size: tuple[int, int],
    num_draws: int,
    rng: np.random.Generator,
    difference: float,
    level: float = LEVEL,
) -> dict[str, list[Interval]]:
    """The intervals of two cells by each design."""
    num_seeds, num_rows = size
    found: dict[str, list[Interval]] = {design: [] for design in list_designs(truth)}
    groups = number_groups(truth, num_rows)
    for _ in range(num_draws):
        tokens = draw_tokens(rng, truth, num_rows)
        num_cells = 4 if "pool of 4" in found else 2
        sums = draw_scores(rng, truth, (num_cells, num_seeds, num_rows), tokens, groups)
        sums[1] += difference * tokens
        for design, intervals in found.items():
            is_paired, is_grid = design == "paired", design == "pool of 4"
            cells = [
                CellScores(one, "model", tuple(range(num_seeds)) if is_paired else ())
                for one in (sums if is_grid else sums[:2])
            ]
            weights = [-1.0, 1.0, 0.0, 0.0][: len(cells)]
            intervals.append(
                contrast(
                    cells,
                    weights,
                    tokens,
                    groups,
                    is_grid=is_grid,
                    is_same_start=is_paired,
                    level=level,
                )
            )
    return found


def list_designs(truth: Truth) -> list[str]:
    """The designs that two cells are compared by."""
    return ["paired", "Welch", "pool of 4"] if truth == BASE else ["paired", "Welch"]


def simulate_two_cells(
    truth: Truth, size: tuple[int, int], num_draws: int, rng: np.random.Generator
) -> list[Line]:
    """False positives without a difference; coverage and power with one of 0.1."""
    bar = 0.07 if size[0] == 2 else 0.065
    equal = find_two_cells(truth, size, num_draws, rng, 0.0)
    # A difference of answers that are right or wrong is no shift of their scores
    other = {} if truth.is_binary else find_two_cells(truth, size, num_draws, rng, DIFFERENCE)
    lines = []
    for design in equal:
        lowest, highest = 0.0, bar
        if truth == BASE and size in REFERENCES:
            rate, power = REFERENCES[size][design]
            lowest, highest = rate - 0.015, min(bar, rate + 0.015)
        if truth.name == "residual only" and size[0] == 10:
            lowest = 0.02  # .005 where the residual counts twice, with seeds and with rows
        figures = [Figure("rate", miss_share(equal[design], 0.0), lowest, highest, num_draws)]
        if other:
            covered = 1 - miss_share(other[design], DIFFERENCE)
            figures.append(Figure("coverage", covered, 1 - bar, 1.0, num_draws))
        if truth == BASE and size in REFERENCES:
            found = miss_share(other[design], 0.0)
            figures.append(Figure("power", found, power - 0.03, power + 0.03, num_draws))
        lines.append(Line(f"{truth.name}, {design}", f"{size[0]} x {size[1]}", tuple(figures)))
    return lines


def miss_share(intervals: Sequence[Interval], value: float) -> float:
    """The share of intervals that do not hold a value."""
    return float(np.mean([abs(one.estimate - value) > (one.half_width or 0) for one in intervals]))


def simulate_grid(
    kind: str, size: tuple[int, int], num_draws: int, rng: np.random.Generator
) -> list[Line]:
    """False positives of main and simple effects in a grid."""
    num_seeds, num_rows = size
    contrasts = UNBALANCED_CONTRASTS if kind == "unbalanced" else GRID_CONTRASTS
    found: dict[str, list[Interval]] = {name: [] for name in contrasts}
    tokens = np.ones(num_rows)
    for _ in range(num_draws):
        cells = draw_grid(rng, kind, num_seeds, num_rows)
        for name, weights in contrasts.items():
            found[name].append(contrast(cells, weights, tokens, is_grid=True))
    low, high = (0.0, 0.08) if num_seeds == 2 else (0.015, 0.07)
    if kind == "axis x seed":
        low, high = 0.0, 0.10
    return [
        Line(
            f"grid, {kind}: {name}",
            f"{num_seeds} x {num_rows}",
            (Figure("rate", miss_share(intervals, 0.0), low, high, num_draws),),
        )
        for name, intervals in found.items()
    ]


def simulate_gate(kind: str, num_draws: int, rng: np.random.Generator) -> list[Line]:
    """The size of the interaction gate in a grid without interaction."""
    tests = {
        "loss x count": [weigh(GRID, np.s_[0, i], np.s_[1, i]) for i in range(2)],
        "loss x model": [weigh(GRID, np.s_[0, :, i], np.s_[1, :, i]) for i in range(3)],
    }
    p_values: dict[str, list[float]] = {name: [] for name in tests}
    for _ in range(num_draws):
        cells = draw_grid(rng, kind, 3, 100)
        for name, simple_weights in tests.items():
            found = interaction_test(cells, simple_weights, np.ones(100))
            assert found is not None
            p_values[name].append(found.p)
    return [
        Line(
            f"gate, {kind}: {name}",
            "3 x 100",
            (
                Figure("rate", float(np.mean(np.array(p) < 0.05)), 0.02, 0.08, num_draws),
                Figure("rate at .20", float(np.mean(np.array(p) < 0.2)), 0.15, 0.23, num_draws),
            ),
        )
        for name, p in p_values.items()
    ]


def simulate_family(
    num_real: int, size: tuple[int, int], num_draws: int, rng: np.random.Generator
) -> list[Line]:
    """Any false positive under Holm, the share of false ones under Benjamini-Hochberg: 12 arms
    against one control, of which some differ by 0.3.
    """
    num_seeds, num_rows = size
    tokens = np.ones(num_rows)
    num_false = 0
    false_shares = []
    for _ in range(num_draws):
        sums = draw_scores(rng, BASE, (13, num_seeds, num_rows), tokens, None)
        sums[1 : 1 + num_real] += 0.3
        cells = [CellScores(one, "model") for one in sums]
        p_values = []
        for index in range(1, 13):
            weights = [-1.0] + [float(index == other) for other in range(1, 13)]
            p = contrast(cells, weights, tokens, is_grid=True).p
            assert p is not None
            p_values.append(p)
        num_false += any(p < 0.05 for p in holm(p_values)[num_real:])
        is_found = np.array(benjamini_hochberg(p_values)) < 0.05
        false_shares.append(is_found[num_real:].sum() / max(is_found.sum(), 1))
    name = f"12 contrasts, {num_real} real"
    text = f"{num_seeds} x {num_rows}"
    return [
        Line(f"{name}: Holm", text, (Figure("any", num_false / num_draws, 0, 0.06, num_draws),)),
        Line(
            f"{name}: Benjamini-Hochberg",
            text,
            (Figure("false", float(np.mean(false_shares)), 0, 0.06, num_draws),),
        ),
    ]


def simulate_declared(num_models: int, num_draws: int, rng: np.random.Generator) -> list[Line]:
    """Any clear effect of a declared contrast that has none: its mean, or where the gate finds an
    interaction its effects at the levels of the other axes. Holm counts all of them in any case.
    """
    shape = (2, 2, num_models)  # loss, count, model
    tokens = np.ones(100)
    mean = weigh(shape, np.s_[0], np.s_[1])
    by_axis = [[weigh(shape, np.s_[0, at], np.s_[1, at]) for at in range(2)]]
    if num_models > 1:
        by_axis.append([weigh(shape, np.s_[0, :, at], np.s_[1, :, at]) for at in range(num_models)])
    num_clear = num_shown_clear = 0
    for _ in range(num_draws):
        sums = draw_scores(rng, BASE, (4 * num_models, 3, 100), tokens, None)
        cells = [CellScores(one, f"model {at % num_models}") for at, one in enumerate(sums)]
        family = [contrast(cells, mean, tokens, is_grid=True)]
        told: list[int] = []
        for simple in by_axis:
            level = simple_level(len(simple))
            found = [contrast(cells, one, tokens, is_grid=True, level=level) for one in simple]
            test = interaction_test(cells, simple, tokens)
            if test is not None and test.p < INTERACTION_GATE:
                told += range(len(family), len(family) + len(simple))
            family += found
        told = told or [0]
        p_values = [one.p if one.p is not None else 1.0 for one in family]
        adjusted = holm(p_values)
        num_clear += any(is_clear(family[at], adjusted[at]) for at in told)
        of_told = holm([p_values[at] for at in told])
        num_shown_clear += any(map(is_clear, [family[at] for at in told], of_told))
    rate, rate_of_told = num_clear / num_draws, num_shown_clear / num_draws
    name = f"a declared null in {num_models} model{'s' * (num_models > 1)}"
    return [
        Line(name, "3 x 100", (Figure("any clear", rate, 0, 0.06, num_draws),)),
        # The result if Holm counted only the reported ones: no bar
        Line(f"{name}, told ones only", "3 x 100", (Figure("", rate_of_told, 0, 1, num_draws),)),
    ]


def is_clear(found: Interval, p_adjusted: float) -> bool:
    """True of what a report calls a clear difference."""
    bounds = found.bounds
    return bounds is not None and p_adjusted < 0.05 and not bounds[0] <= 0 <= bounds[1]


def simulate_equivalence(
    size: tuple[int, int], num_draws: int, rng: np.random.Generator
) -> list[Line]:
    """Equivalence shown where the true difference is the margin, 0.2, and where there is none."""
    margin = 0.2
    at_margin = find_two_cells(BASE, size, num_draws, rng, margin, level=0.90)
    equal = find_two_cells(BASE, size, num_draws, rng, 0.0, level=0.90)
    return [
        Line(
            f"equivalence, {design}",
            f"{size[0]} x {size[1]}",
            (
                Figure("shown", share_equivalent(at_margin[design], margin), 0, 0.06, num_draws),
                Figure("power", share_equivalent(equal[design], margin), 0, 1, num_draws),
            ),
        )
        for design in at_margin
    ]


def share_equivalent(intervals: Sequence[Interval], margin: float) -> float:
    """The share of intervals that show equivalence."""
    return float(np.mean([is_equivalent(one, margin) for one in intervals]))


def simulate_single_runs(
    size: tuple[int, int], num_draws: int, rng: np.random.Generator
) -> list[Line]:
    """False positives of two single runs of equal arms, with the spread of four other cells."""
    tokens = np.ones(size[1])
    found = []
    for _ in range(num_draws):
        sums = draw_scores(rng, BASE, (6, *size), tokens, None)
        cells = [CellScores(one, "model") for one in sums[2:]]
        found.append(compare_single_runs(sums[0, 0], sums[1, 0], cells, tokens))
    rate = miss_share(found, 0.0)
    text = f"{size[0]} x {size[1]}"
    return [Line("two single runs", text, (Figure("rate", rate, 0, 0.055, num_draws),))]


def simulate_mcnemar(num_rows: int, num_draws: int, rng: np.random.Generator) -> list[Line]:
    """False positives of two models that are right equally often."""
    truth = Truth("", 0.0, 0.2, 0.3, is_binary=True)
    tokens = np.ones(num_rows)
    p_values = []
    for _ in range(num_draws):
        cells = [
            CellScores(one, "") for one in draw_scores(rng, truth, (2, 1, num_rows), tokens, None)
        ]
        p_values.append(contrast(cells, [-1, 1], tokens, is_grid=False).p or 0.0)
    rate = float(np.mean(np.array(p_values) < 0.05))
    return [
        Line("McNemar, one seed", f"1 x {num_rows}", (Figure("rate", rate, 0, 0.055, num_draws),))
    ]


def list_simulations(*, is_quick: bool) -> Iterable[tuple[Simulation, int]]:
    """Each simulation with the number of its draws."""
    if is_quick:
        yield partial(simulate_two_cells, BASE, (3, 100)), 1000
        yield partial(simulate_two_cells, BASE, (3, 500)), 1000
        yield partial(simulate_two_cells, TRUTHS[3], (10, 100)), 1000
        yield partial(simulate_grid, "one model x 4", (3, 100)), 500
        yield partial(simulate_gate, "equal"), 1000
        yield partial(simulate_family, 4, (3, 100)), 500
        yield partial(simulate_declared, 2), 300
        yield partial(simulate_equivalence, (3, 100)), 500
        return
    for truth, num_seeds, num_rows in product(TRUTHS, (2, 3, 5, 10), (100, 500)):
        num_draws = 2000 if num_seeds * num_rows >= 2500 else 4000
        yield partial(simulate_two_cells, truth, (num_seeds, num_rows)), num_draws
    kinds = ("equal", "one model x 4", "seeds correlated .5", "unbalanced", "axis x seed")
    for kind, num_seeds in product(kinds, (2, 3, 5)):
        yield partial(simulate_grid, kind, (num_seeds, 100)), 4000
    for kind in ("equal", "one model x 4", "t3 noise"):
        yield partial(simulate_gate, kind), 4000
    for num_real, num_seeds in product((0, 4), (3, 5)):
        yield partial(simulate_family, num_real, (num_seeds, 100)), 4000
    for num_models in (1, 2, 3):
        yield partial(simulate_declared, num_models), 4000
    for size in ((3, 100), (3, 500), (5, 100)):
        yield partial(simulate_equivalence, size), 4000
        yield partial(simulate_single_runs, size), 4000
    for num_rows in (100, 500):
        yield partial(simulate_mcnemar, num_rows), 4000


def run_simulation(job: tuple[Simulation, int]) -> list[Line]:
    """The lines of one simulation, whose random numbers depend on what it is alone."""
    simulation, num_draws = job
    name = f"{simulation.func.__name__}{simulation.args}"
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    return simulation(num_draws, rng)


def format_table(lines: Sequence[Line], slack: float) -> str:
    """A Markdown table: a row for each kind of share, a column for each size; `!` beyond a bar."""
    sizes = sorted(
        {line.size for line in lines}, key=lambda size: [int(part) for part in size.split(" x ")]
    )
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        for figure in line.figures:
            name = line.name if figure is line.figures[0] else f"{line.name}, {figure.what}"
            text = f"{figure.value:.3f}".lstrip("0") + ("!" if figure.is_missed(slack) else "")
            rows.setdefault(name, {})[line.size] = text
    table = [["share of draws", *sizes], ["---"] + ["---:"] * len(sizes)]
    table += [[name, *(cells.get(size, "") for size in sizes)] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print the table and what is beyond its bar; 1 where anything is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few draws; bars wider by 3 errors")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="simulations whose name holds this")
    arguments = parser.parse_args(argv)
    slack = 3.0 if arguments.quick else 0.0
    jobs = [
        (simulation, num_draws)
        for simulation, num_draws in list_simulations(is_quick=arguments.quick)
        if arguments.only in f"{simulation.func.__name__}{simulation.args}"
    ]
    lines: list[Line] = []
    if arguments.processes == 1:
        for job in jobs:
            lines += run_simulation(job)
    else:
        with ProcessPoolExecutor(arguments.processes) as pool:
            for found in pool.map(run_simulation, jobs):
                lines += found
    print(format_table(lines, slack))
    missed = [(line, one) for line in lines for one in line.figures if one.is_missed(slack)]
    for line, one in missed:
        print(
            f"missed: {line.name}, {line.size}, {one.what}: {one.value:.4f}"
            f" is not in {one.low:.3f} to {one.high:.3f} ({one.num_draws:,} draws)"
        )
    usage = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    seconds = sum(one.ru_utime + one.ru_stime for one in usage)
    print(f"{len(missed)} figures beyond their bar; {seconds:,.0f} CPU seconds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
