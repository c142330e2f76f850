"""Every key of a recipe: type, default, choices, meaning and an example, read from the JSON Schema.

Finds a key by its dotted path, by its last part, or by a name from another trainer. Prints nothing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

from runner.recipe.habits import find_answer, list_names
from runner.recipe.hf_fields import (
    OWNED_LORA_FIELDS,
    OWNED_TRAINING_FIELDS,
    REFUSED_VALUES,
    Config,
    load_table,
)
from runner.recipe.json_schema import PASSED_ON, Node, build_schema, first_sentence, resolve
from runner.recipe.parse import Recipe

ITEM: Final = "N"  # the number of a list's item in a dotted path
_LIBRARIES: Final = {"SFTConfig": "trl.SFTConfig", "LoraConfig": "peft.LoraConfig"}
_MAX_LISTED_CHOICES: Final = 12
# Words that YAML reads as no text.
_NO_TEXTS: Final = frozenset({"yes", "no", "on", "off", "y", "n", "true", "false", "null"})
_PLAIN: Final = re.compile(r"(?:\d+(?=bit$))?[A-Za-z_][\w./@-]*(?::[\w./-]+)*(?: [\w./-]+)*")
# Keys that an example needs in addition to its own.
_COMPANIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "checkpoints.save_epochs": {"checkpoints.save_strategy": "epoch"},
    "checkpoints.save_steps": {"checkpoints.save_strategy": "steps"},
    "evaluation.eval_steps": {"evaluation.eval_strategy": "steps"},
    "tracking.hub_push": {"tracking.hub_model_id": "my-name/my-model"},
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe. `default` is None also for a required key."""

    path: str  # dotted; `N` is the number of a list's item
    type: str
    meaning: str
    is_required: bool = False
    default: Any = None
    choices: Mapping[str, str] = field(default_factory=dict)  # value -> meaning, which may be empty
    refused: Mapping[str, str] = field(default_factory=dict)  # value of the library -> reason
    goes_with: str | None = None  # `key: value` of the section's kind
    passed_to: str | None = None  # the library's config that gets the value
    example: Any = None  # a value
    example_keys: Mapping[str, Any] = field(default_factory=dict)  # path -> value, next to it

    @property
    def default_text(self) -> str:
        """The default as YAML, or `required`; `optional` for a section whose keys have defaults."""
        if self.is_required:
            return "required"
        is_section = self.type.startswith("section") and isinstance(self.default, dict)
        return "optional" if is_section else say_yaml(self.default)

    @property
    def is_kind(self) -> bool:
        """True if the key selects the kind of its section, such as `adapter.method`."""
        return any(self.choices.values())

    @property
    def summary(self) -> str:
        """The first sentence of the meaning, and the choices that the type does not show."""
        if self.is_kind:
            return f"One of {', '.join(self.choices)}."
        text = first_sentence(self.meaning)
        if "choices" in self.type and len(self.choices) <= _MAX_LISTED_CHOICES:
            text += f" Choices: {', '.join(self.choices)}."
        return text

    def build_example(self) -> str:
        """The key in its place in a recipe, as YAML.

        >>> print(find_keys("loss").keys[0].build_example())
        loss: completion
        """
        own, others = {self.path: self.example}, self.example_keys
        values: dict[str, Any] = {}
        for path, value in ({**own, **others} if self.is_kind else {**others, **own}).items():
            _set_value(values, path.split("."), value)
        return "\n".join(_write_block(values, 0))

    def as_json(self) -> dict[str, Any]:
        """All facts as plain JSON values."""
        return {
            "key": self.path,
            "type": self.type,
            "required": self.is_required,
            "default": self.default,
            "choices": list(self.choices),
            "refused": dict(self.refused),
            "meaning": self.meaning,
            "goes_with": self.goes_with,
            "passed_to": self.passed_to,
            "example": self.build_example(),
        }


