"""Sentences that count: one thing has no plural."""

from __future__ import annotations

import re

from tests.conftest import ROOT

# `{...} recipes` without a helper: right for every number but 1.
_COUNTED = re.compile(r"\{(?:len\([^{}]*\)|num_\w+)\} (?:more )?(?:recipes|attempts|warnings) ")


def test_what_a_verb_counts_most_has_a_singular() -> None:
    found = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "runner").rglob("*.py")
        for line in path.read_text().splitlines()
        if _COUNTED.search(line) and "== 1" not in line
    ]
    # Next to a sentence for 1, or only for several.
    several = ("recipes have problems", "attempts were preempted", "names {len(found)} recipes")
    assert [line for line in found if not any(one in line for one in several)] == []
