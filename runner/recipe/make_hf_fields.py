"""Writes `hf_fields.json`: types, choices, defaults and help of the fields of `trl.SFTConfig` and
`peft.LoraConfig`.

The launch side checks recipes against that table, and explains their keys by it, without importing
torch. Run `python -m runner.recipe.make_hf_fields` after an upgrade; a test compares the committed
table with the installed libraries.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
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
    """The JSON type names and the string choices that an annotation accepts; none for a
    library class.

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
    """`name -> (JSON types, choices)` for the fields of a dataclass that a recipe can
    state.
    """
    described = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds, choices = describe_type(hints[field.name])
        # A pattern written as a choice: pissa_niter_[number of iters]
        if any("[" in choice for choice in choices):
            choices = []
        if kinds:
            # `typing` caches unions: if another module wrote the same union in another order, that
            # order is the one seen here.
            ordered = sorted(set(kinds), key=lambda kind: (kind == "null", kind))
            described[field.name] = (tuple(ordered), tuple(sorted(set(choices))))
    return described


def describe_default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """`{"default": value}`, or nothing for a default that JSON cannot hold."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    try:
        return {"default": json.loads(json.dumps(value))}
    except TypeError:
        return {}


def read_help(field: dataclasses.Field[Any]) -> str:
    """The library's help for a field, on one line and without HTML.

    >>> read_help(dataclasses.field(metadata={"help": "Slower (~20%%),\\n see <a href='u'>x</a>"}))
    'Slower (~20%), see x (u)'
    """
    text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    return re.sub(r"<a href='([^']*)'>(.*?)</a>", r"\2 (\1)", text)


def build_table() -> str:
    """The text of `hf_fields.json`, one line per field."""
    from peft import LoraConfig
    from trl import SFTConfig

    blocks = []
    for config in (SFTConfig, LoraConfig):
        fields = {field.name: field for field in dataclasses.fields(config)}
        lines = []
        for name, (kinds, choices) in describe_fields(config).items():
            entry = {"types": kinds, "choices": choices, **describe_default(fields[name])}
            entry["help"] = read_help(fields[name])
            lines.append(f'    "{name}": {json.dumps(entry, ensure_ascii=False)}')
        joined = ",\n".join(lines)
        blocks.append(f'  "{config.__name__}": {{\n{joined}\n  }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    TABLE_PATH.write_text(build_table())
