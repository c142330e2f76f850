"""`runner check`: prints the findings of a survey as text or JSON (docs/preflight.md)."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from runner.data.draw import SPLITS
from runner.preflight.names import pin_recipes
from runner.preflight.survey import CheckedRun, CheckResult, check_recipes, group_runs
from runner.recipe.libraries import hide_libraries
from runner.recipe.parse import Recipe
from runner.text import align, format_count

if TYPE_CHECKING:
    from runner.preflight.sizes import RunSize

_MAX_NAMES: Final = 3


def print_check(
    recipes: Sequence[Recipe],
    output_root: Path,
    finished: Sequence[str],
    *,
    is_json: bool,
    allow_hint: str = "runner check --allow-code",
    device_gib: int | None = None,
) -> int:
    """Check and print. Returns 2 if a recipe cannot be trained as it is, else 0; warnings do not
    count.

    `finished` are runs (grid/name) that need no more disk; `allow_hint` is the command that allows
    the recipes' functions; `device_gib` is the memory of the target device, None for the local GPU,
    if there is one.
    """
    if not is_json:
        what = "recipe is" if len(recipes) == 1 else "recipes are"
        print(f"{len(recipes)} {what} well-formed", flush=True)
    pinned = pin_recipes(recipes, output_root)
    recipes = pinned.recipes
    result = check_recipes(recipes, output_root, allow_hint)
    for error, name in pinned.errors:
        result.fail(error, name)
    for text, name in pinned.warnings:
        result.warn(text, name)
    # A warning between PEFT and Transformers that no user can act on.
    warnings.simplefilter("ignore", FutureWarning)
    hide_libraries(("wandb",))  # TRL would import it; its installation was checked before
    from runner.preflight.trainer import check_trainers

    check_trainers(recipes, result)
    needs = _estimate_needs(result, output_root, finished, device_gib)
    if is_json:
        content = {**build_json(result, needs.sizes), "suggestions": needs.suggestions}
        print(json.dumps(content, indent=1))
        return 2 if result.errors else 0
    for line in format_result(result, needs.lines):
        print(line)
    for text, names in result.errors.items():
        print(f"\nerror: {name_runs(names)}: {text}", file=sys.stderr)
    num_failed = len({name for names in result.errors.values() for name in names})
    if num_failed:
        print(
            f"\n{num_failed} of {format_count(len(recipes), 'recipe')} cannot be"
            " trained as they are",
            file=sys.stderr,
        )
        return 2
    print(
        f"\n{format_count(len(recipes), 'recipe')} can be trained,"
        f" {format_count(len(result.warnings), 'warning')}"
    )
    return 0


@dataclass
class _Needs:
    """Memory and disk estimates and suggestions, for `--json` and as text."""

    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by run
    suggestions: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def _estimate_needs(
    result: CheckResult, output_root: Path, finished: Sequence[str], device_gib: int | None
) -> _Needs:
    needs = _Needs()
    if not result.runs:
        return needs
    from runner.preflight.sizes import (
        Measures,
        build_size_entry,
        describe_sizes,
        estimate_sizes,
        find_device_bytes,
        warn_of_shortage,
    )

    device_bytes = find_device_bytes() if device_gib is None else device_gib * 2**30
    measures = Measures(result)
    sizes = estimate_sizes(result, measures, with_answers=device_bytes is not None)
    warn_of_shortage(result, sizes, finished, output_root, device_bytes)
    needs.sizes = {name: build_size_entry(one) for name, one in sizes.items()}
    needs.lines = list(describe_sizes(result.runs, sizes))
    if device_bytes is not None:
        from runner.preflight.suggestions import find_suggestions

        on_device = [
            run
            for run in result.runs
            if run.name in sizes and not sizes[run.name].sharding.uses_cpu
        ]
        for one in find_suggestions(on_device, measures, device_bytes):
            needs.lines += ["", *one.lines]
            needs.suggestions.append({"text": "\n".join(one.lines), "runs": list(one.runs)})
        if device_gib is not None and not needs.suggestions:
            needs.lines += ["", f"no suggestions: {_explain_none(device_gib, sizes, on_device)}"]
    return needs


def _explain_none(
    device_gib: int, sizes: Mapping[str, RunSize], on_device: Sequence[CheckedRun]
) -> str:
    if not sizes:
        return "no model's size is known"
    if not on_device:
        return "`--device-gib` has no effect: the launch configs use the CPU"
    return f"no change would use {device_gib} GiB better"


def name_runs(names: Sequence[str]) -> str:
    """The first names of several.

    >>> name_runs(["a", "b", "c", "d", "e"])
    'a, b and 3 more'
    """
    if len(names) <= _MAX_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: _MAX_NAMES - 1])} and {len(names) - _MAX_NAMES + 1} more"


def format_result(result: CheckResult, size_lines: Sequence[str] = ()) -> Iterator[str]:
    """Yield a block per model, the updates of each kind of run, memory and disk, then the
    warnings.
    """
    for model_key, runs in group_runs(result.runs, lambda run: run.recipe.model.model_dump_json()):
        tokenizer = result.tokenizers[model_key]
        ends = " or ".join(tokenizer.end_tokens) or "plain text"
        own = tokenizer.tokenizer
        yield ""
        yield (
            f"{runs[0].recipe.model.path}, {format_count(len(runs), 'recipe')}: answers"
            f" end in {ends}, which is"
            f" trained; pad {own.pad_token}, eos {own.eos_token}"
        )
        yield from _tabulate_rows(runs)
        yield from dict.fromkeys(f"  left out: {line}" for run in runs for line in run.left_out)
        yield from dict.fromkeys(f"  {one.describe()}" for run in runs for one in run.metrics)
    if result.runs:
        yield ""
        for line, runs in group_runs(result.runs, _describe_schedule):
            yield f"{line}  [{len(runs)} runs]" if len(runs) > 1 else line
    yield from size_lines
    if result.unchecked:
        yield ""
        yield "not checked, because it needs the run's device or model:"
        for text, names in result.unchecked.items():
            yield f"  {text}  [{len(names)} runs]" if len(names) > 1 else f"  {text}"
    for kind, said in (("note", result.notes), ("warning", result.warnings)):
        yield from _list_said(kind, said, len(result.runs))


def _list_said(kind: str, said: Mapping[str, Sequence[str]], num_runs: int) -> Iterator[str]:
    for text, names in said.items():
        yield ""
        yield f"{kind}: {text}"
        if num_runs > 1:
            yield f"  {name_runs(names)}"


def _tabulate_rows(runs: Sequence[CheckedRun]) -> Iterator[str]:
    """Yield one line per split and source of rows. If runs use different counts, the lengths are
    those of the largest.
    """
    lines: dict[tuple[str, ...], list[str]] = {}
    # Shown if rows share a group (a document, an author): then groups are the random unit.
    splits = [facts for run in runs for facts in run.splits.values()]
    has_groups = any(facts.num_groups < facts.num_rows for facts in splits)
    for split in SPLITS:
        for (source, _), group in group_runs(runs, lambda run, split=split: _source_of(run, split)):
            by_count = {run.splits[split].num_rows: run.splits[split] for run in group}
            facts = by_count[max(by_count)]
            lengths = [str(length) for length in facts.length_percentiles.values()]
            counts = [f"{facts.num_truncated}", f"{facts.num_dropped}", f"{facts.num_tokens:,}"]
            answers = f"{facts.num_labels['completion']:,}"
            cells = [
                split,
                ", ".join(map(str, sorted(by_count))),
                *([f"{facts.num_groups}"] if has_groups else []),
                *lengths,
                *counts,
                answers,
                source,
            ]
            lines.setdefault(tuple(cells), cells)  # arms often share validation and test rows
    header = [
        "split",
        "rows",
        *(["groups"] if has_groups else []),
        "p50",
        "p90",
        "p95",
        "p99",
        "max",
        "cut",
        "dropped",
        "tokens",
        "completion",
        "from",
    ]
    for line in align([header, *lines.values()], left=[0, len(header) - 1]):
        yield f"  {line}"


def _source_of(run: CheckedRun, split: str) -> tuple[str, str]:
    """The files of a split's rows, and everything that selects rows except `num_train_samples`."""
    data = run.recipe.data
    own = getattr(data, split)
    sources = data.train_sources if split == "train" or own is None else (own,)
    named = ", ".join(source.path for source in sources)
    return named, data.model_copy(update={"num_train_samples": None}).model_dump_json()


