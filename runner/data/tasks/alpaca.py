"""The task `alpaca`: an instruction, an input that may be empty, and the answer, judged by exact
match.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field

from runner.data.tasks.base import (
    Example,
    Judgement,
    References,
    judge_exact_match,
    read_text,
    require_object,
)
from runner.data.tasks.prompts import PromptTask
from runner.strict import Text


class AlpacaTask(PromptTask):
    """Rows with `instruction`, `input` and `output`. The prompt is the instruction,
    followed by the input if the row has one.
    """

    METRICS = ("exact_match",)
    ORDER = 3
    RECOGNISED_BY = ((("instruction", "output"), {}),)
    RECOGNITION_ORDER = 4
    PLACEHOLDERS = ("instruction",)
    OPTIONAL_COLUMNS = ("input",)

    name: Literal["alpaca"]
    prompt: Text = Field(
        default="{instruction}\n\n{input}",
        description=(
            "The text of the user's turn. It holds {instruction} exactly once; other columns may be"
            " in braces too."
        ),
    )

    def list_read_columns(self) -> Collection[str]:
        return ("instruction", "output")

    def list_answer_columns(self) -> Collection[str]:
        return ("output",)

    def build_example(self, row: Any, where: str) -> Example:
        columns: Mapping[str, Any] = require_object(row, where)
        instruction = read_text(columns, "instruction", where)
        output = read_text(columns, "output", where)
        texts = {"instruction": instruction}
        return self.build_prompted(columns, where, texts, output, (output,))

    def judge(self, prediction: str, references: References) -> Judgement:
        return judge_exact_match(prediction, references)
