"""A plain YAML value that means something else than it looks like is refused with the quoted form,
in recipes, grids, model cards and overrides.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from runner.errors import GridError, RecipeError
from runner.grid.spec import load_cards, load_grid
from runner.recipe.parse import parse_recipe
from tests.conftest import RECIPE_TEXT, ROOT, Project, run_cli
from tests.support.toy_grid import GRID, TEMPLATE, build_toy, grid_error

# Axis values of YAML 1.1 that become something else: false, 8, 90.
AXES = """\
axes:
  answer: [no, yes]
  code: [010, 011]
  time: [1:30, 2:00]
"""
# The plain text, and the alternative to its quoted form; None: there is no alternative.
CHANGED = {
    **dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON", "y", "Y"), "true"),
    **dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF", "n", "N"), "false"),
    "010": "8",
    "-010": "-8",
    "0123": "83",
    "00": "0",
    "08": "8",
    "-009": "-9",
    "01.5": "1.5",
    "010e2": "1000.0",
    "0o17": "15",
    "1:30": "90",
    "190:20:30": "685230",
    "1:30.5": "90.5",
    "1_2": "12",
    "2024_11_05": "20241105",
    "2026-01-01": None,
    "2026-1-1 10:00:00": None,
    "2026-01-01T10:00:00Z": None,
    "=": None,
}
# Texts that are not changed.
KEPT = {
    **dict.fromkeys(("true", "True"), True),
    "FALSE": False,
    **dict.fromkeys(("null", "~"), None),
    **dict.fromkeys(("0", "-0"), 0),
    "0.5": 0.5,
    "-0.1": -0.1,
    "0.10": 0.1,
    "1e-4": 0.0001,
    "2.0e-05": 0.00002,
    "1_000": 1000,
    "10_000_000": 10_000_000,
    "1_000.5": 1000.5,
    "0x1F": 31,
    "0b11": 3,
    **{text: text for text in ("12:75", "0:30", "1.2.3", "nobody", "yesterday", "no idea", "v08")},
}


def parse_axis(value: str, *overrides: str) -> object:
    text = RECIPE_TEXT.replace("model: gemma,", f"model: {value},")
    return parse_recipe(text, where="r.yaml", overrides=overrides).run.axes["model"]


@pytest.mark.parametrize("value", CHANGED)
def test_what_yaml_changes_is_refused_with_the_quoted_form(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_axis(value)
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (1, "run.axes.model")
    other = CHANGED[value]
    end = f"write '{value}' in quotes" + ("" if other is None else f", or {other}")
    assert problem.what.endswith(end), problem.what
    for quoted in (f"'{value}'", f'"{value}"'):
        assert parse_axis(quoted) == value


@pytest.mark.parametrize("value", KEPT)
def test_what_is_meant_as_written_stays(value: str) -> None:
    found = parse_axis(value)
    assert (type(found), found) == (type(KEPT[value]), KEPT[value])
    assert parse_axis("gemma", f"run.axes.model={value}") == KEPT[value]


def test_an_explicit_tag_says_what_is_meant() -> None:
    assert parse_axis("!!str 010") == "010"
    assert parse_axis("!!str no") == "no"


@pytest.mark.parametrize("value", CHANGED)
def test_an_override_is_no_way_around(value: str) -> None:
    with pytest.raises(RecipeError, match="in quotes") as caught:
        parse_axis("gemma", f"run.axes.model={value}")
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (None, "run.axes.model")
    assert parse_axis("gemma", f"run.axes.model='{value}'") == value


def test_an_override_of_a_list_or_a_mapping_is_looked_through() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_axis("gemma", "run.axes={model: [a, no], 'no': 010}", "training.bf16=yes")
    assert [problem.key for problem in caught.value.problems] == [
        "run.axes.model.1",
        "run.axes.no",
        "training.bf16",
    ]


@pytest.mark.parametrize("key", ["on", "No", "010", "1", "1.5", "2026-01-01", "~", "1:30"])
def test_a_key_that_is_no_text_is_refused_with_the_quoted_form(key: str) -> None:
    text = RECIPE_TEXT.replace("model: gemma,", f"{key}: gemma,")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="r.yaml")
    (problem,) = caught.value.problems
    assert problem.line == 1 and problem.what.endswith(f"expected a text: write '{key}' in quotes")


def test_all_of_a_file_are_named_each_once_where_aliases_repeat_them() -> None:
    text = RECIPE_TEXT.replace("model: gemma,", "model: &m no, other: *m, third: [off, 010],")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.replace("  seed: 7", "  seed: 007"), where="r.yaml")
    found = [(problem.line, problem.key) for problem in caught.value.problems]
    assert found == [
        (1, "run.axes.model"),
        (1, "run.axes.third.0"),
        (1, "run.axes.third.1"),
        (RECIPE_TEXT[: RECIPE_TEXT.index("  seed: 7")].count("\n") + 1, "data.seed"),
    ]


def test_a_merge_key_is_welcome_and_what_it_holds_is_looked_at() -> None:
    text = RECIPE_TEXT + "tracking:\n  <<: {project: no}\n"
    with pytest.raises(RecipeError, match=r"tracking.<<.project .*write 'no' in quotes"):
        parse_recipe(text, where="r.yaml")
    assert parse_recipe(text.replace("no}", "x}"), where="r.yaml").tracking.project == "x"


def test_a_grid_names_each_axis_value(tmp_path: Path) -> None:
    root = build_toy(tmp_path)(GRID[: GRID.index("axes:")] + AXES)
    with pytest.raises(GridError) as caught:
        load_grid(root / "recipe_templates", "toy")
    first = GRID[: GRID.index("axes:")].count("\n") + 2
    for line, key, quoted in (
        (first, "axes.answer.0", "'no'"),
        (first, "axes.answer.1", "'yes'"),
        (first + 1, "axes.code.0", "'010'"),
        (first + 1, "axes.code.1", "'011'"),
        (first + 2, "axes.time.0", "'1:30'"),
        (first + 2, "axes.time.1", "'2:00'"),
    ):
        assert re.search(rf"line {line} +{key} .*write {quoted} in quotes", str(caught.value))


def test_a_template_that_writes_one_itself_gives_no_recipe(tmp_path: Path) -> None:
    error = grid_error(build_toy(tmp_path)(template=TEMPLATE.replace('"no"', "no")))
    assert re.search(r"line \d+ +evaluation.eval_strategy +.*write 'no' in quotes", error), error


def test_a_model_card_is_read_by_the_same_rule(tmp_path: Path) -> None:
    name = "models/phi-2.yaml"
    (tmp_path / "models").mkdir()
    text = (ROOT / "recipe_templates" / name).read_text()
    (tmp_path / name).write_text(text)
    assert set(load_cards(tmp_path)) == {"phi-2"}
    (tmp_path / name).write_text(f"{text.rstrip()}\nrevision: 2026-01-01\n")
    with pytest.raises(GridError, match=r"revision .*write '2026-01-01' in quotes"):
        load_cards(tmp_path)


def test_the_command_line_says_so(project: Project) -> None:
    project.write_recipe("recipes/tests/a.yaml")
    path = project.root / "recipes" / "tests" / "a.yaml"
    launched = project.cli("launch", path, "training.bf16=no")
    assert launched.returncode == 2 and "Traceback" not in launched.stderr
    assert "override  training.bf16  YAML reads the plain no as false" in launched.stderr
    path.write_text(RECIPE_TEXT.replace("max_length: 160", "max_length: 0160"))
    checked = project.cli("check", path)
    assert checked.returncode == 2 and "Traceback" not in checked.stderr
    assert "write '0160' in quotes, or 112" in checked.stderr


def test_the_command_line_renders_no_such_grid(tmp_path: Path) -> None:
    root = build_toy(tmp_path)(GRID[: GRID.index("axes:")] + AXES)
    done = run_cli(["render", "toy"], root)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "axes.answer.0" in done.stderr and "write 'no' in quotes, or false" in done.stderr


def test_what_a_template_writes_is_quoted() -> None:
    from runner.grid.template import quote_yaml
    from runner.recipe.values import _read_plainly

    for value in [*CHANGED, *KEPT]:
        found, problems = _read_plainly(quote_yaml({value: value}))
        assert (found, problems) == ({value: value}, [])
        assert yaml.safe_load(quote_yaml(value)) == value
