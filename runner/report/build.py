"""Builds a report from the rows of its runs: which effects there are, and what each may say.

The design of an effect is chosen before its result is looked at. Pairs of cells that cannot be
compared give a reason in place of a number, and are in no mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final

from runner.report.cells import (
    Matches,
    build_cells,
    find_seed_axis,
    find_what_seeds_change,
    match_cells,
)
from runner.report.comparability import (
    Arms,
    Runs,
    count_recipe_differences,
    find_flags,
    find_joint_refusal,
    find_not_recorded,
    find_other_scales,
    find_pair_refusal,
)
from runner.report.contrasts import Aligned, Contrasts, build_metric
from runner.report.declared import Declared, find_undeclarable, judge, list_declared
from runner.report.effects import (
    AxisEffects,
    Cell,
    Effect,
    Equivalence,
    Interaction,
    Metric,
    Report,
)
from runner.report.row_scores import BITS_PER_BYTE, LIKELIHOODS, NLL_PER_COMPLETION_TOKEN
from runner.report.rows import ReportRow, axis_key, list_axes, list_metrics, list_values
from runner.report.statistics import (
    INTERACTION_GATE,
    Statement,
    benjamini_hochberg,
    holm,
    is_equivalent,
    simple_level,
)
from runner.report.verdicts import write_verdicts

# 4 values make 6 pairs of values; with more, each is compared with the first only
MAX_VALUES_ALL_PAIRS: Final = 4
_LEVEL: Final = 0.95
_TOST_LEVEL: Final = 0.90

Pair = tuple[Cell, Cell]


def build_report(
    rows: Sequence[ReportRow], *, metrics: Sequence[str] | None = None, rows_fixed: bool = False
) -> Report:
    """Everything that the runs allow to say, grid by grid.

    `metrics` are compared in place of those chosen: the likelihood per token within one base model
    and per byte across several, and every metric of answers. A declared metric is always compared.
    `rows_fixed`: seeds alone are random, so that the report speaks of these very test rows.
    """
    statement: Statement = "seeds" if rows_fixed else "seeds and rows"
    grids = [
        _Grid([row for row in rows if row.grid == name], metrics, statement)
        for name in dict.fromkeys(row.grid for row in rows)
    ]
    effects = _adjust([one for grid in grids for one in grid.build_effects()])
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
        f"no run has the metric `{name}`; there are: {', '.join(known)}"
        for name in metrics or ()
        if name not in known
    ]
    for grid in grids:
        warnings += find_what_seeds_change(grid.rows)
        warnings += find_undeclarable(grid.declared, grid.rows, known, grid.name)
    return [*warnings, *find_other_scales(rows), *find_not_recorded(rows)]


class _Grid:
    """The cells and effects of one grid."""

    def __init__(
        self, rows: Sequence[ReportRow], metrics: Sequence[str] | None, statement: Statement
    ) -> None:
        self.rows, self.name = rows, rows[0].grid
        self._metrics, self._statement = metrics, statement
        self.seed_axis = find_seed_axis(rows)
        self.cells = build_cells(rows, self.seed_axis)
        self.declared = list_declared(rows)
        self._modes = {name: mode for row in rows for name, mode in row.recipe.metric_modes.items()}
        self._contrasts: dict[tuple[str, str], Contrasts] = {}

    def build_effects(self) -> list[AxisEffects]:
        """The effects of every axis but the seed, by task."""
        found = []
        for axis in list_axes(self.rows):
            if axis != self.seed_axis:
                found += self._build_axis(axis)
        tasks = list(dict.fromkeys(cell.task for cell in self.cells))
        return sorted(
            found, key=lambda one: tasks.index(one.task) if one.task in tasks else len(tasks)
        )

    def find_noise_floors(self) -> list[tuple[tuple[str, str, str], float]]:
        """What two single runs differ by, of each task and metric that was compared."""
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
        """The values to compare: every two, or all with the first; declared ones in any case, in
        the direction that was declared.
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

    def _choose_likelihood(self, part: _Part, is_across_models: bool) -> str:
        """Nats per completion token, or bits per byte where several base models have other tokens.
        Token counts alone are looked at, no scores.
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

    def _list_metrics(self, part: _Part, primary: str) -> list[str]:
        runs = [run for pair in part.pairs for cell in pair for run in cell.runs]
        of_answers = list_metrics(runs)
        known = [*LIKELIHOODS, *of_answers]
        chosen = [primary, *of_answers]
        if self._metrics is not None:
            chosen = [name for name in self._metrics if name in known]
        chosen += [one.metric for one in self._list_declared(part) if one.metric in known]
        return list(dict.fromkeys(chosen))

    def _list_declared(self, part: _Part) -> list[Declared]:
        keys = (part.axis, axis_key(part.reference), axis_key(part.compared))
        return [one for one in self.declared if one.key[:3] == keys]

    def _get_contrasts(self, task: str, metric: Metric) -> Contrasts:
        key = (task, metric.name)
        if key not in self._contrasts:
            cells = [cell for cell in self.cells if cell.task == task]
            self._contrasts[key] = Contrasts(cells, metric, self.seed_axis, self._statement)
        return self._contrasts[key]

    def _build_axis_effects(self, part: _Part, metric: Metric) -> AxisEffects:
        if part.is_across_tasks:
            return _refuse_across_tasks(self.name, part, metric)
        declared = [one for one in self._list_declared(part) if one.metric == metric.name]
        contrasts = self._get_contrasts(part.task, metric)
        builder = _AxisBuilder(part, metric, contrasts, declared[0] if declared else None)
        return builder.build(self.name)


@dataclass(frozen=True, eq=False)
class _Part:
    """The pairs of cells along two values of an axis, of one task; or all that cross tasks."""

    axis: str
    reference: Any
    compared: Any
    task: str
    pairs: tuple[Pair, ...]
    unpaired: tuple[str, ...]
    is_across_tasks: bool = False


def _split_by_task(matches: Matches) -> list[_Part]:
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
        _Part(*values, task, tuple(pairs.get(task, ())), tuple(reasons.get(task, ())))
        for task in dict.fromkeys([*pairs, *reasons])
    ]
    return parts + [
        _Part(*values, tasks, tuple(some), (), is_across_tasks=True)
        for tasks, some in crossing.items()
    ]


def _refuse_across_tasks(grid: str, part: _Part, metric: Metric) -> AxisEffects:
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


class _AxisBuilder:
    """The effects of two values of an axis, by one metric."""

    def __init__(
        self, part: _Part, metric: Metric, contrasts: Contrasts, declared: Declared | None
    ) -> None:
        self.part, self.metric, self.contrasts, self.declared = part, metric, contrasts, declared
        self.refusals = [self._find_refusal(pair) for pair in part.pairs]
        # Pairs that have a difference
        self.pairs = [
            pair for pair, refusal in zip(part.pairs, self.refusals, strict=True) if not refusal
        ]

    def build(self, grid: str) -> AxisEffects:
        cells = tuple(
            self._build_effect([pair], self._name_place(pair)) for pair in self.part.pairs
        )
        pooled: Effect | None = None
        interactions: tuple[Interaction, ...] = ()
        simple: dict[str, tuple[Effect, ...]] = {}
        has_seeds = any(
            effect.interval is not None and effect.interval.kind != "rows" for effect in cells
        )
        if not self.pairs and cells:
            pooled = self._refuse_all()
        elif len(self.part.pairs) > 1 and has_seeds:
            pooled = self._build_effect(self.part.pairs, {})
            simple = self._build_simple()
            if pooled.interval is not None:
                interactions = self._test_interactions()
        depends_on = tuple(one.other for one in interactions if one.p < INTERACTION_GATE)
        effects = AxisEffects(
            grid=grid,
            task=self.part.task,
            metric=self.metric,
            axis=self.part.axis,
            reference=self.part.reference,
            compared=self.part.compared,
            pooled=None if depends_on else pooled,
            depends_on=depends_on,
            interactions=interactions,
            simple=simple,
            cells=cells,
            recipe_differences=count_recipe_differences(self._build_arms(self.part.pairs)),
            unpaired=self.part.unpaired,
        )
        return self._apply_declaration(effects)

    def _find_refusal(self, pair: Pair) -> str:
        first, second = (self.contrasts.list_runs(cell) for cell in pair)
        if not first or not second:
            lacking = pair[0] if not first else pair[1]
            reason = self.contrasts.get(lacking)
            return reason if isinstance(reason, str) else ""
        if refusal := find_pair_refusal(self.metric, first, second):
            return refusal
        found = [self.contrasts.get(cell) for cell in pair]
        reasons = [one for one in found if isinstance(one, str)]
        if reasons:
            return reasons[0]
        return self.contrasts.find_difference([one for one in found if isinstance(one, Aligned)])

    def _refuse_all(self) -> Effect:
        reasons = tuple(dict.fromkeys(self.refusals))
        return self._make([], {}, self.part.pairs, reasons)

    def _make(
        self,
        used: Sequence[Pair],
        at: Mapping[str, Any],
        pairs: Sequence[Pair],
        refused: Sequence[str] = (),
    ) -> Effect:
        return Effect(
            metric=self.metric,
            axis=self.part.axis,
            reference=self.part.reference,
            compared=self.part.compared,
            at=at,
            pairs=tuple(used or pairs),
            interval=None,
            refused=tuple(refused),
            flags=find_flags(self._build_arms(used or pairs)),
        )

    def _build_effect(
        self, pairs: Sequence[Pair], at: Mapping[str, Any], level: float = _LEVEL
    ) -> Effect:
        """The mean effect over pairs of cells; those that cannot be compared are left out."""
        asked = {id(pair) for pair in pairs}
        left_out = [
            reason
            for pair, reason in zip(self.part.pairs, self.refusals, strict=True)
            if reason and id(pair) in asked
        ]
        used = [pair for pair in self.pairs if id(pair) in asked]
        if not used:
            return self._make([], at, pairs, list(dict.fromkeys(left_out)))
        runs = tuple(
            run for pair in used for cell in pair for run in self.contrasts.list_runs(cell)
        )
        aligned, weights = self._weigh(used)
        refusal = find_joint_refusal(self.metric, runs) or self.contrasts.find_difference(aligned)
        effect = self._make(used, at, pairs)
        if refusal:
            return replace(effect, refused=(refusal,))
        interval = self.contrasts.find_interval(aligned, weights, level)
        if interval.kind == "rows" and len(used) > 1:
            single = [one.cell.runs[0].name for one in aligned if len(one.runs) == 1]
            reason = f"one seed only, as of {single[0]}: nothing says what another seed would give"
            return replace(effect, refused=(reason,))
        floor = self.contrasts.find_noise_floor(aligned)
        flags = list(effect.flags)
        if left_out:
            flags.append(
                f"{len(left_out)} of {len(pairs)} pairs of cells are left out:"
                f" {'; '.join(dict.fromkeys(left_out))}"
            )
        if not at and self.part.unpaired:
            flags.append(_describe_unpaired(self.part.unpaired))
        return replace(
            effect,
            interval=interval,
            flags=tuple(flags),
            design=interval.design,
            noise_floor=floor,
            is_below_noise=floor is not None and abs(interval.estimate) < floor,
        )

    def _weigh(self, pairs: Sequence[Pair]) -> tuple[list[Aligned], list[float]]:
        aligned, weights = [], []
        for first, second in pairs:
            for cell, sign in ((first, -1.0), (second, 1.0)):
                found = self.contrasts.get(cell)
                assert isinstance(found, Aligned), "such a pair was refused"
                aligned.append(found)
                weights.append(sign / len(pairs))
        return aligned, weights

    def _list_others(self) -> dict[str, list[tuple[Any, list[Pair]]]]:
        """The other axes that have several values among the pairs: each value, and all pairs that
        have it.
        """
        found: dict[str, dict[str, tuple[Any, list[Pair]]]] = {}
        for pair in self.pairs:
            for axis, value in self._name_place(pair).items():
                _, some = found.setdefault(axis, {}).setdefault(axis_key(value), (value, []))
                some.append(pair)
        return {axis: list(levels.values()) for axis, levels in found.items() if len(levels) > 1}

    def _build_simple(self) -> dict[str, tuple[Effect, ...]]:
        refused = [
            pair for pair, reason in zip(self.part.pairs, self.refusals, strict=True) if reason
        ]
        simple = {}
        for axis, levels in self._list_others().items():
            level = simple_level(len(levels), _LEVEL)
            effects = []
            for value, pairs in levels:
                key = axis_key(value)
                left_out = [
                    pair
                    for pair in refused
                    if axis in pair[0].axes and axis_key(pair[0].axes[axis]) == key
                ]
                effects.append(self._build_effect([*pairs, *left_out], {axis: value}, level))
            simple[axis] = tuple(effects)
        return simple

    def _test_interactions(self) -> tuple[Interaction, ...]:
        aligned, _ = self._weigh(self.pairs)
        places = {id(pair): at for at, pair in enumerate(self.pairs)}
        found = []
        for axis, levels in self._list_others().items():
            weights = []
            for _, pairs in levels:
                row = [0.0] * len(aligned)  # reference and compared of each pair, in turn
                for pair in pairs:
                    at = 2 * places[id(pair)]
                    row[at], row[at + 1] = -1 / len(pairs), 1 / len(pairs)
                weights.append(row)
            test = self.contrasts.test_interaction(aligned, weights)
            if test is not None:
                found.append(Interaction(axis, test.p, test.statistic, test.df))
        return tuple(found)

    def _name_place(self, pair: Pair) -> dict[str, Any]:
        return {axis: value for axis, value in pair[0].axes.items() if axis != self.part.axis}

    def _build_arms(self, pairs: Iterable[Pair]) -> Arms:
        kept, runs = [], []
        for pair in pairs:
            both: tuple[Runs, Runs] = (
                self.contrasts.list_runs(pair[0]),
                self.contrasts.list_runs(pair[1]),
            )
            if both[0] and both[1]:
                kept.append(pair)
                runs.append(both)
        return Arms(
            self.part.axis, self.part.reference, self.part.compared, tuple(kept), tuple(runs)
        )

    def _apply_declaration(self, effects: AxisEffects) -> AxisEffects:
        """The effects, those that answer a declared contrast marked, with the margin's test."""
        if self.declared is None:
            return effects
        answers = {_identify(effect) for effect in effects.main}

        def mark(effect: Effect) -> Effect:
            return self._declare(effect) if _identify(effect) in answers else effect

        return replace(
            effects,
            pooled=mark(effects.pooled) if effects.pooled is not None else None,
            simple={axis: tuple(map(mark, some)) for axis, some in effects.simple.items()},
            cells=tuple(map(mark, effects.cells)),
        )

    def _declare(self, effect: Effect) -> Effect:
        assert self.declared is not None
        runs = [
            run for pair in effect.pairs for cell in pair for run in self.contrasts.list_runs(cell)
        ]
        standing = judge(self.declared, runs)
        if not standing.is_confirmatory:
            return replace(effect, why_exploratory=standing.why_exploratory)
        if effect.interval is None or effect.interval.kind == "rows":
            return effect
        return replace(effect, is_confirmatory=True, equivalence=self._test_margin(effect))

    def _test_margin(self, effect: Effect) -> Equivalence | None:
        assert self.declared is not None
        if self.declared.margin is None:
            return None
        aligned, weights = self._weigh(effect.pairs)
        interval = self.contrasts.find_interval(aligned, weights, _TOST_LEVEL)
        if interval.bounds is None:
            return None
        is_shown = is_equivalent(interval, self.declared.margin)
        return Equivalence(self.declared.margin, interval.bounds, is_shown)


