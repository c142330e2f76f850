"""The answer of a report in words, a sentence for each thing that can be said."""

from __future__ import annotations

from runner.report.effects import Report


def write_verdicts(report: Report) -> list[str]:
    """The sentences, declared contrasts first."""
    return []
