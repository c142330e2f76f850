"""The task `summarization`: a document and its summary, judged by ROUGE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, Self

from pydantic import model_validator

from runner.data.tasks.base import (
    Example,
    Judge,
    Judgement,
    References,
    Task,
    build_answered,
    fill_prompt,
    read_text,
    require_object,
    require_placeholders,
)
from runner.strict import Text

_COLUMN_PAIRS: Final = (
    ("document", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("article", "highlights"),
)


class SummarizationTask(Task):
    """A document (or dialogue) and its summary; `prompt` holds the placeholder `{document}` exactly
    once.
    """

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

    name: Literal["summarization"]
    prompt: Text
    document_column: Text = "document"
    summary_column: Text = "summary"

    @model_validator(mode="after")
    def _has_its_placeholders(self) -> Self:
        require_placeholders(self.prompt, "document")
        return self

    def build_example(self, row: Any, where: str) -> Example:
        columns = require_object(row, where)
        prompt = fill_prompt(self.prompt, document=read_text(columns, self.document_column, where))
        summary = read_text(columns, self.summary_column, where)
        return build_answered(where, prompt, summary, (summary,))

    @contextmanager
    def open_judge(self) -> Iterator[Judge]:
        """ROUGE-1, ROUGE-2 and ROUGE-L F-measures by rouge-score.

        With Porter's stemmer, as the original ROUGE is run for summaries (`-m`). Words are runs of
        a-z and 0-9: this is a measure for English.
        """
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(self.METRICS), use_stemmer=True)

        def judge(prediction: str, references: References) -> Judgement:
            scores = scorer.score_multi(references, prediction)
            return Judgement({name: float(scores[name].fmeasure) for name in self.METRICS})

        yield judge
