"""Equal answers under other looks are equal, others are not, and none of them can keep a run
waiting.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.data.math_judge import MathJudge, normalise_latex


@pytest.mark.parametrize(
    ("reference", "answer", "is_equal"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        ("x+1", "1+x", True),
        ("5", r"5\text{ cm}", True),
        (r"90^\circ", "90", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("1{,}000", "1000", True),
        (r"\text{Monday}", r"\text{monday}", True),
        ("(1,2)", "(2,1)", False),
        ("2", "3", False),
        ("2", "", False),
        (r"\text{A}", r"\text{B}", False),
        (r"\ddot{é}", "{", False),
    ],
)
def test_equality(reference: str, answer: str, is_equal: bool, judge: MathJudge) -> None:
    assert judge(reference, answer) is is_equal


@pytest.fixture(scope="module")
def judge() -> object:
    with MathJudge() as judge:
        yield judge


def test_equal_texts_need_no_process() -> None:
    with MathJudge() as judge:
        assert judge(r"\left(\dfrac{1}{2}, 3\right)", r"(\frac12,3)".replace("12", "{1}{2}"))
        assert judge._process is None
    assert normalise_latex(r"\leftarrow x") == r"\leftarrowx", "only whole commands are dropped"


def test_an_answer_without_end_is_unequal_and_the_next_one_is_judged() -> None:
    with MathJudge(cpu_seconds=1) as judge:
        assert judge("5", "2 + 3")
        assert judge._process is not None
        first = judge._process.pid
        assert not judge("5", "9^{9^{9^9}}")
        assert not Path(f"/proc/{first}").exists(), "nothing of it goes on computing"
        assert judge("5", "2 + 3")
        second = judge._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
