"""The JSON Schema of a recipe: what the parser accepts validates, wrong keys and types do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml

from runner.recipe.json_schema import build_schema
from runner.recipe.keys import list_all_keys
from runner.recipe.parse import parse_recipe
from runner.recipe.values import read_values
from tests.conftest import ROOT

SCHEMA = build_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DEMO = ROOT / "recipes" / "demo" / "gemma_060_full_seed1.yaml"
Change = Callable[[dict[str, Any]], object]


def load(path: Any) -> Any:
    import json

    return json.loads(read_values(path.read_text(), where=str(path)))


def test_it_is_a_schema_of_the_draft_that_it_names() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_recipe_validates(path: Any) -> None:
    VALIDATOR.validate(load(path))


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 200


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe["training"].update(learning_rat=1e-4),
        lambda recipe: recipe["training"].update(output_dir="x"),
        lambda recipe: recipe.update(trainer={}),
        lambda recipe: recipe["training"].update(learning_rate="fast"),
        lambda recipe: recipe["training"].update(optim="lomo"),
        lambda recipe: recipe["training"].update(seed=-1),
        lambda recipe: recipe["data"].update(max_length="long"),
        lambda recipe: recipe["data"]["task"].update(name="chats"),
        lambda recipe: recipe["checkpoints"].update(remote={"url": 3}),
        lambda recipe: recipe["evaluation"].update(eval_strategy=False),
        lambda recipe: recipe["quantization"].update(bnb_4bit_quant_type="nf4"),
        lambda recipe: recipe["tracking"].update(report_to=["wandbb"]),
        lambda recipe: recipe["model"].pop("path"),
        lambda recipe: recipe.update(loss="all"),
    ],
)
def test_a_wrong_recipe_does_not_validate(change: Change) -> None:
    recipe = load(DEMO)
    VALIDATOR.validate(recipe)
    change(recipe)
    assert not VALIDATOR.is_valid(recipe)


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe["tracking"].update(report_to="wandb"),
        lambda recipe: recipe["tracking"].update(report_to="none"),
        lambda recipe: recipe["tracking"].update(report_to=["wandb", "tensorboard"]),
        lambda recipe: recipe["data"].update(
            train=[{"path": "a", "num_samples": 40}, {"path": "b", "num_samples": 40}]
        ),
        lambda recipe: recipe["training"].update(weight_decay=0, lr_scheduler_kwargs={"a": [1]}),
        lambda recipe: recipe["checkpoints"].update(remote={"url": "s3://a", "options": {"b": 1}}),
        lambda recipe: recipe["run"].update(
            declared=[{"axis": "seed", "from": 1, "to": "x", "metric": "nll_per_token"}]
        ),
        lambda recipe: recipe.pop("tracking"),
    ],
)
def test_what_the_parser_accepts_validates(change: Change) -> None:
    recipe = load(DEMO)
    change(recipe)
    parse_recipe(yaml.safe_dump(recipe), where="changed")
    VALIDATOR.validate(recipe)


def test_every_key_has_a_description() -> None:
    """Editors show it under the cursor."""
    found = 0
    for name, definition in SCHEMA["$defs"].items():
        for key, prop in definition["properties"].items():
            assert prop.get("description"), f"{name}.{key}"
            assert "title" not in prop and "\n" not in prop["description"]
            found += 1
        assert definition["additionalProperties"] is False, name
    assert found > 180 and len(list_all_keys()) > 180
    assert all(prop.get("description") for prop in SCHEMA["properties"].values())


def test_the_line_that_names_a_schema_is_a_comment() -> None:
    line = "# yaml-language-server: $schema=../../recipe.schema.json\n"
    text = DEMO.read_text()
    assert parse_recipe(line + text, where="a") == parse_recipe(text, where="a")
