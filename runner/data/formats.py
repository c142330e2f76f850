"""Reads the rows of one file, as they are: JSON, JSON lines, CSV, Parquet and Arrow; the first
three also compressed. Nothing here knows the meaning of columns, or which files a recipe reads.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from runner.errors import DataError
from runner.recipe.data_files import ACCEPTED, COMPRESSIONS, name_format

_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# For any locale; spreadsheets write a byte order mark at the start of a file.
_ENCODING: Final = "utf-8-sig"
_UTF_16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Python's own limit, 131,072, is less than a long document.
_MAX_FIELD_CHARACTERS: Final = 2**31 - 1
# Texts shrink to a third or a tenth, a file of one repeated row to less than a hundredth. A large
# file that unpacks to more was made to fill the memory.
_MAX_UNPACKED_RATIO: Final = 200
_MAX_UNPACKED_BYTES: Final = 2**28  # a small file may unpack to this much at any ratio
_TABLE_ROWS: Final = 1000  # at a time
# Columns whose lists are the turns of one conversation, not rows.
_CONVERSATION_COLUMNS: Final = ("messages", "conversations")

Rows = Iterator[tuple[str, Any]]


def load_file(path: Path, aside: dict[str, tuple[str, ...]]) -> Rows:
    """`(where, row)` for every row of a file, in its order.

    The file's other content, which is not rows, is added to `aside`: reason -> names.
    """
    try:
        yield from _load(path, aside)
    except UnicodeDecodeError as error:
        suffix = Path(path).suffix
        with path.open("rb") as stream:
            is_utf_16 = stream.read(2) in _UTF_16_MARKS
        encoding = "utf-16" if is_utf_16 else "cp1252"
        command = f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > NEW{suffix}"
        convert = "convert it: " if is_utf_16 else "convert it; from a Western European encoding: "
        raise DataError(
            f"{path}: is not UTF-8 text ({error})",
            hint="convert its text to UTF-8" if suffix in COMPRESSIONS else f"{convert}{command}",
        ) from None


def _load(path: Path, aside: dict[str, tuple[str, ...]]) -> Rows:
    match name_format(path):
        case ".jsonl":
            with _open_text(path) as stream:
                yield from _load_lines(stream, path)
        case ".json":
            yield from _load_json(path, aside)
        case ".csv":
            yield from _load_csv(path)
        case ".parquet":
            yield from _load_parquet(path)
        case ".arrow":
            yield from _load_arrow(path)
        case _:
            raise DataError(
                f"{path}: cannot tell the format, expected one of {ACCEPTED}",
                hint=_suggest_format(path),
            )


def _suggest_format(path: Path) -> str | None:
    """A hint for a table in another format; None for other files."""
    match path.suffix.lower():
        case ".tsv" | ".tab":
            command = _spell_with_commas(path, "\t")
            return f"write the file with commas: {command}"
        case ".xlsx" | ".xls" | ".ods":
            return "save the sheet as CSV, in UTF-8 and with commas"
        case _:
            return None


def _spell_with_commas(path: Path, separator: str) -> str:
    """A command that writes a table with another separator as CSV."""
    return (
        'python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin,'
        f' delimiter={separator!r}))" < {shlex.quote(str(path))} > NEW.csv'
    )


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a compressed file, as a stream that raises an error if they are far too
    many or the file cannot be unpacked.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._path = path
        size = path.stat().st_size
        self._num_left = max(_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * size)
        codec = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:  # from the disk; errors of the library have no number
                raise
            raise DataError(f"{self._path}: cannot be unpacked: {error}") from None
        self._num_left -= len(content)
        if self._num_left < 0:
            raise DataError(
                f"{self._path}: unpacks to more than {_MAX_UNPACKED_RATIO} times its size, which"
                " rows of text never do",
                hint="if you expect that, unpack the file yourself and name the result",
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_text(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix.lower() not in COMPRESSIONS:
        return path.open(encoding=_ENCODING, newline=newline)
    return io.TextIOWrapper(
        io.BufferedReader(_Unpacked(path), 2**16), encoding=_ENCODING, newline=newline
    )


def _load_lines(lines: Iterable[str], path: Path) -> Rows:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _parse_json(line, where)


def _load_json(path: Path, aside: dict[str, tuple[str, ...]]) -> Rows:
    """The rows of a JSON list, of the only list in a JSON object, or of JSON lines under another
    name.
    """
    with _open_text(path) as stream:
        text = stream.read()
    try:
        value = _parse_json(text, str(path), is_file=True)
    except _MoreThanOneValue:
        yield from _load_lines(io.StringIO(text), path)
        return
    del text
    if isinstance(value, list):
        yield from ((f"{path} row {number}", row) for number, row in enumerate(value, start=1))
        return
    if not isinstance(value, Mapping):
        raise DataError(f"{path}: expected a JSON list of rows")
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if lists and all(key in _CONVERSATION_COLUMNS for key in lists):
        yield f"{path} row 1", value
        return
    if len(lists) != 1:
        found = "nothing in it"
        if value:
            kind, names = ("several lists", lists) if lists else ("no list", list(value))
            found = f"{kind}: {', '.join(names)}"
        raise DataError(
            f"{path}: expected a JSON list of rows, or an object with one; found an object with"
            f" {found}",
            hint="keep only the list of rows in the file, or write one row per line (.jsonl)",
        )
    (key,) = lists
    if others := tuple(f"{path}: `{name}`" for name in value if name != key):
        aside["keys next to the rows"] = (*aside.get("keys next to the rows", ()), *others)
    for number, row in enumerate(value[key], start=1):
        yield f"{path} `{key}` row {number}", row


class _MoreThanOneValue(Exception):
    """The text continues after a first JSON object, as JSON lines do."""


def _parse_json(text: str, where: str, *, is_file: bool = False) -> Any:
    """The value of a JSON text: a row, or a whole file (errors then name the row).

    Raises: _MoreThanOneValue, if a file continues after an object.
    """
    repeats: list[tuple[dict[str, Any], str]] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs):
            names = [name for name, _ in pairs]
            repeats.append((built, next(name for name in names if names.count(name) > 1)))
        return built

    try:
        value = json.loads(text, object_pairs_hook=build)
    except ValueError as error:  # also for a number with thousands of digits
        is_extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if is_file and is_extra and text.lstrip().startswith("{"):
            raise _MoreThanOneValue from None
        raise DataError(f"{where}: is not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply to be a row") from None
    if repeats:
        built, name = repeats[0]
        place = _find_row(value, built, where) if is_file else where
        raise DataError(
            f"{place}: the key `{name}` appears twice in one object, and JSON does not define which"
            " one counts",
            hint="rename one of them or remove it",
        )
    if (found := _SURROGATE.search(text)) and not _is_text(value):
        raise DataError(
            f"{where}: {found[0]} is one half of a character, which no tokenizer can read"
        )
    return value


def _find_row(value: Any, wanted: dict[str, Any], where: str) -> str:
    """The place of the row that contains this object (the same one, not an equal one)."""
    lists = {"": value} if isinstance(value, list) else value
    for key, rows in lists.items() if lists is not wanted else ():
        for number, row in enumerate(rows if isinstance(rows, list) else (), start=1):
            if _holds(row, wanted):
                return f"{where} `{key}` row {number}" if key else f"{where} row {number}"
    return where


def _holds(value: Any, wanted: dict[str, Any]) -> bool:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if item is wanted:
            return True
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return False


def _is_text(value: Any) -> bool:
    """True if every text of a JSON value can be written as UTF-8; JSON can contain halves of
    surrogate pairs, which cannot.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as mappings. `csv.DictReader` would drop surplus fields, such as the text after a comma
    that is not in quotes.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    with _open_text(path, newline="") as stream:
        reader = csv.reader(stream)
        try:
            header = next(reader, [])
            _refuse_other_separator(header, path)
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{path}: two columns are called {twice[0]!r}")
            for number, fields in enumerate(filter(None, reader), start=1):
                if len(fields) != len(header):
                    raise DataError(
                        f"{path} row {number} (line {reader.line_num}): has {len(fields)} fields,"
                        f" but the header has {len(header)}",
                        hint=(
                            "put texts that contain a comma, a quote or a line break in double"
                            ' quotes: "..."'
                        ),
                    )
                yield f"{path} row {number}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: is not CSV: {error}") from None


def _refuse_other_separator(header: list[str], path: Path) -> None:
    """Raises: DataError, if the only column is a list of names with another separator."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise DataError(
                f"{path}: the header has {name} between its names, expected commas",
                hint=f"write the file with commas: {_spell_with_commas(path, separator)}",
            )


def _load_parquet(path: Path) -> Rows:
    import pyarrow.parquet

    def read() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_TABLE_ROWS)

    return _load_table(read(), path, "Parquet")


def _load_arrow(path: Path) -> Rows:
    """The rows of an Arrow file, or of an Arrow stream, the format that `datasets` writes."""
    import pyarrow.ipc

    def read() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                file = pyarrow.ipc.open_file(source)
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(source)

    return _load_table(read(), path, "Arrow")


def _load_table(batches: Iterator[Any], path: Path, kind: str) -> Rows:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _TABLE_ROWS):
                for row in batch.slice(start, _TABLE_ROWS).to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # A number means an error of the disk; pyarrow's own errors have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: cannot be read as {kind}: {error}") from None
