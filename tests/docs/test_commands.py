"""Every command in the documents is one that the tools accept."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from runner.cli.arguments import build_parser
from runner.cli.main import parse_arguments
from runner.errors import RunnerError
from tests.conftest import ROOT
from tests.docs import documents
from tests.docs.documents import DOCS, DOCUMENTS, list_runner_commands

GRIDS = sorted(path.parent.name for path in (ROOT / "recipe_templates").glob("*/grid.yaml"))
OWN_GRID = "first"  # the name that `runner init` gives to the grid of a new project
MAKE_TARGETS = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def list_verbs() -> set[str]:
    [verbs] = [
        action.choices for action in build_parser()._actions if isinstance(action.choices, dict)
    ]
    return set(verbs)


def explain_refusal(arguments: list[str]) -> str | None:
    """The reason why the command line refuses these arguments; None if it accepts them."""
    try:
        parse_arguments(arguments)
    except SystemExit as stopped:
        return f"exit code {stopped.code}" if stopped.code else None
    except RunnerError as error:
        return str(error)
    return None


def find_missing(word: str) -> str | None:
    """The word if it is a path or name of this repository's recipes that is not there."""
    match = re.fullmatch(r"(recipes|recipe_templates|runs)/([\w-]+)(?:/(.*))?", word)
    if match is None:
        return None
    folder, grid, rest = match.groups()
    if grid == OWN_GRID:
        return None
    if grid not in GRIDS:
        return word
    if not rest:
        return None
    if folder == "runs":
        return None if (ROOT / "recipes" / grid / f"{rest.split('/')[0]}.yaml").is_file() else word
    return None if list((ROOT / folder / grid).glob(rest)) else word


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_accepted(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    refused = {}
    for arguments in list_runner_commands(document):
        reason = explain_refusal(arguments)
        missing = [word for word in arguments if find_missing(word)]
        if reason or missing:
            refused[" ".join(arguments)] = reason or f"missing: {missing}"
    assert not refused


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)(?= *#|`| [A-Z]+=|$)", text, re.MULTILINE)
    assert set(named) <= set(MAKE_TARGETS)


def test_every_verb_is_on_the_page_of_commands() -> None:
    shown = {arguments[0] for arguments in list_runner_commands(DOCS / "commands.md")}
    assert list_verbs() <= shown


def test_commands_are_found_at_all() -> None:
    """Without this, a reader that finds no command would pass every other test."""
    found = {path: len(list_runner_commands(path)) for path in DOCUMENTS}
    assert found[DOCS / "commands.md"] > 20 and found[DOCS / "tutorial.md"] > 12
    assert found[ROOT / "README.md"] >= 5 and sum(found.values()) > 60


@pytest.mark.parametrize(
    "arguments",
    [["sweeep", "recipes/demo"], ["sweep", "recipes/demo", "--slott=2"], ["report", "--pdf"]],
)
def test_wrong_commands_are_refused(arguments: list[str]) -> None:
    assert explain_refusal(arguments)


def test_missing_paths_are_found() -> None:
    good = "recipes/demo/gemma_060_full_seed1.yaml"
    words = [good, "recipes/demo", "runs/demo/gemma_060_full_seed1", "recipes/first/a.yaml"]
    assert [find_missing(word) for word in words] == [None] * 4
    bad = ["recipes/dmo", "recipes/demo/gemma_060_full.yaml", "runs/demo/gemma_060_full"]
    assert [find_missing(word) for word in bad] == bad


def test_the_examples_of_the_reader_of_documents() -> None:
    assert doctest.testmod(documents).failed == 0
