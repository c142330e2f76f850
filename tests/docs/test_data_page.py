"""Every example row of docs/data.md is read under the task that stands above it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from runner.data.tasks.base import Example, Task
from runner.recipe.data_section import AnyTask
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def list_examples() -> Iterator[tuple[str, str]]:
    """`(task section, row)` of every JSON line."""
    for block in re.finditer(r"^```json (.+)\n((?:.+\n)+?)```$", PAGE, re.MULTILINE):
        for line in block[2].splitlines():
            yield block[1], line


def read(section: str, line: str) -> Example:
    stated: Any = json.loads(section) if section.startswith("{") else {"name": section}
    task: Task = TypeAdapter(AnyTask).validate_python(stated)
    (example,) = task.build_examples([("docs/data.md", json.loads(line))]).examples
    return example


@pytest.mark.parametrize(("section", "line"), list(list_examples()))
def test_an_example_row_is_read(section: str, line: str) -> None:
    example = read(section, line)
    assert example.messages[-1]["role"] == "assistant" and len(example.key) == 64


def test_the_page_shows_every_task_that_reads_one_row() -> None:
    shown = {read(*example).where and json.dumps(example) for example in list_examples()}
    names = {"conversations", "prompt_completion", "alpaca", "summarization", "sst2", "squad_v2"}
    assert all(any(name in text for text in shown) for name in names)


def test_examples_hold_what_the_page_says() -> None:
    by_line = {line: read(section, line) for section, line in list_examples()}
    called = [one for one in by_line.values() if one.tools]
    assert len(called) == 2
    assert all(
        one.messages[1]["tool_calls"] and one.messages[2]["role"] == "tool" for one in called
    )
    (weighted,) = [one for one in by_line.values() if one.untrained]
    assert weighted.untrained == {1}
    prompts = [one.messages[0]["content"] for one in by_line.values()]
    assert "Translate to French.\n\ncat" in prompts and "Name a colour." in prompts
    assert "Oslo is a city.\n\nWhat is Oslo?" in prompts
