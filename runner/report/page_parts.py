"""The tables of a page: effects, variances and runs. Others are in `page_facts`.

Texts are plain here; the page escapes them. Each column has its definition, so that the page can
define every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runner.recipe.identity import derive_digest
from runner.report.cells import find_seed_axis, get_seed, list_counted
from runner.report.effects import AxisEffects, Effect, Report
from runner.report.labels import (
    describe_contrast,
    describe_place,
    describe_source,
    list_places,
)
from runner.report.rows import ReportRow, axis_text, list_axes
from runner.report.wording import probability, signed
from runner.text import format_count

NUM_HASH_CHARACTERS: Final = 12


@dataclass(frozen=True)
class PageColumn:
    """One column and its meaning."""

    title: str
    meaning: str
    is_numeric: bool = True
    is_short: bool = False  # stays on one line


@dataclass(frozen=True)
class PageCell:
    """One cell of a table: its text, and the number that it sorts by."""

    text: str = ""
    value: float | None = None
    style: str = ""
    notes: tuple[str, ...] = ()  # sentences to unfold


@dataclass(frozen=True)
class PageTable:
    """A table that sorts and filters if scripts run."""

    name: str
    columns: Sequence[PageColumn]
    rows: Sequence[tuple[str, Sequence[PageCell]]]  # style and cells
    caption: str = ""


def build_table(
    name: str, columns: Sequence[PageColumn], rows: Sequence[tuple[str, Sequence[PageCell]]]
) -> PageTable:
    """Build a table without its empty columns."""
    kept = [at for at in range(len(columns)) if any(_says(cells[at]) for _, cells in rows)]
    return PageTable(
        name,
        [columns[at] for at in kept],
        [(style, [cells[at] for at in kept]) for style, cells in rows],
    )


def _says(cell: PageCell) -> bool:
    return bool(cell.text or cell.notes)


def number(value: float | None, digits: int = 4, *, is_signed: bool = False) -> PageCell:
    """A number as a cell."""
    sign = "+" if is_signed else ""
    return PageCell("" if value is None else f"{value:{sign}z.{digits}f}", value)


def whole(value: int | None) -> PageCell:
    """A count as a cell."""
    return PageCell("" if value is None else f"{value:,}", value)


_EFFECT_COLUMNS: Final = (
    PageColumn("contrast", "The axis and its two values; the first is the reference.", False, True),
    PageColumn(
        "where",
        "The cells compared: the mean over pairs of cells that are equal on every other axis, the"
        " pairs at one value of another axis, or two single cells.",
        False,
    ),
    PageColumn("difference", "Score of the second value minus that of the reference."),
    PageColumn(
        "interval",
        "The confidence interval of the difference; the column `over` shows its scope.",
        is_numeric=False,
        is_short=True,
    ),
    PageColumn(
        "adjusted p",
        "The p-value after correction for the number of contrasts: Holm for declared ones,"
        " Benjamini-Hochberg for exploratory ones.",
    ),
    PageColumn(
        "notes",
        "Other differences between the compared runs, and limits of the estimate.",
        False,
    ),
    PageColumn(
        "status",
        "Confirmatory: declared before the first launch by all its runs. Exploratory: all others.",
        False,
    ),
    PageColumn(
        "noise floor",
        "Two single runs that differ only in the seed stay within this difference in 95% of cases;"
        " smaller differences are grey.",
    ),
    PageColumn(
        "no difference",
        "Two one-sided tests (TOST) against the declared margin: shown if the 90% interval lies"
        " inside the margin; for several simple effects, the interval at 1 - 0.10 / their number.",
        False,
    ),
    PageColumn(
        "over",
        "The scope of the interval. Seeds and rows: this recipe, on rows like these. Seeds: this"
        " recipe, on exactly these rows. Rows: these trained models only, no verdict on the recipe."
        " Identical: the runs do not differ.",
        is_numeric=False,
        is_short=True,
    ),
    PageColumn("metric", "The metric of the difference, on the test rows.", False, True),
    PageColumn("pairs", "Pairs of cells that the difference averages."),
    PageColumn("seeds", "Runs with a score in each cell.", False),
)


def build_effects_table(
    report: Report, chosen: Sequence[tuple[AxisEffects, Effect]], name: str
) -> PageTable:
    """The table of these effects, with intervals and notes."""
    rows = []
    several = len(list_places(report)) > 1
    for effects, effect in chosen:
        source = f" ({describe_source(report, effects.grid, effects.task)})" if several else ""
        rows.append(_build_effect_row(effect, source))
    return _say_metric_once(build_table(name, _EFFECT_COLUMNS, rows), chosen)


def _say_metric_once(table: PageTable, chosen: Sequence[tuple[AxisEffects, Effect]]) -> PageTable:
    """Move the metric into the caption if the table has only one."""
    metrics = {(effect.metric.title, effect.metric.unit) for _, effect in chosen}
    if len(metrics) != 1:
        return table
    [(title, unit)] = metrics
    at = [column.title for column in table.columns].index("metric")
    columns = [*table.columns[:at], *table.columns[at + 1 :]]
    rows = [(style, [*cells[:at], *cells[at + 1 :]]) for style, cells in table.rows]
    named = title if unit == title else f"{title}, {unit}"
    return PageTable(table.name, columns, rows, f"{named}, on the test rows.")


def _build_effect_row(effect: Effect, source: str) -> tuple[str, Sequence[PageCell]]:
    interval = effect.interval
    head = [PageCell(f"{describe_contrast(effect)}{source}"), PageCell(describe_place(effect))]
    notes = tuple(filter(None, (effect.why_exploratory, *effect.flags)))
    status = PageCell("confirmatory" if effect.is_confirmatory else "exploratory")
    metric, empty = PageCell(effect.metric.title), PageCell()
    if interval is None:
        why = PageCell("why", notes=(*effect.refused, *notes))
        rest = [PageCell("not comparable"), empty, empty, why, PageCell("refused")]
        return "refused", [*head, *rest, empty, empty, empty, metric, empty, empty]
    bounds = interval.bounds
    style = "below" if effect.is_below_noise else ""
    within = empty
    if effect.equivalence is not None:
        shown = "shown" if effect.equivalence.is_shown else "not shown"
        within = PageCell(f"{shown} within ±{effect.equivalence.margin:g}")
    if interval.has_few_groups:
        notes = (*notes, "few groups: the interval is rough")
    notes = tuple(filter(None, (*notes, interval.note, effect.design)))
    level = f"{interval.level * 100:g}%"
    return style, [
        *head,
        number(interval.estimate, is_signed=True),
        PageCell(f"{signed(bounds[0])} to {signed(bounds[1])} ({level})" if bounds else ""),
        PageCell(probability(effect.p_adjusted), effect.p_adjusted),
        PageCell(_count_notes(len(notes), len(effect.flags)), len(notes), notes=notes),
        status,
        number(effect.noise_floor),
        within,
        PageCell(interval.kind if interval.kind != "rows" else "rows only"),
        metric,
        whole(len(effect.pairs)),
        PageCell(_describe_seeds(interval.num_seeds)),
    ]


def _describe_seeds(numbers: Sequence[int]) -> str:
    """Format numbers of seeds, such as `3` or `2 to 3`."""
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


_VARIANCE_COLUMNS: Final = (
    PageColumn("contrast", _EFFECT_COLUMNS[0].meaning, False),
    PageColumn("where", _EFFECT_COLUMNS[1].meaning, False),
    PageColumn("metric", "The metric of the difference, on the test rows.", False),
    PageColumn("V seed", "Variance of the difference due to seeds: more seeds reduce it."),
    PageColumn("V row", "Variance of the difference due to test rows: more rows reduce it."),
    PageColumn("V res", "The residual part, included in both V seed and V row."),
    PageColumn("df seed", "Degrees of freedom of V seed."),
    PageColumn("df row", "Degrees of freedom of V row: the effective number of groups minus 1."),
    PageColumn("groups", "Groups of test rows; a row without a group counts as one."),
    PageColumn("would help", "The larger part of the variance.", False),
)


def build_variance_table(chosen: Sequence[AxisEffects]) -> PageTable:
    """The variance parts of each interval, which show if more seeds or rows would help."""
    rows = []
    for effects in chosen:
        for effect in effects.shown:
            one = effect.interval
            if one is None:
                continue
            helps = "seeds" if one.v_seed > one.v_row else "rows"
            cells = [
                PageCell(describe_contrast(effect)),
                PageCell(describe_place(effect)),
                PageCell(effect.metric.title),
                *(PageCell(f"{value:.2e}", value) for value in (one.v_seed, one.v_row, one.v_res)),
                number(one.df_seed, 1),
                number(one.df_row, 1),
                whole(one.num_groups),
                PageCell("" if one.kind == "identical" else f"more {helps}"),
            ]
            rows.append(("", cells))
    return build_table("variances", _VARIANCE_COLUMNS, rows)


def build_runs_table(report: Report) -> PageTable:
    """One row per run, with the axes as columns."""
    rows = report.rows
    axes = list_axes(rows)
    several = len({row.grid for row in rows}) > 1
    scores = _list_scores(report)
    columns = [PageColumn("run", "The run's name.", False)]
    columns += [PageColumn("grid", "The grid of the run.", False)] if several else []
    columns += [
        PageColumn(axis, f"The axis `{axis}` of the grid.", is_numeric=False) for axis in axes
    ]
    columns.append(PageColumn("state", "The state that `runner status` shows.", False))
    columns += [
        PageColumn(metric.title, f"The tuned model on the test rows, {metric.unit}.")
        for metric in report.metrics
    ]
    columns += [
        PageColumn("base NLL", "The base model at step 0, nats per completion token."),
        PageColumn("change", "Tuned minus base NLL per completion token; below 0 is better."),
        PageColumn("best step", "The step whose model was tested: the best on validation rows."),
        PageColumn("updates", "Optimizer steps taken."),
        PageColumn("trained tokens", "Label tokens, over all updates."),
        PageColumn("stopped by", "The reason why training ended.", False),
        PageColumn("digest", "Start of the recipe's digest: equal for the same experiment.", False),
    ]
    lines = []
    for row in rows:
        cells = [PageCell(row.name)] + ([PageCell(row.grid)] if several else [])
        for axis in axes:
            value = row.axes.get(axis)
            cells.append(
                PageCell(
                    axis_text(value) if axis in row.axes else "",
                    float(value)
                    if isinstance(value, int | float) and not isinstance(value, bool)
                    else None,
                )
            )
        cells.append(PageCell(row.state, style=f"state-{row.state}"))
        cells += [number(scores.get((id(row), metric.name))) for metric in report.metrics]
        cells += [
            number(row.base.nll_per_completion_token),
            number(row.change, is_signed=True),
            whole(row.best_step),
            whole(row.updates),
            whole(row.num_trained_tokens),
            PageCell((row.stop_reason or "").replace("_", " ")),
            PageCell(_find_digest(row)),
        ]
        lines.append(("" if row.state == "completed" else "open", cells))
    return build_table("runs", columns, lines)


def _list_scores(report: Report) -> dict[tuple[int, str], float]:
    """Scores by identity of the run's row and metric name."""
    seed_axes = {
        grid: find_seed_axis([row for row in report.rows if row.grid == grid])
        for grid in {row.grid for row in report.rows}
    }
    scores = {}
    for cell in report.cells:
        for metric, known in cell.scores.items():
            for run in list_counted(cell, metric, seed_axes[cell.grid]):
                scores[id(run), metric] = known[get_seed(run, seed_axes[cell.grid])]
    return scores


