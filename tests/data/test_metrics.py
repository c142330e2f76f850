"""Every metric on examples that were computed by hand, and against other implementations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score
from torchmetrics.functional.text import squad

from runner.data.metrics import Judgement, judge_squad, normalise_squad, open_judge, summarise
from runner.recipe.schema import (
    AnyTask,
    ConversationsTask,
    MathToolsTask,
    PromptCompletionTask,
    SquadV2Task,
    Sst2Task,
    SummarizationTask,
)

SST2 = Sst2Task(name="sst2", prompt="{sentence}")
SQUAD = SquadV2Task(name="squad_v2", prompt="{context} {question}", no_answer_text="unanswerable")
MATH = MathToolsTask(name="math_tools")
SUMMARIES = SummarizationTask(name="summarization", prompt="{document}")

Rows = list[tuple[str, tuple[str, ...]]]


def judge_all(task: AnyTask, rows: Rows) -> tuple[list[Judgement], dict[str, float]]:
    """The judgement of each `(prediction, references)`, and the metrics of all."""
    with open_judge(task) as judge:
        judgements = [judge(prediction, references) for prediction, references in rows]
    return judgements, summarise(
        task, [(row[1], judgement) for row, judgement in zip(rows, judgements, strict=True)]
    )


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
    """The official script drops references that are empty once normalised."""
    assert judge_squad(SQUAD, "x", ("the", "x")).scores == {"exact_match": 1.0, "f1": 1.0}
    assert judge_squad(SQUAD, "", ("the", "x")).scores == {"exact_match": 0.0, "f1": 0.0}


WORDS = st.sampled_from(["the", "a", "Cat", "cat.", "sat", "on", "9", "-"])
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_exact_match_and_f1_are_those_of_torchmetrics(
    prediction: str, references: list[str]
) -> None:
    if not all(map(normalise_squad, references)):
        return  # torchmetrics is the script of SQuAD 1.1
    expected = squad(
        {"prediction_text": prediction, "id": "1"},
        {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "1"},
    )
    scores = judge_squad(SQUAD, prediction, tuple(references)).scores
    assert scores == pytest.approx(
        {name: float(value) / 100 for name, value in expected.items()}, abs=1e-6
    )


def test_rouge_by_hand() -> None:
    # Stemmed: "the cat sleep" and "the cat sleep on the mat": 3 of 3 and 3 of 6 words, 2 of 2 and 2
    # of 5 pairs.
    judgements, metrics = judge_all(
        SUMMARIES, [("The cat sleeps.", ("the cat sleeping on the mat",))]
    )
    assert metrics == pytest.approx({"rouge1": 2 / 3, "rouge2": 2 * 0.4 / 1.4, "rougeL": 2 / 3})
    assert judgements[0].scores == metrics
    # The same words in another order: the longest common subsequence is "on the mat".
    other = judge_all(SUMMARIES, [("on the mat the cat sleeps", ("the cat sleeps on the mat",))])[1]
    assert other == pytest.approx({"rouge1": 1, "rouge2": 4 / 5, "rougeL": 1 / 2})
    assert judge_all(SUMMARIES, [("", ("x",))])[1] == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_exact_match_of_completions() -> None:
    task = PromptCompletionTask(name="prompt_completion")
    assert judge_all(task, [("a b ", (" a b",)), ("A b", ("a b",))])[1] == {"exact_match": 0.5}


def test_final_answers() -> None:
    rows: Rows = [
        (r"so \boxed{0.5}", (r"\frac{1}{2}",)),
        (r"\boxed{1} no, \boxed{ \dfrac{1}{2} }.", (r"\frac{1}{2}",)),
        (r"\boxed{\frac{1}{3}}", (r"\frac{1}{2}",)),
        ("so 0.5", (r"\frac{1}{2}",)),
        (r"\boxed{0.5", (r"\frac{1}{2}",)),
        (r"\boxed{7}", ()),
    ]
    judgements, metrics = judge_all(MATH, rows)
    assert [one.scores.get("final_answer_accuracy") for one in judgements] == [1, 1, 0, 0, 0, None]
    assert [one.is_readable for one in judgements] == [True, True, True, False, False, True]
    assert metrics == {"final_answer_accuracy": 2 / 5}
    assert judge_all(MATH, rows[-1:])[1] == {}


def test_conversations_are_judged_by_nobody() -> None:
    judgements, metrics = judge_all(ConversationsTask(name="conversations"), [("x", ())])
    assert judgements == [Judgement()] and metrics == {}


def test_metrics_are_those_that_the_recipe_may_name() -> None:
    tasks: list[tuple[AnyTask, Rows]] = [
        (SST2, [("positive", ("positive",))]),
        (SQUAD, [("x", ("x",)), ("x", ())]),
        (SUMMARIES, [("x", ("x",))]),
        (MATH, [(r"\boxed{1}", ("1",))]),
        (PromptCompletionTask(name="prompt_completion"), [("x", ("x",))]),
    ]
    for task, rows in tasks:
        assert tuple(judge_all(task, rows)[1]) == task.METRICS


def test_a_trainer_without_generation_imports_no_metric_library() -> None:
    heavy = ("rouge_score", "nltk", "math_verify", "torchmetrics", "scipy", "sklearn")
    code = f"import runner.sft.train, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
