"""Kept base scores that another run found to be wrong: the run that kept them, and the run that
found the difference.
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
    """A quarantined entry."""

    path: Path
    why: str
    producer: str  # run and attempt, for people
    found_by: str
    runs: frozenset[str]  # full names of both runs

    def describe(self) -> str:
        """One sentence that names both runs."""
        return escape_controls(
            f"base scores kept by {self.producer} differ from those that {self.found_by}"
            f" computed itself: {self.why} ({self.path})"
        )


def find_other_base_scores(output_root: Path) -> list[OtherBaseScores]:
    """The wrong base scores under an output root. Damaged files are left out, because no run used
    them. Reads one folder, however many runs there are.
    """
    return [
        OtherBaseScores(
            path=one.path,
            why=one.why or "no reason was recorded",
            producer=_name(one.producer),
            found_by=_name(one.found_by),
            runs=frozenset(str(who["run"]) for who in (one.producer, one.found_by) if "run" in who),
        )
        for one in list_quarantined(base_entries_dir(output_root))
        if not one.is_damaged
    ]


def _name(who: Mapping[str, Any]) -> str:
    return f"{who['run']}, attempt {who.get('attempt')}" if "run" in who else "an unknown run"
