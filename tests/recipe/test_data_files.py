"""A recipe reads the files of a folder by the splits in their names, as the hub's libraries do, and
reports the files that it skips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import pytest

from runner.errors import DataError
from runner.recipe.data_files import find_source_files, list_splits, name_split
from runner.recipe.data_section import DataSource


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def read(folder: Path, **keys: Any) -> list[str]:
    found = find_source_files(DataSource(path=str(folder), **keys))
    return [str(file.relative_to(folder)) for file in found.files]


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, **keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Test.csv", "test"),
        ("train-00000-of-00002.jsonl", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("plain_text/validation-00000-of-00001.parquet", "validation"),
        ("train/xyz.jsonl", "train"),
        ("my-train/a/xyz.jsonl", "train"),
        ("dev.json", "validation"),
        ("valid.jsonl.gz", "validation"),
        ("squad_val_v2.json", "validation"),
        ("summaries.test.jsonl", "test"),
        ("train1.jsonl", "train"),
        ("test/test_01.jsonl", "test"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("train_sft-00000-of-00003.parquet", "train_sft"),
        ("data/part-00000-of-00003.parquet", "part"),
        ("part-00000-of-00003.parquet", None),
        ("latest.jsonl", None),
        ("trains.jsonl", None),
        ("contest/results.jsonl", None),
        ("retrain.jsonl", None),
        ("data/rows.jsonl", None),
    ],
)
def test_names_say_splits(name: str, split: str | None) -> None:
    assert name_split(PurePath(name)) == split


@pytest.mark.parametrize("name", ["train_test.jsonl", "train/test.jsonl", "test-set/train.csv"])
def test_a_name_that_says_two_splits_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, "a/train.jsonl")
    assert f"{tmp_path / name}: its name contains two splits" in refusal(tmp_path, split="train")


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "validation.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"),
        ("data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"),
        ("train/a.jsonl", "train/b/c.jsonl", "valid/a.jsonl", "eval/a.jsonl"),
        ("my_train.csv", "my_dev.csv"),
        ("a/train-1.json", "b/train-2.json", "b/testing.json"),
        ("training/x.jsonl", "evaluation/y.jsonl"),
        ("train 1.jsonl", "0test0.jsonl"),
        ("rows.jsonl", "more.jsonl"),
        ("latest.jsonl", "contest.jsonl"),
        (".hidden/train.jsonl", "__MACOSX/test.jsonl", ".dev.jsonl", "val.jsonl"),
    ],
)
def test_splits_are_those_of_the_hubs_library(names: Sequence[str], tmp_path: Path) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    write(tmp_path, *names)
    patterns = get_data_patterns(str(tmp_path))
    theirs = {
        str(split): sorted(map(str, files))
        for split, files in DataFilesDict.from_patterns(patterns, base_path=str(tmp_path)).items()
    }
    ours = {
        split or "train": sorted(map(str, find(tmp_path, split).files))
        for split in list_splits(tmp_path)
    }
    assert ours == theirs


def find(folder: Path, split: str | None) -> Any:
    keys = {} if split is None else {"split": split}
    return find_source_files(DataSource(path=str(folder), **keys))


def test_without_a_choice_a_folder_with_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "test.jsonl", "dev.jsonl", "dev2.jsonl")
    message = refusal(tmp_path)
    for words in (
        "train (1 file), validation (2 files), test (1 file), and the recipe does not say",
        f"hint: write `split: train` next to `path: {tmp_path}`, or `split: validation`",
    ):
        assert words in message
    assert read(tmp_path, split="train") == ["train.jsonl"]
    for name in ("validation", "valid", "val", "dev"):
        assert read(tmp_path, split=name) == ["dev.jsonl", "dev2.jsonl"]
    assert "no split 'train[:10%]'" in refusal(tmp_path, split="train[:10%]")


def test_one_split_leaves_a_choice_only_where_it_is_another(tmp_path: Path) -> None:
    write(tmp_path / "a", "train-1.jsonl", "train-2.jsonl")
    assert read(tmp_path / "a") == read(tmp_path / "a", split="train")
    assert "holds train (2 files), and no split 'test'" in refusal(tmp_path / "a", split="test")
    write(tmp_path / "b", "test.jsonl")
    assert "hint: write `split: test`" in refusal(tmp_path / "b")


def test_files_whose_names_say_no_split_are_told_beside_others(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "extra.jsonl")
    message = refusal(tmp_path)
    assert "train (1 file), without a split (1 file: extra.jsonl)" in message
    found = find(tmp_path, "train")
    assert [file.name for file in found.files] == ["train.jsonl"]
    assert found.skipped == {"files whose names contain no split": ("extra.jsonl",)}


def test_a_folder_without_splits_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a/rows.csv.gz", "c.parquet", "README.md", ".git/x.json", "n.txt")
    write(tmp_path, "dataset_infos.json", "a/._rows.csv", "__MACOSX/b.jsonl")
    found = find(tmp_path, None)
    assert read(tmp_path) == ["a/rows.csv.gz", "b.jsonl", "c.parquet"]
    assert found.skipped == {
        "hidden files": (".git/x.json", "__MACOSX/b.jsonl", "a/._rows.csv"),
        "files that hold no rows": ("README.md", "dataset_infos.json", "n.txt"),
    }
    assert found.notes == ()
    (note,) = find(tmp_path, "train").notes
    assert note.startswith("`split: train` has no effect") and read(tmp_path, split="train")
    assert "has no files for `split: test`" in refusal(tmp_path, split="test")


def test_a_link_is_read_as_a_file_and_told_as_a_folder(tmp_path: Path) -> None:
    """A downloaded snapshot links each file; a link to a folder may lead back to where it is."""
    write(tmp_path / "blobs", "x", "rows.jsonl")
    write(tmp_path / "snapshot", "a.jsonl")
    (tmp_path / "snapshot" / "b.jsonl").symlink_to("../blobs/x")
    (tmp_path / "snapshot" / "more").symlink_to("../blobs")
    assert read(tmp_path / "snapshot") == ["a.jsonl", "b.jsonl"]
    assert find(tmp_path / "snapshot", None).skipped == {"links to folders": ("more",)}


def test_a_folder_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, "README.md", ".rows.jsonl")
    message = refusal(tmp_path)
    assert "holds no .jsonl, .json, .csv" in message
    assert "1 hidden file: .rows.jsonl" in message and "README.md" in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"split": "test"}, "`split: test` chooses among the files of a folder"),
        ({"config_name": "main"}, "`config_name: main` names a part of a data set on the hub"),
        ({"revision": "v1"}, "`revision: v1` is a commit of a data set on the hub"),
    ],
)
def test_keys_that_mean_nothing_for_a_file_are_refused(
    keys: Mapping[str, str], words: str, tmp_path: Path
) -> None:
    write(tmp_path, "rows.jsonl", "folder/rows.jsonl")
    message = refusal(tmp_path / "rows.jsonl", **keys)
    assert words in message and "\n\nhint: leave" in message
    if "revision" in keys:
        assert words in refusal(tmp_path / "folder", **keys)


def test_a_file_has_the_split_that_its_name_says(tmp_path: Path) -> None:
    write(tmp_path, "validation.jsonl", "rows.jsonl")
    for split in ("validation", "val"):
        assert find(tmp_path / "validation.jsonl", split).files
    assert "one file" in refusal(tmp_path / "validation.jsonl", split="test")
    for name in ("validation.jsonl", "rows.jsonl"):
        assert find(tmp_path / name, None).notes == ()
        (note,) = find(tmp_path / name, "train").notes
        assert f"{name} is one file: all of its rows are read" in note


def test_a_config_is_a_folder_where_no_readme_says_otherwise(tmp_path: Path) -> None:
    write(tmp_path, "main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl", ".git/x")
    assert read(tmp_path, config_name="main", split="test") == ["main/test.jsonl"]
    message = refusal(tmp_path, config_name="mian")
    assert "did you mean `main`?" in message and "its folders are main, socratic" in message
    assert "leads out of the folder" in refusal(tmp_path, config_name="../main")


README = """\
---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*]
- config_name: socratic
  data_dir: socratic
