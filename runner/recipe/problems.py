"""Writes the error messages of a recipe, grid or model card: line, dotted key, the value found, the
values accepted, the nearest known name.

Finds everything that a YAML text may not hold: a secret, a reference to something else, nesting
that overflows the parser's stack (measured with libyaml 0.2.5). `parse` limits the size of the
values that are read from it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final

import yaml
from omegaconf.errors import GrammarParseError, MissingMandatoryValue
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from runner.errors import CONTROLS, MAX_SHOWN_PROBLEMS, Problem
from runner.recipe.habits import Answer, find_answer, list_names
from runner.recipe.hf_fields import OWNED_TRAINING_FIELDS
from runner.secrets import find_secret

# Fewest characters of a value's beginning, or of any part of it, that suggest this value
_MIN_PREFIX: Final = 3
_MIN_PART: Final = 5
_MAX_DEPTH: Final = 100
# Shorter texts cannot nest deep enough to matter. libyaml's time grows with the square of the depth
# of brackets (0.6 s for 20,000). A few ten thousand question marks crash the process, because it
# parses them by recursion in C.
_SURELY_SHALLOW_CHARACTERS: Final = 16_000
# 480,000 parts of `1:1:1:...` are one number in base 60, which takes minutes to add up.
_ENDLESS_NUMBER: Final = re.compile(r"[0-9:_.]{1000}")

# Backslashes, then `${`. Tried only at the first backslash, so a text of backslashes alone is read
# once.
_DOLLAR_BRACE: Final = re.compile(r"(?<!\\)(\\*)\$\{")
_REFERENCE: Final = (
    r"holds `${`, but nothing is looked up here: write the value itself, or `\${` for that text"
)
_MISSING: Final = r"is `???`, a missing value: write the value itself, or `\???` for that text"

# The loader that OmegaConf prefers. The one in Python refuses some texts that this one accepts.
SAFE_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def find_hazards(text: str, overrides: Sequence[str] = ()) -> list[Problem]:
    """The reasons not even to parse a text or overrides; its comments are searched too. No problem
    repeats a secret.
    """
    problems: list[Problem] = []
    for override in overrides:
        key = override.partition("=")[0]
        if len(override) > _SURELY_SHALLOW_CHARACTERS:
            what = (
                f"is longer than {_SURELY_SHALLOW_CHARACTERS:,} characters,"
                " which belongs in a recipe"
            )
            problems.append(Problem("(override)", what))
        elif hazard := _find_hazard(override):
            problems.append(Problem("(key)" if find_unusable_text(key) else key, hazard[0]))
    if hazard := _find_hazard(text):
        line = text.count("\n", 0, hazard[1]) + 1
        problems.append(Problem(_name_line(text, line), hazard[0], line))
    return problems


def find_unusable_text(text: str) -> str | None:
    """The reason why a recipe may not hold a text; None if it may. People read recipes in terminals
    and commit them.
    """
    if control := CONTROLS.search(text):
        return f"holds the character {ascii(control[0])[1:-1]}, which no recipe may"
    if secret := find_secret(text):
        return f"holds {secret[0]}: secrets come from the environment only"
    return None


def escape_text(text: str) -> str:
    r"""`text` as it must be written in a file, in OmegaConf's notation (see `read_escapes`).

    >>> print(escape_text(r"\${x} \n ${y}"), escape_text("???"))
    \\\${x} \n \${y} \???
    """
    return _DOLLAR_BRACE.sub(r"\1\1\\${", text) if "${" in text else escape_missing(text)


def escape_missing(text: str) -> str:
    """`escape_text` for `???` only."""
    return "\\" + text if re.fullmatch(r"\\*\?\?\?", text) else text


def read_escapes(text: str) -> str | None:
    r"""The text that a value means; None for a reference (`${...}`) and a missing value (`???`).

    Only the backslashes right before `${` count: 2n + 1 of them mean n and the text `${`.
    `???` with a backslash before it means `???`.

    >>> [read_escapes(text) for text in (r"\${x} \n", r"\\\${x}", r"\???", "${x}", r"\\${x}")]
    ['${x} \\n', '\\${x}', '???', None, None]
    """
    if re.fullmatch(r"\\*\?\?\?", text):
        return text[1:] if text[0] == "\\" else None
    if "${" not in text:
        return text
    if any(len(match[1]) % 2 == 0 for match in _DOLLAR_BRACE.finditer(text)):
        return None
    return _DOLLAR_BRACE.sub(lambda match: "\\" * (len(match[1]) // 2) + "${", text)


def _find_hazard(text: str) -> tuple[str, int] | None:
    """The first hazard in a text, and its position."""
    if secret := find_secret(text):
        return f"holds {secret[0]}: secrets come from the environment only", secret[1]
    if number := _ENDLESS_NUMBER.search(text):
        return "holds a number of 1,000 or more characters", number.start()
    if len(text) > _SURELY_SHALLOW_CHARACTERS and (position := _find_depth(text)) is not None:
        return f"is nested more than {_MAX_DEPTH} levels deep", position
    return None


def _find_depth(text: str) -> int | None:
    """The position at which a text nests too deep, found without building anything; None also if
    the parser refuses the text.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=SAFE_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > _MAX_DEPTH:
                return event.start_mark.index if event.start_mark else 0
    except (yaml.YAMLError, ValueError):
        return None
    return None


