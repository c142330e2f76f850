"""Tokenized rows in columnar files: written once, then mapped into memory by every process that
reads them.

Owns the columns, and builds rows on access. `row_entries` decides when rows are stored and which
are found again.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Final, overload

import numpy as np
import pyarrow as pa

from runner.data.masking import CompletionSpan, build_labels
from runner.data.rows import Row, Split
from runner.functions import as_json
from runner.recipe.schema import Loss

# Texts as bytes: half a character, which a JSON file may contain, is not valid UTF-8.
_TEXT: Final = pa.binary()
_NUMBERS: Final = pa.list_(pa.int32())
# Spans of tokens are stored as the start and the end of each, one after the other.
SCHEMA: Final = pa.schema(
    {
        "row_id": _TEXT,
        "group": _TEXT,
        "where": _TEXT,
        "input_ids": _NUMBERS,
        "spans": _NUMBERS,
        "contents": _NUMBERS,
        "untrained": _NUMBERS,
        "num_bytes": pa.int64(),
        "is_truncated": pa.bool_(),
        "references": pa.list_(_TEXT),
        "columns": _TEXT,  # JSON; null if they are not needed
    }
)
_BATCH_ROWS: Final = 1000
# The size of a row on disk: its tokens, and about this much for names and places, without
# references.
BYTES_PER_TOKEN: Final = 4
BYTES_PER_ROW: Final = 300


def write_shard(path: Path, rows: Sequence[Row], *, with_columns: bool) -> None:
    """Write rows to one file, an Arrow stream; `with_columns` for metrics of the project.

    Raises:
        DataError: a column holds bytes, which cannot be passed to a metric.
        OSError: the file cannot be written.
    """
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            stream.write_batch(pa.record_batch(_build_columns(batch, with_columns), schema=SCHEMA))


def _build_columns(rows: Sequence[Row], with_columns: bool) -> list[Any]:
    return [
        pa.array([_encode(row.row_id) for row in rows], _TEXT),
        pa.array([_encode(row.group) for row in rows], _TEXT),
        pa.array([_encode(row.where) for row in rows], _TEXT),
        pa.array([row.input_ids for row in rows], _NUMBERS),
        pa.array([_flatten(row.spans) for row in rows], _NUMBERS),
        pa.array([_flatten(row.contents) for row in rows], _NUMBERS),
        pa.array([_flatten(row.untrained) for row in rows], _NUMBERS),
        pa.array([row.num_bytes for row in rows], pa.int64()),
        pa.array([row.is_truncated for row in rows], pa.bool_()),
        pa.array([[_encode(text) for text in row.references] for row in rows], pa.list_(_TEXT)),
        pa.array([_say(row) if with_columns else None for row in rows], _TEXT),
    ]


def _say(row: Row) -> bytes:
    """The row's columns in the form that metrics will get."""
    return json.dumps(as_json(row.columns, row.where)).encode()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def _flatten(spans: Sequence[CompletionSpan]) -> list[int]:
    return [bound for span in spans for bound in (span.start, span.end)]


def _unflatten(bounds: Sequence[int]) -> tuple[CompletionSpan, ...]:
    return tuple(map(CompletionSpan, bounds[::2], bounds[1::2]))


