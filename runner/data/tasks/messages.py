"""Reads a single message of a row: its role, text, calls, reasoning and weight, in the forms that
are in common use.

`conversations` combines the messages; nothing here knows a row. Every key is read, or its name is
returned as unused. A value in no accepted form is an error that names the message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from runner.data.tasks.base import EMPTY, KEY_PREFIX, describe_value, find_unused, is_empty
from runner.errors import DataError
from runner.text import cut

# from/value data (ShareGPT) and some chat templates name their speakers differently.
ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "human": "user",
        "prompter": "user",
        "gpt": "assistant",
        "bot": "assistant",
        "chatgpt": "assistant",
        "function": "tool",
        "ipython": "tool",
        "observation": "tool",
        "tool_response": "tool",
    }
)
# A message with one of these roles is the assistant's, and its content is the call as JSON.
_CALL_ROLES: Final = ("function_call", "tool_call")
_REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
_WEIGHT_KEYS: Final = ("weight", "train", "trainable")
_KEYS: Final = frozenset(
    {
        "role",
        "from",
        "content",
        "value",
        "name",
        "tool_call_id",
        "tool_calls",
        "function_call",
        *_REASONING_KEYS,
        *_WEIGHT_KEYS,
    }
)
_CALL_FORM: Final = (
    'expected {"type": "function", "function": {"name": "...", "arguments": {...}}}'
    ' or {"name": "...", "arguments": {...}}'
)


@dataclass(frozen=True)
class ReadMessage:
    """A message in the form of chat templates. `is_call` is true if its role says that it is a
    call, which belongs to the assistant's turn before it, if there is one.
    """

    message: dict[str, Any]
    is_trained: bool
    is_call: bool
    unused: tuple[str, ...]  # names of keys, as `find_unused` returns them


def read_message(message: Any, place: str) -> ReadMessage:
    """The message in the roles of chat templates; `place` names it in errors."""
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: expected an object, found {describe_value(message)}")
    said = _read_either(message, ("role", "from"), place)
    given = _read_either(message, ("content", "value"), place)
    role = said.strip().lower() if isinstance(said, str) else None
    unused = find_unused(message, _KEYS, KEY_PREFIX)
    calls = _read_calls(message, place)
    if _has_nulls(message.get("tool_calls")):
        unused.append(f"{KEY_PREFIX}tool_calls{EMPTY}")
    is_call = role in _CALL_ROLES and not is_empty(given) and not calls
    if is_call:
        calls, role, given = _read_call_list(given, place), "assistant", ""
    content = "" if calls and given is None else _read_content(given, place)
    if role is None or content is None:
        found = ", ".join(f"{key}: {describe_value(value)}" for key, value in message.items())
        raise DataError(
            f"{place}: expected the texts `role` and `content` (or `from` and"
            f" `value`), found {found or 'nothing'}",
            hint=(
                "a turn without a text needs `tool_calls`: leave such rows out of the file, or keep"
                " their calls"
            ),
        )
    role = ROLES.get(role, role)
    read: dict[str, Any] = {"role": role, "content": content}
    if reasoning := _read_reasoning(message, place):
        read["reasoning_content"] = reasoning
    if calls:
        read["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if not is_empty(message.get(key)):
            read[key] = _require_text(message[key], f"{place}: `{key}`")
    _require_speaker(read, said, place)
    return ReadMessage(read, _read_weight(message, role, place), is_call, tuple(unused))


def join_call(turn: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """The assistant's turn joined with a call that follows it: a model writes both before it
    stops.
    """
    calls = [*turn.get("tool_calls", ()), *call["tool_calls"]]
    return {**call, **turn, "tool_calls": calls}


def read_tools(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """The functions that a row offers, given as a list or as its JSON text; a bare
    `{"name": ..., "parameters": ...}` is converted to the form of chat templates.
    """
    if is_empty(value):
        return ()
    tools = _parse_if_text(value, place)
    if not isinstance(tools, list | tuple):
        raise DataError(f"{place}: expected a list of functions, found {describe_value(tools)}")
    read = []
    for number, tool in enumerate(tools, start=1):
        tool = _drop_nulls(_parse_if_text(tool, f"{place}, function {number}"))
        if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
            bare = {key: item for key, item in tool.items() if key != "type"}
            tool = {"type": tool.get("type", "function"), "function": bare}
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{place}, function {number}: expected"
                ' {"type": "function", "function": {"name": "...", "parameters": {...}}},'
                f" found {_show(tool)}"
            )
        if tool.get("type", "function") != "function":
            raise DataError(
                f"{place}, function {number}: the type is {_show(tool['type'])},"
                " only `function` is accepted"
            )
        read.append({"type": "function", **_require_json(tool, f"{place}, function {number}")})
    return tuple(read)


def _read_either(message: Mapping[str, Any], names: tuple[str, ...], place: str) -> Any:
    """The value of the key that is present. Keys with null count as absent, because Arrow writes
    the union of all keys to every message.
    """
    found = {name: message[name] for name in names if message.get(name) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        both = " and ".join(f"`{name}`" for name in found)
        raise DataError(
            f"{place}: {both} say different things",
            hint=f"leave one of them out: `data.ignore: [{KEY_PREFIX}{list(found)[-1]}]`",
        )
    return values[0] if values else None


def _read_content(content: Any, place: str) -> str | None:
    """The text of a content, which may be a list of parts that are all texts."""
    if not isinstance(content, list | tuple):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        if isinstance(part, Mapping):
            given = {key: value for key, value in part.items() if value is not None}
            kind = given.pop("type", "text")
            if kind == "text" and list(given) == ["text"]:
                part = given["text"]
            else:
                raise DataError(
                    f"{place}: the content holds a part of the type {_show(kind)} with"
                    f" {', '.join(f'`{key}`' for key in given) or 'nothing'};"
                    ' expected {"type": "text", "text": "..."}',
                    hint="only texts are trained on: leave such rows out of the file",
                )
        texts.append(_require_text(part, f"{place}: a part of the content"))
    return "".join(texts)


def _read_calls(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    calls, old = message.get("tool_calls"), message.get("function_call")
    if not is_empty(calls) and not is_empty(old):
        raise DataError(
            f"{place}: has both `tool_calls` and `function_call`",
            hint="leave one of them out: `data.ignore: [messages.function_call]`",
        )
    if not is_empty(calls):
        return _read_call_list(calls, f"{place}, `tool_calls`")
    return [] if is_empty(old) else _read_call_list(old, f"{place}, `function_call`")


def _read_call_list(value: Any, place: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, from a call, a list of calls, or their JSON text."""
    # In an object, Arrow writes null for keys that only another call has; in a JSON text, null is
    # intended.
    value = _parse_if_text(value, place) if isinstance(value, str) else _drop_nulls(value)
    calls = value if isinstance(value, list | tuple) else [value]
    if not calls:
        raise DataError(f"{place}: {_CALL_FORM}, found an empty list")
    return [_read_call(call, place) for call in calls]


