"""Reads one row by a task, and judges many answers."""

from __future__ import annotations

from typing import Any

from runner.data.tasks.base import Example, Judgement, Task

Rows = list[tuple[str, tuple[str, ...]]]


def build(row: Any, task: Task, where: str = "row 1") -> Example:
    """The example of a single row."""
    (example,) = task.build_examples([(where, row)]).examples
    return example


def judge_all(task: Task, rows: Rows) -> tuple[list[Judgement], dict[str, float]]:
    """The judgement of each `(prediction, references)`, and the metrics of all."""
    with task.open_judge() as judge:
        judgements = [judge(prediction, references) for prediction, references in rows]
    return judgements, task.summarise(
        [(row[1], judgement) for row, judgement in zip(rows, judgements, strict=True)]
    )