@dataclass(frozen=True)
class Group:
    """The keys of one section, or those that one kind of the section adds."""

    path: str
    meaning: str
    keys: tuple[Key, ...]
    goes_with: str | None = None
    passed_to: str | None = None

    @property
    def title(self) -> str:
        """The section's path, its kind, and the library's config that gets the keys."""
        words = [self.path]
        if self.goes_with is not None:
            words.append(f"with `{self.goes_with.rpartition('.')[2]}`")
        if self.passed_to is not None:
            words.append(f"passed to {self.passed_to}")
        return ", ".join(words)


@dataclass(frozen=True)
class OwnedKey:
    """A key of a library that the runner sets itself, so a recipe cannot."""

    path: str
    decided_by: str  # the key to use instead, or the reason
    library: str
    help: str

    def as_json(self) -> dict[str, Any]:
        """All facts as plain JSON values."""
        return {
            "key": self.path,
            "decided_by": self.decided_by,
            "library": self.library,
            "meaning": self.help,
        }


@dataclass(frozen=True)
class Found:
    """The keys and sections that a query names; `note` says how it was read."""

    keys: tuple[Key, ...] = ()
    groups: tuple[Group, ...] = ()
    note: str | None = None
    owned: OwnedKey | None = None


@cache
def list_groups() -> tuple[Group, ...]:
    """All keys of a recipe by section, in the order of a recipe."""
    schema = build_schema()
    groups: list[Group] = []
    for name, prop in schema["properties"].items():
        if _list_sections(schema, prop):
            groups += _walk_section(schema, prop, name, None)
        else:
            key = _build_key(schema, name, prop, is_required=name in schema["required"])
            groups.append(Group(name, "", (key,)))
    return tuple(groups)


def list_all_keys() -> list[Key]:
    """All keys; a path occurs once for each kind of its section that has it."""
    return [key for group in list_groups() for key in group.keys]


def _list_sections(schema: Node, node: Node) -> list[tuple[str, Node, bool]]:
    """`(name of definition, definition, is it a list's item)` of a node's sections."""
    if "$ref" in node:
        name = str(node["$ref"]).rpartition("/")[2]
        return [(name, resolve(schema, node), False)]
    found = []
    for part in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        found += _list_sections(schema, part)
    if isinstance(node.get("items"), dict):
        found += [(name, one, True) for name, one, _ in _list_sections(schema, node["items"])]
    return found


def _find_tag(definition: Node) -> str | None:
    """The required key whose only value selects this definition."""
    for name, prop in definition["properties"].items():
        if "const" in prop and name in definition.get("required", ()):
            return str(name)
    return None


def _walk_section(schema: Node, prop: Node, path: str, goes_with: str | None) -> Iterator[Group]:
    """Yield the groups of one section: the choice of its kind, its keys, the sections in it."""
    sections = _list_sections(schema, prop)
    tags = {_find_tag(definition) for _, definition, _ in sections}
    if len(sections) > 1 and None not in tags:
        (tag,) = tags
        yield Group(
            path, prop.get("description", ""), (_build_tag_key(schema, prop, path, str(tag)),)
        )
        for name, definition, _ in sections:
            value = say_yaml(definition["properties"][tag]["const"])
            kind = f"{path}.{tag}: {value}"
            yield from _walk_keys(schema, name, definition, path, kind, skipped=str(tag))
        return
    for name, definition, is_item in sections:
        place = f"{path}.{ITEM}" if is_item else path
        yield from _walk_keys(schema, name, definition, place, goes_with)


