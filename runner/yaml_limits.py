"""What a YAML text may not do to whoever reads it: hold a secret, overflow the parser's stack, or grow when resolved.

OmegaConf's own limits (aliases, duplicates, 10,000 values) stay in force; these are the gaps that it leaves (measured
with omegaconf 2.4, libyaml 0.2.5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from runner.errors import CONTROLS, Problem
from runner.secrets import find_secret

_MAX_DEPTH: Final = 100
# Shorter texts cannot nest deep enough to matter. libyaml takes time with the square of the depth of brackets (0.6 s
# for 20,000), and a few ten thousand question marks end the process: it parses them by recursion in C.
_SURELY_SHALLOW_CHARACTERS: Final = 16_000
# 480,000 parts of `1:1:1:...` are one number to base 60, which takes minutes to add up.
_ENDLESS_NUMBER: Final = re.compile(r"[0-9:_.]{1000}")

MAX_RESOLVED_CHARACTERS: Final = 1_000_000
_CHARACTERS_PER_REFERENCE: Final = 100  # what one costs besides its text
_MAX_CHAIN: Final = 30  # references to keys that are references
_ESCAPED: Final = re.compile(r"(?<!\\)(\\\\)*\\\$\{")
_REFERENCE: Final = re.compile(r"\$\{\s*([A-Za-z_][\w-]*(?:\.[\w-]+)*)\s*\}")

_PARSER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def find_hazards(text: str, overrides: Sequence[str] = ()) -> list[Problem]:
    """Why a text, or overrides, must not even be parsed. No problem repeats a secret; comments count too."""
    problems: list[Problem] = []
    for override in overrides:
        key = override.partition("=")[0]
        if len(override) > _SURELY_SHALLOW_CHARACTERS:
            what = f"is longer than {_SURELY_SHALLOW_CHARACTERS:,} characters, which belongs into a recipe"
            problems.append(Problem("(override)", what))
        elif hazard := _find_hazard(override):
            problems.append(Problem("(key)" if find_unusable_text(key) else key, hazard[0]))
    if hazard := _find_hazard(text):
        line = text.count("\n", 0, hazard[1]) + 1
        problems.append(Problem(_name_line(text, line), hazard[0], line))
    return problems


def find_unusable_text(text: str) -> str | None:
    """What is wrong with a text for a recipe, which people read in terminals and commit; None if nothing is."""
    if control := CONTROLS.search(text):
        return f"holds the character {ascii(control[0])[1:-1]}, which no recipe may"
    if secret := find_secret(text):
        return f"holds {secret[0]}: secrets come from the environment only"
    return None


def calls_resolver(value: str) -> bool:
    """Whether a text refers to anything else than keys by their whole names.

    >>> [calls_resolver(text) for text in ("${a.b}", "${a.${b}}", "${oc.env:HOME}", "${.a}", r"\\${a:b}")]
    [False, True, True, True, False]
    """
    return "${" in _REFERENCE.sub("", _ESCAPED.sub("", value))


def find_growth(container: Any) -> list[Problem]:
    """A problem where the references of an unresolved recipe, all of them plain, would make it too long.

    Forty keys of which each is twice the one before are a terabyte.
    """
    sizes: dict[str, int] = {}

    def measure(value: Any, depth: int) -> int:
        if isinstance(value, str):
            names = _REFERENCE.findall(_ESCAPED.sub("", value)) if "${" in value else ()
            return len(value) + sum(_CHARACTERS_PER_REFERENCE + measure_key(name, depth + 1) for name in names)
        if isinstance(value, Mapping | list):
            return 1 + sum(measure(item, depth) for item in (value.values() if isinstance(value, Mapping) else value))
        return 1

    def measure_key(name: str, depth: int) -> int:
        if depth > _MAX_CHAIN:
            return MAX_RESOLVED_CHARACTERS + 1
        if name not in sizes:
            sizes[name] = measure(_select(container, name), depth)
        return sizes[name]

    if measure(container, 0) > MAX_RESOLVED_CHARACTERS:
        what = f"its references refer in a circle, or would make more than {MAX_RESOLVED_CHARACTERS:,} characters of it"
        return [Problem("(YAML)", what, 1)]
    return []


def _find_hazard(text: str) -> tuple[str, int] | None:
    """What it is, and where."""
    if secret := find_secret(text):
        return f"holds {secret[0]}: secrets come from the environment only", secret[1]
    if number := _ENDLESS_NUMBER.search(text):
        return "holds a number without end", number.start()
    if len(text) > _SURELY_SHALLOW_CHARACTERS and (position := _find_depth(text)) is not None:
        return f"is nested more than {_MAX_DEPTH} levels deep", position
    return None


def _find_depth(text: str) -> int | None:
    """Where a text gets too deep, found without building anything; None also for what the parser refuses."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                return event.start_mark.index if event.start_mark else 0
    except (yaml.YAMLError, ValueError):
        return None
    return None


def _name_line(text: str, line: int) -> str:
    """The key on a line as it is written there, if that tells where and no secret."""
    row = text.splitlines()[line - 1 : line] if line <= 10_000 else []
    key = re.match(r"[\s{,-]*([A-Za-z_][\w.-]*)\s*:", row[0]) if row else None
    return key[1] if key and len(key[1]) <= 60 and find_unusable_text(key[1]) is None else "(YAML)"


def _select(container: Any, name: str) -> Any:
    value = container
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and len(part) < 9 and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
