"""A report as CSV (one line per run), as JSON and as LaTeX tables.

CSV and JSON are complete and unrounded; `report.schema.json` describes the JSON. Missing values are
blank in CSV and null in JSON. Texts from recipes and records are escaped, so that no spreadsheet,
terminal or TeX runs them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any, Final

from runner.errors import CONTROLS, escape_controls
from runner.files import dump_json, hash_json
from runner.recipe.identity import derive_digest
from runner.report.declared import read_declared
from runner.report.effects import AxisEffects, Cell, Effect, Metric, Report
from runner.report.rows import (
    HARDWARE,
    MODELS,
    ReportRow,
    axis_text,
    compare_with_base,
    join_numbers,
    list_axes,
    list_metrics,
)
from runner.report.statistics import Interval
from runner.report.wording import (
    DEFINITIONS,
    KINDS,
    METHOD,
    constant_or_spread,
    describe_replication,
    finite,
    level_text,
    list_cell_seeds,
    list_constant_axes,
    list_flags,
    list_numbers,
    make_safe,
    name_scope,
    probability,
    signed,
    spread,
)
from runner.strict import thaw

# Increased when a field of the JSON changes its name or meaning
FORMAT_VERSION: Final = 1
LEVEL: Final = 0.95
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
MAX_TEX_CELL: Final = 200  # characters of a text from data


def format_csv(report: Report) -> str:
    """One line per run. Axes are headed `axes.NAME`, so an axis called `state` does not
    collide with the state.
    """
    lines = list_rows(report)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_write_cell, lines[0] if lines else ("grid", "run")))
    axes = {f"axes.{axis}" for axis in list_axes(report.rows)}
    for line in lines:
        for name in axes & line.keys():
            line[name] = None if line[name] is None else axis_text(line[name])
        writer.writerow(map(_write_cell, line.values()))
    return stream.getvalue()


def list_rows(report: Report) -> list[dict[str, Any]]:
    """One flat dict per run, all with the same keys."""
    rows = report.rows
    axes, metrics = list_axes(rows), list_metrics(rows)
    commits = _list_keys(row.commits for row in rows)
    versions = _list_keys(row.versions for row in rows)
    lines = []
    for row in rows:
        line: dict[str, Any] = {"grid": row.grid, "run": row.name}
        line |= {f"axes.{axis}": thaw(row.axes.get(axis)) for axis in axes}
        line |= _build_fields(row, metrics)
        for split in SPLITS:
            for name in SPLIT_FIELDS:
                line[f"{split}.{name}"] = _read_count(name, row.split_hashes.get(split, {}))
        line |= {f"commits.{key}": row.commits.get(key) for key in commits}
        line |= {f"versions.{name}": row.versions.get(name) for name in versions}
        line |= {f"hardware.{name}": row.hardware.get(name) for name in HARDWARE}
        line |= {name: join_numbers(getattr(row, name)) for name in _ATTEMPT_NUMBERS}
        lines.append(line)
    return lines


def _read_count(name: str, fields: Mapping[str, str]) -> str | int | None:
    text = fields.get(name)
    is_count = text is not None and name.startswith("num_") and text.isdecimal()
    return int(text) if is_count and text is not None else text


_ATTEMPT_NUMBERS: Final = ("num_processes", "micro_batch_divisors")
SPLITS: Final = ("train", "validation", "test")
SPLIT_FIELDS: Final = (
    *("num_rows", "num_groups", "num_tokens", "num_completion_tokens", "num_bytes"),
    *("ids_hash", "input_ids_hash", "mask_hash"),
)


def _list_keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _write_cell(value: Any) -> str:
    """Write a cell that neither a spreadsheet nor a terminal executes.

    >>> _write_cell("=cmd"), _write_cell("-0.5"), _write_cell(-0.5), _write_cell(None)
    ("'=cmd", '-0.5', '-0.5', '')
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else repr(value)
    text = escape_controls(value)
    is_formula = value.lstrip(" ").startswith(_FORMULA_STARTS) and not _is_number(value)
    return f"'{text}" if is_formula else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _build_fields(row: ReportRow, metrics: Sequence[str]) -> dict[str, Any]:
    """Everything measured about a run, flat; fields on answers only if some run has
    `metrics`.
    """
    fields = {
        "task": row.task,
        "seed": row.seed,
        "state": row.state,
        "rules": row.rules,
        "num_test_rows": row.num_test_rows,
        "test_rows_hash": row.test_rows_hash,
        "base_nll_per_completion_token": row.base.nll_per_completion_token,
        "tuned_nll_per_completion_token": row.tuned.nll_per_completion_token,
        "change_in_nll_per_completion_token": row.change,
        "base_nll_per_token": row.base.nll_per_token,
        "tuned_nll_per_token": row.tuned.nll_per_token,
        "base_bits_per_byte": row.base.bits_per_byte,
        "tuned_bits_per_byte": row.tuned.bits_per_byte,
        "best_step": row.best_step,
        "num_steps": row.num_steps,
        "stop_reason": row.stop_reason,
    }
    if metrics:
        for model in MODELS:
            counts = row.answers.get(model)
            fields |= {f"{model}_{name}": row.metric(model, name) for name in metrics}
            fields[f"{model}_num_unfinished"] = counts.num_unfinished if counts else None
            fields[f"{model}_num_unreadable"] = counts.num_unreadable if counts else None
    is_known = row.rules is not None
    return fields | {
        "recipe_digest": derive_digest(row.recipe, row.contents, row.rules or 1)
        if is_known
        else None,
        "num_updates": row.num_updates,
        "num_trained_tokens": row.num_trained_tokens,
        "schedule_steps": row.schedule_steps,
        "initial_weights_hash": row.initial_weights_hash,
        "row_order_hash": row.row_order_hash,
        "runner_version": row.runner_version,
        "runner_commit": row.runner_commit,
        "runner_is_dirty": row.runner_is_dirty,
        "source_hash": row.source_hash,
    }


