"""The usable parts of a run directory: its recipe, and the folder with the tuned weights that a
verb needs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.data.tokenizer import set_chat_format
from runner.errors import DataError, RefusedError
from runner.plan.status import (
    NOT_VERIFIABLE,
    is_verifiable,
    read_status,
    suggest_fixes,
    verify_files,
)
from runner.recipe.parse import Recipe
from runner.run.facts import read_facts
from runner.run.paths import RunPaths
from runner.run.record import StoredRecipe


@dataclass(frozen=True)
class TunedRun:
    """A run with weights to use."""

    paths: RunPaths
    stored: StoredRecipe
    weights_dir: Path
    checkpoint: str | None  # its folder's name, None for the export of a completed run

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, with its hub names at the commits that it loaded."""
        return self.stored.pinned

    def load_tokenizer(self) -> Any:
        """The tokenizer saved with the weights: the chat template used in training, its pad token,
        and the recipe's chat format.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.weights_dir, trust_remote_code=False)
        if not tokenizer.chat_template:
            raise DataError(
                f"{self.weights_dir} has no chat template, so the prompt format used in training"
                " is unknown",
                hint="copy the chat template used in training to chat_template.jinja there",
            )
        set_chat_format(tokenizer, self.recipe.model)
        return tokenizer


@contextmanager
def open_tuned_run(run_dir: Path, checkpoint: str | None) -> Iterator[TunedRun]:
    """The run, with the weights of its export or of a checkpoint: `best`, `latest`, or a folder or
    archive.

    Raises:
        RefusedError: no such run, it is not completed, or the checkpoint does not verify.
    """
    paths = RunPaths(run_dir)
    facts = read_facts(paths)
    stored = facts.stored if run_dir.is_dir() else None
    if stored is None:
        raise RefusedError(
            f"{run_dir} is not a run directory",
            hint="give one such as runs/demo/gemma_060_full_seed1",
        )
    if checkpoint is None:
        status = verify_files(facts, read_status(facts, stored.recipe, {}))
        if status.state == "damaged":
            raise RefusedError(
                f"{run_dir} is damaged: {status.why}",
                hint=f"{suggest_fixes(status.damage)}; `--checkpoint best` uses the checkpoint",
            )
        if status.state != "completed":
            first_line = status.why.partition("\n")[0]  # further lines may be a hint
            raise RefusedError(
                f"{run_dir} is not completed, it is {status.state}: {first_line}",
                hint="`--checkpoint best` or `--checkpoint latest` uses what there is so far",
            )
        if status.is_model_removed or not paths.model_dir.is_dir():
            raise RefusedError(
                f"{paths.model_dir} was removed",
                hint=(
                    "`--checkpoint best` uses the best checkpoint, from which"
                    " `runner launch RECIPE --repair` restores it"
                ),
            )
        if not is_verifiable(facts):
            print(f"note: {run_dir} {NOT_VERIFIABLE}", file=sys.stderr)
        yield TunedRun(paths, stored, paths.model_dir, None)
        return
    from runner.checkpoints.restore import resolve_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        weights_dir = resolve_checkpoint(
            paths, stored.recipe.checkpoints, checkpoint, Path(scratch)
        )
        yield TunedRun(paths, stored, weights_dir, weights_dir.name)


def quieten() -> None:
    """Silence Transformers' own messages in the terminal: these verbs report their own actions."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and Transformers, at every load
    # DeepSpeed, which accelerate imports to save a model, would otherwise print its guess.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
