"""Estimates memory and disk: one measurement per kind of model, one estimate per run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from runner.data.row_entries import MIN_STORED_ROWS
from runner.data.stored_rows import BYTES_PER_ROW, BYTES_PER_TOKEN
from runner.errors import RunnerError
from runner.model.memory import (
    ASSUMPTIONS,
    MemoryEstimate,
    Sharding,
    estimate_answer_memory,
    estimate_disk,
    estimate_memory,
    free_bytes,
    load_sharding,
)
from runner.model.size import (
    ActivationCurve,
    ModelSize,
    extend_curve,
    load_config,
    measure_model,
    trace_activations,
    trace_cache,
)
from runner.preflight.survey import CheckedRun, CheckResult, group_runs
from runner.recipe.evaluation_section import GenerationOn
from runner.recipe.parse import Recipe, derive_answer_batch
from runner.text import format_bytes, format_count

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunSize:
    """Needs of one run: `memory` on the device of each process, `disk_bytes` in total."""

    size: ModelSize
    sharding: Sharding
    memory: MemoryEstimate
    longest_row: int
    disk_bytes: int
    answer_bytes: int | None = None  # of memory while answers are generated; None: not estimated


class Measures:
    """Measurements of models, each made once; an error is raised again on each call."""

    def __init__(self, result: CheckResult) -> None:
        self._tokenizers = result.tokenizers
        self._known: dict[str, Any] = {}

    def measure(self, recipe: Recipe) -> ModelSize:
        """The size of the model with its adapter and quantization."""
        key = f"size {recipe.model!r} {recipe.adapter!r} {recipe.quantization!r}"
        return self._once(key, lambda: measure_model(recipe, self._load_config(recipe)))

    def estimate(self, run: CheckedRun, recipe: Recipe | None = None) -> MemoryEstimate:
        """Estimate the peak of a training step on the run's longest row; `recipe` is a variant of
        the run's recipe.
        """
        recipe = recipe or run.recipe
        return estimate_memory(
            recipe,
            self.measure(recipe),
            self.trace(run, recipe, recipe.training.per_device_train_batch_size),
            self.load_sharding(recipe),
            find_longest(run, "train"),
        )

    def estimate_answers(self, run: CheckedRun, recipe: Recipe, batch_size: int) -> int:
        """Estimate the bytes of one process that answers `batch_size` prompts at a time. Whole rows
        count as prompts, although they contain the answer.
        """
        cache_token_bytes = self._once(
            f"cache {recipe.model!r}", lambda: trace_cache(recipe, self._load_config(recipe))
        )
        return estimate_answer_memory(
            recipe,
            self.measure(recipe),
            self.trace(run, recipe, batch_size),
            self.load_sharding(recipe),
            cache_token_bytes=cache_token_bytes,
            num_prompt_tokens=max(find_longest(run, split) for split in list_answered(recipe)),
            batch_size=batch_size,
        )

    def load_sharding(self, recipe: Recipe) -> Sharding:
        """The sharding of the model over the run's processes."""
        launch = recipe.launch
        key = f"sharding {launch.num_processes} {launch.accelerate_config}"
        return self._once(key, lambda: load_sharding(recipe))

    def trace(self, run: CheckedRun, recipe: Recipe, batch_size: int) -> ActivationCurve:
        """The memory that autograd keeps for `batch_size` rows. Traced for the run's micro-batch;
        for another batch, a second trace gives the increment per row.
        """
        own = run.recipe.training.per_device_train_batch_size
        less = self._trace(recipe, own)
        if batch_size == own:
            return less
        return extend_curve(less, self._trace(recipe, own + 1), batch_size - own)

    def _trace(self, recipe: Recipe, batch_size: int) -> ActivationCurve:
        training = recipe.training
        key = f"{recipe.model!r} {recipe.adapter!r} {training.bf16} {training.fp16} {batch_size}"
        return self._once(
            f"curve {key}",
            lambda: trace_activations(recipe, self._load_config(recipe), batch_size),
        )

    def _load_config(self, recipe: Recipe) -> Any:
        tokenizer = self._tokenizers[recipe.model.model_dump_json()].tokenizer
        return self._once(f"config {recipe.model!r}", lambda: load_config(recipe, tokenizer))

    def _once(self, key: str, function: Callable[[], Value]) -> Value:
        if key not in self._known:
            try:
                self._known[key] = function()
            except Exception as error:
                self._known[key] = error
        known: Any = self._known[key]
        if isinstance(known, Exception):
            raise known
        value: Value = known
        return value


def find_longest(run: CheckedRun, split: str) -> int:
    """Tokens of the longest row of a split."""
    return run.splits[split].length_percentiles["max"]


def list_answered(recipe: Recipe) -> tuple[str, ...]:
    """The splits for which answers are generated."""
    generation = recipe.evaluation.generation
    if not isinstance(generation, GenerationOn):
        return ()
    return ("test", "validation") if generation.during_training else ("test",)