class StoredRows(Sequence[Row]):
    """The rows of some shards, in order. The files stay mapped. A row is built on each access, as a
    new object.

    Raises: ValueError, OSError, if a file is not a shard.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._tables = [_map_table(path) for path in paths]
        self._batches = [_Batch(batch) for table in self._tables for batch in table.to_batches()]
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(index, slice):
            return tuple(self[at] for at in range(*index.indices(len(self))))
        at = range(len(self))[index]  # raises IndexError beyond the end, which ends iterations
        number = bisect_right(self._starts, at) - 1
        return self._batches[number].build_row(at - self._starts[number])

    def list_texts(self, column: str) -> list[str]:
        """The texts of one column."""
        return [_decode(text) for one in self._batches for text in one.column(column).to_pylist()]

    def list_lengths(self) -> list[int]:
        """The number of tokens of each row."""
        lengths = [np.diff(one.offsets("input_ids")) for one in self._batches]
        return [length for some in lengths for length in some.tolist()]

    def build_dataset(self, loss: Loss, padding: Sequence[Sequence[int]]) -> Any:
        """A `datasets.Dataset` of `input_ids` and `labels`, followed by padding without labels.

        It uses the same mapped files, which may have been deleted by now. Its column `labels` holds
        the spans that have labels, or under the full loss those that have none; they are expanded
        to labels when rows are read.
        """
        from datasets import Dataset, concatenate_datasets
        from datasets.table import MemoryMappedTable

        places = "untrained" if loss == "full" else "spans"
        parts = [
            # Without a fingerprint, `datasets` would compute one from the file.
            Dataset(
                MemoryMappedTable(table, str(path)), fingerprint=f"{path.parent.name}-{path.name}"
            )
            .select_columns(["input_ids", places])
            .rename_column(places, "labels")
            for path, table in zip(self.paths, self._tables, strict=True)
        ]
        if padding:
            none = [[0, len(ids)] if loss == "full" else [] for ids in padding]
            columns = {"input_ids": padding, "labels": none}
            parts.append(Dataset.from_dict(columns, features=parts[0].features))
        return concatenate_datasets(parts).with_transform(partial(_write_labels, loss=loss))


def list_lengths(rows: Sequence[Row]) -> list[int]:
    """The number of tokens of each row, without building rows."""
    if isinstance(rows, StoredRows):
        return rows.list_lengths()
    return [len(row.input_ids) for row in rows]


def _write_labels(columns: Mapping[str, Any], *, loss: Loss) -> dict[str, Any]:
    """Rows of `StoredRows.build_dataset`, with their labels expanded for training."""
    labels = []
    for input_ids, bounds in zip(columns["input_ids"], columns["labels"], strict=True):
        places = _unflatten(bounds)
        spans, untrained = ((), places) if loss == "full" else (places, ())
        labels.append(build_labels(input_ids, spans, loss, untrained))
    return {"input_ids": columns["input_ids"], "labels": labels}


class _Batch:
    """Some rows of one shard; its numbers are views of the mapped file."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self.num_rows: int = batch.num_rows
        self._values: dict[str, Any] = {}
        self._offsets: dict[str, Any] = {}
        for name in ("input_ids", "spans", "contents", "untrained"):
            column = batch.column(name)
            self._values[name] = column.values.to_numpy()
            self._offsets[name] = column.offsets.to_numpy()

    def column(self, name: str) -> Any:
        """One column."""
        return self._batch.column(name)

    def offsets(self, name: str) -> Any:
        """The offsets at which the numbers of each row begin, and the end of the last row."""
        return self._offsets[name]

    def build_row(self, at: int) -> Row:
        """Build one row."""
        columns = self.column("columns")[at].as_py()
        return Row(
            row_id=self._text("row_id", at),
            group=self._text("group", at),
            input_ids=tuple(self._numbers("input_ids", at)),
            spans=_unflatten(self._numbers("spans", at)),
            contents=_unflatten(self._numbers("contents", at)),
            num_bytes=self.column("num_bytes")[at].as_py(),
            is_truncated=self.column("is_truncated")[at].as_py(),
            untrained=_unflatten(self._numbers("untrained", at)),
            references=tuple(map(_decode, self.column("references")[at].as_py())),
            where=self._text("where", at),
            columns={} if columns is None else json.loads(columns),
        )

    def _text(self, name: str, at: int) -> str:
        return _decode(self.column(name)[at].as_py())

    def _numbers(self, name: str, at: int) -> list[int]:
        offsets = self._offsets[name]
        numbers: list[int] = self._values[name][offsets[at] : offsets[at + 1]].tolist()
        return numbers


def _map_table(path: Path) -> Any:
    with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
        if not stream.schema.equals(SCHEMA):
            raise ValueError(f"{path} has other columns")
        return stream.read_all()


@dataclass(frozen=True)
class StoredSplit(Split):
    """A split with stored rows, and the facts about them in `samples.json` under each loss, without
    its `LISTS`.
    """

    LISTS: ClassVar = ("ids", "groups", "num_dropped", "dropped")

    rows: StoredRows
    facts: Mapping[str, Mapping[str, Any]]

    def list_lengths(self) -> list[int]:
        return self.rows.list_lengths()

    def list_ids(self) -> list[str]:
        return self.rows.list_texts("row_id")

    def describe(self, loss: Loss) -> dict[str, Any]:
        lists = {
            "ids": self.list_ids(),
            "groups": self.rows.list_texts("group"),
            "num_dropped": len(self.dropped),
            "dropped": list(self.dropped),
        }
        return {**self.facts[loss], **lists}
