"""The task `math_tools`: mathematics with tools, judged by the final answers.

Two answers are compared as texts. If the texts differ, math-verify compares them in a separate
process: this module, run as a program. The process has a limit of CPU time and memory for each
pair, because a generated `9^{9^{9^9}}` keeps a computer algebra system busy for ever, inside C code
that no signal handler can interrupt. math-verify's own timeouts are signals on wall clock time, so
a busy machine could also change a score. A pair that exceeds the limit is unequal.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

from runner.child import ChildLostError, LimitedChild, serve
from runner.data.tasks.base import Example, Judge, Judgement, References, Task
from runner.data.tasks.conversations import list_conversation_columns, read_conversation

# The templates of Gemma, Mistral and plain base models have no tool role.
TOOL_ROLES: Final[Mapping[str, str]] = MappingProxyType({"tool": "user"})
_BOXED: Final = "\\boxed{"


class MathToolsTask(Task):
    """Mathematics in several turns: a tool's output is a user turn, and the answer is in the last
    `\\boxed{}`.
    """

    METRICS = ("final_answer_accuracy",)
    ORDER = 7

    name: Literal["math_tools"]

    def list_used_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        return list_conversation_columns(row)

    def build_example(self, row: Any, where: str) -> Example:
        read = read_conversation(row, where, TOOL_ROLES)
        last = max(
            index
            for index, message in enumerate(read.messages)
            if message["role"] == "assistant" and index not in read.untrained
        )
        answer = find_boxed(read.messages[last]["content"])
        return replace(read, references=() if answer is None else (answer,))

    @contextmanager
    def open_judge(self) -> Iterator[Judge]:
        """A judge of final answers; its process starts at the first pair that needs it."""
        with MathJudge() as is_equal:
            yield partial(judge_final_answer, is_equal)


def judge_final_answer(
    is_equal: Callable[[str, str], bool], prediction: str, references: References
) -> Judgement:
    r"""1 if the content of the last `\boxed{}` equals a reference by `is_equal(reference, answer)`.

    An answer without a box is unreadable and scores 0. A row without a reference is not judged.
    """
    if not references:
        return Judgement()
    answer = find_boxed(prediction)
    if answer is None:
        return Judgement({"final_answer_accuracy": 0.0}, is_readable=False)
    is_right = any(is_equal(reference, answer) for reference in references)
    return Judgement({"final_answer_accuracy": float(is_right)})


def find_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` with closed braces; None without one.

    >>> find_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> find_boxed(r"\boxed{1"), find_boxed("1")
    (None, None)
    """
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        if (inside := _read_braces(text, start + len(_BOXED))) is not None:
            return inside.strip()
        end = start
    return None


def _read_braces(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; an escaped brace does not
    count.
    """
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at]
        at += 1
    return None


class MathJudge:
    """A context for calls of `judge(reference, answer)`; its process starts at the first pair that
    needs it.

    `cpu_seconds` is the limit for one pair; math-verify usually needs well under one second.
    """

    def __init__(self, cpu_seconds: int = 5) -> None:
        self._cpu_seconds = cpu_seconds
        # No limit by the clock: a busy machine would change a score.
        self._child = LimitedChild(__name__, is_silent=True)

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    def __call__(self, reference: str, answer: str) -> bool:
        """True if the two are equal as texts or as mathematics."""
        return normalize_latex(reference) == normalize_latex(answer) or self._ask(reference, answer)

    def _ask(self, reference: str, answer: str) -> bool:
        try:
            reply = self._child.ask([reference, answer], cpu_seconds=self._cpu_seconds)
        except ChildLostError:  # ended by a limit
            return False
        return reply is True


def normalize_latex(text: str) -> str:
    r"""The text without commands that change only the appearance of a formula.

    >>> normalize_latex(r"\left( \dfrac{1}{2},\, 3 \right)."), normalize_latex(r"\text{ 5 cm}")
    ('(\\frac{1}{2},3)', '5cm')
    """
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ]|[$~]", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    return "".join(text.split()).rstrip(".")


def main() -> int:
    """Answer pairs of texts with true or false, until a limit ends the process."""
    return serve(load_comparison)


def load_comparison() -> Callable[[Sequence[str]], bool]:
    """math-verify's comparison of a pair of LaTeX texts, without its timeouts."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its timeouts are off

    def is_equal(pair: Sequence[str]) -> bool:
        expected, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in pair)
        return bool(verify(expected, found, timeout_seconds=None))

    return is_equal


if __name__ == "__main__":
    sys.exit(main())
