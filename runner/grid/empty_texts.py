"""Refuses rows of `runner init` whose prompts or answers are all empty, and counts those of which
only some are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runner.data.tasks.base import Example, Task, is_empty, list_names
from runner.data.tasks.prompts import PromptTask, list_placeholders
from runner.errors import DataError
from runner.grid.column_hints import suggest_columns
from runner.recipe.data_section import DataSource
from runner.text import format_count

_EMPTY_PROMPT: Final = "an empty prompt, without any text of the row"
_EMPTY_ANSWER: Final = "an empty answer, so only the end of the turn is trained"


@dataclass(frozen=True)
class Given:
    """The task of the user's rows, the file or folder as the user named it, and the first row.

    `prompt` is the text of `--prompt`, and None without one.
    """

    task: Task
    name: str
    row: Any
    prompt: str | None

    def list_answer_columns(self) -> list[str]:
        """The columns of the answer; empty for a task that reads messages."""
        task = self.task
        return list(task.list_answer_columns()) if isinstance(task, PromptTask) else []

    def list_prompt_columns(self) -> list[str]:
        """The columns of the prompt; empty for a task that reads messages."""
        task = self.task
        if not isinstance(task, PromptTask):
            return []
        read = [*task.list_read_columns(), *list_placeholders(task.prompt or "", task.PLACEHOLDERS)]
        answers = task.list_answer_columns()
        return [name for name in dict.fromkeys(read) if name not in answers]

    def has_no_answer(self, example: Example) -> bool:
        """True if no answer that is trained holds any text, reasoning or call."""
        return all(
            is_empty(message.get(key))
            for at, message in enumerate(example.messages)
            if message["role"] == "assistant" and at not in example.untrained
            for key in ("content", "reasoning_content", "tool_calls")
        )

    def has_no_prompt(self, example: Example) -> bool:
        """True if the prompt holds no text of the row."""
        columns = self.list_prompt_columns()
        if columns and example.columns:
            return all(is_empty(example.columns.get(name)) for name in columns)
        texts = [one["content"] for one in example.messages if one["role"] == "user"]
        return bool(texts) and all(map(is_empty, texts))


def refuse_empty_columns(given: Given, source: DataSource) -> None:
    """Raise DataError if a column that the task needs is empty in all rows of a source that the
    task cannot read.
    """
    from runner.data.sources import load_rows

    prompts, answers = given.list_prompt_columns(), given.list_answer_columns()
    seen: set[str] = set()
    filled: set[str] = set()
    num_rows = 0
    for _, row in load_rows(source):
        if not isinstance(row, Mapping):
            return
        num_rows += 1
        seen |= {name for name in (*prompts, *answers) if name in row}
        filled |= {name for name in (*prompts, *answers) if not is_empty(row.get(name))}
    # A column that no row has is another mistake.
    if seen & set(answers) and not filled & set(answers):
        raise _build_no_answers(given, num_rows)
    if seen & set(prompts) and not filled & set(prompts):
        raise _build_no_prompts(given, [name for name in prompts if name in seen], num_rows)


def count_empty(given: Given, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """One line for each split whose own rows hold some empty prompts or answers. Raises: DataError,
    for a split without any, and for a column of `--prompt` that is empty in all rows.
    """
    notes: list[str] = []
    for split, rows in examples.items():
        of_split = f" of {split}" if len(examples) > 1 else ""
        answers = [one for one in rows if given.has_no_answer(one)]
        prompts = [one for one in rows if given.has_no_prompt(one)]
        if rows and len(answers) == len(rows):
            raise _build_no_answers(given, len(rows), of_split)
        if rows and len(prompts) == len(rows):
            raise _build_no_prompts(given, given.list_prompt_columns(), len(rows), of_split)
        for name in list_placeholders(given.prompt or ""):
            if rows and all(is_empty(one.columns.get(name)) for one in rows):
                raise _build_no_prompts(given, [name], len(rows), of_split)
        for found, what in ((prompts, _EMPTY_PROMPT), (answers, _EMPTY_ANSWER)):
            if found:
                counted = f"{len(found)} of {format_count(len(rows), 'row')}{of_split}"
                verb = "is" if len(found) == 1 else "are"
                notes.append(f"{counted} {verb} kept with {what}; the first is {found[0].where}")
    return notes


def _build_no_answers(given: Given, num_rows: int, of_split: str = "") -> DataError:
    columns = given.list_answer_columns()[:1]
    what = f"the column {list_names(columns)}" if columns else "every answer"
    words = None
    if columns:
        words = suggest_columns(given.row, prompt=_word_prompt(given), taken=columns)
    return DataError(
        f"{given.name}: {what} is empty in all {format_count(num_rows, 'row')}{of_split}, so there"
        " is no answer to learn",
        hint=_suggest(given, words, lambda one: "ANSWER" not in one, "answers", columns),
    )


def _build_no_prompts(
    given: Given, columns: Sequence[str], num_rows: int, of_split: str = ""
) -> DataError:
    what = f"the column {list_names(columns)} is" if len(columns) == 1 else "every prompt is"
    if len(columns) > 1:
        what = f"the columns {list_names(columns)} are"
    words = None
    if columns:
        answer = given.list_answer_columns()[0]
        words = suggest_columns(given.row, completion=answer, taken=columns)
    return DataError(
        f"{given.name}: {what} empty in all {format_count(num_rows, 'row')}{of_split}, so every row"
        " has the same prompt",
        hint=_suggest(given, words, lambda one: "QUESTION" not in one, "prompts", columns),
    )


def _word_prompt(given: Given) -> str:
    """The prompt as `--prompt` states it."""
    task = given.task
    if given.prompt is not None:
        return given.prompt
    prompt = task.get_prompt() if isinstance(task, PromptTask) else None
    columns = given.list_prompt_columns()
    bare = bool(columns) and prompt in (None, f"{{{columns[0]}}}")
    return columns[0] if bare else str(prompt)


def _suggest(
    given: Given,
    words: str | None,
    is_whole: Callable[[str], bool],
    texts: str,
    columns: Collection[str],
) -> str:
    """The hint: other columns, if the row has any that may be meant, or else other rows."""
    if words is not None and is_whole(words):
        return f"name other columns: {words}"
    where = f" into {list_names(columns)}" if columns else ""
    return f"write the {texts}{where}, or name a file that holds them: --data FILE"
