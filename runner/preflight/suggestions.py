"""Suggestions of `runner check` if the memory of a device is known: larger batches, and switching
off memory savings that are not needed.

Owns the choice of changes and the lines for a template. Nothing is written; `sizes` estimates the
needs of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from runner.preflight.sizes import Measures, find_longest, list_answered
from runner.preflight.survey import CheckedRun, group_runs
from runner.recipe.parse import Recipe, derive_answer_batch
from runner.recipe.schema import QuantizationOff

# Estimates can distinguish 12 GiB from 30, but not from 13.
_SHARE: Final = 0.8
_QUANTIZED: Final = {"4bit": "4 bits", "8bit": "8 bits"}


@dataclass(frozen=True)
class Plan:
    """Changes that a group of runs could share; None or False means no change."""

    micro_batch: int | None = None
    without_checkpointing: bool = False
    without_quantization: bool = False
    answer_batch: int | None = None

    def change(self, recipe: Recipe) -> Recipe:
        """The recipe with those changes that affect memory."""
        changed: dict[str, Any] = {}
        if self.micro_batch is not None:
            changed["per_device_train_batch_size"] = self.micro_batch
        if self.without_checkpointing:
            changed["gradient_checkpointing"] = False
        update: dict[str, Any] = {"training": recipe.training.model_copy(update=changed)}
        if self.without_quantization:
            update["quantization"] = QuantizationOff(method="none")
        return recipe.model_copy(update=update)


@dataclass(frozen=True)
class Suggestion:
    """Text about the runs of one grid."""

    lines: tuple[str, ...]
    runs: tuple[str, ...]


class _Search:
    """Searches the best common plan for several runs on a device of `device_bytes`."""

    def __init__(self, runs: Sequence[CheckedRun], measures: Measures, device_bytes: int) -> None:
        self._runs, self._largest = runs, _find_largest(runs)
        self._recipes = [run.recipe for run in runs]
        self._measures, self._device_bytes = measures, device_bytes
        self.plan = Plan()
        self.lines: list[str] = []

    def run(self) -> None:
        """Try each change in turn, on top of the accepted ones."""
        self._enlarge_micro_batch()
        alternative = self._switch_off_checkpointing()
        self._switch_off_quantization()
        self._enlarge_answers()
        self.lines += alternative

    def _enlarge_micro_batch(self) -> None:
        for size in self._list_micro_batches():
            if self._accept(Plan(micro_batch=size)):
                own = self._recipes[0].training.per_device_train_batch_size
                self.lines.append(
                    f"micro-batch {size} instead of {own}: {size / own:.3g} times fewer passes;"
                    f" {self._show(self.plan)}"
                )
                return

    def _list_micro_batches(self) -> Iterator[int]:
        """Yield larger micro-batches that keep every global batch, the largest first."""
        own = self._common([one.training.per_device_train_batch_size for one in self._recipes])
        if own is None:
            return
        shares = [one.global_batch_size // one.launch.num_processes for one in self._recipes]
        rows = [run.schedule.num_rows // run.recipe.launch.num_processes for run in self._runs]
        common = math.gcd(*shares)
        for size in range(min(common, *rows), own, -1):
            if common % size == 0:
                yield size

    def _switch_off_checkpointing(self) -> list[str]:
        """A line about a smaller micro-batch, if the largest leaves no memory for this."""
        if not self._common([one.training.gradient_checkpointing for one in self._recipes]):
            return []
        text = "gradient checkpointing off: no forward is computed twice"
        plan = replace(self.plan, without_checkpointing=True)
        if self._accept(plan):
            self.lines.append(f"{text}; {self._show(plan)}")
            return []
        for size in (*self._list_micro_batches(), None):
            other = replace(plan, micro_batch=size)
            if (size or 0) < (plan.micro_batch or 0) and self._fits(other):
                rows = f"micro-batch {size}" if size else "the micro-batch unchanged"
                return [f"or {rows} and {text}; {self._show(other)}"]
        return []

    def _switch_off_quantization(self) -> None:
        method = self._common([one.quantization.method for one in self._recipes])
        dtype = self._common([one.model.dtype for one in self._recipes])
        if method not in _QUANTIZED or dtype not in ("bfloat16", "float16"):
            return
        plan = replace(self.plan, without_quantization=True)
        if self._accept(plan):
            self.lines.append(
                f"{dtype} instead of {_QUANTIZED[method]}: no weight is unpacked;"
                f" {self._show(self.plan)}"
            )

    def _enlarge_answers(self) -> None:
        own = self._common([derive_answer_batch(one) for one in self._recipes])
        if own is None or not all(list_answered(one) for one in self._recipes):
            return
        most = max(_count_answers(run) for run in self._runs)
        sizes = [most, *(2**power for power in range(most.bit_length() - 1, 0, -1))]
        for size in sizes:
            if size <= own:
                return
            # The cache may hold something other than keys and values, which is not measured.
            try:
                needed = self._answer_bytes(size)
            except Exception:
                return
            if needed <= self._device_bytes * _SHARE:
                self.plan = replace(self.plan, answer_batch=size)
                fewer = math.ceil(most / own) / math.ceil(most / size)
                self.lines.append(
                    f"{size} answers at a time instead of {own}: {fewer:.3g} times fewer batches;"
                    f" about {self._of_device(needed)}"
                )
                return

    def _accept(self, plan: Plan) -> bool:
        fits = self._fits(plan)
        if fits:
            self.plan = plan
        return fits

    def _fits(self, plan: Plan) -> bool:
        return self._train_bytes(plan) <= self._device_bytes * _SHARE

    def _train_bytes(self, plan: Plan) -> int:
        return max(
            self._measures.estimate(run, plan.change(run.recipe)).total for run in self._largest
        )

    def _answer_bytes(self, batch_size: int) -> int:
        return max(
            self._measures.estimate_answers(run, self.plan.change(run.recipe), batch_size)
            for run in self._largest
        )

    def _show(self, plan: Plan) -> str:
        return f"about {self._of_device(self._train_bytes(plan))}"

    def _of_device(self, num_bytes: int) -> str:
        gib = num_bytes / 2**30
        return f"{gib:.{0 if gib >= 10 else 1}f} of {self._device_bytes / 2**30:.0f} GiB"

    @staticmethod
    def _common(values: Sequence[Any]) -> Any:
        """The value that all runs share; None if they differ, perhaps by an axis of the grid."""
        return values[0] if len(set(values)) == 1 else None


def _count_answers(run: CheckedRun) -> int:
    """The largest number of prompts of a split that a process answers."""
    stated = getattr(run.recipe.evaluation.generation, "num_samples", None)
    counts = [run.splits[split].num_rows for split in list_answered(run.recipe)]
    return math.ceil(
        max(min(count, stated or count) for count in counts) / run.recipe.launch.num_processes
    )


def find_suggestions(
    runs: Sequence[CheckedRun], measures: Measures, device_bytes: int
) -> Iterator[Suggestion]:
    """Yield one suggestion per grid that can be improved; `runs` have known sizes and train on such
    a device.
    """
    for grid, of_grid in group_runs(runs, lambda run: run.recipe.run.grid):
        lines: list[str] = []
        models = group_runs(of_grid, lambda run: run.recipe.model.path)
        searches = [_Search(of_model, measures, device_bytes) for _, of_model in models]
        for (path, _), search in zip(models, searches, strict=True):
            search.run()
            if search.lines:
                lines += [f"  {path}", *(f"    {line}" for line in search.lines)]
        if not lines:
            continue
        shared = searches[0]
        if len(models) > 1:
            shared = _Search(of_grid, measures, device_bytes)
            shared.run()
        head = f"suggestions for {grid}, from estimates, leaving a fifth of the memory free:"
        plans = [search.plan for search in searches]
        for line in (*_write_lines(grid, of_grid, shared.plan), *_describe_effects(plans)):
            lines.append(f"  {line}")
        yield Suggestion((head, *lines), tuple(run.name for run in of_grid))


def _find_largest(runs: Sequence[CheckedRun]) -> list[CheckedRun]:
    """The runs with the longest rows to train on and to answer, of each group that differs in rows
    only.
    """
    largest: dict[str, CheckedRun] = {}

    def settings_of(run: CheckedRun) -> str:
        recipe = run.recipe
        parts = (recipe.model, recipe.adapter, recipe.quantization, recipe.training)
        return f"{parts!r} {recipe.evaluation.generation!r} {recipe.launch!r}"

    for _, group in group_runs(runs, settings_of):
        for splits in (("train",), list_answered(group[0].recipe)):
            if splits:
                run = max(group, key=lambda one: max(find_longest(one, name) for name in splits))
                largest[run.name] = run
    return list(largest.values())


def _write_lines(grid: str, runs: Sequence[CheckedRun], plan: Plan) -> Iterator[str]:
    """Yield the changes to the grid's template that apply to every arm."""
    if plan == Plan():
        yield "no change fits all models of the grid"
        return
    path = Path("recipe_templates") / grid / "recipe.yaml.j2"
    where = path if path.exists() else f"the template of {grid}"
    yield f"for all arms, replace these keys in {where}:"
    if plan.micro_batch is not None or plan.without_checkpointing:
        yield "  training:"
    if plan.micro_batch is not None:
        yield f"    per_device_train_batch_size: {plan.micro_batch}"
        yield from _write_accumulation([run.recipe for run in runs], plan.micro_batch)
    if plan.without_checkpointing:
        yield "    gradient_checkpointing: false"
    if plan.without_quantization:
        yield "  quantization: {method: none}  # the whole section"
    if plan.answer_batch is not None:
        yield "  evaluation:"
        yield "    generation:"
        yield f"      batch_size: {plan.answer_batch}"


