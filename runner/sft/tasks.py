"""Tasks turn the rows of a data set into conversations; nothing here knows tokens, splits or models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from runner.errors import DataError
from runner.recipe import AnyTask, ConversationsTask, PromptCompletionTask, SummarizationTask

Message = Mapping[str, str]
Conversation = tuple[Message, ...]

CONVERSATION_COLUMNS: Final = ("messages", "conversations", "conversation")
# from/value data (ShareGPT) names its speakers differently.
ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def build_conversation(row: Any, task: AnyTask, where: str) -> Conversation:
    """The conversation of one row; `where` names the file and row for errors.

    Raises:
        DataError: a column is missing or has another shape than the task expects.
    """
    if isinstance(task, ConversationsTask):
        return _read_messages(_find_messages(row, where), where)
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with columns, found {_name(row)}")
    if isinstance(task, PromptCompletionTask):
        prompt, completion = _text(row, task.prompt_column, where), _text(row, task.completion_column, where)
    else:
        assert isinstance(task, SummarizationTask)
        document = _text(row, task.document_column, where)
        prompt = task.prompt.replace("{document}", document)
        completion = _text(row, task.summary_column, where)
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})


def _find_messages(row: Any, where: str) -> Any:
    """The list of messages: the row itself in a bare list of lists, or one of the usual columns."""
    if isinstance(row, list):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a conversation, found {_name(row)}")
    if "prompt" in row and "completion" in row and not any(name in row for name in CONVERSATION_COLUMNS):
        hint = "for plain prompts and completions set `data.task: {name: prompt_completion}`"
        if not isinstance(row["prompt"], list) or not isinstance(row["completion"], list):
            raise DataError(f"{where}: has the columns `prompt` and `completion`, no messages", hint=hint)
        return [*row["prompt"], *row["completion"]]
    for name in CONVERSATION_COLUMNS:
        if name in row:
            return row[name]
    raise DataError(
        f"{where}: has none of the columns {', '.join(f'`{name}`' for name in CONVERSATION_COLUMNS)}",
        hint=f"its columns are {', '.join(map(str, row))}; choose another `data.task` in the recipe",
    )


def _read_messages(messages: Any, where: str) -> Conversation:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: expected a list of messages, found {_name(messages)}")
    conversation = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}, message {number}: expected an object, found {_name(message)}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}, message {number}: expected the texts `role` and `content` (or `from` and `value`), "
                f"found {', '.join(f'{key}: {_name(value)}' for key, value in message.items()) or 'nothing'}"
            )
        conversation.append({"role": ROLES.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in conversation):
        raise DataError(f"{where}: has no assistant turn, so there is nothing to learn from it")
    return tuple(conversation)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(
            f"{where}: the column `{column}` is missing",
            hint=f"its columns are {', '.join(map(str, row))}; name the right one in `data.task`",
        )
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column `{column}` should be a text, found {_name(row[column])}")
    return str(row[column])


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing (null)"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
