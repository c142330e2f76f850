"""The accepted contents of a grid file, its cells, and their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import GridError, RecipeError, RunnerError
from runner.grid.render import KeyList, derive_keys, render_grid
from runner.grid.spec import applies, load_grid
from runner.recipe.parse import load_recipe, parse_recipe
from tests.conftest import RECIPE_TEXT
from tests.support.toy_grid import CONDITIONAL, GRID, Toy, build_toy, grid_error


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return build_toy(tmp_path)


def keys_of(root: Path) -> KeyList:
    return derive_keys(load_grid(root / "recipe_templates", "toy"), "toy")


def names_of(root: Path) -> list[str]:
    return [key.name for key in keys_of(root).keys]


def test_every_cell_gives_one_recipe_in_the_order_of_the_axes(toy: Toy) -> None:
    rendered = render_grid(toy() / "recipe_templates", "toy")
    assert list(rendered.texts) == [
        f"{m}_{o}_{n}"
        for m in ("gemma", "phi")
        for o in ("full", "completion")
        for n in ("060", "180")
    ]
    recipe = parse_recipe(rendered.texts["phi_full_060"], where="")
    assert (recipe.run.grid, recipe.run.name, recipe.model.path) == (
        "toy",
        "phi_full_060",
        "models/phi",
    )
    assert dict(recipe.run.axes) == {"model": "phi", "loss": "full", "num_train_samples": 60}
    assert recipe.data.num_train_samples == 60


def test_exclusions_count_each_cell_once_under_the_first_rule(toy: Toy) -> None:
    root = toy(
        GRID
        + """
exclude:
  - {when: {model: phi, loss: [full]}, why: phi forgets}
  - {when: {num_train_samples: [180, 60], loss: full}, why: all of full}
"""
    )
    keys = keys_of(root)
    assert (keys.num_cells, keys.num_excluded, keys.num_included, len(keys.keys)) == (
        8,
        (2, 2),
        0,
        4,
    )
    assert all(key.axes["loss"] == "completion" for key in keys.keys)
    summary = render_grid(root / "recipe_templates", "toy").summary
    assert "8 combinations  model (2) x loss (2) x num_train_samples (2)" in summary
    assert "-2 excluded      model=phi, loss=full: phi forgets" in summary
    assert "-2 excluded      num_train_samples=180|60, loss=full: all of full" in summary
    assert "4 recipes" in summary


def test_inclusions_add_whole_cells_after_exclusion(toy: Toy) -> None:
    root = toy(
        GRID
        + """
exclude: [{when: {model: phi}, why: too slow}]
include:
  - {loss: full, model: phi, num_train_samples: 60}
  - {model: {name: llama, path: models/llama}, loss: full, num_train_samples: 7}
