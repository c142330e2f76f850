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

from runner.data.tasks.base import MEANINGS, NEUTRAL_COLUMNS, Task, UnusedColumnsError
from runner.data.tasks.math_tools import MathToolsTask
from runner.data.tasks.prompt_completion import PromptCompletionTask
from runner.data.tasks.squad_v2 import SquadV2Task
from runner.data.tasks.sst2 import Sst2Task
from runner.data.tasks.summarization import SummarizationTask
from runner.errors import DataError
from runner.recipe.data_section import AnyTask, find_tasks
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
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
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


# Columns that are all read.
WHOLE_ROWS: Mapping[str, dict[str, Any]] = {
    **COLUMN_TASKS,
    "conversations": {"messages": CHAT, "tools": [], "system": "Be brief."},
    "math_tools": {"messages": CHAT},
    "alpaca": {"instruction": "a", "input": "b", "output": "c"},
    "oasst1": {
        "message_id": "a",
        "parent_id": None,
        "role": "prompter",
        "text": "hi",
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "rank": 0,
        "tree_state": "ready_for_export",
        "message_tree_id": "a",
    },
}
MEANINGFUL = (
    *("tools", "tool_calls", "functions", "function_call", "reasoning_content", "thinking"),
    *("weight", "train", "trainable", "loss", "loss_mask", "system", "input", "context"),
    *("images", "image", "audio", "videos", "chosen", "rejected", "history", "note"),
)


def parse(name: str) -> Task:
    section = {"name": name} | ({"prompt": PROMPTS[name]} if name in PROMPTS else {})
    return TypeAdapter[AnyTask](AnyTask).validate_json(json.dumps(section))


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_every_column_is_used_refused_or_counted(name: str) -> None:
    task, row = parse(name), WHOLE_ROWS[name]
    assert task.build_examples([("row 1", row)]).unused == {}
    neutral = {"id": 7, "name": "x", "source": "y", "note": None, "images": []}
    counted = {"id": 2, "name": 2, "source": 2, "note (empty)": 2, "images (empty)": 2}
    rows = [("row 1", row | neutral), ("row 2", neutral | row), ("row 3", row)]
    if name != "oasst1":  # one id is one message
        found = task.build_examples(rows)
        assert found.unused == counted
        assert len({example.key for example in found.examples}) == 2, "a list is no null"
    for column in MEANINGFUL:
        if column in task.list_used_columns(row):
            continue
        with pytest.raises(
            UnusedColumnsError, match=rf"^row 2: the column `{column}` is not used by .*`{name}`"
        ) as caught:
            list_unused(task, [row, row | {column: "x"}, row | {column: "x"}])
        assert caught.value.names == (column,)
        assert f"`data.ignore: [{column}]`" in str(caught.value)
        list_unused(task, [row | {column: "x"}], used=frozenset({column}))
    assert list_unused(task, [row | {"id": 7}], used=frozenset({"id"})) == {}, "the group's column"


def list_unused(
    task: Task, rows: list[dict[str, Any]], used: frozenset[str] = frozenset()
) -> Mapping[str, int]:
    placed = [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    return task.build_examples(placed, used=used).unused


def test_all_columns_and_keys_are_refused_at_once() -> None:
    said = [{**CHAT[0], "toxic": False}, {**CHAT[1], "id": "m2", "refusal": None}]
    rows = [{"messages": CHAT}, {"messages": said}, {"messages": CHAT, "weight": 1, "tools": ""}]
    with pytest.raises(UnusedColumnsError) as caught:
        list_unused(parse("conversations"), rows)
    assert str(caught.value).splitlines()[:5] == [
        "these are not used by the task `conversations`:",
        "  row 2: the message key `toxic`",
        "  row 3: the column `weight`",
        "",
        "hint: `data.ignore: [messages.toxic, weight]` leaves what you do not need out of the rows",
    ]
    counted = list_unused(
        parse("conversations"), rows, used=frozenset({"messages.toxic", "weight"})
    )
    assert counted == {"messages.id": 1, "messages.refusal (empty)": 1}


@pytest.mark.parametrize(
    ("name", "bookkeeping"),
    [
        ("sst2", {"idx": 1}),
        ("squad_v2", {"title": "Eskow", "plausible_answers": {"text": ["x"]}}),
        ("oasst1", {"user_id": "u", "labels": {"name": []}, "detoxify": {"toxicity": 0.1}}),
    ],
)
def test_bookkeeping_of_a_data_set_is_counted_and_makes_no_other_row(
    name: str, bookkeeping: dict[str, Any]
) -> None:
    task, row = parse(name), WHOLE_ROWS[name]
    assert list_unused(task, [row | bookkeeping]) == dict.fromkeys(sorted(bookkeeping), 1)
    if name != "oasst1":
        assert build(row | bookkeeping, task).key == build(row, task).key


def test_no_bookkeeping_has_a_meaning_elsewhere() -> None:
    for task in find_tasks():
        assert not set(task.BOOKKEEPING) & (set(MEANINGS) | set(NEUTRAL_COLUMNS)), task


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
    code = (
        "import sys; from runner.recipe.libraries import hide_libraries; hide_libraries(['scipy']);"
        " import runner.sft.train;"
        f" print([name for name in {heavy} if sys.modules.get(name) is not None])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
