"""Builds the effects of two values of one axis: for each pair of cells, as their mean, and at each
level of the other axes, with tests for interactions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from runner.report.comparability import (
    Arms,
    Runs,
    count_recipe_differences,
    find_flags,
    find_joint_refusal,
    find_pair_refusal,
    flag_other_tokens,
)
from runner.report.contrasts import Aligned, Contrasts
from runner.report.declared import Declared, judge
from runner.report.effects import AxisEffects, Cell, Effect, Equivalence, Interaction, Metric
from runner.report.rows import axis_key
from runner.report.statistics import INTERACTION_GATE, is_equivalent, simple_level

_LEVEL: Final = 0.95

Pair = tuple[Cell, Cell]


@dataclass(frozen=True, eq=False)
class Part:
    """The pairs of cells of two values of an axis, within one task or all across two tasks."""

    axis: str
    reference: Any
    compared: Any
    task: str
    pairs: tuple[Pair, ...]
    unpaired: tuple[str, ...]
    is_across_tasks: bool = False


class AxisBuilder:
    """Builds the effects of two values of an axis by one metric."""

    def __init__(
        self,
        part: Part,
        metric: Metric,
        contrasts: Contrasts,
        declared: Declared | None,
        why_exploratory: str = "",
    ) -> None:
        self._why_exploratory = why_exploratory  # of a whole grid
        self.part, self.metric, self.contrasts, self.declared = part, metric, contrasts, declared
        self.refusals = [self._find_refusal(pair) for pair in part.pairs]
        # Pairs that have a difference
        self.pairs = [
            pair for pair, refusal in zip(part.pairs, self.refusals, strict=True) if not refusal
        ]

    def build(self, grid: str) -> AxisEffects:
        """All effects of the two values, in a grid of this name."""
        cells = tuple(
            self._build_effect([pair], self._name_place(pair)) for pair in self.part.pairs
        )
        pooled: Effect | None = None
        interactions: tuple[Interaction, ...] = ()
        simple: dict[str, tuple[Effect, ...]] = {}
        family = cells
        has_seeds = any(
            effect.interval is not None and effect.interval.kind != "rows" for effect in cells
        )
        if not self.pairs and cells:
            pooled = self._refuse_all()
        elif len(self.part.pairs) > 1 and has_seeds:
            pooled = self._build_effect(self.part.pairs, {})
            simple = self._build_simple()
            family = tuple(effect for effects in simple.values() for effect in effects)
            family += (pooled,) if pooled.interval is not None else cells
            if pooled.interval is not None:
                interactions = self._test_interactions(self.pairs)
        depends_on = tuple(one.other for one in interactions if one.p < INTERACTION_GATE)
        if self.pairs and pooled is not None and pooled.interval is None:
            simple, cells = self._refuse_gated(self._gate(simple, list(simple)), cells)
        elif len(depends_on) > 1:
            simple = self._gate(simple, depends_on)
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
            family=family,
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
        arms = self._build_arms(used or pairs)
        return Effect(
            metric=self.metric,
            axis=self.part.axis,
            reference=self.part.reference,
            compared=self.part.compared,
            at=at,
            pairs=tuple(used or pairs),
            interval=None,
            refused=tuple(refused),
            flags=tuple(filter(None, (*find_flags(arms), flag_other_tokens(self.metric, arms)))),
        )

    def _build_effect(
        self, pairs: Sequence[Pair], at: Mapping[str, Any], level: float = _LEVEL
    ) -> Effect:
        """The mean effect over the comparable pairs of cells; others are left out."""
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
            reason = f"only one seed ({single[0]}), so the result with another seed is unknown"
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
                assert isinstance(found, Aligned), "refused pairs are never weighed"
                aligned.append(found)
                weights.append(sign / len(pairs))
        return aligned, weights

    def _gate(
        self, simple: Mapping[str, tuple[Effect, ...]], others: Sequence[str]
    ) -> dict[str, tuple[Effect, ...]]:
        """The simple effects; those at levels of `others` with the axes they depend on."""

        def find(effect: Effect) -> tuple[str, ...]:
            if effect.interval is None or len(effect.pairs) < 2:
                return ()
            tests = self._test_interactions(effect.pairs)
            return tuple(test.other for test in tests if test.p < INTERACTION_GATE)

        return {
            axis: tuple(replace(one, depends_on=find(one)) for one in effects)
            if axis in others
            else effects
            for axis, effects in simple.items()
        }

    def _refuse_gated(
        self, simple: Mapping[str, tuple[Effect, ...]], cells: tuple[Effect, ...]
    ) -> tuple[dict[str, tuple[Effect, ...]], tuple[Effect, ...]]:
        """The simple effects, without a number for those that depend on another axis, and
        the pairs of cells that answer instead, at a level at which all of them hold jointly.
        """

        def refuse(effect: Effect) -> Effect:
            if not effect.depends_on:
                return effect
            reason = f"the effect depends on {' and '.join(effect.depends_on)}, so there is no mean"
            return replace(
                effect,
                interval=None,
                refused=(reason,),
                design="",
                noise_floor=None,
                is_below_noise=False,
            )

        refused = {axis: tuple(map(refuse, effects)) for axis, effects in simple.items()}
        level = simple_level(len(self.pairs), _LEVEL)
        return refused, tuple(self._build_effect(cell.pairs, cell.at, level) for cell in cells)

    def _list_others(self, pairs: Iterable[Pair]) -> dict[str, list[tuple[Any, list[Pair]]]]:
        """Other axes with several values among these pairs: each value with its pairs."""
        found: dict[str, dict[str, tuple[Any, list[Pair]]]] = {}
        for pair in pairs:
            for axis, value in self._name_place(pair).items():
                _, some = found.setdefault(axis, {}).setdefault(axis_key(value), (value, []))
                some.append(pair)
        return {axis: list(levels.values()) for axis, levels in found.items() if len(levels) > 1}

    def _build_simple(self) -> dict[str, tuple[Effect, ...]]:
        refused = [
            pair for pair, reason in zip(self.part.pairs, self.refusals, strict=True) if reason
        ]
        simple = {}
        for axis, levels in self._list_others(self.pairs).items():
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

    def _test_interactions(self, pairs: Sequence[Pair]) -> tuple[Interaction, ...]:
        aligned, _ = self._weigh(pairs)
        places = {id(pair): at for at, pair in enumerate(pairs)}
        found = []
        for axis, levels in self._list_others(pairs).items():
            weights = []
            for _, some in levels:
                row = [0.0] * len(aligned)  # reference and compared of each pair, in turn
                for pair in some:
                    at = 2 * places[id(pair)]
                    row[at], row[at + 1] = -1 / len(some), 1 / len(some)
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
        """Mark the effects that answer a declared contrast, and test its margin."""
        if self.declared is None:
            return effects
        family = tuple(map(self._declare, effects.family))
        known = {identify(effect) for effect in family}
        answers = known.intersection(map(identify, effects.main))

        def mark(effect: Effect) -> Effect:
            return self._declare(effect) if identify(effect) in answers else effect

        return replace(
            effects,
            pooled=mark(effects.pooled) if effects.pooled is not None else None,
            simple={axis: tuple(map(mark, some)) for axis, some in effects.simple.items()},
            cells=tuple(map(mark, effects.cells)),
            family=family,
        )

    def _declare(self, effect: Effect) -> Effect:
        assert self.declared is not None
        runs = [
            run for pair in effect.pairs for cell in pair for run in self.contrasts.list_runs(cell)
        ]
        standing = judge(self.declared, runs)
        if not standing.is_confirmatory:
            return replace(effect, why_exploratory=standing.why_exploratory)
        if self._why_exploratory:
            return replace(effect, why_exploratory=self._why_exploratory)
        if effect.interval is None or effect.interval.kind == "rows":
            return effect
        return replace(effect, is_confirmatory=True, equivalence=self._test_margin(effect))

    def _test_margin(self, effect: Effect) -> Equivalence | None:
        assert self.declared is not None
        if self.declared.margin is None or effect.depends_on:
            return None
        aligned, weights = self._weigh(effect.pairs)
        assert effect.interval is not None
        level = 1 - 2 * (1 - effect.interval.level)  # 90%, or higher for several effects
        interval = self.contrasts.find_interval(aligned, weights, level)
        if interval.bounds is None:
            return None
        is_shown = is_equivalent(interval, self.declared.margin, level=level)
        return Equivalence(self.declared.margin, interval.bounds, is_shown, level)


def _describe_unpaired(reasons: Sequence[str]) -> str:
    cells = "1 cell has" if len(reasons) == 1 else f"{len(reasons)} cells have"
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"{cells} no pair, and nothing is imputed: {'; '.join(reasons[:3])}{more}"


def identify(effect: Effect) -> tuple[Any, ...]:
    """An equal key for two effects that compare the same runs by the same metric."""
    return (effect.metric.name, *(id(cell) for pair in effect.pairs for cell in pair))
