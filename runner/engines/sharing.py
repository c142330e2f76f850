"""Compares the runs that are to share a GPU (`--per-gpu`) with its memory, by estimates.

The estimates are those of `runner check`. They need torch and every row, and are made by a process
of their own (`runner.preflight.needs`), so that a sweep of days keeps neither.
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
from runner.text import format_bytes

if TYPE_CHECKING:
    from runner.launch.gpus import NamedGpu
    from runner.plan.decide import Launch

_MIB: Final = 2**20
_MAX_SHOWN: Final = 10


@dataclass(frozen=True)
class Needs:
    """Bytes of a process of each run, and why those of other runs are not known; by full name."""

    num_bytes: Mapping[str, int]
    unknown: Mapping[str, str]


def require_memory(
    planned: Sequence[Launch], gpus: Sequence[NamedGpu], per_gpu: int, output_root: Path
) -> None:
    """Refuse so many runs on a GPU, the largest of those that are planned, whose estimates are more
    than its memory; a note says what nobody could estimate.

    Raises:
        RefusedError: with the runs, and how many fit.
    """
    from runner.launch.placement import derive_resources

    on_gpu = [run for run in planned if derive_resources(run.recipe).num_gpus > 0]
    if not on_gpu:
        return
    known = [gpu for gpu in gpus if gpu.memory_mib is not None]
    if len(known) < len(gpus):
        names = ", ".join(gpu.name for gpu in gpus if gpu.memory_mib is None)
        _note(f"the memory of GPU {names} is not known, so `--per-gpu {per_gpu}` is taken as given")
    if not known:
        return
    needs = estimate_needs(on_gpu, output_root)
    if needs.unknown:
        first, why = next(iter(needs.unknown.items()))
        more = f" and {len(needs.unknown) - 1} more runs" if len(needs.unknown) > 1 else ""
        _note(
            f"the memory of {first}{more} is not estimated, so `--per-gpu {per_gpu}` is taken as"
            f" given for them: {why}"
        )
    if needs.num_bytes:
        smallest = min(known, key=lambda gpu: gpu.memory_mib or 0)
        num_runs, total = refuse_what_does_not_fit(needs.num_bytes, smallest, per_gpu)
        _note(
            f"the {num_runs} largest runs need about {format_bytes(total)} of the"
            f" {format_bytes(_MIB * (smallest.memory_mib or 0))} of GPU {smallest.name}, by"
            " estimates (`runner check` says what they assume); what other programs keep there is"
            " not counted"
        )


def refuse_what_does_not_fit(
    num_bytes: Mapping[str, int], gpu: NamedGpu, per_gpu: int
) -> tuple[int, int]:
    """How many runs may share a GPU, and the bytes that the largest of them need together.

    Raises:
        RefusedError: it has fewer.
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
        f"`--per-gpu {per_gpu}`: the largest runs that may share a GPU need about"
        f" {format_bytes(total)} by estimate, GPU {gpu.name} has {format_bytes(memory)}:\n"
        + "\n".join(shown),
        hint=(
            f"--per-gpu {fitting}"
            if fitting
            else f"runner check ... --device-gib {memory // 2**30}  # not one of them may fit"
        ),
    )


def estimate_needs(runs: Sequence[Launch], output_root: Path) -> Needs:
    """The estimates of another process; none where it fails."""
    from runner.recipe.parse import dump_recipe

    request = {
        "recipes": [dump_recipe(run.recipe) for run in runs],
        "output_root": str(output_root),
    }
    # From here, where the paths in the recipes lead from, and from this source.
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
