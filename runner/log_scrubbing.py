"""Logs without secrets: what a trainer prints is scrubbed as it is printed, what libraries write past it afterwards.

The log of an attempt is the trainer's stdout and stderr, with nothing in between that could filter it. So for as long
as the attempt runs, only what goes through Python is surely clean.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from runner.fsio import fsync_dir
from runner.secrets import scrub

_PIECE_BYTES: Final = 8 * 2**20


class _ScrubbedStream(io.TextIOWrapper):
    """A text stream that masks secrets in each text that is written to it."""

    def write(self, text: str, /) -> int:
        super().write(scrub(text))
        return len(text)


def scrub_output() -> None:
    """From now on, whatever this process prints through `sys.stdout` and `sys.stderr` holds no secret.

    Called before libraries are imported: their loggers keep the stream that they find.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        scrubbed = _ScrubbedStream(
            stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True, write_through=True
        )
        setattr(sys, name, scrubbed)


def scrub_log(path: Path) -> bool:
    """Take every secret out of a file that nobody writes any more; False where there was none, or no file.

    A kill leaves the old file or the new one.
    """
    if not path.is_file() or not any(scrub(piece) != piece for piece in _read_pieces(path)):
        return False
    temporary = path.with_name(f".{path.name}.scrubbed.tmp")
    try:
        with temporary.open("wb") as target:
            for piece in _read_pieces(path):
                target.write(scrub(piece).encode(errors="surrogateescape"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True


def _read_pieces(path: Path) -> Iterator[str]:
    """The text in pieces that end with a line, so that no secret is cut in two unless its line is too long."""
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            yield (piece + stream.readline(_PIECE_BYTES)).decode(errors="surrogateescape")
