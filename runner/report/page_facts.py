"""Facts of the page other than scores: certificates, differences between runs, and facts that are
equal in all runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runner.grid.spec import SEED_AXIS
from runner.report.certificate_facts import SPLIT_HASHES
from runner.report.compare import Certificate, build_certificate
from runner.report.effects import AxisEffects, Report
from runner.report.labels import describe_contrast, describe_source, list_all
from runner.report.page_parts import (
    NUM_HASH_CHARACTERS,
    PageCell,
    PageColumn,
    PageTable,
    build_table,
)
from runner.report.rows import ReportRow, axis_key, list_axes
from runner.report.wording import describe_version, name_library
from runner.strict import thaw
from runner.text import format_count

NOT_RECORDED: Final = "not recorded"
MAX_CERTIFICATES: Final = 12
_MAX_VALUES: Final = 6  # shown of a key or fact that differs


@dataclass(frozen=True)
class PageCertificate:
    """The equal and the different facts of two values of an axis."""

    title: str
    summary: str
    table: PageTable


_CERTIFICATE_COLUMNS: Final = (
    PageColumn("fact", "A recipe key, or a fact that runs recorded.", False),
    PageColumn("about", "The kind of fact.", False),
    PageColumn(
        "status",
        "Equal: the same in every pair of runs. Within: different numbers, but no further apart"
        " than rounding allows. Differs: not the same in some pair. Not recorded: an older run did"
        " not record it; this never counts as equal.",
        False,
    ),
    PageColumn("first", "Value in the runs of the reference.", False),
    PageColumn("second", "Value in the runs of the other arm.", False),
    PageColumn("explained by", "Cause of an expected difference; blank: unexplained.", False),
)


def build_certificates(report: Report, chosen: Sequence[AxisEffects]) -> list[PageCertificate]:
    """A certificate for each two values of an axis, declared contrasts first."""
    found: dict[tuple[str, ...], PageCertificate] = {}
    ranked = sorted(chosen, key=lambda one: not any(e.is_confirmatory for e in list_all(one)))
    for effects in ranked:
        sides = [
            [
                row
                for row in report.rows
                if (row.grid, row.task, row.state) == (effects.grid, effects.task, "completed")
                and effects.axis in row.axes
                and axis_key(row.axes[effects.axis]) == axis_key(value)
            ]
            for value in (effects.reference, effects.compared)
        ]
        source = describe_source(report, effects.grid, effects.task)
        key = (source, describe_contrast(effects))
        if key not in found and all(sides) and len(found) < MAX_CERTIFICATES:
            one = build_certificate(sides[0], sides[1], effects.axis)
            title = f"{describe_contrast(effects)}, {source}"
            found[key] = _build_certificate(title, f"certificate-{len(found) + 1}", one)
    return list(found.values())


def _build_certificate(title: str, name: str, one: Certificate) -> PageCertificate:
    numbers = Counter(line.status for line in one.lines)
    summary = f"{numbers['equal']} equal, "
    summary += f"{numbers['close']} equal up to rounding, " if numbers["close"] else ""
    summary += f"{numbers['differs']} differ"
    pairs = format_count(len(one.pairs), "pair")
    summary += f", {numbers['not recorded']} not recorded; {pairs} of runs"
    if one.unexplained:
        summary += (
            f"; not explained by the axis: {format_count(len(one.unexplained), 'difference')}"
        )
    order = ("differs", "not recorded", "close", "equal")
    rows = []
    for line in sorted(one.lines, key=lambda line: order.index(line.status)):
        is_open = line.status == "differs" and line.explained_by is None
        cells = [
            PageCell(line.title),
            PageCell(line.section),
            PageCell(f"within {line.within}" if line.status == "close" else line.status),
            PageCell(line.text_a),
            PageCell(line.text_b),
            PageCell(line.explained_by or ""),
        ]
        rows.append(("unexplained" if is_open else line.status.replace(" ", "-"), cells))
    return PageCertificate(title, summary, build_table(name, _CERTIFICATE_COLUMNS, rows))


_DIFFERENCE_COLUMNS: Final = (
    PageColumn("what", "A recipe key, or a fact that runs recorded.", False),
    PageColumn("values", "Its values, each with the number of runs.", False),
    PageColumn(
        "changes with",
        "The axes that it changes with: each of their values has one value of it. Blank: it differs"
        " between runs with equal axes.",
        False,
    ),
)


def build_differences_table(rows: Sequence[ReportRow]) -> PageTable:
    """A table of everything that differs between runs: recipe keys, then recorded facts."""
    lines = []
    for name, get in (*_list_recipe_keys(rows), *_list_facts(rows)):
        found = [(get(row), row) for row in rows]
        counts = Counter(value for value, _ in found if value is not None)
        if len(counts) > 1:
            shown = [f"{value} ({number})" for value, number in counts.most_common(_MAX_VALUES)]
            left_out = len(counts) - len(shown)
            shown += [f"{left_out} other values"] if left_out else []
            axes = ", ".join(_find_axes(found)) if name != "training.seed" else SEED_AXIS
            lines.append(("", [PageCell(name), PageCell("; ".join(shown)), PageCell(axes)]))
    return build_table("differences", _DIFFERENCE_COLUMNS, lines)


Getter = Callable[[ReportRow], str | None]


def _list_recipe_keys(rows: Sequence[ReportRow]) -> list[tuple[str, Getter]]:
    flat = {id(row): dict(_flatten(thaw(row.payload), "")) for row in rows}
    names = dict.fromkeys(name for values in flat.values() for name in values)

    def getter(name: str) -> Getter:
        return lambda row: flat[id(row)].get(name, "(absent)")

    return [(name, getter(name)) for name in names]


def _flatten(value: Any, prefix: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _list_facts(rows: Sequence[ReportRow]) -> list[tuple[str, Getter]]:
    def fact(get: Callable[[ReportRow], Any]) -> Getter:
        def read(row: ReportRow) -> str | None:
            if row.state != "completed":
                return None
            value = get(row)
            if value is None:
                return NOT_RECORDED
            text = str(value)
            return text[:NUM_HASH_CHARACTERS] if len(text) in (40, 64) and " " not in text else text

        return read

    def entry(field: str, *keys: str) -> Getter:
        def find(row: ReportRow) -> Any:
            value = getattr(row, field)
            for key in keys:
                value = (value or {}).get(key)
            return value

        return fact(find)

    def version_of(library: str) -> Getter:
        def find(row: ReportRow) -> str | None:
            found = row.versions.get(library)
            return None if found is None else describe_version(library, found)

        return fact(find)

    commits = dict.fromkeys(key for row in rows for key in row.commits)
    versions = dict.fromkeys(key for row in rows for key in row.versions)
    splits = dict.fromkeys(split for row in rows for split in row.split_hashes)
    return [
        ("updates", fact(lambda row: row.updates)),
        ("trained tokens", fact(lambda row: row.num_trained_tokens)),
        ("length of the schedule", fact(lambda row: row.schedule_steps)),
        ("initial weights", fact(lambda row: row.initial_weights_hash)),
        ("order of rows", fact(lambda row: row.row_order_hash)),
        ("rules of rows and masks", fact(lambda row: row.rules)),
        *(
            (title.format(split=split), entry("split_hashes", split, name))
            for split in splits
            for name, title in SPLIT_HASHES.items()
        ),
        *((f"commit of {key}", entry("commits", key)) for key in commits),
        *((f"version of {name_library(key)}", version_of(key)) for key in versions),
        ("source of the runner", fact(lambda row: row.source_hash)),
        ("version of the runner", fact(lambda row: row.runner_version)),
        ("commit of the runner", fact(lambda row: row.runner_commit)),
    ]


def _find_axes(found: Sequence[tuple[str | None, ReportRow]]) -> list[str]:
    """The axes for which each value goes with one value of the differing fact."""
    axes = []
    for axis in list_axes(row for _, row in found):
        by_value: dict[str, set[str]] = {}
        for value, row in found:
            if value is not None and axis in row.axes:
                by_value.setdefault(axis_key(row.axes[axis]), set()).add(value)
        if by_value and all(len(values) == 1 for values in by_value.values()):
            axes.append(axis)
    return axes


def build_equal_facts(rows: Sequence[ReportRow]) -> list[tuple[str, str]]:
    """The facts that are equal in all completed runs (versions, commits, hashes), including
    those that no run recorded.
    """
    equal = []
    for name, get in _list_facts(rows):
        values = {get(row) for row in rows} - {None}
        if len(values) == 1:
            equal.append((name, str(values.pop())))
    return equal
