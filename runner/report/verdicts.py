"""The verdicts of a report: one sentence for each conclusion that the runs allow.

Declared contrasts come first, each with its estimate. Of the others, clear effects get a sentence
each and unclear ones are named together. An unclear effect is never reported as equality.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from runner.report.cells import describe_at
from runner.report.comparability import questions_the_axis
from runner.report.effects import AxisEffects, Effect, Equivalence, Report
from runner.report.rows import axis_text
from runner.report.wording import name_some

_ALPHA: Final = 0.05  # the same as in `Effect.is_clear`
_MAX_LEVELS: Final = 6  # of another axis, with a sentence each
_MAX_DESCRIBED: Final = 8  # exploratory contrasts with all their numbers
_MAX_NAMED: Final = 8


def write_verdicts(report: Report) -> list[str]:
    """The sentences, declared contrasts first."""
    if not any(cell.scores for cell in report.cells):
        if any(row.is_scored for row in report.rows):
            reasons = [reason for cell in report.cells for reason in cell.missing]
            return [f"The runs have scores, but no two are comparable: {_name_some(reasons)}."]
        changed = [row for row in report.rows if row.state == "changed"]
        if not changed:
            return ["No run has a score yet."]
        runs = "1 run was" if len(changed) == 1 else f"{len(changed)} runs were"
        return [
            f"No run of these recipes has a score: {runs} made from recipes that have since"
            " changed. Pass the run directories to see those results."
        ]
    if not report.effects:
        return ["The runs differ in no axis other than the seed, so there is nothing to compare."]
    places = {(one.grid, one.task) for one in report.effects}
    writer = _Writer(with_grid=len({grid for grid, _ in places}) > 1, with_task=len(places) > 1)
    declared = [one for one in report.effects if one.is_declared]
    others = [one for one in report.effects if not one.is_declared]
    sentences = [text for one in declared for text in writer.describe_all(one)]
    sentences += writer.describe_others(others)
    sentences += _describe_single_seeds(report)
    return list(dict.fromkeys(sentences))


class _Writer:
    def __init__(self, *, with_grid: bool, with_task: bool) -> None:
        self._with_grid, self._with_task = with_grid, with_task

    def describe_all(self, one: AxisEffects) -> list[str]:
        """The sentences of a contrast, with every number that answers it."""
        name = self._name(one)
        if not one.main:
            declared = "declared, " if one.is_declared else ""
            values = f"{name} ({declared}{_describe_values(one)}, {one.metric.title})"
            return [f"No estimate for {values}: {_name_some(one.unpaired)}."]
        sentences = []
        if one.depends_on:
            sentences.append(f"{name}: {_describe_dependence(one)}.")
        for effect in one.main[:_MAX_LEVELS]:
            sentences.append(f"{name}: {_describe(effect)}.")
        if len(one.main) > _MAX_LEVELS:
            sentences.append(f"{name}: {len(one.main) - _MAX_LEVELS} more in the effects table.")
        flags = dict.fromkeys(flag for effect in one.main for flag in effect.flags)
        return sentences + [f"{flag}." for flag in flags if questions_the_axis(flag)]

    def describe_others(self, effects: Sequence[AxisEffects]) -> list[str]:
        """Sentences on exploratory contrasts; those that are unclear are only named."""
        clear, unclear = [], []
        refused: dict[str, list[str]] = {}
        for one in effects:
            with_seeds = [effect for effect in one.main if effect.is_of_seeds]
            is_described = any(
                effect.is_clear or (effect.interval and effect.interval.kind == "identical")
                for effect in with_seeds
            )
            if one.depends_on or is_described or any(effect.depends_on for effect in one.main):
                clear.append(one)
            elif with_seeds:
                unclear.append(self._name_values(one))
            elif reasons := _list_reasons(one):
                values = f"{self._name(one)} ({_describe_values(one)})"
                refused.setdefault(reasons[0], []).append(values)
        sentences = [text for one in clear[:_MAX_DESCRIBED] for text in self.describe_all(one)]
        if more := [self._name_values(one) for one in clear[_MAX_DESCRIBED:]]:
            sentences.append(
                f"Also clear, or dependent on another axis (effects table): {_name_some(more)}."
            )
        if unclear:
            sentences.append(
                f"No clear difference, which does not show that the values are equal:"
                f" {_name_some(unclear)}."
            )
        return sentences + [
            f"No estimate for {_name_some(names)}: {reason}." for reason, names in refused.items()
        ]

    def _name_values(self, one: AxisEffects) -> str:
        return f"{self._name(one)} ({_describe_values(one)}, {one.metric.unit})"

    def _name(self, one: AxisEffects) -> str:
        parts = [one.grid] if self._with_grid else []
        parts += [one.task] if self._with_task else []
        return ", ".join([*parts, one.axis])


def _list_reasons(one: AxisEffects) -> list[str]:
    """The reasons for a missing estimate: incomparable runs, or cells without a pair."""
    if not one.main:
        return [_name_some(one.unpaired)]
    return [reason for effect in one.main for reason in effect.refused]


def _describe_values(one: AxisEffects) -> str:
    return f"{axis_text(one.reference)} -> {axis_text(one.compared)}"


def _describe_dependence(one: AxisEffects) -> str:
    tests = {test.other: test for test in one.interactions}
    others = " and ".join(
        f"{axis} (interaction {_format_p(tests[axis].p)})" for axis in one.depends_on
    )
    return (
        f"the effect of {_describe_values(one)} on {one.metric.title} depends on {others},"
        " so no overall effect is given"
    )


def _describe(effect: Effect) -> str:
    """Describe an effect without the name of its axis and without a full stop."""
    first, second = axis_text(effect.reference), axis_text(effect.compared)
    place = f" at {describe_at(effect.at)}" if effect.at else ""
    interval = effect.interval
    if interval is None:
        return f"no estimate for {first} -> {second}{place}: {'; '.join(effect.refused)}"
    if interval.kind == "identical":
        if interval.estimate == 0:
            return (
                f"{effect.metric.title}: every test row has the same score under {first} and"
                f" {second}{place}"
            )
        return (
            f"{second} differs from {first}{place} by the same {abs(interval.estimate):.3g}"
            f" {effect.metric.unit} in every row, so there is no interval"
        )
    if interval.kind == "rows":
        return f"{first} -> {second}{place}: one seed, so no verdict"
    gain = -interval.estimate if effect.metric.mode == "min" else interval.estimate
    better, worse = (second, first) if gain >= 0 else (first, second)
    assert interval.half_width is not None
    digits = _choose_digits(interval.half_width)
    size = f"{abs(gain):.{digits}f} {_describe_unit(effect)}"
    low, high = (abs(gain) + sign * interval.half_width for sign in (-1, 1))
    bounds = f"{interval.level * 100:.4g}% interval {low:.{digits}f} to {high:.{digits}f}"
    details = f"{bounds}, {_describe_runs(effect)}, {_describe_p(effect)}"
    mean = f", mean over {len(effect.pairs)} pairs of cells" if len(effect.pairs) > 1 else ""
    if effect.is_clear:
        sentence = f"{better} is better than {worse} by {size}{place}{mean} ({details})"
        if effect.is_below_noise and effect.noise_floor is not None:
            sentence += (
                "; this is below the noise floor: two single runs of one recipe differ by less than"
                f" {effect.noise_floor:.{digits}f} in 95% of cases"
            )
    else:
        sentence = (
            f"no clear difference between {first} and {second}{place}{mean}: the estimate favors"
            f" {better} by {size} ({details}){_explain_unclear(effect)};"
            " this does not show that they are equal"
        )
    if effect.depends_on:
        sentence += (
            f"; it is a mean over {' and '.join(effect.depends_on)}, on which it also depends"
        )
    if effect.equivalence is not None:
        sentence = _add_margin(sentence, effect, effect.equivalence, digits)
    if interval.note:
        sentence += f"; {interval.note}"
    if interval.has_few_groups:
        sentence += f"; few groups of rows ({interval.num_groups})"
    return sentence


def _explain_unclear(effect: Effect) -> str:
    """Explain an unclear effect whose interval and p disagree; empty if they agree."""
    interval = effect.interval
    if interval is None or interval.bounds is None or effect.p_adjusted is None:
        return ""
    low, high = interval.bounds
    holds_0, is_significant = low <= 0 <= high, effect.p_adjusted < _ALPHA
    if holds_0 and is_significant:
        number = round(_ALPHA / (1 - interval.level))
        if number > 1:
            what = "levels" if len(effect.at) == 1 else "pairs of cells"
            why = (
                f"the intervals at the {number} {what} are wider, to hold jointly at 95%, and this"
                " one"
            )
        else:
            why = "p is below 0.05, but the interval"
        return f"; {why} includes 0"
    if not holds_0 and not is_significant:
        others = "all declared effects" if effect.is_confirmatory else "all exploratory effects"
        return f"; the interval excludes 0, but p, adjusted over {others}, is not below 0.05"
    return ""


def _add_margin(sentence: str, effect: Effect, equivalence: Equivalence, digits: int) -> str:
    """The sentence on an effect, extended by the result for the declared margin."""
    interval = effect.interval
    assert interval is not None and interval.half_width is not None
    margin = f"{equivalence.margin:g}"
    if effect.is_clear and abs(interval.estimate) - interval.half_width > equivalence.margin:
        return f"{sentence}; this exceeds the declared margin of {margin}"
    low, high = equivalence.interval
    if interval.estimate < 0:  # like the size above: by how much the better value is better
        low, high = -high, -low
    level = f"{equivalence.level * 100:.4g}%"
    ends = f"{level} interval of the difference {low:.{digits}f} to {high:.{digits}f}"
    if equivalence.is_shown:
        sentence = sentence.removesuffix("; this does not show that they are equal")
        unit = effect.metric.unit
        return (
            f"{sentence}; the two are equivalent within the declared margin of {margin} {unit}"
            f" ({ends})"
        )
    return f"{sentence}; equivalence within {margin} is not shown ({ends})"


def _describe_unit(effect: Effect) -> str:
    return f"in {effect.metric.name}" if effect.metric.is_of_answers else effect.metric.unit


def _describe_runs(effect: Effect) -> str:
    """`3 seeds x 100 test rows`, or only the seeds if the rows are fixed."""
    interval = effect.interval
    assert interval is not None
    counts = sorted(set(interval.num_seeds))
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    noun = "seed" if counts == [1] else "seeds"
    if interval.kind == "seeds":
        return f"{seeds} {noun}, these test rows only"
    rows = effect.pairs[0][0].runs[0].num_test_rows
    known = [run.num_test_rows for run in effect.pairs[0][0].runs if run.num_test_rows is not None]
    rows = known[0] if known else rows
    groups = f"{interval.num_groups} groups of" if interval.num_groups != rows else f"{rows}"
    return f"{seeds} {noun} x {groups} test rows"


def _describe_p(effect: Effect) -> str:
    p = "no p" if effect.p_adjusted is None else _format_p(effect.p_adjusted)
    if effect.is_confirmatory:
        return f"Holm {p}"
    why = f": {effect.why_exploratory}" if effect.why_exploratory else ""
    return f"exploratory{why}, Benjamini-Hochberg {p}"


def _format_p(p: float) -> str:
    """Format a p value for a sentence.

    >>> _format_p(0.0004), _format_p(0.0312)
    ('p < 0.001', 'p = 0.031')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _choose_digits(half_width: float) -> int:
    """The decimals that show at least two digits of the half-width of an interval.

    >>> _choose_digits(0.031), _choose_digits(0.0004), _choose_digits(2.5)
    (3, 5, 3)
    """
    digits = 3
    while digits < 8 and half_width < 10 ** (1 - digits):
        digits += 1
    return digits


