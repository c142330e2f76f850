"""The task `prompt_completion`: a question and its answer in two columns, judged by exact match."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Literal

from runner.data.tasks.base import (
    Example,
    Judgement,
    Recognised,
    References,
    Task,
    build_answered,
    read_text,
    require_object,
)
from runner.strict import Text

_COLUMN_PAIRS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
)


class PromptCompletionTask(Task):
    """One user turn and one assistant turn from two columns."""

    METRICS = ("exact_match",)
    ORDER = 2
    RECOGNISED_BY = tuple(
        (pair, {"prompt_column": pair[0], "completion_column": pair[1]}) for pair in _COLUMN_PAIRS
    )
    RECOGNITION_ORDER = 5

    name: Literal["prompt_completion"]
    prompt_column: Text = "prompt"
    completion_column: Text = "completion"

    @classmethod
    def recognise(cls, row: Any) -> Recognised | None:
        found = super().recognise(row)
        if found and all(isinstance(row[column], list) for column in found.columns):
            return replace(found, section={"name": "conversations"})  # both hold messages
        return found

    def build_example(self, row: Any, where: str) -> Example:
        columns = require_object(row, where)
        prompt = read_text(columns, self.prompt_column, where)
        completion = read_text(columns, self.completion_column, where)
        return build_answered(where, prompt, completion, (completion,))

    def judge(self, prediction: str, references: References) -> Judgement:
        """1 if the answer is a reference, but for whitespace around it.

        >>> task = PromptCompletionTask(name="prompt_completion")
        >>> task.judge("It is 2. ", ("It is 2.",)).scores
        {'exact_match': 1.0}
        """
        is_equal = prediction.strip() in {reference.strip() for reference in references}
        return Judgement({"exact_match": float(is_equal)})
