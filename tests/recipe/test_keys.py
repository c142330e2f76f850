"""Every key of a recipe is explained, and the explanation is what the parser does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from runner.errors import RecipeError
from runner.recipe.hf_fields import load_table
from runner.recipe.keys import (
    Key,
    find_keys,
    list_all_keys,
    list_groups,
    say_yaml,
    suggest_key,
)
from runner.recipe.parse import Recipe, parse_recipe

BASE = """
run: {grid: g, name: a}
model: {path: m, dtype: float32}
adapter: {method: lora, r: 8, lora_alpha: 16, lora_dropout: 0, target_modules: all-linear}
quantization: {method: none}
data:
  train: {path: rows.jsonl}
  task: {name: conversations}
  num_train_samples: 8
  num_validation_samples: 8
  num_test_samples: 8
  seed: 1
  max_length: 64
loss: full
training:
  seed: 1
  global_batch_size: 8
  per_device_train_batch_size: 1
  num_train_epochs: 1
  gradient_checkpointing: false
evaluation: {eval_strategy: epoch, per_device_eval_batch_size: 8}
early_stopping: {enabled: false}
checkpoints: {save_strategy: epoch}
launch: {accelerate_config: c.yaml}
tracking: {}
"""
# Keys that each kind of a section needs in addition to the explained one.
KINDS: dict[str, dict[str, Any]] = {
    "adapter.method: lora": {},
    "quantization.method: 4bit": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "quantization.method: 8bit": {},
    "evaluation.generation.enabled: true": {"max_new_tokens": 8},
    "early_stopping.enabled: true": {"metric": "nll_per_token", "patience": 1},
    "data.task.name: prompt_completion": {},
    "data.task.name: alpaca": {},
    "data.task.name: summarization": {"prompt": "{document}"},
    "data.task.name: sst2": {"prompt": "{sentence}"},
    "data.task.name: squad_v2": {"prompt": "{context} {question}"},
    "data.task.name: oasst1": {},
    "data.task.name: python": {"function": "a.py:b"},
}
# The part of BASE that gives way to an example.
INSTEAD: Mapping[str, str] = {
    "training.gradient_accumulation_steps": "training.global_batch_size",
    "training.max_steps": "training.num_train_epochs",
    "quantization.method": "quantization",
    "data.task.name": "data.task",
    "early_stopping.enabled": "early_stopping",
}
CONTRAST = {"axis": "loss", "from": "full", "to": "completion", "metric": "nll_per_token"}
# Keys that an item of a list needs in addition to the explained one.
ITEMS: dict[str, list[dict[str, Any]]] = {
    "run.declared": [CONTRAST],
    "data.train": [{"path": "a", "num_samples": 8}],
    "evaluation.metrics": [{"name": "m", "function": "a.py:b", "mode": "max"}],
}
# Keys that a section needs if BASE leaves it out.
NEEDED: dict[str, dict[str, Any]] = {
    "data.validation": {"path": "a"},
    "data.test": {"path": "a"},
    "checkpoints.remote": {"url": "file:///a"},
}
# Optional keys that BASE states, since a recipe needs one of several.
STATED = {
    "data.num_train_samples",
    "data.num_validation_samples",
    "data.num_test_samples",
    "data.train.N.num_samples",
    "training.global_batch_size",
    "training.num_train_epochs",
}
KEYS = list_all_keys()
IDS = [f"{key.path} {key.goes_with or ''}".strip() for key in KEYS]


def build_values(key: Key, *, for_example: bool = False) -> dict[str, Any]:
    """BASE, made ready for a key: the kind of its section, an item of its list."""
    values: dict[str, Any] = yaml.safe_load(BASE)
    if for_example and key.path in INSTEAD:
        delete(values, INSTEAD[key.path])
    if key.goes_with is not None:
        tag, _, value = key.goes_with.partition(": ")
        *parts, name = tag.split(".")
        kind = {name: True if value == "true" else value, **KINDS[key.goes_with]}
        merge(values, nest(parts, kind), is_replaced=tag == "data.task.name")
    if key.path.startswith("evaluation.metrics"):
        merge(values, {"evaluation": {"generation": {"enabled": True, "max_new_tokens": 8}}})
    for place, needed in NEEDED.items():
        if key.path.startswith(f"{place}."):
            merge(values, nest(place.split("."), dict(needed)))
    if ".N." in key.path:
        place = key.path.partition(".N.")[0]
        items = [dict(item) for item in ITEMS[place]]
        if for_example and key.path.endswith(".weight"):
            del items[0]["num_samples"]
        merge(values, nest(place.split("."), items))
    return values


def delete(values: Any, path: str) -> None:
    *parts, last = path.split(".")
    for part in parts:
        values = values[0 if part == "N" else part]
    del values[last]


def find(values: Any, path: str) -> Any:
    """The value of a path; KeyError if it is not stated."""
    for part in path.split("."):
        values = values[0 if part == "N" else part]
    return values


def nest(parts: list[str], value: Any) -> Any:
    for part in reversed(parts):
        value = {part: value}
    return value


def merge(values: dict[str, Any], more: Mapping[str, Any], *, is_replaced: bool = False) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            if is_replaced and name == "task":
                values[name] = {}
            merge(values[name], value, is_replaced=is_replaced)
        elif isinstance(value, list) and isinstance(values.get(name), list) and values[name]:
            if isinstance(value[0], dict):
                values[name] = [{**values[name][0], **value[0]}]
            else:
                values[name] = value
        else:
            values[name] = value


def parse(values: Mapping[str, Any]) -> Recipe:
    return parse_recipe(yaml.safe_dump(dict(values)), where="example")


def test_the_list_has_every_key_that_the_parser_knows() -> None:
    """By another way: the classes themselves, as `habits` walks them."""
    from runner.recipe.habits import list_keys

    known = {path for paths in list_keys(Recipe).values() for path in paths}
    listed = {key.path.replace(".N.", ".") for key in KEYS if not key.path.startswith("run.")}
    assert known <= listed, known - listed
    sections = {group.path for group in list_groups()}
    assert {path for path in listed - known if path not in sections} == {"evaluation.metrics"}


@pytest.mark.parametrize("key", KEYS, ids=IDS)
def test_a_key_has_a_meaning_and_says_what_null_is(key: Key) -> None:
    assert len(key.meaning) > 10, key.path
    assert "any" not in key.type.replace("any scalar", ""), key.path
    if key.passed_to is not None:
        return  # the library's words
    assert key.meaning[-1] == "." and key.meaning[:4] not in ("What", "Whet", "How "), key.path
    if key.default is None and not key.is_required:
        assert "null: " in key.meaning or "null with" in key.meaning, key.path


OURS = [key for key in KEYS if not key.passed_to]


@pytest.mark.parametrize("key", [k for k in OURS if k.is_required], ids=lambda key: key.path)
def test_a_required_key_is_required(key: Key) -> None:
    values = build_values(key)
    parse(values)
    delete(values, key.path)
    with pytest.raises(RecipeError, match=r"missing|needs the key"):
        parse(values)


@pytest.mark.parametrize("key", [k for k in OURS if not k.is_required], ids=lambda key: key.path)
def test_a_default_is_what_the_parser_applies(key: Key) -> None:
    values = build_values(key)
    try:
        find(values, key.path)
    except (KeyError, TypeError):
        dumped = parse(values).model_dump(mode="json", by_alias=True)
        assert find(dumped, key.path) == key.default, key.path
    else:
        assert key.path in STATED and key.default is None, key.path


def test_the_defaults_of_passed_on_keys_are_the_libraries() -> None:
    """The table has them; `test_hf_fields` compares it with the installed libraries."""
    keys = [key for key in KEYS if key.passed_to]
    assert len(keys) > 60
    for key in keys:
        config: Any = str(key.passed_to).rpartition(".")[2]
        assert load_table(config)[key.path.rpartition(".")[2]]["default"] == key.default, key.path


@pytest.mark.parametrize("key", KEYS, ids=IDS)
def test_an_example_is_accepted(key: Key) -> None:
    values = build_values(key, for_example=True)
    merge(values, yaml.safe_load(key.build_example()))
    parsed = find(parse(values).model_dump(mode="json", by_alias=True), key.path)
    if not isinstance(key.example, dict | list):
        assert parsed == key.example, key.path


def test_numbers_in_examples_are_read_as_the_recipe_reader_reads_them() -> None:
    key = find_keys("training.adam_epsilon")
    assert key is not None and "adam_epsilon: 1e-08" in key.keys[0].build_example()
    values = yaml.safe_load(BASE)
    text = yaml.safe_dump(values).replace("training:\n", "training:\n  adam_epsilon: 1e-08\n")
    assert parse_recipe(text, where="example").training.adam_epsilon == 1e-8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ("loss", ["loss"]),
        ("learning_rate", ["training.learning_rate"]),
        ("seed", ["data.seed", "training.seed"]),
        ("data.train.0.weight", ["data.train.N.weight"]),
        ("data.train.weight", ["data.train.N.weight"]),
        ("lora_rank", ["adapter.r"]),
        ("qlora", ["adapter.method", "quantization.method"]),
        ("conversations", ["data.task.name"]),
        ("retries.lost", ["launch.retries.lost"]),
    ],
)
def test_a_query_finds_keys(query: str, paths: list[str]) -> None:
    found = find_keys(query)
    assert found is not None and [key.path for key in found.keys] == paths


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ("quantization", {"quantization"}),
        ("alpaca", {"data.task"}),
        ("launch", {"launch", "launch.retries"}),
        ("evaluation.metrics", {"evaluation.metrics.N"}),
    ],
)
def test_a_query_finds_sections(query: str, paths: set[str]) -> None:
    found = find_keys(query)
    assert found is not None and {group.path for group in found.groups} == paths


@pytest.mark.parametrize("query", ["training.output_dir", "output_dir", "adapter.task_type"])
def test_an_owned_key_is_explained(query: str) -> None:
    found = find_keys(query)
    assert found is not None and found.owned is not None and found.owned.decided_by


@pytest.mark.parametrize(
    ("query", "near"),
    [
        ("lerning_rate", "training.learning_rate"),
        ("training.lerning_rate", "training.learning_rate"),
        ("trainig.learning_rate", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("quant", "quantization"),
        ("zzz", None),
    ],
)
def test_a_misspelt_key_has_a_suggestion(query: str, near: str | None) -> None:
    assert find_keys(query) is None
    assert suggest_key(query) == near


def test_one_line_yaml_is_read_back() -> None:
    for key in KEYS:
        for value in (key.default, key.example):
            said = say_yaml(value)
            text = f"value: {said}"
            if isinstance(value, float):  # YAML 1.1 wants a dot, the recipe reader does not
                assert float(said) == value
            else:
                assert yaml.safe_load(text) == {"value": value}, key.path
