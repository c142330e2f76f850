"""Rows of every accepted shape become the same conversations; every other shape is refused by row and column."""

from __future__ import annotations

from typing import Any

import pytest

from runner.errors import DataError
from runner.recipe_sections import ConversationsTask, PromptCompletionTask, SummarizationTask
from runner.sft.tasks import build_conversation

CONVERSATIONS = ConversationsTask(name="conversations")
EXPECTED = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": list(EXPECTED)},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": [EXPECTED[0]], "completion": [EXPECTED[1]]},
        list(EXPECTED),
    ],
)
def test_conversations_of_every_shape(row: Any) -> None:
    assert build_conversation(row, CONVERSATIONS, "row 1") == EXPECTED


def test_prompt_and_completion_from_named_columns() -> None:
    task = PromptCompletionTask(name="prompt_completion", prompt_column="question", completion_column="answer")
    assert build_conversation({"question": "hi", "answer": "hello"}, task, "row 1") == EXPECTED


def test_a_document_with_braces_goes_into_the_prompt_as_it_is() -> None:
    task = SummarizationTask(name="summarization", prompt="Sum up: {document}!")
    row = {"document": "{document} {0} %s {{ x }}", "summary": "s"}
    conversation = build_conversation(row, task, "row 1")
    assert conversation[0]["content"] == "Sum up: {document} {0} %s {{ x }}!"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has none of the columns `messages`"),
        ({"messages": []}, "expected a list of messages, found an empty list"),
        ({"messages": "hi"}, "expected a list of messages, found a text"),
        ({"messages": ["hi"]}, "message 1: expected an object, found a text"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: expected the texts `role` and `content`"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "has no assistant turn"),
        ({"prompt": "hi", "completion": "hello"}, "has the columns `prompt` and `completion`, no messages"),
        ("hi", "expected a conversation, found a text"),
        (None, "found nothing (null)"),
    ],
)
def test_other_rows_are_refused_by_name(row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build_conversation(row, CONVERSATIONS, "rows.jsonl line 7")
    assert str(caught.value).startswith("rows.jsonl line 7")
    assert message in str(caught.value)


@pytest.mark.parametrize("row", [{"prompt": "hi"}, {"prompt": "hi", "completion": None}, ["hi"]])
def test_a_missing_or_wrong_column_is_named(row: Any) -> None:
    with pytest.raises(DataError, match=r"^row 3: .*(completion|object with columns)"):
        build_conversation(row, PromptCompletionTask(name="prompt_completion"), "row 3")
