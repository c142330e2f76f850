"""Every example row of docs/data.md is read under the task that stands above it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from runner.data.tasks.base import Example, Task
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
    """But for functions of the project, which the page shows as Python."""
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
