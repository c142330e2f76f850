"""The error classes of the project; `str(error)` is the text to print.

An error states the place, the value found, the values accepted, and the fix. The command line
prints `str(error)` without a traceback. Anything that is not a `RunnerError` is a defect of ours
and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Per file, because finding the nearest known name takes a millisecond.
MAX_SHOWN_PROBLEMS: Final = 50
# Characters that move the cursor, ring, hide or reverse text in a terminal, and surrogate halves,
# which cannot be printed. Line breaks and tabs are allowed.
CONTROLS: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


_COLORS: Final = re.compile(r"\x1b\[[0-9;]*m")


def escape_controls(text: str) -> str:
    r"""`text` made safe for a terminal, whoever wrote it: without colors, and with control
    characters as Python writes them.

    >>> print(escape_controls("\x1b[1;31ma\x1b[0m\x1b[2J"))
    a\x1b[2J
    """
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], _COLORS.sub("", text))


class RunnerError(Exception):
    """Bad input or a refused action: a message and, if there is one, a hint that can be pasted.

    >>> print(RunnerError("no such grid 'demp'", hint="runner render demo"))
    no such grid 'demp'
    <BLANKLINE>
    hint: runner render demo
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


@dataclass(frozen=True)
class Problem:
    """One mistake in a file. `line` is 1-based; None for a value from the command line."""

    key: str
    what: str
    line: int | None = None


def put_in_words(error: Exception) -> str:
    """The message of an error without its hint; of a system error without its number.

    >>> put_in_words(PermissionError(13, "Permission denied", "runs/a/run.json"))
    'runs/a/run.json: permission denied'
    """
    if isinstance(error, RunnerError):
        return error.message
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    what = error.strerror[:1].lower() + error.strerror[1:]
    return f"{' -> '.join(named)}: {what}" if named else what


class RecipeError(RunnerError):
    """All problems of one recipe (or one list of overrides), printed together up to a limit."""

    def __init__(self, where: str, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        width = max((len(problem.key) for problem in problems[:MAX_SHOWN_PROBLEMS]), default=0)
        lines = [f"{where} has {count}", ""]
        for problem in problems[:MAX_SHOWN_PROBLEMS]:
            place = "override" if problem.line is None else f"line {problem.line}"
            lines.append(f"  {place:<9} {problem.key:<{width}}  {problem.what}")
        if len(problems) > MAX_SHOWN_PROBLEMS:
            lines.append(f"  and {len(problems) - MAX_SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines), hint=hint)
        self.where = where
        self.problems = tuple(problems)


class GridError(RunnerError):
    """A grid file or template that cannot be rendered."""


class DataError(RunnerError):
    """A data set, row, tokenizer or chat template that cannot be trained on."""


class RefusedError(RunnerError):
    """An action that would lose, mix or silently change a run."""


class DivergedError(RunnerError):
    """A loss or score that is not a finite number."""


class PreemptedError(RunnerError):
    """The attempt was asked to stop, and has saved a checkpoint if there was progress to keep."""


class CorruptFileError(RunnerError, ValueError):
    """A record on disk that cannot be read: damaged, cut off, or written by another program."""


def hide_bitsandbytes_warning() -> None:
    """Hide a warning of bitsandbytes. Call this before PEFT imports it.

    Version 0.50 warns at every import that a faster CPU kernel could be downloaded, even if nothing
    is 4-bit.
    """
    import logging  # imported here: it takes a tenth of the time of `--help`

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
