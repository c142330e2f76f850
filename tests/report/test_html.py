"""The page of a report says what the report says, loads nothing, and shows no text as markup."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RefusedError
from runner.recipe.schema import DeclaredContrast
from runner.report.effects import Report
from runner.report.html import (
    MAX_PAGE_BYTES,
    PageOptions,
    build_page,
    show_text,
    write_pages,
)
from runner.report.labels import hide_paths
from tests.support.pages import make_report

# Texts that a recipe may hold, and texts that a row or an answer may hold
HOSTILE_AXIS = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $x$ {{ 7*7 }}"
HOSTILE = f"{HOSTILE_AXIS}\x1b[2J\x07"


class Outline(HTMLParser):
    """Elements, attributes and visible texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(tmp_path_factory.mktemp("runs"), answers=("yes", "no"))


# Pages take a second each: where a test makes its own, its grid is as small as it can be
SMALL: dict[str, Any] = {"seeds": (1,), "counts": (60,), "missing": 0}


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return build_page(report).html


def test_the_answer_comes_first_and_everything_is_there(html: str) -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    assert heads == [
        "The question and the answer",
        "Cells",
        "Effects",
        "Interactions",
        "Learning curves",
        "Rows",
        "Runs",
        "What differs between runs",
        "Certificate, versions, commands",
        "Definitions",
    ]
    verdict = html.index("loss: completion is better than full by 0.18 nats.")
    warning = html.index("changes the number of updates: 32 and 92")
    assert verdict < warning < html.index("<h2>Cells")


def test_the_page_names_facts_as_a_certificate_does(tmp_path: Path) -> None:
    report = make_report(tmp_path, **SMALL)
    hashes = {"test": {"ids_hash": "1", "input_ids_hash": "2", "mask_hash": "3"}}
    versions = {"cuda": "absent", "trl": "absent then 1.7"}
    rows = tuple(replace(row, split_hashes=hashes, versions=versions) for row in report.rows)
    html = build_page(replace(report, rows=rows)).html
    facts = dict(re.findall("<dt>(.*?)</dt><dd><code>(.*?)</code>", html))
    assert facts["test rows"] == "1" and facts["input_ids of the test rows"] == "2"
    assert facts["label masks of the test rows"] == "3"
    assert facts["version of CUDA"] == "none"
    assert facts["version of trl"] == "not installed then 1.7"
    assert "input_ids_hash" not in html


def test_a_declaration_that_came_late_says_so(tmp_path: Path) -> None:
    report = make_report(tmp_path, **SMALL)
    one = DeclaredContrast.model_validate(
        {"axis": "loss", "from": "full", "to": "completion", "metric": "bits_per_byte"}
    )
    early = [replace(row, declared_then=(one,), declared_now=(one,)) for row in report.rows]
    words = "loss: full to completion by bits_per_byte: "
    html = build_page(replace(report, rows=tuple(early), effects=(), cells=())).html
    assert f"{words}before the first launch" in html
    late = replace(early[0], declared_then=(), started_at_utc="2026-01-02T03:04:05+00:00")
    html = build_page(replace(report, rows=(late, *early[1:]), effects=(), cells=())).html
    assert f"{words}exploratory, because it was declared after {late.recipe.run.full_name}" in html
    assert "started on 2026-01-02" in html


