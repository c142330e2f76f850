"""Numbers and phrases shared by all formats of a report, and the meanings of its columns.

Only texts; layout is in `format`, `tables`, `figures` and `html`.
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
from runner.text import ELLIPSIS, format_count, one_line

MAX_NAMED: Final = 3  # names in one note; JSON has all
MAX_SENTENCE: Final = 2000  # characters of a text for people
SMALLEST_P: Final = 0.0001

# Meaning of each column of a report, by the field of the CSV and JSON
DEFINITIONS: Final[Mapping[str, str]] = {
    "grid": "the grid of the run",
    "run": "the name of the run in its grid",
    "task": "the task of the test rows; means are never taken over tasks",
    "axes": "the cell of the run: its value on each axis of the grid",
    "seed": "training.seed: the unit of replication; two runs of one recipe and one seed are one",
    "state": "pending, running, completed, interrupted, failed, changed, damaged or unreadable",
    "recipe_digest": "equal for two runs if and only if they are the same experiment",
    "rules": "version of the rules for drawing, rendering and masking rows",
    "num_test_rows": "rows of the test split, all of which are scored",
    "test_rows_hash": "SHA-256 of the sorted ids of the test rows",
    "base": "the model before training (step 0), scored by the same code",
    "tuned": "the model at its best step on the validation split",
    "nll_per_completion_token": (
        "negative log-likelihood of the completions, nats per completion token, summed over the"
        " test split before dividing; comparable only within one tokenizer; smaller is better"
    ),
    "nll_per_token": (
        "negative log-likelihood of the full texts, nats per token; comparable only within one"
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
    "runner_is_dirty": "true if some attempt ran uncommitted files of the runner; null: unknown",
    "started_at_utc": "when the first attempt started; null: never",
    "hardware": "models of the CPU and the GPUs; several joined by ' then '",
    "num_processes": "of each attempt in order; equal numbers in a row are listed once",
    "micro_batch_divisors": (
        "divisor of the micro-batches, of each attempt in order; more than 1 after running out of"
        " memory"
    ),
    "declared_then": (
        "contrasts declared in the recipe of the run's first attempt; null: no attempt recorded any"
    ),
    "declared_now": "contrasts that the run's recipe declares today",
    "num_unfinished": "answers that reached max_new_tokens",
    "num_unreadable": "answers without any label or final result, counted as wrong",
    "estimate": "compared minus reference, mean over the pairs of cells",
    "standard_error": "root of the variance of the estimate, by `kind`",
    "interval": "confidence interval of the estimate at `level`, by `kind`",
    "kind": (
        "the sources of error. seeds and rows: this recipe, on rows like these; seeds: this recipe,"
        " on exactly these rows; rows: these trained models only, no verdict on the recipe;"
        " identical: the differences do not vary, so there is no interval"
    ),
    "p_adjusted": (
        "if confirmatory, p by Holm over all declared contrasts, each with its mean and all its"
        " simple effects; otherwise p by Benjamini-Hochberg over all other effects"
    ),
    "is_confirmatory": (
        "true if all runs of the contrast recorded its declaration before their first attempt, and"
        " all runs of the grid are in the report"
    ),
    "v_seed": "variance of the estimate due to seeds",
    "v_row": "variance of the estimate due to test rows (groups), leaving one out at a time",
    "v_res": "noise of single rows in single runs, a part of both v_seed and v_row",
    "df": "degrees of freedom",
    "num_groups": "groups of test rows; a row without a group counts as one",
    "noise_floor": "two single runs of one recipe differ by less than this in 95% of cases",
    "equivalence": (
        "two one-sided tests: shown if the interval at `level` (90%; for each of several simple"
        " effects, 1 - 0.10 / their number) lies inside the declared margin"
    ),
    "interactions": "F test of whether the effect differs between the levels of another axis",
    "depends_on": "axes whose interaction has p < 0.20: no mean over their levels is shown",
    "refused": "reasons for a missing estimate: the runs are not comparable",
    "flags": "other differences between the runs, and limits of the estimate",
    "missing": "runs without a score; never imputed",
}

# How numbers are computed, for readers who have only the JSON
METHOD: Final[Mapping[str, str]] = {
    "score": "sum over the test rows of a run divided by the sum of their tokens (bytes, rows)",
    "interval": (
        "t intervals with seeds and rows both random; their critical values are averaged, weighted"
        " by variance (Cochran and Cox); never narrower than an interval over rows alone"
    ),
    "pools": (
        "cells of one base model and task share one seed variance; two cells whose initial weights"
        " and row order are equal by hash are paired seed by seed"
    ),
    "interactions": (
        "F tests at p < 0.20 decide whether a mean over the levels of another axis is shown; if"
        " units are not comparable across all cells, within each set of cells that is averaged"
    ),
    "simple_effects": "level of each: 1 - 0.05 / number of levels, so that all hold jointly at 95%",
    "p_adjusted": (
        "Holm over the declared contrasts of a grid, Benjamini-Hochberg over all others; a declared"
        " contrast counts with its mean and all its simple effects, shown or not, and as one if it"
        " has no p"
    ),
    "equivalence": (
        "two one-sided tests at 5% against the declared margin, from 90% intervals; for several"
        " simple effects, from intervals at level 1 - 0.10 / their number"
    ),
    "missing_cells": "never imputed; an effect names the pairs of cells that it averages",
}


def make_safe(text: str, most: int = MAX_SENTENCE) -> str:
    """A text on one line without terminal controls; a text of over `most` characters is cut
    in the middle.

    >>> make_safe("a\\nb\\x1b[2J"), make_safe("abcdefgh", 5)
    ('a b\\\\x1b[2J', 'abc…h')
    """
    if len(text) > most:
        end = (most - 1) // 3
        text = f"{text[: most - 1 - end]}{ELLIPSIS}{text[len(text) - end :]}"
    return escape_controls(one_line(text))


def decimal(value: float | None) -> str:
    """Format a score to four digits; blank if there is none."""
    return "" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """Format a difference to four digits, with its sign.

    >>> signed(-0.00001), signed(0.25), signed(None)
    ('+0.0000', '+0.2500', '')
    """
    return "" if value is None else f"{value:+z.4f}"


def span(interval: tuple[float, float] | None) -> str:
    """Format an interval as `low to high`."""
    return "" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}"


def probability(p: float | None) -> str:
    """Format a p value to four digits.

    >>> probability(0.01234), probability(1e-9), probability(1.0), probability(None)
    ('0.0123', '<0.0001', '1.0000', '')
    """
    if p is None:
        return ""
    return f"<{SMALLEST_P}" if p < SMALLEST_P else f"{p:.4f}"


def spread(values: Iterable[float | None], *, is_signed: bool = False) -> str:
    """Format the mean ± standard deviation over the seeds; for one seed, only the score.

    >>> spread([1.0, 2.0, None]), spread([1.0]), spread([None])
    ('1.5000 ± 0.7071', '1.0000', '')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = signed(fmean(known)) if is_signed else decimal(fmean(known))
    return f"{mean} ± {decimal(stdev(known))}" if len(known) > 1 else mean


