"""Seconds that `runner check` takes for the 216 recipes of the summaries grid, on tiny models and
made-up rows.

Run `python benchmarks/check_216.py` in the repository root. Budget: 60 seconds of wall clock on two
cores, for 3 tokenizers x 6 training files of 180 rows and 6 other files of 40, each row about as
long as `data.max_length` allows with `--long`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner.grid.recipe_files import (  # noqa: E402
    compare,
    write_recipes,
)
from runner.grid.render import render_grid  # noqa: E402

FAMILIES: Final = {
    "gemma-2-9b-it": "gemma2",
    "llama-3.1-8b-instruct": "llama",
    "mistral-7b-instruct": "mistral",
}
NUM_TRAIN, NUM_OTHER = 180, 40


def build_project(root: Path, *, num_turns: int) -> Path:
    """`root` with the grid's recipes on tiny models and private-looking data; the folder of the
    recipes.
    """
    from runner.demo.weights import build_tiny_model

    shutil.copytree(ROOT / "recipe_templates", root / "recipe_templates")
    for name in ("accelerate_configs", "ds_configs"):
        shutil.copytree(ROOT / name, root / name)
    for card, family in FAMILIES.items():
        build_tiny_model(family, root / "models" / family)
        path = root / "recipe_templates" / "models" / f"{card}.yaml"
        lines = path.read_text().splitlines()
        replaced = {"path:": f"path: models/{family}", "pad_token:": "pad_token: auto"}
        path.write_text("\n".join(replaced.get(line.split(" ")[0], line) for line in lines) + "\n")
    for task in ("task-1", "task-2", "task-3"):
        for name, count in ((f"auto/{task}", NUM_TRAIN), (f"manual/{task}", NUM_TRAIN)):
            write_rows(root / "data" / "summaries" / f"{name}.jsonl", name, count, num_turns)
        for split in ("validation", "test"):
            write_rows(
                root / "data" / "summaries" / f"{task}-{split}.jsonl",
                f"{task} {split}",
                NUM_OTHER,
                num_turns,
            )
    recipes_dir = root / "recipes" / "summaries"
    rendered = render_grid(root / "recipe_templates", "summaries")
    write_recipes(rendered, recipes_dir, compare(rendered, recipes_dir))
    return recipes_dir


def write_rows(path: Path, seed: str, count: int, num_turns: int) -> None:
    """Dialogues of `num_turns` short turns and their summaries, none of them twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        turns = [
            f"{speaker}: is {generator.randrange(10**6)} late?"
            for speaker in ("Ann", "Bob") * (num_turns // 2)
        ]
        rows.append(
            {"document": "\n".join(turns), "summary": f"Ann and Bob speak of {seed} {number}."}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Build, check, print the check's own output and what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--long", action="store_true", help="rows close to 2,048 tokens instead of short ones"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        build_project(root, num_turns=60 if arguments.long else 6)
        started = time.perf_counter()
        command = [sys.executable, "-m", "runner", "check", "recipes/summaries"]
        done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout + done.stderr)
    cpu = used.ru_utime + used.ru_stime
    print(
        f"runner check of 216 recipes: {seconds:.1f} s (budget 60 s), {cpu:.1f} s of one core, ",
        end="",
    )
    print(f"{used.ru_maxrss / 2**20:.2f} GiB, exit code {done.returncode}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
