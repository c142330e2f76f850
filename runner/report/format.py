"""A report as Markdown that reads well in a terminal, as CSV and as JSON.

Owns how numbers are written, never their values: those are in `rows`. Markdown rounds, says once
above the table what is equal in every run, and splits a table that would be too wide. CSV (rows
only) and JSON are complete and unrounded. What is missing is blank, in JSON null.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, TypeVar, get_args

from runner.files import dump_json
from runner.plan.status import State
from runner.report.rows import (
    ReportRow,
    axis_text,
    compare_with_base,
    group_by_rules,
    group_by_test_rows,
    is_number,
    list_axes,
    list_metrics,
    list_smaller_is_better,
    list_values,
)
from runner.report.statistics import AxisComparison
from runner.run.record import GenerationScore
from runner.strict import thaw
from runner.text import escape_cell, fill, measure, one_line

MAX_WIDTH: Final = 140  # terminal columns; a wider table is cut
Item = TypeVar("Item")


@dataclass(frozen=True)
class Column:
    """One column of a Markdown table, its cells already text."""

    header: str
    cells: tuple[str, ...]
    is_numeric: bool = True
    is_detail: bool = False  # goes to the second table when one would be too wide
    # What to say above the table when all runs have one value; None: never.
    equal_prefix: str | None = None
    may_be_blank: bool = False  # whether runs without a value count as having that value

    @property
    def width(self) -> int:
        """Terminal columns; Markdown wants three dashes at least."""
        return max(3, *(measure(escape_cell(cell)) for cell in (self.header, *self.cells)))

    def draw(self) -> list[str]:
        """Header, rule and cells, padded to one width."""
        width = self.width
        padded = [
            fill(escape_cell(cell), width, is_right=self.is_numeric)
            for cell in (self.header, *self.cells)
        ]
        return [padded[0], "-" * (width - 1) + (":" if self.is_numeric else "-"), *padded[1:]]

    def equal_value(self) -> str | None:
        """The one value of all runs, where it is to be said once instead of in a column."""
        values = set(self.cells) - ({""} if self.may_be_blank else set())
        return values.pop() if self.equal_prefix is not None and len(values) == 1 else None


def build_column(
    header: str, items: Iterable[Item], text: Callable[[Item], str], **settings: Any
) -> Column:
    """A column with one cell per item; `settings` are fields of `Column`."""
    return Column(header, tuple(text(item) for item in items), **settings)


def draw_tables(columns: Sequence[Column]) -> list[str]:
    """One table, or two that share their first column when one would be wider than `MAX_WIDTH`."""
    if _measure(columns) <= MAX_WIDTH:
        return [draw_table(columns)]
    details = [column for column in columns if column.is_detail]
    return [
        draw_table([column for column in columns if not column.is_detail]),
        draw_table([columns[0], *details]),
    ]


def draw_packed(columns: Sequence[Column]) -> list[str]:
    """As few tables that share their first column as fit into `MAX_WIDTH`, columns in order."""
    tables = [[columns[0]]]
    for column in columns[1:]:
        if len(tables[-1]) > 1 and _measure([*tables[-1], column]) > MAX_WIDTH:
            tables.append([columns[0]])
        tables[-1].append(column)
    return [draw_table(table) for table in tables]


def _measure(columns: Sequence[Column]) -> int:
    return sum(column.width + 3 for column in columns) + 1


def draw_table(columns: Sequence[Column]) -> str:
    """One table, whatever its width."""
    lines = zip(*(column.draw() for column in columns), strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


MAX_NAMED: Final = 3  # names in one note; JSON has all
HASH_CHARACTERS: Final = 12
MODELS: Final[tuple[Literal["base", "tuned"], ...]] = ("base", "tuned")
LEGEND: Final = (
    "NLL: nats per completion token; full NLL: nats per token of the full text; comparable within"
    " one tokenizer.\nbits/byte: of the completions, tuned; compares across tokenizers. All on the"
    " test split, lower is better.\nbase: step 0; change: tuned - base, so negative is better."
)
COMPARISON_LEGEND: Final = (
    "difference: compared - reference, mean over pairs of completed runs that are equal in every"
    " other axis;\nnegative means that `compared` is better. 95% interval: paired t."
)
ANSWERS_LEGEND: Final = (
    "Of generated answers to the test prompts, larger is better{but};"
    " unfinished: reached `max_new_tokens`;\n"
    "unreadable: no answer at all (neither label, no final result), counted as wrong."
)
ANSWERS_COMPARISON_LEGEND: Final = (
    "Where the unit says that larger is better, positive means that `compared` is better."
)


def build_warnings(rows: Sequence[ReportRow]) -> list[str]:
    """What makes the numbers of these runs incomparable."""
    warnings = []
    if len(by_rules := group_by_rules(rows)) > 1:
        sets = [
            f"rules {rules}: {_name_some(run.name for run in runs)}"
            for rules, runs in by_rules.items()
        ]
        warnings.append(
            f"{len(by_rules)} different rules of rows and masks;"
            f" runs are compared only within one: {'; '.join(sets)}"
        )
    groups = group_by_test_rows(rows)
    unknown = groups.pop(None, [])
    if len(groups) > 1:
        sets = []
        for ids_hash, runs in groups.items():
            names = _name_some(run.name for run in runs)
            shown = str(ids_hash)[:HASH_CHARACTERS]
            sets.append(f"{shown} ({runs[0].num_test_rows} rows): {names}")
        warnings.append(
            f"{len(groups)} different sets of test rows;"
            f" numbers compare only within one set: {'; '.join(sets)}"
        )
    if unknown:
        names = _name_some(run.name for run in unknown)
        warnings.append(
            f"no record of the test rows of {_count(len(unknown), 'completed run')}: {names}"
        )
    return warnings + list(dict.fromkeys(one for row in rows for one in row.base_warnings))


def _build_fields(
    row: ReportRow, metrics: Sequence[str], *, has_other_rules: bool
) -> dict[str, Any]:
    """Everything measured about a run, flat; what is said of answers only where some run has
    `metrics`, and the rules of its rows only where the runs' differ.
    """
    fields = {
        "state": row.state,
        **({"rules": row.rules} if has_other_rules else {}),
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
    return fields


def _format_csv(rows: Sequence[ReportRow], _: Sequence[AxisComparison]) -> str:
    """One line per run; axes are headed `axes.NAME`, so that an axis called `state` stays apart
    from the state.
    """
    axes, metrics = list_axes(rows), list_metrics(rows)
    has_other_rules = len(group_by_rules(rows)) > 1
    fields = [_build_fields(row, metrics, has_other_rules=has_other_rules) for row in rows]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["grid", "run", *(f"axes.{axis}" for axis in axes), *(fields[0] if fields else ())]
    )
    for row, values in zip(rows, fields, strict=True):
        # The csv module writes None as a blank and floats by repr.
        writer.writerow(
            [row.grid, row.name, *(_axis_cell(row, axis) for axis in axes), *values.values()]
        )
    return stream.getvalue()


def _format_json(rows: Sequence[ReportRow], comparisons: Sequence[AxisComparison]) -> str:
    metrics, has_other_rules = list_metrics(rows), len(group_by_rules(rows)) > 1
    return dump_json(
        {
            "rows": [
                {
                    "grid": row.grid,
                    "run": row.name,
                    "axes": thaw(row.axes),
                    **_build_fields(row, metrics, has_other_rules=has_other_rules),
                }
                for row in rows
            ],
            "comparisons": [thaw(vars(comparison)) for comparison in comparisons],
            "base": asdict(compare_with_base(rows)),
            "warnings": build_warnings(rows),
        }
    )


def _format_markdown(rows: Sequence[ReportRow], comparisons: Sequence[AxisComparison]) -> str:
    columns = _build_columns(rows)
    parts = [
        f"# {', '.join(dict.fromkeys(row.grid for row in rows)) or 'report'}: {_count_states(rows)}"
    ]
    equal = []
    for column in columns:
        value = column.equal_value()
        if value is not None:
            equal.append(f"{column.equal_prefix}{value}")
    if equal:
        parts.append(one_line(f"Equal in every run: {'; '.join(equal)}."))
    parts += [f"**warning:** {warning}" for warning in build_warnings(rows)]
    if rows:
        parts += [
            LEGEND,
            *draw_tables([column for column in columns if column.equal_value() is None]),
        ]
        parts.append(_describe_base(rows))
    if list_metrics(rows):
        smaller = list_smaller_is_better(rows)
        but = f" (smaller: {', '.join(smaller)})" if smaller else ""
        legend_of_answers = ANSWERS_LEGEND.format(but=but)
        parts += ["## Answers", legend_of_answers, *draw_packed(_build_answer_columns(rows))]
    if comparisons:
        legend = [COMPARISON_LEGEND]
        legend += (
            [ANSWERS_COMPARISON_LEGEND] if any(item.is_of_answers for item in comparisons) else []
        )
        parts += [
            "## Paired comparisons",
            "\n".join(legend),
            draw_table(_build_comparison_columns(comparisons)),
        ]
        parts += ["\n".join(f"- {one_line(note)}" for note in _build_notes(comparisons))]
    return "\n\n".join(parts).rstrip("\n") + "\n"


def _build_columns(rows: Sequence[ReportRow]) -> list[Column]:
    columns = [build_column("run", rows, lambda row: row.name, is_numeric=False)]
    if len({row.grid for row in rows}) > 1:  # else the title says it
        columns.append(build_column("grid", rows, lambda row: row.grid, is_numeric=False))
    for axis in list_axes(rows):
        is_numeric = all(is_number(value) for value in list_values(rows, axis))
        cells = tuple(_axis_cell(row, axis) for row in rows)
        columns.append(Column(axis, cells, is_numeric=is_numeric, equal_prefix=f"{axis}="))
    if len({row.state for row in rows}) > 1:  # else the title says it
        columns.append(build_column("state", rows, lambda row: row.state, is_numeric=False))
    if len(group_by_rules(rows)) > 1:
        columns.append(build_column("rules", rows, lambda row: _integer(row.rules)))
    test_rows = build_column(
        "test rows", rows, lambda row: _integer(row.num_test_rows), may_be_blank=True
    )
    stop_reason = build_column(
        "stop reason", rows, lambda row: row.stop_reason or "", is_numeric=False, may_be_blank=True
    )
    return columns + [
        replace(test_rows, equal_prefix="test rows "),
        build_column("base NLL", rows, lambda row: _decimal(row.base.nll_per_completion_token)),
        build_column("tuned NLL", rows, lambda row: _decimal(row.tuned.nll_per_completion_token)),
        build_column("change", rows, lambda row: _signed(row.change)),
        build_column("bits/byte", rows, lambda row: _decimal(row.tuned.bits_per_byte)),
        build_column(
            "base full NLL", rows, lambda row: _decimal(row.base.nll_per_token), is_detail=True
        ),
        build_column(
            "tuned full NLL", rows, lambda row: _decimal(row.tuned.nll_per_token), is_detail=True
        ),
        build_column("best/steps", rows, _steps, is_detail=True),
        replace(stop_reason, equal_prefix="stop reason ", is_detail=True),
    ]


def _build_answer_columns(rows: Sequence[ReportRow]) -> list[Column]:
    """Base and tuned side by side, of the runs whose models answered."""
    answering = [row for row in rows if row.answers]
    columns = [build_column("run", answering, lambda row: row.name, is_numeric=False)]
    for name in list_metrics(answering):
        for model in MODELS:
            cells = tuple(_decimal(row.metric(model, name)) for row in answering)
            columns.append(Column(f"{model} {name}", cells))
        counts = [score for row in answering for score in row.answers.values()]
        if any(one.num_judged_by.get(name, one.num_rows) < one.num_rows for one in counts):
            cells = tuple(_count_judged(row.answers, name) for row in answering)
            columns.append(Column(f"judged by {name} (base, tuned)", cells))
    for what in ("unfinished", "unreadable"):
        cells = tuple(_count_of(row.answers, f"num_{what}") for row in answering)
        columns.append(Column(f"{what} (base, tuned)", cells))
    return columns


def _count_of(answers: Mapping[str, GenerationScore], name: str) -> str:
    """Base and tuned, of how many: `3, 0 of 24`."""
    counts = [str(getattr(answers[model], name)) if model in answers else "?" for model in MODELS]
    return f"{', '.join(counts)} of {answers['tuned'].num_rows}"


def _count_judged(answers: Mapping[str, GenerationScore], name: str) -> str:
    """Rows that one of the project's own metrics judged, of how many."""
    counts = [
        str(answers[model].num_judged_by.get(name, "?")) if model in answers else "?"
        for model in MODELS
    ]
    return f"{', '.join(counts)} of {answers['tuned'].num_rows}"


