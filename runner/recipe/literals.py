"""Finds values that equal a fixed choice but have another type.

`true`, `1` and `1.0` are equal in Python, so pydantic accepts each of them where the only choices
are numbers or booleans, even in its strict mode.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

from runner.strict import Section


def find_inexact(section: Section, values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key of each value of another type than its choice, and the problem. `values` are
    those from which the section was parsed.
    """
    if not isinstance(values, Mapping):
        return
    choices_of = _list_choices(type(section))
    for name, field in type(section).model_fields.items():
        key = field.alias or name
        if key not in values:
            continue
        raw, value = values[key], getattr(section, name)
        if isinstance(value, Section):
            yield from find_inexact(value, raw, f"{prefix}{key}.")
        elif isinstance(value, tuple) and isinstance(raw, list):
            for at, (item, raw_item) in enumerate(zip(value, raw, strict=False)):
                if isinstance(item, Section):
                    yield from find_inexact(item, raw_item, f"{prefix}{key}.{at}.")
        elif name in choices_of and type(raw) is not type(value):
            choices = choices_of[name]
            is_switch = isinstance(choices[0], bool)
            expected = "true or false" if is_switch else " or ".join(map(str, choices))
            yield f"{prefix}{key}", f"got {json.dumps(raw)}, expected {expected}"


@cache
def _list_choices(kind: type[Section]) -> dict[str, tuple[Any, ...]]:
    """The choices of each field that accepts only certain numbers or booleans."""
    return {
        name: get_args(field.annotation)
        for name, field in kind.model_fields.items()
        if get_origin(field.annotation) is Literal
        and all(isinstance(one, int) for one in get_args(field.annotation))
    }
