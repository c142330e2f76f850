"""CPU seconds of looking at many runs: `status`, `report`, `check --schema-only`, a reading of
`status --watch`, and what `sweep --dry-run` does for runs that were never started.

Run `python benchmarks/scale.py` in the repository root (four minutes). The run directories hold
real records in states of all kinds; eight runs are leased and make a step before each reading.
Commands are processes of their own and count whole, imports included; the first of several rounds
is printed beside the least. Goals: `status` of 5,000 unchanged runs 10 s, a reading of 5,000 runs
0.5 s, planning 1,000 pending runs 3 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from render_1000 import SIZES  # noqa: E402

from runner.files import append_jsonl, write_json_unsynced  # noqa: E402
from runner.grid.render import render_grid  # noqa: E402
from runner.launch.run_files import prepare_run  # noqa: E402
from runner.plan.select import Selected, select_recipes  # noqa: E402
from runner.recipe.contents import ContentHashes, hash_contents  # noqa: E402
from runner.recipe.identity import derive_digest  # noqa: E402
from runner.run.facts import read_facts  # noqa: E402
from runner.run.lease import Lease  # noqa: E402
from runner.run.manifest import (  # noqa: E402
    list_summed_files,
    record_files,
    record_model,
)
from runner.run.paths import content_cache_path  # noqa: E402
from runner.run.record import (  # noqa: E402
    Attempt,
    Failure,
    Progress,
    RunRecord,
    SplitScore,
    TrainResult,
    write_record,
)

CELLS_PER_SIZE: Final = 72  # of the grid for one number of training samples
NUM_RUNNING: Final = 8
NUM_REFRESHES: Final = 10
MODEL_FILES: Final = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
STATES: Final = (
    "completed",
    "completed",
    "completed",
    "completed",
    "failed",
    "interrupted",
    "changed",
    "pending",
)
SCORE: Final = SplitScore(
    num_rows=40,
    num_completion_tokens=900,
    num_tokens=9000,
    num_bytes=4000,
    completion_nll_sum=700.0,
    nll_sum=7000.0,
)


def build_project(root: Path, num_runs: int) -> list[Selected]:
    """Recipes, their data, and a run directory for each but the pending ones; the current folder
    becomes `root`.
    """
    root.mkdir()
    os.chdir(root)
    shutil.copytree(ROOT / "recipe_templates", "recipe_templates")
    grid_path = Path("recipe_templates/summaries/grid.yaml")
    text = grid_path.read_text()
    assert SIZES in text
    sizes = list(range(1, num_runs // CELLS_PER_SIZE + 2))
    grid_path.write_text(text.replace(SIZES, f"num_train_samples: {sizes}"))
    rendered = render_grid(Path("recipe_templates"), "summaries")
    recipes_dir = Path("recipes/summaries")
    recipes_dir.mkdir(parents=True)
    for name, recipe_text in list(rendered.texts.items())[:num_runs]:
        (recipes_dir / f"{name}.yaml").write_text(recipe_text)
    os.symlink(ROOT / "accelerate_configs", "accelerate_configs")
    selected = select_recipes(["recipes/summaries"], Path("runs"))
    assert len(selected) == num_runs
    for source in {source for one in selected for source in one.recipe.data.sources.values()}:
        path = Path(source.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"document": source.path, "summary": "short"}) + "\n")
        os.utime(path, (1e9, 1e9))  # long ago: hashes of files that were just written are not kept
    hashes = ContentHashes(content_cache_path(Path("runs")))
    generator = random.Random(1)
    running = list_running(selected)
    for one in selected:
        state = "running" if one in running else generator.choice(STATES)
        if state != "pending":
            build_run(one, hash_contents(one.recipe, hashes), state)
    return selected


def list_running(selected: list[Selected]) -> list[Selected]:
    """The runs that are leased."""
    return selected[7 :: len(selected) // NUM_RUNNING][:NUM_RUNNING]


def build_run(one: Selected, contents: dict[str, str], state: str) -> None:
    """The files that a run of that state has."""
    paths, recipe = one.paths, one.recipe
    if state == "changed":
        recipe = recipe.model_copy(
            update={"loss": "full" if recipe.loss == "completion" else "completion"}
        )
    prepare_run(recipe, contents, read_facts(paths))
    files = paths.attempt(1)
    files.attempt_dir.mkdir(parents=True)
    for path in (
        paths.lease_path,
        files.log_path,
        paths.eval_rows_path,
        paths.checkpoints_dir,
    ):
        path.touch()
    write_json_unsynced(paths.samples_path, {"splits": {"test": {"ids_hash": "0" * 64}}})
    for step in range(1, 43):
        append_jsonl(
            paths.metrics_path,
            {"step": step, "epoch": step / 20, "loss": 5 / step, "learning_rate": 1e-4},
        )
    write_json_unsynced(
        files.progress_path,
        Progress(phase="training", step=42, max_steps=60, loss=0.5).model_dump(),
    )
    failure = (
        Failure(kind="out_of_memory", message="CUDA ran out of memory")
        if state == "failed"
        else None
    )
    attempt = Attempt(
        number=1, started_at_utc="2026-01-01T10:00:00+00:00", command=("accelerate", "launch"),
        environment={}, num_processes=1, host="node", failure=failure,
        ended_at_utc="2026-01-01T10:10:00+00:00"
        if state in ("completed", "failed", "changed") else None,
    )  # fmt: skip
    write_record(paths, RunRecord(attempts=(attempt,)))
    if state == "completed":
        result = TrainResult(
            recipe_digest=derive_digest(recipe, contents), outcome="completed",
            stop_reason="num_train_epochs", num_steps=60, best_step=60, best_metric=0.7,
            metric="nll_per_completion_token", num_train_rows=120,
            base={"test": SCORE}, tuned={"test": SCORE},
        )  # fmt: skip
        paths.model_dir.mkdir()
        for name in MODEL_FILES:
            (paths.model_dir / name).write_text(name)
        files = record_model(paths.model_dir)
        files |= record_files(list_summed_files(paths), paths.run_dir)
        result = result.model_copy(update={"files": files})
        write_json_unsynced(paths.result_path, result.model_dump(mode="json"))


def make_step(one: Selected, step: int) -> None:
    """Write what a trainer writes after a step."""
    append_jsonl(
        one.paths.metrics_path,
        {"step": step, "epoch": step / 20, "loss": 5 / step, "learning_rate": 1e-4},
    )
    progress = Progress(phase="training", step=step, max_steps=900, loss=5 / step)
    write_json_unsynced(one.paths.attempt(1).progress_path, progress.model_dump())


def run_verb(*arguments: str) -> float:
    """CPU seconds of one command, of all of its process."""
    command = [sys.executable, "-m", "runner", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    return sum(after[2:4]) - sum(before[2:4])


def measure_readings(running: list[Selected]) -> list[float]:
    """CPU seconds of the first reading of a watch, recipes included, and of each later one."""
    from runner.view.watch import RunsReader

    leases = [Lease(one.paths.lease_path) for one in running]
    assert all(lease.try_acquire() for lease in leases)
    started = time.process_time()
    selected = select_recipes(["recipes/summaries"], Path("runs"))
    reader = RunsReader(selected, content_cache_path(Path("runs")))
    reader.read()
    seconds = [time.process_time() - started]
    for number in range(NUM_REFRESHES):
        for one in running:
            make_step(one, 100 + number)
        started = time.process_time()
        readings = reader.read()
        seconds.append(time.process_time() - started)
        steps = {reading.status.step for reading in readings if reading.progress}
        assert steps == {100 + number}
    for lease in leases:
        lease.close()
    return seconds


COMMANDS: Final[dict[str, tuple[str, ...]]] = {
    "status": ("status",),
    "status recipes": ("status", "recipes/summaries"),
    "report": ("report", "recipes/summaries"),
    "check --schema-only": ("check", "--schema-only", "recipes/summaries"),
    "sweep --dry-run, all pending": (
        *("sweep", "--dry-run", "recipes/summaries", "--output-root", "nothing"),
    ),
}


def main() -> None:
    """Print one line per command and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[216, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for size in arguments.sizes:
            selected = build_project(Path(name) / str(size), size)
            for label, command in COMMANDS.items():
                seconds = [run_verb(*command) for _ in range(arguments.rounds)]
                print(f"{size:5} runs  {label:<30} {seconds[0]:7.2f} s, then {min(seconds):7.2f} s")
            first, *again = measure_readings(list_running(selected))
            print(
                f"{size:5} runs  {'watch: first, then again':<30} {first:7.2f} s, then"
                f" {statistics.median(again):7.3f} s (most {max(again):.3f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