def format_json(report: Report) -> str:
    """The whole report, except for per-row scores."""
    metrics = list_metrics(report.rows)
    text = dump_json(
        {
            "format_version": FORMAT_VERSION,
            "level": LEVEL,
            "method": dict(METHOD),
            "definitions": dict(DEFINITIONS),
            "metrics": [_dump_metric(metric) for metric in report.metrics],
            "verdicts": list(report.verdicts),
            "warnings": list(report.warnings),
            **dump_effects(report.cells, report.effects),
            "noise_floors": [
                {"grid": grid, "task": task, "metric": metric, "value": finite(value)}
                for (grid, task, metric), value in report.noise_floors.items()
            ],
            "rows": [_dump_row(row, metrics) for row in report.rows],
            "base": asdict(compare_with_base(report.rows)),
        }
    )
    return escape_json_controls(text)


def escape_json_controls(text: str) -> str:
    """The same JSON with terminal controls escaped; only its texts can contain any."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def dump_effects(cells: Sequence[Cell], effects: Sequence[AxisEffects]) -> dict[str, Any]:
    """Effects and their cells as in the JSON of a report."""
    at = {_key_cell(cell): number for number, cell in enumerate(cells)}
    return {
        "effects": [_dump_axis(one, at) for one in effects],
        "cells": [_dump_cell(cell) for cell in cells],
    }


def _dump_metric(metric: Metric) -> dict[str, Any]:
    return {**asdict(metric), "better": "smaller" if metric.mode == "min" else "larger"}


def _dump_row(row: ReportRow, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "grid": row.grid,
        "run": row.name,
        "axes": thaw(row.axes),
        **_build_fields(row, metrics),
        "splits": {split: dict(fields) for split, fields in row.split_hashes.items()},
        "contents": dict(row.contents),
        "commits": dict(row.commits),
        "versions": dict(row.versions),
        "hardware": dict(row.hardware),
        **{name: list(getattr(row, name)) for name in _ATTEMPT_NUMBERS},
        # Together with the declarations then and now, it shows which contrasts are confirmatory
        "started_at_utc": row.started_at_utc,
        "declared_then": _dump_declared(row.declared_then),
        "declared_now": _dump_declared(row.declared_now),
    }


def _dump_declared(contrasts: Iterable[Any] | None) -> list[dict[str, Any]] | None:
    """Declared contrasts as in a recipe; null if no attempt recorded a recipe."""
    if contrasts is None:
        return None
    return [
        {
            "axis": one.axis,
            "from": thaw(one.reference),
            "to": thaw(one.compared),
            "metric": one.metric,
            "margin": one.margin,
        }
        for one in read_declared(contrasts)
    ]


def _key_cell(cell: Cell) -> str:
    return hash_json([cell.grid, cell.task, thaw(cell.axes)])


def _dump_cell(cell: Cell) -> dict[str, Any]:
    scores = {}
    for metric, by_seed in cell.scores.items():
        values = list(by_seed.values())
        scores[metric] = {
            "by_seed": [{"seed": seed, "score": finite(score)} for seed, score in by_seed.items()],
            "mean": finite(fmean(values)) if values else None,
            "sd": finite(stdev(values)) if len(values) > 1 else None,
            "base": finite(cell.base_scores.get(metric)),
        }
    return {
        "grid": cell.grid,
        "task": cell.task,
        "axes": thaw(cell.axes),
        "runs": [row.name for row in cell.runs],
        "scores": scores,
        "missing": list(cell.missing),
    }


def list_effects(report: Report) -> list[dict[str, Any]]:
    """One flat dict per effect, all with the same keys: the mean over all cells, the effects at
    each level of another axis, and those of single pairs of cells.
    """
    axes = [f"at.{axis}" for axis in list_axes(report.rows)]
    lines = []
    for one in report.effects:
        scopes = [("all cells", [one.pooled] if one.pooled is not None else [])]
        scopes += [(f"each {other}", list(levels)) for other, levels in one.simple.items()]
        scopes += [("pair of cells", list(one.cells))]
        answers = set(map(id, one.main))
        for scope, effects in scopes:
            for effect in effects:
                line: dict[str, Any] = {
                    "grid": one.grid,
                    "task": one.task,
                    "metric": one.metric.name,
                    "better": _dump_metric(one.metric)["better"],
                    "axis": one.axis,
                    "reference": thaw(one.reference),
                    "compared": thaw(one.compared),
                    "scope": scope,
                    **dict.fromkeys(axes),
                    **{f"at.{axis}": thaw(value) for axis, value in effect.at.items()},
                    "is_answer": id(effect) in answers,
                    "is_declared": one.is_declared,
                }
                lines.append(line | _flatten_effect(effect))
    return lines


def _flatten_effect(effect: Effect) -> dict[str, Any]:
    dumped = _dump_effect(effect, {})
    low, high = dumped["interval"] or (None, None)
    equivalence = dumped["equivalence"] or {}
    return {
        "estimate": dumped["estimate"],
        "low": low,
        "high": high,
        "is_clear": effect.is_clear,
        **{name: dumped[name] for name in _FLAT},
        "margin": equivalence.get("margin"),
        "is_equivalent": equivalence.get("is_shown"),
        "num_pairs": len(effect.pairs),
        "refused": "; ".join(effect.refused),
        "flags": "; ".join(effect.flags),
    }


_FLAT: Final = (
    *("level", "standard_error", "p", "p_adjusted", "adjustment", "is_confirmatory"),
    *("why_exploratory", "noise_floor", "is_below_noise", "design", "note"),
)


def _dump_axis(effects: AxisEffects, at: Mapping[str, int]) -> dict[str, Any]:
    return {
        "grid": effects.grid,
        "task": effects.task,
        "metric": effects.metric.name,
        "axis": effects.axis,
        "reference": thaw(effects.reference),
        "compared": thaw(effects.compared),
        "depends_on": list(effects.depends_on),
        "interactions": [
            {
                "other": one.other,
                "p": finite(one.p),
                "statistic": finite(one.statistic),
                "df": [finite(df) for df in one.df],
            }
            for one in effects.interactions
        ],
        "pooled": None if effects.pooled is None else _dump_effect(effects.pooled, at),
        "simple": {
            other: [_dump_effect(one, at) for one in levels]
            for other, levels in effects.simple.items()
        },
        "cells": [_dump_effect(one, at) for one in effects.cells],
    }


def _dump_effect(effect: Effect, at: Mapping[str, int]) -> dict[str, Any]:
    equivalence = None
    if effect.equivalence is not None:
        equivalence = {**asdict(effect.equivalence), "interval": [*effect.equivalence.interval]}
    return {
        "at": thaw(effect.at),
        **dump_interval(effect.interval),
        "p_adjusted": finite(effect.p_adjusted),
        "adjustment": "Holm" if effect.is_confirmatory else "Benjamini-Hochberg",
        "is_confirmatory": effect.is_confirmatory,
        "why_exploratory": effect.why_exploratory,
        "equivalence": equivalence,
        "noise_floor": finite(effect.noise_floor),
        "is_below_noise": effect.is_below_noise,
        "design": effect.design,
        "refused": list(effect.refused),
        "flags": list(effect.flags),
        "pairs": [_dump_pair(a, b, effect.metric.name, at) for a, b in effect.pairs],
    }


_NUMBERS: Final = (
    *("estimate", "standard_error", "p", "level"),
    *("v_seed", "v_row", "v_res", "df_seed", "df_row"),
)


def dump_interval(interval: Interval | None) -> dict[str, Any]:
    """All fields of an interval; null if there is none."""
    bounds = None
    if interval is not None and interval.bounds is not None:
        bounds = [finite(end) for end in interval.bounds]
    numbers = {
        name: None if interval is None else finite(getattr(interval, name)) for name in _NUMBERS
    }
    return {
        **numbers,
        "interval": bounds,
        "kind": None if interval is None else interval.kind,
        "num_groups": None if interval is None else interval.num_groups,
        "num_seeds": [] if interval is None else list(interval.num_seeds),
        "has_few_groups": None if interval is None else interval.has_few_groups,
        "note": "" if interval is None else interval.note,
    }


def _dump_pair(
    reference: Cell, compared: Cell, metric: str, at: Mapping[str, int]
) -> dict[str, Any]:
    """The two cells by their number in `cells`, and the difference for each shared seed."""
    first, second = reference.scores.get(metric, {}), compared.scores.get(metric, {})
    difference = None
    if first and second:
        difference = fmean(second.values()) - fmean(first.values())
    return {
        "reference": at.get(_key_cell(reference)),
        "compared": at.get(_key_cell(compared)),
        "difference_of_means": finite(difference),
        "by_seed": [
            {"seed": seed, "difference": finite(second[seed] - first[seed])}
            for seed in first
            if seed in second
        ],
    }


def format_tex(report: Report) -> str:
    """Booktabs tables for a paper: effects by metric, then cells, with notes on refusals,
    flags and warnings.
    """
    parts = ["% Tables of `runner report`; needs \\usepackage{booktabs}"]
    for metric in report.metrics:
        of_metric = [one for one in report.effects if one.metric.name == metric.name]
        if any(_list_reported(one) for one in of_metric):
            parts.append(_draw_effects_tex(metric, of_metric, list_constant_axes(report.rows)))
    if report.cells:
        parts.append(_draw_cells_tex(report))
    notes = [f"Warning: {warning}" for warning in report.warnings]
    if notes:
        parts.append(_draw_notes_tex(notes))
    return "\n\n".join(parts) + "\n"


def _draw_effects_tex(
    metric: Metric, of_metric: Sequence[AxisEffects], constant: Collection[str]
) -> str:
    lines, notes = [], []
    for effects in of_metric:
        sides = f"{axis_text(effects.reference)} to {axis_text(effects.compared)}"
        flags = list_flags(effects.shown, constant)
        notes += [f"{effects.axis}, {sides}: {flag}" for flag in flags]
        for effect in _list_reported(effects):
            names = (effect.axis, sides, name_scope(effect, constant))
            lines.append([*map(escape_tex, names), *_write_effect_tex(effect)])
            notes += [f"{', '.join(names)}: refused: {reason}" for reason in effect.refused]
    better = "smaller" if metric.mode == "min" else "larger"
    caption = (
        f"Effects on {metric.title} ({metric.unit}; {better} is better): compared minus reference,"
        " with the interval (level) over seeds and rows unless the last column says otherwise."
        " Intervals at the levels of another axis hold jointly at 95%. p is adjusted, by Holm for"
        " contrasts declared before the first launch (dagger), otherwise by Benjamini-Hochberg"
        " (exploratory). In parentheses: below the noise floor."
    )
    header = ["Axis", "Contrast", "At", "Difference", "Interval", "p", r"Seeds $\times$ rows", ""]
    table = _draw_table_tex(caption, "lllrrrrl", header, lines)
    return f"{table}\n{_draw_notes_tex(dict.fromkeys(notes))}" if notes else table


def _list_reported(effects: AxisEffects) -> list[Effect]:
    """Effects with a number or a refusal, without those of single runs."""
    numbers = list_numbers(effects)
    return [one for one in effects.shown if one.refused or one in numbers]


def _write_effect_tex(effect: Effect) -> list[str]:
    interval = effect.interval
    if interval is None:
        return ["refused", "", "", "", ""]
    estimate = _math(signed(interval.estimate))
    p = probability(effect.p_adjusted)
    ends = [] if interval.bounds is None else [_math(signed(end)) for end in interval.bounds]
    level = f" ({escape_tex(level_text(interval.level))})" if ends else ""
    return [
        f"({estimate})" if effect.is_below_noise else estimate,
        f"{' to '.join(ends)}{level}",
        _math(f"{p}^\\dagger" if p and effect.is_confirmatory else p),
        describe_replication(effect).replace(" x ", r" $\times$ "),
        KINDS.get(interval.kind, ""),
    ]


def _draw_cells_tex(report: Report) -> str:
    axes = [axis for axis in list_axes(report.rows) if any(axis in c.axes for c in report.cells)]
    are_tasks = len({cell.task for cell in report.cells}) > 1
    are_grids = len({cell.grid for cell in report.cells}) > 1
    names = [*(["grid"] if are_grids else []), *(["task"] if are_tasks else []), *axes]
    metrics = [
        metric for metric in report.metrics if any(metric.name in c.scores for c in report.cells)
    ]
    lines = []
    for cell in report.cells:
        keys = [*([cell.grid] if are_grids else []), *([cell.task] if are_tasks else [])]
        keys += [axis_text(cell.axes[axis]) if axis in cell.axes else "" for axis in axes]
        numbers = [list_cell_seeds(cell)]
        for metric in metrics:
            base = cell.base_scores.get(metric.name)
            numbers.append(_math(constant_or_spread([base])))
            numbers.append(_math(spread(cell.scores.get(metric.name, {}).values())))
        lines.append([*map(escape_tex, keys), *numbers])
    header = [*map(escape_tex, names), "Seeds"]
    for metric in metrics:
        header += [f"{escape_tex(metric.title)}, base", "tuned"]
    columns = "l" * len(names) + "r" * (1 + 2 * len(metrics))
    caption = "Scores on the test split: mean and standard deviation over the seeds."
    table = _draw_table_tex(caption, columns, header, lines)
    missing = [text for cell in report.cells for text in cell.missing]
    return (
        f"{table}\n{_draw_notes_tex(['Runs without a score: ' + '; '.join(missing)])}"
        if missing
        else table
    )


def _draw_table_tex(
    caption: str, columns: str, header: Sequence[str], lines: Iterable[Sequence[str]]
) -> str:
    """Draw a table whose cells are already TeX; only the caption is escaped here."""
    rows = [" & ".join(cells) + r" \\" for cells in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escape_tex(caption, len(caption))}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _draw_notes_tex(notes: Iterable[str]) -> str:
    items = [f"\\item {escape_tex(note, 5 * MAX_TEX_CELL)}" for note in notes]
    return "\n".join([r"{\footnotesize", r"\begin{itemize}", *items, r"\end{itemize}}"])


def _math(text: str) -> str:
    """Format our own numbers in math mode, with TeX's minus and plus-minus."""
    return f"${text.replace('±', chr(92) + 'pm')}$" if text else ""


_TEX: Final[Mapping[str, str]] = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    # After the end of a table row, TeX would read these as its arguments
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def escape_tex(text: str, most: int = MAX_TEX_CELL) -> str:
    r"""Escape a text so that TeX prints it literally; an overlong text is cut in the middle.

    >>> print(escape_tex(r"\input{a_b}"))
    \textbackslash{}input\{a\_b\}
    """
    shown = "".join(_TEX.get(character, character) for character in make_safe(text, most))
    return re.sub("-(?=-)", "-{}", shown)  # TeX would print two as a dash