def estimate_sizes(
    result: CheckResult, measures: Measures | None = None, *, with_answers: bool = False
) -> dict[str, RunSize]:
    """Run name -> size; a run whose model cannot be measured is left out with a warning.

    Answers need another trace of each model, which takes a second or two, so they are estimated
    only if they are compared with a device.
    """
    measures = measures or Measures(result)
    sizes: dict[str, RunSize] = {}
    for run in result.runs:
        # A model's configuration and code are third-party: they can raise anything.
        try:
            sizes[run.name] = _estimate(run, measures, with_answers=with_answers)
        except Exception as error:
            text = (
                error.message
                if isinstance(error, RunnerError)
                else f"{type(error).__name__}: {error}"
            )
            result.warn(
                f"memory and disk of {run.recipe.model.path} are not estimated: {text}", run.name
            )
    return sizes


def _estimate(run: CheckedRun, measures: Measures, *, with_answers: bool) -> RunSize:
    recipe, sharding = run.recipe, measures.load_sharding(run.recipe)
    size = measures.measure(recipe)
    answers = None
    if with_answers and list_answered(recipe):
        # The cache may not hold keys and values; the other estimates are still valid.
        with suppress(Exception):
            answers = measures.estimate_answers(run, recipe, derive_answer_batch(recipe))
    return RunSize(
        size,
        sharding,
        measures.estimate(run),
        find_longest(run, "train"),
        estimate_disk(recipe, size, sharding, run.schedule),
        answers,
    )


def warn_of_shortage(
    result: CheckResult,
    sizes: Mapping[str, RunSize],
    finished: Iterable[str],
    output_root: Path,
    device_bytes: int | None = None,
) -> None:
    """Warn if the runs that are not `finished` need more disk than is free, or more memory than the
    device has, if that is known.
    """
    pending = [name for name in sizes if name not in set(finished)]
    rows = estimate_stored_rows([run for run in result.runs if run.name in pending])
    needed, free = rows + sum(sizes[name].disk_bytes for name in pending), free_bytes(output_root)
    for name in pending if needed > free else ():
        result.warn(
            f"the runs need up to {format_bytes(needed)} of disk, but {format_bytes(free)} are free"
            f" under {output_root}: lower `checkpoints.keep_latest`, or use another --output-root",
            name,
        )
    for name, one in sizes.items():
        if device_bytes is None or one.sharding.uses_cpu:
            continue
        for num_bytes, what in ((one.memory.total, ""), (one.answer_bytes or 0, " for answers")):
            if num_bytes > device_bytes:
                result.warn(
                    f"a process needs about {format_bytes(num_bytes)} of device memory{what}, the"
                    f" device has {format_bytes(device_bytes)}",
                    name,
                )


def estimate_stored_rows(runs: Iterable[CheckedRun]) -> int:
    """Upper bound of the bytes of masked rows that are cached below the output root for large data.
    Runs with the same tokenizer and rows share them.
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
    """The memory of the first GPU; None if there is none."""
    return (
        int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    )


def describe_sizes(runs: Sequence[CheckedRun], sizes: Mapping[str, RunSize]) -> Iterator[str]:
    """Yield one line per kind of model, for its run with the most memory, and one about disk."""
    measured = [run for run in runs if run.name in sizes]
    if not measured:
        return
    yield ""
    for _, group in group_runs(
        measured,
        lambda run: (run.recipe.model.path, sizes[run.name].size, sizes[run.name].sharding),
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
            f" {format_count(sizes[one.name].longest_row, 'token')}:"
            f" about {format_bytes(memory.total)} of memory per process{offloaded}"
        )
        yield f"  {shown}"
        answers = [sizes[run.name].answer_bytes or 0 for run in group]
        if max(answers):
            most = group[answers.index(max(answers))].recipe
            yield (
                f"  and {format_count(derive_answer_batch(most), 'answer')} at a time:"
                f" about {format_bytes(max(answers))}"
            )
    disk = [sizes[run.name].disk_bytes for run in measured]
    rows = estimate_stored_rows(measured)
    of_rows = f", {format_bytes(rows)} for masked rows that runs share" if rows else ""
    yield (
        f"disk: up to {format_bytes(sum(disk) + rows)} for all runs,"
        f" {format_bytes(max(disk))} for the largest{of_rows}"
    )
    yield f"memory is an estimate, not a measurement. It assumes: {'; '.join(ASSUMPTIONS)}"


def build_size_entry(one: RunSize) -> dict[str, Any]:
    """The entry of one run in `runner check --json`."""
    return {
        "num_base_parameters": one.size.num_base_parameters,
        "num_trained_parameters": one.size.num_trained_parameters,
        "memory_bytes": {**asdict(one.memory), "total": one.memory.total},
        "longest_row": one.longest_row,
        "disk_bytes": one.disk_bytes,
        "answer_memory_bytes": one.answer_bytes,
    }
