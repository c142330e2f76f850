"""No value of a recipe, grid file or model card is converted to the type of its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import GridError, RecipeError
from runner.grid.spec import load_grid
from runner.recipe.keys import Key, list_all_keys
from runner.recipe.parse import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "recipes" / "demo" / "gemma_060_full_seed1.yaml").read_text()


def list_wrong_values(key: Key) -> list[str]:
    """Values of other types than the key's."""
    words = key.type.replace(" or ", " | ")
    values = ['"3"'] if "text" not in words and not key.choices else []
    if "integer" in words and "number" not in words:
        values.append("3.0")
    if words.startswith(("integer", "number")) and "true" not in words:
        values.append("true")
    if words.startswith("true or false") or set(key.choices) == {"true", "false"}:
        values += ["0", "0.0"]
    return values


def find_problems(*overrides: str) -> list[str]:
    """The keys that the demo's recipe refuses with overrides."""
    try:
        parse_recipe(TEXT, where="recipe", overrides=overrides)
    except RecipeError as error:
        return [problem.key for problem in error.problems]
    return []


def test_every_number_and_switch_has_one_type() -> None:
    numbers = [
        key
        for key in list_all_keys()
        if key.type.startswith(("integer", "number", "true", "false")) and ".N." not in key.path
    ]
    assert len(numbers) > 60
    by_kind: dict[tuple[str | None, str], list[str]] = {}  # one recipe for each
    for key in numbers:
        for value in list_wrong_values(key):
            by_kind.setdefault((key.goes_with, value), []).append(key.path)
    accepted = []
    for (kind, value), keys in by_kind.items():
        words = [kind.replace(": ", "=")] if kind else []
        refused = find_problems(*words, *(f"{key}={value}" for key in keys))
        accepted += [f"{key}={value}" for key in keys if key not in refused]
    assert not accepted


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("run.schema_version=true", "got true, expected 1"),
        ("run.schema_version=1.0", "got 1.0, expected 1"),
        ("evaluation.generation={enabled: 0}", "got 0, expected true or false"),
        ("early_stopping={enabled: 0.0}", "got 0.0, expected true or false"),
        ("data.train=[{path: a, weight: true}]", "got true, expected a number"),
        ("adapter.rank_pattern={q_proj: 8.0}", "got 8.0 in it, expected whole numbers"),
        ("adapter.alpha_pattern={q_proj: true}", "got true in it, expected numbers"),
        ("adapter.layers_to_transform=[true]", "got true in it, expected whole numbers"),
    ],
)
def test_what_equals_a_value_is_not_the_value(override: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TEXT, where="recipe", overrides=[override])
    assert what in [problem.what for problem in caught.value.problems]


def test_a_problem_in_a_file_has_its_line() -> None:
    text = TEXT.replace("schema_version: 1", "schema_version: true")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="recipe")
    (problem,) = caught.value.problems
    assert problem.key == "run.schema_version"
    assert problem.line is not None
    assert text.splitlines()[problem.line - 1].strip() == "schema_version: true"


@pytest.mark.parametrize("margin", ["true", '"0.1"'])
def test_grid_files_are_as_exact(margin: str, tmp_path: Path) -> None:
    folder = tmp_path / "g"
    folder.mkdir()
    (folder / "recipe.yaml.j2").touch()
    contrast = f"{{axis: a, from: 1, to: 2, metric: nll_per_token, margin: {margin}}}"
    (folder / "grid.yaml").write_text(f"name: x\naxes: {{a: [1, 2]}}\ncompare: [{contrast}]\n")
    with pytest.raises(GridError, match=r"margin .*expected a number"):
        load_grid(tmp_path, "g")
