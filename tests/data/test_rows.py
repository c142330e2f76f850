"""Which rows train, select and report: disjoint, nested, independent of file order, format, model
and loss mode.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from runner.data.chat_template import MaskError
from runner.data.draw import draw_splits
from runner.data.rows import build_samples, describe_samples
from runner.data.tokenizer import load_tokenizer
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.schema import DataSection, ModelSection

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}."}
    for a in range(8)
    for b in range(10)
]


def section(path: Path, **changes: Any) -> DataSection:
    """80 arithmetic rows: 30 to train on, 10 to select, 15 to report."""
    content: dict[str, Any] = {
        "train": {"path": str(path)},
        "task": {"name": "prompt_completion"},
        "num_train_samples": 30,
        "num_validation_samples": 10,
        "num_test_samples": 15,
        "seed": 7,
        "max_length": 128,
    }
    return DataSection.model_validate_json(json.dumps(content | changes))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return load_tokenizer(ModelSection(path=str(tiny_model("gemma")), dtype="float32"))


def ids(data: DataSection, split: str = "train") -> list[str]:
    return [row.row_id for row in getattr(draw_splits(data), split)]


def test_splits_are_disjoint_and_smaller_sets_are_prefixes(rows_path: Path) -> None:
    large, small = section(rows_path), section(rows_path, num_train_samples=12)
    splits = [set(ids(large, split)) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [30, 10, 15]
    assert not set.union(splits[0] & splits[1], splits[0] & splits[2], splits[1] & splits[2])
    assert ids(small) == ids(large)[:12]
    assert ids(small, "test") == ids(large, "test")


def test_the_order_of_the_file_does_not_matter_but_the_seed_does(
    rows_path: Path, tmp_path: Path
) -> None:
    shuffled = ROWS[:]
    random.Random(0).shuffle(shuffled)
    other_path = write_rows(tmp_path / "shuffled.jsonl", shuffled)
    assert ids(section(other_path)) == ids(section(rows_path))
    assert ids(section(rows_path, seed=8)) != ids(section(rows_path))


def test_rows_of_a_seed_are_the_same_for_ever(rows_path: Path) -> None:
    """Another order would change what every recorded recipe means; drawn by the first release."""
    splits = draw_splits(section(rows_path))
    drawn = [
        [row.row_id for row in rows] for rows in (splits.train, splits.validation, splits.test)
    ]
    assert drawn[0][:2] == ["6302b6994a50a2be", "31a85aa04b3ca91d"]
    assert hash_json(drawn) == "332b46154143cc4b7353a4c2e3f59cf38cb28cc807175cb9914e667658c7e500"


def test_rows_of_one_group_never_stand_in_two_splits(tmp_path: Path) -> None:
    def tree(name: str) -> list[dict[str, Any]]:
        root = {"message_id": name, "parent_id": None, "text": name, "role": "prompter"}
        reply = {"parent_id": name, "role": "assistant"}
        replies = [
            {**reply, "message_id": f"{name}-{n}", "text": f"{name} says {n}"} for n in range(5)
        ]
        return [
            {"lang": "en", "review_result": True, "message_tree_id": name, **row}
            for row in (root, *replies)
        ]

    path = write_rows(
        tmp_path / "rows.jsonl", [row for number in range(12) for row in tree(f"t{number}")]
    )
    task = {"name": "oasst1", "paths": "all"}
    counts = {"num_test_samples": 7, "num_validation_samples": 6, "num_train_samples": None}
    splits = draw_splits(section(path, task=task, **counts))
    groups = [
        {row.group for row in rows} for rows in (splits.test, splits.validation, splits.train)
    ]
    assert [len(rows) for rows in (splits.test, splits.validation, splits.train)] == [7, 6, 40]
    assert [len(one) for one in groups] == [2, 2, 8] and len(set.union(*groups)) == 12
    assert splits.left_out.num_left_out_by_group == 3 + 4
    small = section(path, task=task, **counts | {"num_train_samples": 11})
    assert ids(small) == [row.row_id for row in splits.train][:11]

    # A training file that repeats the tree of a test row under other words.
    other = {"path": str(write_rows(tmp_path / "test.jsonl", tree("t0")))}
    apart = draw_splits(section(path, task=task, **counts | {"num_test_samples": 1}, test=other))
    assert apart.left_out.num_duplicates == 5
    assert "t0" not in {row.group for row in (*apart.train, *apart.validation)}


def test_what_a_task_leaves_out_is_counted_and_said(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(10):
        shared = {"lang": "de" if number == 9 else "en", "review_result": True}
        rows.append(
            {"message_id": f"p{number}", "text": f"hi {number}", "role": "prompter", **shared}
        )
        reply = {
            "message_id": f"a{number}",
            "parent_id": f"p{number}",
            "text": "yes",
            "role": "assistant",
        }
        rows.append({**reply, **shared})
    counts = {"num_test_samples": 3, "num_validation_samples": 3, "num_train_samples": 3}
    data = section(write_rows(tmp_path / "rows.jsonl", rows), task={"name": "oasst1"}, **counts)
    described = describe_samples(build_samples(data, tokenizer), "completion")
    expected = {"messages in another language": 1, "messages below one that is left out": 1}
    assert described["left_out_by_task"] == {"train": expected}
    assert (described["num_duplicates"], described["num_left_out_by_group"]) == (0, 0)
    with pytest.raises(
        DataError, match=r"3 different rows are left[\s\S]*left out: train: 1 messages in another"
    ):
        draw_splits(data.model_copy(update={"num_train_samples": 4}))


def test_every_file_format_gives_the_same_rows(rows_path: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS[:40])
    write_rows(folder / "b.jsonl", ROWS[40:])
    expected = ids(section(rows_path))
    for name in ("rows.json", "rows.parquet", "rows.csv", "folder"):
        assert ids(section(tmp_path / name)) == expected, name


def test_duplicates_are_counted_and_never_straddle_splits(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS + ROWS[:9])
    test_path = write_rows(tmp_path / "test.jsonl", ROWS[:5])
    splits = draw_splits(section(path, test={"path": str(test_path)}, num_test_samples=None))
    assert splits.left_out.num_duplicates == 9 + 5
    assert len(splits.test) == 5
    assert not {row.row_id for row in splits.test} & {
        row.row_id for row in (*splits.train, *splits.validation)
    }


def test_two_arms_have_equal_tokens_and_other_masks(rows_path: Path, tokenizer: Any) -> None:
    samples = build_samples(section(rows_path), tokenizer)
    full, completion = (
        describe_samples(samples, loss)["splits"]["train"] for loss in ("full", "completion")
    )
    assert full["input_ids_hash"] == completion["input_ids_hash"]
    assert full["ids_hash"] == completion["ids_hash"]
    assert full["mask_hash"] != completion["mask_hash"]
    assert full["num_labels"] == full["num_tokens"] > completion["num_labels"] > 0


def test_a_row_that_is_too_long_is_refused_cut_or_dropped(tmp_path: Path, tokenizer: Any) -> None:
    long_prompt = {
        "prompt": "Please tell me this: " * 30 + "what is 1 plus 1?",
        "completion": "It is 2.",
    }
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:20], long_prompt])
    counts = {"num_train_samples": None, "num_validation_samples": 1, "num_test_samples": 1}
    test = {"path": str(write_rows(tmp_path / "test.jsonl", ROWS[30:40]))}
    validation = {"path": str(write_rows(tmp_path / "validation.jsonl", ROWS[40:50]))}
    base = {**counts, "test": test, "validation": validation, "max_length": 64}

    with pytest.raises(
        DataError, match=r"1 rows of the train split .*max_length: 64[\s\S]*line 21: \d+ tokens"
    ):
        build_samples(section(path, **base), tokenizer)

    dropped = build_samples(section(path, **base, truncation="drop"), tokenizer).train
    assert (len(dropped.rows), len(dropped.dropped)) == (20, 1)

    cut = build_samples(section(path, **base, truncation="prompt_left"), tokenizer).train
    assert (len(cut.rows), len(cut.dropped)) == (21, 0)
    (row,) = [row for row in cut.rows if row.is_truncated]
    assert len(row.input_ids) == 64
    assert row.input_ids[0] == tokenizer.bos_token_id
    (span,) = row.spans
    assert tokenizer.decode(row.input_ids[span.start : span.end]) == "It is 2.<end_of_turn>"


def test_a_completion_that_alone_is_too_long_is_not_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [*ROWS[:60], {"prompt": "hi", "completion": "It is 2. " * 40}]
    )
    data = section(path, num_train_samples=None, max_length=64, truncation="prompt_left", seed=3)
    with pytest.raises(DataError, match="their last completion alone does not fit"):
        build_samples(data, tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"line 2: is not JSON"),
        ("\n", "0 different rows are left for the test split, 15 were asked for"),
        ('{"prompt": "a", "completion": "b"}\n', "1 different rows are left for the test split"),
    ],
)
def test_a_damaged_or_short_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        draw_splits(section(path))


def test_a_missing_file_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        draw_splits(section(tmp_path / "none.jsonl"))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match="cannot tell the format"):
        draw_splits(section(tmp_path / "rows.txt"))


def test_an_error_of_the_mask_names_the_row(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"messages": [{"role": "system", "content": str(n)}, {"role": "assistant", "content": "a"}]}
        for n in range(80)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MaskError, match=r"rows\.jsonl line \d+"):
        build_samples(section(path, task={"name": "conversations"}), tokenizer)


def test_a_template_that_prints_the_date_is_refused(rows_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="today's date"):
        build_samples(section(rows_path), tokenizer)


def test_bytes_are_those_of_the_completions(rows_path: Path, tokenizer: Any) -> None:
    samples = build_samples(section(rows_path), tokenizer)
    by_id = {raw.row_id: raw for raw in draw_splits(section(rows_path)).test}
    for row in samples.test.rows:
        assert row.num_bytes == len(by_id[row.row_id].messages[1]["content"].encode())
