"""The order of training rows: a pure function of seed and epoch, the same for any number of
processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from torch.utils.data import Sampler

# Rows of similar length are gathered from pools of this many global batches.
_BATCHES_PER_POOL: Final = 8


class EpochSampler(Sampler[int]):
    """Row indices of one epoch; `epoch` is set before each epoch begins.

    The order depends on nothing that a kill could lose (no global random state), so a resumed epoch
    is the same epoch. The last `num_padding` indices are rows without labels that fill up the last
    batch of several processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        global_batch_size: int,
        seed: int,
        strategy: Literal["random", "sequential", "group_by_length"],
        num_padding: int = 0,
    ) -> None:
        self.epoch = 0
        self._lengths = lengths
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._strategy = strategy
        self._num_padding = num_padding

    def __len__(self) -> int:
        return len(self._lengths) + self._num_padding

    def __iter__(self) -> Iterator[int]:
        order = order_rows(
            self._lengths,
            global_batch_size=self._global_batch_size,
            seed=self._seed,
            epoch=self.epoch,
            strategy=self._strategy,
        )
        return iter([*order, *range(len(self._lengths), len(self))])


def order_rows(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    strategy: Literal["random", "sequential", "group_by_length"],
) -> list[int]:
    """A permutation of the rows.

    `group_by_length` shuffles, sorts pools of 8 global batches by length, and shuffles the batches,
    so batches hold rows of similar length in an order that says nothing about length. The
    incomplete batch, if any, stays last.
    """
    order = list(range(len(lengths)))
    if strategy == "sequential":
        return order
    generator = random.Random(f"{seed}:{epoch}")
    generator.shuffle(order)
    if strategy == "random":
        return order
    pool_size = global_batch_size * _BATCHES_PER_POOL
    batches: list[list[int]] = []
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda row: lengths[row])
        batches += [
            pool[at : at + global_batch_size] for at in range(0, len(pool), global_batch_size)
        ]
    incomplete = [batches.pop()] if len(batches[-1]) < global_batch_size else []
    generator.shuffle(batches)
    return [row for batch in [*batches, *incomplete] for row in batch]
