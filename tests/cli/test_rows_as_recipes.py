"""A file of rows, named where a recipe is expected."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"messages": []}\n{"messages": []}\n'),
        ("one.jsonl", '{"run": "slow"}\n'),
        ("rows.json", '[{"prompt": "a"}]'),
        ("rows.csv", "prompt,answer\na,b\n"),
        ("rows.parquet", "PAR1\x00"),
        ("my rows.csv.gz", "\x1f"),
        ("rows.txt", "a text\n"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "masks", "launch", "sweep", "status", "why", "report"])
def test_rows_instead_of_a_recipe_are_named(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], verb: str, name: str, content: str
) -> None:
    """They were reported as wrong YAML."""
    fake.add("a")
    Path("data").mkdir()
    rows = Path("data", name)
    rows.write_text(content)
    assert main([verb, str(rows)]) == 2
    said = capsys.readouterr().err
    assert f"{rows} looks like rows, expected a recipe (a YAML file" in said
    if rows.suffix == ".txt":
        assert "then `runner init study --data data/rows.jsonl`" in said
    else:
        assert f"hint: runner init study --data {shlex.quote(str(rows))}  #" in said


def test_a_recipe_in_json_is_no_row(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a")
    recipe = Path("recipe.json.json")
    recipe.write_text('{"run": {"grid": "toy"}}')
    assert main(["check", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "recipe.json.json has " in said and "looks like rows" not in said
