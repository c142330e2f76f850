"""Sets or removes a key of a recipe template line by line, and keeps comments.

Handles only templates as `runner init` writes them: block mappings with two spaces per level, and
mappings in braces on one line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from runner.errors import GridError
from runner.grid.template import quote_yaml
from runner.recipe.problems import SAFE_LOADER


@dataclass(frozen=True)
class _Line:
    """The line of a key: its position, its value as written, the comment, and the position after
    the block below it.
    """

    at: int
    value: str
    comment: str
    end: int


def set_key(template: str, key: str, value: str) -> str:
    """The template with the text `value` at a dotted key.

    >>> print(set_key("a:\\n  b: 1 # one\\nc: {d: 2}", "a.b", "3"))
    a:
      b: 3 # one
    c: {d: 2}
    >>> print(set_key("a:\\n  b: 1\\nc: {d: 2}", "c.e", "{{ e | yaml }}"))
    a:
      b: 1
    c:
      d: 2
      e: {{ e | yaml }}

    Raises:
        GridError: the key is a section, or is inside something that is not a section.
    """
    lines = template.split("\n")
    parts = key.split(".")
    start, end = 0, len(lines)
    for depth, part in enumerate(parts):
        indent = "  " * depth
        found = _find(lines, start, end, indent, part)
        if found is None:
            while end > start and not lines[end - 1].strip():
                end -= 1
            lines[end:end] = _open_sections(parts[depth:], depth, value)
            break
        if depth == len(parts) - 1:
            if found.end > found.at + 1:
                raise GridError(f"`{key}` is a section of the recipe, not a value")
            lines[found.at] = f"{indent}{part}: {value}{found.comment}"
            break
        start, end = found.at + 1, found.end
        if found.value:
            below = _unfold(found, key, indent)
            lines[found.at : found.at + 1] = [f"{indent}{part}:{found.comment}", *below]
            end = start + len(below)
    return "\n".join(lines)


def drop_key(template: str, key: str) -> str:
    """The template without the line of a dotted key in a block mapping, if it has one."""
    lines = template.split("\n")
    start, end = 0, len(lines)
    found = None
    for depth, part in enumerate(key.split(".")):
        found = _find(lines, start, end, "  " * depth, part)
        if found is None:
            return template
        start, end = found.at + 1, found.end
    if found is not None:
        del lines[found.at : found.end]
    return "\n".join(lines)


def _find(lines: Sequence[str], start: int, end: int, indent: str, name: str) -> _Line | None:
    pattern = re.compile(
        rf"{indent}{re.escape(name)}:(?: +(?!#)(\"(?:[^\"\\]|\\.)*\"|.*?))?(\s+#.*)?\s*"
    )
    for at in range(start, end):
        if match := pattern.fullmatch(lines[at]):
            after = at + 1
            while after < end and lines[after].startswith(f"{indent} "):
                after += 1
            return _Line(at, match[1] or "", match[2] or "", after)
    return None


def _open_sections(parts: Sequence[str], depth: int, value: str) -> list[str]:
    rows = [f"{'  ' * (depth + below)}{part}:" for below, part in enumerate(parts)]
    rows[-1] += f" {value}"
    return rows


def _unfold(found: _Line, key: str, indent: str) -> list[str]:
    """The lines of a mapping that is written on one line."""
    try:
        value: Any = yaml.load(found.value, Loader=SAFE_LOADER)
    except yaml.YAMLError:
        value = found.value
    if not isinstance(value, dict | None):
        raise GridError(f"`{key}` is inside {found.value}, which is not a section of the recipe")
    return [f"{indent}  {name}: {quote_yaml(item)}" for name, item in (value or {}).items()]
