"""Plans a grid from a pilot: the seeds and test rows that detect a difference of a given size, and
the device hours they need.

Existing runs provide the variances; the differences that they show play no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any, Final, Literal

from runner.errors import RunnerError
from runner.report.cells import build_cells, find_seed_axis, match_cells
from runner.report.contrasts import Aligned, Contrasts, build_metric
from runner.report.effects import Cell, Metric
from runner.report.planning import (
    MAX_SEEDS,
    MIN_SEEDS,
    PLANNING_LIMIT,
    Pilot,
    PoolSpread,
    limit_factor,
    measure_pool,
)
from runner.report.row_scores import BITS_PER_BYTE, LIKELIHOODS, NLL_PER_COMPLETION_TOKEN
from runner.report.rows import ReportRow, axis_text, list_axes, list_metrics, list_values
from runner.report.statistics import CellScores, per_seed_cell
from runner.report.variances import measure
from runner.run.paths import RunPaths
from runner.run.record import list_trained, load_record
from runner.text import align, cut, cut_middle, format_count

# Degrees of freedom of the seed variance below which plans are only a range, or marked as rough
MIN_NU: Final = 4
MIN_SURE_NU: Final = 8
# Multiples of the present number of test rows
_MORE_ROWS: Final = (1, 2, 4, 8)
_WIDTH: Final = 120
_NAME_WIDTH: Final = 52


@dataclass(frozen=True)
class Plan:
    """The seeds needed with one number of test rows. None: more than `MAX_SEEDS`."""

    num_test_rows: int
    num_seeds: int | None  # from the upper limit of the seed variance; None also below `MIN_NU`
    lowest_num_seeds: int | None  # from its lower limit
    highest_num_seeds: int | None
    num_runs: int | None  # of the whole grid
    device_hours: float | None


@dataclass(frozen=True)
class Comparison:
    """One kind of contrast: the difference that existing runs detect, and the plans for more."""

    name: str
    num_pairs: int  # of cells
    degrees_of_freedom: float  # of the seed variance in the pilot
    detectable_now: float | None  # None if most cells have one run
    # Shares of the present variance that are reduced only by seeds, only by test rows, by both
    share_of_runs: float
    share_of_rows: float
    share_of_noise: float
    # range: too few degrees of freedom to name a number of seeds; rough: to name a reliable one
    precision: Literal["range", "rough", "fair"]
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class PowerReport:
    """The plans of one grid, task and metric."""

    grid: str
    task: str
    metric: Metric
    effect: float
    power: float
    num_cells: int
    num_seeds: int  # of most cells
    range_of_seeds: tuple[int, int]  # with scores, lowest and highest of all cells; not in JSON
    num_runs: int  # with scores
    num_all_runs: int
    num_test_rows: int
    device_hours_per_run: float | None
    pools: tuple[PoolSpread, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def build_power_reports(
    rows: Sequence[ReportRow], effect: float, power: float, metric: str | None = None
) -> list[PowerReport]:
    """Build one report for each grid and task.

    Raises:
        RunnerError: no cell has two completed runs, or no run has the metric.
    """
    reports = []
    for grid in dict.fromkeys(row.grid for row in rows):
        of_grid = [row for row in rows if row.grid == grid]
        seed_axis = find_seed_axis(of_grid)
        cells = build_cells(of_grid, seed_axis)
        for task in dict.fromkeys(cell.task for cell in cells):
            of_task = [cell for cell in cells if cell.task == task]
            reports.append(_Planner(of_task, seed_axis, effect, power, metric).build())
    return reports


class _Planner:
    """Plans the cells of one grid and task by one metric."""

    def __init__(
        self,
        cells: Sequence[Cell],
        seed_axis: str | None,
        effect: float,
        power: float,
        metric: str | None,
    ) -> None:
        self.cells, self.effect, self.power = cells, effect, power
        self.grid, self.task = cells[0].grid, cells[0].task
        self.seed_axis = seed_axis
        self.metric = self._choose_metric(metric)
        self.contrasts = Contrasts(cells, self.metric, seed_axis, "seeds and rows")
        found = [self.contrasts.get(cell) for cell in cells]
        self.aligned = [one for one in found if isinstance(one, Aligned)]
        self.reasons = [one for one in found if isinstance(one, str)]
        self.hours = _find_hours(cells)
        self.is_grid = len(cells) > 2

    def build(self) -> PowerReport:
        """The plans for the cells of each base model, and for each axis."""
        pools = self._measure_pools()
        if not pools:
            raise self._refuse()
        pilots = [*self._build_pilots_of_cells(pools), *self._build_pilots_of_axes(pools)]
        if not pilots:
            raise RunnerError(
                f"{self.grid}: no two cells of {self.task} can be compared by {self.metric.title}",
                hint=f"see why: runner report runs/{self.grid}",
            )
        if all(pilot.seed_variance + pilot.row_variance == 0 for _, _, pilot in pilots):
            raise RunnerError(
                f"{self.grid}: its runs do not vary at all in {self.metric.title}, neither between"
                " seeds nor between rows, so there is nothing to plan from"
            )
        counts = [len(one.scores.sums) for one in self.aligned]
        num_seeds = max(set(counts), key=counts.count)
        comparisons = tuple(
            self._compare(name, num_pairs, pilot, num_seeds) for name, num_pairs, pilot in pilots
        )
        return PowerReport(
            grid=self.grid,
            task=self.task,
            metric=self.metric,
            effect=self.effect,
            power=self.power,
            num_cells=len(self.cells),
            num_seeds=num_seeds,
            range_of_seeds=(
                min(counts) if len(counts) == len(self.cells) else 0,
                max(counts),
            ),
            num_runs=sum(counts),
            num_all_runs=sum(len(cell.runs) for cell in self.cells),
            num_test_rows=max(len(one.row_ids) for one in self.aligned),
            device_hours_per_run=self.hours,
            pools=tuple(pools.values()),
            comparisons=comparisons,
            notes=tuple(self._list_notes(comparisons)),
        )

    def _choose_metric(self, name: str | None) -> Metric:
        runs = [run for cell in self.cells for run in cell.runs]
        modes = {key: mode for run in runs for key, mode in run.recipe.metric_modes.items()}
        known = [*LIKELIHOODS, *list_metrics(runs)]
        if name is not None and name not in known:
            raise RunnerError(
                f"{self.grid}: no run of {self.task} has the metric {name!r}",
                hint=f"--metric {' | '.join(known)}",
            )
        if name is None:
            tokens = {
                run.totals["tuned"].num_completion_tokens for run in runs if "tuned" in run.totals
            }
            name = NLL_PER_COMPLETION_TOKEN if len(tokens) <= 1 else BITS_PER_BYTE
        return build_metric(name, modes)

    def _measure_pools(self) -> dict[str, PoolSpread]:
        """The seed variance of each base model."""
        by_name: dict[str, list[Aligned]] = {}
        for one in self.aligned:
            by_name.setdefault(one.pool, []).append(one)
        pools = {}
        for name, some in by_name.items():
            # Cells with other rows or units than the first are not pilots of this pool
            same = [one for one in some if self.contrasts.find_difference([some[0], one]) == ""]
            scores = [one.scores for one in same]
            found = measure_pool(name, scores, some[0].units, some[0].groups)
            if found is not None:
                pools[name] = found
        return pools

    def _build_pilots_of_cells(
        self, pools: dict[str, PoolSpread]
    ) -> Iterable[tuple[str, int, Pilot]]:
        """Yield two cells of each base model, with the mean row variance of all such pairs."""
        for name, pool in pools.items():
            cells = [one for one in self.aligned if one.pool == name]
            pilots = []
            for first, second in combinations(cells, 2):
                differing = sum(
                    first.cell.axes.get(axis) != value for axis, value in second.cell.axes.items()
                )
                if differing == 1:
                    pilots += self._build_pilot([first, second], [-1.0, 1.0], pools)
            if pilots:
                row_variance = fmean(pilot.row_variance for pilot in pilots)
                shared = all(pilot.has_shared_seeds for pilot in pilots)
                first_pilot = pilots[0]
                pilot = Pilot(
                    first_pilot.pools,
                    row_variance,
                    first_pilot.num_rows,
                    first_pilot.df_row,
                    has_shared_seeds=shared,
                )
                yield f"two cells of {pool.name}", 1, pilot

    def _build_pilots_of_axes(
        self, pools: dict[str, PoolSpread]
    ) -> Iterable[tuple[str, int, Pilot]]:
        """Yield the mean over all pairs of cells for each axis; if an axis has several pairs of
        values, the one that needs the most seeds.
        """
        rows = [run for cell in self.cells for run in cell.runs]
        for axis in list_axes(rows):
            if axis == self.seed_axis:
                continue
            found: list[tuple[str, int, Pilot]] = []
            for reference, compared in combinations(list_values(rows, axis)[:4], 2):
                pairs = self._list_pairs(axis, reference, compared)
                if len(pairs) < 2:
                    continue
                used = [one for pair in pairs for one in pair]
                weights = [-1 / len(pairs), 1 / len(pairs)] * len(pairs)
                name = f"{axis}: {axis_text(reference)}, {axis_text(compared)}"
                found += [
                    (f"{name} (mean of {len(pairs)} pairs)", len(pairs), pilot)
                    for pilot in self._build_pilot(used, weights, pools)
                ]
            if found:
                yield max(found, key=lambda one: one[2].seed_variance + one[2].row_variance)

    def _list_pairs(
        self, axis: str, reference: Any, compared: Any
    ) -> list[tuple[Aligned, Aligned]]:
        matches = match_cells(self.cells, axis, reference, compared)
        pairs = []
        for first, second in matches.pairs:
            one, other = self.contrasts.get(first), self.contrasts.get(second)
            if isinstance(one, Aligned) and isinstance(other, Aligned):
                pairs.append((one, other))
        comparable = [
            pair
            for pair in pairs
            if self.contrasts.find_difference([pairs[0][0], pair[0], pair[1]]) == ""
        ]
        return comparable

    def _build_pilot(
        self, used: Sequence[Aligned], weights: Sequence[float], pools: dict[str, PoolSpread]
    ) -> list[Pilot]:
        """A pilot; None if a pool has no seed variance, or if rows or tokens differ."""
        names = [one.pool for one in used]
        if self.contrasts.find_difference(used) or any(name not in pools for name in names):
            return []
        scores, first = [one.scores for one in used], used[0]
        parts = measure(scores, weights, first.units, first.groups)
        loads: dict[str, float] = {}
        for name, weight in zip(names, weights, strict=True):
            loads[name] = loads.get(name, 0.0) + weight**2
        shares_seeds = _share_seeds(scores)
        if not self.is_grid and shares_seeds:  # they may be paired, with S - 1 degrees of freedom
            pools = {name: replace(pool, num_cells=1) for name, pool in pools.items()}
        return [
            Pilot(
                pools=tuple((load, pools[name]) for name, load in loads.items()),
                row_variance=max(parts.v_row - parts.v_res, 0.0),
                num_rows=len(first.row_ids),
                df_row=parts.df_row,
                has_shared_seeds=self.is_grid and shares_seeds,
            )
        ]

    def _compare(self, name: str, num_pairs: int, pilot: Pilot, num_seeds: int) -> Comparison:
        plans: list[Plan] = []
        for times in _MORE_ROWS:
            plan = self._plan(pilot, times * pilot.num_rows)
            plans.append(plan)
            if plan.highest_num_seeds is not None and (
                times > 1 and plan.highest_num_seeds == plans[-2].highest_num_seeds
            ):
                plans.pop()  # more rows save no seeds
                break
        of_runs, of_rows, of_noise = pilot.split_variance(num_seeds)
        return Comparison(
            name=name,
            num_pairs=num_pairs,
            degrees_of_freedom=pilot.nu,
            detectable_now=(
                pilot.detectable_difference(num_seeds, pilot.num_rows, self.power)
                if num_seeds > 1
                else None
            ),
            share_of_runs=of_runs,
            share_of_rows=of_rows,
            share_of_noise=of_noise,
            precision=(
                "range" if pilot.nu < MIN_NU else "rough" if pilot.nu < MIN_SURE_NU else "fair"
            ),
            plans=tuple(plans),
        )

    def _plan(self, pilot: Pilot, num_rows: int) -> Plan:
        low, high = (
            pilot.find_seeds(self.effect, num_rows, self.power, limit_factor(pilot.nu, level))
            for level in (1 - PLANNING_LIMIT, PLANNING_LIMIT)
        )
        num_runs = None if high is None or pilot.nu < MIN_NU else high * len(self.cells)
        hours = None if num_runs is None or self.hours is None else num_runs * self.hours
        return Plan(
            num_test_rows=num_rows,
            num_seeds=None if pilot.nu < MIN_NU else high,
            lowest_num_seeds=low,
            highest_num_seeds=high,
            num_runs=num_runs,
            device_hours=hours,
        )

    def _list_notes(self, comparisons: Sequence[Comparison]) -> Iterable[str]:
        least = min(one.degrees_of_freedom for one in comparisons)
        if least < MIN_NU:
            yield (
                "So few degrees of freedom give only a range of seeds; a pilot of two or three"
                " seeds in 4 or more cells says much more."
            )
        elif least < MIN_SURE_NU:
            yield "Fewer than 8 degrees of freedom: the numbers are rough."
        if any(plan.highest_num_seeds is None for one in comparisons for plan in one.plans):
            yield f"Over {MAX_SEEDS} seeds: use more test rows, or plan a larger difference."
        if self.hours is None:
            yield "No run recorded when its attempts ended, so device hours are unknown."
        for reason in self.reasons:
            yield f"Left out: {reason}."

    def _refuse(self) -> RunnerError:
        what = f"{self.grid}: no cell of {self.task} has two completed runs"
        if self.reasons and not self.aligned:
            what += f" with per-row {self.metric.title} ({self.reasons[0]})"
        return RunnerError(
            f"{what}, so the seed variance is unknown; plan from a pilot with 2 or 3 seeds in each"
            " of 4 or more cells",
            hint=(
                f"add `seed: [1, 2, 3]` to the axes of recipe_templates/{self.grid}/grid.yaml,"
                f" then: runner render {self.grid} && runner sweep recipes/{self.grid}"
            ),
        )


def _share_seeds(cells: Sequence[CellScores]) -> bool:
    return len(per_seed_cell(cells, [1.0] * len(cells)).seeds) >= 2


def _find_hours(cells: Iterable[Cell]) -> float | None:
    """The mean device hours of a run, each cell weighted equally."""
    of_cells = []
    for cell in cells:
        hours = [_measure_hours(run) for run in cell.runs if run.state == "completed"]
        known = [one for one in hours if one is not None]
        if known:
            of_cells.append(fmean(known))
    return fmean(of_cells) if of_cells else None


def _measure_hours(run: ReportRow) -> float | None:
    """The clock time of all attempts that trained, times their processes; None if a clock
    was set back.
    """
    if run.run_dir is None:
        return None
    seconds = 0.0
    for attempt in list_trained(load_record(RunPaths(run.run_dir)).attempts):
        if attempt.is_end_before_start:
            return None
        seconds += (attempt.measure_seconds() or 0.0) * attempt.num_processes
    return seconds / 3600 if seconds else None


def format_power(report: PowerReport) -> str:
    """The plan as text, at most 120 columns wide."""
    low, high = report.range_of_seeds
    seeds = f"mostly {format_count(report.num_seeds, 'seed')} each ({low} to {high})"
    if low == high:
        seeds = f"{format_count(low, 'seed')} each"
    unit = report.metric.unit if report.metric.unit != report.metric.title else "its own units"
    lines = [
        f"{report.grid}, {report.task}: {report.metric.title}, in {unit}",
        f"pilot: {report.num_runs} of {format_count(report.num_all_runs, 'run')} scored,"
        f" {format_count(report.num_cells, 'cell')}, {seeds},"
        f" {format_count(report.num_test_rows, 'test row')}",
        "",
        "standard deviation of runs that differ only in the seed",
        *_format_pools(report.pools),
        "",
        f"difference that these runs detect with power {report.power:.0%} (two-sided, at 5%), and"
        " the shares of its variance",
        *_format_pilot(report.comparisons),
        "  More seeds reduce the share due to runs, more test rows the share due to rows, and both"
        " the share due to noise.",
        "",
        f"to detect a difference of {report.effect:g} with the same power",
        *_format_plans(report.comparisons),
        f"  Seeds per cell, at least {MIN_SEEDS}, planned from the upper 80% limit of the standard"
        " deviation. The difference above",
        "  is computed from its estimate, so a plan may name more seeds than these runs have.",
        *_explain_runs(report.comparisons),
        *report.notes,
    ]
    return "\n".join(cut(line, _WIDTH) for line in lines)


def _explain_runs(comparisons: Sequence[Comparison]) -> list[str]:
    if all(one.precision == "range" for one in comparisons):
        return ["  A range of seeds has no number of runs or hours."]
    return [
        "  Runs and hours are for the whole grid, at the speed of the runs so far and including"
        " them."
    ]


def as_json(report: PowerReport) -> dict[str, Any]:
    """The plan for scripts; `limits` is the 95% interval of a standard deviation."""
    content = asdict(report)
    del content["range_of_seeds"]
    content["pools"] = [
        asdict(pool) | {"sd": pool.sd, "limits": [pool.limit(0.025), pool.limit(0.975)]}
        for pool in report.pools
    ]
    return content


def _format_pools(pools: Sequence[PoolSpread]) -> list[str]:
    rows = [("", "estimate", "true value within (95%)", "planned with", "degrees of freedom")]
    for pool in pools:
        low, high = pool.limit(0.025), pool.limit(0.975)
        within = f"{low:.4f} to {high:.4f}"
        planned = f"{pool.limit(PLANNING_LIMIT):.4f}" if pool.nu >= MIN_NU else "a range"
        name = cut_middle(f"  {pool.name}", _NAME_WIDTH)
        rows.append((name, f"{pool.sd:.4f}", within, planned, str(pool.nu)))
    return align(rows, left=[0])


def _format_pilot(comparisons: Sequence[Comparison]) -> list[str]:
    rows = [("", "difference", "due to runs", "due to rows", "due to noise")]
    for one in comparisons:
        rows.append(
            (
                cut_middle(f"  {one.name}", _NAME_WIDTH),
                "-" if one.detectable_now is None else f"{one.detectable_now:.4f}",
                f"{one.share_of_runs:.0%}",
                f"{one.share_of_rows:.0%}",
                f"{one.share_of_noise:.0%}",
            )
        )
    return align(rows, left=[0])


def _format_plans(comparisons: Sequence[Comparison]) -> list[str]:
    rows = [("", "test rows", "seeds", "runs", "device hours")]
    for one in comparisons:
        name = cut_middle(f"  {one.name}", _NAME_WIDTH)
        for plan in one.plans:
            rows.append((name, f"{plan.num_test_rows:,}", *_format_plan(plan, one.precision)))
            name = ""
    return align(rows, left=[0])


def _format_plan(plan: Plan, precision: str) -> tuple[str, str, str]:
    low, high = (
        f"over {MAX_SEEDS}" if count is None else str(count)
        for count in (plan.lowest_num_seeds, plan.highest_num_seeds)
    )
    if precision == "range":
        return (high if low == high else f"{low} to {high}"), "-", "-"
    num_runs = "" if plan.num_runs is None else f"{plan.num_runs:,}"
    hours = ""
    if plan.device_hours is not None:
        hours = (
            f"{plan.device_hours:,.1f}" if plan.device_hours >= 1 else f"{plan.device_hours:.2g}"
        )
    return high + (" (rough)" if precision == "rough" else ""), num_runs, hours
