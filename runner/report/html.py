"""A report as one self-contained web page. Its Content-Security-Policy allows only its own style
and script, by their hashes; figures are inline.

The page is complete without the script, which only sorts and filters tables. Texts from data are
escaped, cut and shown without control characters; absolute paths lose their folders, so the page
names no home directory. Host names and environments are never read.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from runner.errors import RefusedError, escape_controls
from runner.files import write_bytes_atomic, write_text_atomic
from runner.report.curves import draw_curves
from runner.report.declared import judge, list_declared
from runner.report.drawing import Drawing
from runner.report.effects import Report
from runner.report.figures import draw_forests, draw_interactions, draw_scatters
from runner.report.heat_maps import build_heat_maps
from runner.report.labels import (
    choose_effects,
    hide_paths,
    list_all,
    list_cell_axes,
    list_places,
    list_scored_metrics,
)
from runner.report.page_facts import (
    build_certificates,
    build_differences_table,
    build_equal_facts,
)
from runner.report.page_parts import (
    TERMS,
    PageTable,
    build_effects_table,
    build_runs_table,
    build_variance_table,
)
from runner.report.row_pages import RowComparison, RowTexts, TextSource, build_row_comparisons
from runner.report.rows import axis_text, list_axes, list_values
from runner.report.wording import count_states
from runner.text import cut, format_bytes, format_count

MAX_PAGE_BYTES: Final = 2_400_000  # no more rows are added beyond this size
MAX_ROWS_IN_PAGE: Final = 200  # per comparison
MAX_COMPARISONS: Final = 60  # in the row explorer
MAX_TEXT: Final = 2_000  # characters of a prompt or an answer in the page
MAX_TEXT_ALONE: Final = 20_000  # in the page of one comparison
MAX_CELL: Final = 600  # characters of any other text


@dataclass(frozen=True)
class PageOptions:
    """Options of a page."""

    with_rows: bool = True  # prompts, references and answers
    command: str = ""  # the command that writes the page


@dataclass(frozen=True, eq=False)
class Page:
    """A page, with its drawings and comparisons."""

    html: str
    drawings: Sequence[Drawing]
    comparisons: Sequence[RowComparison]


def build_page(report: Report, options: PageOptions = PageOptions()) -> Page:
    """Build the page of a report."""
    if not report.metrics:  # nothing can be compared, but the scores are shown
        report = replace(report, metrics=list_scored_metrics(report))
    comparisons = build_row_comparisons(report)
    figures = {
        "forests": draw_forests(report),
        "interactions": draw_interactions(report),
        "curves": draw_curves(report),
        "scatters": draw_scatters(comparisons),
    }
    chosen = [one for place in list_places(report) for one in choose_effects(report, *place)]
    main = [(effects, effect) for effects in chosen for effect in effects.shown]
    shown = {id(effect) for _, effect in main} | {id(effects) for effects in chosen}
    single = [(one, effect) for one in chosen for effect in one.cells if id(effect) not in shown]
    others = [effects for effects in report.effects if id(effects) not in shown]
    other = [(effects, effect) for effects in others for effect in list_all(effects)]
    grids = list(dict.fromkeys(row.grid for row in report.rows))
    heat_maps, other_heat_maps = build_heat_maps(report)
    context: dict[str, Any] = {
        "report": report,
        "options": options,
        "title": ", ".join(grids) or "no runs",
        "summary": count_states(report.rows),
        "question": _ask(report, grids),
        "axes": _list_axes(report),
        "declared": _list_declared(report),
        "heat_maps": heat_maps,
        "other_heat_maps": other_heat_maps,
        "runs": build_runs_table(report),
        "effects": build_effects_table(report, main, "effects"),
        "cell_effects": build_effects_table(report, single, "effects-of-single-cells"),
        "other_effects": build_effects_table(report, other, "effects-by-other-metrics"),
        "dependencies": [one for one in chosen if one.depends_on],
        "variances": build_variance_table(chosen),
        "figures_of": {name: _embed(those) for name, those in figures.items()},
        "differences": build_differences_table(report.rows),
        "certificates": build_certificates(report, chosen),
        "equal": build_equal_facts(report.rows),
        "comparisons": comparisons[:MAX_COMPARISONS],
        "num_comparisons_left_out": max(0, len(comparisons) - MAX_COMPARISONS),
        "row_slots": [Markup(f"<!-- rows {at} -->") for at in range(MAX_COMPARISONS)],
        "commands": _list_commands(grids, options),
    }
    tables = [one for one in context.values() if isinstance(one, PageTable)]
    tables += [one.table for one in context["certificates"]]
    context["definitions"] = _list_definitions(report, tables)
    html = _render("page.html.j2", context)
    rows = _fill_rows(comparisons[:MAX_COMPARISONS], options, MAX_PAGE_BYTES - len(html.encode()))
    for at, part in enumerate(rows):
        html = html.replace(f"<!-- rows {at} -->", part, 1)
    return Page(html, [one for those in figures.values() for one in those], comparisons)


def write_pages(
    report: Report,
    options: PageOptions = PageOptions(),
    *,
    page: Path | None = None,
    figures: Path | None = None,
    rows: Path | None = None,
) -> list[str]:
    """Write the page, the figures as PDF and a page of all rows for each comparison, if requested;
    returns a line with the location of each.

    Raises:
        RefusedError: one of the names is taken by something else.
    """
    require_targets(page, figures, rows)
    built = build_page(report, options)
    lines = []
    if page is not None:
        write_text_atomic(page, built.html)
        lines.append(f"page: {page} ({format_bytes(len(built.html.encode()))})")
    if figures is not None:
        for drawing in built.drawings:
            write_bytes_atomic(figures / f"{drawing.name}.pdf", drawing.as_pdf())
        lines.append(f"figures: {format_count(len(built.drawings), 'PDF')} in {figures}")
    if rows is not None:
        texts = TextSource()
        for name, one in name_comparisons(built.comparisons).items():
            write_text_atomic(rows / name, _render_comparison(one, texts, options))
        lines.append(f"rows: {format_count(len(built.comparisons), 'page')} in {rows}")
    return lines


def require_targets(page: Path | None, *folders: Path | None) -> None:
    """Raise RefusedError if a name to be written is taken by something else."""
    if page is not None and page.is_dir():
        raise RefusedError(
            f"{page} is a folder, but the page is one file", hint=f"--html {page / 'report.html'}"
        )
    parents = [page.parent] if page is not None else []
    for folder in [*parents, *(one for one in folders if one is not None)]:
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not there.is_dir():
            raise RefusedError(f"{there} is a file, so the folder {folder} cannot be created")


def name_comparisons(comparisons: Sequence[RowComparison]) -> dict[str, RowComparison]:
    """A file name for the page of each comparison, in order."""
    width = len(str(len(comparisons)))
    named = {}
    for number, one in enumerate(comparisons, start=1):
        words = re.sub(r"[^A-Za-z0-9]+", "-", hide_paths(one.title[:MAX_CELL]))[:80].strip("-")
        named[f"{number:0{width}}-{words}.html"] = one
    return named


def _render_comparison(one: RowComparison, texts: TextSource, options: PageOptions) -> str:
    """Render the page of one comparison, with all its rows."""
    found = texts.find(one) if options.with_rows else {}
    rows = "".join(
        _render_row(one, at, found.get(one.row_ids[at]), MAX_TEXT_ALONE) for at in one.order
    )
    context = {"one": one, "rows": Markup(rows), "options": options, "title": one.title}
    return _render("rows.html.j2", context)


def _fill_rows(
    comparisons: Sequence[RowComparison], options: PageOptions, budget: int
) -> list[str]:
    """The rows of each comparison as HTML, largest differences first. Comparisons take
    turns until the page is full; the rest is counted.
    """
    texts = TextSource()
    found = [texts.find(one) if options.with_rows else {} for one in comparisons]
    shown: list[list[str]] = [[] for _ in comparisons]
    for at in range(MAX_ROWS_IN_PAGE):
        for one, those, parts in zip(comparisons, found, shown, strict=True):
            if at < one.num_rows and budget > 0:
                row = one.order[at]
                parts.append(_render_row(one, row, those.get(one.row_ids[row]), MAX_TEXT))
                budget -= len(parts[-1].encode())
    filled = []
    head: Any = _environment().get_template("macros.html.j2").module
    for one, parts in zip(comparisons, shown, strict=True):
        left_out = one.num_rows - len(parts)
        note = f"<caption>{_name_left_out(len(parts), left_out)}</caption>"
        filled.append("".join([note, str(head.row_head(one)), *parts]))
    return filled


def _name_left_out(num_shown: int, num_left_out: int) -> str:
    if not num_left_out:
        if num_shown == 1:
            return "The only row."
        return f"All {num_shown:,} rows, the largest differences first."
    return (
        f"The {format_count(num_shown, 'row')} with the largest differences;"
        f" {num_left_out:,} more are"
        " left out. <code>--rows DIR</code> writes a page with all of them."
    )


def _render_row(one: RowComparison, at: int, texts: RowTexts | None, limit: int) -> str:
    """Render one test row of a table: numbers, then the texts to unfold."""
    gain = one.gains[at]
    winner = one.compared_name if gain > 0 else one.reference_name if gain < 0 else "neither"
    numbers = (
        one.units[at],
        one.base_scores[at],
        one.reference_scores[at],
        one.compared_scores[at],
        one.differences[at],
    )
    patterns = ("{:.0f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:+z.3f}")
    cells = "".join(
        f'<td class="n">{"" if value != value else pattern.format(value)}</td>'
        for value, pattern in zip(numbers, patterns, strict=True)
    )
    group = one.groups[at] if one.groups[at] != one.row_ids[at] else ""
    style = "win" if gain > 0 else "loss" if gain < 0 else ""
    head = (
        f'<tbody class="{style}"><tr><td><code>{_plain(one.row_ids[at])}</code></td>'
        f"<td>{_plain(group)}</td>{cells}<td>{_plain(winner)}</td></tr>"
    )
    return f"{head}{_render_texts(one, texts, limit)}</tbody>\n"


def _render_texts(one: RowComparison, texts: RowTexts | None, limit: int) -> str:
    if texts is None or texts == RowTexts():
        return ""
    parts = [
        ("prompt", texts.prompt),
        *(("reference", text) for text in texts.references),
        ("base model", texts.base),
        (one.reference_name, texts.reference),
        (one.compared_name, texts.compared),
    ]
    preview = " ".join((texts.prompt or next(iter(texts.references), ""))[:400].split())
    shown = "".join(
        f"<dt>{_plain(name)}</dt><dd><pre>{show_text(text, limit)}</pre></dd>"
        for name, text in parts
        if text
    )
    summary = escape(escape_controls(cut(preview, 110))) or "texts"
    return (
        f'<tr class="texts"><td colspan="8"><details><summary>{summary}</summary>'
        f"<dl>{shown}</dl></details></td></tr>"
    )


def show_text(text: str, limit: int) -> Markup:
    """A text of a row with controls escaped, cut after `limit` characters."""
    more = f" … ({len(text) - limit:,} more characters)" if len(text) > limit else ""
    return escape(escape_controls(text[:limit])) + more


def _plain(text: str) -> Markup:
    return show_text(hide_paths(text[: 2 * MAX_CELL]), MAX_CELL)


def show_prose(text: str) -> Markup:
    """A sentence of the report as markup, with `code` in code elements."""
    parts = re.split(r"`([^`\n]{1,200})`", text.replace(" -> ", " → "))
    return Markup("").join(
        Markup("<code>{}</code>").format(_plain(part)) if at % 2 else _plain(part)
        for at, part in enumerate(parts)
    )


def _finalize(value: Any) -> Any:
    """Escape a value that a template prints, unless it is our own markup."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, str):
        return _plain(value)
    return value


