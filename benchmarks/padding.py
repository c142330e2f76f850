"""Share of the tokens of a recipe's training batches that are padding, under each order of rows.

Run `python benchmarks/padding.py RECIPE [KEY=VALUE ...]` in the repository root. Rows are drawn and
tokenized as the trainer does it, and ordered by its own function; nothing is trained. A share is of
20 epochs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runner.data.rows import build_samples
from runner.data.tokenizer import load_tokenizer
from runner.recipe.parse import Recipe, load_recipe
from runner.sft.order import order_rows

Strategy = Literal["random", "group_by_length"]
STRATEGIES: Final[tuple[Strategy, ...]] = ("random", "group_by_length")
NUM_EPOCHS: Final = 20


def load_lengths(recipe: Recipe) -> list[int]:
    """Tokens of each training row."""
    samples = build_samples(recipe.data, load_tokenizer(recipe.model))
    return [len(row.input_ids) for row in samples.train.rows]


def measure_padding(
    lengths: Sequence[int], recipe: Recipe, micro_batch: int, strategy: Strategy
) -> float:
    """The share of padding in micro-batches of so many rows, each as wide as its longest row."""
    num_padded = 0
    for epoch in range(NUM_EPOCHS):
        order = order_rows(
            lengths,
            global_batch_size=recipe.global_batch_size,
            seed=recipe.training.seed,
            epoch=epoch,
            strategy=strategy,
        )
        for at in range(0, len(order), micro_batch):
            batch = [lengths[row] for row in order[at : at + micro_batch]]
            num_padded += max(batch) * len(batch)
    return 1 - NUM_EPOCHS * sum(lengths) / num_padded


def main() -> None:
    """Print one line per micro-batch: the recipe's own, and all rows of an update on a process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, tuple(arguments.overrides))
    lengths = load_lengths(recipe)
    print(
        f"{arguments.recipe}: {len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens,"
        f" global batch {recipe.global_batch_size}"
    )
    whole = recipe.global_batch_size // recipe.launch.num_processes
    for micro_batch in sorted({recipe.training.per_device_train_batch_size, whole}):
        shares = [measure_padding(lengths, recipe, micro_batch, one) for one in STRATEGIES]
        shown = ", ".join(
            f"{one} {share:.1%}" for one, share in zip(STRATEGIES, shares, strict=True)
        )
        print(f"  micro-batch {micro_batch}: {shown}")


if __name__ == "__main__":
    main()
