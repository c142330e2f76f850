"""Numbers and phrases that every format of a report writes the same way, and what its columns mean.

Pure texts; layout is in `format`, `tables`, `figures` and `html`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Final, Literal, get_args

from runner.errors import escape_controls
from runner.plan.status import State
from runner.report.effects import AxisEffects, Cell, Effect, Interaction
from runner.report.rows import (
    ReportRow,
    axis_text,
    compare_with_base,
    list_axes,
    list_values,
)
from runner.report.statistics import Interval
from runner.text import ELLIPSIS, one_line

MAX_NAMED: Final = 3  # names in one note; JSON has all
MAX_SENTENCE: Final = 2000  # characters of a text that people read
SMALLEST_P: Final = 0.0001

# What each column of a report means, by the field of the CSV and JSON.
DEFINITIONS: Final[Mapping[str, str]] = {
    "grid": "the grid that the run belongs to",
    "run": "the name of the run within its grid",
    "task": "what the test rows ask for; means are never taken over tasks",
    "axes": "the cell of the grid that the run fills",
    "seed": "training.seed: the unit of replication; two runs of one recipe and one seed are one",
    "state": "pending, running, completed, interrupted, failed, changed, damaged or unreadable",
    "recipe_digest": "equal for two runs exactly where they are the same experiment",
    "rules": "version of the rules by which rows are drawn, rendered and masked",
    "num_test_rows": "rows of the test split, all of which are scored",
    "test_rows_hash": "SHA-256 of the sorted ids of the test rows",
    "base": "the model before training (step 0), scored by the same code",
    "tuned": "the model at its best step by the validation split",
    "nll_per_completion_token": (
        "negative log-likelihood of the completions, nats per completion token, summed over the"
        " test split before it is divided; comparable within one tokenizer; smaller is better"
    ),
    "nll_per_token": (
        "negative log-likelihood of the full texts, nats per token; comparable within one"
        " tokenizer; smaller is better"
    ),
    "bits_per_byte": (
        "negative log-likelihood of the completions, bits per UTF-8 byte; comparable across"
        " tokenizers; smaller is better"
    ),
    "change_in_nll_per_completion_token": "tuned minus base; negative is better",
    "best_step": "optimizer step with the best score on the validation split",
    "num_steps": "optimizer steps taken",
    "stop_reason": "num_train_epochs, max_steps or early_stopping",
    "num_updates": "optimizer updates over all attempts; null: not recorded",
    "num_trained_tokens": "label tokens over all updates; null: not recorded",
    "schedule_steps": "length of the learning-rate schedule; null: not recorded",
    "initial_weights_hash": "SHA-256 of the trained weights before step 1; null: not recorded",
    "row_order_hash": "SHA-256 of the row ids over all steps; null: not recorded",
    "source_hash": "SHA-256 of the runner's own files; null: not recorded",
    "runner_is_dirty": (
        "true where some attempt ran files of the runner that were not committed; null: not known"
    ),
    "started_at_utc": "when the first attempt started; null: never",
    "hardware": "models of the CPU and the GPUs; several joined by ' then '",
    "num_processes": "of the attempts in turn, each number once where it does not change",
    "micro_batch_divisors": (
        "what micro-batches were divided by, of the attempts in turn; more than 1 after running out"
        " of memory"
    ),
    "declared_then": (
        "contrasts that the run's first attempt recorded as declared; null: no attempt recorded any"
    ),
    "declared_now": "contrasts that the run's recipe declares today",
    "num_unfinished": "answers that reached max_new_tokens",
    "num_unreadable": "answers without any label or final result, counted as wrong",
    "estimate": "compared minus reference, mean over the pairs of cells",
    "standard_error": "root of the variance of the estimate, by `kind`",
    "interval": "values that the data do not contradict at `level`, by `kind`",
    "kind": (
        "what is random. seeds and rows: this recipe, on rows like these; seeds: this recipe, on"
        " these very rows; rows: these trained models only, no verdict on the recipe; identical:"
        " the runs do not differ at all"
    ),
    "p_adjusted": (
        "p by Holm over all declared contrasts where confirmatory, each with its mean and all its"
        " simple effects; else by Benjamini-Hochberg over all others"
    ),
    "is_confirmatory": (
        "true where all runs of the contrast recorded its declaration before their first attempt,"
        " and all runs of the grid are in the report"
    ),
    "v_seed": "variance of the estimate from the seeds",
    "v_row": "variance of the estimate from the test rows (groups), by leaving one out",
    "v_res": "the part of both that is noise of single rows in single runs",
    "df": "degrees of freedom",
    "num_groups": "groups of test rows; a row without a group is one",
    "noise_floor": "two single runs of one recipe stay this close in 95% of cases",
    "equivalence": (
        "two one-sided tests: shown where the interval of `level` (90%; of each of several simple"
        " effects, 1 - 0.10 / their number) lies inside the margin that was declared"
    ),
    "interactions": "F test whether the axis acts alike at the levels of another axis",
    "depends_on": "axes whose interaction has p < 0.20: no mean over their levels is shown",
    "refused": "why there is no number: the runs are not comparable",
    "flags": "what else differs between the runs, or limits the number",
    "missing": "runs without a score; never imputed",
}

# How numbers are made, for those who have only the JSON.
METHOD: Final[Mapping[str, str]] = {
    "score": "sum over the test rows of a run divided by the sum of their tokens (bytes, rows)",
    "interval": (
        "t intervals with seeds and rows both random; the critical value is weighted between the"
        " two by their variances (Cochran and Cox), and never below that of the rows alone"
    ),
    "pools": (
        "runs of one base model and task share their spread over seeds; two cells that share"
        " initial weights and order by hash are paired seed by seed"
    ),
    "interactions": (
        "F tests at p < 0.20 decide whether a mean over the levels of another axis is shown; where"
        " units do not compare in all cells, within each set of cells that is averaged"
    ),
    "simple_effects": "level of each: 1 - 0.05 / number of levels, so that all hold at 95% at once",
    "p_adjusted": (
        "Holm over the declared contrasts of a grid, Benjamini-Hochberg over all others; a declared"
        " contrast counts with its mean and all its simple effects, whichever are shown, and as one"
        " where it has no p"
    ),
    "equivalence": (
        "two one-sided tests at 5% against the declared margin, by intervals of 90%; of several"
        " simple effects by intervals of 1 - 0.10 / their number"
    ),
    "missing_cells": "never imputed; an effect names the pairs of cells it is the mean of",
}


def make_safe(text: str, most: int = MAX_SENTENCE) -> str:
    """A text on one line and without terminal controls; of a longer one both ends, `most`
    characters together.

    >>> make_safe("a\\nb\\x1b[2J"), make_safe("abcdefgh", 5)
    ('a b\\\\x1b[2J', 'abc…h')
    """
    if len(text) > most:
        end = (most - 1) // 3
        text = f"{text[: most - 1 - end]}{ELLIPSIS}{text[len(text) - end :]}"
    return escape_controls(one_line(text))


def decimal(value: float | None) -> str:
    """A score to four digits; blank where there is none."""
    return "" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """A difference to four digits, with its sign.

    >>> signed(-0.00001), signed(0.25), signed(None)
    ('+0.0000', '+0.2500', '')
    """
    return "" if value is None else f"{value:+z.4f}"


def span(interval: tuple[float, float] | None) -> str:
    """An interval, from end to end."""
    return "" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}"


def probability(p: float | None) -> str:
    """A p value to four digits.

    >>> probability(0.01234), probability(1e-9), probability(1.0), probability(None)
    ('0.0123', '<0.0001', '1.0000', '')
    """
    if p is None:
        return ""
    return f"<{SMALLEST_P}" if p < SMALLEST_P else f"{p:.4f}"


def spread(values: Iterable[float | None], *, is_signed: bool = False) -> str:
    """Mean ± standard deviation over the seeds; of one seed, the score alone.

    >>> spread([1.0, 2.0, None]), spread([1.0]), spread([None])
    ('1.5000 ± 0.7071', '1.0000', '')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = signed(fmean(known)) if is_signed else decimal(fmean(known))
    return f"{mean} ± {decimal(stdev(known))}" if len(known) > 1 else mean


