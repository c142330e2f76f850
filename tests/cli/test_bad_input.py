"""Bad input is refused before any training, with the file, the row, the key and a remedy. Each case
goes through `runner check`, all of them in one call, and through the start of training up to the
loading of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runner.errors import DataError
from runner.recipe.parse import load_recipe
from tests.conftest import RECIPE_TEXT, Project, make_project, run_cli
from tests.support.chat_formats import trl_template

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
}


CHATML = (
    "{% for m in messages %}{{- '<start_of_turn>' + m.role + '\n' + m.content }}"
    "{{- '<end_of_turn>\n' }}{% endfor %}"
)
THINKING = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n5"},
]
LONG = [{"role": role, "content": "A long text. " * 9} for role in ("user", "assistant")]
FUNCTION = {"name": "get_weather", "arguments": {"city": "Oslo"}}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": FUNCTION}],
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}},
}


def rows_with(bad: Any, at: int = 3) -> list[Any]:
    """60 good conversations, one of them replaced."""
    rows: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": f"Is {n} even?"},
                {"role": "assistant", "content": f"It is {n}."},
            ]
        }
        for n in range(60)
    ]
    rows[at - 1] = bad
    return rows


@dataclass(frozen=True)
class Case:
    """Rows, what the recipe is changed by, and the words that a user needs."""

    words: tuple[str, ...]
    rows: list[Any] = field(default_factory=lambda: rows_with(CHAT))
    overrides: tuple[str, ...] = ()
    template: str | None = None


SUMMARIES = 'data.task={name: summarization, prompt: "Summarise {document}"}'
CASES = {
    "a missing column": Case(
        ("rows.jsonl line 2", "the column `summary` is missing", "document, title", "`data.task`"),
        rows=[{"document": "Long.", "summary": "Short."}, {"document": "Long too.", "title": "x"}],
        overrides=(SUMMARIES,),
    ),
    "a role that no template knows": Case(
        (
            "rows.jsonl line 3",
            "message 0",
            "'wizard'",
            "this chat template accepts user, assistant",
        ),
        rows=rows_with(
            {
                "messages": [
                    {"role": "wizard", "content": "Abra."},
                    {"role": "assistant", "content": "No."},
                ]
            }
        ),
    ),
    "a role that this template refuses": Case(
        (
            "rows.jsonl line 3",
            "the roles system, user, assistant",
            "System role not supported",
            "hint:",
        ),
        rows=rows_with(
            {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}
        ),
    ),
    "a row that is not a list": Case(
        ("rows.jsonl line 3", "expected a list of messages, found a text"),
        rows=rows_with({"messages": "Hi? Hello."}),
    ),
    "a row that is a number": Case(
        ("rows.jsonl line 3", "expected a conversation, found a number"),
        rows=rows_with(7),
    ),
    "an empty split": Case(
        (
            "0 different rows are left for the train split, which needs at least 1",
            "data.num_train_samples",
        ),
        overrides=(
            "data.num_train_samples=null",
            "data.num_test_samples=30",
            "data.num_validation_samples=30",
        ),
    ),
    "a split that is too small": Case(
        (
            "33 different rows are left for the train split, which needs 100",
            "lower `data.num_train_samples`",
        ),
        overrides=("data.num_train_samples=100",),
    ),
    "a model without a chat template": Case(
        (
            "models/phi has no chat template of its own",
            "`model.chat_template`",
            "human_assistant.jinja",
        ),
        overrides=("model.path=models/phi",),
    ),
    "a template that never ends a turn": Case(
        ("rows.jsonl line ", "has no end-of-turn token", "could never learn to stop"),
        template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        overrides=("data.num_train_samples=5",),
    ),
    "a template that prints no call": Case(
        (
            "rows.jsonl line 3",
            "the chat template does not print the call of `get_weather` of message 1 (assistant)",
            "`model.chat_template`",
        ),
        rows=rows_with({"messages": [CHAT["messages"][0], CALLING, CHAT["messages"][1]]}),
        template=CHATML,
    ),
    "a template that prints no tools": Case(
        (
            "rows.jsonl line 3",
            "does not print the name of the tool `get_weather`",
            "`data.ignore: [tools]`",
        ),
        rows=rows_with({**CHAT, "tools": [TOOL]}),
        template=CHATML,
    ),
    "a template that prints no names": Case(
        (
            "rows.jsonl line 3",
            "does not print the `name` of message 0",
            "`data.ignore: [messages.name]`",
        ),
        rows=rows_with({"messages": [{**CHAT["messages"][0], "name": "Ada"}, CHAT["messages"][1]]}),
        template=CHATML,
    ),
    "a template that prints no thought": Case(
        (
            "rows.jsonl line 3",
            "does not print `reasoning_content` of message 1 (assistant)",
            "`data.ignore: [messages.reasoning_content]`",
        ),
        rows=rows_with(
            {
                "messages": [
                    CHAT["messages"][0],
                    {"role": "assistant", "content": "5", "reasoning_content": "2 + 3"},
                ]
            }
        ),
        template=CHATML,
    ),
    "a template that prints earlier answers otherwise": Case(
        (
            "rows.jsonl line 3",
            "message 1 (assistant) is not printed as the model would write it",
            "`data.turns: last` trains and scores the last answer only, `data.turns: split`",
        ),
        rows=rows_with({"messages": [*CHAT["messages"], *CHAT["messages"]]}),
        template=trl_template("qwen3"),
    ),
    "a template that drops earlier thoughts": Case(
        (
            "rows.jsonl line 3",
            "does not print the think block in the `content` of message 1 (assistant)",
            "use `data.turns: split` to train each turn that way, or `data.turns: last` to",
        ),
        rows=rows_with({"messages": [*THINKING, *THINKING]}),
        template=trl_template("qwen3"),
    ),
    "a template that leaves a text out": Case(
        ("rows.jsonl line ", "message 0 (user)", "its place in the text cannot be proven"),
        template="{% for m in messages if m.role == 'assistant' %}{{ m.content }}<eos>{% endfor %}",
    ),
    "a template that prints a text twice": Case(
        ("rows.jsonl line ", "message 0 (user)", "more than once"),
        template="{{ messages[0].content }}" + CHATML,
    ),
    "a template that prints the turns in another order": Case(
        ("rows.jsonl line ", "a completion would not follow its prompt"),
        template=CHATML.replace("in messages", "in messages | reverse"),
    ),
    "what is left of a row when rounds are cut": Case(
        ("rows.jsonl line 3, without the 2 messages before message 2: ", "a short one"),
        rows=rows_with({"messages": [*CHAT["messages"], *LONG, *LONG]}),
        template="{{ raise_exception('a short one') if messages | length == 4 }}" + CHATML,
        overrides=("data.truncation=turns_left", "data.max_length=100"),
    ),
    "a template that renders nothing without tools": Case(
        ("rows.jsonl line ", "renders no conversation without `tools`", "a `tools` column"),
        template="{% for tool in tools %}{{- tool | tojson }}{% endfor %}" + CHATML,
    ),
    "a template that prints the date": Case(
        ("rows.jsonl line ", "prints today's date", "`model.template_date: "),
        template="{{ strftime_now('%d %B %Y') }}" + CHATML,
    ),
    "a template without an end of turn": Case(
        (
            "rows.jsonl line ",
            "could never learn to stop",
            '`model.end_of_turn: "<start_of_turn>"` appends it to the last answer',
        ),
        template="{% for m in messages %}{{- '<start_of_turn>' + m.content }}{% endfor %}",
    ),
    "an end of turn that is no token": Case(
        ("`model.end_of_turn` '<|never|>' is not a token of models/gemma",),
        overrides=("model.end_of_turn=<|never|>",),
    ),
    "a template that prints BOS twice": Case(
        (
            "rows.jsonl line ",
            "begins with the BOS token twice",
            "the chat template prints it twice",
        ),
        template=(
            "{{ bos_token * 2 }}{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}"
        ),
        overrides=("data.num_train_samples=5",),
    ),
    "a text that is no Unicode": Case(
        ("rows.jsonl line 3", "one half of a character"),
        rows=rows_with(
            {
                "messages": [
                    {"role": "user", "content": "\ud800"},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
        ),
    ),
}


@pytest.fixture(scope="module")
def broken(
    tmp_path_factory: pytest.TempPathFactory, data_path: Path, tiny_model: Callable[[str], Path]
) -> Project:
    """A project with one recipe per case, each with its own data file."""
    project = make_project(tmp_path_factory.mktemp("broken"), data_path, tiny_model)
    for family in ("gemma", "phi"):
        project.add_model(family)
    for number, case in enumerate(CASES.values()):
        folder = project.root / str(number)
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
        # Every row is drawn.
        drawn = (f"data.train.path={number}/rows.jsonl", "data.num_train_samples=null")
        overrides = [*drawn, *case.overrides]
        if case.template is not None:
            (folder / "chat.jinja").write_text(case.template)
            overrides.append(f"model.chat_template={number}/chat.jinja")
        project.write_recipe(f"recipes/case-{number}.yaml", *overrides)
    return project


@pytest.mark.parametrize("name", CASES)
def test_training_refuses_it_before_it_loads_a_model(
    broken: Project, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first steps of `runner launch`: `train` builds tokenizer and rows before it loads
    weights.
    """
    from runner.data.rows import build_samples
    from runner.data.tokenizer import load_tokenizer

    monkeypatch.chdir(broken.root)
    recipe = load_recipe(Path("recipes") / f"case-{list(CASES).index(name)}.yaml")
    with pytest.raises(DataError) as caught:
        build_samples(recipe.data, load_tokenizer(recipe.model))
    for words in CASES[name].words:
        assert words in str(caught.value)


