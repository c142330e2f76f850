"""The order of rows: a permutation per epoch that depends on seed and epoch alone."""

from __future__ import annotations

import random
from itertools import chain, pairwise
from typing import Literal

import pytest
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from runner.sft.order import EpochSampler, hash_order, order_rows

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


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=40),
    per_device=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    num_processes=st.integers(1, 4),
    drops_last=st.booleans(),
    strategy=st.sampled_from(STRATEGIES),
)
def test_batches_are_what_the_ranks_train_together(
    lengths: list[int],
    per_device: int,
    accumulation: int,
    num_processes: int,
    drops_last: bool,
    strategy: Strategy,
) -> None:
    """The ranks read by the loader of torch and accelerate, as Transformers does: in micro-batches,
    some of which make a step; what is left at the end of an epoch makes one too.
    """
    is_alone = num_processes == 1
    num_rows, per_pass = len(lengths), per_device * num_processes
    num_padding = 0 if is_alone else -num_rows % per_pass
    sampler = EpochSampler(
        lengths,
        global_batch_size=per_pass * accumulation,
        seed=3,
        strategy=strategy,
        num_padding=num_padding,
    )
    num_dropped = num_rows % per_device if drops_last and is_alone else 0
    trained = []
    for epoch in range(3):
        sampler.epoch = epoch
        passes = zip(
            *(
                read_as_rank(sampler, rank, num_processes, per_device, drops_last)
                for rank in range(num_processes)
            ),
            strict=True,
        )
        together = [list(chain.from_iterable(one)) for one in passes]
        for start in range(0, len(together), accumulation):
            step = chain.from_iterable(together[start : start + accumulation])
            trained.append([row for row in step if row < num_rows])
    if num_rows == num_dropped:
        assert list(sampler.list_batches(5, num_dropped)) == []
        return
    assert list(sampler.list_batches(len(trained), num_dropped)) == trained
    assert list(sampler.list_batches(2, num_dropped)) == trained[:2], "as an early stop leaves it"


def read_as_rank(
    sampler: EpochSampler, rank: int, num_processes: int, per_device: int, drops_last: bool
) -> list[list[int]]:
    loader = DataLoader(
        range(len(sampler)), batch_size=per_device, sampler=sampler, drop_last=drops_last
    )
    shared = prepare_data_loader(
        loader, num_processes=num_processes, process_index=rank, put_on_device=False
    )
    return [batch.tolist() for batch in shared]


def test_the_hash_of_an_order_tells_rows_their_order_and_where_steps_end() -> None:
    ids = ["a", "b", "c", "d"]
    orders = (
        [[0, 1], [2, 3]],
        [[1, 0], [2, 3]],
        [[2, 3], [0, 1]],
        [[0, 1, 2, 3]],
        [[0, 1], [2]],
        [[0], [1], [2], [3]],
    )
    assert len({hash_order(order, ids) for order in orders}) == len(orders)
    assert hash_order([[3, 2], [1, 0]], ids[::-1]) == hash_order(orders[0], ids)
    lengths = [5, 3, 8, 6, 9]
    hashes = set()
    for num_padding in (0, 3):  # of several processes
        sampler = EpochSampler(
            lengths, global_batch_size=2, seed=4, strategy="random", num_padding=num_padding
        )
        hashes.add(hash_order(sampler.list_batches(7), [*ids, "e"]))
    assert len(hashes) == 1
