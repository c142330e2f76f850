"""The numbers of the live view: speeds, time left, curves, texts that are safe to print."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.text import clean, cut, measure, pad
from runner.view.progress import (
    RunView,
    Speeds,
    count_steps_left,
    describe_time_left,
    draw_bar,
    draw_curve,
    estimate_time_left,
    is_left,
)
from tests.support.watch_views import RECIPE, make_failure, make_running, make_view

BATCH = RECIPE.global_batch_size


def completed(name: str, seconds: float, num_steps: int = 10) -> RunView:
    return make_view(
        "completed", {"model": name}, seconds=seconds, step=num_steps, max_steps=num_steps
    )


def test_what_is_left_takes_the_median_speed_of_completed_runs_over_the_running_ones() -> None:
    """Ten steps took 20, 30 and 900 s, so a step takes 3 s; 11 + 2 steps are left, on two runs at a
    time.
    """
    views = [completed("a", 20), completed("b", 30), completed("c", 900)]
    views += [
        make_view("running", {"model": "d"}, step=9, max_steps=11),
        make_view("pending", {"model": "e"}, max_steps=11),
    ]
    assert estimate_time_left(views).work_seconds == pytest.approx(2 * 3 + 11 * 3)
    assert estimate_time_left(views).clock_seconds == pytest.approx(2 * 3 + 11 * 3)
    views.append(make_view("running", {"model": "f"}, step=10, max_steps=11))
    assert estimate_time_left(views).clock_seconds == pytest.approx((2 * 3 + 11 * 3 + 3) / 2)
    assert describe_time_left(estimate_time_left(views), 3) == "about 21 s left"


def test_it_takes_at_least_as_long_as_the_longest_run_that_runs() -> None:
    views = [
        make_running({"model": "a"}, 10, 100, seconds_per_step=2.0),
        make_running({"model": "b"}, 99, 100, seconds_per_step=2),
    ]
    assert estimate_time_left(views).clock_seconds == pytest.approx(180)


def test_the_own_speed_of_a_run_comes_first() -> None:
    slow = make_running({"model": "slow"}, 10, 20, seconds_per_step=7.0)
    assert Speeds([completed("a", 30), slow]).seconds_left(slow) == pytest.approx(70)


def test_speeds_are_per_row_so_that_runs_with_other_batches_compare() -> None:
    other = make_view("pending", {"model": "a"}, max_steps=10)
    training = other.recipe.training.model_copy(update={"global_batch_size": 3 * BATCH})
    twice = type(other)(other.recipe.model_copy(update={"training": training}), other.status)
    assert Speeds([completed("b", 30)]).seconds_left(twice) == pytest.approx(3 * 30)


def test_another_model_tells_nothing() -> None:
    other = make_view("pending", {"model": "a"}, max_steps=10)
    model = other.recipe.model.model_copy(update={"path": "models/other"})
    other = type(other)(other.recipe.model_copy(update={"model": model}), other.status)
    left = estimate_time_left([completed("b", 30), other])
    assert left.clock_seconds is None
    assert (
        describe_time_left(left, 1)
        == "time left unknown: the speed of models/other is not known yet"
    )


def test_steps_come_from_the_recipe_until_the_run_says_them() -> None:
    """22 rows in batches of 4, twice."""
    assert count_steps_left(make_view("pending", {})) == 12
    assert count_steps_left(make_view("interrupted", {}, step=5, max_steps=30)) == 25
    data = RECIPE.data.model_copy(update={"num_train_samples": None})
    unknown = make_view("pending", {})
    unknown = type(unknown)(unknown.recipe.model_copy(update={"data": data}), unknown.status)
    assert count_steps_left(unknown) is None
    assert "does not state its number of steps" in describe_time_left(
        estimate_time_left([unknown]), 1
    )


def test_what_is_at_rest_takes_no_time() -> None:
    views = [
        completed("a", 30),
        make_view("failed", {"model": "b"}, **make_failure("data", "no rows")),
    ]
    assert estimate_time_left(views).work_seconds == 0
    assert [
        is_left(state)
        for state in ("completed", "failed", "changed", "running", "waiting", "of a later version")
    ] == [*(False, False, False, True, True, True)]


def test_work_without_anything_that_runs_has_no_end_by_the_clock() -> None:
    left = estimate_time_left(
        [completed("a", 600), make_view("pending", {"model": "b"}, max_steps=60)]
    )
    assert describe_time_left(left, 1) == "nothing runs; about 1 h 0 min of work left"
    assert describe_time_left(estimate_time_left([completed("a", 600)]), 0) == "nothing left to do"


@given(st.lists(st.floats(allow_nan=True), max_size=60), st.integers(-1, 40))
def test_a_curve_has_a_bar_per_step_or_fills_the_width(values: list[float], width: int) -> None:
    finite = [value for value in values if math.isfinite(value)]
    assert len(draw_curve(values, width)) == max(0, min(width, len(finite)))


@given(st.floats(-1, 2), st.integers(0, 50))
def test_a_bar_has_its_width_and_is_full_at_the_end_only(part: float, width: int) -> None:
    bar = draw_bar(part, width)
    assert len(bar) == width
    assert width == 0 or ("░" not in bar) == (part >= 1)


@given(st.text(), st.integers(0, 12))
def test_texts_are_cut_and_padded_to_a_width_and_never_command_the_terminal(
    text: str, width: int
) -> None:
    shown = clean(text)
    assert shown.isprintable() and "\x1b" not in shown
    assert measure(cut(shown, width)) <= width
    assert measure(pad(shown, width)) == width


def test_wide_characters_take_two_columns() -> None:
    assert measure("模型") == 4
    assert pad("模型", 4) == "模型" and pad("模型", 3) == "模…" and pad("模型", 2) == "… "
