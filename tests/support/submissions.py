"""Pending runs of committed recipes, for the tests of engines that write a file, and golden files
of their output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runner.engines.manifests import ManifestOptions, PendingRun
from runner.plan.select import select_recipes
from tests.conftest import ROOT

DEMO = "recipes/demo/gemma_060_full_seed1.yaml"  # one process on the CPU
DEMO_2 = "recipes/demo/llama_060_full_seed1.yaml"
EIGHT_GPUS = "recipes/math_tools/gemma-7b-it_lr5e-6.yaml"


OPTIONS = ManifestOptions(Path("runs"), image="registry.example/runner:1", storage="my-project")


def make_pending(*recipes: str, num_attempts: int = 0) -> tuple[PendingRun, ...]:
    """Pending runs of recipes below the current folder, without run directories."""
    selected = select_recipes(recipes, Path("nowhere"))
    return tuple(PendingRun(one, num_attempts) for one in selected)


def compare_with_golden(texts: Sequence[str], name: str) -> None:
    """Compare a text with its golden file; `UPDATE_GOLDEN=1` rewrites the file."""
    golden, text = ROOT / "tests" / "golden" / name, "\n".join(texts)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.read_text() == text, "UPDATE_GOLDEN=1 rewrites it"
