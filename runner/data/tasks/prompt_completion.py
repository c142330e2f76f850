"""The task `prompt_completion`: a prompt and its answer from columns, judged by exact match."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator

from runner.data.tasks.base import (
    Example,
    Judgement,
    Recognised,
    References,
    judge_exact_match,
    read_text,
    require_object,
)
from runner.data.tasks.prompts import PromptTask, list_placeholders
from runner.strict import Text

_COLUMN_PAIRS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)
# Columns that belong to the prompt if a row has them, before and after its main column.
_BEFORE: Final = ("context",)
_AFTER: Final = ("input",)
_SYSTEM: Final = ("system", "system_prompt")
_PROMPT_COLUMN: Final = "prompt"


class PromptCompletionTask(PromptTask):
    """One user turn and one assistant turn: two columns, or a prompt that names several."""

    METRICS = ("exact_match",)
    ORDER = 2
    RECOGNISED_BY = tuple(
        (pair, {"prompt_column": pair[0], "completion_column": pair[1]}) for pair in _COLUMN_PAIRS
    )
    RECOGNITION_ORDER = 5

    name: Literal["prompt_completion"]
    prompt_column: Text = Field(
        default=_PROMPT_COLUMN,
        description=(
            "The column of the prompt. If `prompt` holds this column, its text must not be empty."
        ),
        examples=["question"],
    )
    completion_column: Text = Field(
        default="completion", description="The column of the answer.", examples=["answer"]
    )

    @classmethod
    def recognise(cls, row: Any) -> Recognised | None:
        found = super().recognise(row)
        if found is None:
            return None
        if all(isinstance(row[column], list) for column in found.columns):
            return replace(found, section={"name": "conversations"})  # both hold messages
        return _recognise_more(found, row)

    @model_validator(mode="after")
    def _prompt_names_columns(self) -> Self:
        if self.prompt is None:
            return self
        names = list_placeholders(self.prompt)
        if not names:
            raise ValueError(
                "`prompt` holds no column in braces, such as {question}: all rows would have the"
                " same prompt; for a text before all prompts set `system`"
            )
        if self.prompt_column not in (_PROMPT_COLUMN, *names):
            raise ValueError(
                f"`prompt` does not hold {{{self.prompt_column}}}, the column that `prompt_column`"
                " names; leave `prompt_column` out, or put it into the prompt"
            )
        return self

    def get_prompt(self) -> str:
        return f"{{{self.prompt_column}}}" if self.prompt is None else self.prompt

    def list_read_columns(self) -> Collection[str]:
        return (self.completion_column, *([self.prompt_column] if self.prompt is None else []))

    def list_answer_columns(self) -> Collection[str]:
        return (self.completion_column,)

    def build_example(self, row: Any, where: str) -> Example:
        columns = require_object(row, where)
        texts: dict[str, str] = {}
        if self.prompt is None or self.prompt_column in list_placeholders(self.prompt):
            texts[self.prompt_column] = read_text(columns, self.prompt_column, where)
        completion = read_text(columns, self.completion_column, where)
        return self.build_prompted(columns, where, texts, completion, (completion,))

    def judge(self, prediction: str, references: References) -> Judgement:
        return judge_exact_match(prediction, references)


def _recognise_more(found: Recognised, row: Mapping[str, Any]) -> Recognised:
    """The section, with a prompt of several columns and a system text if the row has them."""
    column = found.columns[0]
    before = [name for name in _BEFORE if name in row and name not in found.columns]
    after = [name for name in _AFTER if name in row and name not in found.columns]
    system = [name for name in _SYSTEM if name in row][:1]
    section = dict(found.section)
    if before or after:
        names = (*before, column, *after)
        section["prompt"] = "\n\n".join(f"{{{name}}}" for name in names)
    if system:
        section["system"] = f"{{{system[0]}}}"
    return Recognised(section, (*found.columns, *before, *after, *system))
