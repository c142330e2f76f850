"""Rows in the shapes that people bring, `cases/`: all of them become the right examples, or are
refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import TypeAdapter

from runner.data.sources import load_rows
from runner.data.tasks.base import Example, Examples
from runner.errors import DataError
from runner.recipe.data_section import AnyTask, DataSource

CASES: Final = Path(__file__).parent / "cases"
CALL: Final = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def read(name: str, task: Any = "conversations") -> Examples:
    section = {"name": task} if isinstance(task, str) else task
    read_by = TypeAdapter[AnyTask](AnyTask).validate_json(json.dumps(section))
    return read_by.build_examples(load_rows(DataSource(path=str(CASES / f"{name}.jsonl"))))


def texts(example: Example) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in example.messages]


@pytest.mark.parametrize(
    ("name", "said", "answer"),
    [
        ("tool_calls_empty_content", "", {"name": "get_weather", "tool_call_id": "c1"}),
        ("tool_calls_null_content", "", {"tool_call_id": "c1"}),
        ("tool_calls_with_text", "Let me look.", {"tool_call_id": "c1"}),
        ("sharegpt_tools", "", {}),
    ],
)
def test_a_call_is_what_the_assistant_says(name: str, said: str, answer: dict[str, str]) -> None:
    found = read(name)
    first = found.examples[0]
    _, turn, result, last = first.messages
    call_id = {"id": "c1"} if answer else {}
    assert turn == {"role": "assistant", "content": said, "tool_calls": [CALL | call_id]}
    assert result == {"role": "tool", "content": result["content"]} | answer
    assert last["role"] == "assistant" and "tool_calls" not in last
    assert first.tools == (TOOL,)
    assert all(example.tools == () for example in found.examples[1:]) and not found.unused


def test_messages_of_weight_0_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"weights\.jsonl line 3, message 2: `weight` is 0.5; only 0 and 1"
    ):
        read("weights")
    rows = (CASES / "weights.jsonl").read_text().splitlines()
    task = TypeAdapter[AnyTask](AnyTask).validate_json('{"name": "conversations"}')
    for number, row in enumerate(rows):
        if number != 2:
            (example,) = task.build_examples([("row", json.loads(row))]).examples
            assert example.untrained == ({1} if number < 2 else set())
            assert all(set(message) == {"role", "content"} for message in example.messages)


def test_reasoning_keys_have_one_name() -> None:
    first, second, third, *_ = read("reasoning_key").examples
    assert first.messages[1]["reasoning_content"] == "A week has 7 days, so 2 x 7."
    assert second.messages[1] == {
        "role": "assistant",
        "content": "21",
        "reasoning_content": "3 x 7",
    }
    assert "reasoning_content" not in third.messages[1]


def test_think_tags_stay_in_the_content() -> None:
    first, *_ = read("reasoning_tags").examples
    assert first.messages[1]["content"] == "<think>\nadd them\n</think>\n\n5"


def test_a_system_column_opens_the_conversation() -> None:
    first, second, *_ = read("system_column").examples
    assert texts(first)[0] == "system: Always answer in French." and len(first.messages) == 3
    assert texts(second)[0] == "user: Say 0"


def test_alpaca_rows_differ_in_their_inputs() -> None:
    found = read("alpaca", "alpaca")
    assert len({example.key for example in found.examples}) == 6
    assert [example.messages[0]["content"] for example in found.examples] == [
        *(f"Translate to French.\n\n{word}" for word in ("cat", "dog", "house", "bread")),
        "Name a colour.",
        "Name a fruit.",
    ]
    assert found.unused == {"input (empty)": 2}


def test_a_context_stands_in_the_prompt() -> None:
    columns = {"prompt": "{context}\n\n{question}", "completion_column": "answer"}
    found = read("question_context", {"name": "prompt_completion", **columns})
    assert len({example.key for example in found.examples}) == 6
    assert texts(found.examples[3]) == [
        "user: The box holds 3 balls.\n\nHow many balls?",
        "assistant: 3",
    ]
    with pytest.raises(DataError, match=r"line 1: the column `context` is not used by the task"):
        columns = {"prompt_column": "question", "completion_column": "answer"}
        read("question_context", {"name": "prompt_completion", **columns})


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("roles_with_capitals", ["user: Hi 5", "assistant: Hello 5"]),
        ("nulls_of_a_union", ["user: Hi 5", "assistant: Hello 5"]),
        ("text_parts", ["user: First part. Second 5.", "assistant: Both, 5."]),
    ],
)
def test_other_spellings_are_read(name: str, last: list[str]) -> None:
    found = read(name)
    assert len(found.examples) == 6 and texts(found.examples[-1]) == last
    assert found.unused == ({"messages (empty)": 6} if name == "nulls_of_a_union" else {})


def test_images_are_refused_by_name() -> None:
    with pytest.raises(
        DataError,
        match=r"images\.jsonl line 1: the column `images` is not used by the task `conversations`"
        r"[\s\S]*data.ignore: \[images\][\s\S]*only texts are trained on",
    ):
        read("images")
