"""The tasks of a recipe are those that the folder holds; how chats are written is said in plain
values.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runner.data import tasks
from runner.recipe.data_section import find_tasks
from runner.recipe.schema import ModelSection


def test_each_file_gives_its_task_in_the_order_that_errors_list() -> None:
    names = [task.__module__.rpartition(".")[2] for task in find_tasks()]
    assert names == [
        "conversations",
        "prompt_completion",
        "alpaca",
        "summarization",
        "sst2",
        "squad_v2",
        "oasst1",
        "math_tools",
        "python",
    ]
    files = {path.stem for path in Path(tasks.__path__[0]).glob("*.py")}
    assert files == {*names, "base", "messages", "prompts", "__init__"}
    for name, task in zip(names, find_tasks(), strict=True):
        assert task.model_fields["name"].annotation.__args__ == (name,), "a file is named after it"


def model(**keys: Any) -> ModelSection:
    return ModelSection(path="m", dtype="float32", **keys)


def test_template_arguments_are_plain_values() -> None:
    kwargs = {"enable_thinking": False, "date_string": "1 May", "levels": [1, {"a": None}]}
    dumped = model(chat_template_kwargs=kwargs).model_dump(mode="json")
    assert dumped["chat_template_kwargs"] == kwargs
    assert model().model_dump(mode="json")["chat_template_kwargs"] == {}
    for value in (date(2026, 1, 31), float("nan"), {1, 2}):
        with pytest.raises(ValidationError, match="expected plain values"):
            model(chat_template_kwargs={"x": value})


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "strftime_now", "chat_template"])
def test_what_rows_and_the_trainer_say_is_no_template_argument(name: str) -> None:
    with pytest.raises(ValidationError, match=f"`{name}`: rows and the trainer set these"):
        model(chat_template_kwargs={name: "x"})


def test_the_date_of_a_template_is_a_day() -> None:
    assert model(template_date="2026-01-31").template_date == "2026-01-31"
    for value in ("2026-02-30", "31.01.2026", "20260131", "today"):
        with pytest.raises(ValidationError, match="expected a day such as '2026-01-31'"):
            model(template_date=value)
