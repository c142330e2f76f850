"""Calls, tools, reasoning, weights and contents in each accepted form become one form; every other
form is refused with its message.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

import pytest

from runner.data.tasks.conversations import ConversationsTask
from runner.data.tasks.math_tools import MathToolsTask
from runner.data.tasks.messages import read_message, read_tools
from runner.errors import DataError
from tests.support.refused_rows import ANSWER, FUNCTION, READ, REFUSED, RESULT, SCHEMA, USER, row
from tests.support.tasks import build

CONVERSATIONS: Final = ConversationsTask(name="conversations")


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [READ]},
        {"tool_calls": [READ]},
        {"content": "", "tool_calls": [FUNCTION]},
        {"content": "", "tool_calls": json.dumps([READ])},
        {
            "content": "",
            "tool_calls": [{"function": {**FUNCTION, "arguments": '{"city": "Oslo"}'}}],
        },
        {"content": "", "tool_calls": [{**READ, "id": None, "index": None}], "function_call": {}},
        {"content": None, "function_call": {"name": "get", "arguments": '{"city": "Oslo"}'}},
        {"content": "", "function_call": FUNCTION, "tool_calls": None},
        {"role": "function_call", "content": json.dumps(FUNCTION)},
        {"role": "tool_call", "content": json.dumps([READ])},
        {"role": "function_call", "content": FUNCTION},
    ],
)
def test_calls_of_every_form(message: dict[str, Any]) -> None:
    turn = build(row(**message), CONVERSATIONS).messages[1]
    assert turn == {"role": "assistant", "content": "", "tool_calls": [READ]}


def test_a_call_that_follows_a_text_is_said_in_the_same_turn() -> None:
    calls = [{"from": "function_call", "value": json.dumps(FUNCTION)}] * 2
    said = {"from": "gpt", "value": "Let me look."}
    result = {"from": "observation", "value": "4 C"}
    messages = [{"from": "human", "value": "Weather?"}, said, *calls, result, result, said]
    example = build({"conversations": messages}, CONVERSATIONS)
    assert [message["role"] for message in example.messages] == [
        *("user", "assistant", "tool", "tool", "assistant")
    ]
    assert example.messages[1]["tool_calls"] == [READ, READ]
    assert example.messages[1]["content"] == "Let me look."
    with pytest.raises(DataError, match="message 3: is a call in the turn of message 2, but its"):
        build({"messages": [messages[0], {**said, "weight": 0}, *calls, said]}, CONVERSATIONS)


def test_nulls_of_arrow_are_no_arguments_and_nulls_of_a_text_are() -> None:
    arrow = {"name": "get", "arguments": {"city": "Oslo", "query": None}}
    found = CONVERSATIONS.build_examples([("row 1", row(content="", tool_calls=[arrow]))])
    assert found.examples[0].messages[1]["tool_calls"] == [READ]
    assert found.unused == {"messages.tool_calls (empty)": 1}
    text = {"name": "get", "arguments": '{"city": null}'}
    (call,) = build(row(content="", tool_calls=[text]), CONVERSATIONS).messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize("role", ["tool", "Function", "ipython", "observation", "tool_response"])
def test_what_a_tool_answers_has_one_role(role: str) -> None:
    said = {**RESULT, "role": role, "name": "get", "tool_call_id": "c1"}
    rows = {"messages": [USER, {"role": "assistant", "tool_calls": [READ]}, said, ANSWER]}
    result = build(rows, CONVERSATIONS).messages[2]
    assert result == {"role": "tool", "content": "4 C", "name": "get", "tool_call_id": "c1"}
    math = MathToolsTask(name="math_tools")
    assert build(rows, math).messages[2]["role"] == "tool", "its call is structured"
    rows["messages"][1] = {"role": "assistant", "content": "get()"}
    assert build(rows, math).messages[2]["role"] == "user"


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [{"type": "function", "function": SCHEMA}]},
        {"tools": json.dumps([{"type": "function", "function": SCHEMA}])},
        {"tools": [json.dumps({"function": SCHEMA})]},
        {"tools": [SCHEMA]},
        {"functions": [SCHEMA], "tools": None},
        {"tools": [{"function": {**SCHEMA, "strict": None}}], "functions": []},
    ],
)
def test_tools_of_every_form(columns: dict[str, Any]) -> None:
    example = build({"messages": [USER, ANSWER], **columns}, CONVERSATIONS)
    assert example.tools == ({"type": "function", "function": SCHEMA},)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(key: str) -> None:
    assert build(row(content="4", **{key: "2 x 2"}), CONVERSATIONS).messages[1] == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "2 x 2",
    }
    assert (
        "reasoning_content" not in build(row(content="4", **{key: ""}), CONVERSATIONS).messages[1]
    )


@pytest.mark.parametrize("key", ["weight", "train", "trainable"])
def test_weights_of_0_are_not_trained(key: str) -> None:
    for nothing in (0, 0.0, False):
        user = {**USER, key: nothing}
        rows = {"messages": [user, {**ANSWER, key: nothing}, USER, {**ANSWER, key: 1}]}
        assert build(rows, CONVERSATIONS).untrained == {1}
        assert build({"system": "Be brief.", **rows}, CONVERSATIONS).untrained == {2}
    assert build(row(content="x", **{key: None}), CONVERSATIONS).untrained == frozenset()


@pytest.mark.parametrize(("bad", "words"), REFUSED)
def test_other_forms_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        build(bad, CONVERSATIONS, "rows.jsonl line 7")
    assert str(caught.value).startswith("rows.jsonl line 7") and words in str(caught.value)


def test_one_system_text_may_be_said_twice() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, USER, ANSWER]
    example = build({"messages": messages, "system": "Be brief.\n"}, CONVERSATIONS)
    assert [message["role"] for message in example.messages] == ["developer", "user", "assistant"]


@pytest.mark.parametrize("value", [float("nan"), datetime(2026, 1, 31), b"x", [{"a": {1}}]])
def test_what_json_cannot_say_is_no_argument_and_no_schema(value: Any) -> None:
    call = {"name": "f", "arguments": {"a": value}}
    with pytest.raises(DataError, match="message 2, `tool_calls`, `arguments`: cannot be written"):
        read_message({"role": "assistant", "tool_calls": [call]}, "line 1, message 2")
    tool = {"name": "f", "parameters": {"default": value}}
    with pytest.raises(DataError, match="column `tools`, function 1: cannot be written as JSON"):
        read_tools([tool], "line 1, column `tools`")