def _describe_effects(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the effects of the changes other than memory and time."""
    if any(plan.micro_batch is not None for plan in plans):
        yield (
            "another micro-batch keeps the digest, but rounding and dropout draws change the"
            " numbers slightly; completed runs stay, `runner launch RECIPE --fresh` restarts one"
        )
    if any(replace(plan, micro_batch=None) != Plan() for plan in plans):
        yield "changing checkpointing, quantization or the answer batch makes another experiment"
    yield "change all arms or none; these are estimates, so try one run first"


def _write_accumulation(recipes: Sequence[Recipe], micro_batch: int) -> Iterator[str]:
    """Yield the line that keeps the global batch, if the recipes do not state it directly."""
    own = recipes[0].training.per_device_train_batch_size
    stated = [one.training.gradient_accumulation_steps for one in recipes]
    first = stated[0]
    if first is None or None in stated:
        return
    if len(set(stated)) == 1:
        yield f"    gradient_accumulation_steps: {first * own // micro_batch}"
        return
    for axis in recipes[0].run.axes:
        if [one.run.axes.get(axis) for one in recipes] == stated:
            divided = f"{axis} // {micro_batch}" if own == 1 else f"{axis} * {own} // {micro_batch}"
            yield f"    gradient_accumulation_steps: {{{{ ({divided}) | yaml }}}}"
            return
    times = "" if own == 1 else f"{own} times "
    # Not a number, so that pasting it unchanged is refused.
    yield f"    gradient_accumulation_steps: {times}the current value, divided by {micro_batch}"
