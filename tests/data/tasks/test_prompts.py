"""Columns replace the placeholders in prompts and system texts; other text stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from runner.data.tasks.alpaca import AlpacaTask
from runner.data.tasks.base import Task
from runner.data.tasks.prompt_completion import PromptCompletionTask
from runner.data.tasks.prompts import fill_prompt
from runner.data.tasks.summarization import SummarizationTask
from runner.errors import DataError
from runner.recipe.data_section import AnyTask
from tests.support.tasks import build

ROWS = {
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "summarization": {"document": "a", "summary": "b"},
    "sst2": {"sentence": "a", "label": 0},
    "squad_v2": {"context": "a", "question": "b", "answers": {"text": ["c"]}},
}
PROMPTS = {
    "prompt_completion": "{prompt}",
    "alpaca": "{instruction}",
    "summarization": "{document}",
    "sst2": "{sentence}",
    "squad_v2": "{context} {question}",
}


def parse(name: str, **section: Any) -> Task:
    return TypeAdapter[AnyTask](AnyTask).validate_json(json.dumps({"name": name, **section}))


def ask(task: Task, row: Any) -> list[str]:
    return [str(message["content"]) for message in build(row, task).messages[:-1]]


@pytest.mark.parametrize("name", ROWS)
def test_every_prompt_and_system_text_may_name_columns(name: str) -> None:
    prompt = PROMPTS[name] + " ({style})"
    task = parse(name, prompt=prompt, system="Answer in {language}.")
    row = ROWS[name] | {"style": "{language}", "language": "French"}
    system, user = ask(task, row)
    assert system == "Answer in French." and user.endswith(" ({language})")
    assert ask(parse(name, prompt=prompt), row | {"language": None}) == [user]


@pytest.mark.parametrize("name", ROWS)
def test_a_placeholder_that_is_no_column_is_refused_with_the_nearest(name: str) -> None:
    for key, text in (("prompt", PROMPTS[name] + " {stile}"), ("system", "{stile}")):
        task = parse(name, **{"prompt": PROMPTS[name], key: text})
        with pytest.raises(DataError) as caught:
            build(ROWS[name] | {"style": "x"}, task, "rows.jsonl line 1")
        for words in (
            f"rows.jsonl line 1: `data.task.{key}` holds {{stile}}, but there is no column `stile`",
            "did you mean {style}?",
            "the text {stile} itself is written {!stile}",
        ):
            assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("prompt_completion", "completion"),
        ("alpaca", "output"),
        ("summarization", "summary"),
        ("sst2", "label"),
        ("squad_v2", "answers"),
    ],
)
def test_a_prompt_that_gives_the_answer_away_is_refused(name: str, answer: str) -> None:
    with pytest.raises(ValidationError, match=rf"`prompt` must not hold {{{answer}}}, the column"):
        parse(name, prompt=PROMPTS[name] + f" {{{answer}}}")
    task = parse(name, prompt=PROMPTS[name] + f" {{!{answer}}}")
    assert ask(task, ROWS[name])[0].endswith(f" {{{answer}}}")


def test_other_braces_are_text() -> None:
    text = (
        '{document} {"a": 1} {x y} {} {0} {{document}} {{title}} {{a} {a}} \\boxed{!!x} {!document}'
    )
    task = SummarizationTask(name="summarization", prompt=text.replace("{{document}}", ""))
    (prompt,) = ask(task, {"document": "{title}", "summary": "s"})
    assert prompt == '{title} {"a": 1} {x y} {} {0}  {{title}} {{a} {a}} \\boxed{!x} {document}'
    one = SummarizationTask(name="summarization", prompt="a {{document}} b")
    assert ask(one, {"document": "x", "summary": "s"}) == ["a {x} b"], "as it was before columns"


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("{q}\n\n{e}", "Q"),
        ("{e}\n\n{q}", "Q"),
        ("{q}\n\nContext: {e}\n\nEnd", "Q\n\nEnd"),
        ("Task.\n\nContext: {e}\nQuestion: {q}", "Task.\n\nQuestion: Q"),
        ("{q} {e}", "Q"),
        ("{e} {q}", "Q"),
        ("{q}, {e}.", "Q,."),
        ("\n{q}\n{e}\n\n", "\nQ\n\n"),
        ("\n\n{q}\n\n", "\n\nQ\n\n"),
        ("{own}\n{e}\n{own}", "O\nO"),
        ("{e} {own}", "O"),
        ("Be brief.\n{e}\n{missing}", "Be brief."),
    ],
)
@pytest.mark.parametrize("nothing", ["", None, " \n", []])
def test_an_empty_column_leaves_no_trace(prompt: str, filled: str, nothing: Any) -> None:
    assert fill_prompt(prompt, {"q": "Q", "e": nothing}, "row 1", {"own": "O"}) == filled


def test_a_prompt_of_nothing_is_refused() -> None:
    task = PromptCompletionTask(name="prompt_completion", prompt="{a}\n{b}")
    with pytest.raises(DataError, match="row 1: the prompt is empty: there is no text in `a`"):
        build({"a": "", "b": None, "completion": "x"}, task)
    with pytest.raises(DataError, match=r"holds \{b\}, but there is no column `b`"):
        build({"a": "", "completion": "x"}, task)
    with pytest.raises(DataError, match=r"column `a` should be a text, found a number") as caught:
        build({"a": 3, "b": "x", "completion": "x"}, task)
    assert "`data.task: {name: python" in str(caught.value)


def test_a_column_may_be_missing_in_some_rows_only() -> None:
    task = PromptCompletionTask(name="prompt_completion", prompt="{q} {hint}")
    rows = [{"q": "A", "completion": "x"}, {"q": "B", "hint": "b", "completion": "x"}]
    found = task.build_examples([(f"row {n}", row) for n, row in enumerate(rows)])
    assert [example.messages[0]["content"] for example in found.examples] == ["A", "B b"]
    assert found.unused == {"hint (empty)": 1}


def test_the_column_of_the_prompt_must_not_be_empty() -> None:
    section = {"prompt": "{context}\n\n{question}", "prompt_column": "question"}
    task = parse("prompt_completion", **section)
    row = {"context": "", "question": "Q", "completion": "x"}
    assert ask(task, row) == ["Q"]
    with pytest.raises(DataError, match=r"column `question` should be a text, found nothing"):
        build(row | {"question": None}, task)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"prompt": "Say it."}, "`prompt` holds no column in braces"),
        (
            {"prompt": "{context}", "prompt_column": "question"},
            r"`prompt` does not hold \{question\}, the column that `prompt_column` names",
        ),
    ],
)
def test_prompts_that_ask_nothing_are_refused(section: dict[str, str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        parse("prompt_completion", **section)


def test_a_column_of_any_name_is_a_prompt() -> None:
    task = PromptCompletionTask(name="prompt_completion", prompt_column="my {prompt}")
    assert ask(task, {"my {prompt}": "{x}", "completion": "b"}) == ["{x}"]
    assert ask(task, {"my {prompt}": "", "completion": "b"}) == [""]


@pytest.mark.parametrize("key", ["prompt", "system"])
def test_a_column_in_braces_that_cannot_hold_it_is_refused(key: str) -> None:
    """Its name would be in every prompt, and its text in none."""
    texts = {"prompt": "{q}", key: "{q} {my column} {{q}} {other text}"}
    task = parse("prompt_completion", **texts)
    row = {"q": "a", "completion": "b"}
    task.build_examples([("row 1", row)])
    with pytest.raises(DataError) as caught:
        task.build_examples([("row 1", row | {"q 2": "c"})])
    assert "in `data.task.prompt` puts" not in str(caught.value)
    with pytest.raises(DataError, match=rf"row 1: `data.task.{key}`: \{{my column\}} would stay"):
        task.build_examples([("row 1", row | {"my column": "c"})])


def test_an_input_that_an_alpaca_prompt_leaves_out_is_refused() -> None:
    task = AlpacaTask(name="alpaca", prompt="{instruction}")
    assert ask(task, {"instruction": "a", "input": "", "output": "b"}) == ["a"]
    with pytest.raises(DataError, match="the column `input` is not used by the task `alpaca`"):
        build({"instruction": "a", "input": "c", "output": "b"}, task)
