"""Conversations of every accepted shape become the same messages; every other shape is refused by
row.
"""

from __future__ import annotations

from typing import Any

import pytest

from runner.data.tasks.base import Example, Judgement, Task
from runner.data.tasks.conversations import ConversationsTask
from runner.data.tasks.math_tools import MathToolsTask
from runner.errors import DataError
from tests.support.tasks import build, judge_all

CONVERSATIONS = ConversationsTask(name="conversations")
MATH = MathToolsTask(name="math_tools")
EXPECTED = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": list(EXPECTED)},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": [EXPECTED[0]], "completion": [EXPECTED[1]]},
        {"prompt": [EXPECTED[0]], "completion": [EXPECTED[1]], "messages": None},
        {"messages": [], "conversation": list(EXPECTED)},
        list(EXPECTED),
    ],
)
def test_conversations_of_every_shape(row: Any) -> None:
    assert build(row, CONVERSATIONS) == Example("row 1", EXPECTED)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has none of the columns `messages`"),
        ({"messages": []}, "expected a list of messages, found an empty list"),
        ({"messages": "hi"}, "expected a list of messages, found a text"),
        ({"messages": ["hi"]}, "message 1: expected an object, found a text"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "message 1: expected the texts `role` and `content`",
        ),
        ({"messages": [{"role": "user", "content": "hi"}]}, "has no assistant turn"),
        (
            {"prompt": "hi", "completion": "hello"},
            "has the columns `prompt` and `completion`, but no messages",
        ),
        ("hi", "expected a conversation, found a text"),
        (None, "found nothing (null)"),
    ],
)
@pytest.mark.parametrize("task", [CONVERSATIONS, MATH])
def test_other_rows_are_refused_by_name(task: Task, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build(row, task, "rows.jsonl line 7")
    assert str(caught.value).startswith("rows.jsonl line 7")
    assert message in str(caught.value)


def test_conversations_are_judged_by_nobody() -> None:
    judgements, metrics = judge_all(ConversationsTask(name="conversations"), [("x", ())])
    assert judgements == [Judgement()] and metrics == {}


def test_answers_in_a_list_of_prompt_messages_are_context() -> None:
    task = ConversationsTask(name="conversations")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = task.build_example({"prompt": [*turns, turns[0]], "completion": turns[1:]}, "row 1")
    assert len(example.messages) == 4 and example.untrained == {1}
