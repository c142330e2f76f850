"""Columns of the user's rows, as the errors of `runner init` show and suggest them."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from runner.data.tasks.prompts import list_placeholders
from runner.text import measure

_MAX_COLUMNS: Final = 20  # shown in an error, one line each
_MAX_SAMPLE: Final = 60  # characters
_MAX_NAMES: Final = 100  # characters of the columns on one line
_MAX_SETS: Final = 76  # characters of the column sets on one line


def list_columns(row: Any) -> str:
    """The columns of a row, one line each with its value; "no columns" if there are none."""
    if not isinstance(row, Mapping) or not row:
        return "no columns"
    width = max(min(len(str(name)), _MAX_SAMPLE) for name in row)
    lines = [
        f"  {str(name)[:_MAX_SAMPLE]:<{width}}  {_show_sample(value)}"
        for name, value in row.items()
    ]
    more = f"\n  and {len(lines) - _MAX_COLUMNS} more" if len(lines) > _MAX_COLUMNS else ""
    names = list(map(str, row))
    while len(names) > 1 and measure(", ".join(names)) > _MAX_NAMES:
        names.pop()
    rest = f" and {len(row) - len(names)} more" if len(names) < len(row) else ""
    return f"{', '.join(names)[:_MAX_NAMES]}{rest}\n\n" + "\n".join(lines[:_MAX_COLUMNS]) + more


def _show_sample(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SAMPLE else f"{text[:_MAX_SAMPLE]}..."


def suggest_columns(
    row: Any,
    prompt: str | None = None,
    completion: str | None = None,
    taken: Collection[str] = (),
) -> str:
    """The two options. They keep the words that the user gave. With none, they name the two columns
    with the longest texts; a column that cannot be guessed is a word in capitals. Those that are
    `taken` are not guessed.

    >>> row = {"opened": "2026-01-07", "ticket": "My kettle is lost", "agent": "Ana", "queue": "b"}
    >>> print(suggest_columns(row, completion="queue"))
    --prompt '{ticket}' --completion queue
    >>> print(suggest_columns(row, prompt="Which queue? {ticket}"))
    --prompt 'Which queue? {ticket}' --completion ANSWER
    >>> print(suggest_columns(row, prompt="Which queue?", completion="queue"))
    --prompt 'Which queue? {ticket}' --completion queue
    """
    columns = row if isinstance(row, Mapping) else {}
    in_prompt = list_placeholders(prompt or "")
    if completion in in_prompt:
        completion = None
    texts = {
        str(name): value
        for name, value in columns.items()
        if isinstance(value, str) and value.strip() and not _DATE.match(value)
    }
    free = [name for name in texts if name not in (prompt, completion, *in_prompt, *taken)]
    longest = sorted(free, key=lambda name: len(texts[name]), reverse=True)
    if prompt is None and completion is None and len(free) > 2:
        free = [name for name in free if name in longest[:2]]
    if prompt is None or not (in_prompt or prompt in columns):
        if completion is not None and free:
            column = longest[0]
        else:
            column = free[0] if len(free) == 2 else "QUESTION"
        prompt = _name_in_prompt(prompt, column)
        free = [name for name in free if name != column]
    if completion is None:
        completion = free[0] if len(free) == 1 else "ANSWER"
    return f"--prompt {shlex.quote(prompt)} --completion {shlex.quote(completion)}"


def find_constant_columns(rows: Sequence[Any]) -> set[str]:
    """The columns with the same value in all rows: neither a prompt nor an answer. Empty for one
    row.

    >>> find_constant_columns([{"lang": "en", "text": "a"}, {"lang": "en", "text": "b"}])
    {'lang'}
    """
    if len(rows) < 2 or not isinstance(rows[0], Mapping):
        return set()
    return {
        str(name)
        for name, value in rows[0].items()
        if all(isinstance(row, Mapping) and row.get(name) == value for row in rows)
    }


# The beginning of a date, such as 2026-01-07 or 07.01.2026: neither a prompt nor an answer.
_DATE: Final = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}\b")


def _name_in_prompt(words: str | None, column: str) -> str:
    """The prompt with the column in braces; the bare column if braces cannot hold its name."""
    braced = f"{{{column}}}"
    if not list_placeholders(braced):
        return column
    return braced if words is None else f"{words} {braced}"


def list_column_sets(row: Any, sets: Iterable[Sequence[str]]) -> str:
    """The column sets that are recognized, as lines of a hint; those nearest to the row's columns
    come first. Empty if there are none.

    >>> sets = [("messages",), ("prompt", "completion"), ("context", "question", "answers")]
    >>> print(list_column_sets({"Question": "Why?", "reply": "So"}, sets), end="")
          or rename the columns to one of these sets, the nearest first:
          context, question, answers; messages; prompt, completion
    """
    columns = [str(name).lower() for name in row] if isinstance(row, Mapping) else []

    def count_missing(needed: Sequence[str]) -> tuple[bool, float]:
        shared = sum(
            1.0
            if name in columns
            else 0.5 * bool(difflib.get_close_matches(name, columns, n=1, cutoff=0.8))
            for name in needed
        )
        return not shared, len(needed) - shared if shared else 0

    lines: list[str] = []
    for needed in sorted(dict.fromkeys(map(tuple, sets)), key=count_missing):
        shown = ", ".join(needed)
        if lines and measure(f"{lines[-1]}; {shown}") <= _MAX_SETS:
            lines[-1] += f"; {shown}"
        else:
            lines.append(shown)
    if not lines:
        return ""
    listed = ";\n      ".join(lines)
    return f"      or rename the columns to one of these sets, the nearest first:\n      {listed}\n"
