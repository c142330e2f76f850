"""The live view, exactly; `UPDATE_GOLDEN=1 pytest tests/view/test_screen.py` rewrites
`golden/watch_*.txt`.
"""

from __future__ import annotations

import os
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.text import measure
from runner.view.progress import ASCII, UNICODE, Glyphs, RunView
from runner.view.screen import Screen, group_troubles, share_lines
from tests.conftest import ROOT
from tests.support.watch_views import make_failure, make_grid, make_running, make_view

GOLDEN: Final = ROOT / "tests" / "golden"
NOW: Final = "10:31:05"


def draw(
    views: list[RunView], width: int, height: int | None, glyphs: Glyphs = UNICODE
) -> list[str]:
    lines = Screen(views, glyphs).draw(views, width=width, height=height, now=NOW)
    return ["".join(text for text, _ in line) for line in lines]


def cell(number: int) -> dict[str, str | int]:
    """One of the 3 x 2 x 2 cells of the demo."""
    return {
        "model": ("gemma", "llama", "mistral")[number // 4],
        "loss": ("completion", "full")[number // 2 % 2],
        "num_train_samples": (60, 180)[number % 2],
    }


def a_sweep() -> list[RunView]:
    """Twelve runs in different states."""
    done = {"step": 12, "max_steps": 12, "seconds": 66.0}
    oom = make_failure("out_of_memory", "CUDA out of memory. Tried to allocate 2.50 GiB")
    lost = make_failure(
        "lost", "the training process died (exit status -9) without an error message"
    )
    log = "runs/demo/gemma_full_60/attempts/2/log.txt"
    return [
        *(make_view("completed", cell(number), **done) for number in range(2)),
        make_view(
            "failed",
            cell(2),
            **oom,
            log_path=log,
            hint="lower training.per_device_train_batch_size",
            num_attempts=2,
        ),
        make_running(cell(3), 43, 92, seconds_per_step=1.5),
        make_running(cell(4), 7, 32, seconds_per_step=2.5, num_attempts=3),
        make_view("running", cell(5), why="loading"),
        make_view(
            "failed",
            cell(6),
            **lost,
            retry="retry 1 of 3 in 20 s, if its sweep is still running",
            log_path="runs/demo/llama_full_60/attempts/1/log.txt",
        ),
        make_view("interrupted", cell(7), step=4, max_steps=12),
        make_view(
            "changed",
            cell(8),
            why='the recipe changed since the run was made: loss: "full" -> "completion"',
        ),
        make_view("queued", cell(9)),
        make_view("of a later version", cell(10)),
        make_view("pending", cell(11)),
    ]


@pytest.mark.parametrize(
    ("name", "width", "height", "glyphs"),
    [
        ("watch_100", 100, None, UNICODE),
        ("watch_60x18", 60, 18, UNICODE),
        ("watch_ascii", 100, None, ASCII),
        ("watch_140x50", 140, 50, UNICODE),
    ],
)
def test_the_screen_exactly(name: str, width: int, height: int | None, glyphs: Glyphs) -> None:
    text = "\n".join(draw(a_sweep(), width, height, glyphs)) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "UPDATE_GOLDEN=1 rewrites it"
    assert glyphs is UNICODE or text.isascii()


def test_the_documentation_shows_that_very_screen() -> None:
    page = (GOLDEN.parent.parent / "docs" / "watching.md").read_text()
    assert (GOLDEN / "watch_100.txt").read_text() in page


def test_blank_lines_and_hints_are_left_out_before_a_run_is() -> None:
    for height in (24, 20):
        lines = draw(a_sweep(), 60, height)
        assert ("" in lines) == (height == 24)
        assert not any(" more " in line for line in lines)


def test_one_run_has_a_screen_too() -> None:
    lines = draw([make_running({}, 3, 4, seconds_per_step=1)], 80, 20)
    assert lines[0].startswith("demo/only") and "▶ running 1" in lines[1] and "1 s left" in lines[2]


def test_several_grids_have_a_table_each() -> None:
    views = make_grid(["pending"], "first", a=[1, 2], b=[1, 2]) + make_grid(
        ["running"], "second", c=["x", "y"]
    )
    text = "\n".join(draw(views, 80, None))
    assert "first, second: 6 runs" in text
    assert (
        text.index("\nfirst")
        < text.index("b  1  2")
        < text.index("\nsecond")
        < text.index("\nx  ▶")
    )


def test_alike_failures_are_told_once() -> None:
    failure = make_failure("out_of_memory", "CUDA out of memory")
    views = [make_view("failed", {"n": number}, **failure) for number in range(40)]
    views.append(make_view("failed", {"n": 99}, **make_failure("data", "no rows\nsecond line")))
    assert [(trouble.what, len(trouble.views)) for trouble in group_troubles(views)] == [
        ("out_of_memory: CUDA out of memory", 40),
        ("data: no rows", 1),
    ]
    assert "✗ 0 and 39 more  out_of_memory: CUDA out of memory" in draw(views, 80, None)


def test_inputs_and_pushes_that_need_a_look_are_told() -> None:
    views = [make_view("pending", {"n": n}, inputs_missing=("data.jsonl",)) for n in range(3)]
    views.append(make_view("completed", {"n": 4}, push_to="lab/a", push_failure="403"))
    views.append(make_view("running", {"n": 5}, inputs_touched=("models/toy",)))
    views.append(make_view("completed", {"n": 6}, is_model_removed=True))
    views.append(make_view("changed", {"n": 7}, why="loss changed", push_to="lab/b"))
    lines = draw(views, 100, None)
    assert lines[-4:] == [
        "▶ 5  inputs not verified (touched since): models/toy",
        "≠ 7  loss changed; push to lab/b is pending",
        "· 0 and 2 more  inputs missing: data.jsonl",
        "✓ 4  push to lab/a failed: 403",
    ]


def test_what_a_library_says_cannot_command_the_terminal() -> None:
    message = "\x1b[2J\x1b]0;owned\x07 bad\r\u202e"
    views = [
        make_view(
            "failed",
            {"n": "\x1b[31m"},
            name="first",
            hint=message,
            log_path=message,
            **make_failure("crashed", message),
        )
    ]
    views.append(make_view("running", {"n": 2}, name="second", why=message, max_steps=3))
    assert all(line.isprintable() for line in draw(views, 200, None))


@given(
    st.lists(
        st.sampled_from(["completed", "running", "failed", "waiting", "pending", "?"]),
        min_size=1,
        max_size=80,
    ),
    st.integers(20, 150),
    st.integers(4, 60),
)
@settings(max_examples=100, deadline=None)
def test_a_screen_keeps_to_its_size_and_hides_nothing_without_saying_so(
    states: list[str], width: int, height: int
) -> None:
    views = [
        make_running({"n": number}, 3, 9, seconds_per_step=1)
        if state == "running"
        else make_view(state, {"n": number}, why=f"{state} for the reason {number}")
        for number, state in enumerate(states)
    ]
    lines = draw(views, width, height)
    assert len(lines) <= height
    assert all(measure(line) <= width for line in lines)
    num_running = states.count("running")
    if height >= 15 and num_running:
        shown = sum(line.startswith("▶") and "3/9" in line for line in lines)
        hidden = [
            int(line.split()[1])
            for line in lines
            if line.endswith("more running") or "more running" in line
        ]
        assert shown + sum(hidden) == num_running


@given(st.integers(-5, 100), st.lists(st.integers(0, 60), max_size=5))
def test_lines_are_shared_fully_and_fairly(room: int, needs: list[int]) -> None:
    shares = share_lines(room, needs)
    assert all(0 <= share <= need for share, need in zip(shares, needs, strict=True))
    assert sum(shares) == max(0, min(room, sum(needs)))
    for share, need in zip(shares, needs, strict=True):
        assert share == need or share >= max(shares) - 1, (
            "nobody goes short for the sake of one who has more"
        )
