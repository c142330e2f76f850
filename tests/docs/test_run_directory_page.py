"""docs/run_directory.md is complete: it names every file, field, state, kind of failure and option
that the code has.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from runner.checkpoints.marker import Marker
from runner.cli.arguments import build_parser
from runner.plan.status import State
from runner.run.paths import AttemptPaths, RunPaths
from runner.run.record import (
    EXIT_CODES,
    Attempt,
    BaseSource,
    Failure,
    FailureKind,
    Progress,
    PushRecord,
    StopRequest,
    StoredRecipe,
)
from runner.run.result import TrainResult
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "run_directory.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([^`]+)`", PAGE))


def list_names(paths: RunPaths | AttemptPaths) -> list[str]:
    """The file names of all properties that are paths."""
    values = [
        getattr(paths, name)
        for name, value in vars(type(paths)).items()
        if isinstance(value, property)
    ]
    return [value.name for value in values if isinstance(value, Path)]


def list_rows(heading: str) -> list[list[str]]:
    """The cells of every table row in one section, without the headings of the tables."""
    [section] = [part for part in PAGE.split("\n## ") if part.startswith(heading)]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [
        row
        for row, after in zip(cells, [*cells[1:], [""]], strict=True)
        if "---" not in row + after
    ]


@pytest.mark.parametrize("paths", [RunPaths(Path("run")), AttemptPaths(Path("attempt"))])
def test_every_file_is_named(paths: RunPaths | AttemptPaths) -> None:
    named = {part for quoted in QUOTED for part in quoted.strip("/").split("/")}
    names = list_names(paths)
    assert len(names) > 8 and not set(names) - named


@pytest.mark.parametrize(
    "record",
    [
        Attempt,
        StoredRecipe,
        TrainResult,
        Progress,
        Failure,
        StopRequest,
        PushRecord,
        BaseSource,
        Marker,
    ],
)
def test_every_field_is_named(record: type[BaseModel]) -> None:
    assert not set(record.model_fields) - QUOTED


def test_states_and_kinds_with_their_exit_codes() -> None:
    assert {row[0] for row in list_rows("States")} == set(get_args(State))
    codes = {row[0]: row[3] for row in list_rows("Failure kinds") if len(row) == 4}
    assert codes == {kind: str(EXIT_CODES[kind]) for kind in get_args(FailureKind)}


def test_every_option_of_launch_is_named() -> None:
    [verbs] = [
        action.choices for action in build_parser()._actions if isinstance(action.choices, dict)
    ]
    parser: argparse.ArgumentParser = verbs["launch"]
    options = {one for action in parser._actions for one in action.option_strings if "--" in one}
    shown = {row[0].strip("`").split(" ")[0] for row in list_rows("Options of `launch`")}
    assert shown == options - {"--help"}
