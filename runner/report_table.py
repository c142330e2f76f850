"""Tables in Markdown that read well in a terminal: padded columns, cut in several where one would be too wide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from rich.cells import cell_len

MAX_WIDTH: Final = 140  # terminal columns; a wider table is cut
Item = TypeVar("Item")


@dataclass(frozen=True)
class Column:
    """One column of a Markdown table, its cells already text."""

    header: str
    cells: tuple[str, ...]
    is_numeric: bool = True
    is_detail: bool = False  # goes to the second table when one would be too wide
    equal_prefix: str | None = None  # what to say above the table when all runs have one value; None: never
    may_be_blank: bool = False  # whether runs without a value count as having that value

    @property
    def width(self) -> int:
        """Terminal columns; Markdown wants three dashes at least."""
        return max(3, *(cell_len(escape(cell)) for cell in (self.header, *self.cells)))

    def draw(self) -> list[str]:
        """Header, rule and cells, padded to one width."""
        width = self.width
        padded = []
        for cell in map(escape, (self.header, *self.cells)):
            blanks = " " * (width - cell_len(cell))
            padded.append(blanks + cell if self.is_numeric else cell + blanks)
        return [padded[0], "-" * (width - 1) + (":" if self.is_numeric else "-"), *padded[1:]]

    def equal_value(self) -> str | None:
        """The one value of all runs, where it is to be said once instead of in a column."""
        values = set(self.cells) - ({""} if self.may_be_blank else set())
        return values.pop() if self.equal_prefix is not None and len(values) == 1 else None


def build_column(header: str, items: Iterable[Item], text: Callable[[Item], str], **settings: Any) -> Column:
    """A column with one cell per item; `settings` are fields of `Column`."""
    return Column(header, tuple(text(item) for item in items), **settings)


def draw_tables(columns: Sequence[Column]) -> list[str]:
    """One table, or two that share their first column when one would be wider than `MAX_WIDTH`."""
    if _measure(columns) <= MAX_WIDTH:
        return [draw_table(columns)]
    details = [column for column in columns if column.is_detail]
    return [draw_table([column for column in columns if not column.is_detail]), draw_table([columns[0], *details])]


def draw_packed(columns: Sequence[Column]) -> list[str]:
    """As few tables that share their first column as fit into `MAX_WIDTH`, columns in order."""
    tables = [[columns[0]]]
    for column in columns[1:]:
        if len(tables[-1]) > 1 and _measure([*tables[-1], column]) > MAX_WIDTH:
            tables.append([columns[0]])
        tables[-1].append(column)
    return [draw_table(table) for table in tables]


def _measure(columns: Sequence[Column]) -> int:
    return sum(column.width + 3 for column in columns) + 1


def draw_table(columns: Sequence[Column]) -> str:
    """One table, whatever its width."""
    lines = zip(*(column.draw() for column in columns), strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.splitlines())


def escape(cell: str) -> str:
    """A cell that cannot end its column or its row.

    >>> escape("a|b")
    'a\\\\|b'
    """
    return one_line(cell).replace("\\", "\\\\").replace("|", "\\|")
