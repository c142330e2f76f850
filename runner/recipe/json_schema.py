"""The JSON Schema (draft 2020-12) of a recipe, for editors: completion, hover, unknown keys.

The types and texts are those of the section classes. A recipe that is accepted validates; what
depends on several keys ("exactly one of ...") is checked by `parse` alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from runner.recipe.hf_fields import REFUSED_VALUES, Config, load_table
from runner.recipe.parse import Recipe
from runner.recipe.schema import LoraBase, TrainingBase

Node = dict[str, Any]
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
# `definition -> the library's config that gets its fields, and the fields that are ours`.
PASSED_ON: Final[dict[str, tuple[Config, frozenset[str]]]] = {
    "GeneratedLora": ("LoraConfig", frozenset(LoraBase.model_fields)),
    "GeneratedTraining": ("SFTConfig", frozenset(TrainingBase.model_fields)),
}


def build_schema() -> Node:
    """The schema as a new dict."""
    return copy.deepcopy(_build_schema())


@cache
def _build_schema() -> Node:
    built = Recipe.model_json_schema()
    for node in _list_nodes(built):
        # Pydantic's titles repeat the key, and `discriminator` is OpenAPI's.
        node.pop("title", None)
        node.pop("discriminator", None)
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())
    definitions: dict[str, Node] = built["$defs"]
    for name, definition in definitions.items():
        _describe_tags(definition)
        if name in PASSED_ON:
            _state_library_values(definition, *PASSED_ON[name])
    for prop in built["properties"].values():
        if "$ref" in prop and "description" not in prop:
            prop["description"] = resolve(built, prop).get("description", "")
    for node in (built, *definitions.values()):
        for prop in node["properties"].values():
            prop["markdownDescription"] = _describe_for_editors(prop)
    return {
        "$schema": DIALECT,
        **{key: built[key] for key in ("type", "properties", "required", "additionalProperties")},
        "$defs": definitions,
    }


def _describe_for_editors(prop: Node) -> str:
    """The text under the cursor: editors show no default themselves."""
    text = str(prop.get("description", ""))
    if "default" in prop and "const" not in prop and not isinstance(prop["default"], dict):
        text += f"\n\nDefault: `{json.dumps(prop['default'], ensure_ascii=False)}`"
    return text


def resolve(schema: Node, node: Node) -> Node:
    """The definition that a node refers to, or the node itself."""
    reference = node.get("$ref")
    if reference is None:
        return node
    definition: Node = schema["$defs"][str(reference).rpartition("/")[2]]
    return definition


def first_sentence(text: str) -> str:
    """The first sentence of a description.

    A sentence that begins in lower case explains a value (`null: ...`) and belongs to the first.

    >>> first_sentence("Rows of GLUE. A label is 0 or 1."), first_sentence("A tag. null: none.")
    ('Rows of GLUE.', 'A tag. null: none.')
    """
    for end in range(len(text) - 2):
        is_end = text[end] == "." and text[end + 1] == " " and text[end + 2] in _STARTS_SENTENCE
        if is_end and not text[: end + 1].endswith(("e.g.", "i.e.")):
            return text[: end + 1]
    return text


_STARTS_SENTENCE: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ`'"


def _list_nodes(node: Node) -> Iterator[Node]:
    """Yield every schema within a schema; a property may be called `title`, so names are not
    mistaken for keywords.
    """
    yield node
    for keyword in ("properties", "$defs"):
        for child in node.get(keyword, {}).values():
            yield from _list_nodes(child)
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for child in node.get(keyword, ()):
            yield from _list_nodes(child)
    for keyword in ("items", "additionalProperties"):
        if isinstance(node.get(keyword), dict):
            yield from _list_nodes(node[keyword])


def _describe_tags(definition: Node) -> None:
    """Give the key that selects a section, such as `method`, the first sentence of that section."""
    for prop in definition["properties"].values():
        if "const" in prop and "description" not in prop:
            prop["description"] = first_sentence(definition.get("description", ""))


def _state_library_values(definition: Node, config: Config, own: frozenset[str]) -> None:
    """Give passed-on fields the library's default, and only the values that our trainer accepts."""
    table = load_table(config)
    for name, prop in definition["properties"].items():
        if name in own:
            continue
        prop.pop("default", None)
        if "default" in table[name]:
            prop["default"] = table[name]["default"]
        for node in _list_nodes(prop):
            if "enum" in node:
                refused = REFUSED_VALUES.get(name, {})
                node["enum"] = [value for value in node["enum"] if value not in refused]