def _walk_keys(
    schema: Node,
    name: str,
    definition: Node,
    path: str,
    goes_with: str | None,
    skipped: str | None = None,
) -> Iterator[Group]:
    config, own = PASSED_ON.get(name, (None, frozenset()))
    ours: list[Key] = []
    passed: list[Key] = []
    inner: list[Group] = []
    for leaf, prop in definition["properties"].items():
        if leaf == skipped:
            continue
        place = f"{path}.{leaf}"
        is_required = leaf in definition.get("required", ())
        key = replace(_build_key(schema, place, prop, is_required), goes_with=goes_with)
        if goes_with is not None:
            tag, _, value = goes_with.partition(": ")
            key = replace(key, example_keys={tag: _read_tag(value), **key.example_keys})
        if config is not None and leaf not in own:
            passed.append(_pass_to(key, leaf, config))
        else:
            ours.append(key)
            if _list_sections(schema, prop):
                inner += _walk_section(schema, prop, place, goes_with)
    if ours:
        yield Group(path, definition.get("description", ""), tuple(ours), goes_with)
    if passed:
        assert config is not None
        meaning = "Passed on unchanged if stated; the defaults and the help are the library's."
        yield Group(path, meaning, tuple(passed), goes_with, _LIBRARIES[config])
    yield from inner


def _read_tag(value: str) -> Any:
    return {"true": True, "false": False}.get(value, value)


def _build_key(schema: Node, path: str, prop: Node, is_required: bool) -> Key:
    return Key(
        path,
        _name_type(schema, prop),
        prop.get("description", ""),
        is_required,
        prop.get("default"),
        dict.fromkeys(_list_choices(prop), ""),
        example=_choose_example(schema, prop),
        example_keys=_COMPANIONS.get(path, {}),
    )


def _build_tag_key(schema: Node, prop: Node, path: str, tag: str) -> Key:
    """The key that selects a section's kind; its example states what that kind requires."""
    choices = {}
    for _, definition, _ in _list_sections(schema, prop):
        value = say_yaml(definition["properties"][tag]["const"])
        choices[value] = first_sentence(definition.get("description", ""))
    _, shown, _ = _list_sections(schema, prop)[1]
    required = {}
    for name in shown["required"]:
        if name != tag:
            required[f"{path}.{name}"] = _choose_example(schema, shown["properties"][name])
    default = prop.get("default")
    return Key(
        f"{path}.{tag}",
        _join_choices(list(choices)),
        prop.get("description", ""),
        default is None,
        None if default is None else default[tag],
        choices,
        example=shown["properties"][tag]["const"],
        example_keys=required,
    )


def _pass_to(key: Key, name: str, config: Config) -> Key:
    """A key of a library, with the values that the library accepts and we refuse."""
    default = load_table(config)[name].get("default")
    return replace(
        key, default=default, refused=REFUSED_VALUES.get(name, {}), passed_to=_LIBRARIES[config]
    )


_TYPE_NAMES: Final = {
    "boolean": "true or false",
    "integer": "integer",
    "number": "number",
    "string": "text",
    "object": "mapping",
    "null": "null",
}
_PLURALS: Final = {"integer": "integers", "number": "numbers", "text": "texts"}
_BOUNDS: Final = (
    ("exclusiveMinimum", ">"),
    ("minimum", ">="),
    ("exclusiveMaximum", "<"),
    ("maximum", "<="),
)


def _name_type(schema: Node, node: Node) -> str:
    """A description of the type.

    >>> _name_type({}, {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]})
    'integer > 0 or null'
    """
    if "$ref" in node:
        return "section"
    parts = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if parts:
        names = [_name_type(schema, part) for part in parts]
        if {"text", "number", "true or false"} <= set(names):
            return "any scalar"
        return " or ".join(dict.fromkeys(names))
    if "enum" in node:
        return _join_choices([say_yaml(value) for value in node["enum"]])
    if "const" in node:
        return say_yaml(node["const"])
    if node.get("type") == "array":
        if "prefixItems" in node:
            names = [_name_type(schema, part) for part in node["prefixItems"]]
            return f"list of {len(names)} {_PLURALS.get(names[0], names[0])}"
        inner = _name_type(schema, node.get("items") or {"type": None})
        if "|" in inner or "choices" in inner:
            return "list of choices"
        return "list" if inner == "any" else f"list of {_PLURALS.get(inner, f'{inner}s')}"
    name = _TYPE_NAMES.get(str(node.get("type")), "any")
    bounds = [f"{sign} {int(node[bound])}" for bound, sign in _BOUNDS if bound in node]
    return f"{name} {' and '.join(bounds)}" if bounds else name