def _build_comparison_columns(comparisons: Sequence[AxisComparison]) -> list[Column]:
    return [
        build_column("axis", comparisons, lambda item: item.axis, is_numeric=False),
        build_column(
            "reference", comparisons, lambda item: axis_text(item.reference), is_numeric=False
        ),
        build_column(
            "compared", comparisons, lambda item: axis_text(item.compared), is_numeric=False
        ),
        build_column("difference", comparisons, lambda item: _signed(item.mean_difference)),
        build_column("95% interval", comparisons, lambda item: _interval(item.interval)),
        build_column("unit", comparisons, lambda item: item.unit, is_numeric=False),
        build_column("pairs", comparisons, lambda item: str(item.num_pairs)),
        build_column("cells without a pair", comparisons, lambda item: str(len(item.unpaired))),
    ]


def _describe_base(rows: Sequence[ReportRow]) -> str:
    base = compare_with_base(rows)
    text = (
        f"{base.num_better} of {_count(base.num_completed, 'completed run')}"
        " beat their base on test NLL"
    )
    text += f"; not: {_name_some(base.not_better)}" if base.not_better else ""
    return text + (f"; not known: {_name_some(base.unknown)}" if base.unknown else "") + "."


def _build_notes(comparisons: Sequence[AxisComparison]) -> list[str]:
    """What each axis really changed, and every cell that gave no pair."""
    by_axis: dict[str, list[AxisComparison]] = {}
    for comparison in comparisons:
        by_axis.setdefault(comparison.axis, []).append(comparison)
    notes = []
    for axis, group in by_axis.items():
        # The pairs of answers are among theirs.
        likelihoods = [item for item in group if not item.is_of_answers]
        if group[0].is_with_first_only:
            first = axis_text(group[0].reference)
            notes.append(
                f"`{axis}` has {len(likelihoods) + 1} values:"
                f" each is compared with the first, {first}, only."
            )
        notes += _describe_recipe_differences(axis, likelihoods)
        if num_different := sum(item.num_pairs_on_different_rows for item in likelihoods):
            notes.append(
                f"**warning:** `{axis}`: {_count(num_different, 'pair')} scored"
                " on different test rows."
            )
        for item in group:
            if item.unpaired:
                number, reasons = (
                    _count(len(item.unpaired), "cell"),
                    _name_some(item.unpaired, "; "),
                )
                notes.append(f"`{axis}`, {_values(item)}: {number} without a pair: {reasons}.")
    return list(dict.fromkeys(notes))


