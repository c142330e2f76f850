"""A template renders recipes, and its mistakes are reported; `test_template` has the filter and the
sandbox.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.grid.render import render_grid
from runner.grid.spec import load_cards
from runner.recipe.parse import parse_recipe
from tests.support.toy_grid import GRID, TEMPLATE, Toy, build_toy, grid_error


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return build_toy(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("{{ loss | yaml }}", "{{ loss }}", 19, "not quoted: end it with `| yaml`"),
        ("{{ loss | yaml }}", "{{ los | yaml }}", 19, "'los' is undefined, did you mean `loss`?"),
        ("{{ loss | yaml }}", "{{ 'a' if loss else loss | yaml }}", 19, "not quoted"),
        ("{{ loss | yaml }}", "{{ loss | yaml | upper }}", 19, "not quoted"),
        ("{{ loss | yaml }}", "x{{ loss | yaml }}", 19, "keep its quotes"),
        ("{{ loss | yaml }}", "{{ loss | }}", 19, "expected token 'name'"),
        ("{{ loss | yaml }}", "{{ model.pathh | yaml }}", 19, "no attribute 'pathh'"),
        ("{{ loss | yaml }}", "{{ models.phi | yaml }}", 19, "no model card 'phi'"),
        ("{{ loss | yaml }}", "{{ range | yaml }}", 19, "cannot be written"),
        ("{{ loss | yaml }}", "{{ (1 / 0) | yaml }}", 19, "division by zero"),
        ("{{ loss | yaml }}", "{% include 'toy/none.yaml' %}", 19, "none.yaml"),
        ("{{ loss | yaml }}", "{% include '../secret' %}", 19, "secret"),
        ("{{ loss | yaml }}", "{% macro x() %}{% endmacro %}", 19, "`macro` is not allowed"),
        ("1e-5", "fast", 25, "training.learning_rate  got the text 'fast', expected a number"),
        (
            "  seed: 1\n  max_length",
            "  sed: 1\n  max_length",
            17,
            "data.sed  unknown key, did you mean `seed`?",
        ),
        (
            "  learning_rate: 1e-5",
            "  learning_rate: 1e-5\n  learning_rate: 2e-5",
            26,
            "duplicate key",
        ),
        ("loss: {{ loss | yaml }}", "loss: full: x", 19, "(YAML)"),
        (
            "grid: {{ grid | yaml }}",
            "grid: other",
            2,
            '`run.grid` is "other", but the template was given "toy"',
        ),
        (
            "name: {{ name | yaml }}",
            "name: x",
            3,
            '`run.name` is "x", but the template was given "gemma_full_060"',
        ),
        ("axes: {{ axes | yaml }}", "axes: {loss: full}", 4, '`run.axes` is {"loss": "full"}'),
    ],
)
def test_a_wrong_template_is_refused_with_its_line_and_cell(
    toy: Toy, old: str, new: str, line: int, expected: str
) -> None:
    message = grid_error(toy(old=old, new=new))
    assert f"toy/recipe.yaml.j2, line {line}" in message, message
    assert expected in message, message
    assert "in the run model=gemma, loss=full, num_train_samples=60" in message


def test_a_mistake_of_the_whole_recipe_names_no_line(toy: Toy) -> None:
    """Not that of the first comment of the template, which starts as the generated header does."""
    message = grid_error(toy(old="loss: {{ loss | yaml }}", new="# a comment"))
    assert "toy/recipe.yaml.j2  loss  is missing" in message, message


def test_the_axes_of_a_recipe_keep_their_types(toy: Toy) -> None:
    one_cell = (
        GRID.replace("full, completion", "full").replace("60, 180", "1")
        + "exclude: [{when: {model: phi}, why: x}]"
    )
    for wrong in ('"1"', "1.0", "true"):
        axes = f"{{model: gemma, loss: full, num_train_samples: {wrong}}}"
        assert "`run.axes` is" in grid_error(toy(one_cell, old="{{ axes | yaml }}", new=axes))


def test_an_error_in_an_included_file_names_that_file(toy: Toy) -> None:
    root = toy(old="loss: {{ loss | yaml }}\n", new="{% include 'toy/parts/' ~ loss ~ '.yaml' %}\n")
    parts = root / "recipe_templates" / "toy" / "parts"
    parts.mkdir()
    (parts / "full.yaml").write_text("# about the loss\nloss: {{ loss }}\n")
    assert "toy/parts/full.yaml, line 2: this interpolation is not quoted" in grid_error(root)
    (parts / "full.yaml").write_text("# about the loss\nloss: wrong\n")
    assert "toy/parts/full.yaml, line 2  loss  got the text 'wrong'" in grid_error(root)
    (parts / "full.yaml").write_text("loss: {{ loss | yaml }}\n")
    assert "toy/recipe.yaml.j2, line 19: 'toy/parts/completion.yaml'" in grid_error(root)


def test_a_missing_template_is_named(toy: Toy) -> None:
    root = toy()
    (root / "recipe_templates/toy/recipe.yaml.j2").unlink()
    assert "toy/recipe.yaml.j2" in grid_error(root)


def test_a_text_longer_than_a_recipe_is_refused(toy: Toy) -> None:
    loop = "{% for a in range(99999) %}\n# xxxxxxxxxx{% endfor %}\n"
    assert "longer than 1,000,000 bytes" in grid_error(toy(template=TEMPLATE + loop))


def test_a_mapping_axis_stands_for_its_content_and_axes_for_its_label(toy: Toy) -> None:
    root = toy(
        old="loss: {{ loss | yaml }}", new="loss: {{ axes.loss | yaml }} # {{ axes.model | yaml }}"
    )
    assert (
        'loss: "full" # "gemma"\n'
        in render_grid(root / "recipe_templates", "toy").texts["gemma_full_060"]
    )


# Model cards


CARD = (
    "path: hub/phi\ndtype: float16\nchat_template: null\npad_token: auto\ntarget_modules: [q_proj,"
    " dense]\n"
)


def test_cards_are_known_by_their_file_names(toy: Toy) -> None:
    template = TEMPLATE.replace("{{ model.path | yaml }}", "{{ models[model].path | yaml }}")
    root = toy(
        "name: '{{ model }}'\naxes: {model: [phi-2], loss: [full], num_train_samples: [1]}",
        template,
    )
    (root / "recipe_templates/models").mkdir()
    (root / "recipe_templates/models/phi-2.yaml").write_text(CARD)
    assert load_cards(root / "recipe_templates")["phi-2"]["target_modules"] == ["q_proj", "dense"]
    assert 'path: "hub/phi"' in render_grid(root / "recipe_templates", "toy").texts["phi-2"]

    toy("name: x\naxes: {model: [phi-3], loss: [full], num_train_samples: [1]}", template)
    message = grid_error(root)
    assert "line 6: no model card 'phi-3', did you mean `phi-2`?" in message
    assert "the cards in recipe_templates/models are phi-2" in message


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD.replace("path:", "paht:"), ["line 1", "did you mean `path`?", "path", "is missing"]),
        (CARD.replace("float16", "fp16"), ["line 2", "dtype"]),
        ("path: x\npath: y\n", ["line 2", "duplicate key path"]),
    ],
)
def test_a_wrong_card_is_refused_with_its_line(toy: Toy, card: str, expected: list[str]) -> None:
    root = toy()
    (root / "recipe_templates/models").mkdir()
    (root / "recipe_templates/models/phi-2.yaml").write_text(card)
    message = grid_error(root)
    for part in [*expected, "models/phi-2.yaml has"]:
        assert part in message, message


def test_a_reference_in_a_template_is_refused_where_it_stands(toy: Toy) -> None:
    message = grid_error(toy(old="max_steps: 2", new="max_steps: ${data.max_length}"))
    assert "toy/recipe.yaml.j2, line 24  training.max_steps  holds `${`" in message
    assert "nothing is looked up here: write the value itself" in message
    root = toy(old="data/demo.jsonl", new="{{ '${oc.env:HOME}' | yaml }}")
    text = render_grid(root / "recipe_templates", "toy").texts["phi_full_060"]
    assert parse_recipe(text, where="").data.train.path == "${oc.env:HOME}"
