"""Rows of every accepted shape become the same conversations; every other shape is refused by row
and column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter

from runner.data.tasks import Example, build_examples
from runner.errors import DataError
from runner.recipe.schema import (
    AnyTask,
    ConversationsTask,
    MathToolsTask,
    PromptCompletionTask,
    SquadV2Task,
    Sst2Task,
    SummarizationTask,
)

CONVERSATIONS = ConversationsTask(name="conversations")
MATH = MathToolsTask(name="math_tools")
SST2 = Sst2Task(name="sst2", prompt="Sentiment of: {sentence}")
SQUAD = SquadV2Task(
    name="squad_v2", prompt="{context}\n\n{question}", no_answer_text="unanswerable"
)
EXPECTED = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})


def build(row: Any, task: AnyTask, where: str = "row 1") -> Example:
    """The example of a single row."""
    (example,) = build_examples([(where, row)], task).examples
    return example


@pytest.mark.parametrize(
    "row",
    [
        {"messages": list(EXPECTED)},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": [EXPECTED[0]], "completion": [EXPECTED[1]]},
        list(EXPECTED),
    ],
)
def test_conversations_of_every_shape(row: Any) -> None:
    assert build(row, CONVERSATIONS) == Example("row 1", EXPECTED)


def test_prompt_and_completion_from_named_columns() -> None:
    task = PromptCompletionTask(
        name="prompt_completion", prompt_column="question", completion_column="answer"
    )
    assert build({"question": "hi", "answer": "hello"}, task) == Example(
        "row 1", EXPECTED, ("hello",)
    )


def test_a_document_with_braces_goes_into_the_prompt_as_it_is() -> None:
    task = SummarizationTask(
        name="summarization", prompt="Sum up: {document}!", document_column="dialogue"
    )
    example = build({"dialogue": "{document} {0} %s {{ x }}", "summary": "s"}, task)
    assert example.messages[0]["content"] == "Sum up: {document} {0} %s {{ x }}!"
    assert (example.messages[1]["content"], example.references) == ("s", ("s",))


@pytest.mark.parametrize("label", [1, "1"])
def test_sst2_answers_with_the_text_of_its_label(label: Any) -> None:
    example = build({"sentence": "hi", "label": label, "idx": 0}, SST2)
    assert [message["content"] for message in example.messages] == ["Sentiment of: hi", "positive"]
    assert example.references == ("positive",)
    assert build({"sentence": "hi", "label": "0"}, SST2).references == ("negative",)


@pytest.mark.parametrize("label", [-1, "-1", 2, "", "positive", 1.0, True, None])
def test_another_label_is_refused_by_row(label: Any) -> None:
    with pytest.raises(DataError, match=r"^s\.csv row 4: .*label") as caught:
        build({"sentence": "hi", "label": label}, SST2, "s.csv row 4")
    assert ("GLUE hides" in str(caught.value)) == (str(label) == "-1")


def squad_row(answers: Any) -> dict[str, Any]:
    return {
        "id": "5",
        "title": "T",
        "context": "In {question} 1990.",
        "question": "When, {context}?",
        "answers": answers,
    }


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["1990", "in 1990", "1990"], "answer_start": [3, 0, 3]},
        [{"text": "1990", "answer_start": 3}, {"text": "in 1990", "answer_start": 0}],
    ],
)
def test_squad_trains_on_the_first_answer_and_keeps_all(answers: Any) -> None:
    example = build(squad_row(answers), SQUAD)
    assert example.messages[0]["content"] == "In {question} 1990.\n\nWhen, {context}?"
    assert (example.messages[1]["content"], example.references) == ("1990", ("1990", "in 1990"))


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, []])
def test_a_squad_question_without_answers_is_unanswerable(answers: Any) -> None:
    example = build(squad_row(answers), SQUAD)
    assert (example.messages[1]["content"], example.references) == ("unanswerable", ())


@pytest.mark.parametrize(
    "answers",
    [
        None,
        "1990",
        ["1990"],
        {"text": "1990"},
        {"answer_start": [1]},
        {"text": [None]},
        {"text": [" "]},
    ],
)
def test_answers_of_another_shape_are_refused_by_row(answers: Any) -> None:
    with pytest.raises(DataError, match=r"^dev\.parquet row 9: column `answers`: expected"):
        build(squad_row(answers), SQUAD, "dev.parquet row 9")


@pytest.mark.parametrize("role", ["user", "tool", "ipython", "observation", "function"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tool_output_is_a_user_turn_and_the_last_boxed_answer_the_reference(
    column: str, role: str
) -> None:
    turns = [
        ("user", "Halve 1."),
        ("assistant", "```python\nprint(1/2)\n```"),
        (role, "```output\n0.5\n```"),
        ("assistant", r"Not \boxed{2} but \boxed{\frac{1}{2}}."),
    ]
    example = build({column: [{"role": one, "content": text} for one, text in turns]}, MATH)
    assert [message["role"] for message in example.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [message["content"] for message in example.messages] == [text for _, text in turns]
    assert example.references == (r"\frac{1}{2}",)


@pytest.mark.parametrize(
    ("text", "references"),
    [
        (r"\boxed{ \{1, 2\} }", (r"\{1, 2\}",)),
        (r"\boxed{1} and \boxed{2", ("1",)),
        (r"\boxed{\boxed{3}}", ("3",)),
        ("so 4", ()),
    ],
)
def test_the_reference_of_a_mathematical_answer(text: str, references: tuple[str, ...]) -> None:
    row = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    assert build(row, MATH).references == references


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has none of the columns `messages`"),
        ({"messages": []}, "expected a list of messages, found an empty list"),
        ({"messages": "hi"}, "expected a list of messages, found a text"),
        ({"messages": ["hi"]}, "message 1: expected an object, found a text"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "message 1: expected the texts `role` and `content`",
        ),
        ({"messages": [{"role": "user", "content": "hi"}]}, "has no assistant turn"),
        (
            {"prompt": "hi", "completion": "hello"},
            "has the columns `prompt` and `completion`, no messages",
        ),
        ("hi", "expected a conversation, found a text"),
        (None, "found nothing (null)"),
    ],
)
@pytest.mark.parametrize("task", [CONVERSATIONS, MATH])
def test_other_rows_are_refused_by_name(task: AnyTask, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build(row, task, "rows.jsonl line 7")
    assert str(caught.value).startswith("rows.jsonl line 7")
    assert message in str(caught.value)


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
