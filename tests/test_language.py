"""Docstrings say what something is or returns; none opens with a question word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

import pytest

from tests.conftest import ROOT

_QUESTION_WORDS: Final = frozenset(
    {"how", "what", "when", "where", "whether", "which", "who", "whom", "whose", "why"}
)


def find_questions(source: str) -> Iterator[tuple[int, str]]:
    """Line and first words of each docstring, also of an attribute, that opens with such a word."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))) if text.split():
                    if text.split()[0].strip(",.:;'\"").lower() in _QUESTION_WORDS:
                        yield statement.lineno, " ".join(text.split())[:60]


def test_no_docstring_opens_with_a_question_word() -> None:
    folders = ("runner", "benchmarks", "data", "tests", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 400
    found = [
        f"{path.relative_to(ROOT)}:{line}: {words}"
        for path in paths
        for line, words in find_questions(path.read_text())
    ]
    assert not found, "\n".join([f"{len(found)} docstrings:", *found])


@pytest.mark.parametrize(
    "source",
    [
        '"""What a file owns."""',
        'class A:\n    """How, in short."""',
        'def f():\n    """Whether it is so."""',
        'class A:\n    b: int\n    """Which one."""',
    ],
)
def test_question_words_are_found(source: str) -> None:
    assert len(list(find_questions(source))) == 1
    assert not list(find_questions(source.replace('"""', '"""True: ', 1)))
