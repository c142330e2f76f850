"""Runs that share a GPU, by their estimates: how many of them fit."""

from __future__ import annotations

import pytest

from runner.engines.sharing import refuse_oversized
from runner.errors import RefusedError
from runner.launch.gpus import NamedGpu

MIB = 2**20
SIZES = {"g/a": 1000 * MIB, "g/b": 3000 * MIB, "g/c": 2000 * MIB, "g/d": 500 * MIB}


def refuse(memory_mib: int, per_gpu: int) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        refuse_oversized(SIZES, NamedGpu("0", memory_mib), per_gpu)
    return caught.value


def test_the_largest_count() -> None:
    assert refuse_oversized(SIZES, NamedGpu("0", 5000), 2) == (2, 5000 * MIB)
    assert refuse_oversized(SIZES, NamedGpu("0", 6500), 9) == (4, 6500 * MIB)
    for memory_mib, per_gpu, hint in ((4999, 2, "--per-gpu 1"), (6499, 9, "--per-gpu 3")):
        assert refuse(memory_mib, per_gpu).hint == hint
    assert "--device-gib 2  # even one may not fit" in (refuse(2999, 2).hint or "")


def test_the_largest_are_named_first_and_not_all_of_many() -> None:
    lines = refuse(100, 3).message.splitlines()
    assert lines[1:] == ["  2.93 GiB  g/b", "  1.95 GiB  g/c", "  1000.0 MiB  g/a"]
    many = {f"g/{number}": MIB for number in range(40)}
    with pytest.raises(RefusedError, match=r"\n  and 20 more") as caught:
        refuse_oversized(many, NamedGpu("MIG-1", 10), 30)
    assert caught.value.hint == "--per-gpu 10"