def _describe_single_seeds(report: Report) -> list[str]:
    """A sentence for each grid whose seeds are too few for a verdict."""
    sentences = []
    for grid in dict.fromkeys(one.grid for one in report.effects):
        rows_only = [
            one
            for one in report.effects
            if one.grid == grid
            and any(effect.interval is not None for effect in one.cells)
            and not any(effect.is_of_seeds for effect in (*one.main, *one.cells))
        ]
        if rows_only:
            one = rows_only[0]
            first, second = (f"{one.axis}={axis_text(v)}" for v in (one.reference, one.compared))
            axes = ", ".join(dict.fromkeys(each.axis for each in rows_only))
            of_grid = [cell for cell in report.cells if cell.grid == grid]
            if any(len(cell.runs) > 1 for cell in of_grid):
                missing = [reason for cell in of_grid for reason in cell.missing]
                sentences.append(
                    f"{grid} has too few scored seeds to say anything about {axes}:"
                    f" {_name_some(missing)}. `runner compare {first} {second} --grid {grid}`"
                    " shows how the models trained so far differ (rows only, no verdict)."
                )
                continue
            sentences.append(
                f"{grid} has one seed per cell, so nothing can be said about {axes}: another seed"
                f" may give a different result. `runner compare {first} {second} --grid {grid}`"
                " shows how these trained models differ (rows only, no verdict)."
            )
    return sentences


def _name_some(names: Iterable[str]) -> str:
    return name_some(dict.fromkeys(names), "; ", _MAX_NAMED)
