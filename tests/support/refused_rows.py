"""Conversations that no task can read, and the error for each."""

from __future__ import annotations

import json
from typing import Any, Final

USER: Final = {"role": "user", "content": "Weather?"}
ANSWER: Final = {"role": "assistant", "content": "4 C."}
RESULT: Final = {"role": "tool", "content": "4 C"}
FUNCTION: Final = {"name": "get", "arguments": {"city": "Oslo"}}
READ: Final = {"type": "function", "function": FUNCTION}
SCHEMA: Final = {"name": "get", "parameters": {"type": "object", "properties": {}}}


def row(**message: Any) -> dict[str, Any]:
    """A conversation whose second message is an assistant's with these keys."""
    return {"messages": [USER, {"role": "assistant", **message}, RESULT, ANSWER]}


REFUSED: Final[list[tuple[dict[str, Any], str]]] = [
    ({"messages": [USER, 7]}, "message 2: expected an object, found a number"),
    (row(content="", weight="high"), 'message 2: `weight` is "high"; only 0 and 1'),
    (row(content="", weight=2), "message 2: `weight` is 2; only 0 and 1"),
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
    (row(content="", tool_calls=[7]), "message 2, `tool_calls`: expected"),
    (row(content="", tool_calls="[]"), "found an empty list"),
    (
        row(content="", tool_calls=[{"name": "get", "arguments": '{"a": NaN}'}]),
        "message 2, `tool_calls`, `arguments`: is not JSON (NaN is not a JSON number)",
    ),
    (
        {
            "messages": [
                USER,
                {**ANSWER, "weight": 0},
                {"from": "function_call", "value": json.dumps(FUNCTION), "weight": 1},
            ]
        },
        "message 3: is a call in the turn of message 2, but its weight differs",
    ),
    (row(content="", tool_calls=[{"name": 3}]), 'found {"name": 3}'),
    (row(content="", tool_calls=[{**READ, "type": "code"}]), '"type": "code"'),
    (row(content="", tool_calls=[{**FUNCTION, "result": 4}]), '"result": 4'),
    (
        row(content="", tool_calls=[{"name": "get", "arguments": "{city: Oslo}"}]),
        "message 2, `tool_calls`, `arguments`: is not JSON",
    ),
    (
        row(content="", tool_calls=[{"name": "get", "arguments": '{"a": 1, "a": 2}'}]),
        "the key 'a' appears twice",
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
