"""Reads YAML texts: the plain values of a recipe, grid or model card, with overrides applied.

Knows no section: `parse` validates the values. `problems` writes the error messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import yaml
from omegaconf import DictConfig, OmegaConf

from runner.errors import Problem, RecipeError
from runner.recipe.problems import (
    SAFE_LOADER,
    describe_error,
    escape_missing,
    find_hazards,
    find_unusable_values,
    read_escapes,
)
from runner.recipe.scalars import find_changed_scalars

MAX_RECIPE_BYTES: Final = 1_000_000
_MAX_VALUES: Final = 10_000
_KIND_KEYS: Final = (
    "adapter.method",
    "quantization.method",
    "early_stopping.enabled",
    "evaluation.generation.enabled",
    "data.task.name",
)


def read_values(
    text: str, *, where: str, overrides: Sequence[str] = (), hint: str | None = None
) -> str:
    """The plain values of a YAML text with overrides applied, as JSON, not yet validated.

    Raises:
        RecipeError: the text cannot be read, or holds something that no recipe may.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(where, [Problem("(file)", f"longer than {MAX_RECIPE_BYTES:,} bytes", 1)])
    if problems := find_hazards(text, overrides):
        raise RecipeError(where, problems, hint=hint)
    overridden = frozenset(list_typed(overrides))
    container, problems = _load(text, overrides, overridden)
    problems = problems or find_unusable_values(container, text, overridden)
    if problems:
        raise RecipeError(where, problems, hint=hint)
    return json.dumps(map_texts(read_escapes, container))


def list_typed(overrides: Sequence[str]) -> dict[str, str]:
    """`key -> value`, as typed."""
    parts = [override.partition("=") for override in overrides]
    return {key: value for key, _, value in parts}


# YAML's type for each plain text. The recipes of a grid hold the same few texts, and matching each
# one again takes a third of the time of reading them.
_KNOWN_TAGS: Final[dict[str, str]] = {}
_MAX_KNOWN_TAGS: Final = 10_000
_TAG: Final = "tag:yaml.org,2002:"
_TEXT: Final = f"{_TAG}str"


class _Loader(SAFE_LOADER):  # type: ignore[misc]
    """YAML 1.1 as OmegaConf reads it: `1e-5` is a number, a date is a text."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Like the method of PyYAML, with a cache."""
        if kind is not yaml.ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)
        tag = _KNOWN_TAGS.get(value)
        if tag is None:
            tag = super().resolve(kind, value, implicit)
            if len(_KNOWN_TAGS) < _MAX_KNOWN_TAGS:
                _KNOWN_TAGS[value] = tag
        return tag


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)


def _read_plainly(text: str) -> tuple[Any, list[Problem]]:
    """The value of a text, or a problem for each plain value that YAML would change.

    Raises:
        yaml.YAMLError: the text is not YAML, repeats a key, or grows too large through aliases.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        _count_values(node, {})
        problems = find_changed_scalars(node, loader.construct_object)
        return (None, problems) if problems else (_construct(node, loader), [])
    finally:
        loader.dispose()


def _construct(node: yaml.Node, loader: _Loader) -> Any:
    """Like `construct_document`, in a third of the time. PyYAML still reads everything but plain
    mappings, lists and texts.
    """
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_construct(item, loader) for item in node.value]
    if (
        isinstance(node, yaml.MappingNode)
        and kind == "map"
        and all(isinstance(key, yaml.ScalarNode) and key.tag == _TEXT for key, _ in node.value)
    ):
        return {key.value: _construct(value, loader) for key, value in node.value}
    return loader.construct_object(node, deep=True)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values at and below a node, each counted as often as aliases repeat it.

    `counts` maps the `id` of a counted node to its number, and of a node in progress to 0.
    """
    if id(node) in counts:
        if not counts[id(node)]:
            raise _refuse("an alias is inside the value that it repeats", node)
        return counts[id(node)]
    counts[id(node)], total = 0, 1
    if isinstance(node, yaml.MappingNode):
        names: set[tuple[str, str]] = set()
        for key, value in node.value:
            total += _count_values(key, counts) + _count_values(value, counts)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in names:
                    raise _refuse(f"found duplicate key {key.value}", key)
                names.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(item, counts) for item in node.value)
    if total > _MAX_VALUES:
        raise _refuse(f"holds more than {_MAX_VALUES:,} values, aliases expanded", node)
    counts[id(node)] = total
    return total


def _refuse(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _load(
    text: str, overrides: Sequence[str], overridden: frozenset[str]
) -> tuple[Any, list[Problem]]:
    """The text with overrides applied, as plain dicts and lists, or the problems that prevent
    that.
    """
    is_in_text = True
    try:
        container, problems = _read_plainly(text)
        problems += _find_changed_overrides(overrides)
        if problems:
            return None, problems
        container = {} if container is None else container
        if type(container) is not dict:
            return None, [Problem("(file)", "must be a mapping of sections", 1)]
        if overrides:
            is_in_text = False
            changes = OmegaConf.from_dotlist(list(overrides))
            if problems := _refuse_parts_of_lists(container, overridden):
                return None, problems
            merged = _merge_overrides(OmegaConf.create(container), changes, overridden)
            container = OmegaConf.to_container(merged, resolve=False, throw_on_missing=True)
            container = map_texts(escape_missing, container)  # OmegaConf removed the backslash
        return container, []
    # OmegaConf raises AssertionError, IndexError and others in addition to its own errors.
    except Exception as error:
        return None, [describe_error(error, text, overridden, is_in_text=is_in_text)]


def _find_changed_overrides(overrides: Sequence[str]) -> list[Problem]:
    """The problems that `_read_plainly` finds in the values of overrides. OmegaConf reports those
    that are not YAML.
    """
    problems: list[Problem] = []
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            found = _read_plainly(text)[1]
        except (yaml.YAMLError, ValueError):
            continue
        for one in found:
            place = f"{key}.{one.key}" if one.key else key
            problems.append(Problem(place, one.what))
    return problems


def map_texts(function: Callable[[str], Any], value: Any) -> Any:
    """A value with each of its texts replaced, except keys."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: map_texts(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(function, item) for item in value]
    return value


# Keys that hold one section or a list of several.
_ONE_OR_MANY_KEYS: Final = ("data.train",)


def _refuse_parts_of_lists(container: Any, overridden: frozenset[str]) -> list[Problem]:
    """A problem for each override inside a list of sections: it does not say which section."""
    problems = []
    for key in _ONE_OR_MANY_KEYS:
        value = container
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        parts = sorted(name for name in overridden if name.startswith((f"{key}.", f"{key}[")))
        if isinstance(value, list) and parts and key not in overridden:
            problems += [
                Problem(name, f"`{key}` is a list here: override the whole list, {key}=[...]")
                for name in parts
            ]
    return problems


def _merge_overrides(
    config: DictConfig, overrides: DictConfig, overridden: frozenset[str]
) -> DictConfig:
    for key in _ONE_OR_MANY_KEYS:
        before, after = OmegaConf.select(config, key), OmegaConf.select(overrides, key)
        # OmegaConf cannot merge one section with a list of several.
        if key in overridden and OmegaConf.is_list(before) != OmegaConf.is_list(after):
            OmegaConf.update(config, key, after, merge=False)
    for key in _KIND_KEYS:
        kind = OmegaConf.select(overrides, key)
        if kind is not None and kind != OmegaConf.select(config, key):
            OmegaConf.update(config, key.rpartition(".")[0], {}, merge=False)
    merged = OmegaConf.merge(config, overrides)
    assert isinstance(merged, DictConfig)
    return merged
