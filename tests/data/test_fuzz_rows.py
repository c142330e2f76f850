"""Random content of a data file gives rows of conversations, or a refusal that names the place;
never a traceback.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runner.data.draw import draw_splits
from runner.errors import DataError
from runner.recipe.data_section import DataSection

FACTOR: Final = int(os.environ.get("FUZZ_FACTOR", "1"))
TASKS: Final[dict[str, dict[str, Any]]] = {
    "conversations": {},
    "prompt_completion": {},
    "sst2": {"prompt": "Is this good? {sentence}"},
    "squad_v2": {"prompt": "{context} {question}"},
    "oasst1": {},
    "math_tools": {},
}
NAMES: Final = (
    *(
        "messages",
        "role",
        "content",
        "text",
        "prompt",
        "completion",
        "sentence",
        "label",
        "idx",
        "id",
        "context",
    ),
    *(
        "question",
        "answers",
        "answer_start",
        "message_id",
        "parent_id",
        "message_tree_id",
        "prompter",
        "replies",
        "lang",
    ),
    *(
        "problem",
        "solution",
        "answer",
        "rank",
        "review_result",
        "deleted",
        "title",
        "user",
        "assistant",
        "system",
        "tool",
    ),
)
WORDS = st.one_of(st.sampled_from(NAMES), st.text(max_size=8), st.characters(categories=["Cs"]))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        WORDS,
        st.sampled_from(["1" * 4400, "a" * 5000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(WORDS, inner, max_size=5),
        st.lists(st.fixed_dictionaries({"role": WORDS, "content": inner}), max_size=3),
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8)
GOOD: Final = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    **{
        "prompt": "p",
        "completion": "c",
        "sentence": "s",
        "label": 1,
        "idx": 3,
        "id": "x",
        "context": "c",
    },
    **{"question": "q", "answers": {"text": ["c"], "answer_start": [0]}},
}


# Enough for a small test and validation split next to any other rows.
MORE: Final[list[Any]] = [
    GOOD
    | {"messages": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b"}]}
    | {"prompt": f"p{n}", "sentence": f"s{n}", "question": f"q{n}"}
    for n in range(4)
]


def answer(task: str, content: bytes, folder: Path, suffix: str) -> None:
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    section = {
        "train": {"path": str(path)},
        "task": {"name": task, **TASKS[task]},
        "num_validation_samples": 1,
        "num_test_samples": 1,
        "seed": 1,
        "max_length": 64,
    }
    try:
        splits = draw_splits(DataSection.model_validate_json(json.dumps(section)))
    except DataError as error:
        assert str(error).encode()
        return
    for row in (*splits.train, *splits.validation, *splits.test):
        assert row.messages and all(
            message["content"].encode() is not None for message in row.messages
        ), row.where


@pytest.mark.parametrize("task", TASKS)
@settings(
    max_examples=30 * FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rows=st.lists(st.one_of(ROWS, st.builds(lambda row: GOOD | row, ROWS), VALUES), max_size=5))
@example(
    rows=[
        GOOD
        | {
            "prompt": "\ud800",
            "sentence": "\udfff",
            "messages": [{"role": "user", "content": "\ud800"}],
        }
    ]
)
def test_any_rows_are_read_or_refused_in_words(task: str, rows: list[Any], tmp_path: Path) -> None:
    answer(task, "\n".join(json.dumps(row) for row in rows + MORE).encode(), tmp_path, ".jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@settings(
    max_examples=30 * FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(head=st.binary(max_size=40), tail=st.binary(max_size=40), at=st.integers(0, 200))
@example(head=b"", tail=b'\n{"prompt": ' + b"1" * 5000 + b"}", at=10_000)
@example(head=b"", tail=b"[" * 100_000, at=0)
def test_any_bytes_are_read_or_refused_in_words(
    suffix: str, head: bytes, tail: bytes, at: int, tmp_path: Path
) -> None:
    whole = json.dumps(GOOD).encode()
    answer("prompt_completion", head + whole[:at] + tail + whole[at:], tmp_path, suffix)