@cache
def _load_file(name: str) -> str:
    return (files("runner.report") / "page_files" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import FunctionLoader

    environment = Environment(
        loader=FunctionLoader(_load_file),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = show_prose
    environment.globals |= {"count": format_count, "axis_text": axis_text}
    return environment


def _render(template: str, context: Mapping[str, Any]) -> str:
    style, script = _load_file("page.css"), _load_file("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " img-src data:; base-uri 'none'; form-action 'none'"
    )
    own = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    return _environment().get_template(template).render(**own, **context)


def _hash(text: str) -> str:
    """The hash of a script or style for a Content-Security-Policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@dataclass(frozen=True)
class _Embedded:
    title: str
    caption: str
    svg: Markup
    is_small: bool


def _embed(drawings: Sequence[Drawing]) -> list[_Embedded]:
    """The drawings as markup; a caption equal to the previous one is left out."""
    embedded = []
    captions = ["", *(drawing.caption for drawing in drawings)]
    for drawing, before in zip(drawings, captions, strict=False):
        caption = "" if drawing.caption == before else drawing.caption
        svg = Markup(drawing.as_svg())
        embedded.append(_Embedded(drawing.title, caption, svg, drawing.is_small))
    return embedded


def _list_axes(report: Report) -> list[tuple[str, str]]:
    """Each axis with its values."""
    found = []
    for axis in list_axes(report.rows):
        values = [axis_text(value) for value in list_values(report.rows, axis)]
        found.append((axis, ", ".join(values)))
    return found


def _ask(report: Report, grids: Sequence[str]) -> str:
    """The question that the grid answers."""
    several = list(list_cell_axes(report.cells))
    seeds = [len({run.seed for run in cell.runs}) for cell in report.cells]
    words = f"{'Grids' if len(grids) > 1 else 'Grid'} {', '.join(grids)}: what"
    words += f" {'does' if len(several) == 1 else 'do'} {join_words(several) or 'the runs'} change?"
    if seeds:
        low, high = min(seeds), max(seeds)
        each = format_count(low, "seed") if low == high else f"{low} to {high} seeds"
        words += f" {format_count(len(report.cells), 'cell')}, each trained with {each};"
        words += " scores are on the test rows, which were not used to select checkpoints."
    return words


def join_words(words: Sequence[str]) -> str:
    """Join words as in a sentence.

    >>> join_words(["a", "b", "c"]), join_words(["a"]), join_words([])
    ('a, b and c', 'a', '')
    """
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _list_commands(grids: Sequence[str], options: PageOptions) -> list[str]:
    """The commands that reproduce the page."""
    lines = []
    for grid in grids:
        lines += [f"runner render {grid}", f"runner sweep recipes/{grid}"]
    return [*lines, options.command] if options.command else lines


def _list_definitions(report: Report, tables: Sequence[PageTable]) -> list[tuple[str, str]]:
    """Every column and metric of the page with its meaning, each once."""
    found = {name: meaning for name, meaning in TERMS}
    for metric in report.metrics:
        better = "lower" if metric.mode == "min" else "higher"
        found[metric.title] = f"{metric.unit}, over all test rows; {better} is better."
    for table in tables:
        for column in table.columns:
            found.setdefault(column.title, column.meaning)
    return list(found.items())


def _list_declared(report: Report) -> list[str]:
    """The declared contrasts of each grid, with the standing of each."""
    found = []
    for grid in dict.fromkeys(row.grid for row in report.rows):
        rows = [row for row in report.rows if row.grid == grid]
        started = [row for row in rows if row.state != "pending"]
        for one in list_declared(rows):
            margin = f", margin {one.margin:g}" if one.margin is not None else ""
            why = judge(one, [row for row in started if one.axis in row.axes]).why_exploratory
            standing = f"exploratory, because it was {why}" if why else "before the first launch"
            found.append(f"{one.describe()}{margin}: {standing}")
    return found
