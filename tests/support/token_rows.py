"""Rows of given tokens, for tests that need no text."""

from __future__ import annotations

from collections.abc import Sequence

from runner.data.masking import CompletionSpan
from runner.data.rows import Row


def make_row(
    row_id: str,
    input_ids: Sequence[int],
    *spans: tuple[int, int],
    references: tuple[str, ...] = (),
    untrained: Sequence[tuple[int, int]] = (),
    num_bytes: int = 1,
) -> Row:
    """A row with completions at these places, each of which ends in one token of the template."""
    return Row(
        row_id=row_id,
        group=row_id,
        input_ids=tuple(input_ids),
        spans=tuple(CompletionSpan(start, end) for start, end in spans),
        contents=tuple(CompletionSpan(start, end - 1) for start, end in spans),
        num_bytes=num_bytes,
        is_truncated=False,
        untrained=tuple(CompletionSpan(start, end) for start, end in untrained),
        references=references,
    )
