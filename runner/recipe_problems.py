"""Words the problems of a recipe: line, dotted key, what was found, what is accepted, the nearest known name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from runner.errors import MAX_SHOWN_PROBLEMS, Problem
from runner.hf_fields import OWNED_TRAINING_FIELDS
from runner.yaml_limits import calls_resolver, find_unusable_text

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
# The loader that OmegaConf prefers: the one in Python refuses some texts that this one takes.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Old names that people still type.
_RENAMED: Final = {
    "group_by_length": "train_sampling_strategy: group_by_length",
    "warmup_ratio": "warmup_steps, which takes a fraction below 1",
    "evaluation_strategy": "evaluation.eval_strategy",
    "max_seq_length": "data.max_length",
}


@lru_cache(maxsize=1)
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

    walk(yaml.compose(text, Loader=_LOADER), "")
    return lines


def find_line(key: str, text: str, overridden: frozenset[str] = frozenset()) -> int | None:
    """The line of a dotted key, or of the nearest section around it; None where an override set it."""
    if any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden):
        return None
    lines, path = find_lines(text), key.split(".")
    candidates = [".".join(path[:length]) for length in range(len(path), 0, -1)]
    return next((lines[name] for name in candidates if name in lines), 1)


def describe_syntax_error(error: Exception, text: str, overridden: frozenset[str], *, is_in_text: bool) -> Problem:
    """A problem from what YAML or OmegaConf refuses; `is_in_text` False: it came up among the overrides."""
    what = (str(getattr(error, "problem", None) or error) or "cannot be read").splitlines()[0]
    key = str(getattr(error, "full_key", None) or "")
    if not is_in_text:
        return Problem(key or ", ".join(sorted(overridden)), what)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return Problem("(YAML)", what, mark.line + 1)
    return Problem(key or "(YAML)", what, find_line(key, text, overridden) if key else 1)


def find_resolvers(value: Any, text: str, overridden: frozenset[str] = frozenset(), prefix: str = "") -> list[Problem]:
    """A problem for every reference to something else than a key of the recipe by its whole name."""
    what = "a recipe may refer to its own keys only, not to the environment or a resolver"
    return [
        Problem(key, f"got {item!r}: {what}", find_line(key, text, overridden))
        for key, item in _leaves(value, prefix)
        if isinstance(item, str) and calls_resolver(item)
    ]


def find_unusable_values(value: Any, text: str, overridden: frozenset[str] = frozenset()) -> list[Problem]:
    """A problem for everything that YAML can say and a recipe may not.

    That is what JSON cannot say (infinities, bytes, keys that are not texts), what is not for a terminal (recipes are
    shown there), and secrets that the text spells in an unusual way.
    """
    problems: list[Problem] = []
    texts = "\n".join(list_texts(value))
    is_suspect = find_unusable_text(texts) is not None  # all at once: one by one takes as long as everything else
    for key, item in _leaves(value):
        if isinstance(item, float) and not math.isfinite(item):
            problems.append(Problem(key, f"got {item}, expected a finite number", find_line(key, text, overridden)))
        elif isinstance(item, int) and abs(item) >= 2**63:
            problems.append(Problem(key, "got a number of more than 64 bits", find_line(key, text, overridden)))
        elif not isinstance(item, str | float | int | None):
            what = f"got a value of the type {type(item).__name__}, expected a text, a number, true, false or null"
            problems.append(Problem(key, what, find_line(key, text, overridden)))
        elif is_suspect and isinstance(item, str) and (wrong := find_unusable_text(item)):
            problems.append(Problem(key, wrong, find_line(key, text, overridden)))
    for key, name in _keys(value):
        if not isinstance(name, str):
            problems.append(Problem(key, f"got the key {name!r}, expected a text", find_line(key, text, overridden)))
        elif is_suspect and (wrong := find_unusable_text(name)):
            place = key.removesuffix(name).removesuffix(".")
            problems.append(Problem(place or "(YAML)", f"a key {wrong}", find_line(place, text, overridden)))
    return problems


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is neither a mapping nor a list."""
    if not isinstance(value, Mapping | list):
        yield prefix.removesuffix("."), value
        return
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(item, f"{prefix}{name}.")


def _keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and key of every mapping entry."""
    if isinstance(value, Mapping | list):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(value, Mapping):
                yield f"{prefix}{name}", name
            yield from _keys(item, f"{prefix}{name}.")


def list_texts(value: Any) -> Iterator[str]:
    """Every text, keys included."""
    yield from (item for _, item in _leaves(value) if isinstance(item, str))
    yield from (name for _, name in _keys(value) if isinstance(name, str))


def list_problems(
    error: ValidationError, container: Any, text: str, overridden: frozenset[str] = frozenset()
) -> list[Problem]:
    """One problem per mistake, in the order of the file; what comes after those that are shown is not worded well."""
    placed = [
        (path := _visible_path(detail, container), find_line(".".join(path), text, overridden), detail)
        for detail in error.errors()
    ]
    problems: dict[tuple[str, str], Problem] = {}
    for path, line, detail in sorted(placed, key=lambda item: item[1] or 0):
        key = ".".join(path)
        what = _describe(detail, path, container) if len(problems) < MAX_SHOWN_PROBLEMS else detail["msg"]
        problems.setdefault((key, what), Problem(key or "(recipe)", what, line))
    return list(problems.values())


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
