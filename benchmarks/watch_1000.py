"""Processor seconds that `runner status --watch` needs for 1,000 runs: before its first screen, and
for each one.

Run `python benchmarks/watch_1000.py` in the repository root. The run directories hold real records
in states of all kinds; eight runs are leased and make a step before each refresh. Budget: a refresh
takes less than half a second.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from render_1000 import NUM_CELLS, build_templates  # noqa: E402

from runner.files import append_jsonl, write_json_unsynced  # noqa: E402
from runner.grid.render import (  # noqa: E402
    compare,
    render_grid,
    write_recipes,
)
from runner.launch.attempt import prepare_run  # noqa: E402
from runner.plan.select import Selected, select_recipes  # noqa: E402
from runner.plan.status import read_status  # noqa: E402
from runner.recipe.contents import ContentHashes, hash_contents, known_contents  # noqa: E402
from runner.recipe.identity import derive_digest  # noqa: E402
from runner.run.facts import read_facts  # noqa: E402
from runner.run.lease import Lease  # noqa: E402
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

NUM_RUNNING: Final = 8
NUM_REFRESHES: Final = 20
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


def build_project(root: Path) -> list[Selected]:
    """Recipes, their data, and a run directory for each but the pending ones; the current folder
    becomes `root`.
    """
    os.chdir(root)
    rendered = render_grid(build_templates(root / "recipe_templates"), "summaries")
    recipes_dir = root / "recipes" / "summaries"
    write_recipes(rendered, recipes_dir, compare(rendered, recipes_dir))
    os.symlink(ROOT / "accelerate_configs", "accelerate_configs")
    selected = select_recipes(["recipes/summaries"], Path("runs"))
    for source in {source for one in selected for source in one.recipe.data.sources.values()}:
        path = Path(source.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"document": source.path, "summary": "short"}) + "\n")
        os.utime(path, (1e9, 1e9))  # long ago: the hashes of what was written just now are not kept
    hashes = ContentHashes(content_cache_path(Path("runs")))
    generator = random.Random(1)
    for number, one in enumerate(selected):
        state = "running" if number % (NUM_CELLS // NUM_RUNNING) == 7 else generator.choice(STATES)
        if state != "pending":
            build_run(one, hash_contents(one.recipe, hashes), state)
    return selected


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
        paths.samples_path,
        paths.eval_rows_path,
        paths.checkpoints_dir,
    ):
        path.touch()
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
        write_json_unsynced(paths.result_path, result.model_dump(mode="json"))


def make_step(one: Selected, step: int) -> None:
    """What a trainer writes after a step."""
    append_jsonl(
        one.paths.metrics_path,
        {"step": step, "epoch": step / 20, "loss": 5 / step, "learning_rate": 1e-4},
    )
    progress = Progress(phase="training", step=step, max_steps=900, loss=5 / step)
    write_json_unsynced(one.paths.attempt(1).progress_path, progress.model_dump())


def measure(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action gives, and its processor seconds: all of it happens here, little of it is
    waiting.
    """
    started = time.process_time()
    result = action()
    return result, time.process_time() - started


def derive_all(selected: list[Selected]) -> list[str]:
    """What plain `runner status` does after it has loaded the recipes."""
    hashes = ContentHashes(content_cache_path(Path("runs")))
    return [
        read_status(one.read_facts(), one.recipe, known_contents(one.recipe, hashes)).state
        for one in selected
    ]


def main() -> None:
    """Print one line per step."""
    from runner.view.screen import Screen
    from runner.view.watch import RunsReader, build_views

    with tempfile.TemporaryDirectory() as name:
        selected = build_project(Path(name))
        running = [
            one for number, one in enumerate(selected) if number % (NUM_CELLS // NUM_RUNNING) == 7
        ]
        leases = [Lease(one.paths.lease_path) for one in running]
        assert all(lease.try_acquire() for lease in leases)
        loaded, load_seconds = measure(lambda: select_recipes(["recipes/summaries"], Path("runs")))
        states, derive_seconds = measure(lambda: derive_all(loaded))
        print(f"load {len(loaded)} recipes      {load_seconds:6.3f} s")
        print(
            f"derive every status     {derive_seconds:6.3f} s  "
            f" { ({s: states.count(s) for s in sorted(set(states))}) }"
        )
        reader = RunsReader(loaded, content_cache_path(Path("runs")))
        first, first_seconds = measure(reader.read)
        print(f"first reading           {first_seconds:6.3f} s")
        assert [reading.status.state for reading in first] == states
        seconds = []
        for number in range(NUM_REFRESHES):
            for one in running:
                make_step(one, 100 + number)
            readings, spent = measure(reader.read)
            seconds.append(spent)
            assert {reading.status.step for reading in readings if reading.progress} == {
                100 + number
            }
        median = statistics.median(seconds)
        screen, screen_seconds = measure(lambda: Screen(build_views(readings)))
        lines, draw_seconds = measure(
            lambda: screen.draw(build_views(readings), width=120, height=40, now="")
        )
        assert len(lines) <= 40
        print(
            f"reading again           {median:6.3f} s   (median of {NUM_REFRESHES}, most"
            f" {max(seconds):.3f} s); ",
            end="",
        )
        print(f"{derive_seconds / median:.0f} times as fast as deriving every status")
        print(f"plan the table          {screen_seconds:6.3f} s   (once)")
        print(f"draw 120 x 40           {draw_seconds:6.3f} s")


if __name__ == "__main__":
    main()
