"""The task `summarization`: a document and its summary, judged by ROUGE."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

from pydantic import Field

from runner.data.tasks.base import (
    Example,
    Judge,
    Judgement,
    References,
    read_text,
    require_object,
)
from runner.data.tasks.prompts import PromptTask
from runner.strict import Text

_COLUMN_PAIRS: Final = (
    ("document", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("article", "highlights"),
)


class SummarizationTask(PromptTask):
    """A document (or dialogue) and its summary."""

    METRICS = ("rouge1", "rouge2", "rougeL")
    ORDER = 3
    RECOGNISED_BY = tuple(
        (
            pair,
            {
                "prompt": "Summarize this text.\n\n{document}",
                "document_column": pair[0],
                "summary_column": pair[1],
            },
        )
        for pair in _COLUMN_PAIRS
    )
    RECOGNITION_ORDER = 6
    PLACEHOLDERS = ("document",)

    name: Literal["summarization"]
    prompt: Text = Field(
        description=(
            "The text of the user's turn. It holds {document} exactly once; other columns may be in"
            " braces too."
        ),
        examples=["Summarize this text.\n\n{document}"],
    )
    document_column: Text = Field(
        default="document", description="The column of the document, which is {document}."
    )
    summary_column: Text = Field(default="summary", description="The column of the summary.")

    def list_read_columns(self) -> Collection[str]:
        return (self.document_column, self.summary_column)

    def list_answer_columns(self) -> Collection[str]:
        return (self.summary_column,)

    def build_example(self, row: Any, where: str) -> Example:
        columns = require_object(row, where)
        document = read_text(columns, self.document_column, where)
        summary = read_text(columns, self.summary_column, where)
        return self.build_prompted(columns, where, {"document": document}, summary, (summary,))

    @contextmanager
    def open_judge(self) -> Iterator[Judge]:
        """ROUGE-1, ROUGE-2 and ROUGE-L F-measures by rouge-score.

        Uses Porter's stemmer, like the original ROUGE for summaries (`-m`). Words are runs of a-z
        and 0-9, so the measure is for English.
        """
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(self.METRICS), use_stemmer=True)

        def judge(prediction: str, references: References) -> Judgement:
            scores = scorer.score_multi(references, prediction)
            return Judgement({name: float(scores[name].fmeasure) for name in self.METRICS})

        yield judge
