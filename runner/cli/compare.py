"""`runner compare`: selects two arms and prints their equality certificate and differences."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from runner.cli.reading import warn_of_unreadable
from runner.errors import (
    CorruptFileError,
    RefusedError,
    RunnerError,
    escape_controls,
    put_in_words,
)
from runner.files import dump_json
from runner.plan.names import RECIPES_DIR, find_one
from runner.plan.read import read_runs
from runner.plan.select import Selected, UnreadableRun, select_recipes
from runner.plan.status import RunStatus
from runner.recipe.contents import KnownContents
from runner.report.build import build_report
from runner.report.compare import Certificate, CertificateLine, NotRead, build_certificate
from runner.report.difference import Difference, compare_cells_of, compare_runs
from runner.report.effects import AxisEffects, Report
from runner.report.format import ROWS_ONLY, build_column, describe_effects, draw_packed, wrap
from runner.report.rows import ReportRow, axis_key, axis_text, build_rows
from runner.report.tables import dump_effects, dump_interval, escape_json_controls
from runner.report.wording import (
    decimal,
    describe_interval,
    level_text,
    make_safe,
    name_some,
    probability,
    signed,
    span,
)
from runner.run.facts import RunFacts
from runner.run.paths import content_cache_path
from runner.text import format_count

MAX_LINE: Final = 80  # characters per line of the certificate; --json prints everything
MAX_LISTED: Final = 20  # equal lines listed per section


def compare_arms(arguments: argparse.Namespace) -> int:
    """Print what is equal, what differs and what was not recorded, then the differences.

    Returns 1 if something differs that `--axis` does not explain, or if a run was not read that is
    needed: every run with `--axis`, and both runs when two runs are compared.
    """
    rows_a, rows_b, rows, not_read = _load_arms(arguments)
    _refuse_no_comparison(arguments, rows_a, rows_b)
    certificate = build_certificate(rows_a, rows_b, arguments.axis, not_read, rows)
    if not certificate.pairs:
        raise RunnerError(
            f"no run of {arguments.a} has a partner in {arguments.b} that agrees in all other axes",
            hint="name two runs, or two values of one axis: runner compare loss=full"
            " loss=completion --grid GRID",
        )
    is_two_runs = len(rows_a) == len(rows_b) == 1
    single = compare_runs(rows_a[0], rows_b[0]) if is_two_runs else []
    seeds = (
        compare_cells_of(rows_a[0], rows_b[0], rows, rows_fixed=arguments.rows_fixed)
        if is_two_runs
        else []
    )
    report: Report | None = None
    effects: list[AxisEffects] = []
    if not is_two_runs:
        report, effects = _find_effects(rows_a, rows_b, rows, rows_fixed=arguments.rows_fixed)
    if arguments.json:
        print(_dump(certificate, single, seeds, report, effects), end="")
    else:
        parts = [*_describe(certificate), *_describe_differences(single, seeds)]
        if report is not None:
            parts += ["## Differences"]
            parts += describe_effects(report, effects, with_single=True)
            if not effects:
                parts.append(
                    "The arms differ in more than one axis: there is no single difference."
                )
        print("\n\n".join(parts))
    for one in certificate.not_read:
        print(escape_controls(f"warning: {one.describe()}"), file=sys.stderr)
    if certificate.not_read and (is_two_runs or arguments.axis is not None):
        return 1
    return 1 if arguments.axis is not None and certificate.unexplained else 0


def _load_arms(
    arguments: argparse.Namespace,
) -> tuple[list[ReportRow], list[ReportRow], list[ReportRow], list[NotRead]]:
    """The runs of A, the runs of B, all runs of their grids, and the runs of A and B that were not
    read.
    """
    of_arms: list[UnreadableRun] = []  # their arm is unknown: the recipe would name it
    unreadable: list[UnreadableRun] = []
    root = arguments.output_root
    arms = [_select_arm(text, arguments, of_arms) for text in (arguments.a, arguments.b)]
    # Keyed by path: runs of two projects may have the same name.
    named = {_locate(one): one for arm in arms for one in arm}
    names = {one.full_name for one in named.values()}
    # Runs with other seeds are in the same folders as the named runs.
    folders = dict.fromkeys(str(one.paths.run_dir.parent) for one in named.values())
    folders = {folder: None for folder in folders if Path(folder).is_dir()}
    siblings = select_recipes(list(folders), root, (), unreadable) if folders else []
    # A comes first: its axis value is the reference.
    others = {one.full_name: one for one in siblings if one.full_name not in names}
    every = named | {_locate(one): one for one in others.values()}
    known = KnownContents(content_cache_path(root))
    runs = read_runs(every.values(), known)
    rows = build_rows(runs)
    lost = {one.full_name: one for one in of_arms if one.full_name not in names}
    warn_of_unreadable(
        one for one in unreadable if one.full_name not in lost and one.full_name not in names
    )
    places = list(every)
    row_at = {places[row.position]: row for row in rows}
    for place, selected in named.items():
        if row_at[place].state == "changed":
            if not selected.paths.recipe_path.exists() or selected.source_path.is_dir():
                continue  # the run is damaged; no recipe was changed
            raise RefusedError(
                f"{selected.source_path} was changed since it ran:"
                f" {selected.paths.run_dir} holds another experiment",
                hint=f"to compare what ran, name the run directory: {selected.paths.run_dir}",
            )
    first, second = ([row_at[_locate(one)] for one in arm] for arm in arms)
    not_read = [
        _find_why_not(facts, status, row_at[place])
        for place, (_, facts, status) in zip(places, runs, strict=True)
        if place in named and row_at[place].state != "completed"
    ]
    not_read += [NotRead(name, "unreadable", one.why) for name, one in lost.items()]
    return first, second, rows, not_read


def _locate(selected: Selected) -> str:
    return os.path.realpath(selected.paths.run_dir)


def _find_why_not(facts: RunFacts, status: RunStatus, row: ReportRow) -> NotRead:
    """The state of a run that is not completed, with the reason."""
    name, run_dir = row.recipe.run.full_name, facts.paths.run_dir
    if not run_dir.exists():
        return NotRead(name, "absent", f"{run_dir} does not exist")
    why = status.why.partition("\n")[0]
    if status.state != row.state:  # a file is damaged that does not decide the state
        try:
            _ = facts.samples
        except (CorruptFileError, OSError) as error:
            why = put_in_words(error)
    return NotRead(name, row.state, why)


def _select_arm(
    text: str, arguments: argparse.Namespace, unreadable: list[UnreadableRun]
) -> list[Selected]:
    root = arguments.output_root
    if "=" in text and not os.path.exists(text):
        if arguments.grid is None:
            raise RunnerError(
                f"{text!r} is a value of an axis, but no grid is named", hint="add `--grid GRID`"
            )
        folder = find_one(arguments.grid, root, "run")
        conditions = _split_conditions(text)
        found = select_recipes([str(folder)], root, conditions, unreadable)
        return found + _select_absent(folder, root, conditions, found)
    grid = None if arguments.grid is None else Path(arguments.grid).name
    found = select_recipes([str(find_one(text, root, "run", grid))], root)
    if len(found) != 1:
        raise RunnerError(
            f"{text!r} names {len(found)} runs, expected one",
            hint="name one recipe or run directory, or axis=value with `--grid`",
        )
    return found


def _select_absent(
    folder: Path, root: Path, conditions: Sequence[str], found: Sequence[Selected]
) -> list[Selected]:
    """The runs that have a recipe in the grid but no directory in its folder of runs."""
    recipes = RECIPES_DIR / folder.name
    if folder.resolve() != (root / folder.name).resolve() or not recipes.is_dir():
        return []
    try:
        wanted = select_recipes([str(recipes)], root, conditions)
    except RunnerError as error:
        print(
            escape_controls(f"warning: absent runs of {recipes} are not reported: {error.message}"),
            file=sys.stderr,
        )
        return []
    names = {one.full_name for one in found}
    return [one for one in wanted if one.full_name not in names]


def _split_conditions(text: str) -> list[str]:
    """`loss=full,samples=60` as conditions; a comma within a value stays.

    >>> _split_conditions("loss=full,samples=60"), _split_conditions("name=a,b")
    (['loss=full', 'samples=60'], ['name=a,b'])
    """
    parts = text.split(",")
    return parts if all("=" in part for part in parts) else [text]


def _refuse_no_comparison(
    arguments: argparse.Namespace, rows_a: Sequence[ReportRow], rows_b: Sequence[ReportRow]
) -> None:
    positions_b = {row.position for row in rows_b}
    shared = sorted(row.recipe.run.full_name for row in rows_a if row.position in positions_b)
    if shared:
        raise RunnerError(
            f"A and B share {name_some(shared)}; a run cannot be compared with itself",
            hint="name two different runs, or two values of one axis",
        )
    axis = arguments.axis
    if axis is None:
        return
    axes = list(dict.fromkeys(name for row in (*rows_a, *rows_b) for name in row.axes))
    if axis not in axes:
        raise RunnerError(
            f"the runs have no axis {axis!r}", hint=f"their axes are {', '.join(axes) or 'none'}"
        )
    values = [{axis_key(row.axes.get(axis)) for row in rows} for rows in (rows_a, rows_b)]
    if values[0] & values[1]:
        same = axis_text(rows_a[0].axes.get(axis))
        raise RunnerError(
            f"A and B do not differ in the axis {axis!r}: both have {same}",
            hint="name runs with two values of it",
        )


def _find_effects(
    rows_a: Sequence[ReportRow],
    rows_b: Sequence[ReportRow],
    rows: Sequence[ReportRow],
    *,
    rows_fixed: bool,
) -> tuple[Report, list[AxisEffects]]:
    """The effects of the only axis in which the arms differ; none if they differ in several."""
    apart = []
    for axis in dict.fromkeys(name for row in rows_a for name in row.axes):
        values = [{axis_key(row.axes.get(axis)) for row in some} for some in (rows_a, rows_b)]
        if len(values[0]) == len(values[1]) == 1 and values[0] != values[1]:
            apart.append((axis, {*values[0], *values[1]}))
    names = {row.recipe.run.full_name for row in (*rows_a, *rows_b)}
    report = build_report(
        [row for row in rows if row.recipe.run.full_name in names], rows_fixed=rows_fixed
    )
    if len(apart) != 1:
        return report, []
    axis, keys = apart[0]
    return report, [
        one
        for one in report.effects
        if one.axis == axis and {axis_key(one.reference), axis_key(one.compared)} == keys
    ]


def _describe(certificate: Certificate) -> Iterator[str]:
    """The certificate as Markdown."""
    yield wrap(f"# A: {_name_arm(certificate.names_a)}; B: {_name_arm(certificate.names_b)}")
    if len(certificate.pairs) > 1 or certificate.unpaired:
        left = f"; without a partner: {name_some(certificate.unpaired)}"
        yield wrap(
            f"{format_count(len(certificate.pairs), 'pair')} of runs, equal in all other axes"
            + (left if certificate.unpaired else "")
        )
    if certificate.not_read:
        yield "## What was not read"
        yield _describe_not_read(certificate)
    different = certificate.select("differs")
    yield "## What differs"
    yield from _draw_differences(certificate, different)
    if certificate.axis is not None:
        yield wrap(_describe_unexplained(certificate))
    yield "## What is equal"
    yield _list_by_section(certificate.select("equal")) or "Nothing that was recorded."
    if close := certificate.select("close"):
        yield "## What is equal up to rounding"
        yield _list_by_section(close)
    if unrecorded := certificate.select("not recorded"):
        yield "## What was not recorded, so neither equal nor different"
        yield _list_by_section(unrecorded)


def _describe_not_read(certificate: Certificate) -> str:
    num_pairs, num_read = len(certificate.pairs), certificate.num_read
    lines = [wrap(make_safe(one.describe()), "- ", "  ") for one in certificate.not_read]
    so = f"So this certifies {format_count(num_read, 'pair')} of {num_pairs}"
    if num_read == 0:
        so += ": it compares recipes"
    paired = {name for pair in certificate.pairs for name in pair}
    if alone := [one.name for one in certificate.not_read if one.name not in paired]:
        so += f", and {name_some(alone)} {'is' if len(alone) == 1 else 'are'} in no pair"
    return "\n".join([*lines, "", wrap(f"{so}.")])


def _describe_unexplained(certificate: Certificate) -> str:
    axis = f"the axis {certificate.axis}"
    if unexplained := [line.title for line in certificate.unexplained]:
        return f"**{axis} does not explain** {', '.join(unexplained)}."
    if not certificate.not_read:
        return f"Every difference is explained by {axis}."
    read = "what was read" if certificate.num_read else "the recipes (nothing else was read)"
    return f"Every difference in {read} is explained by {axis}."


def _list_by_section(lines: Sequence[CertificateLine]) -> str:
    sections: dict[str, list[str]] = {}
    for line in lines:
        sections.setdefault(line.section, []).append(make_safe(line.describe(), MAX_LINE))
    return "\n".join(
        wrap(f"{section}: {name_some(texts, '; ', MAX_LISTED)}", "- ", "  ")
        for section, texts in sections.items()
    )


def _name_arm(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} runs ({name_some(names)})"


def _draw_differences(certificate: Certificate, lines: Sequence[CertificateLine]) -> Iterator[str]:
    if not lines:
        yield "Nothing that was recorded."
        return
    what = build_column("what", lines, lambda line: line.title, is_numeric=False)
    columns = [
        build_column("A", lines, lambda line: line.text_a, is_numeric=False),
        build_column("B", lines, lambda line: line.text_b, is_numeric=False),
    ]
    if len(certificate.pairs) > 1:
        columns.append(build_column("pairs", lines, lambda line: str(line.num_pairs)))
    if certificate.axis is not None:
        columns.append(
            build_column(
                "explained by",
                lines,
                lambda line: line.explained_by or "**nothing**",
                is_numeric=False,
            )
        )
    yield from draw_packed([what], columns)


def _describe_differences(single: list[Difference], seeds: list[Difference]) -> Iterator[str]:
    if not single:
        return
    yield "## Differences (B - A)"
    yield wrap(f"For the two runs, {ROWS_ONLY}:")
    yield from _draw_numbers(single)
    if seeds:
        yield "For the recipes, with all their seeds:"
        yield from _draw_numbers(seeds)


def _draw_numbers(differences: Sequence[Difference]) -> Iterator[str]:
    shown = [one for one in differences if one.interval is not None]
    if shown:
        level = next(one.interval.level for one in shown if one.interval is not None)

        def of(one: Difference) -> Any:
            return one.interval

        yield from draw_packed(
            [build_column("metric", shown, lambda one: one.metric.title, is_numeric=False)],
            [
                build_column("better", shown, _name_better, is_numeric=False),
                build_column("A", shown, lambda one: decimal(one.score_a)),
                build_column("B", shown, lambda one: decimal(one.score_b)),
                build_column("difference", shown, lambda one: signed(of(one).estimate)),
                build_column(
                    f"{level_text(level)} interval", shown, lambda one: span(of(one).bounds)
                ),
                build_column("p", shown, lambda one: probability(of(one).p)),
                build_column("over", shown, lambda one: of(one).kind, is_numeric=False),
            ],
        )
    notes = [f"{one.metric.title}: refused: {one.refused}" for one in differences if one.refused]
    notes += [
        f"{one.metric.title}: {describe_interval(of_one)}"
        for one in shown
        if (of_one := one.interval) is not None
    ]
    if notes:
        yield "\n".join(wrap(note, "- ", "  ") for note in notes)


def _name_better(one: Difference) -> str:
    return "smaller" if one.metric.mode == "min" else "larger"


def _dump_difference(one: Difference) -> dict[str, Any]:
    return {
        "metric": one.metric.name,
        "unit": one.metric.unit,
        "better": _name_better(one),
        "score_a": one.score_a,
        "score_b": one.score_b,
        **dump_interval(one.interval),
        "refused": one.refused,
    }


def _dump(
    certificate: Certificate,
    single: Sequence[Difference],
    seeds: Sequence[Difference],
    report: Report | None,
    effects: Sequence[AxisEffects],
) -> str:
    content: dict[str, Any] = {
        "a": list(certificate.names_a),
        "b": list(certificate.names_b),
        "axis": certificate.axis,
        "pairs": [list(pair) for pair in certificate.pairs],
        "unpaired": list(certificate.unpaired),
        "num_read": certificate.num_read,
        "not_read": [asdict(one) for one in certificate.not_read],
        "certificate": [asdict(line) for line in certificate.lines],
        "unexplained": [line.what for line in certificate.unexplained],
        "rows_only": [_dump_difference(one) for one in single],
        "over_seeds": [_dump_difference(one) for one in seeds],
        **dump_effects(report.cells if report is not None else (), effects),
    }
    return escape_json_controls(dump_json(content))
