"""Tasks turn the rows of a data set into examples: a conversation, and what a generated answer is
judged against.

Nothing here knows tokens, splits or models. A row that cannot be read is an error that names it;
what a task leaves out on purpose is counted by reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from runner.data.message_trees import TreePath, read_trees
from runner.data.sources import describe_value, read_text, require_column, require_object
from runner.errors import DataError
from runner.recipe.schema import (
    AnyTask,
    ConversationsTask,
    MathToolsTask,
    Oasst1Task,
    PromptCompletionTask,
    SquadV2Task,
    Sst2Task,
    SummarizationTask,
)

Message = Mapping[str, str]
Conversation = tuple[Message, ...]

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
# What speaks for a tool: no template of Gemma, Mistral or a plain base model has such a role.
TOOL_ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {role: "user" for role in ("tool", "ipython", "observation", "function")}
)
_BOXED: Final = "\\boxed{"


@dataclass(frozen=True)
class Example:
    """One conversation; `where` names the file and row for errors.

    A generated answer is judged against `references`: any of them counts. They are empty where a
    SQuAD question has no answer, and in tasks that judge nothing. Rows of one `group` never stand
    in two splits; None: its own content.
    """

    where: str
    messages: Conversation
    references: tuple[str, ...] = ()
    group: str | None = None


@dataclass(frozen=True)
class Examples:
    """All examples of a source, and what was left out of them: reason -> count."""

    examples: tuple[Example, ...]
    left_out: Mapping[str, int]


def build_examples(rows: Iterable[tuple[str, Any]], task: AnyTask) -> Examples:
    """The examples of all rows of a source, given as `(where, row)`.

    Raises:
        DataError: a column is missing or has another shape than the task expects.
    """
    if isinstance(task, Oasst1Task):
        trees = read_trees(rows, task)
        return Examples(tuple(_build_tree_example(path) for path in trees.paths), trees.left_out)
    return Examples(tuple(_build_example(row, task, where) for where, row in rows), {})


def _build_example(row: Any, task: AnyTask, where: str) -> Example:
    if isinstance(task, ConversationsTask):
        return Example(where, _read_messages(_find_messages(row, where), where))
    if isinstance(task, MathToolsTask):
        messages = _read_messages(_find_messages(row, where), where, TOOL_ROLES)
        answer = find_boxed(
            [message["content"] for message in messages if message["role"] == "assistant"][-1]
        )
        return Example(where, messages, () if answer is None else (answer,))
    columns = require_object(row, where)
    if isinstance(task, PromptCompletionTask):
        prompt, completion = (
            read_text(columns, name, where) for name in (task.prompt_column, task.completion_column)
        )
        references: tuple[str, ...] = (completion,)
    elif isinstance(task, SummarizationTask):
        prompt = _fill(task.prompt, document=read_text(columns, task.document_column, where))
        completion = read_text(columns, task.summary_column, where)
        references = (completion,)
    elif isinstance(task, Sst2Task):
        prompt = _fill(task.prompt, sentence=read_text(columns, task.sentence_column, where))
        completion = task.label_texts[_read_label(columns, task.label_column, where)]
        references = (completion,)
    else:
        assert isinstance(task, SquadV2Task)
        context, question = (read_text(columns, name, where) for name in ("context", "question"))
        prompt = _fill(task.prompt, context=context, question=question)
        references = _read_answers(columns, where)
        completion = references[0] if references else task.no_answer_text
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Example(where, turns, references)


def _build_tree_example(path: TreePath) -> Example:
    root = path.messages[0]
    messages = tuple(
        {"role": ROLES.get(one.role, one.role), "content": one.text} for one in path.messages
    )
    return Example(
        f"{root.where} (message {root.message_id})", messages, group=path.message_tree_id
    )


def _fill(prompt: str, **texts: str) -> str:
    """The prompt with its placeholders replaced; one inside a replacement stays as it is.

    >>> _fill("{context} Q: {question}", context="a {question}", question="b")
    'a {question} Q: b'
    """
    # The last one first.
    for name in sorted(texts, key=lambda name: prompt.index(f"{{{name}}}"), reverse=True):
        before, _, after = prompt.partition(f"{{{name}}}")
        prompt = before + texts[name] + after
    return prompt


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


def _read_messages(
    messages: Any, where: str, other_roles: Mapping[str, str] = MappingProxyType({})
) -> Conversation:
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


def _read_label(row: Mapping[str, Any], column: str, where: str) -> int:
    """0 or 1; a CSV file gives them as texts."""
    label = require_column(row, column, where)
    if (isinstance(label, int) and not isinstance(label, bool)) or isinstance(label, str):
        if str(label) in ("0", "1"):
            return int(label)
        if str(label) == "-1":
            raise DataError(
                f"{where}: the label is -1: GLUE hides the labels of its test split",
                hint="use the rows of GLUE's validation split in `data.test`",
            )
        raise DataError(f"{where}: column `{column}` should be the label 0 or 1, found {label!r}")
    raise DataError(
        f"{where}: column `{column}` should be the label 0 or 1, found {describe_value(label)}"
    )


def _read_answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The different answers of a SQuAD question, empty where the context holds none."""
    answers = require_column(row, "answers", where)
    expected = 'expected {"text": [...], "answer_start": [...]}'
    if isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers):
        texts = [answer.get("text") for answer in answers]
    elif isinstance(answers, Mapping) and isinstance(answers.get("text"), list | tuple):
        texts = list(answers["text"])
    else:
        shape = (
            "an object without a list `text`"
            if isinstance(answers, Mapping)
            else describe_value(answers)
        )
        raise DataError(f"{where}: column `answers`: {expected}, found {shape}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            found = repr(text) if isinstance(text, str) else describe_value(text)
            raise DataError(
                f"{where}: column `answers`: {expected} with texts that are not blank, found"
                f" {found}"
            )
    return tuple(dict.fromkeys(texts))


def find_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` whose braces close; None without one.

    >>> find_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> find_boxed(r"\boxed{1"), find_boxed("1")
    (None, None)
    """
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        if (inside := _read_braces(text, start + len(_BOXED))) is not None:
            return inside.strip()
        end = start
    return None


def _read_braces(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; an escaped brace is a
    character.
    """
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at]
        at += 1
    return None
