"""The page of a report in a real browser: no complaint, no request, all of it readable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.report.html import PageOptions, write_pages
from tests.report.test_html import HOSTILE, HOSTILE_AXIS
from tests.support.pages import make_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IS_REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not IS_REQUIRED, reason="no Chromium here; REQUIRE_BROWSER=1 fails instead"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    assert CHROMIUM is not None, "REQUIRE_BROWSER=1, and no chromium on PATH"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`report.html` of a grid of hostile texts, and the pages of its rows in `rows`."""
    folder = tmp_path_factory.mktemp("page")
    report = make_report(
        folder,
        models=("gemma", HOSTILE_AXIS),
        answers=("y" * 1_000_000, *(HOSTILE, "yes") * 20),
        text=HOSTILE + " {}",
        verdicts=("completion is better than full.", HOSTILE),
    )
    write_pages(report, PageOptions(), page=folder / "report.html", rows=folder / "rows")
    return folder


class Visit:
    """A page that is open, and what the browser said of it."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.url = path.as_uri()

    def read_column(self, table: str, at: int) -> list[str]:
        """The texts of one column, of the rows that are visible."""
        rows = self.page.locator(f"{table} > tbody:not([hidden]) > tr:first-child")
        return [text.strip() for text in rows.locator(f"td:nth-child({at})").all_inner_texts()]


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    opened: list[Visit] = []

    def open_page(path: Path, **context: Any) -> Visit:
        opened.append(Visit(browser, path, **context))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()


@pytest.mark.parametrize(
    "context",
    [
        {"viewport": {"width": 1280, "height": 800}},
        {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"},
        {"java_script_enabled": False},
    ],
    ids=["wide", "narrow and dark", "without scripts"],
)
def test_it_opens_without_complaint_or_request(
    visit: Any, folder: Path, context: dict[str, Any]
) -> None:
    one = visit(folder / "report.html", **context)
    assert one.complaints == [] and one.requests == [one.url]
    for text in ("completion is better than full.", "Row explorer", "Definitions"):
        assert one.page.get_by_text(text, exact=True).first.is_visible()
    assert "<script>alert(1)</script>" in one.page.locator(".verdicts").inner_text()
    assert one.page.locator("#runs tbody").count() == 24
    width = one.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "the page scrolls to the side"


def test_a_page_of_rows_opens_too(visit: Any, folder: Path) -> None:
    path = sorted((folder / "rows").iterdir())[0]
    one = visit(path)
    assert one.complaints == [] and one.requests == [one.url]
    assert one.page.locator("table.rows > tbody").count() == 40
    one.page.locator("table.rows details").first.click()
    assert one.page.locator("table.rows details dl").first.is_visible()


def test_tables_sort_by_their_numbers_and_filter_by_words(visit: Any, folder: Path) -> None:
    one = visit(folder / "report.html")
    table = "#table-runs"
    names = one.page.locator(f"{table} thead th").all_inner_texts()
    at = names.index("trained tokens") + 1
    one.page.locator(f"{table} thead th:nth-child({at}) button").click()
    values = [text for text in one.read_column(table, at) if text]
    numbers = [int(text.replace(",", "")) for text in values]
    assert len(numbers) == 21 and numbers == sorted(numbers)
    assert one.read_column(table, at)[-1] == "", "blanks stay last"
    one.page.locator(f"{table} thead th:nth-child({at}) button").click()
    assert one.read_column(table, at)[0] == values[-1]
    assert one.page.locator(f"{table} th[aria-sort='descending']").count() == 1

    field = one.page.locator("#runs label.filter input")
    field.fill("gemma full")
    assert len(one.read_column(table, 1)) == 6
    assert one.page.locator("#runs output").inner_text() == "6 of 24"
    field.fill("")
    assert len(one.read_column(table, 1)) == 24
    assert one.complaints == []


def test_tables_are_plain_without_scripts(visit: Any, folder: Path) -> None:
    one = visit(folder / "report.html", java_script_enabled=False)
    assert one.page.locator("th button, label.filter").count() == 0
    one.page.locator("summary").get_by_text("Between single cells").click()
    assert one.page.locator("#table-effects-of-single-cells").is_visible()


def test_dark_and_light_have_enough_contrast(visit: Any, folder: Path) -> None:
    """Text against its page, by the formula of WCAG 2: at least 4.5."""
    names = ("h1", "a", ".sub", ".muted", "figcaption", "svg text", ".heat td b", ".warnings h3")
    script = """(names) => names.map((name) => {
      const style = getComputedStyle(document.querySelector(name));
      const fill = name.startsWith("svg") ? style.fill : style.color;
      return [name, fill, getComputedStyle(document.body).backgroundColor];
    })"""
    for scheme in ("light", "dark"):
        one = visit(folder / "report.html", color_scheme=scheme)
        for name, text, paper in one.page.evaluate(script, list(names)):
            assert find_contrast(text, paper) >= 4.5, f"{name} in {scheme}: {text} on {paper}"


def find_contrast(first: str, second: str) -> float:
    lights = sorted(map(find_luminance, (first, second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def find_luminance(color: str) -> float:
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_prints(visit: Any, folder: Path, tmp_path: Path) -> None:
    one = visit(folder / "report.html")
    one.page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
    one.page.emulate_media(media="print")
    assert not one.page.locator("nav").is_visible()
    assert one.complaints == []
