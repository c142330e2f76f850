"""Words the problems of a recipe: line, dotted key, what was found, what is accepted, the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from runner.errors import Problem
from runner.hf_fields import OWNED_TRAINING_FIELDS

_RESOLVER: Final = re.compile(r"\$\{\s*[\w.]+\s*:")
_EXPECTED: Final = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
# Old names that people still type.
_RENAMED: Final = {
    "group_by_length": "train_sampling_strategy: group_by_length",
    "warmup_ratio": "warmup_steps, which takes a fraction below 1",
    "evaluation_strategy": "evaluation.eval_strategy",
    "max_seq_length": "data.max_length",
}


def find_lines(text: str) -> dict[str, int]:
    """The 1-based line of every dotted key of a YAML text.

    >>> find_lines("a:\\n  b: 1\\n  c: [x]\\n")
    {'a': 1, 'a.b': 2, 'a.c': 3, 'a.c.0': 3}
    """
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key = f"{prefix}{key_node.value}"
                lines[key] = key_node.start_mark.line + 1
                walk(value_node, f"{key}.")
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[f"{prefix}{index}"] = item.start_mark.line + 1
                walk(item, f"{prefix}{index}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return lines


def find_resolvers(value: Any, text: str, prefix: str = "") -> list[Problem]:
    """A problem for every `${resolver:...}`: a recipe may refer to its own keys, and to nothing else."""
    if isinstance(value, Mapping):
        return [p for key, item in value.items() for p in find_resolvers(item, text, f"{prefix}{key}.")]
    if isinstance(value, list):
        return [p for index, item in enumerate(value) for p in find_resolvers(item, text, f"{prefix}{index}.")]
    if isinstance(value, str) and _RESOLVER.search(re.sub(r"(?<!\\)(\\\\)*\\\$\{", "", value)):
        key = prefix.removesuffix(".")
        what = f"got {value!r}: a recipe may refer to its own keys only, not to the environment or a resolver"
        return [Problem(key, what, find_lines(text).get(key))]
    return []


def list_problems(
    error: ValidationError, container: Any, text: str, overridden: frozenset[str] = frozenset()
) -> list[Problem]:
    """One problem per mistake, in the order of the file."""
    lines = find_lines(text)
    problems: dict[tuple[str, str], Problem] = {}
    for detail in error.errors():
        path = _visible_path(detail, container)
        key = ".".join(path)
        is_override = any(name == key or name.startswith(f"{key}.") for name in overridden)
        line = None if is_override else _nearest_line(path, lines)
        what = _describe(detail, path, container)
        problems.setdefault((key, what), Problem(key or "(recipe)", what, line))
    return sorted(problems.values(), key=lambda problem: problem.line or 0)


def _visible_path(detail: ErrorDetails, container: Any) -> tuple[str, ...]:
    """The location without the tags that pydantic adds for unions: only parts that the file has, and a last new key."""
    path: list[str] = []
    value = container
    location = detail["loc"]
    for position, part in enumerate(location):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (position == len(location) - 1 and detail["type"] in ("missing", "union_tag_not_found")):
            continue
        path.append(str(part))
    return tuple(path)


def _nearest_line(path: tuple[str, ...], lines: Mapping[str, int]) -> int:
    for length in range(len(path), 0, -1):
        if (line := lines.get(".".join(path[:length]))) is not None:
            return line
    return 1


def _describe(detail: ErrorDetails, path: tuple[str, ...], container: Any) -> str:
    kind, found = detail["type"], _name_value(detail["input"])
    if kind == "extra_forbidden":
        return _describe_unknown_key(path[-1], detail)
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'|\b(True|False|\d+)\b", str(detail.get("ctx", {}).get("expected", "")))
        names = [text or other.lower() for text, other in choices]
        return f"got {found}, expected {_list_names(names)}{_suggest(str(detail['input']), names)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = detail.get("ctx", {})
        field = str(context.get("discriminator", "")).strip("'")
        names = re.findall(r"'([^']*)'|\b(?:True|False)\b", str(context.get("expected_tags", "")))
        if kind == "union_tag_not_found":
            return f"needs the key `{field}`"
        return f"`{field}` is {_name_value(context.get('tag'))}, expected {_list_names([n for n in names if n])}"
    if kind in _EXPECTED:
        return f"got {found}, expected {_EXPECTED[kind]}"
    if kind == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"])).split("\n\nhint")[0]
    return f"got {found}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _describe_unknown_key(name: str, detail: ErrorDetails) -> str:
    from runner.recipe import Recipe

    if "training" in detail["loc"] and name in OWNED_TRAINING_FIELDS:
        return f"is not set here: it is decided by {OWNED_TRAINING_FIELDS[name]}"
    if name in _RENAMED:
        return f"unknown key, today it is {_RENAMED[name]}"
    known, section = _known_names(Recipe, detail["loc"][:-1]), detail["loc"][:-2]
    if name in _known_names(Recipe, section):
        return f"does not go with `{detail['loc'][-2]}`, which takes {_list_names(known)}"
    return "unknown key" + _suggest(name, known)


def _known_names(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """The field names that are accepted at a location, over all members of a union."""
    models = [model]
    for part in location:
        nested = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if nested:
            models = [m for annotation in nested for m in _models_in(annotation)]
        else:  # a union tag: narrow down to the members that carry it
            models = [m for m in models if any(_carries(field.annotation, part) for field in m.model_fields.values())]
    return [name for m in models for name in m.model_fields]


def _carries(annotation: Any, tag: int | str) -> bool:
    return [str(value).lower() for value in getattr(annotation, "__args__", ())] == [str(tag).lower()]


def _models_in(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean `{close[0]}`?" if close else ""


def _list_names(names: list[str]) -> str:
    shown = names if len(names) <= 8 else [*names[:7], f"{len(names) - 7} more"]
    return " or ".join(", ".join(shown).rsplit(", ", 1)) if shown else "another value"


def _name_value(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    return f"a {'mapping' if isinstance(value, Mapping) else 'list'}" if isinstance(value, dict | list) else repr(value)
