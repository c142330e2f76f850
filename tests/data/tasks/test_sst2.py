"""Labels become their texts; accuracy and F1 by hand, and against another implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score

from runner.data.tasks.sst2 import Sst2Task
from runner.errors import DataError
from tests.support.tasks import Rows, build, judge_all

SST2 = Sst2Task(name="sst2", prompt="Sentiment of: {sentence}")


@pytest.mark.parametrize("label", [1, "1"])
def test_sst2_answers_with_the_text_of_its_label(label: Any) -> None:
    example = build({"sentence": "hi", "label": label, "idx": 0}, SST2)
    assert [message["content"] for message in example.messages] == ["Sentiment of: hi", "positive"]
    assert example.references == ("positive",)
    assert build({"sentence": "hi", "label": "0"}, SST2).references == ("negative",)


@pytest.mark.parametrize("label", [-1, "-1", 2, "", "positive", 1.0, True, None])
def test_another_label_is_refused_by_row(label: Any) -> None:
    with pytest.raises(DataError, match=r"^s\.csv row 4: .*label") as caught:
        build({"sentence": "hi", "label": label}, SST2, "s.csv row 4")
    assert ("GLUE hides" in str(caught.value)) == (str(label) == "-1")


def test_sst2_by_hand() -> None:
    """Two true positives, one false negative, one false positive, one true negative, one text that
    is no label.
    """
    positive, negative = ("positive",), ("negative",)
    rows: Rows = [
        ("positive", positive),
        (" Positive.\n", positive),
        ("negative", positive),
        ("positive", negative),
        ("NEGATIVE", negative),
        ("it is positive", negative),
    ]
    judgements, metrics = judge_all(SST2, rows)
    assert [one.scores["accuracy"] for one in judgements] == [1, 1, 0, 0, 1, 0]
    assert [one.is_readable for one in judgements] == [True] * 5 + [False]
    # The last one counts as the wrong label, positive: 2 of 4 answers and 2 of 3 rows are truly
    # positive.
    assert metrics == pytest.approx(
        {"accuracy": 3 / 6, "f1": 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)}
    )


def test_sst2_with_other_label_texts_and_without_any_positive() -> None:
    task = SST2.model_copy(update={"label_texts": ("0", "1")})
    assert judge_all(task, [("0", ("0",)), ("0.", ("0",))])[1] == {"accuracy": 1.0, "f1": 0.0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_accuracy_and_f1_are_those_of_torchmetrics(pairs: list[tuple[bool, bool]]) -> None:
    rows: Rows = [(SST2.label_texts[answer], (SST2.label_texts[label],)) for answer, label in pairs]
    answers, labels = (torch.tensor([pair[at] for pair in pairs]).int() for at in (0, 1))
    expected = {
        "accuracy": float(binary_accuracy(answers, labels)),
        "f1": float(binary_f1_score(answers, labels)),
    }
    assert judge_all(SST2, rows)[1] == pytest.approx(expected, abs=1e-6)
