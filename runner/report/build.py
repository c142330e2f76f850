"""Builds a report from the rows of its runs: the effects, their designs and adjusted p values.

The design of an effect is chosen before its result is known. Pairs of cells that are not comparable
get a reason instead of a number, and enter no mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Final

from runner.report.axis import AxisBuilder, Pair, Part, identify
from runner.report.cells import (
    Matches,
    build_cells,
    find_seed_axis,
    find_seed_warnings,
    match_cells,
    split_variants,
)
from runner.report.comparability import (
    find_not_recorded,
    find_other_scales,
    find_pair_refusal,
)
from runner.report.contrasts import Contrasts, build_metric
from runner.report.declared import Declared, find_undeclarable, list_declared, list_recorded
from runner.report.effects import (
    AxisEffects,
    Effect,
    Metric,
    Report,
)
from runner.report.row_scores import BITS_PER_BYTE, LIKELIHOODS, NLL_PER_COMPLETION_TOKEN
from runner.report.rows import ReportRow, axis_key, list_axes, list_metrics, list_values
from runner.report.statistics import (
    Statement,
    benjamini_hochberg,
    holm,
)
from runner.report.verdicts import write_verdicts
from runner.report.wording import name_some
from runner.text import format_count

# 4 values make 6 pairs of values; with more, each is compared only with the first
MAX_VALUES_ALL_PAIRS: Final = 4


def build_report(
    rows: Sequence[ReportRow],
    *,
    metrics: Sequence[str] | None = None,
    rows_fixed: bool = False,
    absent: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Everything that the runs allow to conclude, grid by grid.

    `metrics` replace the default ones: likelihood per token within one base model and per byte
    across several, and every metric of answers. A declared metric is always compared.
    `rows_fixed`: only seeds are random, so the report is about exactly these test rows.
    `absent`: by grid, the names of its runs that are not in `rows`. Nothing in such a grid is
    confirmatory, since the runs in `rows` may have been chosen by their results.
    """
    statement: Statement = "seeds" if rows_fixed else "seeds and rows"
    grids = [
        _Grid(
            [row for row in rows if row.grid == name],
            metrics,
            statement,
            (absent or {}).get(name, ()),
        )
        for name in dict.fromkeys(row.grid for row in rows)
    ]
    effects = _adjust(
        [one for grid in grids for one in grid.build_effects()],
        {grid.name: list_recorded(grid.rows) for grid in grids},
    )
    cells = [cell for grid in grids for cell in grid.cells]
    names = dict.fromkeys(effect.metric for effect in effects)
    report = Report(
        rows=tuple(rows),
        cells=tuple(cells),
        metrics=tuple(names),
        effects=tuple(effects),
        warnings=tuple(_find_warnings(rows, grids, metrics)),
        noise_floors={key: floor for grid in grids for key, floor in grid.find_noise_floors()},
    )
    return replace(report, verdicts=tuple(write_verdicts(report)))


def _find_warnings(
    rows: Sequence[ReportRow], grids: Sequence[_Grid], metrics: Sequence[str] | None
) -> list[str]:
    known = [*LIKELIHOODS, *list_metrics(rows)]
    warnings = [
        f"no run has the metric `{name}`; available: {', '.join(known)}"
        for name in metrics or ()
        if name not in known
    ]
    for grid in grids:
        if grid.absent:
            warnings.append(f"{grid.why_exploratory}: {name_some(grid.absent)}")
        if grid.variants:
            warnings.append(_describe_variants(grid.variants))
        warnings += find_seed_warnings(grid.rows)
        warnings += find_undeclarable(grid.declared, grid.rows, known, grid.name)
    return [*warnings, *find_other_scales(rows), *find_not_recorded(rows)]


def _describe_variants(rows: Sequence[ReportRow]) -> str:
    """A warning about runs made with overrides, and ways to compare them."""
    names = name_some(
        f"{row.recipe.run.full_name} ({', '.join(row.recipe.run.overrides)})" for row in rows
    )
    ways = "a key can be compared here once it is an axis of grid.yaml"
    if len(rows) == 1:
        return (
            f"1 run was made with overrides, so it is in no cell or effect: {names}."
            " `--format csv` has its scores, `runner compare A B` compares it with one other run,"
            f" and {ways}"
        )
    return (
        f"{len(rows)} runs were made with overrides, so they are in no cell or effect: {names}."
        " `--format csv` has their scores, `runner compare A B` compares two runs,"
        f" and {ways}"
    )