def _find_digest(row: ReportRow) -> str:
    if row.rules is None:
        return ""
    return derive_digest(row.recipe, dict(row.contents), row.rules)[:NUM_HASH_CHARACTERS]


# Terms of the page that are not columns
TERMS: Final = (
    ("cell", "Runs that differ only in the seed."),
    ("seed", "`training.seed`: the unit of replication."),
    ("arm", "One value of an axis, in one or more cells."),
    ("row", "Start of the id of a test row: a hash of its content."),
    ("group", "Rows that belong together; they are never split across two splits."),
    ("length", "Scored tokens of a row (bytes, for bits per byte)."),
    ("base", "The base model's score of a row, before training."),
    ("better", "The arm with the better score on this row; after an arm: its number of such rows."),
    ("mean difference", "Mean of the second arm's score minus the first arm's, over some rows."),
    ("missing", "A run without a score; its cell is hatched, and nothing is imputed."),
)


def _count_notes(num_notes: int, num_flags: int) -> str:
    """The label of notes that are folded; flags are counted separately, so they are not missed.

    >>> _count_notes(4, 2), _count_notes(1, 0), _count_notes(1, 1), _count_notes(0, 0)
    ('2 flags, 2 notes', '1 note', '1 flag', '')
    """
    counts = {"flag": num_flags, "note": num_notes - num_flags}
    return ", ".join(format_count(count, what) for what, count in counts.items() if count)
