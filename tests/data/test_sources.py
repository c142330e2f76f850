"""Reading a source: the rows of the split that it names, and of the files next to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import datasets
import pytest

from runner.data.sources import load_rows
from runner.errors import DataError
from runner.recipe.data_section import DataSource

CASES: Final = Path(__file__).with_name("cases")


def questions(path: Path, **keys: Any) -> list[str]:
    """The first message of each row."""
    rows = load_rows(DataSource(path=str(path), **keys))
    return [row["messages"][0]["content"] for _, row in rows]


@pytest.mark.parametrize(
    ("case", "split", "files"),
    [
        ("split_files", "train", ["train.jsonl"]),
        ("split_files", "validation", ["validation.jsonl"]),
        ("split_files", "test", ["test.jsonl"]),
        ("hub_layout", "train", ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        ("hub_layout", "test", ["test-00000-of-00001.jsonl"]),
    ],
)
def test_a_split_is_read_and_no_other(case: str, split: str, files: list[str]) -> None:
    expected = [f"{name} question {number}?" for name in files for number in range(6)]
    assert questions(CASES / case, split=split) == expected


@pytest.mark.parametrize(
    ("case", "splits"), [("split_files", "validation"), ("hub_layout", "test")]
)
def test_without_a_choice_the_splits_are_named(case: str, splits: str) -> None:
    with pytest.raises(DataError) as caught:
        questions(CASES / case)
    assert "train (" in caught.value.message and f"{splits} (" in caught.value.message
    assert caught.value.hint is not None and "write `split: train`" in caught.value.hint


def test_hidden_files_are_skipped_and_told() -> None:
    path = CASES / "hidden_files"
    assert questions(path) == [f"train.jsonl question {number}?" for number in range(6)]
    names = ".ipynb_checkpoints/train-checkpoint.jsonl, __MACOSX/._train.jsonl"
    assert load_rows(DataSource(path=str(path))).count_skipped() == {f"hidden files ({names})": 2}


def test_every_row_has_its_file_and_line() -> None:
    path = CASES / "hub_layout"
    places = [where for where, _ in load_rows(DataSource(path=str(path), split="train"))]
    assert places == [
        f"{path}/data/train-0000{shard}-of-00002.jsonl line {line}"
        for shard in (0, 1)
        for line in range(1, 7)
    ]


def test_keys_beside_a_list_of_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"version": 2, "rows": [{"q": 1}]}')
    loaded = load_rows(DataSource(path=str(tmp_path)))
    assert len(list(loaded)) == 1
    assert loaded.count_skipped() == {f"keys next to the rows ({tmp_path}/a.json: `version`)": 1}


def save(target: Path, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    sets = {split: datasets.Dataset.from_list(those) for split, those in rows.items()}
    if set(sets) == {""}:
        sets[""].save_to_disk(str(target), num_shards=min(2, len(rows[""])))
    else:
        datasets.DatasetDict(sets).save_to_disk(str(target))


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    rows = [{"a": {"b": [number, None]}, "c": f"{number}"} for number in range(7)]
    save(tmp_path / "one", {"": rows})
    save(tmp_path / "many", {"train": rows[:4], "test_sft": rows[4:]})
    loaded = list(load_rows(DataSource(path=str(tmp_path / "one"))))
    assert loaded == [(f"{tmp_path}/one row {n}", row) for n, row in enumerate(rows, start=1)]
    for split, those in (("train", rows[:4]), ("test_sft", rows[4:])):
        source = DataSource(path=str(tmp_path / "many"), split=split)
        assert [row for _, row in load_rows(source)] == those
    with pytest.raises(DataError, match=r"holds train \(3 files\), test_sft \(3 files\), and the"):
        load_rows(DataSource(path=str(tmp_path / "many")))
    with pytest.raises(DataError, match="has no files for `split: test`"):
        load_rows(DataSource(path=str(tmp_path / "one"), split="test"))


def test_what_save_to_disk_wrote_keeps_the_order_that_was_chosen(tmp_path: Path) -> None:
    chosen = datasets.Dataset.from_list([{"a": number} for number in range(9)]).select([7, 2, 5])
    chosen.save_to_disk(str(tmp_path / "chosen"))
    rows = load_rows(DataSource(path=str(tmp_path / "chosen")))
    assert [row["a"] for _, row in rows] == [7, 2, 5]


def test_a_damaged_saved_folder_is_refused_in_words(tmp_path: Path) -> None:
    save(tmp_path / "one", {"": [{"a": 1}]})
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"nope")
    with pytest.raises(DataError, match=r"one: cannot be read as a data set that `save_to_disk`"):
        list(load_rows(DataSource(path=str(tmp_path / "one"))))
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "dataset_dict.json").write_text(json.dumps({"splits": ["../one"]}))
    with pytest.raises(DataError, match="leads out of the folder"):
        load_rows(DataSource(path=str(tmp_path / "many")))
    (tmp_path / "many" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="does not list splits as `save_to_disk` does"):
        load_rows(DataSource(path=str(tmp_path / "many")))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.json.gz", "none.arrow"):
        with pytest.raises(DataError, match=f"{name} does not exist"):
            load_rows(DataSource(path=str(tmp_path / name)))