class _Grid:
    """The cells and effects of one grid."""

    def __init__(
        self,
        rows: Sequence[ReportRow],
        metrics: Sequence[str] | None,
        statement: Statement,
        absent: Sequence[str],
    ) -> None:
        rows, self.variants = split_variants(rows)
        self.rows, self.name, self.absent = rows, rows[0].grid, absent
        count, are = len(rows) + len(absent), "is" if len(absent) == 1 else "are"
        self.why_exploratory = (
            f"{len(absent)} of {format_count(count, 'run')} of grid {self.name} {are}"
            " not in this report"
            if absent
            else ""
        )
        self._metrics, self._statement = metrics, statement
        self.seed_axis = find_seed_axis(rows)
        self.cells = build_cells(rows, self.seed_axis)
        self.declared = list_declared(rows)
        self._modes = {name: mode for row in rows for name, mode in row.recipe.metric_modes.items()}
        self._contrasts: dict[tuple[str, str], Contrasts] = {}

    def build_effects(self) -> list[AxisEffects]:
        """The effects of every axis other than the seed, by task."""
        found = []
        for axis in list_axes(self.rows):
            if axis != self.seed_axis:
                found += self._build_axis(axis)
        tasks = list(dict.fromkeys(cell.task for cell in self.cells))

        def rank(one: AxisEffects) -> tuple[int, bool]:
            """Sort by task, declared contrasts first."""
            return tasks.index(one.task) if one.task in tasks else len(tasks), not one.is_declared

        return sorted(found, key=rank)

    def find_noise_floors(self) -> list[tuple[tuple[str, str, str], float]]:
        """The noise floor of each task and metric that was compared."""
        floors = []
        for (task, metric), contrasts in self._contrasts.items():
            if (floor := contrasts.find_overall_noise_floor()) is not None:
                floors.append(((self.name, task, metric), floor))
        return floors

    def _build_axis(self, axis: str) -> list[AxisEffects]:
        values = list_values(self.rows, axis)
        is_with_first_only = len(values) > MAX_VALUES_ALL_PAIRS
        every = [match_cells(self.cells, axis, *two) for two in self._choose_pairs(axis, values)]
        across_models: dict[str, bool] = {}
        for matches in every:
            for first, second in matches.pairs:
                is_across = first.runs[0].model_name != second.runs[0].model_name
                across_models[first.task] = across_models.get(first.task, False) or is_across
        found = []
        for matches in every:
            for part in _split_by_task(matches):
                primary = self._choose_likelihood(part, across_models.get(part.task, False))
                for name in self._list_metrics(part, primary):
                    effects = self._build_axis_effects(part, build_metric(name, self._modes))
                    found.append(replace(effects, is_with_first_only=is_with_first_only))
        return found

    def _choose_pairs(self, axis: str, values: Sequence[Any]) -> list[tuple[Any, Any]]:
        """The pairs of values to compare: every two, or each with the first. Declared pairs
        are always included, in the declared direction.
        """
        if len(values) > MAX_VALUES_ALL_PAIRS:
            chosen = [(values[0], value) for value in values[1:]]
        else:
            chosen = list(combinations(values, 2))
        by_keys = {tuple(map(axis_key, two)): two for two in chosen}
        known = {axis_key(value) for value in values}
        for one in self.declared:
            keys = (axis_key(one.reference), axis_key(one.compared))
            if one.axis == axis and keys[0] != keys[1] and known.issuperset(keys):
                if keys[::-1] in by_keys:
                    by_keys = {
                        (keys if key == keys[::-1] else key): two for key, two in by_keys.items()
                    }
                by_keys[keys] = (one.reference, one.compared)
        return list(by_keys.values())

    def _choose_likelihood(self, part: Part, is_across_models: bool) -> str:
        """Nats per completion token, or bits per byte if base models differ in their
        tokens. The choice uses token counts only, never scores.
        """
        if is_across_models:
            return BITS_PER_BYTE
        by_model: dict[str, set[int]] = {}
        for pair in part.pairs:
            for run in pair[0].runs + pair[1].runs:
                if "tuned" in run.totals:
                    count = run.totals["tuned"].num_completion_tokens
                    by_model.setdefault(run.model_name, set()).add(count)
        counts = list(by_model.values())
        is_other = any(one != counts[0] for one in counts)
        return BITS_PER_BYTE if is_other else NLL_PER_COMPLETION_TOKEN

    def _list_metrics(self, part: Part, primary: str) -> list[str]:
        runs = [run for pair in part.pairs for cell in pair for run in cell.runs]
        of_answers = list_metrics(runs)
        known = [*LIKELIHOODS, *of_answers]
        chosen = [primary, *of_answers]
        if self._metrics is not None:
            chosen = [name for name in self._metrics if name in known]
        # Even if no run of these two values has it, so that the report says so
        known += list_metrics(self.rows)
        chosen += [one.metric for one in self._list_declared(part) if one.metric in known]
        return list(dict.fromkeys(chosen))

    def _list_declared(self, part: Part) -> list[Declared]:
        keys = (part.axis, axis_key(part.reference), axis_key(part.compared))
        return [one for one in self.declared if one.key[:3] == keys]

    def _get_contrasts(self, task: str, metric: Metric) -> Contrasts:
        key = (task, metric.name)
        if key not in self._contrasts:
            cells = [cell for cell in self.cells if cell.task == task]
            self._contrasts[key] = Contrasts(cells, metric, self.seed_axis, self._statement)
        return self._contrasts[key]

    def _build_axis_effects(self, part: Part, metric: Metric) -> AxisEffects:
        declared = [one for one in self._list_declared(part) if one.metric == metric.name]
        if part.is_across_tasks:
            effects = _refuse_across_tasks(self.name, part, metric)
        else:
            contrasts = self._get_contrasts(part.task, metric)
            builder = AxisBuilder(
                part, metric, contrasts, declared[0] if declared else None, self.why_exploratory
            )
            effects = builder.build(self.name)
        return replace(effects, is_declared=bool(declared))


