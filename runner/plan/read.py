"""Reads selected runs: the facts and the state of each."""

from __future__ import annotations

from collections.abc import Iterable

from runner.plan.select import Selected
from runner.plan.status import RunStatus, read_status, verify_records
from runner.recipe.contents import KnownContents, list_contents
from runner.recipe.parse import Recipe
from runner.run.facts import RunFacts

ReadRun = tuple[Recipe, RunFacts, RunStatus]


def read_runs(selected: Iterable[Selected], known: KnownContents) -> list[ReadRun]:
    """Recipe, facts with samples, and state of each run. Hashes only `result.json` and
    `recipe.json`, whose numbers and axes are shown.

    If a run directory is named directly, its numbers are shown whether or not the files that its
    recipe names have changed.
    """
    runs = []
    for one in selected:
        facts = one.read_facts(with_samples=True)
        is_named_itself = one.source_path == one.paths.run_dir
        contents = {} if is_named_itself else known.find(list_contents(one.recipe))
        status = verify_records(facts, read_status(facts, one.recipe, contents))
        runs.append((one.recipe, facts, status))
    return runs