def constant_or_spread(values: Iterable[float | None]) -> str:
    """Format the one value of all seeds, such as a base score; `spread` if they differ."""
    known = [value for value in values if value is not None]
    return decimal(known[0]) if len(set(known)) == 1 else spread(known)


def level_text(level: float) -> str:
    """Format a level in percent.

    >>> level_text(0.95), level_text(0.975), level_text(1 - 0.05 / 3)
    ('95%', '97.5%', '98.33%')
    """
    return f"{round(100 * level, 2):g}%"


def name_some(names: Iterable[str], separator: str = ", ", most: int = MAX_NAMED) -> str:
    """Join the first names, followed by the number of names left out."""
    listed = list(names)
    more = [f"and {len(listed) - most:,} more"] if len(listed) > most else []
    return separator.join(listed[:most] + more)


def count_states(rows: Sequence[ReportRow]) -> str:
    """The number of runs, in total and in each state."""
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{counts[state]:,} {state}" for state in get_args(State) if counts[state])
    return f"{format_count(len(rows), 'run')}, {states}" if rows else "no runs"


def name_cell(axes: Mapping[str, object]) -> str:
    """Format the axis values of a cell or an effect; blank: all."""
    return ", ".join(f"{axis}={axis_text(value)}" for axis, value in axes.items())


def name_scope(effect: Effect, constant: Collection[str] = ()) -> str:
    """Describe the cells of an effect; axes that are `constant` in the report are left out."""
    at = {axis: value for axis, value in effect.at.items() if axis not in constant}
    if not at:
        return (
            f"mean of {format_count(len(effect.pairs), 'cell')}" if len(effect.pairs) > 1 else "all"
        )
    return name_cell(at)


def list_constant_axes(rows: Iterable[ReportRow]) -> set[str]:
    """The axes on which all runs have the same value."""
    rows = list(rows)
    return {
        axis
        for axis in list_axes(rows)
        if len(list_values(rows, axis)) == 1 and all(axis in row.axes for row in rows)
    }


def list_numbers(effects: AxisEffects, *, with_single: bool = False) -> list[Effect]:
    """The effects whose numbers a report shows.

    Effects of single runs are left out: their intervals are over rows only and say nothing about
    the recipe, so only `runner compare` shows them.
    """
    numbers = [one for one in effects.shown if one.interval is not None]
    return numbers if with_single else [one for one in numbers if not is_of_single_runs(one)]


def is_of_single_runs(effect: Effect) -> bool:
    """True if an effect has an interval over rows only."""
    return effect.interval is not None and effect.interval.kind == "rows"


def describe_direction(effects: AxisEffects) -> str:
    """Describe the unit of a difference and the meaning of its sign."""
    metric = effects.metric
    sign = "negative" if metric.mode == "min" else "positive"
    return f"{metric.unit}; {sign}: {axis_text(effects.compared)} is better"


def describe_replication(effect: Effect) -> str:
    """Format seeds x rows (or groups of rows).

    >>> describe_seeds((3, 3)), describe_seeds((2, 3)), describe_seeds(())
    ('3', '2-3', '')
    """
    if effect.interval is None:
        return ""
    return f"{describe_seeds(effect.interval.num_seeds)} x {effect.interval.num_groups}"


