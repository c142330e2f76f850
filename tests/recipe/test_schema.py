"""The tasks of a recipe are those that the folder holds."""

from __future__ import annotations

from pathlib import Path

from runner.data import tasks
from runner.recipe.schema import find_tasks


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
