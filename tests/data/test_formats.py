"""Reading data files: files of spreadsheets and other tools are read, damaged ones are refused with
a clear error.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from runner.data.formats import load_file
from runner.errors import DataError

CASES: Final = Path(__file__).with_name("cases")
PACK: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def load(path: Path) -> list[Any]:
    return [row for _, row in load_file(path, {})]


def places(path: Path) -> list[str]:
    return [where.removeprefix(f"{path}").strip() for where, _ in load_file(path, {})]


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
        ("a.json", b'{"data": 1, "n": 2}', "an object with no list: data, n"),
        ("a.json", b"{}", "an object with nothing in it"),
        ("a.json", b'{"a": [1], "b": [2]}', "an object with several lists: a, b"),
        ("a.json", b"7", "expected a JSON list of rows"),
        ("a.json", b'{"a": 1}\n{"a"', "a.json line 2: is not JSON"),
        ("a.json", b'{"a": 1}, {"a": 2}', "a.json line 1: is not JSON"),
        ("a.json", b"[" * 100_000, "is nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a"', "a.jsonl line 2: is not JSON"),
        ("a.parquet", b"nope", "cannot be read as Parquet"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read as Parquet"),
        ("a.parquet", b"", "cannot be read as Parquet"),
        ("a.arrow", b"nope", "cannot be read as Arrow"),
        ("a.arrow", b"ARROW1\0\0nope", "cannot be read as Arrow"),
        ("a.arrow", b"", "cannot be read as Arrow"),
        ("a.jsonl.gz", b"nope", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "cannot be unpacked"),
        ("a.jsonl.zst", b"nope", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress("wörd".encode("latin-1"), mtime=0), "is not UTF-8 text"),
        ("a.csv.gz", gzip.compress(b"q,a\nx\n", mtime=0), "row 1 (line 2): has 1 fields"),
        ("a.parquet.gz", gzip.compress(b"", mtime=0), "cannot tell the format"),
        ("a.gz", gzip.compress(b"", mtime=0), "cannot tell the format"),
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


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', "line 2"),
        ("a.json", '{"a": 1}\n{"c": 1, "c": 2}', "line 2"),
        ("a.json", '[{"a": 1}, {"a": 1}, {"b": [0, {"c": 1, "c": 1}]}]', "row 3"),
        ("a.json", '{"data": [{"a": 1}, {"c": 1, "c": 2}]}', "`data` row 2"),
        ("a.json", '{"data": [{"a": 1}], "c": 1, "c": 2}', ""),
        ("a.json", '{"messages": [], "c": 1, "c": 2}', ""),
    ],
)
def test_a_key_that_stands_twice_is_refused(
    name: str, text: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    start, _, what = caught.value.message.partition(": ")
    assert start == f"{tmp_path / name} {place}".strip()
    assert what.startswith("the key `c` appears twice") and caught.value.hint


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"a": "1"}\r\n\r\n{"a": "ü"}', "line 3"),
        ("a.json", '[{"a": "1"}, {"a": "ü"}]', "row 2"),
        ("a.csv", "a\r\n1\r\nü\r\n", "row 2"),
    ],
)
def test_a_packed_file_is_read_as_what_it_holds(
    name: str, text: str, place: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACK[suffix](text.encode("utf-8-sig")))
    assert load(path) == [{"a": "1"}, {"a": "ü"}]
    assert places(path)[-1] == place


@pytest.mark.parametrize("suffix", PACK)
def test_members_one_after_the_other_are_one_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(PACK[suffix](b'{"a": %d}\n' % number) for number in range(3)))
    assert load(path) == [{"a": 0}, {"a": 1}, {"a": 2}]


def test_many_equal_rows_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000, mtime=0))
    assert path.stat().st_size < 9_000, "a hundredth of its content"
    assert len(load(path)) == 100_000


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.jsonl", ".gz"), ("a.json", ".zst"), ("a.csv", ".zst")]
)
def test_a_file_that_unpacks_to_far_too_much_is_refused(
    name: str, suffix: str, tmp_path: Path
) -> None:
    member = PACK[suffix](b" " * 2**24)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(member * 17)  # 272 MiB
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        load(path)


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    path = CASES / "json_lines_named_json.json"
    shutil.copy(path, tmp_path / "rows.jsonl")
    rows = load(path)
    assert len(rows) == 5 and rows == load(tmp_path / "rows.jsonl")
    assert rows[4]["messages"][1] == {"role": "assistant", "content": "It is 4."}
    assert places(path) == [f"line {number}" for number in range(1, 6)]


def test_a_list_of_rows_may_stand_in_an_object(tmp_path: Path) -> None:
    rows = load(CASES / "data_key.json")
    assert len(rows) == 5 and rows == load(CASES / "json_lines_named_json.json")
    assert places(CASES / "data_key.json")[2] == "`data` row 3"
    path = tmp_path / "a.json"
    path.write_text('{"version": "1.0", "data": [{"a": 1}], "info": {"x": 2}}')
    aside: dict[str, tuple[str, ...]] = {}
    assert list(load_file(path, aside)) == [(f"{path} `data` row 1", {"a": 1})]
    assert aside == {"keys next to the rows": (f"{path}: `version`", f"{path}: `info`")}


def test_an_object_with_one_conversation_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "source": "x"}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert load(tmp_path / "a.json") == [row]


def write_tables(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """The rows in every format of tables."""
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=700)
    with pyarrow.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    pyarrow.feather.write_feather(table, folder / "file.arrow", compression="lz4")
    return [folder / name for name in ("a.parquet", "stream.arrow", "file.arrow")]


def test_tables_hold_what_json_lines_hold(tmp_path: Path) -> None:
    """Nulls of a union too: which of its columns a row has is for the task to read."""
    rows = load(CASES / "nulls_of_a_union.jsonl")
    assert len(rows) == 6 and rows[0]["messages"] is None
    many = [{**row, "n": n} for n in range(500) for row in rows]
    for path in write_tables(many, tmp_path):
        assert load(path) == many
        assert places(path) == [f"row {number}" for number in range(1, 3001)]


def test_values_of_tables_are_those_of_python(tmp_path: Path) -> None:
    rows = [{"a": math.inf, "b": [1, 2], "c": {"d": None}}, {"a": None, "b": [], "c": None}]
    for path in write_tables(rows, tmp_path):
        assert load(path) == rows


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_with_another_separator_is_told_as_such(
    tmp_path: Path, separator: str, name: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt{separator}completion\nWhat, now?{separator}Yes.\n")
    with pytest.raises(DataError, match=f"the header has {name} between its names"):
        list(load_file(path, {}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("my rows.csv", "iconv -f cp1252 -t utf-8 '{}' > NEW.csv"),
        ("rows.csv.gz", "convert its text to UTF-8"),
    ],
)
def test_another_encoding_is_refused_with_a_way_to_convert_it(
    name: str, hint: str, tmp_path: Path
) -> None:
    content = "q,a\nwörd,1\n".encode("cp1252")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError) as caught:
        list(load_file(path, {}))
    assert caught.value.hint is not None and caught.value.hint.endswith(hint.format(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_converted_from_utf_16(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeff".encode(encoding) * (encoding != "utf-16") + "q,a\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        list(load_file(path, {}))
    assert caught.value.hint == f"convert it: iconv -f utf-16 -t utf-8 {path} > NEW.csv"


def test_a_command_that_is_suggested_for_a_table_with_tabs_writes_csv(tmp_path: Path) -> None:
    path = tmp_path / "my rows.tsv"
    path.write_text('prompt\tcompletion\n"What,\nnow?"\tYes.\n')
    with pytest.raises(DataError, match="cannot tell the format") as caught:
        list(load_file(path, {}))
    assert caught.value.hint is not None
    command = caught.value.hint.removeprefix("write the file with commas: ")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    [(_, row)] = load_file(tmp_path / "NEW.csv", {})
    assert row == {"prompt": "What,\nnow?", "completion": "Yes."}


def test_a_spreadsheet_is_refused_with_a_way_to_save_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot tell the format") as caught:
        list(load_file(path, {}))
    assert caught.value.hint == "save the sheet as CSV, in UTF-8 and with commas"