def describe_seeds(num_seeds: Sequence[int]) -> str:
    """Format the number of seeds of the cells: one number, or from fewest to most."""
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
    """Describe in a few words if an effect was declared, and its limits."""
    interval = effect.interval
    if interval is None:
        return "refused"
    words = []
    if interval.kind != "rows":  # which allows no verdict
        words.append("confirmatory" if effect.is_confirmatory else "exploratory")
    words += [KINDS[interval.kind]] if interval.kind in KINDS else []
    words += ["few groups"] if interval.has_few_groups else []
    words += ["below noise"] if effect.is_below_noise else []
    return ", ".join(words)


def list_flags(effects: Sequence[Effect], constant: Collection[str] = ()) -> list[str]:
    """The flags of the effects, each sentence once, prefixed with its effects unless it is
    true of all. Of sentences that differ only in numbers, the first one is kept.
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
    """Texts on pooling or pairing and on limits of the intervals, each text once."""
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


def name_library(name: str) -> str:
    """The name for people of an entry of `versions`.

    >>> name_library("cuda"), name_library("driver"), name_library("torch")
    ('CUDA', 'NVIDIA driver', 'torch')
    """
    return {"cuda": "CUDA", "driver": "NVIDIA driver"}.get(name, name)


def describe_version(name: str, recorded: str) -> str:
    """A recorded version, or versions joined by ` then `, with a plain text for `absent`.

    >>> describe_version("cuda", "absent"), describe_version("bitsandbytes", "absent then 0.48")
    ('none', 'not installed then 0.48')
    """
    plain = "none" if name in ("cuda", "driver") else "not installed"
    parts = recorded.split(" then ")
    return " then ".join(plain if part == "absent" else part for part in parts)


def describe_noise_floors(effects: Sequence[Effect], constant: Collection[str] = ()) -> str:
    """Each noise floor with the cells that it applies to, which are left out if there is
    one floor; empty if no effect has a floor.
    """
    scopes: dict[str, list[str]] = {}
    for effect in effects:
        if effect.noise_floor is not None:
            floor = f"{effect.noise_floor:.4f}"
            scopes.setdefault(floor, []).append(name_scope(effect, constant))
    if len(scopes) < 2:
        return "".join(scopes)
    floors = sorted(scopes, key=float)
    return ", ".join(f"{floor} ({name_some(scopes[floor], '; ')})" for floor in floors)


def variance(interval: Interval | None, part: Literal["seed", "row", "res"]) -> str:
    """Format one part of the variance of an estimate with its degrees of freedom; blank if that
    part is unknown.
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
    """Describe the variances of an interval, then its design and note. More seeds reduce V_seed,
    more rows V_row.
    """
    words = f"V_row {interval.v_row:.1e} (df {interval.df_row:.0f})"
    if interval.df_seed is not None:
        words = f"V_seed {interval.v_seed:.1e} (df {interval.df_seed:.0f}), {words}"
        words += f", V_res {interval.v_res:.1e}"
    return "; ".join(filter(None, (words, design or interval.design, interval.note)))


def describe_equivalence(effect: Effect) -> str:
    """Describe the equivalence test against the declared margin; empty if there is none."""
    if effect.equivalence is None:
        return ""
    found = effect.equivalence
    low, high = found.interval
    if found.is_shown:
        place = "lies inside it: equivalence is shown"
    elif min(abs(low), abs(high)) > found.margin and low * high > 0:
        place = "lies outside it: the difference is larger"
    else:
        place = "extends beyond it: equivalence is not shown"
    interval = f"the {level_text(found.level)} interval {span(found.interval)}"
    return f"margin {found.margin:g}: {interval} {place}"


def describe_interaction(found: Interaction) -> str:
    """Format the test for an interaction with another axis."""
    df = ", ".join(f"{one:.0f}" for one in found.df)
    p = probability(found.p)
    p = f"p {p[0]} {p[1:]}" if p.startswith("<") else f"p = {p}"
    return f"`{found.other}`: F({df}) = {found.statistic:.2f}, {p}"


def describe_base(rows: Sequence[ReportRow]) -> str:
    """A sentence on the runs that beat their own base model."""
    base = compare_with_base(rows)
    runs = "run" if base.num_completed == 1 else "runs"
    verb = "beats its" if base.num_better == base.num_completed == 1 else "beat their"
    text = (
        f"{base.num_better:,} of {base.num_completed:,} completed {runs} {verb} base model"
        " on test NLL per completion token"
    )
    text += f"; no better: {name_some(base.not_better)}" if base.not_better else ""
    return text + (f"; unknown: {name_some(base.unknown)}" if base.unknown else "") + "."


def list_cell_seeds(cell: Cell) -> str:
    """The number of runs of a cell that have a score, such as `2 of 3`."""
    scored = max(map(len, cell.scores.values()), default=0)  # not those that do not count
    return str(scored) if scored == len(cell.runs) else f"{scored} of {len(cell.runs)}"


def finite(value: float | None) -> float | None:
    """A number that JSON can hold; None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None