def _name_line(text: str, line: int) -> str:
    """The key on a line as it is written there, if it is short and no secret; else "(YAML)"."""
    row = text.splitlines()[line - 1 : line] if line <= 10_000 else []
    key = re.match(r"[\s{,-]*([A-Za-z_][\w.-]*)\s*:", row[0]) if row else None
    return key[1] if key and len(key[1]) <= 60 and find_unusable_text(key[1]) is None else "(YAML)"


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

    walk(yaml.compose(text, Loader=SAFE_LOADER), "")
    return lines


def find_line(key: str, text: str, overridden: Collection[str] = ()) -> int | None:
    """The line of a dotted key, or of the nearest section around it; None if an override set it."""
    if any(
        name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")
        for name in overridden
    ):
        return None
    lines, path = find_lines(text), key.split(".")
    candidates = [".".join(path[:length]) for length in range(len(path), 0, -1)]
    return next((lines[name] for name in candidates if name in lines), 1)


def describe_error(
    error: Exception, text: str, overridden: Collection[str], *, is_in_text: bool
) -> Problem:
    """The problem for an error of YAML or OmegaConf; `is_in_text` is False if it came from the
    overrides.
    """
    what = (str(getattr(error, "problem", None) or error) or "cannot be read").splitlines()[0]
    if is_in_text:
        mark = getattr(error, "problem_mark", None)
        return Problem("(YAML)", what, mark.line + 1 if mark else 1)
    if isinstance(error, GrammarParseError):
        what = _REFERENCE
    elif isinstance(error, MissingMandatoryValue):
        what = _MISSING
    key = str(getattr(error, "full_key", None) or "")
    names = ", ".join(sorted(overridden))
    return Problem(key or names, what, find_line(key, text, overridden) if key else None)


