"""Contrasts that a grid declared before its first launch, and the effects they make confirmatory.

A contrast counts for an effect if all runs of the effect recorded it at their first attempt. If it
was declared or changed after a run had started, the effect stays exploratory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.rows import ReportRow, axis_key, axis_text, list_axes, list_values


@dataclass(frozen=True)
class Declared:
    """A contrast: `compared` against `reference` on an axis by a metric, with an optional margin of
    equivalence.
    """

    axis: str
    reference: Any
    compared: Any
    metric: str
    margin: float | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Equal for two contrasts that differ at most in the margin."""
        return self.axis, axis_key(self.reference), axis_key(self.compared), self.metric

    def describe(self) -> str:
        """The contrast as errors name it."""
        return (
            f"{self.axis}: {axis_text(self.reference)} to {axis_text(self.compared)}"
            f" by {self.metric}"
        )


def read_declared(contrasts: Iterable[Any] | None) -> tuple[Declared, ...]:
    """The contrasts in `run.declared` of a recipe."""
    return tuple(
        Declared(one.axis, one.from_, one.to, one.metric, one.margin) for one in contrasts or ()
    )


def list_declared(rows: Iterable[ReportRow]) -> list[Declared]:
    """Every contrast that some run declares now or declared at its first attempt."""
    found: dict[Any, Declared] = {}
    for row in rows:
        for contrast in read_declared(row.declared_now) + read_declared(row.declared_then):
            found.setdefault(contrast.key, contrast)
    return list(found.values())


def list_recorded(rows: Iterable[ReportRow]) -> list[Declared]:
    """Every contrast that some run recorded at its first attempt."""
    found: dict[Any, Declared] = {}
    for row in rows:
        for contrast in read_declared(row.declared_then):
            found.setdefault(contrast.key, contrast)
    return list(found.values())


@dataclass(frozen=True)
class Standing:
    """The standing of a declared contrast for some runs: confirmatory, or the reason why not."""

    contrast: Declared
    is_confirmatory: bool
    why_exploratory: str = ""


def judge(contrast: Declared, runs: Sequence[ReportRow]) -> Standing:
    """The standing of a contrast for an effect over `runs`."""
    late, other = [], []
    for row in runs:
        then = {one.key: one for one in read_declared(row.declared_then)}
        if contrast.key not in then:
            late.append(row)
        elif then[contrast.key].margin != contrast.margin:
            other.append(row)
    if not late and not other:
        return Standing(contrast, True)
    row = (late or other)[0]
    known = [one for one in (late or other) if one.started_at_utc is not None]
    row = min(known, key=lambda one: one.started_at_utc or "", default=row)
    day = f" on {row.started_at_utc[:10]}" if row.started_at_utc is not None else ""
    if late:
        why = f"declared after {row.recipe.run.full_name} started{day}"
    else:
        recorded = {one.key: one.margin for one in read_declared(row.declared_then)}
        margins = [_name_margin(one) for one in (recorded[contrast.key], contrast.margin)]
        why = (
            f"declared with {margins[0]} when {row.recipe.run.full_name} started{day}, but with"
            f" {margins[1]} now"
        )
    return Standing(contrast, False, why)


def _name_margin(margin: float | None) -> str:
    return "no margin" if margin is None else f"a margin of {margin:g}"


def find_undeclarable(
    contrasts: Iterable[Declared], rows: Sequence[ReportRow], metrics: Iterable[str], grid: str
) -> list[str]:
    """Warnings about declared contrasts whose axis, value or metric no run has."""
    axes, known = list_axes(rows), list(metrics)
    warnings = []
    for contrast in contrasts:
        where = f"{grid} declares {contrast.describe()}"
        if contrast.axis not in axes:
            warnings.append(
                f"{where}, but no run has the axis `{contrast.axis}`; available: {', '.join(axes)}"
            )
            continue
        values = list_values(rows, contrast.axis)
        keys = {axis_key(value) for value in values}
        lacking = [
            axis_text(value)
            for value in (contrast.reference, contrast.compared)
            if axis_key(value) not in keys
        ]
        if lacking:
            warnings.append(
                f"{where}, but no run has {contrast.axis} {' or '.join(lacking)};"
                f" available: {', '.join(map(axis_text, values))}"
            )
        elif contrast.metric not in known:
            warnings.append(
                f"{where}, but no run has the metric `{contrast.metric}`; available:"
                f" {', '.join(known)}"
            )
    return warnings
