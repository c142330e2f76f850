"""The order of rows: a permutation per epoch that depends on seed and epoch alone."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.sft.order import EpochSampler, order_rows

Strategy = Literal["random", "sequential", "group_by_length"]
STRATEGIES: tuple[Strategy, ...] = ("random", "sequential", "group_by_length")


def order(
    lengths: list[int],
    epoch: int = 0,
    seed: int = 1,
    batch: int = 4,
    strategy: Strategy = "group_by_length",
):
    return order_rows(lengths, global_batch_size=batch, seed=seed, epoch=epoch, strategy=strategy)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=150),
    batch=st.integers(1, 16),
    epoch=st.integers(0, 5),
    strategy=st.sampled_from(STRATEGIES),
)
def test_each_row_comes_once_and_the_order_is_reproducible(
    lengths: list[int], batch: int, epoch: int, strategy: Strategy
) -> None:
    found = order(lengths, epoch, batch=batch, strategy=strategy)
    assert sorted(found) == list(range(len(lengths)))
    random.seed(123)  # global random state plays no part
    assert order(lengths, epoch, batch=batch, strategy=strategy) == found


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_epochs_and_seeds_differ(strategy: Strategy) -> None:
    lengths = [random.Random(n).randint(5, 300) for n in range(64)]
    orders = [
        order(lengths, epoch, seed, strategy=strategy) for epoch in range(3) for seed in range(3)
    ]
    assert len({tuple(one) for one in orders}) == 9


def test_sequential_keeps_the_order_of_the_data() -> None:
    assert order([9, 1, 5], epoch=3, strategy="sequential") == [0, 1, 2]


def test_batches_hold_rows_of_similar_length_in_no_order_of_length() -> None:
    lengths = [random.Random(n).randint(1, 1000) for n in range(256)]
    batch_size = 4
    found = order(lengths, batch=batch_size)
    batches = [
        [lengths[row] for row in found[at : at + batch_size]] for at in range(0, 256, batch_size)
    ]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    shuffled = order(lengths, batch=batch_size, strategy="random")
    random_batches = [
        [lengths[row] for row in shuffled[at : at + batch_size]] for at in range(0, 256, batch_size)
    ]
    assert (
        spread < sum(max(batch) - min(batch) for batch in random_batches) / len(random_batches) / 4
    )
    means = [sum(batch) / batch_size for batch in batches]
    num_rising = sum(first < second for first, second in pairwise(means))
    assert len(means) / 4 < num_rising < 3 * len(means) / 4


def test_the_incomplete_batch_comes_last() -> None:
    lengths = list(range(1, 23))
    for epoch in range(20):
        batches = [order(lengths, epoch)[at : at + 4] for at in range(0, 22, 4)]
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
        assert all(max(batch) - min(batch) == len(batch) - 1 for batch in batches), (
            "no batch is cut in two"
        )


def test_sampler_follows_the_epoch_and_puts_padding_last() -> None:
    sampler = EpochSampler(
        [5, 6, 7, 8, 9], global_batch_size=2, seed=4, strategy="random", num_padding=3
    )
    epochs = []
    for epoch in (0, 1, 0):
        sampler.epoch = epoch
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert all(one[5:] == [5, 6, 7] and sorted(one) == list(range(8)) for one in epochs)
    assert len(sampler) == 8
