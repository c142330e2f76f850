"""Every example row of docs/data.md is read under the task that is named above it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from runner.data.tasks.base import Example, Task, derive_row_key
from runner.data.tasks.python import PythonTask
from runner.recipe.data_section import AnyTask, find_tasks
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def list_examples() -> Iterator[tuple[str, str]]:
    """`(task section, row)` of every JSON line; of message trees, all lines of a block."""
    for block in re.finditer(r"^```json (.+)\n((?:.+\n)+?)```$", PAGE, re.MULTILINE):
        if "oasst1" in block[1]:
            yield block[1], block[2]
            continue
        for line in block[2].splitlines():
            yield block[1], line


def read(section: str, line: str) -> Example:
    stated: Any = json.loads(section) if section.startswith("{") else {"name": section}
    task: Task = TypeAdapter(AnyTask).validate_python(stated)
    rows = [("docs/data.md", json.loads(one)) for one in line.splitlines()]
    (example,) = task.build_examples(rows).examples
    return example


@pytest.mark.parametrize(("section", "line"), list(list_examples()))
def test_an_example_row_is_read(section: str, line: str) -> None:
    example = read(section, line)
    assert example.messages[-1]["role"] == "assistant" and len(example.key) == 64


def test_the_page_shows_rows_of_every_task() -> None:
    """Functions of the project are excepted; the page shows them as Python."""
    tasks = [get_args(task.model_fields["name"].annotation)[0] for task in find_tasks()]
    shown = " ".join(section for section, _ in list_examples())
    assert [name for name in tasks if name not in shown] == ["python"]


def test_the_function_on_the_page_makes_a_conversation() -> None:
    (source,) = re.findall(r"```python\n(def build.+?)```", PAGE, re.DOTALL)
    task = PythonTask(name="python", function="rows.py:build").with_sources({"rows.py": source})
    (example,) = task.build_examples([("row 1", {"q": " Two? ", "a": "Four."})]).examples
    assert [one["content"] for one in example.messages] == ["Two?", "Four."]


def test_examples_hold_what_the_page_says() -> None:
    by_line = {line: read(section, line) for section, line in list_examples()}
    called = [one for one in by_line.values() if one.tools]
    assert len(called) == 2
    assert all(
        one.messages[1]["tool_calls"] and one.messages[2]["role"] == "tool" for one in called
    )
    (weighted,) = [one for one in by_line.values() if one.untrained]
    assert weighted.untrained == {1}
    (mathematical,) = [one for one in by_line.values() if one.references == ("42",)]
    assert [one["role"] for one in mathematical.messages][2] == "user"
    prompts = [one.messages[0]["content"] for one in by_line.values()]
    assert "Translate to French.\n\ncat" in prompts and "Name a colour." in prompts
    assert "Oslo is a city.\n\nWhat is Oslo?" in prompts


def load_key_rule() -> Callable[..., str]:
    """The function on the page; the example below it, which it asserts, has been executed then."""
    (source,) = re.findall(r"```python\n(import hashlib.+?)```", PAGE, re.DOTALL)
    assert re.search(r'\[:16\] == "[0-9a-f]{16}"', source)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    rule: Callable[..., str] = namespace["derive_key"]
    return rule


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([" a\r\nb\n", "\r\n", "é\u2028", datetime.date(2026, 1, 2)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(row=st.dictionaries(st.text() | st.sampled_from(["id", "name", "source"]), VALUES))
def test_the_rule_of_keys_on_the_page_is_the_rule(row: dict[str, Any]) -> None:
    rule = load_key_rule()
    assert rule(row) == derive_row_key(row)
    assert rule([row, "x"]) == derive_row_key([row, "x"])
    assert rule(row, ("id", "name", "source", "idx")) == derive_row_key(row, ("idx",))


def test_the_rule_of_keys_on_the_page_gives_the_keys_of_its_example_rows() -> None:
    """For tasks and prompts that read none of the columns that are left out."""
    rule, names = load_key_rule(), set()
    for section, line in list_examples():
        if "oasst1" in section:
            continue
        names.add(section if section.isidentifier() else json.loads(section)["name"])
        bookkeeping = {"sst2": ("idx",), "squad_v2": ("title", "plausible_answers")}
        more = next((those for task, those in bookkeeping.items() if task in section), ())
        key = read(section, line).key
        assert rule(json.loads(line), ("id", "name", "source", *more)) == key
    assert {"sst2", "squad_v2", "conversations", "alpaca"} <= names
    tree = next(text for section, text in list_examples() if "oasst1" in section)
    messages = [json.loads(one) for one in tree.splitlines()]
    path = [[one["role"], one["text"]] for one in messages]
    assert rule(path) == read('{"name": "oasst1", "include_unreviewed": true}', tree).key
