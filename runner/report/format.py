"""A report as Markdown that reads well in a terminal, 120 columns wide.

Owns only the layout: numbers are in `rows` and `effects`, their texts in `wording`. The verdicts
come first, then warnings, effects and cells. Runs that differ only in the seed share one line, mean
± standard deviation; single runs are in CSV and JSON (`tables`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Final, TypeVar

from runner.report.build import MAX_VALUES_ALL_PAIRS
from runner.report.effects import AxisEffects, Cell, Effect, Report
from runner.report.rows import (
    MODELS,
    ReportRow,
    axis_text,
    is_number,
    list_axes,
    list_metrics,
    list_smaller_is_better,
    list_values,
)
from runner.report.tables import format_csv, format_json, format_tex
from runner.report.wording import (
    constant_or_spread,
    count_states,
    describe_base,
    describe_direction,
    describe_equivalence,
    describe_interaction,
    describe_noise_floors,
    describe_replication,
    describe_standing,
    is_of_single_runs,
    level_text,
    list_cell_seeds,
    list_constant_axes,
    list_designs,
    list_flags,
    list_numbers,
    make_safe,
    name_scope,
    name_some,
    probability,
    signed,
    span,
    spread,
    variance,
)
from runner.run.result import GenerationScore
from runner.text import cut, cut_middle, escape_cell, fill, format_count, measure

MAX_WIDTH: Final = 120  # terminal columns; a wider table is cut into several
MAX_CELL: Final = 40  # of a value from a recipe
MAX_KEY: Final = 72  # of all columns together that name the cell of a line
MAX_EFFECTS: Final = 24  # per metric and two values of an axis; JSON has all
MAX_MISSING: Final = 10  # named runs without a score; JSON has all
Item = TypeVar("Item")
_WORD: Final = re.compile(r"[^\s`]*`[^`]*`\S*|\S+")  # a command is one word


@dataclass(frozen=True)
class Column:
    """One column of a Markdown table, with its cells as text."""

    header: str
    cells: tuple[str, ...]
    is_numeric: bool = True
    # Prefix of the value above the table if all cells are equal; None: always a column.
    equal_prefix: str | None = None
    may_be_blank: bool = False  # True: cells without a value count as equal to it
    most: int = MAX_CELL  # width of a cell in columns

    @cached_property
    def shown(self) -> list[str]:
        """Header and cells as drawn: on one line, cut to size, without controls."""
        texts = (self.header, *self.cells)
        return [escape_cell(_cut_value(text, self.most)) for text in texts]

    @property
    def width(self) -> int:
        """Terminal columns; Markdown needs at least three dashes."""
        return max(3, *map(measure, self.shown))

    def draw(self) -> list[str]:
        """Header, rule and cells, padded to the same width."""
        width = self.width
        padded = [fill(cell, width, is_right=self.is_numeric) for cell in self.shown]
        return [padded[0], "-" * (width - 1) + (":" if self.is_numeric else "-"), *padded[1:]]

    def equal_value(self) -> str | None:
        """The value of all cells if it is printed once instead of as a column, else None."""
        values = set(self.cells) - ({""} if self.may_be_blank else set())
        return values.pop() if self.equal_prefix is not None and len(values) == 1 else None


def build_column(
    header: str, items: Iterable[Item], text: Callable[[Item], str], **settings: Any
) -> Column:
    """A column with one cell per item; `settings` are fields of `Column`."""
    return Column(header, tuple(text(item) for item in items), **settings)


def draw_packed(keys: Sequence[Column], columns: Sequence[Column]) -> list[str]:
    """Draw `columns` in order as few tables within `MAX_WIDTH`, each starting with `keys`."""
    keys = list(keys)
    if keys and _measure(keys) > MAX_KEY:
        numbers = tuple(map(str, range(1, len(keys[0].cells) + 1)))
        keys, columns = [Column("cell", numbers)], [*keys, *columns]
    tables = [list(keys)]
    for column in columns:
        if len(tables[-1]) > len(keys) and _measure([*tables[-1], column]) > MAX_WIDTH:
            tables.append(list(keys))
        tables[-1].append(column)
    return [draw_table(table) for table in tables]


def _measure(columns: Sequence[Column]) -> int:
    return sum(column.width + 3 for column in columns) + 1


def _cut_value(text: str, most: int = MAX_CELL) -> str:
    return cut_middle(make_safe(text, 4 * most), most)


def draw_table(columns: Sequence[Column]) -> str:
    """Draw one table of any width."""
    lines = zip(*(column.draw() for column in columns), strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def wrap(text: str, first: str = "", indent: str = "") -> str:
    """Wrap a sentence to lines of at most `MAX_WIDTH` columns. The first line starts with `first`,
    the others with `indent`; an overlong text is cut.

    >>> wrap("one two", "- ")
    '- one two'
    """
    lines, line = [], first
    is_empty = True
    for word in _WORD.findall(make_safe(text)):
        if not is_empty and measure(line) + 1 + measure(word) <= MAX_WIDTH:
            line += f" {word}"
            continue
        if not is_empty:
            lines.append(line)
            line = indent
        while measure(line + word) > MAX_WIDTH:  # longer than a line
            head = cut(word, MAX_WIDTH - measure(line), "")
            lines.append(line + head)
            line, word = indent, word[len(head) :]
        line, is_empty = line + word, False
    return "\n".join([*lines, line])


def bullet(text: str) -> str:
    """Format a sentence as a list item."""
    return wrap(text, "- ", "  ")


EFFECTS_LEGEND: Final = (
    "difference: compared - reference. interval: for the recipe, on rows like these (seeds and rows"
    " both random), unless the status says otherwise; intervals at the levels of another axis hold"
    " jointly at 95%, so each has a higher level. p: adjusted, by Holm over the contrasts declared"
    " before the first launch (confirmatory), otherwise by Benjamini-Hochberg (exploratory). In"
    " parentheses: below the noise floor; two single runs of one recipe differ by less than the"
    " floor in 95% of cases. V_seed, V_row: variance of the difference due to seeds (more seeds"
    " reduce it) and to test rows (more rows reduce it). V_res: noise of single rows in single"
    " runs, a part of both."
)
ROWS_ONLY: Final = (
    "rows only: about these trained models on rows like these, no verdict on the recipe"
)
CELLS_LEGEND: Final = (
    "NLL: nats per completion token; full NLL: nats per token of the full text; both are comparable"
    " only within one tokenizer. bits/byte: of the completions, tuned model; comparable across"
    " tokenizers. All are on the test split; lower is better. base: step 0; change: tuned - base,"
    " so negative is better."
)
SPREAD_LEGEND: Final = " Mean ± standard deviation over the seeds."
ANSWERS_LEGEND: Final = (
    "Scores of the generated answers to the test prompts; larger is better{but}. unfinished:"
    " reached `max_new_tokens`; unreadable: contains no label or final result, counted as wrong."
)


def format_markdown(report: Report) -> str:
    """The whole report."""
    grids = ", ".join(dict.fromkeys(row.grid for row in report.rows))
    title = f"# {cut(make_safe(grids), MAX_WIDTH // 2) or 'report'}: {count_states(report.rows)}"
    parts = [cut(title, MAX_WIDTH)]
    if report.verdicts:
        parts.append("\n".join(map(bullet, report.verdicts)))
    parts += [wrap(f"**warning:** {warning}") for warning in report.warnings]
    if report.effects:
        has_numbers = any(map(list_numbers, report.effects))
        parts += ["## Effects", *([wrap(EFFECTS_LEGEND)] if has_numbers else [])]
        parts += describe_effects(report, report.effects)
    if report.cells:
        parts += ["## Scores", *_describe_cells(report)]
    answering = [cell for cell in report.cells if any(row.answers for row in cell.runs)]
    if answering:
        smaller = list_smaller_is_better(report.rows)
        but = f" (smaller: {', '.join(smaller)})" if smaller else ""
        columns = _build_answer_columns(answering)
        parts += ["## Answers", wrap(ANSWERS_LEGEND.format(but=but))]
        parts += draw_packed(_build_key_columns(answering, report), columns)
    return "\n\n".join(parts) + "\n"


def describe_effects(
    report: Report, some: Sequence[AxisEffects], *, with_single: bool = False
) -> Iterator[str]:
    """Yield a section for each two values of an axis, with a table for each metric; effects of
    single runs only `with_single`.
    """
    constant = list_constant_axes(report.rows)
    for heading, group in groupby(some, partial(_name_section, report)):
        every = list(group)
        yield cut(heading, MAX_WIDTH)
        reasons: dict[str, dict[str, None]] = {}
        for effects in every:
            for reason in _list_reasons(effects, with_single=with_single):
                reasons.setdefault(reason, {})[effects.metric.title] = None
        without = [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
        yield "\n".join(map(bullet, [*_describe_axis(every[0]), *without]))
        for effects in every:
            numbers = list_numbers(effects, with_single=with_single)
            if not numbers:
                continue
            yield wrap(f"**{effects.metric.title}**, {describe_direction(effects)}")
            shown = numbers[:MAX_EFFECTS]
            first, *others = _build_effect_columns(shown, constant)
            yield from draw_packed([first], others)
            yield from draw_packed([first], _build_variance_columns(shown))
            notes = list(_list_notes(effects, shown, constant))
            if len(numbers) > len(shown):
                notes.append(f"and {len(numbers) - len(shown)} more; `--format json` has all")
            yield "\n".join(map(bullet, notes))
        flags = [flag for effects in every for flag in list_flags(effects.shown, constant)]
        if flags:
            yield "\n".join(bullet(f"**flag:** {flag}") for flag in dict.fromkeys(flags))


def _name_section(report: Report, effects: AxisEffects) -> str:
    are_several_grids = len({row.grid for row in report.rows}) > 1
    are_several_tasks = len({one.task for one in report.effects}) > 1
    where = [f"grid {effects.grid}"] if are_several_grids else []
    where += [f"task {effects.task}"] if are_several_tasks else []
    sides = f"{_value(effects.reference)} -> {_value(effects.compared)}"
    places = f" ({make_safe(', '.join(where))})" if where else ""
    return f"### {make_safe(effects.axis)}: {sides}{places}"


def _list_reasons(effects: AxisEffects, *, with_single: bool) -> Iterator[str]:
    """Yield the reasons for missing numbers."""
    for effect in effects.shown:
        yield from (f"refused: {reason}" for reason in effect.refused)
    single = list(filter(is_of_single_runs, effects.shown))
    if single and with_single:
        yield f"one seed, {ROWS_ONLY}"
    elif single:
        runs = [cell.runs[0].recipe.run.full_name for cell in single[0].pairs[0]]
        command = f"`runner compare {runs[0]} {runs[1]}`"
        yield f"one seed, so no verdict; to compare over rows only, run {command}"


def _value(value: Any) -> str:
    return _cut_value(axis_text(value))


def _describe_axis(effects: AxisEffects) -> Iterator[str]:
    """Yield the recipe keys that the axis changed, and the cells without a pair."""
    num_pairs = len(effects.cells)
    if not effects.shown:
        yield "no two cells can be compared"
    elif num_pairs and not effects.recipe_differences:
        yield "**warning:** the recipes in each pair are the same"
    elif num_pairs:
        keys = [
            key
            if number == num_pairs
            else f"{key} (only in {number} of {format_count(num_pairs, 'pair')})"
            for key, number in effects.recipe_differences.items()
        ]
        yield f"the recipes differ in {', '.join(keys)}"
    if effects.is_with_first_only:
        yield f"more than {MAX_VALUES_ALL_PAIRS} values: each is compared only with the first"
    if effects.unpaired:
        number = len(effects.unpaired)
        give = "1 set of cells gives" if number == 1 else f"{number} sets of cells give"
        yield f"{give} no difference: {name_some(effects.unpaired, '; ')}"


def _build_effect_columns(effects: Sequence[Effect], constant: Collection[str]) -> list[Column]:
    def difference(effect: Effect) -> str:
        if effect.interval is None:
            return ""
        text = signed(effect.interval.estimate)
        return f"({text})" if effect.is_below_noise else text

    levels = {one.interval.level for one in effects if one.interval is not None}
    header = f"{level_text(levels.pop())} interval" if len(levels) == 1 else "interval (level)"

    def interval(effect: Effect) -> str:
        if effect.interval is None:
            return ""
        text = span(effect.interval.bounds)
        return f"{text} ({level_text(effect.interval.level)})" if len(levels) > 1 and text else text

    return [
        build_column(
            "at",
            effects,
            lambda one: name_scope(one, constant),
            is_numeric=False,
            most=MAX_KEY - 4,
        ),
        build_column("difference", effects, difference),
        build_column(header, effects, interval),
        build_column("p", effects, lambda effect: probability(effect.p_adjusted)),
        build_column("seeds x rows", effects, describe_replication),
        build_column("status", effects, describe_standing, is_numeric=False),
    ]


def _build_variance_columns(effects: Sequence[Effect]) -> list[Column]:
    return [
        build_column("V_seed (df)", effects, lambda one: variance(one.interval, "seed")),
        build_column("V_row (df)", effects, lambda one: variance(one.interval, "row")),
        build_column("V_res", effects, lambda one: variance(one.interval, "res")),
    ]


def _list_notes(
    effects: AxisEffects, shown: Sequence[Effect], constant: Collection[str]
) -> Iterator[str]:
    """Yield notes on the numbers: dependence, designs, equivalence and the noise floor."""
    if effects.depends_on:
        names = " and ".join(f"`{name}`" for name in effects.depends_on)
        yield f"depends on {names}: no mean over its levels is shown, only the effect at each"
    if effects.interactions:
        found = "; ".join(map(describe_interaction, effects.interactions))
        yield f"interactions: {found}"
    yield from list_designs(shown, constant)
    for effect in shown:
        scope = name_scope(effect, constant)
        if equivalence := describe_equivalence(effect):
            yield f"{scope}: {equivalence}"
        if effect.why_exploratory:
            yield f"{scope}: {effect.why_exploratory}"
    if floors := describe_noise_floors(shown, constant):
        yield f"noise floor: {floors}"


def _describe_cells(report: Report) -> Iterator[str]:
    cells = report.cells
    keys, columns = _build_key_columns(cells, report), _build_cell_columns(cells)
    equal = [
        f"{column.equal_prefix}{_cut_value(value)}"
        for column in [*keys, *columns]
        if (value := column.equal_value()) is not None
    ]
    if equal:
        yield wrap(f"Equal in every run: {'; '.join(equal)}.")
    are_replicated = any(len(cell.runs) > 1 for cell in cells)
    yield wrap(CELLS_LEGEND + (SPREAD_LEGEND if are_replicated else ""))
    yield from draw_packed(
        [column for column in keys if column.equal_value() is None],
        [column for column in columns if column.equal_value() is None],
    )
    if missing := [text for cell in cells for text in cell.missing]:
        yield wrap(f"Runs without a score: {name_some(missing, '; ', MAX_MISSING)}.")
    if any(row.state == "completed" for row in report.rows):
        yield wrap(describe_base(report.rows))


def _build_key_columns(cells: Sequence[Cell], report: Report) -> list[Column]:
    """The columns that name a cell; the names of runs if each cell has one run."""
    columns = []
    if all(len(cell.runs) == 1 for cell in cells):
        columns.append(build_column("run", cells, lambda cell: cell.runs[0].name, is_numeric=False))
    if len({row.grid for row in report.rows}) > 1:  # else the title has it
        columns.append(build_column("grid", cells, lambda cell: cell.grid, is_numeric=False))
    axes = list_axes(report.rows)
    if len({cell.task for cell in report.cells}) > 1 and "task" not in axes:
        columns.append(build_column("task", cells, lambda cell: cell.task, is_numeric=False))
    for axis in axes:
        if not any(axis in cell.axes for cell in cells):
            continue
        are_numbers = all(map(is_number, list_values(report.rows, axis)))
        texts = tuple(axis_text(cell.axes[axis]) if axis in cell.axes else "" for cell in cells)
        columns.append(Column(axis, texts, is_numeric=are_numbers, equal_prefix=f"{axis}="))
    return columns


def _build_cell_columns(cells: Sequence[Cell]) -> list[Column]:
    def numbers(
        header: str,
        find: Callable[[ReportRow], float | None],
        write: Callable[[Iterable[float | None]], str] = spread,
    ) -> Column:
        return build_column(header, cells, lambda cell: write(map(find, cell.runs)))

    columns = []
    if any(len(cell.runs) > 1 for cell in cells):
        columns.append(build_column("seeds", cells, list_cell_seeds))
    if len({row.state for cell in cells for row in cell.runs}) > 1:  # else the title has it
        columns.append(build_column("state", cells, _join_states, is_numeric=False))
    if len({row.rules for cell in cells for row in cell.runs if row.rules is not None}) > 1:
        columns.append(build_column("rules", cells, lambda cell: _join(cell, "rules")))
    test_rows = build_column(
        "test rows", cells, lambda cell: _join(cell, "num_test_rows"), may_be_blank=True
    )
    stop_reason = build_column(
        "stop reason",
        cells,
        lambda cell: _join(cell, "stop_reason"),
        is_numeric=False,
        may_be_blank=True,
    )
    return columns + [
        replace(test_rows, equal_prefix="test rows "),
        numbers("base NLL", lambda row: row.base.nll_per_completion_token, constant_or_spread),
        numbers("tuned NLL", lambda row: row.tuned.nll_per_completion_token),
        numbers("change", lambda row: row.change, lambda values: spread(values, is_signed=True)),
        numbers("bits/byte", lambda row: row.tuned.bits_per_byte),
        numbers("base full NLL", lambda row: row.base.nll_per_token, constant_or_spread),
        numbers("tuned full NLL", lambda row: row.tuned.nll_per_token),
        build_column("best/steps", cells, _describe_steps),
        replace(stop_reason, equal_prefix="stop reason "),
    ]


def _build_answer_columns(cells: Sequence[Cell]) -> list[Column]:
    """Base and tuned scores side by side, for cells whose models generated answers."""
    columns = []
    rows = [row for cell in cells for row in cell.runs]
    counts = [score for row in rows for score in row.answers.values()]
    for name in list_metrics(rows):
        for model in MODELS:
            write = constant_or_spread if model == "base" else spread
            texts = tuple(write(row.metric(model, name) for row in cell.runs) for cell in cells)
            columns.append(Column(f"{model} {name}", texts))
        if any(one.num_judged_by.get(name, one.num_rows) < one.num_rows for one in counts):
            texts = tuple(_count_answers(cell, f"judged by {name}") for cell in cells)
            columns.append(Column(f"judged by {name} (base, tuned)", texts))
    for what in ("unfinished", "unreadable"):
        texts = tuple(_count_answers(cell, what) for cell in cells)
        columns.append(Column(f"{what} (base, tuned)", texts))
    return columns


def _count_answers(cell: Cell, what: str) -> str:
    """Format counts of base and tuned and the total over all seeds, such as `3, 0 of 24`."""
    texts, total = [], 0
    for model in MODELS:
        scores = [row.answers[model] for row in cell.runs if model in row.answers]
        counts = [_find_count(score, what) for score in scores]
        known = [count for count in counts if count is not None]
        texts.append(str(sum(known)) if known and len(known) == len(counts) else "?")
        total = sum(score.num_rows for score in scores) or total
    return f"{', '.join(texts)} of {total}"


def _find_count(score: GenerationScore, what: str) -> int | None:
    if what == "unfinished":
        return score.num_unfinished
    if what == "unreadable":
        return score.num_unreadable
    return score.num_judged_by.get(what.removeprefix("judged by "))


def _join(cell: Cell, field: str) -> str:
    """Join the different known values of a field in a cell."""
    values = (getattr(row, field) for row in cell.runs)
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _join_states(cell: Cell) -> str:
    counts = Counter(row.state for row in cell.runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def _describe_steps(cell: Cell) -> str:
    """Format best step and number of steps; a range if the seeds differ."""
    pairs = [(row.best_step, row.num_steps) for row in cell.runs if row.num_steps is not None]
    sides = []
    for side in zip(*pairs, strict=True):
        known = sorted(step for step in side if step is not None)
        texts = dict.fromkeys(map(str, known[:1] + known[-1:]))
        sides.append("-".join(texts) or "?")
    return "/".join(sides)


# Each returns the whole report, ending in a newline. The first is the default.
FORMATS: Final[Mapping[str, Callable[[Report], str]]] = {
    "md": format_markdown,
    "csv": format_csv,
    "json": format_json,
    "tex": format_tex,
}
