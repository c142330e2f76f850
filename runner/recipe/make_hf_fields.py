"""Writes `runner/hf_fields.json`: names, types and choices of the fields of `trl.SFTConfig` and
`peft.LoraConfig`.

The launch side checks recipes against that table without importing torch. Run `python -m
runner.recipe.make_hf_fields` after an upgrade; a test compares the committed table with the
installed libraries.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

TABLE_PATH = Path(__file__).with_name("hf_fields.json")

_JSON_TYPES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    dict: "dict",
    type(None): "null",
}


def describe_type(annotation: Any) -> tuple[list[str], list[str]]:
    """The JSON type names and the string choices that an annotation admits; library classes admit
    nothing.

    >>> describe_type(int | None)
    (['int', 'null'], [])
    >>> describe_type(list[str] | str)
    (['list', 'str'], [])
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [describe_type(part) for part in typing.get_args(annotation)]
        return [name for names, _ in parts for name in names], [
            c for _, choices in parts for c in choices
        ]
    if origin is typing.Literal:
        texts = [value for value in typing.get_args(annotation) if isinstance(value, str)]
        kinds = {type(value) for value in typing.get_args(annotation) if not isinstance(value, str)}
        return [*(["str"] if texts else []), *(_JSON_TYPES[kind] for kind in kinds)], texts
    if origin in (list, dict, tuple):
        return ["dict" if origin is dict else "list"], []
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [], [str(member.value) for member in annotation]
    return ([_JSON_TYPES[annotation]], []) if annotation in _JSON_TYPES else ([], [])


def describe_fields(config: type) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """`name -> (JSON types, choices)` for the fields of a dataclass that a recipe can state."""
    described = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds, choices = describe_type(hints[field.name])
        # A pattern written as a choice: pissa_niter_[number of iters]
        if any("[" in choice for choice in choices):
            choices = []
        if kinds:
            # The order in which a union was written is lost where another module wrote the same
            # union first: `typing` keeps one of the two.
            ordered = sorted(set(kinds), key=lambda kind: (kind == "null", kind))
            described[field.name] = (tuple(ordered), tuple(sorted(set(choices))))
    return described


def build_table() -> str:
    """The text of `runner/hf_fields.json`, one line per field."""
    from peft import LoraConfig
    from trl import SFTConfig

    blocks = []
    for config in (SFTConfig, LoraConfig):
        fields = ",\n".join(
            f'    "{name}": {json.dumps({"types": kinds, "choices": choices})}'
            for name, (kinds, choices) in describe_fields(config).items()
        )
        blocks.append(f'  "{config.__name__}": {{\n{fields}\n  }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    TABLE_PATH.write_text(build_table())
