"""Rows, columns and prompts that the reader refuses: `runner check` names all of them in one call,
before any device time, with the way on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import Project, make_project
from tests.support.refused_rows import ANSWER, REFUSED, USER, row

CASES: Final = Path(__file__).parents[1] / "data" / "cases"


@dataclass(frozen=True)
class Case:
    """Rows, the task that reads them, and the words that a user needs."""

    rows: list[Any]
    words: tuple[str, ...]
    task: str = "{name: conversations}"
    overrides: tuple[str, ...] = ()


def load_case(name: str) -> list[Any]:
    return [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text().splitlines()]


QUESTION: Final = {"question": "Which?", "answer": "This."}
BY_COLUMNS: Final = "{name: prompt_completion, prompt_column: question, completion_column: answer}"
BY_PROMPT: Final = (
    "{name: prompt_completion, prompt: '{contxt} {question}', completion_column: answer}"
)
MESSAGES: Final = [
    Case([{"messages": [USER, {**ANSWER, "content": n}]} for n in "ab"] + [bad], ("line 3", words))
    for bad, words in REFUSED
]
COLUMNS: Final = [
    Case(
        load_case("images"),
        ("line 1: the column `images` is not used", "`data.ignore: [images]`", "only texts"),
    ),
    Case(load_case("weights"), ("line 3, message 2: `weight` is 0.5; only 0 and 1 are accepted",)),
    Case(
        load_case("question_context"),
        ("line 1: the column `context` is not used", "`{context}` in `data.task.prompt`"),
        BY_COLUMNS,
    ),
    Case(
        load_case("alpaca"),
        ("line 1: the column `input` is not used", "the task `alpaca` reads it"),
        "{name: alpaca, prompt: '{instruction}'}",
    ),
    Case(
        load_case("question_context"),
        ("line 1: `data.task.prompt` holds {contxt}", "mean {context}?", "written {!contxt}"),
        BY_PROMPT,
    ),
    Case(
        load_case("question_context"),
        ("line 1: `data.task.system` holds {languag}",),
        BY_COLUMNS[:-1] + ", system: 'In {languag}.'}",
    ),
    Case(
        [QUESTION, QUESTION | {"weight": 0.5}, QUESTION | {"tools": "[]x", "weight": 1}],
        (
            "these are not used by the task `prompt_completion`",
            "line 2: the column `weight`",
            "line 3: the column `tools`",
            "`data.ignore: [weight, tools]`",
            "`tools`: the task `conversations` reads it",
        ),
        BY_COLUMNS,
    ),
    Case(
        [{"messages": [USER, {**ANSWER, "toxic": True}]}],
        ("line 1: the message key `toxic` is not used", "`data.ignore: [messages.toxic]`"),
    ),
    Case(
        [{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b"}],
        ("the column `chosen`", "the column `rejected`", "preference pairs"),
        "{name: prompt_completion}",
    ),
    Case(
        [{"context": "", "question": None, "answer": "a"}],
        ("line 1: the prompt is empty: there is no text in `context`, `question`",),
        BY_PROMPT.replace("contxt", "context"),
    ),
    Case(
        [{"context": "a", "question": "b", "answers": {"text": ["c"]}, "is_impossible": True}],
        ("line 1: column `is_impossible` is true, but `answers` holds 1 answer",),
        "{name: squad_v2, prompt: '{context} {question}'}",
    ),
]
# The demands of each task on its own columns.
SST2: Final = "{name: sst2, prompt: '{sentence}'}"
SQUAD: Final = "{name: squad_v2, prompt: '{context} {question}'}"
PARAGRAPH: Final = {"context": "a", "question": "b"}
TREE: Final = {"message_id": "m1", "parent_id": None, "text": "Hi?", "role": "prompter"}
TASKS: Final = [
    Case([{"sentence": "a", "label": -1}], ("line 1: the label is -1: GLUE hides",), SST2),
    Case([{"sentence": "a", "label": 2}], ("`label` should be the label 0 or 1, found",), SST2),
    Case([PARAGRAPH | {"answers": "c"}], ("line 1: column `answers`: ", "found a text"), SQUAD),
    Case(
        [PARAGRAPH | {"answers": {"text": [" "], "answer_start": [0]}}],
        ("line 1: column `answers`: ", "with texts that are not blank"),
        SQUAD,
    ),
    Case(
        [{"document": 7, "summary": "x"}],
        ("line 1: column `document` should be a text, found a number",),
        "{name: summarization, prompt: '{document}'}",
    ),
    Case([["a", "b"]], ("line 1: expected an object with columns, found a list",), BY_COLUMNS),
    Case([TREE | {"role": "wizard"}], ("the role is 'wizard', expected",), "{name: oasst1}"),
    Case([TREE | {"rank": "first"}], ("`rank` should be a number or null",), "{name: oasst1}"),
    Case([TREE | {"deleted": "no"}], ("`deleted` should be true, false or",), "{name: oasst1}"),
    Case(
        [TREE, TREE | {"text": "Ho?"}],
        ("line 2: the message id 'm1' is taken by another in ",),
        "{name: oasst1}",
    ),
    Case(
        [{"prompt": {**TREE, "replies": "none"}}],
        ("line 1: `replies` should be a list, found a text",),
        "{name: oasst1}",
    ),
    Case(
        [{"prompt": "a", "completion": "b"}],
        ("line 1: has the columns `prompt` and `completion`, but no messages", "prompt_completion"),
    ),
    Case([{"text": "a"}], ("line 1: has none of the columns `messages`", "columns are text")),
]
ROUNDS: Final = [
    {"messages": [USER, {**ANSWER, "content": f"{n}."}, USER, ANSWER], "chapter": n // 2}
    for n in range(60)
]
DEEP: Final = {"name": "get", "arguments": '{"a": ' + "[" * 2000 + "]" * 2000 + "}"}
# What is asked of the rows of a recipe together, and of one beside its columns.
DRAWN: Final = [
    Case(
        ROUNDS,
        ("line 1: `data.group_column: chaptr` names", "found no such column"),
        overrides=("data.group_column=chaptr", "data.ignore=[chapter]"),
    ),
    Case(
        [row | {"chapter": None} for row in ROUNDS],
        ("line 1: `data.group_column: chapter` names", "found None"),
        overrides=("data.group_column=chapter",),
    ),
    Case(
        [
            PARAGRAPH | {"question": f"{n}?", "answers": {"text": ["c"]}, "part": n}
            for n in range(9)
        ],
        ("puts it into another group than a row that the task `squad_v2` keeps together",),
        SQUAD,
        ("data.group_column=part",),
    ),
    Case(
        [TREE, TREE | {"message_id": "m2", "parent_id": "m1", "role": "assistant"}],
        (
            "builds one conversation from several rows, and has its own groups",
            "`data.group_column`",
        ),
        "{name: oasst1, languages: [], include_unreviewed: true}",
        ("data.group_column=text",),
    ),
    Case(
        ROUNDS,
        (
            "33 rows of the train split are longer than `data.max_length: 9`",
            "`data.truncation: turns_left`",
        ),
        overrides=("data.ignore=[chapter]", "data.max_length=9", "data.num_train_samples=null"),
    ),
    Case(
        ROUNDS,
        ("their last round alone does not fit",),
        overrides=("data.ignore=[chapter]", "data.max_length=9", "data.truncation=turns_left"),
    ),
    Case(
        ROUNDS,
        ("no row of the train split fits into `data.max_length: 9`",),
        overrides=("data.ignore=[chapter]", "data.max_length=9", "data.truncation=drop"),
    ),
    Case(
        [row(content="", tool_calls=[DEEP])],
        ("is not JSON (maximum recursion depth",),
    ),
]
ALL: Final = [*MESSAGES, *COLUMNS, *TASKS, *DRAWN]


@pytest.fixture(scope="module")
def refused(
    tmp_path_factory: pytest.TempPathFactory, data_path: Path, tiny_model: Callable[[str], Path]
) -> Project:
    """A project with one recipe per case, each with its own data file."""
    project = make_project(tmp_path_factory.mktemp("refused"), data_path, tiny_model)
    project.add_model("gemma")
    for number, case in enumerate(ALL):
        path = f"{number}.jsonl"
        (project.root / path).write_text("".join(json.dumps(row) + "\n" for row in case.rows))
        task = (f"data.task={case.task}", f"data.train.path={path}", *case.overrides)
        project.write_recipe(f"recipes/case-{number:02}.yaml", *task)
    return project


def test_check_refuses_each_by_name(refused: Project) -> None:
    done = refused.call("check", "recipes")
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    cases = ALL
    assert f"{len(cases)} of {len(cases)} recipes cannot be trained as they are" in done.stderr
    errors = {text.split(": ")[0]: text for text in done.stderr.split("\nerror: ")[1:]}
    for number, case in enumerate(cases):
        for words in case.words:
            assert words in errors[f"tests/case-{number:02}"], done.stderr


def test_columns_of_no_meaning_are_named_once(refused: Project) -> None:
    rows = [{"id": n, "messages": [USER, {**ANSWER, "content": f"{n}."}]} for n in range(80)]
    (refused.root / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused.write_recipe("one.yaml", "data.train.path=ids.jsonl")
    done = refused.call("check", "one.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("`id` (80 rows)") == 1


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{name: prompt_completion, prompt: Say it.}", "`prompt` holds no column in braces"),
        (
            "{name: prompt_completion, prompt: '{a} {completion}'}",
            "must not hold {completion}, the column of the answer; the text {completion} is",
        ),
        ("{name: alpaca, prompt: '{input}'}", "the placeholder {instruction} exactly once"),
        (
            "{name: prompt_completion, prompt: '{a}', prompt_column: b}",
            "`prompt` does not hold {b}, the column that `prompt_column` names",
        ),
    ],
)
def test_prompts_are_refused_as_recipes_are_read(
    refused: Project, section: str, words: str
) -> None:
    done = refused.cli("launch", "recipe.yaml", "--dry-run", f"data.task={section}")
    assert done.returncode == 2 and words in done.stderr, done.stderr
