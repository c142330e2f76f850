"""Reads the rows of a data source, local or on the hub, as they are; nothing here knows what the
columns mean.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from runner.errors import DataError
from runner.recipe.schema import DataSource

_SUFFIXES: Final = (".json", ".jsonl", ".csv", ".parquet")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# Whatever the locale; spreadsheets open their files with a byte order mark.
_ENCODING: Final = "utf-8-sig"
# Python's own limit, 131,072, is less than a long document.
_MAX_FIELD_CHARACTERS: Final = 2**31 - 1


def load_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    """`(where, row)` for every row of a local file, a folder of files, or a data set on the hub, in
    file order.
    """
    path = Path(source.path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file")
        for file in files:
            yield from _load_file(file)
    elif path.exists():
        yield from _load_file(path)
    elif path.suffix in _SUFFIXES:
        raise DataError(
            f"the data file {path} does not exist",
            hint=(
                "put your rows there, or name another file,"
                " such as data.train.path=FILE on the command line"
            ),
        )
    else:
        yield from _load_hub(source)


def _load_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding=_ENCODING) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{path} line {number}", _parse_json(line, f"{path} line {number}")
        elif path.suffix == ".json":
            rows = _parse_json(path.read_text(encoding=_ENCODING), str(path))
            if not isinstance(rows, list):
                raise DataError(f"{path}: expected a JSON list of rows")
            yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
        elif path.suffix == ".csv":
            yield from _load_csv(path)
        elif path.suffix == ".parquet":
            yield from _load_parquet(path)
        else:
            raise DataError(
                f"{path}: cannot tell the format, expected one of {', '.join(_SUFFIXES)}"
            )
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error})") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:  # also of a number with thousands of digits
        raise DataError(f"{where}: is not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply to be a row") from None
    if (found := _SURROGATE.search(text)) and not _is_text(value):
        raise DataError(
            f"{where}: {found[0]} is one half of a character: no tokenizer can read that"
        )
    return value


def _is_text(value: Any) -> bool:
    """Whether every text of a JSON value can be written as UTF-8: JSON may spell halves of
    surrogate pairs.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as mappings. `csv.DictReader` would drop a field too many, such as what follows a comma
    without quotes.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    with path.open(newline="", encoding=_ENCODING) as stream:
        reader = csv.reader(stream)
        try:
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{path}: two columns are called {twice[0]!r}")
            for number, fields in enumerate(filter(None, reader), start=1):
                if len(fields) != len(header):
                    raise DataError(
                        f"{path} row {number} (line {reader.line_num}): has {len(fields)} fields,"
                        f" but the header has {len(header)}",
                        hint=(
                            "a text that holds a comma, a quote or a line break stands in double"
                            ' quotes: "..."'
                        ),
                    )
                yield f"{path} row {number}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: is not CSV: {error}") from None


def _load_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        # The disk's fault; pyarrow's own have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _load_hub(source: DataSource) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path, source.config_name, split=source.split, revision=source.revision
        )
    # The library raises a dozen unrelated kinds for a missing name, split or network.
    except Exception as error:
        raise DataError(
            f"cannot load the data set {source.path!r}, split {source.split!r}:"
            f" {type(error).__name__}: {error}",
            hint=(
                "give a local file in `data.train.path`, or check the hub id,"
                " its split, and the network"
            ),
        ) from error
    yield from (
        (f"{source.path}[{source.split}] row {number}", row) for number, row in enumerate(rows)
    )
