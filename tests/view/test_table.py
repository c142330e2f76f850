"""The grid as a table: every run is in it or counted as hidden, for any axes and any size of the
screen.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.recipe.schema import Scalar
from runner.text import measure
from runner.view.progress import ASCII, UNICODE, RunView
from runner.view.screen import GridTable, Line
from tests.support.watch_views import make_grid, make_view

STATES = (
    "completed",
    "running",
    "failed",
    "waiting",
    "pending",
    "interrupted",
    "changed",
    "a new one",
)


def texts(lines: Sequence[Line]) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


def draw(views: list[RunView], width: int = 100, height: int = 24) -> str:
    return "\n".join(texts(GridTable(views).draw(views, width, height)))


def test_two_axes_are_rows_and_columns() -> None:
    views = make_grid(
        ["completed", "running", "pending"], model=["gemma", "phi"], size=[60, 120, 180]
    )
    assert draw(views).splitlines() == [
        " size  60   120  180",
        "model",
        "gemma  ✓    ▶    ·",
        "phi    ✓    ▶    ·",
    ]


def test_numbers_are_ordered_by_size_and_words_as_they_come() -> None:
    views = make_grid(["pending"], model=["phi", "gemma"], size=[180, 60, 120])
    assert draw(views).splitlines() == [
        " size  60   120  180",
        "model",
        "phi    ·    ·    ·",
        "gemma  ·    ·    ·",
    ]


def test_more_axes_move_into_the_columns_when_the_screen_is_low() -> None:
    views = make_grid(
        ["pending"],
        model=["a", "b", "c"],
        loss=["full", "completion"],
        size=[60, 120, 180],
        seed=[1, 2],
    )
    lines = {height: draw(views, 100, height).count("\n") + 1 for height in (40, 14, 9, 8, 7)}
    assert lines == {40: 20, 14: 9, 9: 9, 8: 7, 7: 7}, "never cut while another layout fits"
    assert "more rows" not in draw(views, 100, 7)
    assert "more rows" in draw(views, 28, 7)
    assert draw(views, 100, 4).splitlines()[2].startswith("a"), "a header alone says nothing"


def test_the_last_axes_are_columns_as_few_as_fit() -> None:
    views = make_grid(["pending"], model=["a", "b"], loss=["full", "part"], size=[60, 120])
    assert draw(views, 100, 6).splitlines() == [
        "       size  60   120",
        "model  loss",
        "a      full  ·    ·",
        "       part  ·    ·",
        "b      full  ·    ·",
        "       part  ·    ·",
    ]
    assert draw(views, 100, 5).splitlines() == [
        " loss  full      part",
        " size  60   120  60   120",
        "model",
        "a      ·    ·    ·    ·",
        "b      ·    ·    ·    ·",
    ]
    narrow = draw(views, 20, 12).splitlines()
    assert narrow[:2] == ["model  loss  size", "a      full  60    ·"], "no room for columns"


def test_long_labels_are_cut_before_a_run_is_lost() -> None:
    views = make_grid(
        ["running"], a_model_with_a_long_name=["the first of them", "the second"], size=[60, 120]
    )
    assert draw(views, 24).splitlines() == [
        "        size  60   120",
        "a_model…name",
        "the fir…them  ▶    ▶",
        "the second    ▶    ▶",
    ]


def test_axes_of_one_value_stand_in_the_title() -> None:
    table = GridTable(make_grid(["pending"], model=["gemma"], size=[60, 120], is_new=[True]))
    assert table.title == "model gemma  is_new true"


def test_runs_without_axes_are_told_apart_by_name() -> None:
    views = [make_view("completed", {}, name="first"), make_view("failed", {}, name="second")]
    assert draw(views) == "run\nfirst   ✓\nsecond  ✗"
    assert draw(views, 100, 2) == "run\n… 2 more rows: 1 completed, 1 failed"


def test_runs_of_one_cell_show_the_most_urgent_and_how_many() -> None:
    views = make_grid(["completed"], model=["a", "b"]) + [
        make_view("failed", {"model": "a"}, name="a--again")
    ]
    assert draw(views) == "model\na      ✗2\nb      ✓"


def test_a_cell_without_a_run_is_empty() -> None:
    views = make_grid(["completed"], model=["a", "b"], size=[1, 2])[1:]
    assert draw(views).splitlines() == [
        " size  1  2",
        "model",
        "a         ✓",
        "b      ✓  ✓",
    ]


def test_what_runs_or_failed_is_hidden_last() -> None:
    states = ["completed"] * 40
    states[17], states[33] = "running", "failed"
    shown = draw(
        make_grid(states, model=[f"m{number:02}" for number in range(40)], size=[1]), 12, 5
    )
    assert shown == "model\nm00    ✓\nm17    ▶\nm33    ✗\n… 37 more r…"


def test_states_are_told_apart_without_color() -> None:
    for glyphs in (UNICODE, ASCII):
        symbols = list(glyphs.states.values())
        assert len(set(symbols)) == len(symbols) and glyphs.unknown not in symbols
        assert all(measure(symbol) == 1 for symbol in symbols)
    assert "".join(ASCII.states.values()).isascii()


VALUES = st.lists(
    st.one_of(st.integers(-9, 999), st.text(max_size=9), st.booleans(), st.floats(0, 1)),
    min_size=1, max_size=5, unique_by=lambda value: str(value).lower(),
)  # fmt: skip


@st.composite
def grids(draw: st.DrawFn) -> list[RunView]:
    axes: Mapping[str, list[Scalar]] = {
        f"axis{n}": draw(VALUES) for n in range(draw(st.integers(0, 6)))
    }
    cells = list(itertools.islice(itertools.product(*axes.values()), 200))
    kept = draw(st.lists(st.sampled_from(cells), min_size=1, max_size=60))
    return [
        make_view(
            draw(st.sampled_from(STATES)), dict(zip(axes, cell, strict=True)), name=f"run-{number}"
        )
        for number, cell in enumerate(kept)
    ]


@given(grids(), st.integers(1, 200), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_every_run_is_shown_or_counted_within_the_size(
    views: list[RunView], width: int, height: int
) -> None:
    table = GridTable(views)
    lines = table.draw(views, width, height)
    assert len(lines) <= height
    assert all(measure(text) <= width for text in texts(lines))
    wide = texts(table.draw(views, 10_000, height))
    hidden = re.search(r"… \d+ more rows: (.*)", wide[-1])
    num_hidden = sum(map(int, re.findall(r"(\d+) ", hidden[1]))) if hidden else 0
    cells = [
        text.strip()
        for line in table.draw(views, 10_000, height)
        for text, style in line
        if style not in ("", "dim") and text.strip()
    ]
    num_shown = sum(int(cell[1:] or 1) for cell in cells)
    if len(wide) > 1:
        assert num_shown + num_hidden == len(views)


@pytest.mark.parametrize("num_axes", [1, 2, 3, 6, 9])
def test_a_thousand_runs_fit_a_small_screen(num_axes: int) -> None:
    sizes = {1: [1000], 2: [25, 40], 3: [10] * 3, 6: [3, 3, 3, 3, 3, 4], 9: [2] * 9 + [2]}[num_axes]
    views = make_grid(
        STATES, **{f"axis{number}": list(range(size)) for number, size in enumerate(sizes)}
    )[:1000]
    assert len(draw(views, 80, 20).splitlines()) <= 20
