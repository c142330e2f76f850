"""Documents go into the prompt as they are; ROUGE of summaries on examples computed by hand."""

from __future__ import annotations

import pytest

from runner.data.tasks.summarization import SummarizationTask
from tests.support.tasks import build, judge_all

SUMMARIES = SummarizationTask(name="summarization", prompt="{document}")


def test_a_document_with_braces_goes_into_the_prompt_as_it_is() -> None:
    task = SummarizationTask(
        name="summarization", prompt="Sum up: {document}!", document_column="dialogue"
    )
    example = build({"dialogue": "{document} {0} %s {{ x }}", "summary": "s"}, task)
    assert example.messages[0]["content"] == "Sum up: {document} {0} %s {{ x }}!"
    assert (example.messages[1]["content"], example.references) == ("s", ("s",))


def test_rouge_by_hand() -> None:
    # Stemmed: "the cat sleep" and "the cat sleep on the mat": 3 of 3 and 3 of 6 words, 2 of 2 and 2
    # of 5 pairs.
    judgements, metrics = judge_all(
        SUMMARIES, [("The cat sleeps.", ("the cat sleeping on the mat",))]
    )
    assert metrics == pytest.approx({"rouge1": 2 / 3, "rouge2": 2 * 0.4 / 1.4, "rougeL": 2 / 3})
    assert judgements[0].scores == metrics
    # The same words in another order: the longest common subsequence is "on the mat".
    other = judge_all(SUMMARIES, [("on the mat the cat sleeps", ("the cat sleeps on the mat",))])[1]
    assert other == pytest.approx({"rouge1": 1, "rouge2": 4 / 5, "rougeL": 1 / 2})
    assert judge_all(SUMMARIES, [("", ("x",))])[1] == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
