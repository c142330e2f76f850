"""Text for terminals and Markdown: widths, cutting, table cells, sizes and seconds; also numbers of
a command line.

Pure. `errors` decides which control characters may be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

ELLIPSIS: Final = "…"


def measure(text: str) -> int:
    """The number of terminal columns of a text."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # imported here: `--help` and most texts do not need it

    return cell_len(text)


def cut(text: str, width: int, ellipsis: str = ELLIPSIS) -> str:
    """A text cut to at most `width` columns.

    >>> cut("a long name", 6), cut("short", 6), cut("x", 0)
    ('a lon…', 'short', '')
    """
    if measure(text) <= width:
        return text
    kept = ""
    for character in text:
        if measure(kept + character) > width - measure(ellipsis):
            break
        kept += character
    return kept + ellipsis if width > 0 else ""


def cut_middle(text: str, width: int, ellipsis: str = ELLIPSIS) -> str:
    """Like `cut`, but keeps the end, where the values of an axis often differ.

    >>> cut_middle("gemma-2-9b-it", 8), cut_middle("task-12", 5), cut_middle("task", 2)
    ('gemm…-it', 'ta…12', '…k')
    """
    if measure(text) <= width:
        return text
    end = text[len(text) - len(cut(text[::-1], max(1, (width + 1) // 3), "")) :]
    return cut(text, width - measure(end), ellipsis) + end


def pad(text: str, width: int, ellipsis: str = ELLIPSIS) -> str:
    """A text cut or filled to exactly `width` columns."""
    return fill(cut(text, width, ellipsis), width)


def fill(text: str, width: int, *, is_right: bool = False) -> str:
    """A text filled with blanks to `width` columns, on its left if it `is_right`-aligned.

    >>> fill("ab", 4), fill("ab", 4, is_right=True), fill("abc", 2)
    ('ab  ', '  ab', 'abc')
    """
    blanks = " " * (width - measure(text))
    return blanks + text if is_right else text + blanks


def align(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows of cells as lines with aligned columns, two blanks apart; the columns `left` align left.

    >>> align([("run", "rows"), ("a", "12"), ("long", "3")], left=[0])
    ['run   rows', 'a       12', 'long     3']
    """
    widths = [max(map(measure, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(fill(cell, width, is_right=number not in left))
        lines.append("  ".join(cells).rstrip())
    return lines


def clean(text: str) -> str:
    """A text without line breaks and terminal controls, so that a library's text cannot control the
    terminal.

    >>> clean("out\\x1b[2J of\\tmemory")
    'out�[2J of memory'
    """
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "�"
        for character in text
    )


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.splitlines())


def escape_cell(cell: str) -> str:
    """A cell of a Markdown table, escaped so that it cannot end its column or its row.

    >>> escape_cell("a|b")
    'a\\\\|b'
    """
    return one_line(cell).replace("\\", "\\\\").replace("|", "\\|")


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units.

    >>> [format_seconds(seconds) for seconds in (0.4, 59.6, 3540, 3601, 200_000)]
    ['0 s', '1 min', '59 min', '1 h 0 min', '2 d 8 h']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def format_count(number: int, noun: str) -> str:
    """A number of things. The last word of `noun`, in the singular, gets its plural.

    >>> format_count(1, "run"), format_count(1_200, "test row"), format_count(2, "process")
    ('1 run', '1,200 test rows', '2 processes')
    >>> format_count(2, "query"), format_count(2, "key")
    ('2 queries', '2 keys')
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def format_mib(num_bytes: float) -> str:
    """A size in MiB, for comparison with other sizes.

    >>> format_mib(1_500_000_000)
    '1,430.5 MiB'
    """
    return f"{num_bytes / 2**20:,.1f} MiB"


def format_bytes(num_bytes: int) -> str:
    """A size to three digits.

    >>> format_bytes(3 * 2**30), format_bytes(5_000_000), format_bytes(300)
    ('3.00 GiB', '4.8 MiB', '0.3 KiB')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20 or num_bytes == 0:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.1f} KiB"


def positive(text: str) -> int:
    """A whole number above zero, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        from argparse import ArgumentTypeError  # imported here: most callers have no options

        raise ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
