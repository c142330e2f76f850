"""The task `conversations`: rows that are conversations already, judged by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from runner.data.tasks.base import Conversation, Example, Recognised, Task, describe_value
from runner.errors import DataError

CONVERSATION_COLUMNS: Final = ("messages", "conversations", "conversation")
# from/value data (ShareGPT) and some chat templates name their speakers differently.
ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "human": "user",
        "prompter": "user",
        "gpt": "assistant",
        "bot": "assistant",
        "chatgpt": "assistant",
    }
)


class ConversationsTask(Task):
    """Rows with a list of messages in `messages` or `conversations`; role/content or from/value."""

    ORDER = 1
    RECOGNISED_BY = tuple(((column,), {}) for column in CONVERSATION_COLUMNS)
    RECOGNITION_ORDER = 1

    name: Literal["conversations"]

    @classmethod
    def recognise(cls, row: Any) -> Recognised | None:
        if isinstance(row, list):  # the messages themselves
            return Recognised({"name": "conversations"}, ())
        return super().recognise(row)

    def build_example(self, row: Any, where: str) -> Example:
        return Example(where, read_conversation(row, where))


def read_conversation(
    row: Any, where: str, other_roles: Mapping[str, str] = MappingProxyType({})
) -> Conversation:
    """The messages of a row in the roles of chat templates; `other_roles` adds to `ROLES`.

    Raises:
        DataError: the row holds no list of messages, or no assistant's message.
    """
    messages = _find_messages(row, where)
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: expected a list of messages, found {describe_value(messages)}")
    roles = {**ROLES, **other_roles}
    conversation = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}, message {number}: expected an object, found {describe_value(message)}"
            )
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            found = ", ".join(f"{key}: {describe_value(value)}" for key, value in message.items())
            raise DataError(
                f"{where}, message {number}: expected the texts `role` and `content` (or `from` and"
                f" `value`), found {found or 'nothing'}"
            )
        conversation.append({"role": roles.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in conversation):
        raise DataError(f"{where}: has no assistant turn, so there is nothing to learn from it")
    return tuple(conversation)


def _find_messages(row: Any, where: str) -> Any:
    """The list of messages: the row itself in a bare list of lists, or one of the usual columns."""
    if isinstance(row, list):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a conversation, found {describe_value(row)}")
    if (
        "prompt" in row
        and "completion" in row
        and not any(name in row for name in CONVERSATION_COLUMNS)
    ):
        hint = "for plain prompts and completions set `data.task: {name: prompt_completion}`"
        if not isinstance(row["prompt"], list) or not isinstance(row["completion"], list):
            raise DataError(
                f"{where}: has the columns `prompt` and `completion`, no messages", hint=hint
            )
        return [*row["prompt"], *row["completion"]]
    for name in CONVERSATION_COLUMNS:
        if name in row:
            return row[name]
    raise DataError(
        f"{where}: has none of the columns"
        f" {', '.join(f'`{name}`' for name in CONVERSATION_COLUMNS)}",
        hint=(
            f"its columns are {', '.join(map(str, row))}; choose another `data.task` in the recipe"
        ),
    )
