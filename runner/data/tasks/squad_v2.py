"""The task `squad_v2`: questions about a context, judged by exact match and token F1."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from runner.data.tasks.base import (
    Example,
    Judgement,
    References,
    derive_row_key,
    describe_value,
    read_text,
    require_column,
    require_object,
)
from runner.data.tasks.prompts import PromptTask
from runner.errors import DataError
from runner.strict import Text
from runner.text import format_count


class SquadV2Task(PromptTask):
    """SQuAD 2.0: a context, a question, and answers as `{"text": [...], "answer_start": [...]}`,
    empty if the question has no answer. Questions about one context are a group.
    """

    METRICS = ("exact_match", "f1", "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy")
    ORDER = 5
    RECOGNISED_BY = (
        (
            ("context", "question", "answers"),
            {
                "prompt": (
                    "Answer with words of the text, or with `unanswerable`."
                    "\n\n{context}\n\nQuestion: {question}"
                )
            },
        ),
    )
    RECOGNITION_ORDER = 3
    # Plausible but wrong answers say nothing about the right one.
    BOOKKEEPING = ("title", "plausible_answers")
    PLACEHOLDERS = ("context", "question")

    name: Literal["squad_v2"]
    prompt: Text = Field(
        description=(
            "The text of the user's turn. It holds {context} and {question} exactly once each;"
            " other columns may be in braces too."
        ),
        examples=["{context}\n\nQuestion: {question}"],
    )
    no_answer_text: Text = Field(
        default="unanswerable",
        description="The model's answer if the context does not answer the question.",
    )

    def list_read_columns(self) -> Collection[str]:
        return ("context", "question", "answers", "is_impossible")

    def list_answer_columns(self) -> Collection[str]:
        return ("answers", "is_impossible", "plausible_answers")

    def build_example(self, row: Any, where: str) -> Example:
        columns = require_object(row, where)
        context = read_text(columns, "context", where)
        question = read_text(columns, "question", where)
        answers = _read_answers(columns, where)
        completion = answers[0] if answers else self.no_answer_text
        texts = {"context": context, "question": question}
        example = self.build_prompted(columns, where, texts, completion, answers)
        return replace(example, group=derive_row_key(context))

    def judge(self, prediction: str, references: References) -> Judgement:
        """Exact match and token F1 against the best reference, computed as in the official script
        of SQuAD 2.0.

        The task's `no_answer_text`, and an answer without any word, mean that the context holds no
        answer.

        >>> task = SquadV2Task(name="squad_v2", prompt="{context} {question}")
        >>> task.judge("the cat sat", ("A cat", "dogs")).scores
        {'exact_match': 0.0, 'f1': 0.6666666666666666}
        >>> task.judge("Unanswerable.", ()).scores, task.judge("Unanswerable.", ("x",)).scores
        ({'exact_match': 1.0, 'f1': 1.0}, {'exact_match': 0.0, 'f1': 0.0})
        """
        answer = normalize_squad(prediction)
        if answer == normalize_squad(self.no_answer_text):
            answer = ""
        normalized = [normalize_squad(reference) for reference in references]
        expected = [text for text in normalized if text] or [""]
        return Judgement(
            {
                "exact_match": float(answer in expected),
                "f1": max(_token_f1(answer.split(), reference.split()) for reference in expected),
            }
        )

    def score_row(self, references: References, scores: Mapping[str, float]) -> dict[str, float]:
        if references:
            return {**scores, **{f"has_answer_{name}": value for name, value in scores.items()}}
        return {**scores, "no_answer_accuracy": scores["exact_match"]}


def _read_answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The distinct answers to a SQuAD question; empty if the context holds none."""
    answers = require_column(row, "answers", where)
    expected = 'expected {"text": [...], "answer_start": [...]}'
    if isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers):
        texts = [answer.get("text") for answer in answers]
    elif isinstance(answers, Mapping) and isinstance(answers.get("text"), list | tuple):
        texts = list(answers["text"])
    else:
        shape = (
            "an object without a list `text`"
            if isinstance(answers, Mapping)
            else describe_value(answers)
        )
        raise DataError(f"{where}: column `answers`: {expected}, found {shape}")
    is_impossible = row.get("is_impossible")
    if is_impossible is not None and is_impossible is not (not texts):
        raise DataError(
            f"{where}: column `is_impossible` is {json.dumps(is_impossible)}, but `answers` holds"
            f" {format_count(len(texts), 'answer')}",
            hint="remove answers to impossible questions, or set `data.ignore: [is_impossible]`",
        )
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            found = repr(text) if isinstance(text, str) else describe_value(text)
            raise DataError(
                f"{where}: column `answers`: {expected}"
                f" with texts that are not blank, found {found}"
            )
    return tuple(dict.fromkeys(texts))


def normalize_squad(text: str) -> str:
    """Lower case, without punctuation, articles and surplus whitespace.

    >>> normalize_squad(" The  U.S. of A, an end")
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