def _read_call(call: Any, place: str) -> dict[str, Any]:
    call = _parse_if_text(call, place)
    if not isinstance(call, Mapping):
        raise DataError(f"{place}: {_CALL_FORM}, found {describe_value(call)}")
    outer = {key: value for key, value in call.items() if value is not None}
    kind, call_id = outer.pop("type", "function"), outer.pop("id", None)
    function = outer.pop("function", outer)
    known = dict(function) if isinstance(function, Mapping) else {}
    name, arguments = known.pop("name", None), known.pop("arguments", None)
    surplus = [*known, *(outer if function is not outer else ())]
    if kind != "function" or not isinstance(name, str) or not name or surplus:
        raise DataError(f"{place}: {_CALL_FORM}, found {_show(call)}")
    arguments = {} if is_empty(arguments) else _parse_if_text(arguments, f"{place}, `arguments`")
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{place}, `arguments`: expected an object or its JSON text, found"
            f" {describe_value(arguments)}"
        )
    arguments = _require_json(arguments, f"{place}, `arguments`")
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call_id is not None:
        read["id"] = _require_json(call_id, f"{place}, `id`")
    return read


def _read_reasoning(message: Mapping[str, Any], place: str) -> str | None:
    value = _read_either(message, _REASONING_KEYS, place)
    if is_empty(value):
        return None
    (name, *_) = [key for key in _REASONING_KEYS if message.get(key) is not None]
    return _require_text(value, f"{place}: `{name}`")


def _read_weight(message: Mapping[str, Any], role: str, place: str) -> bool:
    """True if the message is to be trained, provided that it is an assistant's."""
    given = {key: message[key] for key in _WEIGHT_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{place}: `{key}` is {_show(value)}; only 0 and 1 are accepted (or false and true)"
            )
        if value != next(iter(given.values())):
            raise DataError(f"{place}: {' and '.join(f'`{k}`' for k in given)} contradict")
        if value and role != "assistant":
            raise DataError(
                f"{place}: `{key}` is {_show(value)}, but the role is {role!r}:"
                " only an assistant's messages are trained",
                hint=f"set `{key}` to {'false' if value is True else 0} there, or leave it out",
            )
    return all(given.values())


def _require_speaker(read: Mapping[str, Any], said: Any, place: str) -> None:
    """Raise DataError for a key that only an assistant or a tool may have, in another message."""
    for key, role in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if key in read and read["role"] != role:
            raise DataError(f"{place}: has `{key}`, but the role {said!r} is not {role}")


def _require_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} should be a text, found {describe_value(value)}")
    return value


def _parse_if_text(value: Any, place: str) -> Any:
    """The value, parsed if it is a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}), found {_show(value)}") from None


def _require_json(value: Any, place: str) -> Any:
    """The value, if JSON can represent it: no NaN, and no date or bytes of an Arrow file."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: cannot be written as JSON ({error}), found {_show(value)}"
        ) from None
    return value


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return built


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _drop_nulls(value: Any) -> Any:
    """The value without keys that hold null, at all levels."""
    if isinstance(value, Mapping):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _has_nulls(value: Any) -> bool:
    return not isinstance(value, str) and _drop_nulls(value) != value


def _show(value: Any) -> str:
    """A value as JSON, cut to fit into an error."""
    return cut(json.dumps(value, ensure_ascii=False, default=str), 120)
