"""The data part of `runner check`: one pass over the distinct pairs of model and data, not one per recipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from runner.errors import RunnerError
from runner.recipe import Recipe
from runner.sft.data import SPLITS, Samples, Split, build_samples
from runner.sft.tokenizers import load_tokenizer


def check_data(recipes: Sequence[Recipe]) -> int:
    """Print what each pair of model and data gives, or what is wrong with it; 2 if anything is wrong, else 0."""
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        key = recipe.model.model_dump_json() + recipe.data.model_dump_json()
        groups.setdefault(key, []).append(recipe)
    num_problems = 0
    for group in groups.values():
        first = group[0]
        names = first.run.name if len(group) == 1 else f"{first.run.name} and {len(group) - 1} more"
        try:
            samples = build_samples(first.data, load_tokenizer(first.model))
        except RunnerError as error:
            num_problems += len(group)
            print(f"\nerror: {names}\n{error}", file=sys.stderr)
            continue
        print(f"\n{names}: {first.model.path} on {first.data.train.path}")
        for line in describe_check(samples, group):
            print(f"  {line}")
    if num_problems:
        print(f"\n{num_problems} of {len(recipes)} recipes cannot be trained as they are", file=sys.stderr)
        return 2
    print(f"\n{len(recipes)} recipes can be trained")
    return 0


def describe_check(samples: Samples, group: Sequence[Recipe]) -> list[str]:
    """Rows, lengths, truncation and labels per split, and the updates of each kind of run in the group."""
    lines = [_describe_split(name, getattr(samples, name)) for name in SPLITS]
    if samples.num_duplicates:
        lines.append(f"{samples.num_duplicates} duplicate rows left out, so that the splits stay disjoint")
    for mode in dict.fromkeys(recipe.loss for recipe in group):
        num_labels = sum(label >= 0 for row in samples.train.rows for label in row.labels(mode))
        lines.append(f"loss {mode}: {num_labels} of {sum(len(r.input_ids) for r in samples.train.rows)} tokens trained")
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
