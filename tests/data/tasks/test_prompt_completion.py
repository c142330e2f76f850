"""Two named columns become a question and its answer, judged by exact match."""

from __future__ import annotations

from runner.data.tasks.base import Example
from runner.data.tasks.prompt_completion import PromptCompletionTask
from tests.support.tasks import build, judge_all

EXPECTED = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})


def test_prompt_and_completion_from_named_columns() -> None:
    task = PromptCompletionTask(
        name="prompt_completion", prompt_column="question", completion_column="answer"
    )
    assert build({"question": "hi", "answer": "hello"}, task) == Example(
        "row 1", EXPECTED, ("hello",)
    )


def test_exact_match_of_completions() -> None:
    task = PromptCompletionTask(name="prompt_completion")
    assert judge_all(task, [("a b ", (" a b",)), ("A b", ("a b",))])[1] == {"exact_match": 0.5}
