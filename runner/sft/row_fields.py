"""Reading one field of a row, and naming what was found instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.errors import DataError


def require_object(row: Any, where: str) -> Mapping[str, Any]:
    """The row, if it has columns."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with columns, found {describe_value(row)}")
    return row


def require_column(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a column that must be there."""
    if column not in row:
        raise DataError(
            f"{where}: the column `{column}` is missing",
            hint=f"its columns are {', '.join(map(str, row))}; choose another `data.task`, or name the right one in it",
        )
    return row[column]


def read_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column."""
    value = require_column(row, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column `{column}` should be a text, found {describe_value(value)}")
    return value


def describe_value(value: Any) -> str:
    """The kind of a value, as people name it.

    >>> describe_value([]), describe_value(None), describe_value(3)
    ('an empty list', 'nothing (null)', 'a number')
    """
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing (null)"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
