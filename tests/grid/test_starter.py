"""The starter grid for rows whose columns nobody planned for."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.data.draw import draw_splits
from runner.grid.template import quote_yaml
from runner.recipe.data_section import find_tasks
from runner.recipe.parse import load_recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


TICKETS: list[dict[str, Any]] = [
    {
        "id": str(n),
        "ticket": f"Printer {n} is {{{{ broken }}}}",
        "the fix": f"Restart {n}",
        "a": "b",
        "lang": "English, as everyone here writes",
    }
    for n in range(12)
]


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        (None, "Printer 3 is {{ broken }}"),
        ("ticket", "Printer 3 is {{ broken }}"),
        (
            "{% raw %} {# @TASK@ {{x}} ${!a}: {ticket}",
            "{% raw %} {# @TASK@ {{x}} ${a}: Printer 3 is",
        ),
    ],
)
def test_columns_that_nobody_planned_for(
    prompt: str | None, first: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error shows them, and its words make a project."""
    rows_text = "".join(json.dumps(row) + "\n" for row in TICKETS)
    (place / "tickets.jsonl").write_text(rows_text)
    assert main(["init", "study", "--data", "tickets.jsonl"]) == 2
    said = capsys.readouterr().err
    assert 'ticket   "Printer 0 is {{ broken }}"\n  the fix  "Restart 0"\n' in said
    words = said.partition("the prompt and the answer, for example ")[2].splitlines()[0]
    assert words == "--prompt '{ticket}' --completion 'the fix'" and "name: python" in said
    options = (
        shlex.split(words) if prompt is None else ["--prompt", prompt, *shlex.split(words)[2:]]
    )
    assert main(["init", "study", "--data", "tickets.jsonl", *options]) == 0
    os.chdir("study")
    assert main(["render"]) == 0
    splits = draw_splits(load_recipe(sorted(Path("recipes/first").iterdir())[-1]).data)
    rows = (*splits.train, *splits.validation, *splits.test)
    texts = [row.messages[0]["content"] for row in rows]
    assert [text for text in texts if text.startswith(first)]


def test_the_sample_says_what_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "study"]) == 0
    said = capsys.readouterr().out
    assert "data/demo.jsonl: 480 different rows, read as conversations" in said
    assert "comes with the runner: made-up chats of a customer with a shop" in said
    assert "your own rows: --data FILE" in said


def test_the_starter_writes_what_the_yaml_filter_would() -> None:
    """Values are put into the template as text: none of those that `init` puts there may mean
    something to Jinja.
    """
    text = ""
    for task in find_tasks():
        for _, settings in task.RECOGNISED_BY:
            text += "".join(map(quote_yaml, settings.values()))
    assert "{document}" in text
    assert not {"{{", "{%", "{#"} & {text[n : n + 2] for n in range(len(text))}
