"""Numbers that the benchmarks of short runs compute, and the CPU seconds of a process tree.

The benchmarks are scripts: each runs with its own folder on the path.
"""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from runner.files import write_json_atomic
from runner.recipe.parse import load_recipe
from runner.run.paths import RunPaths
from runner.sft.__main__ import _announce_imports
from runner.sft.startup import WorldPlace

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("small_runs", "grid", "start_up")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_examples_in_docstrings(scripts: dict[str, ModuleType]) -> None:
    for module in scripts.values():
        found = doctest.testmod(module)
        assert found.attempted and not found.failed, module.__name__


def test_the_table_has_the_ratio_of_each_round(scripts: dict[str, ModuleType]) -> None:
    # Each sweep takes half of its own round's loop, though the second round was slow.
    seconds = {"A": {"loop": [100.0, 300.0], "cold": [50.0, 150.0], "warm": [40.0, 60.0]}}
    assert scripts["grid"].build_table(seconds) == [
        "| CPU seconds | bash loop of `trl sft` | `runner sweep --cold` | `runner sweep` |",
        "|---|---:|---:|---:|",
        "| A | 200 | 100 (0.500; 0.500 to 0.500) | 50 (0.300; 0.200 to 0.400) |",
    ]


def test_files_that_differ_are_found_on_either_side(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for root, only in ((one, "left"), (other, "right")):
        (root / "run" / "attempts" / "1").mkdir(parents=True)
        (root / "run" / "attempts" / "1" / "log.txt").write_text(only)  # says when and where
        (root / "run" / "run.json").write_text(only)
        (root / "run" / "same").write_text("same")
        (root / "run" / "result.json").write_text(only)
        (root / "run" / only).write_text("")
    expected = ["run/left", "run/result.json", "run/right"]
    assert scripts["grid"].find_differences(one, other) == (4, expected)


def test_the_scores_of_each_sweep_are_compared_with_the_loop(
    scripts: dict[str, ModuleType],
) -> None:
    worst = {"step_loss": 0.0, "base_score": 2e-7, "tuned_score": 3e-7}
    agreement = {"cold": worst, "warm": {**worst, "tuned_score": 4e-6}}
    measured = {"agreement": agreement, "files": 9, "differing": ["B/run/samples.json"]}
    cold, warm, files = scripts["grid"].describe_agreement("B", measured)
    assert "trl against cold" in cold and cold.endswith("tuned score 3.0e-07")
    assert "trl against warm" in warm and warm.endswith("tuned score 4.0e-06")
    assert files == "grid B, cold against warm: 9 files, 1 differ: B/run/samples.json"


def test_scores_that_differ_are_no_measurement(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid = scripts["small_runs"].list_grids(num_runs=1, num_steps=1)[0]
    name = grid.cells[0].name
    theirs = tmp_path / "loop" / name / "checkpoint-1"
    theirs.mkdir(parents=True)
    history = '[{"eval_loss": 2.0}, {"loss": 1.5}, {"eval_loss": 1.0}]'
    (theirs / "trainer_state.json").write_text(f'{{"log_history": {history}}}')
    ours = tmp_path / "ours" / "A" / name
    ours.mkdir(parents=True)
    (ours / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 1.5}\n')
    result = (
        '{"base": {"test": {"nll_sum": 4.0, "num_tokens": 2}},'
        ' "tuned": {"test": {"nll_sum": %s, "num_tokens": 2}}}'
    )
    (ours / "result.json").write_text(result % "2.0")
    compare = scripts["grid"].compare_scores
    agreement = compare(grid, tmp_path / "loop", tmp_path / "ours")
    assert agreement == scripts["grid"].Agreement(0.0, 0.0, 0.0)
    (ours / "result.json").write_text(result % "2.001")
    with pytest.raises(SystemExit, match="did not do the same work"):
        compare(grid, tmp_path / "loop", tmp_path / "ours")


def test_recipes_of_the_grids_are_recipes(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    small_runs = scripts["small_runs"]
    for grid in small_runs.list_grids(num_runs=12, num_steps=10):
        assert len({cell.name for cell in grid.cells}) == 12
        assert sum(cell.loss == "full" for cell in grid.cells) == 6
        small_runs.write_recipes(tmp_path, grid)
        paths = sorted((tmp_path / "recipes" / grid.name).iterdir())
        assert len({load_recipe(path).run.name for path in paths}) == 12


def test_orphans_are_measured_too(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    # The shell ends immediately; its children are waited for.
    argv = ["bash", "-c", f"{sys.executable} -c '{burn}' & exit 0"]
    usage = scripts["small_runs"].measure(argv, tmp_path, tmp_path / "log.txt")
    assert 0.3 <= usage.cpu_seconds < 1.5
    with pytest.raises(SystemExit, match="failed: 3"):
        scripts["small_runs"].measure(["bash", "-c", "exit 3"], tmp_path, tmp_path / "log.txt")


def test_imports_last_until_the_phase_behind_them(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    started = {"number": 1, "started_at_utc": "2026-01-01T00:00:00+00:00", "host": "here"}
    attempt = {**started, "command": [], "environment": {}, "num_processes": 1}
    paths = RunPaths(tmp_path)
    write_json_atomic(paths.record_path, {"attempts": [attempt]})
    path = paths.attempt(1).progress_path
    path.parent.mkdir(parents=True)
    read_phase = scripts["start_up"].read_phase
    assert read_phase(path) is None
    _announce_imports(tmp_path, WorldPlace.read({}))
    assert path.exists() and read_phase(path) is None
    write_json_atomic(path, {"phase": "setting up"})
    assert read_phase(path) == "setting up"


def test_table_of_phases_leaves_the_first_run_aside(scripts: dict[str, ModuleType]) -> None:
    start_up = scripts["start_up"]
    phases = len(start_up.PHASES)
    # The first run's phases take 2 s each, those of the others 1 s.
    first = [2.0 * n for n in range(1, phases + 1)]
    second = [first[-1] + n for n in range(1, phases + 1)]
    runs = start_up.derive_phases([first, second], 0.0)
    table = start_up.build_table(runs, runs)
    assert table[2] == "| launcher | 1.00 | 9% | 1.00 | 2.00 |"
    assert table[-1] == f"| whole | {phases}.00 | 100% | {phases}.00 | {2 * phases}.00 |"


def test_memory_is_told_apart_by_role(scripts: dict[str, ModuleType]) -> None:
    start_up = scripts["start_up"]
    named = ["bash", "-c", "read", "runner.sft.worker"]
    owners = {"RUNNER_OWNER": "worker of process 1...."}, {"RUNNER_OWNER": "1.2@/runs/a:1"}
    processes = [
        subprocess.Popen(named, stdin=subprocess.PIPE, env={**os.environ, **owner})
        for owner in owners
    ]
    try:
        for process in processes:  # until each is no longer the fork that it began as
            while b"runner.sft.worker" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                pass
        memory = start_up.Memory()
        memory.look(os.getpid())
    finally:
        for process in processes:
            process.communicate()
    assert {"worker", "trainer, forked", "all together"} <= memory.peaks.keys()
    figures = memory.peaks["worker"]
    assert 0 < figures["Private_Dirty"] <= figures["Pss"] <= figures["Rss"]
    assert memory.peaks["all together"]["Pss"] >= figures["Pss"]
    rows = [line.split(" | ")[0] for line in memory.build_table()[2:]]
    assert rows == [f"| {role}" for role in sorted(memory.peaks)]