def find_unusable_values(value: Any, text: str, overridden: Collection[str] = ()) -> list[Problem]:
    """A problem for every value that YAML allows and a recipe does not.

    These are values that JSON lacks (infinities, bytes, keys that are not texts), characters that
    control a terminal (recipes are shown there), and secrets that the text spells in an unusual
    way.
    """
    problems: list[Problem] = []
    found: list[str] = []
    is_plain = _collect_texts(value, found)
    texts = "\n".join(found)
    # All texts together: one by one takes as long as everything else.
    is_suspect = "${" in texts or "???" in texts or find_unusable_text(texts) is not None
    if is_plain and not is_suspect:
        return []
    for key, item in _leaves(value):
        if isinstance(item, float) and not math.isfinite(item):
            problems.append(
                Problem(
                    key, f"got {item}, expected a finite number", find_line(key, text, overridden)
                )
            )
        elif isinstance(item, int) and abs(item) >= 2**63:
            problems.append(
                Problem(key, "got a number of more than 64 bits", find_line(key, text, overridden))
            )
        elif not isinstance(item, str | float | int | None):
            what = (
                f"got a value of the type {type(item).__name__}, expected a text, a number, true,"
                " false or null"
            )
            problems.append(Problem(key, what, find_line(key, text, overridden)))
        elif is_suspect and isinstance(item, str) and (wrong := _find_unusable_value(item)):
            problems.append(Problem(key, wrong, find_line(key, text, overridden)))
    for key, name in _keys(value):
        if not isinstance(name, str):
            problems.append(
                Problem(
                    key, f"got the key {name!r}, expected a text", find_line(key, text, overridden)
                )
            )
        elif is_suspect and (wrong := find_unusable_text(name)):
            place = key.removesuffix(name).removesuffix(".")
            problems.append(
                Problem(place or "(YAML)", f"a key {wrong}", find_line(place, text, overridden))
            )
    return problems


def _collect_texts(value: Any, texts: list[str]) -> bool:
    """Adds all texts and keys within a value to `texts`; False if the value holds anything that
    JSON lacks, or a number that may be too large.
    """
    kind = type(value)
    if kind is str:
        texts.append(value)
        return True
    if kind is dict:
        is_plain = True
        for name, item in value.items():
            texts.append(str(name))
            is_plain &= _collect_texts(item, texts) and type(name) is str
        return is_plain
    if kind is list:
        return all([_collect_texts(item, texts) for item in value])
    # An infinity compares as too large, and every comparison with a NaN is false.
    return value is None or kind is bool or (kind in (int, float) and abs(value) < 2**63)


def _find_unusable_value(item: str) -> str | None:
    plain = read_escapes(item)
    if wrong := find_unusable_text(item if plain is None else plain):
        return wrong
    if plain is not None:
        return None
    return _MISSING if item == "???" else _REFERENCE


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and value of everything that is neither a mapping nor a list."""
    if not isinstance(value, Mapping | list):
        yield prefix.removesuffix("."), value
        return
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(item, f"{prefix}{name}.")


def _keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the key of every mapping entry."""
    if isinstance(value, Mapping | list):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(value, Mapping):
                yield f"{prefix}{name}", name
            yield from _keys(item, f"{prefix}{name}.")


Fit = Callable[[Answer], Answer]
# The answer to a name, and True if the name came from an override.
_Find = Callable[[str], tuple[Answer | None, bool]]


def list_problems(
    error: ValidationError,
    model: type[BaseModel],
    container: Any,
    text: str,
    overridden: Mapping[str, str] | None = None,
    fit: Fit = lambda answer: answer,
) -> list[Problem]:
    """One problem per mistake against `model`, in the order of the file. Only problems that are
    shown get our own wording.

    `overridden` holds the values of overrides as typed; `fit` changes the answers to them.
    """
    given = overridden or {}
    placed = []
    for detail in error.errors():
        path = _visible_path(detail, container)
        placed.append((path, find_line(".".join(path), text, given), detail))
    problems: dict[tuple[str, str], Problem] = {}
    for path, line, detail in sorted(placed, key=lambda item: item[1] or 0):
        key = ".".join(path)
        what = detail["msg"]
        if len(problems) < MAX_SHOWN_PROBLEMS:
            find = partial(_find_answer, detail=detail, model=model, typed=given.get(key), fit=fit)
            what = _describe(detail, path, model, find)
        problems.setdefault((key, what), Problem(key or "(recipe)", what, line))
    return list(problems.values())


