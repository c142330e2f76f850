"""Of every task: columns that are refused by name, metrics that a recipe may name, no library that
is not needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter

from runner.data.tasks.base import Task
from runner.data.tasks.math_tools import MathToolsTask
from runner.data.tasks.prompt_completion import PromptCompletionTask
from runner.data.tasks.squad_v2 import SquadV2Task
from runner.data.tasks.sst2 import Sst2Task
from runner.data.tasks.summarization import SummarizationTask
from runner.errors import DataError
from runner.recipe.schema import AnyTask
from tests.support.tasks import Rows, build, judge_all

SST2 = Sst2Task(name="sst2", prompt="{sentence}")
SQUAD = SquadV2Task(name="squad_v2", prompt="{context} {question}", no_answer_text="unanswerable")
MATH = MathToolsTask(name="math_tools")
SUMMARIES = SummarizationTask(name="summarization", prompt="{document}")
COLUMN_TASKS: Mapping[str, dict[str, Any]] = {
    "prompt_completion": {"prompt": "hi", "completion": "hello"},
    "summarization": {"document": "hi", "summary": "hello"},
    "sst2": {"sentence": "hi", "label": 0},
    "squad_v2": {"context": "hi", "question": "hi", "answers": {"text": [], "answer_start": []}},
}
PROMPTS = {"summarization": "{document}", "sst2": "{sentence}", "squad_v2": "{context} {question}"}


@pytest.mark.parametrize(("name", "row"), COLUMN_TASKS.items())
def test_a_missing_or_wrong_column_is_named(name: str, row: dict[str, Any]) -> None:
    section = {"name": name} | ({"prompt": PROMPTS[name]} if name in PROMPTS else {})
    task = TypeAdapter[AnyTask](AnyTask).validate_json(json.dumps(section))
    assert build(row, task).messages[0]["content"]
    for column in row:
        with pytest.raises(
            DataError, match=rf"^row 3: the column `{column}` is missing[\s\S]*its columns are"
        ):
            build({key: value for key, value in row.items() if key != column}, task, "row 3")
        with pytest.raises(DataError, match=rf"^row 3: column `{column}`.*found nothing \(null\)"):
            build(row | {column: None}, task, "row 3")
    with pytest.raises(DataError, match=r"^row 3: expected an object with columns, found a list"):
        build(["hi"], task, "row 3")


def test_metrics_are_those_that_the_recipe_may_name() -> None:
    tasks: list[tuple[Task, Rows]] = [
        (SST2, [("positive", ("positive",))]),
        (SQUAD, [("x", ("x",)), ("x", ())]),
        (SUMMARIES, [("x", ("x",))]),
        (MATH, [(r"\boxed{1}", ("1",))]),
        (PromptCompletionTask(name="prompt_completion"), [("x", ("x",))]),
    ]
    for task, rows in tasks:
        assert tuple(judge_all(task, rows)[1]) == task.METRICS


def test_a_trainer_without_generation_imports_no_metric_library() -> None:
    heavy = ("rouge_score", "nltk", "math_verify", "torchmetrics", "scipy", "sklearn")
    code = f"import runner.sft.train, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