def _describe_unpaired(reasons: Sequence[str]) -> str:
    cells = "1 cell has" if len(reasons) == 1 else f"{len(reasons)} cells have"
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"{cells} no pair, and nothing stands in for it: {'; '.join(reasons[:3])}{more}"


def _identify(effect: Effect) -> tuple[Any, ...]:
    """The same for two effects that compare the same runs by the same metric."""
    return (effect.metric.name, *(id(cell) for pair in effect.pairs for cell in pair))


def _adjust(effects: Sequence[AxisEffects]) -> list[AxisEffects]:
    """The effects with adjusted p values: Holm over the confirmatory ones of a grid, Benjamini and
    Hochberg over all others of the report. One contrast that is shown twice counts once.
    """
    confirmatory: dict[str, dict[tuple[Any, ...], float]] = {}
    exploratory: dict[tuple[Any, ...], float] = {}
    for one in effects:
        for effect in _list_all(one):
            if effect.interval is None or effect.interval.kind == "rows":
                continue
            p = effect.interval.p
            if p is not None and effect.is_confirmatory:
                confirmatory.setdefault(one.grid, {})[_identify(effect)] = p
            elif p is not None:
                exploratory[_identify(effect)] = p
    adjusted: dict[tuple[Any, ...], float] = {}
    adjusted |= zip(exploratory, benjamini_hochberg(list(exploratory.values())), strict=True)
    for family in confirmatory.values():
        adjusted |= zip(family, holm(list(family.values())), strict=True)

    def adjust(effect: Effect) -> Effect:
        is_of_seeds = effect.interval is not None and effect.interval.kind != "rows"
        p = adjusted.get(_identify(effect)) if is_of_seeds else None
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


def _list_all(one: AxisEffects) -> list[Effect]:
    pooled = [one.pooled] if one.pooled is not None else []
    return pooled + [effect for some in one.simple.values() for effect in some] + list(one.cells)
