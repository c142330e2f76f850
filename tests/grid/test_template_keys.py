"""Keys that are set in, and taken out of, a recipe template."""

from __future__ import annotations

import pytest
import yaml

from runner.errors import GridError
from runner.grid.template_keys import drop_key, set_key

TEMPLATE = """\
{% set card = models[model] %}
run:
  name: {{ name | yaml }}

# Or: {method: 4bit}
quantization: {method: none}

data:
  train:
    path: "data # 1.jsonl"
  test: null # taken from `train`
  seed: 42 # the same rows

loss: {{ loss | yaml }}

evaluation:
  generation: {enabled: false} # {enabled: true}: answers
  eval_steps: 4
"""


def changed(key: str, value: str) -> tuple[set[str], set[str]]:
    """The lines that go and the lines that come."""
    before, after = TEMPLATE.splitlines(), set_key(TEMPLATE, key, value).splitlines()
    return set(before) - set(after), set(after) - set(before)


@pytest.mark.parametrize(
    ("key", "gone", "new"),
    [
        ("loss", {"loss: {{ loss | yaml }}"}, {"loss: 7"}),
        ("data.seed", {"  seed: 42 # the same rows"}, {"  seed: 7 # the same rows"}),
        ("data.train.path", {'    path: "data # 1.jsonl"'}, {"    path: 7"}),
        ("data.max_length", set(), {"  max_length: 7"}),
        ("data.train.split", set(), {"    split: 7"}),
        (
            "data.test.path",
            {"  test: null # taken from `train`"},
            {"  test: # taken from `train`", "    path: 7"},
        ),
        (
            "quantization.method",
            {"quantization: {method: none}"},
            {"quantization:", "  method: 7"},
        ),
        (
            "evaluation.generation.max_new_tokens",
            {"  generation: {enabled: false} # {enabled: true}: answers"},
            {
                "  generation: # {enabled: true}: answers",
                "    enabled: false",
                "    max_new_tokens: 7",
            },
        ),
        ("tracking.log.every", set(), {"tracking:", "  log:", "    every: 7"}),
    ],
)
def test_a_key_is_set_where_a_person_would_write_it(
    key: str, gone: set[str], new: set[str]
) -> None:
    assert changed(key, "7") == (gone, new)
    text = set_key(TEMPLATE, key, "7").replace("{%", "#").replace("{{", '"').replace("}}", '"')
    value = yaml.safe_load(text)
    for part in key.split("."):
        value = value[part]
    assert value == 7


@pytest.mark.parametrize("key", ["data", "data.train", "data.seed.x", "loss.x"])
def test_a_section_is_no_value(key: str) -> None:
    with pytest.raises(GridError):
        set_key(TEMPLATE, key, "7")


def test_a_key_is_taken_out() -> None:
    assert "eval_steps" not in drop_key(TEMPLATE, "evaluation.eval_steps")
    assert drop_key(TEMPLATE, "data.train") == TEMPLATE.replace(
        '  train:\n    path: "data # 1.jsonl"\n', ""
    )
    assert drop_key(TEMPLATE, "data.none") == drop_key(TEMPLATE, "none.seed") == TEMPLATE
