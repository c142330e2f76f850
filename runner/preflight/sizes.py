"""The part of the preflight that knows of memory and disk: one measurement per kind of model, an
estimate per run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner.data.row_entries import MIN_STORED_ROWS
from runner.data.stored_rows import BYTES_PER_ROW, BYTES_PER_TOKEN
from runner.errors import RunnerError
from runner.model.memory import (
    ASSUMPTIONS,
    MemoryEstimate,
    Sharding,
    estimate_disk,
    estimate_memory,
    free_bytes,
    load_sharding,
)
from runner.model.size import (
    ActivationCurve,
    ModelSize,
    load_config,
    measure_model,
    trace_activations,
)
from runner.preflight.survey import CheckedRun, CheckResult, group_runs
from runner.recipe.parse import Recipe
from runner.text import format_bytes


@dataclass(frozen=True)
class RunSize:
    """What one run needs: `memory` on the device of each process, `disk_bytes` in all."""

    size: ModelSize
    sharding: Sharding
    memory: MemoryEstimate
    longest_row: int
    disk_bytes: int


def estimate_sizes(result: CheckResult) -> dict[str, RunSize]:
    """`run name -> size`; a run whose model cannot be measured is left out, with a warning."""
    sizes: dict[str, RunSize] = {}
    models: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for run in result.runs:
        recipe = run.recipe
        tokenizer = result.tokenizers[recipe.model.model_dump_json()].tokenizer
        try:
            config = _once(models, f"{recipe.model!r}", partial(load_config, recipe, tokenizer))
            size = _once(
                models,
                f"{recipe.model!r} {recipe.adapter!r} {recipe.quantization!r}",
                partial(measure_model, recipe, config),
            )
            curve = _once(
                curves,
                _activation_key(recipe),
                partial(
                    trace_activations, recipe, config, recipe.training.per_device_train_batch_size
                ),
            )
            sizes[run.name] = _estimate(run, size, curve)
        # A model's configuration and code are a stranger's program: anything can be raised.
        except Exception as error:
            text = (
                error.message
                if isinstance(error, RunnerError)
                else f"{type(error).__name__}: {error}"
            )
            result.warn(
                f"memory and disk of {recipe.model.path} are not estimated: {text}", run.name
            )
    return sizes


def _once(known: dict[str, Any], key: str, function: Callable[[], Any]) -> Any:
    if key not in known:
        try:
            known[key] = function()
        except Exception as error:
            known[key] = error
    if isinstance(known[key], Exception):
        raise known[key]
    return known[key]


def _activation_key(recipe: Recipe) -> str:
    training = recipe.training
    precision = (training.bf16, training.fp16, training.per_device_train_batch_size)
    return f"{recipe.model!r} {recipe.adapter!r} {precision}"


def _estimate(run: CheckedRun, size: ModelSize, curve: ActivationCurve) -> RunSize:
    sharding = load_sharding(run.recipe)
    longest_row = run.splits["train"].length_percentiles["max"]
    memory = estimate_memory(run.recipe, size, curve, sharding, longest_row)
    return RunSize(
        size, sharding, memory, longest_row, estimate_disk(run.recipe, size, sharding, run.schedule)
    )


def warn_of_shortage(
    result: CheckResult, sizes: Mapping[str, RunSize], finished: Iterable[str], output_root: Path
) -> None:
    """Warn where the runs that are not `finished` need more disk than is free, or more memory than
    the device has.
    """
    pending = [name for name in sizes if name not in set(finished)]
    rows = estimate_stored_rows([run for run in result.runs if run.name in pending])
    needed, free = rows + sum(sizes[name].disk_bytes for name in pending), free_bytes(output_root)
    for name in pending if needed > free else ():
        result.warn(
            f"the runs need up to {format_bytes(needed)} of disk, {format_bytes(free)} are free"
            f" under {output_root}: lower `checkpoints.keep_latest`, or name another --output-root",
            name,
        )
    device_bytes = find_device_bytes()
    for name, one in sizes.items():
        if (
            device_bytes is not None
            and not one.sharding.uses_cpu
            and one.memory.total > device_bytes
        ):
            result.warn(
                f"a process needs about {format_bytes(one.memory.total)} of device memory, the"
                f" device has {format_bytes(device_bytes)}",
                name,
            )


def estimate_stored_rows(runs: Iterable[CheckedRun]) -> int:
    """Bytes of the masked rows of large data that are kept below the output root, at most: runs of
    one tokenizer and the same rows share them.
    """
    by_entry: dict[str, int] = {}
    for run in runs:
        splits = run.splits.values()
        if sum(split.num_rows for split in splits) >= MIN_STORED_ROWS:
            key = f"{run.recipe.model!r} {run.recipe.data!r}"
            by_entry[key] = sum(
                BYTES_PER_TOKEN * split.num_tokens + BYTES_PER_ROW * split.num_rows
                for split in splits
            )
    return sum(by_entry.values())


def find_device_bytes() -> int | None:
    """The memory of the first GPU; None where there is none."""
    return (
        int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    )


def describe_sizes(runs: Sequence[CheckedRun], sizes: Mapping[str, RunSize]) -> Iterator[str]:
    """One line per kind of model, of its run that needs the most memory, and one about the disk."""
    measured = [run for run in runs if run.name in sizes]
    if not measured:
        return
    yield ""
    for _, group in group_runs(
        measured,
        lambda run: (run.recipe.model.path, sizes[run.name].size, load_sharding(run.recipe)),
    ):
        one = max(group, key=lambda run: sizes[run.name].memory.total)
        size, memory = sizes[one.name].size, sizes[one.name].memory
        batch = one.recipe.training.per_device_train_batch_size
        parts = {
            field.name: getattr(memory, field.name)
            for field in fields(memory)
            if field.name != "offloaded"
        }
        shown = " + ".join(
            f"{name} {format_bytes(value)}" for name, value in parts.items() if value
        )
        offloaded = f", {format_bytes(memory.offloaded)} of host memory" if memory.offloaded else ""
        yield (
            f"{one.recipe.model.path}, {size.num_base_parameters / 1e6:,.1f}M parameters,"
            f" {size.num_trained_parameters / 1e6:,.2f}M trained, {batch} x"
            f" {sizes[one.name].longest_row} tokens:"
            f" about {format_bytes(memory.total)} of memory a process{offloaded}"
        )
        yield f"  {shown}"
    disk = [sizes[run.name].disk_bytes for run in measured]
    rows = estimate_stored_rows(measured)
    of_rows = f", {format_bytes(rows)} for masked rows that runs share" if rows else ""
    yield (
        f"disk: up to {format_bytes(sum(disk) + rows)} for all runs,"
        f" {format_bytes(max(disk))} for the largest{of_rows}"
    )
    yield f"memory is an estimate, never measured on a device. It assumes: {'; '.join(ASSUMPTIONS)}"


def build_size_entry(one: RunSize) -> dict[str, Any]:
    """The part of one run in `runner check --json`."""
    return {
        "num_base_parameters": one.size.num_base_parameters,
        "num_trained_parameters": one.size.num_trained_parameters,
        "memory_bytes": {**asdict(one.memory), "total": one.memory.total},
        "longest_row": one.longest_row,
        "disk_bytes": one.disk_bytes,
    }
