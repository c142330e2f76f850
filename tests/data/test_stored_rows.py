"""Rows in files of columns are equal to the rows that were written, for every reader."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Final, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.draw import LeftOut
from runner.data.masking import IGNORE_INDEX, build_labels, list_trained
from runner.data.rows import Row, Samples, Split, describe_samples
from runner.data.stored_rows import StoredRows, StoredSplit, write_shard
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.schema import Loss
from tests.support.token_rows import make_row

LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)
ROWS: Final = (
    make_row("a", range(3, 20), (2, 5), (9, 17), untrained=[(0, 1), (6, 8)], num_bytes=7),
    make_row("b", [5, 6], (1, 2), references=("yes", "half a character \ud800", "")),
    make_row("c", [9] * 40, (0, 3), untrained=[(3, 9)]),
)


def store(folder: Path, *shards: tuple[Row, ...], with_columns: bool = False) -> StoredRows:
    paths = [folder / f"{number}.arrow" for number in range(len(shards))]
    for path, rows in zip(paths, shards, strict=True):
        write_shard(path, rows, with_columns=with_columns)
    return StoredRows(paths)


def test_stored_rows_are_those_that_were_written(tmp_path: Path) -> None:
    stored = store(tmp_path, ROWS[:2], (), ROWS[2:])
    assert len(stored) == 3 and tuple(stored) == ROWS
    assert stored[-1] == ROWS[2] and stored[1:] == ROWS[1:] and stored[:0] == ()
    assert [row.where for row in stored] == [row.where for row in ROWS]
    assert stored.list_lengths() == [17, 2, 40]
    assert stored.list_texts("row_id") == ["a", "b", "c"]
    assert all(isinstance(token, int) for token in stored[0].input_ids)
    with pytest.raises(IndexError):
        stored[3]


def test_rows_of_many_batches_keep_their_order(tmp_path: Path) -> None:
    rows = tuple(make_row(str(n), [n, n + 1, n + 2][: 2 + n % 2], (1, 2)) for n in range(2500))
    assert tuple(store(tmp_path, rows[:1300], rows[1300:])) == rows


def test_columns_are_what_a_metric_would_get(tmp_path: Path) -> None:
    columns = {"day": datetime.date(2026, 1, 2), "number": 7, "b": None, "a": ["\ud800"]}
    row = Row("a", "a", (1, 2), (), (), 0, False, where="f.jsonl line 1", columns=columns)
    (stored,) = store(tmp_path, (row,), with_columns=True)
    assert stored.columns == {**columns, "day": "2026-01-02"}
    assert list(stored.columns) == list(columns) and stored.where == "f.jsonl line 1"
    assert store(tmp_path, (row,))[0].columns == {}
    bad = Row("a", "a", (1,), (), (), 0, False, where="f.jsonl line 1", columns={"x": b"1"})
    with pytest.raises(DataError, match=r"f\.jsonl line 1: holds bytes"):
        store(tmp_path, (bad,), with_columns=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_padding", [0, 2])
def test_a_data_set_of_stored_rows_has_their_labels(
    tmp_path: Path, loss: Loss, num_padding: int
) -> None:
    dataset = store(tmp_path, ROWS[:1], ROWS[1:]).build_dataset(loss, [[7, 7]] * num_padding)
    expected: list[dict[str, Any]] = [
        {"input_ids": list(row.input_ids), "labels": row.labels(loss)} for row in ROWS
    ]
    expected += [{"input_ids": [7, 7], "labels": [IGNORE_INDEX] * 2}] * num_padding
    assert list(dataset) == expected and dataset[1] == expected[1]
    assert dataset.column_names == ["input_ids", "labels"]  # TRL's trainer drops any other
    assert dataset.remove_columns([])[:2]["labels"] == [row.labels(loss) for row in ROWS[:2]]


def test_rows_outlive_their_files(tmp_path: Path) -> None:
    """An entry may be removed while the model loads, before the training process builds the data
    set.
    """
    stored = store(tmp_path, ROWS[:1], ROWS[1:])
    for path in stored.paths:
        path.unlink()
    dataset = stored.build_dataset("completion", [[7, 7]])
    assert [row["labels"] for row in dataset][:3] == [row.labels("completion") for row in ROWS]
    assert tuple(stored) == ROWS and len(dataset) == 4


def describe_plainly(samples: Samples, loss: Loss) -> dict[str, Any]:
    """Three of the hashes and counts as they are defined."""
    labels = [row.labels(loss) for row in samples.train.rows]
    return {
        "input_ids_hash": hash_json([row.input_ids for row in samples.train.rows]),
        "mask_hash": hash_json([[label >= 0 for label in one] for one in labels]),
        "num_labels": sum(label >= 0 for one in labels for label in one),
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_samples_are_described_alike_stored_or_not(tmp_path: Path, loss: Loss) -> None:
    plain = Split(ROWS, ("dropped",))
    described = plain.describe(loss)
    facts = {key: one for key, one in described.items() if key not in StoredSplit.LISTS}
    stored = StoredSplit(store(tmp_path, ROWS), ("dropped",), {loss: facts})
    assert stored.describe(loss) == described
    assert stored.list_ids() == plain.list_ids() == described["ids"]
    assert described["num_dropped"] == 1 and described["dropped"] == ["dropped"]
    samples = Samples(plain, plain, plain, LeftOut())
    found = describe_samples(samples, loss)["splits"]["train"]
    expected = describe_plainly(samples, loss)
    assert {key: found[key] for key in expected} == expected


@st.composite
def places(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """Tokens of a row, its completions, and its turns of weight 0: apart and in order."""
    num_tokens = draw(st.integers(1, 12))
    bounds = sorted(draw(st.sets(st.integers(0, num_tokens), max_size=8)))
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    is_trained = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    chosen = list(zip(pairs, is_trained, strict=True))
    return num_tokens, [p for p, yes in chosen if yes], [p for p, yes in chosen if not yes]


@given(places(), st.sampled_from(LOSSES))
def test_what_is_trained_is_what_has_a_label(
    row: tuple[int, list[tuple[int, int]], list[tuple[int, int]]], loss: Loss
) -> None:
    num_tokens, spans, untrained = row
    made = make_row("a", range(num_tokens), *spans, untrained=untrained)
    labels = build_labels(made.input_ids, made.spans, loss, made.untrained)
    trained = list_trained(num_tokens, made.spans, loss, made.untrained)
    assert [at for start, end in trained for at in range(start, end)] == [
        at for at, label in enumerate(labels) if label != IGNORE_INDEX
    ]
    # The first token has no prediction, so that its label enters no loss.
    assert made.count_labels(loss) == sum(label != IGNORE_INDEX for label in labels[1:])
    split = Split((made,), ())
    assert (
        split.describe(loss)["mask_hash"]
        == describe_plainly(Samples(split, split, split, LeftOut()), loss)["mask_hash"]
    )
