"""Orders the rows of several sources so that every prefix holds each source's share.

Pure and exact: shares are fractions, so every machine gets the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import TypeVar

from runner.errors import DataError
from runner.text import format_count

Row = TypeVar("Row")


def count_shares(weights: Sequence[int | float], count: int) -> list[int]:
    """The number of rows from each source among the first `count` rows.

    >>> count_shares([1, 1, 2], 60), count_shares([0.7, 0.3], 5)
    ([15, 15, 30], [4, 1])
    """
    shares = [0] * len(weights)
    for source in _order_sources(weights, count):
        shares[source] += 1
    return shares


def interleave(
    pools: Sequence[Sequence[Row]],
    weights: Sequence[int | float],
    count: int,
    *,
    names: Sequence[str] | None = None,
) -> list[tuple[int, Row]]:
    """`(source, row)` for `count` rows; each source keeps its own order.

    Among the first n rows, for any n, a source with the share w of all weights has more than
    n*w - 1 and fewer than n*w + 1 rows. Fewer rows are a prefix of more. `names` of the sources are
    for errors.

    >>> interleave(["abcd", "xy"], [2, 1], 6)
    [(0, 'a'), (0, 'b'), (1, 'x'), (0, 'c'), (0, 'd'), (1, 'y')]

    Raises:
        DataError: a source has fewer rows than its share; another source does not fill the gap.
    """
    order = _order_sources(weights, count)
    named = names or [f"source {number}" for number in range(1, len(pools) + 1)]
    short = [
        f"{name} has {format_count(len(pool), 'row')}, its share of {count} is"
        f" {order.count(source)}"
        for source, (name, pool) in enumerate(zip(named, pools, strict=True))
        if order.count(source) > len(pool)
    ]
    if short:
        largest = _count_possible(pools, order)
        raise DataError(
            f"sources run out before there are {format_count(count, 'row')}:\n"
            + "\n".join(f"  {line}" for line in short),
            hint=(
                f"request {format_count(largest, 'row')} or fewer,"
                " or lower the shares of these sources"
            ),
        )
    rows = [iter(pool) for pool in pools]
    return [(source, next(rows[source])) for source in order]


def _count_possible(pools: Sequence[Sequence[object]], order: Sequence[int]) -> int:
    """The length of the longest prefix of an order that the pools can fill."""
    num_left = [len(pool) for pool in pools]
    for position, source in enumerate(order):
        if num_left[source] == 0:
            return position
        num_left[source] -= 1
    return len(order)


def _order_sources(weights: Sequence[int | float], count: int) -> list[int]:
    """The source of each row, by the quota method of Balinski and Young (1975), which assigns seats
    one by one and never deviates from the exact share by a whole seat.

    The next row goes to the source whose next whole row is due first, among those that it would not
    put a whole row ahead of their share; ties go to the first source.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
    whole = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * whole) for weight in exact]
    total = sum(parts)
    taken = [0] * len(parts)
    due = [Fraction(1, part) for part in parts]  # when each source's next row is due
    order = []
    for number in range(1, count + 1):
        behind = [one for one, part in enumerate(parts) if taken[one] * total < part * number]
        source = min(behind, key=due.__getitem__)
        taken[source] += 1
        due[source] = Fraction(taken[source] + 1, parts[source])
        order.append(source)
    return order