def constant_or_spread(values: Iterable[float | None]) -> str:
    """The one value of all seeds, as of a base model; `spread` where they differ."""
    known = [value for value in values if value is not None]
    return decimal(known[0]) if len(set(known)) == 1 else spread(known)


def level_text(level: float) -> str:
    """A level in per cent.

    >>> level_text(0.95), level_text(0.975), level_text(1 - 0.05 / 3)
    ('95%', '97.5%', '98.33%')
    """
    return f"{round(100 * level, 2):g}%"


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "run"), count(2, "run"), count(2, "query")
    ('1 run', '2 runs', '2 queries')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


def name_some(names: Iterable[str], separator: str = ", ", most: int = MAX_NAMED) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - most:,} more"] if len(listed) > most else []
    return separator.join(listed[:most] + more)


def count_states(rows: Sequence[ReportRow]) -> str:
    """How many runs there are in which state."""
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{counts[state]:,} {state}" for state in get_args(State) if counts[state])
    return f"{count(len(rows), 'run')}, {states}" if rows else "no runs"


def name_cell(axes: Mapping[str, object]) -> str:
    """The values that a cell or an effect stands at; blank: all."""
    return ", ".join(f"{axis}={axis_text(value)}" for axis, value in axes.items())


def name_scope(effect: Effect, constant: Collection[str] = ()) -> str:
    """The cells that an effect is of, in words; axes that are `constant` in a report go without
    saying.
    """
    at = {axis: value for axis, value in effect.at.items() if axis not in constant}
    if not at:
        return f"mean of {count(len(effect.pairs), 'cell')}" if len(effect.pairs) > 1 else "all"
    return name_cell(at)