def test_it_loads_nothing_and_allows_nothing_but_its_own(html: str) -> None:
    outline = Outline(html)
    assert outline.tags.count("script") == outline.tags.count("style") == 1
    assert not {"link", "img", "iframe", "object", "base", "form", "image"} & set(outline.tags)
    links = [value for _, name, value in outline.attributes if name in ("href", "src", "action")]
    assert links and all(value.startswith("#") for value in links)
    assert not [one for one in outline.attributes if one[1] == "style" or one[1].startswith("on")]
    assert "url(" not in html.replace('clip-path="url(#', "")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for element in ("style", "script"):
        [content] = re.findall(f"<{element}>(.*?)</{element}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_every_column_and_every_metric_is_defined(html: str) -> None:
    defined = set(re.findall(r"<dt>(.*?)</dt><dd>", html[html.index('id="definitions"') :]))
    heads = set(re.findall(r"<th scope=\"col\"[^>]*title=\"[^\"]+\">(.*?)</th>", html))
    assert len(heads) > 25 and heads <= defined
    assert {"NLL per completion token", "row", "group", "length", "base", "better"} <= defined
    assert {"difference", "mean difference"} <= defined


def test_figures_have_words_beside_them(html: str) -> None:
    figures = re.findall(r"<svg [^>]*>", html)
    assert len(figures) == html.count("<svg") >= 5
    for figure in figures:
        [alternative] = re.findall(r'aria-label="([^"]*)"', figure)
        assert 'role="img"' in figure and len(alternative) > 40
    assert html.count("<figcaption><strong>") == len(figures) + html.count('class="heat"')


def test_a_missing_cell_is_hatched_and_says_why(html: str) -> None:
    [cell] = re.findall(r'<td class="none">(.*?)</td>', html, flags=re.DOTALL)
    assert "llama_completion_180_1 (failed)" in cell and "<b>" not in cell


def test_what_lies_below_the_noise_floor_is_greyed(report: Report, html: str) -> None:
    assert '<tr class="below">' not in html
    effects = report.effects[1]
    assert effects.pooled is not None
    below = replace(effects, pooled=replace(effects.pooled, is_below_noise=True))
    page = build_page(replace(report, effects=(below,)))
    assert page.html.count('<tr class="below">') == 1
    assert 'class="s-greyed"' in page.html and 'class="s-greyed"' not in html


def test_a_refused_effect_has_its_reason_and_no_number(html: str) -> None:
    [row, *_] = re.findall(r'<tr class="refused">(.*?)</tr>', html, flags=re.DOTALL)
    assert "not comparable" in row and "no run of these cells has a score" in row


def test_the_same_report_makes_the_same_bytes(tmp_path: Path) -> None:
    report = make_report(tmp_path, **SMALL)
    first, second = build_page(report), build_page(report)
    assert first.html == second.html
    for one, other in zip(first.drawings, second.drawings, strict=True):
        assert one.as_pdf() == other.as_pdf()


def test_texts_of_rows_can_be_left_out(tmp_path: Path) -> None:
    report = make_report(tmp_path, answers=("ANSWER",), text="PROMPT {}", **SMALL)
    lines = write_pages(
        report, PageOptions(with_rows=False), page=tmp_path / "a.html", rows=tmp_path / "rows"
    )
    pages = [tmp_path / "a.html", *(tmp_path / "rows").iterdir()]
    assert len(lines) == 2 and len(pages) == 5
    for page in pages:
        assert "ANSWER" not in page.read_text() and "PROMPT" not in page.read_text()
    with_rows = build_page(report).html
    assert "tuned: ANSWER" in with_rows and "base: ANSWER" in with_rows and "PROMPT" in with_rows


def test_nothing_of_this_machine_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of recipes and of errors lose their folders, in tables and in figures."""
    home = tmp_path / "home" / "ann"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    (home / "work").mkdir()
    model = str(home / "models" / "gemma")
    report = make_report(home / "work", models=(model, "llama"), **SMALL)
    warned = replace(report, warnings=(f"cannot read {home}/work/runs/x: [Errno 13] '{home}/y'",))
    options = PageOptions(command=f"runner report {home}/work/recipes/demo")
    pages = tmp_path / "pages"
    write_pages(
        warned, options, page=pages / "r.html", rows=pages / "rows", figures=pages / "figures"
    )
    files = [path for path in pages.rglob("*") if path.is_file()]
    assert len(files) == 1 + 4 + 4
    for path in files:
        content = path.read_bytes()
        for secret in (str(home), "/home/", "ann/", "k" * 40):
            assert secret.encode() not in content, f"{secret} in {path}"
        assert not re.search("ann[/-]", path.name)
    assert "…/gemma" in (pages / "r.html").read_text()


def test_the_certificate_names_machines_by_their_parts(report: Report) -> None:
    rows = []
    for row in report.rows:
        gpu = {"full": "A100", "completion": "H200"}[row.axes["loss"]]
        hardware = {"cpu": "Xeon 8480", "gpu": gpu, "note": "node-17"}
        rows.append(replace(row, hardware=hardware, num_processes=(1,)))
    html = build_page(replace(report, rows=tuple(rows))).html
    texts = "".join(Outline(html).texts)
    assert "Xeon 8480" in texts and "H200" in texts and "number of processes" in texts
    assert "node-17" not in html


def test_hostile_texts_are_texts(tmp_path: Path) -> None:
    report = make_report(
        tmp_path,
        models=("gemma", HOSTILE_AXIS),
        answers=(HOSTILE,),
        text=HOSTILE + "{}",
        verdicts=(HOSTILE,),
        **SMALL,
    )
    html = build_page(report).html
    outline = Outline(html)
    assert outline.tags.count("script") == 1 and "img" not in outline.tags
    assert "\x1b" not in html and "\x07" not in html
    assert "alert(1)" in "".join(outline.texts) and "{{ 7*7 }}" in "".join(outline.texts)
    assert not [one for one in outline.attributes if one[1].startswith("on")]


def test_a_million_characters_do_not_fill_the_page(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    report = make_report(
        tmp_path,
        answers=(long, *("yes",) * 39),
        verdicts=(long,),
        **SMALL,
    )
    html = build_page(report).html
    assert len(html) < MAX_PAGE_BYTES + 200_000
    assert "more characters)" in html and "x" * 20_001 not in html


def test_the_page_is_full_at_some_point(tmp_path: Path) -> None:
    """The rows with the largest differences stay, and the others are counted."""
    report = make_report(
        tmp_path, answers=("word " * 390,), text="q {} " * 380, num_test=250, **SMALL
    )
    page = build_page(report)
    assert MAX_PAGE_BYTES * 0.95 < len(page.html) < MAX_PAGE_BYTES * 1.05
    shown = [int(number) for number in re.findall(r"The (\d+) rows with the largest", page.html)]
    left_out = [int(number) for number in re.findall(r"(\d+) more are left out", page.html)]
    assert len(shown) == len(page.comparisons) == 4 and max(shown) - min(shown) <= 1
    assert {a + b for a, b in zip(shown, left_out, strict=True)} == {250}


def test_a_report_of_nothing_has_a_page(tmp_path: Path) -> None:
    assert "no runs" in build_page(Report((), (), (), ())).html
    pending = make_report(tmp_path, seeds=(1,), missing=8)
    html = build_page(replace(pending, effects=(), verdicts=(), warnings=())).html
    assert html.count('<td class="none">') == 8 and "These runs allow no verdict." in html
    alone = make_report(tmp_path / "one", models=("gemma",), losses=("full",), **SMALL)
    html = build_page(replace(alone, effects=(), metrics=())).html
    assert "NLL per completion token, demo" in html and '<td class="q7">' in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model=/home/ann/models/gemma, x", "model=…/gemma, x"),
        ("'/root/a b", "'…/a b"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("org/model and 3/4 and and/or", "org/model and 3/4 and and/or"),
        ("demo/gemma/x", "demo/gemma/x"),
        (f"{os.getcwd()}/data/x.jsonl", "data/x.jsonl"),
    ],
)
def test_absolute_paths_lose_their_folders(text: str, shown: str) -> None:
    assert hide_paths(text) == shown


def test_long_texts_say_how_much_is_missing() -> None:
    assert show_text("a<b" * 10, 3) == "a&lt;b … (27 more characters)"


def test_what_cannot_be_written_is_refused_first(tmp_path: Path, report: Report) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="is a folder, but the page is one file"):
        write_pages(report, page=tmp_path)
    file = re.escape(str(tmp_path / "file"))
    no_folder = f"{file} is a file, so the folder {file} cannot be created"
    with pytest.raises(RefusedError, match=no_folder):
        write_pages(report, page=tmp_path / "file" / "r.html")
    with pytest.raises(RefusedError, match=no_folder):
        write_pages(report, figures=tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
