"""The tokens, labels and cuts of each row; only the labels depend on the loss mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.data.chat_template import MaskError
from runner.data.draw import draw_splits
from runner.data.rows import build_samples, describe_samples
from runner.data.tokenizer import load_tokenizer
from runner.errors import DataError
from runner.recipe.schema import ModelSection
from tests.support.row_files import ROWS, section, write_rows


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return load_tokenizer(ModelSection(path=str(tiny_model("gemma")), dtype="float32"))


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
        DataError, match=r"3 different rows are left[\s\S]*left out: train: 1 message in another"
    ):
        draw_splits(data.model_copy(update={"num_train_samples": 4}))


def test_each_row_is_a_sign_of_life(rows_path: Path, tokenizer: Any) -> None:
    signs: list[None] = []
    samples = build_samples(section(rows_path), tokenizer, sign_of_life=lambda: signs.append(None))
    splits = (samples.train, samples.validation, samples.test)
    assert len(signs) == sum(len(split.rows) for split in splits)


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
        DataError, match=r"1 row of the train split .*max_length: 64[\s\S]*line 21: \d+ tokens"
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


def conversation(number: int, num_rounds: int = 2, **of_answers: list[Any]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn in range(num_rounds):
        answer = {"role": "assistant", "content": f"Answer {number}, {turn}."}
        answer |= {key: values[turn] for key, values in of_answers.items()}
        messages += [{"role": "user", "content": f"Question {number}, {turn}?"}, answer]
    return {"messages": messages}


def write_conversations(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    counts = {"num_train_samples": 4, "num_validation_samples": 1, "num_test_samples": 1}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return section(path, task={"name": "conversations"}, **counts | changes)


def trained_texts(row: Any, tokenizer: Any, loss: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels(loss) if label >= 0]))


def test_turns_say_what_a_row_is(tmp_path: Path, tokenizer: Any) -> None:
    rows = [conversation(n, 3) for n in range(6)]
    by_turns = {
        turns: build_samples(write_conversations(tmp_path, rows, turns=turns), tokenizer).train
        for turns in ("all", "last", "split")
    }
    assert [len(split.rows) for split in by_turns.values()] == [4, 4, 12]
    whole, last = by_turns["all"].rows[0], by_turns["last"].rows[0]
    first, second, third = by_turns["split"].rows[:3]
    assert whole.input_ids == last.input_ids == third.input_ids
    assert (len(whole.spans), last.spans) == (3, whole.spans[-1:])
    assert (first.row_id, third.row_id) == (f"{whole.row_id}.1", f"{whole.row_id}.5")
    assert {row.group for row in (first, second, third)} == {whole.group}
    number = trained_texts(last, tokenizer, "completion").split()[1]
    for turn, row in enumerate((first, second, third)):
        expected = f"Answer {number} {turn}.<end_of_turn>"
        assert trained_texts(row, tokenizer, "completion") == expected
        assert len(row.input_ids) == row.spans[0].end + 1, "a newline ends the text"
    assert whole.num_completion_tokens == sum(
        row.num_completion_tokens for row in (first, second, third)
    )


def test_a_turn_of_weight_0_has_no_label_and_no_score(tmp_path: Path, tokenizer: Any) -> None:
    rows = [conversation(n, weight=[0, 1]) for n in range(6)]
    samples = build_samples(write_conversations(tmp_path, rows), tokenizer)
    row = samples.train.rows[0]
    assert len(row.spans) == len(row.untrained) == 1
    end = "<end_of_turn>"
    for loss in ("full", "completion", "last_completion"):
        text = trained_texts(row, tokenizer, loss)
        assert ", 0." not in text and text.count(", 1.") == 1, loss
        assert text.count(end) == (3 if loss == "full" else 1)
    split = build_samples(write_conversations(tmp_path, rows, turns="split"), tokenizer).train
    assert [row.row_id[-2:] for row in split.rows] == [".3"] * 4


def test_the_last_completion_trains_less_and_scores_the_same(
    tmp_path: Path, tokenizer: Any
) -> None:
    samples = build_samples(
        write_conversations(tmp_path, [conversation(n) for n in range(6)]), tokenizer
    )
    row = samples.train.rows[0]
    number = trained_texts(row, tokenizer, "completion").split()[1]
    assert trained_texts(row, tokenizer, "last_completion") == f"Answer {number} 1.<end_of_turn>"
    one, other = (
        describe_samples(samples, loss)["splits"]["train"]
        for loss in ("completion", "last_completion")
    )
    assert one["num_labels"] == 2 * other["num_labels"]
    same = ("ids_hash", "input_ids_hash", "num_completion_tokens", "num_bytes")
    assert all(one[key] == other[key] for key in same)


def test_turns_left_cuts_the_first_rounds_and_keeps_the_system_text(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    llama = load_tokenizer(ModelSection(path=str(tiny_model("llama")), dtype="float32"))
    rows = [conversation(n, 4) for n in range(6)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    data = write_conversations(tmp_path, rows, max_length=512)
    whole = build_samples(data, llama).train.rows[0]
    data = data.model_copy(
        update={"max_length": len(whole.input_ids) - 1, "truncation": "turns_left"}
    )
    cut = build_samples(data, llama).train.rows[0]
    assert (whole.is_truncated, cut.is_truncated) == (False, True)
    text = llama.decode(cut.input_ids)
    assert "Be brief." in text and ", 0" not in text and text.count("Question") == 3
    assert len(cut.spans) == 3 and cut.num_bytes == sum(
        len(llama.decode(cut.input_ids[span.start : span.end]).encode()) for span in cut.contents
    )
    with pytest.raises(DataError, match="their last round alone does not fit"):
        build_samples(data.model_copy(update={"max_length": 12}), llama)


def test_rows_of_other_columns_may_not_become_the_same_tokens_in_two_splits(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"prompt": f"Question {n // 2}?", "completion": "Yes.", "part": n} for n in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    counts = {"num_train_samples": None, "num_validation_samples": 3, "num_test_samples": 3}
    data = section(path, group_column="part", **counts)
    with pytest.raises(
        DataError, match=r"become the same tokens[\s\S]*rows.jsonl line \d+ \(train\) and"
    ):
        build_samples(data, tokenizer)


def test_hashes_and_groups_of_a_split(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**row, "document": n // 4} for n, row in enumerate(ROWS)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one, other = (
        describe_samples(
            build_samples(
                section(path, group_column="document", seed=seed, num_train_samples=None),
                tokenizer,
            ),
            "completion",
        )["splits"]["train"]
        for seed in (7, 8)
    )
    assert one["ids"] != other["ids"] and one["ids_hash"] == other["ids_hash"]
    assert one["input_ids_hash"] != other["input_ids_hash"], "which depends on the order"
    assert len(one["groups"]) == one["num_rows"] and one["num_groups"] == len(set(one["groups"]))


def test_rows_that_only_a_cut_makes_equal_may_stand_in_two_splits(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [
        {"prompt": f"Number {n}. " + "Please tell me this: " * 30, "completion": "Yes."}
        for n in range(12)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    counts = {"num_train_samples": None, "num_validation_samples": 3, "num_test_samples": 3}
    data = section(path, max_length=32, truncation="prompt_left", **counts)
    samples = build_samples(data, tokenizer)
    assert len({row.input_ids for row in (*samples.train.rows, *samples.test.rows)}) == 1