def _visible_path(detail: ErrorDetails, container: Any) -> tuple[str, ...]:
    """The location without the tags that pydantic adds for unions: only the parts that the file
    has, and at the end perhaps a missing key.
    """
    path: list[str] = []
    value = container
    location = detail["loc"]
    for position, part in enumerate(location):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (
            position == len(location) - 1 and detail["type"] in ("missing", "union_tag_not_found")
        ):
            continue
        path.append(str(part))
    return tuple(path)


def _describe(
    detail: ErrorDetails, path: tuple[str, ...], model: type[BaseModel], find: _Find
) -> str:
    kind, found = detail["type"], _name_value(detail["input"])
    if kind == "extra_forbidden":
        return _describe_unknown_key(path[-1], detail, model, find)
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        choices = re.findall(
            r"'([^']*)'|\b(True|False|\d+)\b", str(detail.get("ctx", {}).get("expected", ""))
        )
        names = [text or other.lower() for text, other in choices]
        return f"got {found}, expected {_list_names(names)}{_suggest_value(detail['input'], names)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = detail.get("ctx", {})
        field = str(context.get("discriminator", "")).strip("'")
        tags = re.findall(r"'([^']*)'|\b(?:True|False)\b", str(context.get("expected_tags", "")))
        names = [name for name in tags if name]
        if kind == "union_tag_not_found":
            return f"needs the key `{field}`{_describe_fitting(detail, path, field, model)}"
        return (
            f"`{field}` is {_name_value(context.get('tag'))}, expected"
            f" {_list_names(names)}{_suggest_value(context.get('tag'), names)}"
        )
    if kind in _EXPECTED:
        answer, is_override = find(path[0]) if len(path) == 1 else (None, False)
        instead = answer.describe(is_override=is_override) if answer is not None else ""
        return f"got {found}, expected {_EXPECTED[kind]}{instead}"
    if kind == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"])).split("\n\nhint")[0]
    return f"got {found}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _describe_fitting(
    detail: ErrorDetails, path: tuple[str, ...], field: str, model: type[BaseModel]
) -> str:
    """The values of a section's missing key that fit its other keys; empty if all or none fit."""
    members = [m for m in _find_models(model, path) if field in m.model_fields]
    fitting = [m for m in members if set(detail["input"]) <= m.model_fields.keys()]
    if not fitting or len(fitting) == len(members):
        return ""
    tags = [_name_tag(m.model_fields[field].annotation) for m in fitting]
    return f": its other keys go with `{field}: {_list_names(tags)}`"


def _describe_unknown_key(
    name: str, detail: ErrorDetails, model: type[BaseModel], find: _Find
) -> str:
    if "training" in detail["loc"] and name in OWNED_TRAINING_FIELDS:
        return f"cannot be set here: it is decided by {OWNED_TRAINING_FIELDS[name]}"
    known, section = _known_names(model, detail["loc"][:-1]), detail["loc"][:-2]
    answer, is_override = find(name)
    if name in _known_names(model, section):
        tag = detail["loc"][-2]
        fitting = [m for m in _find_models(model, section) if name in m.model_fields]
        field = next((field for m in fitting if (field := _find_discriminator(m))), None)
        if field is None:
            return f"does not go with `{tag}`, which accepts {_list_names(known)}"
        stated = str(bool(tag)).lower() if isinstance(tag, int) else tag
        values = [_name_tag(m.model_fields[field].annotation) for m in fitting]
        other = ""
        meant = find_answer(name, None, model) if answer else None
        key = meant.overrides[0].partition("=")[0] if meant and meant.overrides else name
        if not f".{key}".endswith(f".{name}"):
            other = f"; or did you mean `{key}`?"
        return (
            f"does not go with `{field}: {stated}`, only with `{field}: {_list_names(values)}`"
            f"{other}"
        )
    # A typing slip is likelier than the name of a key in another section.
    slip = "" if name in list_names() else suggest(name, known, 0.75)
    if slip or answer is None:
        return f"unknown key{slip or suggest(name, known)}"
    return f"unknown key{answer.describe(is_override=is_override)}"


