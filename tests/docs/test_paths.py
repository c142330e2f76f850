"""Every path that the documents and the docstrings name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import runner
from tests.conftest import ROOT

FILE = re.compile(r"\b(?:runner|tests|benchmarks|docs|data)/[\w/]+\.(?:py|md|yaml|sh|jsonl)\b")
MODULE = re.compile(r"\brunner(?!\.toml\b)(?:\.[a-z][a-z_]*)+\b")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *ROOT.glob("Makefile"),
    *(ROOT / "runner").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
]
HISTORY = ROOT / "CHANGELOG.md"  # also names earlier files


def find_module(name: str) -> bool:
    """True if a dotted name is a module, something in one, or a public name of the package."""
    parts = name.split(".")
    if parts[1] in runner.__all__:
        return len(parts) == 2
    for end in range(len(parts), 1, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() or path.is_dir():
            return end == len(parts) or path.with_suffix(".py").is_file()
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    names = [] if document == HISTORY else FILE.findall(text)
    assert not [name for name in names if not (ROOT / name).is_file()]
    modules = [] if document == HISTORY else MODULE.findall(text)
    assert not [name for name in modules if not find_module(name) and "stock" not in name]