dataset_info:
  features: {a: {dtype: string}}
---
# A data set
configs: none
"""


def test_a_readme_says_which_files_a_config_has(tmp_path: Path) -> None:
    names = ("main/train-1.jsonl", "main/train-2.jsonl", "main/test-1.jsonl", "main/more.jsonl")
    write(tmp_path, *names, "socratic/train.jsonl")
    (tmp_path / "README.md").write_text(README)
    assert "write `config_name: main`; its parts are main, socratic" in refusal(tmp_path)
    assert "did you mean `main`?" in refusal(tmp_path, config_name="mian")
    assert read(tmp_path, config_name="main", split="train") == list(names[:2])
    found = find_source_files(DataSource(path=str(tmp_path), config_name="main", split="test"))
    assert [file.name for file in found.files] == ["test-1.jsonl"]
    assert found.read_for_choice == (tmp_path / "README.md",)
    skipped = found.skipped["files that match no split of the README"]
    assert skipped == ("main/more.jsonl", "socratic/train.jsonl")
    assert read(tmp_path, config_name="socratic") == ["socratic/train.jsonl"]
    (tmp_path / "README.md").write_text(README.replace("  data_dir", "  default: true\n  data_dir"))
    assert read(tmp_path) == ["socratic/train.jsonl"]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("configs: [", "its `configs` cannot be read"),
        ("configs:\n- data_files: x", "has no `config_name`"),
        ("configs:\n- {config_name: a, data_dir: ../x}", "leads out of the folder"),
        ("configs:\n- {config_name: a, data_files: /etc/*}", "leads out of the folder"),
        ("configs:\n- {config_name: a, data_files: '*.txt'}", "x.txt: cannot tell the format"),
        ("configs:\n- {config_name: a, data_files: none.csv}", "holds no .jsonl"),
        ("configs: 3", "its `configs` are not a list"),
        ("configs:\n- {config_name: a, data_files: .}", "pattern '.' finds nothing"),
        ("configs:\n- {config_name: a, data_files: '**a/x'}", "pattern '**a/x' finds nothing"),
        (f"configs: {'[' * 50_000}", "its `configs` cannot be read"),
    ],
)
def test_a_readme_that_cannot_be_followed_is_refused(
    block: str, words: str, tmp_path: Path
) -> None:
    write(tmp_path, "rows.jsonl", "x.txt")
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\n")
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "# A title", "---\nlicense: mit\n---\n", "---\nconfigs:\n"])
def test_other_readmes_change_nothing(text: str, tmp_path: Path) -> None:
    write(tmp_path, "rows.jsonl")
    (tmp_path / "README.md").write_text(text)
    assert read(tmp_path) == ["rows.jsonl"]