def _find_answer(
    name: str, *, detail: ErrorDetails, model: type[BaseModel], typed: str | None, fit: Fit
) -> tuple[Answer | None, bool]:
    """The answer for a name that other trainers use, and True if it came from an override. The
    answer is None if the name is unknown or the file is not a recipe.
    """
    if not {"training", "data"} <= model.model_fields.keys():
        return None, False
    value = detail["input"]
    if typed is not None:
        answer = find_answer(name, typed, model)
        return (None if answer is None else fit(answer)), True
    if isinstance(value, bool):
        value = str(value).lower()
    return find_answer(name, None if isinstance(value, dict | list) else str(value), model), False


def _known_names(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The field names that any member of a union accepts at a location."""
    models = _find_models(model, location)
    return [field.alias or name for m in models for name, field in m.model_fields.items()]


def _find_models(model: type[BaseModel], location: tuple[int | str, ...]) -> list[Any]:
    """The sections that may be at a location."""
    models: list[Any] = [model]
    members: list[Any] = []  # members of the unions that the last part names
    for part in location:
        nested = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if not nested:
            nested = [member for member in members if _has_tag(member, part)]
        if nested:
            members = [m for annotation in nested for m in getattr(annotation, "__args__", ())]
            models = [m for annotation in nested for m in _models_in(annotation)]
        else:  # a union tag keeps only the members that carry it; a name or index keeps all
            models = [m for m in models if _is_tagged(m, part)] or models
    return models


def _find_discriminator(model: Any) -> str | None:
    """The key that distinguishes a section from the others of its union."""
    for name, field in model.model_fields.items():
        if len(getattr(field.annotation, "__args__", ())) == 1 and field.is_required():
            return str(name)
    return None


def _name_tag(annotation: Any) -> str:
    (tag,) = annotation.__args__
    return str(tag).lower() if isinstance(tag, bool) else str(tag)


def _has_tag(annotation: Any, tag: int | str) -> bool:
    metadata = getattr(annotation, "__metadata__", ())
    return any(isinstance(one, Tag) and one.tag == tag for one in metadata)


def _is_tagged(model: Any, tag: int | str) -> bool:
    return any(_carries(field.annotation, tag) for field in model.model_fields.values())


def _carries(annotation: Any, tag: int | str) -> bool:
    # Pydantic writes a tag of true or false as 1 or 0, which compare equal in Python.
    return getattr(annotation, "__args__", ()) == (tag,)


def _models_in(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def suggest(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """A question to end an error message with, or an empty text."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f", did you mean `{close[0]}`?" if close else ""


def _reduce(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _suggest_value(found: Any, known: Sequence[str]) -> str:
    """A question with the closest accepted value, or an empty text. Case, `_` and `-` do not count.
    Of the values that begin with the found text, the one that most others extend is the closest.

    >>> _suggest_value("adam_w", ["adamw_8bit", "adamw_torch", "adamw_torch_fused", "grokadamw"])
    ', did you mean `adamw_torch`?'
    """
    text = _reduce(str(found))
    by_text = {_reduce(name): name for name in known}
    if text not in by_text and len(text) >= _MIN_PREFIX:
        candidates = [one for one in by_text if one.startswith(text)]
        if not candidates and len(text) >= _MIN_PART:
            candidates = [one for one in by_text if text in one]

        def rank(name: str) -> tuple[int, int]:
            return sum(one.startswith(name) for one in by_text), -len(name)

        text = max(candidates, key=rank, default=text)
    close = difflib.get_close_matches(text, by_text, n=1)
    return f", did you mean `{by_text[close[0]]}`?" if close else ""


def _list_names(names: list[str]) -> str:
    shown = names if len(names) <= 12 else [*names[:11], f"{len(names) - 11} more"]
    return " or ".join(", ".join(shown).rsplit(", ", 1)) if shown else "another value"


def _name_value(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    return (
        f"a {'mapping' if isinstance(value, Mapping) else 'list'}"
        if isinstance(value, dict | list)
        else repr(value)
    )
