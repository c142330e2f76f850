"""Compares the estimated memory of runs that share a GPU (`--per-gpu`) with the GPU's memory.

The estimates are those of `runner check`. They need torch and every row, so a separate process
(`runner.preflight.needs`) makes them, and a sweep of days keeps neither in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runner.errors import RefusedError
from runner.text import format_bytes, format_count

if TYPE_CHECKING:
    from runner.launch.gpus import NamedGpu
    from runner.plan.decide import Launch

_MIB: Final = 2**20
_MAX_SHOWN: Final = 10


@dataclass(frozen=True)
class Needs:
    """Bytes that a process of each run needs, and reasons for unknown ones; by full name."""

    num_bytes: Mapping[str, int]
    unknown: Mapping[str, str]


def require_memory(
    planned: Sequence[Launch], gpus: Sequence[NamedGpu], per_gpu: int, output_root: Path
) -> None:
    """Refuse `per_gpu` runs on a GPU if the largest planned ones need more than its memory, by
    estimate. Prints a note about runs that cannot be estimated.

    Raises:
        RefusedError: they do not fit; lists the runs, and the number that fits.
    """
    from runner.launch.placement import derive_resources

    on_gpu = [run for run in planned if derive_resources(run.recipe).num_gpus > 0]
    if not on_gpu:
        return
    known = [gpu for gpu in gpus if gpu.memory_mib is not None]
    if len(known) < len(gpus):
        names = ", ".join(gpu.name for gpu in gpus if gpu.memory_mib is None)
        _note(f"the memory of GPU {names} is unknown, so `--per-gpu {per_gpu}` is used unchecked")
    if not known:
        return
    needs = estimate_needs(on_gpu, output_root)
    if needs.unknown:
        first, why = next(iter(needs.unknown.items()))
        more = (
            f" and {format_count(len(needs.unknown) - 1, 'more run')}"
            if len(needs.unknown) > 1
            else ""
        )
        _note(
            f"the memory need of {first}{more} is not estimated, so `--per-gpu {per_gpu}` is used"
            f" unchecked for them: {why}"
        )
    if needs.num_bytes:
        smallest = min(known, key=lambda gpu: gpu.memory_mib or 0)
        num_runs, total = refuse_oversized(needs.num_bytes, smallest, per_gpu)
        _note(
            f"the {num_runs} largest runs need an estimated {format_bytes(total)} of the"
            f" {format_bytes(_MIB * (smallest.memory_mib or 0))} of GPU {smallest.name}"
            " (`runner check` lists the assumptions); memory of other programs is not counted"
        )


def refuse_oversized(num_bytes: Mapping[str, int], gpu: NamedGpu, per_gpu: int) -> tuple[int, int]:
    """The number of runs that may share a GPU, and the total bytes of the largest ones.

    Raises:
        RefusedError: the GPU has less memory.
    """
    memory = _MIB * (gpu.memory_mib or 0)
    largest = sorted(num_bytes.items(), key=lambda one: -one[1])[:per_gpu]
    total = sum(size for _, size in largest)
    if total <= memory:
        return len(largest), total
    fitting = 0
    while sum(size for _, size in largest[: fitting + 1]) <= memory:
        fitting += 1
    shown = [f"  {format_bytes(size)}  {name}" for name, size in largest[:_MAX_SHOWN]]
    if len(largest) > _MAX_SHOWN:
        shown.append(f"  and {len(largest) - _MAX_SHOWN} more")
    raise RefusedError(
        f"`--per-gpu {per_gpu}`: the largest runs that may share a GPU need an estimated"
        f" {format_bytes(total)}, but GPU {gpu.name} has {format_bytes(memory)}:\n"
        + "\n".join(shown),
        hint=(
            f"--per-gpu {fitting}"
            if fitting
            else f"runner check ... --device-gib {memory // 2**30}  # even one may not fit"
        ),
    )


def estimate_needs(runs: Sequence[Launch], output_root: Path) -> Needs:
    """The estimates, made by another process; none if it fails."""
    from runner.recipe.parse import dump_recipe

    request = {
        "recipes": [dump_recipe(run.recipe) for run in runs],
        "output_root": str(output_root),
    }
    # In this folder, where the recipes' relative paths start, and with this source.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "runner.preflight.needs", str(os.getpid())],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        why = f"`python -m runner.preflight.needs` ended with exit status {done.returncode}"
        return Needs({}, {run.full_name: why for run in runs})
    answer = json.loads(done.stdout)
    return Needs(answer["num_bytes"], answer["unknown"])


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
