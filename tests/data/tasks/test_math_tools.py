"""Tool output becomes user turns. Equal answers under other looks are equal, others are not, and
none of them can keep a run waiting.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.data.tasks.math_tools import MathJudge, MathToolsTask, normalize_latex
from tests.support.tasks import Rows, build, judge_all

MATH = MathToolsTask(name="math_tools")


@pytest.mark.parametrize("role", ["user", "tool", "ipython", "observation", "function"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tool_output_is_a_user_turn_and_the_last_boxed_answer_the_reference(
    column: str, role: str
) -> None:
    turns = [
        ("user", "Halve 1."),
        ("assistant", "```python\nprint(1/2)\n```"),
        (role, "```output\n0.5\n```"),
        ("assistant", r"Not \boxed{2} but \boxed{\frac{1}{2}}."),
    ]
    example = build({column: [{"role": one, "content": text} for one, text in turns]}, MATH)
    assert [message["role"] for message in example.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [message["content"] for message in example.messages] == [text for _, text in turns]
    assert example.references == (r"\frac{1}{2}",)


@pytest.mark.parametrize(
    ("text", "references"),
    [
        (r"\boxed{ \{1, 2\} }", (r"\{1, 2\}",)),
        (r"\boxed{1} and \boxed{2", ("1",)),
        (r"\boxed{\boxed{3}}", ("3",)),
        ("so 4", ()),
    ],
)
def test_the_reference_of_a_mathematical_answer(text: str, references: tuple[str, ...]) -> None:
    row = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    assert build(row, MATH).references == references


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


def find_child_pid(judge: MathJudge) -> int:
    assert judge._child._process is not None
    return judge._child._process.pid


def test_equal_texts_need_no_process() -> None:
    with MathJudge() as judge:
        assert judge(r"\left(\dfrac{1}{2}, 3\right)", r"(\frac12,3)".replace("12", "{1}{2}"))
        assert not judge._child.is_running
    assert normalize_latex(r"\leftarrow x") == r"\leftarrowx", "only whole commands are dropped"


def test_an_answer_without_end_is_unequal_and_the_next_one_is_judged() -> None:
    with MathJudge(cpu_seconds=1) as judge:
        assert judge("5", "2 + 3")
        first = find_child_pid(judge)
        assert not judge("5", "9^{9^{9^9}}")
        assert not Path(f"/proc/{first}").exists(), "no process of it continues to compute"
        assert judge("5", "2 + 3")
        second = find_child_pid(judge)
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_the_answer_is_that_of_the_last_trained_turn() -> None:
    said = [{"role": "assistant", "content": rf"\boxed{{{n}}}", "weight": n} for n in (1, 0)]
    messages = [{"role": "user", "content": "1?"}, said[0], {"role": "user", "content": "Sure?"}]
    assert build(
        {"messages": [*messages, said[1]]}, MathToolsTask(name="math_tools")
    ).references == ("1",)
