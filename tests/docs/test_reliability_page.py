"""docs/reliability.md names, for each way of failing, tests that exist and run where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "reliability.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`( \*t\*)?")


def find_marks(path: Path, test: str) -> set[str]:
    """The names of the marks of a test, those of its module included."""
    tree = ast.parse(path.read_text())
    [function] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test
    ]
    marks = re.findall(r"pytest\.mark\.(\w+)", " ".join(map(ast.unparse, function.decorator_list)))
    own = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    return {
        *marks,
        *re.findall(
            r"pytest\.mark\.(\w+)", " ".join(line for line in own if line.startswith("pytestmark"))
        ),
    }


@pytest.mark.parametrize("number", [*range(1, 18), 20, 21, 22, 23])
def test_each_row_names_tests_that_exist_where_it_says(number: int) -> None:
    [row] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {number} |")]
    named = NAMED.findall(row)
    assert named and row.count("::") == len(named)
    for path, test, is_torture in named:
        assert ("torture" in find_marks(ROOT / path, test)) == bool(is_torture), test
    assert not all(is_torture for *_, is_torture in named), "no cell of it is part of `make test`"
