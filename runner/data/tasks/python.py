"""The task `python`: a function of the project turns each row into a conversation.

The function runs in a separate process, under limits (`runner.functions`), and only if
`run.allowed_code` has allowed it. It may not leave rows out, and a row on which it fails is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, Self

from pydantic import PrivateAttr

from runner.data.tasks.base import Example, Examples, Task, describe_value
from runner.data.tasks.conversations import read_conversation
from runner.errors import DataError
from runner.functions import UserFunction

_KEYS: Final = ("messages", "tools", "references", "group")
_FORM: Final = (
    "return a list of messages, or {'messages': [...]} with optional keys 'tools', 'references'"
    " (a list of texts) and 'group' (a text)"
)


class PythonTask(UserFunction, Task):
    """Rows of any shape: `function` gets a row with all its columns and returns its messages."""

    ORDER = 8

    name: Literal["python"]
    _call: Callable[..., Any] | None = PrivateAttr(None)
    _builds_twice: bool = PrivateAttr(False)

    def for_check(self) -> Self:
        """A copy of the task that refuses a function whose answers change."""
        task = self.model_copy()
        task._builds_twice = True
        return task

    def list_used_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        """All columns, because it is unknown which ones the function uses."""
        return set(row)

    def list_text_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        """No columns by name: `draw` detects a function that uses `id` and similar columns."""
        return ()

    def build_examples(
        self, rows: Iterable[tuple[str, Any]], *, used: frozenset[str] = frozenset()
    ) -> Examples:
        if not self._builds_twice:
            return self._build(rows, used)
        kept = list(rows)
        built = self._build(kept, used)
        again = self._build(reversed(kept), used)
        for first, second in zip(built.examples, reversed(again.examples), strict=True):
            if first != second:
                raise self._refuse_change(first, second)
        return built

    def _build(self, rows: Iterable[tuple[str, Any]], used: frozenset[str]) -> Examples:
        with self.open_function() as function:
            loaded = self.model_copy()
            loaded._call = function
            return super(PythonTask, loaded).build_examples(rows, used=used)

    def build_example(self, row: Any, where: str) -> Example:
        assert self._call is not None, "only `_build` opens the function"
        returned = self._call(where, row)
        example = _read_example(returned, f"{where}, what {self.function} returned")
        return replace(example, where=where)

    def _refuse_change(self, first: Example, second: Example) -> DataError:
        changed = [
            name
            for name in ("messages", "tools", "references", "group", "untrained")
            if getattr(first, name) != getattr(second, name)
        ]
        return DataError(
            f"{first.where}: {self.function} returned other {' and '.join(changed)} when it was"
            " called again, in a new process and with the rows in reverse order",
            hint=(
                "let the function depend on the row alone, not on chance, on the time, or on"
                " earlier calls"
            ),
        )


def _read_example(value: Any, where: str) -> Example:
    """The example that a function returned, in the forms that the task `conversations` reads.

    >>> answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    >>> _read_example({"messages": answered, "references": ["!"]}, "row 1").references
    ('!',)
    """
    if value is None:
        raise DataError(
            f"{where}: found nothing (None), but a function may not leave rows out",
            hint="remove the row from the file",
        )
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, Mapping) or "messages" not in value:
        found = "an object without 'messages'" if isinstance(value, Mapping) else None
        raise DataError(f"{where}: found {found or describe_value(value)}", hint=_FORM)
    if unknown := [str(key) for key in value if key not in _KEYS]:
        raise DataError(f"{where}: has the unknown key {unknown[0]!r}", hint=_FORM)
    said = {key: value[key] for key in ("messages", "tools") if value.get(key) is not None}
    return replace(
        read_conversation(said, where),
        references=_read_references(value.get("references"), where),
        group=_read_group(value.get("group"), where),
    )


def _read_references(value: Any, where: str) -> tuple[str, ...]:
    references = [] if value is None else value
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise DataError(
            f"{where}: 'references' should be a list of texts, found {describe_value(value)}",
            hint=_FORM,
        )
    return tuple(references)


def _read_group(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise DataError(f"{where}: 'group' should be a text, found {describe_value(value)}", hint=_FORM)
