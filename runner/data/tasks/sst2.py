"""The task `sst2`: the sentiment of a sentence, judged by accuracy and F1."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from runner.data.tasks.base import (
    Example,
    Judged,
    Judgement,
    References,
    describe_value,
    read_text,
    require_column,
    require_object,
)
from runner.data.tasks.prompts import PromptTask
from runner.errors import DataError
from runner.strict import Text


class Sst2Task(PromptTask):
    """SST-2 of GLUE: a sentence and its label, 0 or 1."""

    METRICS = ("accuracy", "f1")
    ORDER = 4
    RECOGNISED_BY = (
        (
            ("sentence", "label"),
            {"prompt": "Is this sentence positive or negative?\n\n{sentence}"},
        ),
    )
    RECOGNITION_ORDER = 4
    BOOKKEEPING = ("idx",)
    PLACEHOLDERS = ("sentence",)

    name: Literal["sst2"]
    prompt: Text = Field(
        description=(
            "The text of the user's turn. It holds {sentence} exactly once; other columns may be in"
            " braces too."
        ),
        examples=["Is this sentence positive or negative?\n\n{sentence}"],
    )
    label_texts: tuple[Text, Text] = Field(
        default=("negative", "positive"),
        description="The model's answers for the labels 0 and 1.",
    )
    sentence_column: Text = Field(default="sentence", description="The column of the sentence.")
    label_column: Text = Field(default="label", description="The column of the label.")

    def list_read_columns(self) -> Collection[str]:
        return (self.sentence_column, self.label_column)

    def list_answer_columns(self) -> Collection[str]:
        return (self.label_column,)

    def build_example(self, row: Any, where: str) -> Example:
        columns = require_object(row, where)
        sentence = read_text(columns, self.sentence_column, where)
        label = self.label_texts[_read_label(columns, self.label_column, where)]
        return self.build_prompted(columns, where, {"sentence": sentence}, label, (label,))

    def judge(self, prediction: str, references: References) -> Judgement:
        """1 if the answer is the right label text, ignoring case, and whitespace and punctuation
        around it.

        >>> task = Sst2Task(name="sst2", prompt="{sentence}")
        >>> task.judge("Positive.", ("positive",)), task.judge("good", ("positive",)).is_readable
        (Judgement(scores={'accuracy': 1.0}, is_readable=True), False)
        """
        label = _bare(prediction)
        is_right = label in {_bare(reference) for reference in references}
        return Judgement(
            {"accuracy": float(is_right)},
            is_readable=label in {_bare(text) for text in self.label_texts},
        )

    def combine_scores(self, judged: Sequence[Judged]) -> dict[str, float]:
        metrics = super().combine_scores(judged)
        if judged:
            metrics["f1"] = self._f1_of_positives(judged)
        return metrics

    def _f1_of_positives(self, judged: Sequence[Judged]) -> float:
        """F1 of label 1, computed as in GLUE; an answer that is neither label counts as the wrong
        label.
        """
        pairs = [
            (references[0] == self.label_texts[1], scores["accuracy"] == 1)
            for references, scores in judged
        ]
        true_positives = sum(is_positive and is_right for is_positive, is_right in pairs)
        num_positive = sum(is_positive for is_positive, _ in pairs)
        num_answered_positive = sum(is_positive == is_right for is_positive, is_right in pairs)
        total = num_positive + num_answered_positive
        return 2 * true_positives / total if total else 0.0


def _read_label(row: Mapping[str, Any], column: str, where: str) -> int:
    """The label 0 or 1; in CSV files, labels are texts."""
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


def _bare(text: str) -> str:
    return text.casefold().strip(string.punctuation + string.whitespace)
