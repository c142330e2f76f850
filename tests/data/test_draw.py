"""The rows that train, select and report: disjoint, nested, independent of file order, format,
prompt and training seed.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from runner.data.draw import draw_splits
from runner.data.tasks.python import PythonTask
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.data_section import DataSection
from tests.support.row_files import ROWS, section, write_rows


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


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
    """Another order would change what recorded recipes mean; drawn by version 2 of the rules."""
    splits = draw_splits(section(rows_path))
    drawn = [
        [row.row_id for row in rows] for rows in (splits.train, splits.validation, splits.test)
    ]
    assert drawn[0][:2] == ["9f51fd870fc1daaf", "528c4480aa017d2e"]
    assert hash_json(drawn) == "ff556f5942c5bba9d5d955f186cd540521377f8069d939a3ec9e96ad5282c1a0"


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"line 2: is not JSON"),
        ("\n", "0 different rows are left for the test split, which needs 15"),
        ('{"prompt": "a", "completion": "b"}\n', "1 different row is left for the test split"),
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


def drawn_ids(data: DataSection) -> dict[str, list[str]]:
    return {split: ids(data, split) for split in ("train", "validation", "test")}


@pytest.mark.parametrize("has_own_files", [False, True])
def test_the_seed_moves_training_rows_only(tmp_path: Path, has_own_files: bool) -> None:
    changes: dict[str, Any] = {}
    if has_own_files:
        for split, rows in (("validation", ROWS[40:60]), ("test", ROWS[60:])):
            changes[split] = {"path": str(write_rows(tmp_path / f"{split}.jsonl", rows))}
        changes["num_train_samples"] = 20
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:40] if has_own_files else ROWS)
    one, other = (drawn_ids(section(path, seed=seed, **changes)) for seed in (7, 8))
    assert one["train"] != other["train"]
    assert (one["validation"], one["test"]) == (other["validation"], other["test"])


def test_prompts_draw_the_same_rows(tmp_path: Path) -> None:
    rows = [{"document": f"Text {n}.", "summary": f"Sum {n}."} for n in range(80)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tasks = (
        {"name": "summarization", "prompt": "Summarize: {document}"},
        {"name": "summarization", "prompt": "{document}\n\nIn short?"},
    )
    one, other = (drawn_ids(section(path, task=task)) for task in tasks)
    assert one == other


def test_a_row_is_known_by_its_columns_and_not_by_blanks_nulls_and_names(tmp_path: Path) -> None:
    twins = [
        {"prompt": "Same question? ", "completion": "Same answer."},
        {"prompt": "Same question?\r\n", "completion": "Same answer.\n", "id": 7},
        {"completion": "Same answer.", "prompt": "Same question?", "source": "b", "name": None},
    ]
    splits = draw_splits(section(write_rows(tmp_path / "rows.jsonl", [*ROWS, *twins, *twins[:1]])))
    assert splits.left_out.num_duplicates == 3


@pytest.mark.parametrize(
    "task",
    [
        {"prompt_column": "source", "completion_column": "label"},
        {"prompt": "What is {name}?", "completion_column": "label"},
    ],
)
def test_a_column_that_is_read_tells_rows_apart_whatever_its_name(
    tmp_path: Path, task: Mapping[str, str]
) -> None:
    name = "name" if "prompt" in task else "source"
    rows = [{name: f"Text {n}", "label": ("yes", "no")[n % 2], "id": n // 30} for n in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], "id": 99}])
    splits = draw_splits(section(path, task={"name": "prompt_completion", **task}))
    assert splits.left_out.num_duplicates == 1
    assert len({row.key for row in (*splits.train, *splits.validation, *splits.test)}) == 55


def test_a_function_that_reads_a_name_is_refused_where_rows_differ_in_it_alone(
    tmp_path: Path,
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"name": f"n{n}", "a": "b"} for n in range(3)])
    turns = "[{'role': 'user', 'content': row['name']}, {'role': 'assistant', 'content': 'b'}]"
    task = PythonTask(name="python", function="rows.py:build")
    task = task.with_sources({"rows.py": f"def build(row):\n    return {turns}\n"})
    data = section(path).model_copy(update={"task": task})
    with pytest.raises(DataError, match=r"line 1 and .*line 2 differ only in .*`name`"):
        draw_splits(data)


def test_ignored_columns_and_keys_do_not_tell_rows_apart_and_are_counted(tmp_path: Path) -> None:
    rows = []
    for n in range(20):
        messages = [
            {"role": "user", "content": f"Question {n // 2}?", "at": f"{n} o'clock"},
            {"role": "assistant", "content": "Yes."},
        ]
        rows.append({"messages": messages, "worker": f"w{n}", "note": None if n % 4 else "x"})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    counts = {"num_train_samples": 8, "num_validation_samples": 1, "num_test_samples": 1}
    data = section(
        path, task={"name": "conversations"}, ignore=["worker", "messages.at", "note"], **counts
    )
    left_out = draw_splits(data).left_out
    assert left_out.num_duplicates == 10
    assert left_out.columns == {"train": {"messages.at": 20, "note": 5, "worker": 20}}
    misspelt = data.model_copy(update={"ignore": (*data.ignore, "messages.att")})
    assert "`messages.att` in `data.ignore`: no row has it" in str(
        draw_splits(misspelt).left_out.describe()
    )


def test_a_group_column_keeps_groups_in_one_split(tmp_path: Path) -> None:
    rows = [{**row, "document": n // 4} for n, row in enumerate(ROWS)]
    data = section(write_rows(tmp_path / "rows.jsonl", rows), group_column="document")
    splits = draw_splits(data)
    groups = [{row.group for row in getattr(splits, name)} for name in drawn_ids(data)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all(group.startswith("document: ") for group in groups[0])
    with pytest.raises(DataError, match=r"rows.jsonl line 1: `data.group_column: chapter`"):
        draw_splits(data.model_copy(update={"group_column": "chapter"}))


def test_a_group_column_that_is_ignored_is_refused(rows_path: Path) -> None:
    with pytest.raises(ValueError, match="`ignore` leaves out the column `document`"):
        section(rows_path, group_column="document", ignore=["document"])


def mixed(tmp_path: Path, *shares: Mapping[str, Any], **changes: Any) -> DataSection:
    """Three sources of 40, 20 and 20 rows."""
    sources = []
    for number, (rows, share) in enumerate(
        zip((ROWS[:40], ROWS[40:60], ROWS[60:]), shares, strict=False)
    ):
        path = write_rows(tmp_path / f"source{number}.jsonl", rows)
        sources.append({"path": str(path), **share})
    counts = {"num_validation_samples": 4, "num_test_samples": 4, "num_train_samples": None}
    return section(tmp_path, train=sources, **counts | changes)


def count_by_source(data: DataSection, rows: Sequence[Any]) -> list[int]:
    paths = [source.path for source in data.train_sources]
    return [sum(row.where.startswith(path) for row in rows) for path in paths]


def test_several_sources_keep_their_shares_in_every_prefix_and_split(tmp_path: Path) -> None:
    data = mixed(tmp_path, {"weight": 2}, {"weight": 1}, {"weight": 1}, num_train_samples=40)
    splits = draw_splits(data)
    assert count_by_source(data, splits.test) == [2, 1, 1]
    assert count_by_source(data, splits.train) == [20, 10, 10]
    for count in range(1, 40):
        for found, share in zip(
            count_by_source(data, splits.train[:count]), (0.5, 0.25, 0.25), strict=True
        ):
            assert abs(found - share * count) < 1
    small = draw_splits(data.model_copy(update={"num_train_samples": 17}))
    assert small.train == splits.train[:17]
    moved = draw_splits(data.model_copy(update={"seed": 8}))
    assert moved.train != splits.train and moved.test == splits.test


def test_counts_of_sources_are_kept_and_none_is_topped_up(tmp_path: Path) -> None:
    counts = ({"num_samples": 20}, {"num_samples": 5})
    data = mixed(tmp_path, *counts)
    assert count_by_source(data, draw_splits(data).train) == [20, 5]
    with pytest.raises(DataError, match=r"the train split: sources[\s\S]*source1.jsonl has \d+ r"):
        draw_splits(mixed(tmp_path, {"num_samples": 5}, {"num_samples": 30}))


def test_a_source_of_several_is_drawn_as_it_would_be_alone(tmp_path: Path) -> None:
    """Its share decides how many of its rows are used, and neither it nor the others which."""
    held_out = {
        split: {"path": str(write_rows(tmp_path / f"{split}.jsonl", rows))}
        for split, rows in (("test", ROWS[:9]), ("validation", ROWS[45:50]))
    }
    counts = {"num_test_samples": None, "num_validation_samples": None, "num_train_samples": 20}
    data = mixed(tmp_path, {"weight": 1}, {"weight": 1}, **held_out, **counts)
    used = [row.row_id for row in draw_splits(data).train if "source1" in row.where]
    alone = section(tmp_path / "source1.jsonl", **held_out, **counts | {"num_train_samples": 10})
    assert used == ids(alone)


def test_rows_that_differ_in_blanks_are_one() -> None:
    path = Path(__file__).parent / "cases" / "same_tokens.jsonl"
    counts = {"num_train_samples": 2, "num_validation_samples": 2, "num_test_samples": 2}
    splits = draw_splits(section(path, task={"name": "conversations"}, **counts))
    assert splits.left_out.num_duplicates == 3
    rows = (*splits.train, *splits.validation, *splits.test)
    questions = [row.messages[0]["content"].strip() for row in rows]
    assert len(set(questions)) == 6 and questions.count("Same question?") == 1


def test_a_group_column_may_not_tear_a_paragraph_apart(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"q{n}",
            "title": f"t{n // 6}",
            "context": f"Paragraph {n // 3}.",
            "question": f"Question {n}?",
            "answers": {"text": [f"Paragraph {n // 3}"], "answer_start": [0]},
        }
        for n in range(60)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    task = {"name": "squad_v2", "prompt": "{context} {question}", "no_answer_text": "none"}
    drawn = draw_splits(section(path, task=task, group_column="title", num_train_samples=10))
    assert len({row.group for row in drawn.train}) < 10
    with pytest.raises(DataError, match="puts it into another group than a row that the task"):
        draw_splits(section(path, task=task, group_column="id", num_train_samples=10))


def test_a_row_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    calls = '[{"name": "f", "arguments": {"a": ' + "[" * 700 + "]" * 700 + "}}]"
    message = '{"role": "assistant", "content": "a", "tool_calls": ' + calls + "}"
    (tmp_path / "rows.jsonl").write_text('{"messages": [' + message + "]}\n")
    with pytest.raises(DataError, match="nested too deeply"):
        draw_splits(section(tmp_path / "rows.jsonl", task={"name": "conversations"}))
