"""Reading data files: what spreadsheets and other tools write is read, what is damaged is refused
in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.data.sources import load_rows
from runner.errors import DataError
from runner.recipe.schema import DataSource


def load(path: Path) -> list[Any]:
    return [row for _, row in load_rows(DataSource(path=str(path)))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": "1"}\r\n\r\n{"a": "ü"}'),
        ("a.json", '[{"a": "1"}, {"a": "ü"}]'),
        ("a.csv", "a\r\n1\r\n\r\nü\r\n"),
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_are_read(
    name: str, text: str, tmp_path: Path
) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert load(tmp_path / name) == [{"a": "1"}, {"a": "ü"}]


def test_a_csv_field_may_be_long_and_hold_anything(tmp_path: Path) -> None:
    text = 'a, "b"\n' * 100_000
    (tmp_path / "long.csv").write_text('x,y\n"' + text.replace('"', '""') + '",z\n')
    assert load(tmp_path / "long.csv") == [{"x": text, "y": "z"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            b"q,a\nx,1\ny,2, and more\n",
            "row 2 (line 3): has 3 fields, but the header has 2",
        ),
        ("a.csv", b'q,a\n"x\ny",1\nz\n', "row 2 (line 4): has 1 fields, but the header has 2"),
        ("a.csv", b"q,a,a\nx,1,2\n", "two columns are called 'a'"),
        ("a.csv", "q,a\nwörd,1\n".encode("latin-1"), "is not UTF-8 text"),
        ("a.json", b'{"data": []}', "expected a JSON list of rows"),
        ("a.json", b"[" * 100_000, "is nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a"', "a.jsonl line 2: is not JSON"),
        ("a.parquet", b"nope", "cannot be read as Parquet"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read as Parquet"),
        ("a.txt", b"", "cannot tell the format"),
    ],
)
def test_a_damaged_file_is_refused_in_words(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert words in caught.value.message and name in caught.value.message