def _describe_schedule(run: CheckedRun) -> str:
    schedule = run.schedule
    last = ""
    if schedule.last_batch_rows < schedule.global_batch_size:
        weight = schedule.global_batch_size / schedule.last_batch_rows
        last = (
            f", the last of {format_count(schedule.last_batch_rows, 'row')}, each of which counts"
            f" {weight:.3g}"
            " times as much"
        )
    return (
        f"{format_count(schedule.num_rows, 'row')} at a global batch of"
        f" {schedule.global_batch_size}:"
        f" {format_count(schedule.updates_per_epoch, 'update')} an epoch{last};"
        f" {schedule.num_epochs:g} epoch{'' if schedule.num_epochs == 1 else 's'},"
        f" {format_count(schedule.num_updates, 'update')},"
        f" {schedule.num_warmup_updates} of warm-up,"
        f" {format_count(schedule.num_evaluations, 'evaluation')},"
        f" {format_count(schedule.num_checkpoints, 'checkpoint')}"
    )


def build_json(
    result: CheckResult, sizes: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, Any]:
    """The whole result, one entry per run; `size` is null if the model could not be measured."""
    runs = []
    for run in result.runs:
        tokenizer = result.tokenizers[run.recipe.model.model_dump_json()]
        runs.append(
            {
                "run": run.name,
                "axes": dict(run.recipe.run.axes),
                "model": run.recipe.model.path,
                "loss": run.recipe.loss,
                "splits": {split: asdict(facts) for split, facts in run.splits.items()},
                "left_out": list(run.left_out),
                "metrics": [asdict(one) for one in run.metrics],
                "schedule": asdict(run.schedule),
                "end_of_turn": list(tokenizer.end_tokens),
                "pad_token": tokenizer.tokenizer.pad_token,
                "eos_token": tokenizer.tokenizer.eos_token,
                "size": sizes.get(run.name),
            }
        )
    return {
        "num_recipes": result.num_recipes,
        "runs": runs,
        "notes": [{"text": text, "runs": names} for text, names in result.notes.items()],
        "warnings": [{"text": text, "runs": names} for text, names in result.warnings.items()],
        "errors": [{"text": text, "runs": names} for text, names in result.errors.items()],
        "not_checked": [{"text": text, "runs": names} for text, names in result.unchecked.items()],
    }
