"""Seconds for rendering 1,000 cells of the summaries template, and for `load_recipe` of the 1,000
files.

Run `python benchmarks/render_1000.py` in the repository root. Budgets, in processor seconds of one
core: 5 to render with every check, 15 to load.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner.grid.recipe_files import (  # noqa: E402
    RenderedGrid,
    compare,
    write_recipes,
)
from runner.grid.render import render_grid  # noqa: E402
from runner.recipe.parse import load_recipe  # noqa: E402

SIZES = "num_train_samples: [60, 120, 180]"
NUM_CELLS = 1_000


def build_templates(folder: Path) -> Path:
    """A copy of the templates whose summaries grid has 1,000 of 1,008 cells: 14 sample counts, 8
    cells excluded.
    """
    shutil.copytree(ROOT / "recipe_templates", folder)
    path = folder / "summaries" / "grid.yaml"
    text = path.read_text()
    assert SIZES in text
    when = "{num_train_samples: 14, task: task-3, model: mistral-7b-instruct}"
    text = text.replace(SIZES, f"num_train_samples: {list(range(1, 15))}")
    path.write_text(f"{text}\nexclude:\n  - {{when: {when}, why: 1000 is a round number}}\n")
    return folder


def measure(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """Run an action; return its result, its CPU seconds with those of its children, and its
    wall-clock seconds.
    """
    before, wall = os.times(), time.perf_counter()
    result = action()
    after, seconds = os.times(), time.perf_counter() - wall
    return result, sum(after[:4]) - sum(before[:4]), seconds


def main() -> None:
    """Print one line per step."""
    with tempfile.TemporaryDirectory() as name:
        templates_root, recipes_dir = (
            build_templates(Path(name) / "recipe_templates"),
            Path(name) / "recipes/summaries",
        )
        rendered: RenderedGrid
        rendered, cpu, wall = measure(lambda: render_grid(templates_root, "summaries"))
        assert len(rendered.texts) == NUM_CELLS, len(rendered.texts)
        print(
            f"render       {cpu:6.2f} s of one core  {wall:6.2f} s   (budget 5 s; reload and schema"
            " check included)"
        )
        drift = compare(rendered, recipes_dir)
        _, cpu, wall = measure(lambda: write_recipes(rendered, recipes_dir, drift))
        print(
            f"write        {cpu:6.2f} s of one core  {wall:6.2f} s   (each file and its folder"
            " fsynced)"
        )
        _, cpu, wall = measure(lambda: compare(rendered, recipes_dir))
        print(f"compare      {cpu:6.2f} s of one core  {wall:6.2f} s")
        paths = sorted(recipes_dir.glob("*.yaml"))
        _, cpu, wall = measure(lambda: [load_recipe(path) for path in paths])
        print(f"load_recipe  {cpu:6.2f} s of one core  {wall:6.2f} s   (budget 15 s)")


if __name__ == "__main__":
    main()
