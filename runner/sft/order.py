"""The order of training rows: a pure function of seed and epoch, the same for any number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Final, Literal

from torch.utils.data import Sampler

# Rows of similar length are grouped within pools of this many global batches.
_BATCHES_PER_POOL: Final = 8


class EpochSampler(Sampler[int]):
    """Row indices of one epoch; `epoch` is set before each epoch begins.

    The order uses no state that a kill could lose, such as the global random state, so a resumed
    epoch has the same order. The last `num_padding` indices are rows without labels. They fill up
    the last batch if there are several processes.
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
        return iter([*self._order(self.epoch), *range(len(self._lengths), len(self))])

    def list_batches(self, num_steps: int, num_dropped: int = 0) -> Iterator[list[int]]:
        """The rows of each optimizer step, without padding. Rows of all ranks and micro-batches are
        in the order of the sampler, so the result depends on the global batch alone.

        `num_dropped` rows at the end of each epoch are not trained (`dataloader_drop_last`).
        """
        return islice(self._list_all_batches(num_dropped), num_steps)

    def _list_all_batches(self, num_dropped: int) -> Iterator[list[int]]:
        size, num_rows = self._global_batch_size, len(self._lengths) - num_dropped
        for epoch in count() if num_rows > 0 else ():
            order = self._order(epoch)
            for start in range(0, num_rows, size):
                yield order[start : min(start + size, num_rows)]

    def _order(self, epoch: int) -> list[int]:
        return order_rows(
            self._lengths,
            global_batch_size=self._global_batch_size,
            seed=self._seed,
            epoch=epoch,
            strategy=self._strategy,
        )


def hash_order(batches: Iterable[Sequence[int]], ids: Sequence[str]) -> str:
    """SHA-256 of the row ids of each step, a line of compact JSON for each.

    >>> hash_order([[1, 0], [1]], ["a", "b"]) == hashlib.sha256(b'["b","a"]\\n["b"]\\n').hexdigest()
    True
    """
    digest = hashlib.sha256()
    for batch in batches:
        line = json.dumps([ids[row] for row in batch], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def order_rows(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    strategy: Literal["random", "sequential", "group_by_length"],
) -> list[int]:
    """A permutation of the rows.

    `group_by_length` shuffles, sorts pools of 8 global batches by length, and shuffles the batches.
    A batch then holds rows of similar length, and the order of batches does not depend on length.
    The incomplete batch, if any, stays last.
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
