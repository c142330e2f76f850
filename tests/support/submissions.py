"""Submissions of committed recipes, for the tests of engines that write a file; golden files of
what they write.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.engines.manifests import PendingRun, Submission
from runner.plan.select import select_recipes
from tests.conftest import ROOT

DEMO = "recipes/demo/gemma_060_full.yaml"  # one process on the CPU
DEMO_2 = "recipes/demo/llama_060_full.yaml"
EIGHT_GPUS = "recipes/math_tools/gemma-7b-it_lr5e-6.yaml"


def make_submission(*recipes: str, num_attempts: int = 0, **options: Any) -> Submission:
    """Of recipes below the current folder, none of which has a run directory."""
    selected = select_recipes(recipes, Path("nowhere"))
    runs = tuple(PendingRun(one, num_attempts) for one in selected)
    given = {
        "output_root": Path("runs"),
        "image": "registry.example/runner:1",
        "storage": "my-project",
    }
    return Submission(runs=runs, **{**given, **options})


def compare_with_golden(texts: Sequence[str], name: str) -> None:
    """`UPDATE_GOLDEN=1` rewrites the file."""
    golden, text = ROOT / "tests" / "golden" / name, "\n".join(texts)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.read_text() == text, "UPDATE_GOLDEN=1 rewrites it"