def _split_by_task(matches: Matches) -> list[Part]:
    pairs: dict[str, list[Pair]] = {}
    crossing: dict[str, list[Pair]] = {}
    for first, second in matches.pairs:
        if first.task == second.task:
            pairs.setdefault(first.task, []).append((first, second))
        else:
            crossing.setdefault(f"{first.task} and {second.task}", []).append((first, second))
    reasons: dict[str, list[str]] = {}
    for task, reason in matches.unpaired:
        reasons.setdefault(task, []).append(reason)
    values = (matches.axis, matches.reference, matches.compared)
    parts = [
        Part(*values, task, tuple(pairs.get(task, ())), tuple(reasons.get(task, ())))
        for task in dict.fromkeys([*pairs, *reasons])
    ]
    return parts + [
        Part(*values, tasks, tuple(some), (), is_across_tasks=True)
        for tasks, some in crossing.items()
    ]


def _refuse_across_tasks(grid: str, part: Part, metric: Metric) -> AxisEffects:
    first, second = part.pairs[0]
    reason = find_pair_refusal(metric, first.runs, second.runs)
    refused = Effect(
        metric, part.axis, part.reference, part.compared, {}, part.pairs, None, (reason,)
    )
    return AxisEffects(
        grid=grid,
        task=part.task,
        metric=metric,
        axis=part.axis,
        reference=part.reference,
        compared=part.compared,
        pooled=refused,
        depends_on=(),
        interactions=(),
        simple={},
        cells=(),
        unpaired=part.unpaired,
    )


def _adjust(
    effects: Sequence[AxisEffects], recorded: Mapping[str, Sequence[Declared]]
) -> list[AxisEffects]:
    """The effects with adjusted p values: Holm over the families of all declared contrasts
    of a grid, Benjamini-Hochberg over all other effects of the report. A contrast that is shown
    twice counts once.
    """
    exploratory: dict[tuple[Any, ...], float] = {}
    for one in effects:
        for effect in _list_all(one):
            p = effect.interval.p if effect.interval is not None and effect.is_of_seeds else None
            if p is not None and not effect.is_confirmatory:
                exploratory[identify(effect)] = p
    by_rate = dict(zip(exploratory, benjamini_hochberg(list(exploratory.values())), strict=True))
    by_holm: dict[tuple[Any, ...], float] = {}
    for grid, declared in recorded.items():
        by_holm |= _adjust_declared([one for one in effects if one.grid == grid], declared)

    def adjust(effect: Effect) -> Effect:
        adjusted = by_holm if effect.is_confirmatory else by_rate
        p = adjusted.get(identify(effect)) if effect.is_of_seeds else None
        return replace(effect, p_adjusted=p)

    return [
        replace(
            one,
            pooled=adjust(one.pooled) if one.pooled is not None else None,
            simple={axis: tuple(map(adjust, some)) for axis, some in one.simple.items()},
            cells=tuple(map(adjust, one.cells)),
        )
        for one in effects
    ]


def _adjust_declared(
    effects: Sequence[AxisEffects], recorded: Sequence[Declared]
) -> dict[tuple[Any, ...], float]:
    """The p values of the declared contrasts of one grid, adjusted by Holm.

    Each contrast counts with all effects that may answer it, since the results choose among them.
    A contrast without any p counts as one.
    """
    family: dict[tuple[Any, ...], float] = {}
    for one in effects:
        for effect in one.family:
            if effect.is_confirmatory and effect.interval is not None:
                p = effect.interval.p
                family[identify(effect)] = 1.0 if p is None else p
    answered = {_key(one) for one in effects if any(e.is_confirmatory for e in one.family)}
    num_without = len({one.key for one in recorded} - answered)
    adjusted = holm([*family.values(), *[1.0] * num_without])
    return dict(zip(family, adjusted, strict=False))


def _key(one: AxisEffects) -> tuple[str, str, str, str]:
    return one.axis, axis_key(one.reference), axis_key(one.compared), one.metric.name


def _list_all(one: AxisEffects) -> list[Effect]:
    pooled = [one.pooled] if one.pooled is not None else []
    return pooled + [effect for some in one.simple.values() for effect in some] + list(one.cells)
