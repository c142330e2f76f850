"""Questions with and without answers; exact match and F1 by hand, and against another
implementation.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from runner.data.tasks.squad_v2 import SquadV2Task, normalize_squad
from runner.errors import DataError
from tests.support.tasks import Rows, build, judge_all

SQUAD = SquadV2Task(
    name="squad_v2", prompt="{context}\n\n{question}", no_answer_text="unanswerable"
)


def squad_row(answers: Any) -> dict[str, Any]:
    return {
        "id": "5",
        "title": "T",
        "context": "In {question} 1990.",
        "question": "When, {context}?",
        "answers": answers,
    }


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["1990", "in 1990", "1990"], "answer_start": [3, 0, 3]},
        [{"text": "1990", "answer_start": 3}, {"text": "in 1990", "answer_start": 0}],
    ],
)
def test_squad_trains_on_the_first_answer_and_keeps_all(answers: Any) -> None:
    example = build(squad_row(answers), SQUAD)
    assert example.messages[0]["content"] == "In {question} 1990.\n\nWhen, {context}?"
    assert (example.messages[1]["content"], example.references) == ("1990", ("1990", "in 1990"))


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, []])
def test_a_squad_question_without_answers_is_unanswerable(answers: Any) -> None:
    example = build(squad_row(answers), SQUAD)
    assert (example.messages[1]["content"], example.references) == ("unanswerable", ())


@pytest.mark.parametrize(
    "answers",
    [
        None,
        "1990",
        ["1990"],
        {"text": "1990"},
        {"answer_start": [1]},
        {"text": [None]},
        {"text": [" "]},
    ],
)
def test_answers_of_another_shape_are_refused_by_row(answers: Any) -> None:
    with pytest.raises(DataError, match=r"^dev\.parquet row 9: column `answers`: expected"):
        build(squad_row(answers), SQUAD, "dev.parquet row 9")


def test_squad_by_hand() -> None:
    rows: Rows = [
        # articles, case and punctuation do not count
        ("The Norman dukes!", ("Norman dukes", "dukes")),
        # 2 of 3 and 2 of 2: f1 4/5
        ("in the 10th century", ("10th and 11th centuries", "10th century")),
        ("Unanswerable.", ("France",)),
        ("", ("France",)),
        ("unanswerable", ()),
        (" ", ()),
        ("France", ()),
        ("unanswerable question", ()),
    ]
    judgements, metrics = judge_all(SQUAD, rows)
    assert [one.scores["exact_match"] for one in judgements] == [1, 0, 0, 0, 1, 1, 0, 0]
    assert [one.scores["f1"] for one in judgements] == [1, 0.8, 0, 0, 1, 1, 0, 0]
    assert metrics == {
        "exact_match": 3 / 8,
        "f1": 3.8 / 8,
        "has_answer_exact_match": 1 / 4,
        "has_answer_f1": 1.8 / 4,
        "no_answer_accuracy": 2 / 4,
    }


def test_squad_splits_without_one_kind_of_question_lack_its_metrics() -> None:
    assert list(judge_all(SQUAD, [("x", ("x",))])[1]) == [
        "exact_match",
        "f1",
        "has_answer_exact_match",
        "has_answer_f1",
    ]
    assert list(judge_all(SQUAD, [("x", ())])[1]) == ["exact_match", "f1", "no_answer_accuracy"]


def test_a_squad_reference_of_articles_alone_is_none() -> None:
    """The official script drops references that are empty once normalized."""
    assert SQUAD.judge("x", ("the", "x")).scores == {"exact_match": 1.0, "f1": 1.0}
    assert SQUAD.judge("", ("the", "x")).scores == {"exact_match": 0.0, "f1": 0.0}


WORDS = st.sampled_from(["the", "a", "Cat", "cat.", "sat", "on", "9", "-"])
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_exact_match_and_f1_are_those_of_torchmetrics(
    prediction: str, references: list[str]
) -> None:
    if not all(map(normalize_squad, references)):
        return  # torchmetrics is the script of SQuAD 1.1
    expected = squad(
        {"prediction_text": prediction, "id": "1"},
        {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "1"},
    )
    scores = SQUAD.judge(prediction, tuple(references)).scores
    assert scores == pytest.approx(
        {name: float(value) / 100 for name, value in expected.items()}, abs=1e-6
    )


def test_questions_about_one_paragraph_are_a_group() -> None:
    rows = [
        {"context": context, "question": question, "answers": {"text": ["x"]}}
        for context in ("One.", "One. \r\n", "Two.")
        for question in ("a", "b")
    ]
    groups = [build(row, SQUAD).group for row in rows]
    assert len(set(groups)) == 2 and len(set(groups[:4])) == 1 and None not in groups


@pytest.mark.parametrize(("is_impossible", "texts"), [(True, ["x"]), (False, []), ("no", ["x"])])
def test_an_impossible_question_has_no_answers(is_impossible: Any, texts: list[str]) -> None:
    row = {"context": "One.", "question": "a", "answers": {"text": texts}}
    assert build(row | {"is_impossible": not texts}, SQUAD) == build(row, SQUAD)
    with pytest.raises(DataError, match="row 1: column `is_impossible` is"):
        build(row | {"is_impossible": is_impossible}, SQUAD)
