"""Judges generated answers: scores of single rows, and what a split's scores add up to. Larger is
always better.

All scores lie between 0 and 1. Libraries are imported by the task that needs them, not by a run
that generates nothing.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from runner.data.math_judge import MathJudge
from runner.data.tasks import find_boxed
from runner.recipe.schema import (
    AnyTask,
    MathToolsTask,
    PromptCompletionTask,
    SquadV2Task,
    Sst2Task,
    SummarizationTask,
)


@dataclass(frozen=True)
class Judgement:
    """Scores of one answer; none where there is nothing to judge it against.

    `is_readable` is false where the answer is no answer to the question: no label, or no final
    result. It scores 0.
    """

    scores: dict[str, float] = field(default_factory=dict)
    is_readable: bool = True


References = tuple[str, ...]
Judge = Callable[[str, References], Judgement]


@contextmanager
def open_judge(task: AnyTask) -> Iterator[Judge]:
    """What judges `(prediction, references)` of one row of the task; it may keep a process while it
    is open.
    """
    if isinstance(task, PromptCompletionTask):
        yield judge_exact_match
    elif isinstance(task, SummarizationTask):
        yield build_rouge_judge()
    elif isinstance(task, Sst2Task):
        yield partial(judge_label, task)
    elif isinstance(task, SquadV2Task):
        yield partial(judge_squad, task)
    elif isinstance(task, MathToolsTask):
        with MathJudge() as is_equal:
            yield partial(judge_final_answer, is_equal)
    else:  # conversations, whose answers are judged by nobody
        yield lambda prediction, references: Judgement()


def summarise(task: AnyTask, rows: Sequence[tuple[References, Judgement]]) -> dict[str, float]:
    """The task's metrics over a split, each over the rows that it is defined for; one that has none
    is left out.
    """
    judged = [(references, judgement.scores) for references, judgement in rows if judgement.scores]
    metrics = _mean_of_each([scores for _, scores in judged])
    if isinstance(task, Sst2Task) and judged:
        metrics["f1"] = _f1_of_positives(task, judged)
    if isinstance(task, SquadV2Task):
        answerable = _mean_of_each([scores for references, scores in judged if references])
        metrics |= {f"has_answer_{name}": value for name, value in answerable.items()}
        if unanswerable := _mean_of_each(
            [scores for references, scores in judged if not references]
        ):
            metrics["no_answer_accuracy"] = unanswerable["exact_match"]
    return {name: metrics[name] for name in task.METRICS if name in metrics}


def _mean_of_each(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        name: math.fsum(scores[name] for scores in rows) / len(rows)
        for name in (rows[0] if rows else ())
    }


def judge_exact_match(prediction: str, references: References) -> Judgement:
    """Whether the answer is the reference, but for whitespace around it.

    >>> judge_exact_match("It is 2. ", ("It is 2.",)).scores
    {'exact_match': 1.0}
    """
    is_equal = prediction.strip() in {reference.strip() for reference in references}
    return Judgement({"exact_match": float(is_equal)})


def build_rouge_judge() -> Judge:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures by rouge-score.

    With Porter's stemmer, as the original ROUGE is run for summaries (`-m`). Words are runs of a-z
    and 0-9: this is a measure for English.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = SummarizationTask.METRICS
    scorer = RougeScorer(list(names), use_stemmer=True)

    def judge(prediction: str, references: References) -> Judgement:
        scores = scorer.score_multi(references, prediction)
        return Judgement({name: float(scores[name].fmeasure) for name in names})

    return judge


def judge_label(task: Sst2Task, prediction: str, references: References) -> Judgement:
    """Whether the answer is the right label text, but for case, whitespace and punctuation around
    it.

    >>> task = Sst2Task(name="sst2", prompt="{sentence}")
    >>> judge_label(task, "Positive.", ("positive",))
    Judgement(scores={'accuracy': 1.0}, is_readable=True)
    >>> judge_label(task, "good", ("positive",)).is_readable
    False
    """
    label = _bare(prediction)
    is_right = label in {_bare(reference) for reference in references}
    return Judgement(
        {"accuracy": float(is_right)},
        is_readable=label in {_bare(text) for text in task.label_texts},
    )


def _bare(text: str) -> str:
    return text.casefold().strip(string.punctuation + string.whitespace)


def _f1_of_positives(
    task: Sst2Task, judged: Sequence[tuple[References, dict[str, float]]]
) -> float:
    """F1 of label 1, as GLUE counts it; an answer that is neither label counts as the wrong one."""
    pairs = [
        (references[0] == task.label_texts[1], scores["accuracy"] == 1)
        for references, scores in judged
    ]
    true_positives = sum(is_positive and is_right for is_positive, is_right in pairs)
    num_positive = sum(is_positive for is_positive, _ in pairs)
    num_answered_positive = sum(is_positive == is_right for is_positive, is_right in pairs)
    total = num_positive + num_answered_positive
    return 2 * true_positives / total if total else 0.0


def judge_squad(task: SquadV2Task, prediction: str, references: References) -> Judgement:
    """Exact match and token F1 against the best reference, as the official script of SQuAD 2.0
    counts them.

    The task's `no_answer_text`, and an answer without any word, say that the context holds no
    answer.

    >>> prompt = "{context} {question}"
    >>> task = SquadV2Task(name="squad_v2", prompt=prompt, no_answer_text="unanswerable")
    >>> judge_squad(task, "the cat sat", ("A cat", "dogs")).scores
    {'exact_match': 0.0, 'f1': 0.6666666666666666}
    >>> judge_squad(task, "Unanswerable.", ()).scores
    {'exact_match': 1.0, 'f1': 1.0}
    >>> judge_squad(task, "Unanswerable.", ("x",)).scores
    {'exact_match': 0.0, 'f1': 0.0}
    """
    answer = normalise_squad(prediction)
    if answer == normalise_squad(task.no_answer_text):
        answer = ""
    expected = [text for reference in references if (text := normalise_squad(reference))] or [""]
    return Judgement(
        {
            "exact_match": float(answer in expected),
            "f1": max(_token_f1(answer.split(), reference.split()) for reference in expected),
        }
    )


def normalise_squad(text: str) -> str:
    """Lower case, without punctuation, articles and surplus whitespace.

    >>> normalise_squad(" The  U.S. of A, an end")
    'us of end'
    """
    bare = "".join(
        character for character in text.lower() if character not in set(string.punctuation)
    )
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    num_same = sum((Counter(answer) & Counter(reference)).values())
    return 2 * num_same / (len(answer) + len(reference))


def judge_final_answer(
    is_equal: Callable[[str, str], bool], prediction: str, references: References
) -> Judgement:
    r"""Whether what the last `\boxed{}` holds equals the reference, mathematically by
    `is_equal(reference, answer)`.

    An answer without a box is not read: it scores 0. A row without a reference is not judged.
    """
    if not references:
        return Judgement()
    answer = find_boxed(prediction)
    if answer is None:
        return Judgement({"final_answer_accuracy": 0.0}, is_readable=False)
    is_right = any(is_equal(reference, answer) for reference in references)
    return Judgement({"final_answer_accuracy": float(is_right)})
