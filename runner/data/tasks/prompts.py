"""The base of tasks with a prompt, whose placeholders are replaced by the texts of columns.

A placeholder is a plain identifier in braces, `{title}`: a column of the rows, or a name that the
task fills itself. Any other brace is text, including doubled ones; `{!title}` is the text
`{title}`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Final, Self

from pydantic import Field, ValidationInfo, model_validator

from runner.data.tasks.base import (
    EMPTY,
    Example,
    Examples,
    References,
    Task,
    is_empty,
    list_names,
    read_text,
)
from runner.errors import DataError
from runner.strict import Text, is_stored

_NAME: Final = r"[^\W\d]\w*"


class PromptTask(Task):
    """A task that puts columns into a prompt, and into the system text if the recipe has one."""

    # Names that the task fills in, each exactly once in the prompt.
    PLACEHOLDERS: ClassVar[tuple[str, ...]] = ()
    # Columns that a prompt may name although no row has them.
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ()

    prompt: Text | None = Field(
        default=None,
        description=(
            "The text of the user's turn, with columns in braces. null: the text of"
            " `prompt_column` alone."
        ),
        examples=["{context}\n\n{question}"],
    )
    system: Text | None = Field(
        default=None,
        description=(
            "The text of a system message, which may hold columns in braces. null: no system"
            " message."
        ),
        examples=["Answer in one sentence."],
    )

    @model_validator(mode="after")
    def _check_placeholders(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        if self.prompt is not None:
            require_placeholders(self.prompt, *self.PLACEHOLDERS)
        for key, name in self._list_placeholders():
            if name in self.list_answer_columns():
                raise ValueError(
                    f"`{key}` must not hold {{{name}}}, the column of the answer;"
                    f" the text {{{name}}} is written {{!{name}}}"
                )
        return self

    def get_prompt(self) -> str | None:
        """The text that becomes the user's turn, with its placeholders."""
        return self.prompt

    def list_read_columns(self) -> Collection[str]:
        """The columns that the task reads independently of its prompt."""
        raise NotImplementedError

    def list_answer_columns(self) -> Collection[str]:
        """The columns that hold the answer."""
        raise NotImplementedError

    def list_used_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        return {*self.list_read_columns(), *(name for _, name in self._list_placeholders())}

    def build_examples(
        self, rows: Iterable[tuple[str, Any]], *, used: frozenset[str] = frozenset()
    ) -> Examples:
        return super().build_examples(self._require_columns(rows), used=used)

    def build_prompted(
        self,
        row: Mapping[str, Any],
        where: str,
        texts: Mapping[str, str],
        completion: str,
        references: References = (),
    ) -> Example:
        """The row's system text and prompt, filled with `texts` and columns, and the answer."""
        messages = []
        empty: set[str] = set()
        for role, key, prompt in (
            ("system", "system", self.system),
            ("user", "prompt", self.get_prompt()),
        ):
            if prompt is None:
                continue
            names = list_placeholders(prompt, tuple(texts))
            empty |= {name for name in names if is_empty(row.get(name))}
            filled = fill_prompt(prompt, row, where, texts)
            if filled.strip() or not names:
                messages.append({"role": role, "content": filled})
            elif role == "user":
                self._require_known(key, names, row, where)
                raise DataError(
                    f"{where}: the prompt is empty: there is no text in {list_names(names)}",
                    hint="leave such rows out of the file",
                )
        messages.append({"role": "assistant", "content": completion})
        unused = tuple(f"{name}{EMPTY}" for name in sorted(empty))
        return Example(where, tuple(messages), references, unused=unused)

    def _list_placeholders(self) -> list[tuple[str, str]]:
        """The columns named in texts of the section, each with the key of its text."""
        found = []
        for key, text in (("prompt", self.prompt), ("system", self.system)):
            names = list_placeholders(text or "", self.PLACEHOLDERS)
            found += [(key, name) for name in names]
        return found

    def _require_columns(self, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield the rows. Raises DataError after the last one for a placeholder that is not a
        column of any row.
        """
        columns: dict[str, None] = dict.fromkeys(self.OPTIONAL_COLUMNS)
        first = None
        for where, row in rows:
            first = first or where
            if isinstance(row, Mapping):
                columns |= dict.fromkeys(row)
            yield where, row
        for key, name in self._list_placeholders():
            if first is not None:
                self._require_known(key, [name], columns, first)
        for key, text in (("prompt", self.prompt), ("system", self.system)):
            for name in list_unfillable(text or "", columns):
                raise DataError(
                    f"{first}: `data.task.{key}`: {describe_unfillable(name)}",
                    hint="rename the column",
                )

    def _require_known(
        self, key: str, names: Iterable[str], columns: Mapping[str, Any], where: str
    ) -> None:
        for name in names:
            if name not in columns:
                known = [*self.PLACEHOLDERS, *columns]
                close = difflib.get_close_matches(name, known, n=1)
                nearest = f", did you mean {{{close[0]}}}?" if close else ""
                raise DataError(
                    f"{where}: `data.task.{key}` holds {{{name}}}, but there is no column"
                    f" `{name}`{nearest}",
                    hint=(
                        f"the columns are {', '.join(map(str, columns))};"
                        f" the text {{{name}}} itself is written {{!{name}}}"
                    ),
                )


def require_placeholders(prompt: str, *names: str) -> None:
    """Raise ValueError for a `prompt` that does not hold each placeholder exactly once."""
    for name in names:
        if prompt.count(f"{{{name}}}") != 1:
            raise ValueError(f"`prompt` must hold the placeholder {{{name}}} exactly once")


def list_placeholders(text: str, own: tuple[str, ...] = ()) -> list[str]:
    """The columns that a text names, each once, without the task's `own` names.

    >>> list_placeholders('{a} {b} {a} {"c": 1} {d e} {{f}} {!g}', own=("b",))
    ['a']
    """
    matches = _compile(own).finditer(text)
    return list(dict.fromkeys(match["column"] for match in matches if match["column"]))


def list_unfillable(text: str, columns: Collection[str]) -> list[str]:
    """The columns in braces that stay as they are, because their names are not identifiers.

    >>> list_unfillable('{a} {d e} {f} {{g h}} {"c": 1}', ["a", "d e", "g h"])
    ['d e']
    """
    braced = re.findall(r"(?<!\{)\{([^{}]+)\}(?!\})", text)
    return [name for name in braced if name in columns and not list_placeholders(f"{{{name}}}")]


def describe_unfillable(name: str) -> str:
    """The problem of a column that `list_unfillable` found."""
    return (
        f"{{{name}}} would stay as it is in every row: a name in braces may hold only letters,"
        " digits and _, and may not start with a digit"
    )


def fill_prompt(prompt: str, row: Mapping[str, Any], where: str, texts: Mapping[str, str]) -> str:
    r"""The prompt with its placeholders replaced by `texts`, else by columns; a placeholder inside
    a replacement stays as it is.

    A column that is empty or missing leaves no trace: a line that holds nothing else is removed,
    together with its blank lines.

    >>> fill_prompt("{q}\n\nHint: {hint}", {"hint": "{q}"}, "row 1", {"q": "Why?"})
    'Why?\n\nHint: {q}'
    >>> fill_prompt("{q}\n\nHint: {hint}", {"hint": None}, "row 1", {"q": "Why?"})
    'Why?'
    """
    kept: list[str] = []
    is_cut = False  # the line before was left out
    for line in prompt.split("\n"):
        names = list_placeholders(line, tuple(texts))
        empty = [name for name in names if is_empty(row.get(name))]
        has_own = any(f"{{{name}}}" in line for name in texts)
        if empty and len(empty) == len(names) and not has_own:
            is_cut = True
            continue
        if is_cut and not line.strip() and (not kept or not kept[-1].strip()):
            continue
        is_cut = False
        kept.append(_fill_line(_drop_placeholders(line, empty), row, where, texts))
    while is_cut and kept and not kept[-1].strip():
        kept.pop()
    return "\n".join(kept)


def _drop_placeholders(line: str, names: Iterable[str]) -> str:
    """The line without these placeholders and the blanks before them."""
    for name in names:
        is_first = line.startswith(f"{{{name}}}")
        line = re.sub(rf"[ \t]*(?<!\{{)\{{{name}\}}(?!\}})", "", line)
        line = line.lstrip(" \t") if is_first else line
    return line


def _fill_line(line: str, row: Mapping[str, Any], where: str, texts: Mapping[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        if match["own"]:
            return texts[match["own"]]
        if match["literal"]:
            return f"{{{match['literal']}}}"
        return read_text(row, match["column"], where)

    return _compile(tuple(texts)).sub(replace, line)


@cache
def _compile(own: tuple[str, ...]) -> re.Pattern[str]:
    """The pattern of placeholders. In doubled braces, only the task's own names are placeholders,
    so prompts that were written before columns could be named stay the same texts.
    """
    names = "|".join(map(re.escape, own)) or "(?!)"  # the latter matches nothing
    return re.compile(
        rf"\{{(?P<own>{names})\}}"
        rf"|(?<!\{{)\{{(?:!(?P<literal>!*{_NAME})|(?P<column>{_NAME}))\}}(?!\}})"
    )
