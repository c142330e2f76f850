"""Scores of base models that were kept for other runs and turned out to be others: who kept them,
and who found it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import escape_controls
from runner.run.entries import list_quarantined
from runner.run.paths import base_entries_dir


@dataclass(frozen=True)
class OtherBaseScores:
    """An entry in quarantine."""

    path: Path
    why: str
    producer: str  # run and attempt, for people
    found_by: str
    runs: frozenset[str]  # full names of both runs

    def describe(self) -> str:
        """One sentence that names both."""
        return escape_controls(
            f"scores of the base model that {self.producer} had kept were found wrong by"
            f" {self.found_by}, which scored it itself: {self.why} ({self.path})"
        )


def find_other_base_scores(output_root: Path) -> list[OtherBaseScores]:
    """What was found wrong below an output root, but for files that were damaged: nobody took
    those. One folder is read, whatever the number of runs.
    """
    return [
        OtherBaseScores(
            path=one.path,
            why=one.why or "nobody knows why",
            producer=_name(one.producer),
            found_by=_name(one.found_by),
            runs=frozenset(str(who["run"]) for who in (one.producer, one.found_by) if "run" in who),
        )
        for one in list_quarantined(base_entries_dir(output_root))
        if not one.is_damaged
    ]


def _name(who: Mapping[str, Any]) -> str:
    return f"{who['run']}, attempt {who.get('attempt')}" if "run" in who else "an unknown run"