def _describe_recipe_differences(axis: str, group: Sequence[AxisComparison]) -> list[str]:
    """Which keys of the recipes the axis changes; one that it changes in only some cells is likely
    a mistake.
    """
    keys = dict.fromkeys(key for item in group for key in item.recipe_differences)
    if not any(item.num_pairs for item in group):
        return []
    if not keys:
        return [f"**warning:** `{axis}`: the recipes of its pairs are the same."]
    notes = [f"`{axis}`: the paired recipes differ in {', '.join(keys)}."]
    for item in group:
        counts = item.recipe_differences.items()
        uneven = [
            f"{key} ({count} of {item.num_pairs})"
            for key, count in counts
            if count < item.num_pairs
        ]
        if uneven:
            notes.append(
                f"**warning:** `{axis}`, {_values(item)}:"
                f" only some pairs differ in {', '.join(uneven)}."
            )
    return notes


def _count_states(rows: Sequence[ReportRow]) -> str:
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])
    return f"{_count(len(rows), 'run')}, {states}" if rows else "no runs"


def _values(comparison: AxisComparison) -> str:
    return f"{axis_text(comparison.reference)} and {axis_text(comparison.compared)}"


def _axis_cell(row: ReportRow, axis: str) -> str:
    return axis_text(row.axes[axis]) if axis in row.axes else ""


def _steps(row: ReportRow) -> str:
    return "" if row.num_steps is None else f"{row.best_step}/{row.num_steps}"


def _integer(value: int | None) -> str:
    return "" if value is None else str(value)


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+z.4f}"  # z: a rounded-off -0.0000 is written +0.0000


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name_some(names: Iterable[str], separator: str = ", ") -> str:
    listed = list(names)
    more = [f"and {len(listed) - MAX_NAMED} more"] if len(listed) > MAX_NAMED else []
    return separator.join(listed[:MAX_NAMED] + more)


# Each returns the whole report, ending in a newline; the first is the default.
FORMATS: Final[Mapping[str, Callable[[Sequence[ReportRow], Sequence[AxisComparison]], str]]] = {
    "md": _format_markdown,
    "csv": _format_csv,
    "json": _format_json,
}