def test_check_names_all_of_it_at_once(broken: Project) -> None:
    done = broken.call("check", "recipes")
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    assert f"{len(CASES)} of {len(CASES)} recipes cannot be trained as they are" in done.stderr
    errors = {text.split(": ")[0]: text for text in done.stderr.split("\nerror: ")[1:]}
    for number, (name, case) in enumerate(CASES.items()):
        for words in case.words:
            assert words in errors[f"tests/case-{number}"], name


def test_a_metric_that_is_never_evaluated_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = RECIPE_TEXT.replace("{name: conversations}", "{name: prompt_completion}")
    path.write_text(
        text.replace("keep_latest: 2}", "keep_latest: 2, metric: exact_match, mode: max}")
    )
    done = run_cli(["check", path], tmp_path)
    assert done.returncode == 2
    for words in (
        "recipe.yaml has 1 problem",
        "line ",
        "`exact_match` is never evaluated",
        "during_training: true",
    ):
        assert words in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        (
            "{enabled: true, max_new_tokens: 6, batch_size: 0}",
            ("evaluation.generation.batch_size", "got 0: input should be greater than 0"),
        ),
        (
            "{enabled: false, batch_size: 8}",
            ("evaluation.generation.batch_size", "does not go with `enabled: false`"),
        ),
        (
            "{enabled: true, max_new_tokens: 6, bach_size: 8}",
            ("evaluation.generation.bach_size", "did you mean `batch_size`?"),
        ),
    ],
)
def test_a_batch_of_answers_that_is_none(
    tmp_path: Path, generation: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "recipe.yaml"
    old = "per_device_eval_batch_size: 8}"
    assert old in RECIPE_TEXT
    path.write_text(RECIPE_TEXT.replace(old, f"{old[:-1]}, generation: {generation}}}"))
    done = run_cli(["check", path], tmp_path)
    assert done.returncode == 2
    for one in ("recipe.yaml has 1 problem", "line 23", *words):
        assert one in done.stderr, done.stderr