def list_constant_axes(rows: Iterable[ReportRow]) -> set[str]:
    """The axes that all runs have, with one value."""
    rows = list(rows)
    return {
        axis
        for axis in list_axes(rows)
        if len(list_values(rows, axis)) == 1 and all(axis in row.axes for row in rows)
    }


def list_numbers(effects: AxisEffects, *, with_single: bool = False) -> list[Effect]:
    """The effects of which a report shows a number. Those of single runs are left out: their
    intervals are over rows only and say nothing of the recipe, so only `runner compare` shows them.
    """
    numbers = [one for one in effects.shown if one.interval is not None]
    return numbers if with_single else [one for one in numbers if not is_of_single_runs(one)]


def is_of_single_runs(effect: Effect) -> bool:
    """True where an effect has an interval over rows only."""
    return effect.interval is not None and effect.interval.kind == "rows"


def describe_direction(effects: AxisEffects) -> str:
    """The unit of a difference, and what its sign means."""
    metric = effects.metric
    sign = "negative" if metric.mode == "min" else "positive"
    return f"{metric.unit}; {sign}: {axis_text(effects.compared)} is better"


def describe_replication(effect: Effect) -> str:
    """Seeds x rows (or groups of rows).

    >>> describe_seeds((3, 3)), describe_seeds((2, 3)), describe_seeds(())
    ('3', '2-3', '')
    """
    if effect.interval is None:
        return ""
    return f"{describe_seeds(effect.interval.num_seeds)} x {effect.interval.num_groups}"


def describe_seeds(num_seeds: Sequence[int]) -> str:
    """The number of seeds of the cells: one number, or from fewest to most."""
    if not num_seeds:
        return ""
    low, high = min(num_seeds), max(num_seeds)
    return str(low) if low == high else f"{low}-{high}"


KINDS: Final[Mapping[str, str]] = {
    "rows": "rows only",
    "seeds": "these rows only",
    "identical": "identical scores",
}


def describe_standing(effect: Effect) -> str:
    """Whether an effect was declared, and what limits it, in a few words."""
    interval = effect.interval
    if interval is None:
        return "refused"
    words = []
    if interval.kind != "rows":  # of which there is no verdict
        words.append("confirmatory" if effect.is_confirmatory else "exploratory")
    words += [KINDS[interval.kind]] if interval.kind in KINDS else []
    words += ["few groups"] if interval.has_few_groups else []
    words += ["below noise"] if effect.is_below_noise else []
    return ", ".join(words)


