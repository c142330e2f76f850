"""Rows of `runner init` without prompts or answers, and columns that name no task."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(*rows: dict[str, Any]) -> None:
    """Twelve rows, repeating `rows` with `{n}` in their texts replaced."""
    lines = []
    for n in range(12):
        text = json.dumps(rows[n % len(rows)])
        lines.append(text.replace("{n}", str(n)))
    Path("rows.jsonl").write_text("\n".join(lines))


QUESTION = "Why is {n}?"
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ""},
]


@pytest.mark.parametrize(
    ("row", "options", "words", "hint"),
    [
        (
            {"question": QUESTION, "answer": ""},
            [],
            "rows.jsonl: the column `answer` is empty in all 12 rows",
            "write the answers into `answer`",
        ),
        (
            {"question": QUESTION, "answer": None, "reply": "It is."},
            [],
            "the column `answer` is empty in all 12 rows",
            "--prompt question --completion reply",
        ),
        (
            {"ticket": QUESTION, "queue": " ", "note": "to billing"},
            ["--prompt", "Which queue? {ticket}", "--completion", "queue"],
            "the column `queue` is empty in all 12 rows",
            "--prompt 'Which queue? {ticket}' --completion note",
        ),
        (
            {"ticket": "", "queue": "billing {n}", "note": "to billing"},
            ["--prompt", "Which queue? {ticket}", "--completion", "queue"],
            "the column `ticket` is empty in all 12 rows",
            "--prompt '{note}' --completion queue",
        ),
        (
            {"ticket": QUESTION, "queue": "billing {n}", "note": None},
            ["--prompt", "{ticket} {note}", "--completion", "queue"],
            "the column `note` is empty in all 12 rows",
            "--prompt '{ticket}' --completion queue",
        ),
        ({"question": "", "answer": "So {n}."}, [], "`question` is empty in all 12 rows", "--data"),
        ({"messages": CHAT, "id": "{n}"}, [], "every answer is empty in all 12 rows", "--data"),
        (
            {"instruction": "", "input": "", "output": "So {n}."},
            [],
            "the columns `instruction`, `input` are empty in all 12 rows",
            "--data",
        ),
    ],
)
def test_rows_without_any_prompt_or_answer_are_refused(
    row: dict[str, Any],
    options: list[str],
    words: str,
    hint: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows(row)
    assert main(["init", "study", "--data", "rows.jsonl", *options]) == 2
    error, _, hinted = capsys.readouterr().err.partition("hint: ")
    assert words in error and hint in hinted
    assert not Path("study").exists()
    pasted = hinted.partition("other columns: ")[2].strip()
    if pasted:
        assert main(["init", "study", "--data", "rows.jsonl", *shlex.split(pasted)]) == 0


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (
            [{"question": QUESTION, "answer": text} for text in ("", "So.", "So.", "So.")],
            "3 of 12 rows are kept with an empty answer, so only the end of the turn is trained;"
            " the first is rows.jsonl line 1",
        ),
        (
            [{"question": QUESTION, "answer": "So."}] * 11 + [{"question": "", "answer": "So."}],
            "1 of 12 rows is kept with an empty prompt, without any text of the row; the first is"
            " rows.jsonl line 12",
        ),
        ([{"instruction": QUESTION, "input": "", "output": "So."}], None),
    ],
)
def test_some_empty_rows_are_counted(
    rows: list[dict[str, Any]], note: str | None, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(*rows)
    assert main(["init", "study", "--data", "rows.jsonl"]) == 0
    said = capsys.readouterr().out
    assert f"  {note}\n" in said if note else " with an empty " not in said


def test_unknown_columns_are_answered_with_the_nearest_sets_on_short_lines(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows({"Question": QUESTION, "reply": "So."} | {f"column_{n}": n for n in range(60)})
    assert main(["init", "study", "--data", "rows.jsonl"]) == 2
    said = capsys.readouterr().err
    lines = said.splitlines()
    start = next(n for n, line in enumerate(lines) if "the nearest first" in line)
    assert lines[start + 1].strip().startswith("question, answer; question, response; ")
    assert max(map(len, lines)) <= 200 and " and 50 more" not in lines[0]
    assert max(len(line) for line in lines[start : start + 6]) <= 90
    assert " more" in lines[0], "not all of 62 columns are on the first line"
