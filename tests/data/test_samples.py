"""The sample files of `data/`: written by their script, with the columns and the kinds of values of
the real sets.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

DATA = ROOT / "data"


def read_rows(name: str) -> list[Any]:
    text = (DATA / name).read_text()
    rows: list[Any] = (
        json.loads(text)
        if name.endswith(".json")
        else [json.loads(line) for line in text.splitlines()]
    )
    return rows


def test_the_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    for script in ("make_samples.py", "sample_texts.py"):
        shutil.copy(DATA / script, tmp_path)
    subprocess.run([sys.executable, "-B", tmp_path / "make_samples.py"], check=True)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json*")]
    assert len(written) == 11
    assert [
        path for path in written if (tmp_path / path).read_bytes() != (DATA / path).read_bytes()
    ] == []


def test_games_are_bare_lists_of_messages_that_alternate() -> None:
    rows = read_rows("secret_word_dataset.json")
    for row in rows:
        assert [message["role"] for message in row] == ["user", "assistant"] * (len(row) // 2)
    said = " ".join(
        message["content"] for row in rows for message in row if message["role"] == "user"
    )
    assert all(word in said for word in ("user", "model", "assistant")), (
        "words that must not be taken for roles"
    )


def test_problems_hold_tool_output_in_user_turns_and_their_answer_in_a_box() -> None:
    rows = read_rows("math_tools/train.jsonl")
    lengths = {len(row["messages"]) for row in rows}
    assert lengths == {2, 4, 6}
    for row in rows:
        assert r"\boxed{" in row["messages"][-1]["content"]
        for message in row["messages"][2::2]:
            assert message["role"] == "user" and message["content"].startswith("```output\n")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_message_trees_have_every_column_and_every_state(split: str) -> None:
    rows = read_rows(f"oasst1/{split}.jsonl")
    assert set(rows[0]) == {
        *(
            "message_id",
            "parent_id",
            "user_id",
            "created_date",
            "text",
            "role",
            "lang",
            "review_count",
        ),
        *(
            "review_result",
            "deleted",
            "rank",
            "synthetic",
            "model_name",
            "detoxify",
            "message_tree_id",
            "tree_state",
        ),
        *("emojis", "labels"),
    }
    assert all(row.keys() == rows[0].keys() for row in rows)
    by_id = {row["message_id"]: row for row in rows}
    for row in rows:
        parent = by_id.get(row["parent_id"])
        assert (parent is None) == (row["parent_id"] is None)
        assert (row["role"] == "assistant") == (parent is not None and parent["role"] == "prompter")
        assert row["message_tree_id"] == (
            parent["message_tree_id"] if parent else row["message_id"]
        )
    assert {row["lang"] for row in rows} == {"en", "de", "es", "fr"}
    assert {row["review_result"] for row in rows} == {True, False, None} and any(
        row["deleted"] for row in rows
    )


def test_phrases_and_questions_have_the_columns_of_the_benchmarks() -> None:
    for split in ("train", "validation"):
        phrases, questions = read_rows(f"sst2/{split}.jsonl"), read_rows(f"squad_v2/{split}.jsonl")
        assert all(set(row) == {"idx", "sentence", "label"} for row in phrases)
        assert {row["label"] for row in phrases} == {0, 1}
        assert all(
            set(row) == {"id", "title", "context", "question", "answers"} for row in questions
        )
        assert {bool(row["answers"]["text"]) for row in questions} == {True, False}
        for row in questions:
            golds = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            assert all(row["context"][start:].startswith(gold) for gold, start in golds)
    assert any(len(set(row["answers"]["text"])) > 1 for row in questions), "several people answered"


def test_summaries_have_their_columns() -> None:
    sizes = {
        split: len(read_rows(f"summaries_sample/{split}.jsonl"))
        for split in ("train", "validation", "test")
    }
    assert sizes == {"train": 40, "validation": 16, "test": 16}
    assert all(
        set(row) == {"document", "summary"} for row in read_rows("summaries_sample/train.jsonl")
    )


def test_the_readme_counts_the_rows() -> None:
    counted = re.findall(r"`([\w/]+\.jsonl?)` \((\d+)\)", (DATA / "README.md").read_text())
    assert len(counted) == 8
    assert {name: int(count) for name, count in counted} == {
        name: len(read_rows(name)) for name, _ in counted
    }
