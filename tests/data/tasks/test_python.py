"""The task `python`: what a function returns becomes a row, or an error that names row and
function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from runner.data.tasks.base import Example, derive_row_key
from runner.data.tasks.python import PythonTask
from runner.errors import DataError

TURNS = "[{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': 'A'}]"
ROWS = [{"q": f"Q{number}"} for number in range(3)]


def make_task(body: str) -> PythonTask:
    """The task whose function is `body`."""
    task = PythonTask(name="python", function="rows.py:build")
    return task.with_sources({"rows.py": body})


def build(returned: str, rows: Sequence[Any] = ROWS) -> list[Example]:
    """The examples of rows, by a function that returns an expression."""
    task = make_task(f"def build(row):\n    return {returned}\n")
    return list(task.build_examples((f"d line {n}", row) for n, row in enumerate(rows, 1)).examples)


def test_a_list_is_the_messages() -> None:
    examples = build(TURNS)
    assert [example.messages[0]["content"] for example in examples] == ["Q0", "Q1", "Q2"]
    assert [example.where for example in examples] == ["d line 1", "d line 2", "d line 3"]
    assert [example.key for example in examples] == [derive_row_key(row) for row in ROWS]
    assert examples[0].columns == {"q": "Q0"}


def test_an_object_has_tools_references_and_a_group() -> None:
    tool = "{'type': 'function', 'function': {'name': 'add', 'parameters': {'type': 'object'}}}"
    (example, *_) = build(
        f"{{'messages': {TURNS}, 'tools': [{tool}], 'references': ['A', 'B'], 'group': 'g'}}"
    )
    assert example.tools[0]["function"]["name"] == "add"
    assert (example.references, example.group) == (("A", "B"), "g")
    (plain, *_) = build(f"{{'messages': {TURNS}, 'references': None, 'group': None}}")
    assert (plain.references, plain.group, plain.tools) == ((), None, ())


def test_messages_are_read_as_in_data() -> None:
    (example, *_) = build(
        "[{'from': 'human', 'value': 'Q'},"
        " {'role': 'assistant', 'content': 'no', 'weight': 0},"
        " {'role': 'user', 'content': 'Q2'},"
        " {'role': 'assistant', 'content': 'A', 'reasoning_content': 'because'}]"
    )
    assert example.untrained == {1} and example.messages[0]["role"] == "user"
    assert example.messages[3]["reasoning_content"] == "because"


def test_a_row_may_be_anything_that_json_says() -> None:
    messages = "[{'role': 'user', 'content': str(row)}, {'role': 'assistant', 'content': 'A'}]"
    examples = build(messages, [["a", 1], "text", {"n": None}])
    said = [example.messages[0]["content"] for example in examples]
    assert said == ["['a', 1]", "text", "{'n': None}"]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "found nothing (None), but a function may not leave rows out"),
        ("'text'", "found a text"),
        ("{'message': []}", "found an object without 'messages'"),
        ("[]", "expected a list of messages, found an empty list"),
        (f"{{'messages': {TURNS}, 'reference': []}}", "has the unknown key 'reference'"),
        (f"{{'messages': {TURNS}, 'references': 'A'}}", "'references' should be a list of texts"),
        (f"{{'messages': {TURNS}, 'references': [1]}}", "'references' should be a list of texts"),
        (f"{{'messages': {TURNS}, 'group': 3}}", "'group' should be a text, found a number"),
        ("[{'role': 'user', 'content': 'Q'}]", "has no assistant turn"),
        ("[{'role': 'user'}]", "message 1"),
    ],
)
def test_anything_else_is_refused(returned: str, words: str) -> None:
    with pytest.raises(DataError) as raised:
        build(returned)
    assert raised.value.message.startswith("d line 1, what rows.py:build returned")
    assert words in raised.value.message


@pytest.mark.parametrize(
    "body",
    [
        "import random\ndef build(row):\n    row['q'] += str(random.random())\n    return TURNS",
        "import os\ndef build(row):\n    row['q'] += str(os.getpid())\n    return TURNS",
        "seen = []\ndef build(row):\n    seen.append(1)\n    row['q'] += str(len(seen))\n"
        "    return TURNS",
    ],
    ids=["chance", "process", "order"],
)
def test_check_refuses_a_function_that_answers_differently(body: str) -> None:
    task = make_task(body.replace("TURNS", TURNS))
    rows = [(f"d line {n}", row) for n, row in enumerate(ROWS)]
    task.build_examples(rows)
    with pytest.raises(DataError, match=r"d line 0: rows\.py:build returned other messages"):
        task.for_check().build_examples(rows)


def test_check_builds_a_function_that_does_not() -> None:
    task = make_task(
        f"def build(row):\n    return {{'messages': {TURNS}, 'group': str(hash(row['q']))}}"
    )
    rows = [(f"d line {n}", row) for n, row in enumerate(ROWS)]
    assert task.for_check().build_examples(rows) == task.build_examples(iter(rows))
    assert task.for_check().model_dump_json() == task.model_dump_json()