"""
    )
    keys = keys_of(root)
    assert (keys.num_cells, keys.num_excluded, keys.num_included) == (8, (4,), 2)
    assert names_of(root)[-2:] == ["phi_full_060", "llama_full_007"]
    assert keys.keys[-2].values["model"]["path"] == "models/phi"
    assert list(keys.keys[-2].axes) == ["model", "loss", "num_train_samples"]
    assert "+2 included" in render_grid(root / "recipe_templates", "toy").summary


def test_a_conditional_axis_is_absent_where_it_does_not_apply(toy: Toy) -> None:
    root = toy(CONDITIONAL)
    assert names_of(root) == [
        "a_none",
        "a_lora_8",
        "a_lora_16_true",
        "a_lora_16_false",
        "b_none",
        "b_lora_8",
        "b_lora_16",
    ]
    assert keys_of(root).keys[0].axes == {"model": "a", "adapter": "none"}
    assert keys_of(root).keys[2].axes == {
        "model": "a",
        "adapter": "lora",
        "lora_r": 16,
        "tied": True,
    }


def test_a_template_that_uses_an_absent_axis_is_told_how_to_ask(toy: Toy) -> None:
    root = toy(CONDITIONAL, "a: 1\nb: {{ lora_r | yaml }}\n")
    message = grid_error(root)
    assert "toy/recipe.yaml.j2, line 2: 'lora_r' is undefined" in message
    assert "{% if lora_r is defined %}" in message
    assert "in the run model=a, adapter=none" in message


def test_an_exclusion_on_an_absent_axis_does_not_apply(toy: Toy) -> None:
    root = toy(CONDITIONAL + "exclude: [{when: {lora_r: 8}, why: small}]\n")
    assert keys_of(root).num_excluded == (2,)
    assert "a_none" in names_of(root)


def test_labels_that_only_look_alike_are_different(toy: Toy) -> None:
    values = "[1, '1', 1.0, true]"
    for position, value in enumerate(["1", "'1'", "1.0", "true"]):
        exclude = f"exclude: [{{when: {{b: {value}}}, why: w}}]"
        root = toy(f"name: '{{{{ a }}}}'\naxes:\n  a: [x]\n  b: {values}\n{exclude}")
        with pytest.raises(GridError, match="twice"):  # 1 and "1" look the same in print
            keys_of(root)
        spec = load_grid(root / "recipe_templates", "toy")
        assert [applies(spec.exclude[0].when, {"b": label}) for label in (1, "1", 1.0, True)].index(
            True
        ) == position


def test_small_numbers_in_a_grid_are_numbers(toy: Toy) -> None:
    root = toy("name: 'lr{{ lr }}'\naxes:\n  lr: [1e-5, 2E-4]\n")
    assert [key.axes["lr"] for key in keys_of(root).keys] == [1e-5, 2e-4]
    assert names_of(root) == ["lr1e-05", "lr0.0002"]


# Mistakes in grid.yaml


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (GRID.replace("axes:", "axis:"), ["line 2", "axis", "did you mean `axes`?", "is missing"]),
        (
            GRID + "exclude: [{when: {modle: phi}, why: x}]",
            ["line 8", "is not an axis, did you mean `model`?"],
        ),
        (
            GRID + "exclude:\n  - when: {model: phy}\n    why: x",
            ["line 9", 'got "phy"', '"gemma", "phi"'],
        ),
        (GRID + "exclude: [{when: {num_train_samples: '60'}, why: x}]", ['got "60"', "60, 180"]),
        (GRID + "exclude: [{when: {model: phi}}]", ["exclude.0.why", "is missing"]),
        (
            GRID + "exclude: [{when: {model: phi}, why: x, wyh: odd}]",
            ["unknown key, did you mean `why`?"],
        ),
        (GRID + "exclude: [{when: {}, why: x}]", ["exclude.0.when", "at least 1"]),
        (GRID + "exclude: [{when: {model: []}, why: x}]", ["exclude.0.when.model", "at least 1"]),
        (
            GRID + "include: [{model: phi, loss: full}]",
            ["include.0.num_train_samples", "is missing"],
        ),
        (
            GRID + "include: [{model: phi, loss: full, num_train_samples: 1, x: 2}]",
            ["include.0.x", "is not an axis"],
        ),
        (
            GRID + "include: [{model: llama, loss: full, num_train_samples: 1}]",
            ["llama is not a value of the axis"],
        ),
        (
            GRID + "include: [{model: {name: phi, path: x}, loss: full, num_train_samples: 1}]",
            ["another meaning to phi"],
        ),
        (
            GRID + "include: [{model: {path: x}, loss: full, num_train_samples: 1}]",
            ["needs the key `name`"],
        ),
        (
            CONDITIONAL + "include: [{model: c, adapter: none, lora_r: 3}]",
            ["include.0.lora_r", "does not apply"],
        ),
        (CONDITIONAL + "include: [{model: c, adapter: lora}]", ["include.0.lora_r", "is missing"]),
        (
            CONDITIONAL.replace("{adapter: lora}", "{tied: true}"),
            ["line 5", "is not an axis above this one"],
        ),
        (
            CONDITIONAL.replace("{adapter: lora}", "{adapter: lora, extra: 1}"),
            ["is not an axis above"],
        ),
        (
            CONDITIONAL.replace("when: {adapter: lora}", "if: {adapter: lora}"),
            ["axes.lora_r.if", "unknown key"],
        ),
        (GRID.replace("[60, 180]", "[60, 60]"), ["line 7", "has 60 twice"]),
        (GRID.replace("name: phi,", "name: gemma,"), ["axes.model", "has gemma twice"]),
        (GRID.replace("name: phi,", ""), ["line 5", "needs the key `name`"]),
        (GRID.replace("[60, 180]", "[]"), ["line 7", "at least 1"]),
        (GRID.replace("[60, 180]", "60"), ["line 7", "got 60"]),
        (GRID.replace("[60, 180]", "[[60]]"), ["line 7", "is not a label"]),
        (GRID.replace("[60, 180]", "[.nan]"), ["line 7", "expected a finite number"]),
        (GRID.replace("[60, 180]", "[!!binary aGk=]"), ["line 7", "type bytes"]),
        (GRID.replace("completion]", "'a,b']"), ["line 6", "cannot be chosen with --where"]),
        (GRID.replace("completion]", "'']"), ["line 6", "cannot be chosen with --where"]),
        (GRID.replace("completion]", '"a\\nb"]'), ["line 6", "cannot be chosen with --where"]),
        (GRID.replace("completion]", "' a']"), ["line 6", "cannot be chosen with --where"]),
        (GRID.replace("  loss:", "  lo-ss:"), ["line 6", "is not an axis name"]),
        (GRID.replace("  loss:", "  models:"), ["line 6", "is not an axis name"]),
        (GRID.replace("  loss:", "  1:"), ["axes.1", "expected a text"]),
        (GRID.replace("  loss:", "  model:"), ["line 6", "duplicate key model"]),
        (GRID.replace("full,", "'${oc.env:HOME}',"), ["line 6", "nothing is looked up"]),
        (GRID.replace("full,", "'${name}',"), ["line 6", "nothing is looked up"]),
        (GRID.replace("full,", "'???',"), ["line 6", "axes.loss", "missing"]),
        ("- a list", ["must be a mapping"]),
        ("a: [1", ["expected ',' or ']'"]),
    ],
)
def test_a_wrong_grid_file_is_refused_with_its_line(
    toy: Toy, grid: str, expected: list[str]
) -> None:
    message = grid_error(toy(grid))
    for part in [*expected, "toy/grid.yaml has"]:
        assert part in message, message


def test_all_problems_of_a_grid_file_come_at_once(toy: Toy) -> None:
    message = grid_error(
        toy(GRID.replace("[60, 180]", "[60, 60]") + "exclude: [{when: {x: 1}, why: odd}]\n")
    )
    assert "2 problems" in message and "line 7" in message and "line 8" in message


EXCLUDING = GRID + "exclude:\n  - {when: {model: phi}, why: slow}\n"
CARD = """\
path: hub/phi
dtype: float16
chat_template: null
pad_token: auto
target_modules: [q_proj]
"""
# Of each kind of file: its path, a whole one, and what is written instead of what, with the answer.
FILES = {
    "recipe": (
        "recipe.yaml",
        RECIPE_TEXT,
        {
            "misspelt": ("\nloss:", "\nlost:", ["line 13 ", "lost", "did you mean `loss`?"]),
            "type": ("seed: 7", "seed: x", ["line 11 ", "data.seed", "expected a whole number"]),
            "duplicate": ("seed: 7", "seed: 7\n  seed: 8", ["line 12 ", "duplicate key seed"]),
            "syntax": ("seed: 7", "seed: [7", ["line 12 ", "did not find expected ',' or ']'"]),
        },
    ),
    "grid": (
        "recipe_templates/toy/grid.yaml",
        EXCLUDING,
        {
            "misspelt": ("why:", "wyh:", ["line 9 ", "exclude.0.wyh", "did you mean `why`?"]),
            "type": ("[60, 180]", "60", ["line 7 ", "num_train_samples", "expected a list"]),
            "duplicate": ("exclude:", "name: x\nexclude:", ["line 8 ", "duplicate key name"]),
            "syntax": ("[60, 180]", "[60", ["line 8 ", "did not find expected ',' or ']'"]),
        },
    ),
    "card": (
        "recipe_templates/models/phi.yaml",
        CARD,
        {
            "misspelt": ("pad_token:", "padtoken:", ["line 4 ", "did you mean `pad_token`?"]),
            "type": ("[q_proj]", "[4]", ["line 5 ", "target_modules.0", "expected a text"]),
            "duplicate": ("dtype:", "path: x\ndtype:", ["line 2 ", "duplicate key path"]),
            "syntax": ("[q_proj]", "[q_proj", ["line 6 ", "did not find expected ',' or ']'"]),
        },
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_recipes_grids_and_cards_name_mistakes_alike(toy: Toy, kind: str) -> None:
    name, text, mistakes = FILES[kind]
    root = toy()
    path = root / name
    path.parent.mkdir(exist_ok=True)

    def message_of(content: str) -> str:
        path.write_text(content)
        with pytest.raises(RunnerError) as caught:
            if kind == "recipe":
                load_recipe(path)
            else:
                render_grid(root / "recipe_templates", "toy")
        assert type(caught.value) is (RecipeError if kind == "recipe" else GridError)
        assert f"{path} has " in str(caught.value)
        return str(caught.value)

    for old, new, expected in mistakes.values():
        assert text.count(old) == 1
        message = message_of(text.replace(old, new))
        assert [part for part in expected if part not in message] == [], message
    both = text
    for old, new, _ in (mistakes["misspelt"], mistakes["type"]):
        both = both.replace(old, new)
    for part in mistakes["misspelt"][2] + mistakes["type"][2]:
        assert part in message_of(both)
    path.unlink()
    path.mkdir()
    with pytest.raises(RunnerError, match="cannot be read"):
        load_recipe(path) if kind == "recipe" else render_grid(root / "recipe_templates", "toy")


def test_too_many_cells_are_refused_before_they_are_built(toy: Toy) -> None:
    axes = "".join(f"  a{n}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for n in range(12))
    assert "more than 20,000" in grid_error(toy(f"name: x\naxes:\n{axes}"))


def test_a_grid_without_runs_is_refused(toy: Toy) -> None:
    assert "all of its 8 cells are excluded" in grid_error(
        toy(GRID + "exclude: [{when: {model: [phi, gemma]}, why: x}]")
    )


@pytest.mark.parametrize("name", ["ty", "../toy", "", ".", "toy/", "models"])
def test_an_unknown_grid_is_refused_with_the_known_ones(toy: Toy, name: str) -> None:
    message = grid_error(toy(), name)
    assert f"no grid {name!r}" in message and "the grids are toy" in message
    assert ("did you mean `toy`?" in message) == (name in ("ty", "../toy", "toy/"))


# Names


@pytest.mark.parametrize(
    "label", ["../../etc/passwd", "a/b", ".hidden", "-rf", "a b", "naïve", "x" * 150, "$(rm)", "~"]
)
def test_a_hostile_name_is_refused(toy: Toy, label: str) -> None:
    root = toy(f"name: '{{{{ a }}}}{{{{ a }}}}'\naxes:\n  a: [{json.dumps(label)}]\n")
    assert "expected at most 200 letters" in grid_error(root)


def test_a_name_ends_where_its_line_does(toy: Toy) -> None:
    assert "expected at most 200 letters" in grid_error(toy('name: "{{ a }}\\n"\naxes: {a: [x]}'))


@pytest.mark.parametrize(
    "pattern",
    ["same", "{{ model }}_{{ loss }}", "{{ model }}_{{ loss }}_{{ num_train_samples > 0 }}"],
)
def test_two_cells_with_one_name_are_refused(toy: Toy, pattern: str) -> None:
    message = grid_error(toy(GRID.replace(GRID.splitlines()[0], f'name: "{pattern}"')))
    assert "twice" in message and "model=gemma, loss=full, num_train_samples=60" in message


def test_names_that_differ_in_case_only_are_refused(toy: Toy) -> None:
    assert "twice (letter case does not count)" in grid_error(
        toy("name: '{{ a }}'\naxes: {a: [x, X]}")
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{{ modle }}", "'modle' is undefined"),
        ("{{ model", "is wrong"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '/' * 10 ** 8 }}", "expected at most 200 letters"),
        ("{{ [0] * 10 ** 9 }}", "needs more than 2 GiB of memory"),
        ("{% include 'toy/grid.yaml' %}", "no loader"),
    ],
)
def test_a_name_pattern_that_fails_is_named(toy: Toy, pattern: str, expected: str) -> None:
    message = grid_error(toy(GRID.replace(GRID.splitlines()[0], f'name: "{pattern}"')))
    assert expected in message and "the grid toy" in message and len(message) < 2_000