def list_flags(effects: Sequence[Effect], constant: Collection[str] = ()) -> list[str]:
    """What else differs in the effects, each sentence once; with the effects that it is about,
    unless those are all. Sentences that differ in numbers only are told with those of the first.
    """
    kinds: dict[str, tuple[str, list[str]]] = {}
    for effect in effects:
        for flag in effect.flags:
            kind = re.sub(r"\d[\d,.]*", "#", flag)
            kinds.setdefault(kind, (flag, []))[1].append(name_scope(effect, constant))
    return [
        flag if len(names) == len(effects) else f"{name_some(names, '; ')}: {flag}"
        for flag, names in kinds.values()
    ]


def list_designs(effects: Sequence[Effect], constant: Collection[str] = ()) -> list[str]:
    """Which runs were pooled or paired, and what limits the intervals; each text once."""
    scopes: dict[str, list[str]] = {}
    for effect in effects:
        interval = effect.interval
        notes = (effect.design, interval.note) if interval is not None else (effect.design,)
        if text := "; ".join(filter(None, notes)):
            scopes.setdefault(text, []).append(name_scope(effect, constant))
    return [
        text if len(names) == len(effects) else f"{name_some(names, '; ')}: {text}"
        for text, names in scopes.items()
    ]


def variance(interval: Interval | None, part: Literal["seed", "row", "res"]) -> str:
    """One part of the variance of an estimate, with its degrees of freedom; blank where that part
    is not known.
    """
    if interval is None or (part != "row" and interval.df_seed is None):
        return ""
    if part == "res":
        return f"{interval.v_res:.1e}"
    value, df = {
        "seed": (interval.v_seed, interval.df_seed),
        "row": (interval.v_row, interval.df_row),
    }[part]
    return f"{value:.1e} ({df:.0f})"


def describe_interval(interval: Interval, design: str = "") -> str:
    """Where the error comes from: more seeds help against the first, more rows against the second;
    then the design.
    """
    words = f"V_row {interval.v_row:.1e} (df {interval.df_row:.0f})"
    if interval.df_seed is not None:
        words = f"V_seed {interval.v_seed:.1e} (df {interval.df_seed:.0f}), {words}"
        words += f", V_res {interval.v_res:.1e}"
    return "; ".join(filter(None, (words, design or interval.design, interval.note)))


def describe_equivalence(effect: Effect) -> str:
    """Whether no difference was shown, where a margin was declared."""
    if effect.equivalence is None:
        return ""
    found = effect.equivalence
    low, high = found.interval
    if found.is_shown:
        place = "lies inside: no larger"
    elif min(abs(low), abs(high)) > found.margin and low * high > 0:
        place = "lies outside: larger"
    else:
        place = "reaches beyond: not shown"
    interval = f"the {level_text(found.level)} interval {span(found.interval)}"
    return f"margin {found.margin:g}: {interval} {place}"


def describe_interaction(found: Interaction) -> str:
    """The test whether an axis depends on another one."""
    df = ", ".join(f"{one:.0f}" for one in found.df)
    p = probability(found.p)
    p = f"p {p[0]} {p[1:]}" if p.startswith("<") else f"p = {p}"
    return f"`{found.other}`: F({df}) = {found.statistic:.2f}, {p}"


def describe_base(rows: Sequence[ReportRow]) -> str:
    """How many runs are better than their own base model."""
    base = compare_with_base(rows)
    runs = "run" if base.num_completed == 1 else "runs"
    verb = "beats its base" if base.num_better == base.num_completed == 1 else "beat their base"
    text = f"{base.num_better:,} of {base.num_completed:,} completed {runs} {verb} on test NLL"
    text += f"; not: {name_some(base.not_better)}" if base.not_better else ""
    return text + (f"; not known: {name_some(base.unknown)}" if base.unknown else "") + "."


def list_cell_seeds(cell: Cell) -> str:
    """How many runs of a cell have a score, of how many."""
    scored = max(map(len, cell.scores.values()), default=0)  # not those that do not count
    return str(scored) if scored == len(cell.runs) else f"{scored} of {len(cell.runs)}"


def finite(value: float | None) -> float | None:
    """A number that JSON can hold; None for what is no number."""
    return value if value is not None and math.isfinite(value) else None
