"""The task `conversations`: rows that are already conversations; answers are not judged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from runner.data.tasks.base import (
    Example,
    Recognised,
    Task,
    describe_value,
    is_empty,
    list_names,
)
from runner.data.tasks.messages import join_call, read_message, read_tools
from runner.errors import DataError

CONVERSATION_COLUMNS: Final = ("messages", "conversations", "conversation")
_TOOL_COLUMNS: Final = ("tools", "functions")


class ConversationsTask(Task):
    """Rows with a list of messages in `messages` or `conversations`: role/content or from/value."""

    ORDER = 1
    RECOGNISED_BY = tuple(((column,), {}) for column in CONVERSATION_COLUMNS)
    RECOGNITION_ORDER = 1

    name: Literal["conversations"]

    @classmethod
    def recognise(cls, row: Any) -> Recognised | None:
        if isinstance(row, list):  # the messages themselves
            return Recognised({"name": "conversations"}, ())
        return super().recognise(row)

    def list_used_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        return list_conversation_columns(row)

    def build_example(self, row: Any, where: str) -> Example:
        return read_conversation(row, where)


def read_conversation(
    row: Any, where: str, other_roles: Mapping[str, str] = MappingProxyType({})
) -> Example:
    """The example of a row that is a conversation: messages in the roles of chat templates, tools,
    the messages that are not trained, and the keys of messages that are not read (`unused`).

    Only the columns of `list_conversation_columns` are read. `other_roles` renames roles of rows
    without structured calls, because their templates may have no tool role.

    Raises:
        DataError: the row has no list of messages or no assistant message to learn from, or
            something in it has no accepted form.
    """
    given = _find_messages(row, where)
    if not isinstance(given, list | tuple) or not given:
        raise DataError(f"{where}: expected a list of messages, found {describe_value(given)}")
    # A completion answers a prompt; assistant messages in the prompt are context.
    has_prompt = isinstance(row, Mapping) and len(_find_columns(row)) == 2
    messages, untrained, unused = _read_messages(
        given, where, num_context=len(row["prompt"]) if has_prompt else 0
    )
    if isinstance(row, Mapping):
        tools = tuple(
            tool
            for column in _TOOL_COLUMNS
            for tool in read_tools(row.get(column), f"{where}, column `{column}`")
        )
        if system := _read_system(row, messages, where):
            messages = [{"role": "system", "content": system}, *messages]
            untrained = {index + 1 for index in untrained}
    else:
        tools = ()
    trained = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index not in untrained
    ]
    if not trained:
        why = "every assistant turn has weight 0" if untrained else "has no assistant turn"
        raise DataError(f"{where}: {why}, so there is nothing to learn from it")
    if not tools and not any("tool_calls" in message for message in messages):
        messages = [
            {**message, "role": other_roles.get(message["role"], message["role"])}
            for message in messages
        ]
    return Example(
        where, tuple(messages), tools=tools, untrained=frozenset(untrained), unused=tuple(unused)
    )


def list_conversation_columns(row: Mapping[str, Any]) -> Collection[str]:
    """The columns that `read_conversation` reads of a row."""
    return (*_find_columns(row), *_TOOL_COLUMNS, "system")


def _read_messages(
    given: list[Any] | tuple[Any, ...], where: str, *, num_context: int
) -> tuple[list[dict[str, Any]], set[int], list[str]]:
    """The messages, the indices of assistant messages of weight 0 or among the first `num_context`,
    and the names of unused keys, each once.
    """
    messages: list[dict[str, Any]] = []
    untrained: set[int] = set()
    unused: dict[str, None] = {}
    for number, message in enumerate(given, start=1):
        place = f"{where}, message {number}"
        read = read_message(message, place)
        unused |= dict.fromkeys(read.unused)
        if read.is_call and messages and messages[-1]["role"] == "assistant":
            if read.is_trained == (len(messages) - 1 in untrained):
                raise DataError(
                    f"{place}: is a call in the turn of message {number - 1}, but its weight"
                    " differs"
                )
            messages[-1] = join_call(messages[-1], read.message)
            continue
        if read.message["role"] == "assistant" and (not read.is_trained or number <= num_context):
            untrained.add(len(messages))
        messages.append(read.message)
    return messages, untrained, list(unused)


def _read_system(row: Mapping[str, Any], messages: list[dict[str, Any]], where: str) -> str | None:
    """The text of the column `system`, unless the first message says the same."""
    system = row.get("system")
    if is_empty(system):
        return None
    if not isinstance(system, str):
        raise DataError(
            f"{where}: column `system` should be a text, found {describe_value(system)}"
        )
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return system
    if first["content"].strip() == system.strip():
        return None
    raise DataError(
        f"{where}: the column `system` and the first message are two different system texts",
        hint="leave the column out with `data.ignore: [system]`",
    )


def _find_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that hold the messages: one of the usual ones, or `prompt` and `completion`. A
    column with null counts as absent, because Arrow writes the union of all columns to every row.
    """
    there = [name for name in CONVERSATION_COLUMNS if row.get(name) is not None]
    filled = [name for name in there if not is_empty(row[name])]
    if filled or there:
        return ((filled or there)[0],)
    pair = ("prompt", "completion")
    return pair if all(row.get(name) is not None for name in pair) else ()


def _find_messages(row: Any, where: str) -> Any:
    """The list of messages: the row itself in a bare list of lists, or the value of its columns."""
    if isinstance(row, list):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a conversation, found {describe_value(row)}")
    columns = _find_columns(row)
    if not columns:
        raise DataError(
            f"{where}: has none of the columns {list_names(CONVERSATION_COLUMNS)}",
            hint=(
                f"its columns are {', '.join(map(str, row))}; choose another `data.task` in the"
                " recipe"
            ),
        )
    if len(columns) == 1:
        return row[columns[0]]
    if not all(isinstance(row[name], list) for name in columns):
        raise DataError(
            f"{where}: has the columns `prompt` and `completion`, but no messages",
            hint="for plain prompts and completions set `data.task: {name: prompt_completion}`",
        )
    return [message for name in columns for message in row[name]]
