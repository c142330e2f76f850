"""Finds plain YAML values that do not mean what they look like: `no` is false, `010` is 8, `1:30`
is 90, a date is not a text. Quotes, or the value that YAML reads, make the meaning clear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import yaml

from runner.errors import Problem

_TAG: Final = "tag:yaml.org,2002:"
_LEADING_ZERO: Final = re.compile(r"[-+]?0[0-9][0-9_.]*([eE][-+]?[0-9]+)?")
_OCTAL: Final = re.compile(r"[-+]?0o[0-7]+")
# Digits in groups of three; other underscores belong to names, such as 1_2.
_GROUPED: Final = re.compile(r"[-+]?[0-9]{1,3}(_[0-9]{3})+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_PREFIXED: Final = re.compile(r"[-+]?0[xb]")
_SHORT_BOOLEANS: Final = {"y": "true", "n": "false"}
_MAX_SHOWN: Final = 40


def find_changed_scalars(root: yaml.Node, read: Callable[[yaml.Node], Any]) -> list[Problem]:
    """A problem for each plain value below `root` that YAML reads as something else, and for each
    key that it does not read as a text.

    `read` returns the value of a scalar. The caller has limited the growth through aliases; a node
    that they repeat is checked once.
    """
    seen: set[int] = set()

    def walk(node: yaml.Node, path: str) -> Iterator[Problem]:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{path}.{key.value}" if path else str(key.value)
                if isinstance(key, yaml.ScalarNode) and (what := _describe_key(key, read)):
                    yield Problem(name, what, key.start_mark.line + 1)
                yield from walk(value, name)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from walk(item, f"{path}.{index}" if path else str(index))
        elif isinstance(node, yaml.ScalarNode) and (what := _describe_change(node, read)):
            yield Problem(path, what, node.start_mark.line + 1)

    return list(walk(root, ""))


def _describe_key(node: yaml.ScalarNode, read: Callable[[yaml.Node], Any]) -> str | None:
    kind = node.tag.removeprefix(_TAG)
    if not _is_plain(node) or kind not in ("bool", "int", "float", "null", "timestamp"):
        return None
    taken = node.value if kind == "timestamp" else _show(read(node))
    return f"got the key {taken}, expected a text: write '{node.value}' in quotes"


def _describe_change(node: yaml.ScalarNode, read: Callable[[yaml.Node], Any]) -> str | None:
    """YAML's reading of a plain value, and the text to write instead; None if the value means what
    it looks like.
    """
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if not _is_plain(node):
        return None
    if kind == "bool" and text.lower() not in ("true", "false"):
        meant = _show(read(node))
        return f"YAML reads the plain {text} as {meant}: write '{text}' in quotes, or {meant}"
    if kind == "str" and text.lower() in _SHORT_BOOLEANS:
        meant = _SHORT_BOOLEANS[text.lower()]
        return f"some read the plain {text} as {meant}: write '{text}' in quotes, or {meant}"
    if kind == "timestamp":
        return f"YAML reads the plain {text} as a date: write '{text}' in quotes"
    if kind == "value":  # a single =, which PyYAML cannot construct
        return f"the plain {text} has a special meaning in YAML: write '{text}' in quotes"
    if kind in ("int", "float") and _is_changed_number(text):
        meant = _show(read(node))
        return (
            f"YAML reads the plain {_cut(text)} as the number {meant}:"
            f" write '{_cut(text)}' in quotes, or {meant}"
        )
    if kind == "str" and (number := _read_as_number(text)) is not None:
        return (
            f"YAML reads the plain {_cut(text)} as a text, although it looks like a number:"
            f" write '{_cut(text)}' in quotes, or {_cut(number)}"
        )
    return None


def _read_as_number(text: str) -> str | None:
    """The number that people mean by a text, if it is `0o...` or has leading zeros and an 8 or 9.
    Without an 8 or 9, YAML reads leading zeros as octal.
    """
    if _OCTAL.fullmatch(text):
        return str(int(text, 8))
    if _LEADING_ZERO.fullmatch(text) and re.search("[89]", text):
        return re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
    return None


def _is_changed_number(text: str) -> bool:
    if ":" in text:  # in base 60
        return True
    if _PREFIXED.match(text):  # hexadecimal and binary numbers are read as expected
        return False
    if _LEADING_ZERO.fullmatch(text):
        return not re.match(r"[-+]?0\.", text)
    return "_" in text and not _GROUPED.fullmatch(text)


def _is_plain(node: yaml.ScalarNode) -> bool:
    return not node.style  # the parser in C returns "", the one in Python None


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return _cut(str(value).lower() if isinstance(value, bool) else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
