"""The order of rows of several sources: prefixes hold the shares, fewer are a prefix of more."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.mixture import count_shares, interleave
from runner.errors import DataError

WEIGHTS = st.lists(
    st.one_of(
        st.integers(1, 10_000),
        st.floats(1e-3, 1e3, allow_nan=False),
        st.sampled_from([0.1, 0.2, 0.3, 0.7, 1, 1 / 3]),
    ),
    min_size=1,
    max_size=7,
)


@given(WEIGHTS, st.integers(0, 150))
def test_every_prefix_holds_the_shares_within_one_row(
    weights: list[int | float], count: int
) -> None:
    pools = [range(count) for _ in weights]
    rows = interleave(pools, weights, count)
    assert len(rows) == count
    exact = [Fraction(str(weight)) for weight in weights]
    taken = [0] * len(weights)
    for length, (source, row) in enumerate(rows, start=1):
        assert row == taken[source], "each source's rows come in their own order"
        taken[source] += 1
        for number, weight in zip(taken, exact, strict=True):
            assert abs(number - length * weight / sum(exact)) < 1
    assert taken == count_shares(weights, count)


@given(WEIGHTS, st.integers(0, 60), st.integers(0, 60))
def test_fewer_rows_are_a_prefix_of_more(weights: list[int | float], fewer: int, more: int) -> None:
    pools = [range(fewer + more) for _ in weights]
    rows = interleave(pools, weights, fewer + more)
    assert interleave(pools, weights, fewer) == rows[:fewer]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_counts_come_out_as_stated(counts: list[int]) -> None:
    assert count_shares(counts, sum(counts)) == counts
    assert len(interleave([range(count) for count in counts], counts, sum(counts))) == sum(counts)


def test_decimals_are_what_they_say() -> None:
    assert count_shares([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    assert count_shares([0.1, 0.2, 0.3], 600) == [100, 200, 300]


def test_a_source_that_runs_out_is_refused_and_never_topped_up() -> None:
    pools = [range(100), range(9), range(100)]
    with pytest.raises(DataError) as caught:
        interleave(pools, [1, 1, 2], 60, names=["a.jsonl", "b.jsonl", "c.jsonl"])
    assert caught.value.message.splitlines() == [
        "sources run out before there are 60 rows:",
        "  b.jsonl has 9 rows, its share of 60 is 15",
    ]
    largest = 38
    assert f"request {largest} rows or fewer" in str(caught.value.hint)
    assert len(interleave(pools, [1, 1, 2], largest)) == largest
    with pytest.raises(DataError):
        interleave(pools, [1, 1, 2], largest + 1)
