"""The data part of `runner check`: one pass over the distinct pairs of model and data, not one per recipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from runner.errors import RunnerError
from runner.recipe import Recipe
from runner.sft.data import SPLITS, Samples, Split, build_samples, draw_splits
from runner.sft.tokenizers import load_tokenizer

Value = TypeVar("Value")


class _Once:
    """Calls a function once per key, and gives its value, or raises its error, as often as asked."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Any] = {}

    def __call__(self, key: str, function: Callable[[], Value]) -> Value:
        if key not in self._outcomes:
            try:
                self._outcomes[key] = function()
            except RunnerError as error:
                self._outcomes[key] = error
        outcome = self._outcomes[key]
        if isinstance(outcome, RunnerError):
            raise outcome
        value: Value = outcome
        return value


def check_data(recipes: Sequence[Recipe]) -> int:
    """Print what each pair of model and data gives, or what is wrong with it; 2 if anything is wrong, else 0.

    Files are read before tokenizers are loaded, and what is wrong with several recipes is said once.
    """
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(recipe.model.model_dump_json() + recipe.data.model_dump_json(), []).append(recipe)
    once = _Once()
    failures: dict[str, list[Recipe]] = {}
    for group in groups.values():
        model, data = group[0].model, group[0].data
        try:
            raw = once(data.model_dump_json(), lambda data=data: draw_splits(data))  # type: ignore[misc]
            tokenizer = once(model.model_dump_json(), lambda model=model: load_tokenizer(model))  # type: ignore[misc]
            samples = build_samples(data, tokenizer, raw)
        except RunnerError as error:
            failures.setdefault(str(error), []).extend(group)
            continue
        print(f"\n{_name_group(group)}: {model.path} on {data.train.path}")
        for line in describe_check(samples, group):
            print(f"  {line}")
    for text, concerned in failures.items():
        print(f"\nerror: {_name_group(concerned)}: {text}", file=sys.stderr)
    num_failed = sum(len(concerned) for concerned in failures.values())
    if num_failed:
        print(f"\n{num_failed} of {len(recipes)} recipes cannot be trained as they are", file=sys.stderr)
        return 2
    print(f"\n{len(recipes)} recipes can be trained")
    return 0


def _name_group(group: Sequence[Recipe]) -> str:
    return group[0].run.name if len(group) == 1 else f"{group[0].run.name} and {len(group) - 1} more"


def describe_check(samples: Samples, group: Sequence[Recipe]) -> list[str]:
    """Rows, lengths, truncation and labels per split, and the updates of each kind of run in the group."""
    lines = [_describe_split(name, getattr(samples, name)) for name in SPLITS]
    lines += [f"left out: {line}" for line in samples.left_out.describe()]
    num_tokens = sum(len(row.input_ids) for row in samples.train.rows)
    for mode in dict.fromkeys(recipe.loss for recipe in group):
        num_labels = sum(label >= 0 for row in samples.train.rows for label in row.labels(mode))
        lines.append(f"loss {mode}: {num_labels} of {num_tokens} tokens trained")
    for batch in dict.fromkeys(recipe.global_batch_size for recipe in group):
        updates = math.ceil(len(samples.train.rows) / batch)
        lines.append(f"global batch {batch}: {updates} optimizer updates an epoch")
    return lines


def _describe_split(name: str, split: Split) -> str:
    lengths = sorted(len(row.input_ids) for row in split.rows)
    median, high = lengths[len(lengths) // 2], lengths[math.ceil(0.95 * len(lengths)) - 1]
    num_truncated = sum(row.is_truncated for row in split.rows)
    return (
        f"{name}: {len(lengths)} rows of {median}/{high}/{lengths[-1]} tokens (median/95%/longest), "
        f"{num_truncated} truncated, {len(split.dropped)} dropped"
    )
