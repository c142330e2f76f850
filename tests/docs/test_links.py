"""Every relative link in the documents leads somewhere, and docs/README.md reaches every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.documents import DOCS, DOCUMENTS, PAGES, find_links, list_anchors


def find_broken(document: Path) -> list[str]:
    """The links of a document that name no file, or no heading of the file."""
    broken = []
    for link in find_links(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(link)
        elif anchor and anchor not in list_anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    assert not find_broken(document)


def test_the_index_reaches_every_page() -> None:
    index = DOCS / "README.md"
    linked = {link.partition("#")[0] for link in find_links(index.read_text(encoding="utf-8"))}
    assert [path.name for path in PAGES if path != index and path.name not in linked] == []


def test_the_readme_shows_a_picture_and_links_to_the_index() -> None:
    links = find_links((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "docs/report.png" in links and "docs/README.md" in links


def test_the_terms_of_the_glossary_are_in_order() -> None:
    """The page promises alphabetical order within each section."""
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    sections = [
        re.findall(r"^\| (?!term|---)([^|]+) \|", part, re.M) for part in page.split("\n## ")
    ]
    assert sum(map(len, sections)) > 60
    assert all(terms == sorted(terms, key=str.lower) for terms in sections)


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# One thing\n[x](b.md#two) [y](c.md) [z](#one-thing)\n")
    (tmp_path / "b.md").write_text("```\n## Two\n```\n[up](../outside.md)\n")
    assert find_broken(tmp_path / "a.md") == ["b.md#two", "c.md"]
    assert find_broken(tmp_path / "b.md") == ["../outside.md"]