def _join_choices(choices: Sequence[str]) -> str:
    text = " | ".join(choices)
    return text if len(text) <= 32 else f"one of {len(choices)} choices"


def _list_choices(node: Node) -> list[str]:
    """The values of a key that has choices, as YAML; none if any text is accepted too."""
    found = [say_yaml(value) for value in node.get("enum", ())]
    if "const" in node:
        found.append(say_yaml(node["const"]))
    if isinstance(node.get("items"), dict) and "$ref" not in node["items"]:
        found += _list_choices(node["items"])
    for part in node.get("anyOf", ()):
        found += _list_choices(part)
    return list(dict.fromkeys(found))


def _choose_example(schema: Node, node: Node) -> Any:
    """A value for the key: a stated example, else the default, else one of its type."""
    if node.get("examples"):
        return node["examples"][0]
    if node.get("default") not in (None, [], ()):
        return node["default"]
    if node.get("enum"):
        return node["enum"][0]
    if "const" in node:
        return node["const"]
    sections = _list_sections(schema, node)
    if sections:
        _, definition, is_item = sections[0]
        value = {
            name: _choose_example(schema, definition["properties"][name])
            for name in definition.get("required", ())
        }
        return [value] if is_item else value
    return node.get("default")


def say_yaml(value: Any) -> str:
    """A value as YAML on one line, as the recipe reader reads it.

    >>> print(say_yaml(["no", "a b", 2e-05, None, True, {"k": []}]))
    ["no", a b, 2e-05, null, true, {k: []}]
    """
    if isinstance(value, Mapping):
        items = [f"{say_yaml(name)}: {say_yaml(item)}" for name, item in value.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(say_yaml, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXTS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _set_value(values: Any, parts: Sequence[str], value: Any) -> None:
    """Put a value into nested dicts; `N` is the first item of a list."""
    head, *rest = parts
    if not rest:
        values[head] = value
        return
    inner = values.setdefault(head, [{}] if rest[0] == ITEM else {})
    if rest[0] == ITEM:
        _set_value(inner[0], rest[1:], value)
    else:
        _set_value(inner, rest, value)


def _write_block(values: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Yield the lines of a mapping: nested sections as blocks, values on one line."""
    indent = "  " * depth
    for name, value in values.items():
        if isinstance(value, dict) and value and depth < 2:
            yield f"{indent}{name}:"
            yield from _write_block(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}:"
            yield from (f"{indent}  - {say_yaml(item)}" for item in value)
        else:
            yield f"{indent}{name}: {say_yaml(value)}"


def find_keys(query: str) -> Found | None:
    """The keys that a query names; None if nothing has that name.

    A query is a section, a dotted path (numbers of list items may be left out), the kind of a
    section (`lora`, `alpaca`), the last parts of a path, or another trainer's name of a key.

    >>> [key.path for key in find_keys("learning_rate").keys]
    ['training.learning_rate']
    """
    name = _normalize(query)
    keys = [key for key in list_all_keys() if _normalize(key.path) == name]
    groups = [
        group for group in list_groups() if f"{_normalize(group.path)}.".startswith(f"{name}.")
    ]
    groups = [group for group in groups if group.keys != tuple(keys)]
    if keys or groups:
        return Found(tuple(_merge(keys)), tuple(groups))
    if owned := _find_owned(query):
        return Found(owned=owned)
    kinds = tuple(group for group in list_groups() if _is_kind(group, name))
    if kinds:
        return Found(groups=kinds)
    if keys := [key for key in list_all_keys() if key.choices.get(name)]:
        return Found(tuple(keys))  # a kind without keys
    keys = [key for key in list_all_keys() if _normalize(key.path).endswith(f".{name}")]
    if keys:
        return Found(tuple(_merge(keys)))
    if "." not in query and (owned := _find_owned(f"training.{query}")):
        return Found(owned=owned)
    if "." not in query and (owned := _find_owned(f"adapter.{query}")):
        return Found(owned=owned)
    return None if "." in query else _find_foreign(query)


def _normalize(path: str) -> str:
    parts = [part for part in path.strip(".").split(".") if part != ITEM and not part.isdigit()]
    return ".".join(parts).replace("-", "_")


def _is_kind(group: Group, name: str) -> bool:
    value = (group.goes_with or "").rpartition(": ")[2]
    return value == name and value not in ("true", "false", "none")


def _merge(keys: Sequence[Key]) -> list[Key]:
    """Keys of one path as one, if they differ in nothing but the kind of their section."""
    merged: list[Key] = []
    for key in keys:
        same = [at for at, one in enumerate(merged) if _is_alike(one, key)]
        if not same:
            merged.append(key)
            continue
        first = merged[same[0]]
        values = str(first.goes_with).partition(": ")[2]
        tag, _, value = str(key.goes_with).partition(": ")
        merged[same[0]] = replace(first, goes_with=f"{tag}: {values}, {value}")
    return merged


def _is_alike(one: Key, other: Key) -> bool:
    return replace(one, goes_with=None, example_keys={}) == replace(
        other, goes_with=None, example_keys={}
    )


def _find_owned(query: str) -> OwnedKey | None:
    section, _, name = query.rpartition(".")
    places: list[tuple[str, Config, Mapping[str, str]]] = [
        ("training", "SFTConfig", OWNED_TRAINING_FIELDS),
        ("adapter", "LoraConfig", OWNED_LORA_FIELDS),
    ]
    for place, config, owned in places:
        if section == place and name in owned:
            entry = load_table(config).get(name, {})  # without a JSON type it is not in the table
            return OwnedKey(query, owned[name], _LIBRARIES[config], entry.get("help", ""))
    return None


def _find_foreign(query: str) -> Found | None:
    """The keys for another trainer's name, or a note about it; None if it is unknown."""
    said = f"`{query}`"
    answer = find_answer(query, None, Recipe)
    if answer is not None and answer.is_refused:  # the key depends on the value
        value = next(iter(list_names().get(query.replace("-", "_"), ())), "true")
        said = f"`{query}: {value}`"
        answer = find_answer(query, value, Recipe)
    if answer is None:
        return None
    if not answer.overrides:
        return Found(note=f"{said} is not a key here: {answer.sentence}")
    paths = [one.partition("=")[0] for one in answer.overrides]
    keys = [key for key in list_all_keys() if key.path in paths]
    ours = ", ".join(f"`{one.replace('=', ': ', 1)}`" for one in answer.overrides)
    more = f" ({answer.sentence})" if answer.sentence else ""
    return Found(tuple(_merge(keys)), note=f"{said} is {ours} here{more}")


def suggest_key(query: str) -> str | None:
    """The nearest key or section, None if none is near.

    >>> suggest_key("training.lerning_rate"), suggest_key("evalution")
    ('training.learning_rate', 'evaluation')
    """
    paths = [group.path for group in list_groups()] + [key.path for key in list_all_keys()]
    by_leaf: dict[str, str] = {}
    for path in paths:
        by_leaf.setdefault(path.rpartition(".")[2], path)
    section, _, leaf = query.rpartition(".")
    if section and leaf in by_leaf:  # the right key in a wrong section
        return by_leaf[leaf]
    if section:
        answer = find_answer(leaf, None, Recipe)  # another trainer's name
        if answer is not None and answer.overrides:
            return answer.overrides[0].partition("=")[0]
        close = difflib.get_close_matches(query, paths, n=1, cutoff=0.8)
        return close[0] if close else None
    for names in (paths, by_leaf):
        if begun := [name for name in names if name.startswith(query)]:
            return by_leaf.get(begun[0], begun[0])
    close = difflib.get_close_matches(query, by_leaf, n=1, cutoff=0.6)
    return by_leaf[close[0]] if close else None
