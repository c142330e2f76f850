"""Reads the rows of a data source, local or on the hub, as they are; nothing here knows what the columns mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from runner.errors import DataError
from runner.recipe import DataSource

_SUFFIXES: Final = (".json", ".jsonl", ".csv", ".parquet")


def load_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    """`(where, row)` for every row of a local file, a folder of files, or a data set on the hub, in file order."""
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
            hint="put your rows there, or name another file, such as data.train.path=FILE on the command line",
        )
    else:
        yield from _load_hub(source)


def _load_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            with path.open() as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{path} line {number}", _parse_json(line, f"{path} line {number}")
        elif path.suffix == ".json":
            rows = _parse_json(path.read_text(), str(path))
            if not isinstance(rows, list):
                raise DataError(f"{path}: expected a JSON list of rows")
            yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
        elif path.suffix == ".csv":
            with path.open(newline="") as stream:
                yield from ((f"{path} row {n}", row) for n, row in enumerate(csv.DictReader(stream), start=1))
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
            yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
        else:
            raise DataError(f"{path}: cannot tell the format, expected one of {', '.join(_SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error})") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error}") from None


def _load_hub(source: DataSource) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.config_name, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen unrelated kinds for a missing name, split or network
        raise DataError(
            f"cannot load the data set {source.path!r}, split {source.split!r}: {type(error).__name__}: {error}",
            hint="give a local file in `data.train.path`, or check the hub id, its split, and the network",
        ) from error
    yield from ((f"{source.path}[{source.split}] row {number}", row) for number, row in enumerate(rows))
