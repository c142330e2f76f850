"""Calls, tools, reasoning, weights and contents in each accepted form become one form; every other
form is refused with its message.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from runner.data.tasks.conversations import ConversationsTask
from runner.data.tasks.math_tools import MathToolsTask
from runner.errors import DataError
from tests.support.tasks import build

CONVERSATIONS: Final = ConversationsTask(name="conversations")
USER: Final = {"role": "user", "content": "Weather?"}
ANSWER: Final = {"role": "assistant", "content": "4 C."}
RESULT: Final = {"role": "tool", "content": "4 C"}
FUNCTION: Final = {"name": "get", "arguments": {"city": "Oslo"}}
READ: Final = {"type": "function", "function": FUNCTION}


def row(**message: Any) -> dict[str, Any]:
    """A conversation whose second message is an assistant's with these keys."""
    return {"messages": [USER, {"role": "assistant", **message}, RESULT, ANSWER]}


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
        {"content": "", "tool_calls": [{**READ, "id": None, "index": None}]},
        {"content": None, "function_call": {"name": "get", "arguments": '{"city": "Oslo"}'}},
        {"content": "", "function_call": FUNCTION, "tool_calls": None},
        {"role": "function_call", "content": json.dumps(FUNCTION)},
        {"role": "tool_call", "content": json.dumps([READ])},
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
    assert found.unused == {"tool_calls (empty)": 1}
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


SCHEMA: Final = {"name": "get", "parameters": {"type": "object", "properties": {}}}


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


REFUSED: Final[list[tuple[dict[str, Any], str]]] = [
    (row(content="", weight="high"), 'message 2: `weight` is "high"; 0 and 1 only'),
    (row(content="", weight=2), "message 2: `weight` is 2; 0 and 1 only"),
    (row(content="", weight=0, train=True), "message 2: `weight` and `train` contradict"),
    (
        {"messages": [{**USER, "weight": 1}, ANSWER]},
        "message 1: `weight` is 1, but the role is 'user': only an assistant's messages are",
    ),
    (
        {"messages": [USER, {**ANSWER, "train": False}]},
        "every assistant turn has weight 0, so there is nothing to learn from it",
    ),
    (row(content="", tool_calls="get()"), "message 2, `tool_calls`: is not JSON"),
    (row(content="", tool_calls=[{"name": 3}]), 'found {"name": 3}'),
    (row(content="", tool_calls=[{**READ, "type": "code"}]), '"type": "code"'),
    (row(content="", tool_calls=[{**FUNCTION, "result": 4}]), '"result": 4'),
    (
        row(content="", tool_calls=[{"name": "get", "arguments": "{city: Oslo}"}]),
        "message 2, `tool_calls`, `arguments`: is not JSON",
    ),
    (
        row(content="", tool_calls=[{"name": "get", "arguments": '{"a": 1, "a": 2}'}]),
        "the key 'a' stands twice",
    ),
    (
        row(content="", tool_calls=[{"name": "get", "arguments": ["Oslo"]}]),
        "`arguments`: expected an object or its JSON text, found a list",
    ),
    (row(content="", tool_calls=[READ], function_call=FUNCTION), "has both `tool_calls` and"),
    ({"messages": [{**USER, "tool_calls": [READ]}, ANSWER]}, "message 1: has `tool_calls`, but"),
    ({"messages": [{**USER, "thinking": "Hm."}, ANSWER]}, "has `reasoning_content`, but the role"),
    (row(content="x", tool_call_id="c1"), "message 2: has `tool_call_id`, but the role"),
    (row(content="x", thinking=["Hm."]), "message 2: `thinking` should be a text, found a list"),
    (row(content="x", thinking="a", reasoning="b"), "`thinking` and `reasoning` say different"),
    (row(content="x", value="y"), "message 2: `content` and `value` say different things"),
    (row(content=None), "message 2: expected the texts `role` and `content`"),
    (row(role="function_call", content="get()"), "message 2: is not JSON"),
    (
        row(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        'message 2: the content holds a part of the type "image_url" with `image_url`',
    ),
    (row(content=[{"type": "text", "text": 3}]), "a part of the content should be a text"),
    ({"messages": [USER, ANSWER], "tools": "get"}, "column `tools`: is not JSON"),
    ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "column `tools`: expected a list of"),
    ({"messages": [USER, ANSWER], "functions": [3]}, "column `functions`, function 1: expected"),
    (
        {"messages": [USER, ANSWER], "tools": [{"type": "code", "function": SCHEMA}]},
        'function 1: the type is "code", only `function` is accepted',
    ),
    ({"messages": [USER, ANSWER], "system": 3}, "column `system` should be a text"),
    (
        {"messages": [{"role": "System", "content": "a"}, USER, ANSWER], "system": "b"},
        "the column `system` and the first message are two different system texts",
    ),
]


@pytest.mark.parametrize(("bad", "words"), REFUSED)
def test_other_forms_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        build(bad, CONVERSATIONS, "rows.jsonl line 7")
    assert str(caught.value).startswith("rows.jsonl line 7") and words in str(caught.value)


def test_one_system_text_may_be_said_twice() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, USER, ANSWER]
    example = build({"messages": messages, "system": "Be brief.\n"}, CONVERSATIONS)
    assert [message["role"] for message in example.messages] == ["developer", "user", "assistant"]
