"""The benchmark of a GPU: its arithmetic, and a small run on the CPU that shows that all of it
works.
"""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from runner.preflight.sizes import Measures
from runner.preflight.suggestions import find_suggestions
from runner.preflight.survey import check_recipes
from runner.recipe.parse import load_recipe
from runner.recipe.schedule import derive_schedule
from tests.conftest import ROOT

FOLDER = ROOT / "benchmarks"
NAMES = ("small_runs", "start_up", "gpu_runs", "gpu")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def gpu(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["gpu"]


def test_examples_in_docstrings(scripts: dict[str, ModuleType]) -> None:
    for name in ("gpu_runs", "gpu"):
        found = doctest.testmod(scripts[name])
        assert found.attempted and not found.failed, name


def test_six_runs_differ_in_model_and_rows_only(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    runs = scripts["gpu_runs"]
    cells = runs.list_cells(runs.LARGE, 6)
    assert {cell.num_train for cell in cells} == {60, 120, 180} and len(cells) == 6
    runs.write_recipes(tmp_path, "ones", cells, runs.LARGE, runs.ONES)
    recipes = [load_recipe(path) for path in sorted((tmp_path / "recipes" / "ones").iterdir())]
    assert len({recipe.run.name for recipe in recipes}) == 6
    assert {recipe.evaluation.generation.enabled for recipe in recipes} == {True}
    schedule = derive_schedule(recipes[0], 60)
    assert (schedule.accumulation, schedule.updates_per_epoch) == (16, 4)


def test_an_arm_that_would_be_another_is_left_out(gpu: ModuleType) -> None:
    names = [arm.name for arm in gpu.ARMS]
    chosen, left_out = gpu.choose_arms(names, "--slots --cold --own-base")
    assert (tuple(chosen), left_out) == (gpu.ARMS, [])
    chosen, left_out = gpu.choose_arms(names, "--slots --cold")
    assert [arm.name for arm in chosen] == ["shared", "cold", "two", "four", "ones"]
    assert chosen[1].options == ("--cold",)
    assert left_out == ["`warm` is left out: without --own-base it is `shared`"]


def test_suggestions_of_several_models(gpu: ModuleType) -> None:
    text = """
      training: {per_device_train_batch_size: 8}
      training: {per_device_train_batch_size: 16}
      evaluation: {per_device_eval_batch_size: 2, generation: {batch_size: 64}}
    """
    assert gpu.find_suggestion(text) == gpu.Batches(8, gpu.ONES.evaluation, 64)
    assert gpu.find_suggestion("nothing to suggest") is None


def test_what_check_suggests_is_read(
    scripts: dict[str, ModuleType],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, small_runs = scripts["gpu_runs"], scripts["small_runs"]
    (tmp_path / "models").mkdir()
    for name in runs.LARGE.models:
        (tmp_path / "models" / name).symlink_to(tiny_model("llama"))
    (tmp_path / "launch.yaml").symlink_to(ROOT / "accelerate_configs" / "single_gpu.yaml")
    words = small_runs.SmallGrid("rows", (5, 10), (3, 6), (), 0)
    small_runs.write_rows(tmp_path / "rows.jsonl", 180 + 2 * runs.NUM_EVAL_ROWS, words)
    runs.write_recipes(tmp_path, "ones", runs.list_cells(runs.LARGE, 6), runs.LARGE, runs.ONES)
    monkeypatch.chdir(tmp_path)
    recipes = [load_recipe(path) for path in sorted(Path("recipes/ones").iterdir())]
    result = check_recipes(recipes)
    found = find_suggestions(result.runs, Measures(result), 140 * 2**30)
    text = "\n".join(line for one in found for line in one.lines)
    expected = runs.Batches(runs.GLOBAL_BATCH, runs.ONES.evaluation, runs.NUM_EVAL_ROWS)
    assert scripts["gpu"].find_suggestion(text) == expected


def test_shares_are_of_all_slots(gpu: ModuleType) -> None:
    phases = {"training": 30.0, "evaluating base": 10.0, "generating": 20.0, "exporting": 1.0}
    one = gpu.Measured(
        arm=gpu.Arm("two", num_slots=2),
        wall_seconds=50.0,
        cpu_seconds=60.0,
        phase_seconds=phases,
        num_tokens=5000,
        tokens_per_second={"0.5B": 12345.0},
        peak_bytes=3 * 2**30,
        estimated_bytes=None,
    )
    assert gpu.build_table([one]) == [
        "| arm | wall seconds | training | scores | answers | rest | tokens/s of the grid |"
        " in training, 0.5B | peak GiB | estimate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| two | 50 | 30% | 10% | 20% | 40% | 100 | 12,345 | 3.0 | - |",
    ]


def test_memory_of_the_gpu_is_beyond_what_was_in_use(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver's program of a machine where something else uses 100 MiB.
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f'#!/bin/bash\n[[ "$*" == *--id=3* ]] && cat {tmp_path}/used\n')
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpu.choose_gpu()
    used = tmp_path / "used"
    used.write_text("100\n")
    memory = gpu.DeviceMemory(uses_cpu=False)
    for text in ("400\n", "[N/A]\n", "250\n"):
        used.write_text(text)
        memory._next_look = 0.0
        memory.look(os.getpid())
    assert memory.peak_bytes == 300 * 2**20
    used.write_text("[N/A]\n")
    assert gpu.DeviceMemory(uses_cpu=False).peak_bytes is None


def test_an_arm_ends_at_the_deadline(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sweep without end, of whose processes none is left.
    (tmp_path / "runner").mkdir()
    (tmp_path / "runner" / "__init__.py").write_text("")
    (tmp_path / "runner" / "__main__.py").write_text(
        "import subprocess\nsubprocess.run(['sleep', '1000'])\n"
    )
    checked = {"uses_cpu": True, "runs": {}}
    arm = gpu.Arm("shared")
    assert gpu.measure_arm(arm, tmp_path, [], checked, deadline=time.monotonic() + 1.0) is None


def test_without_a_gpu_it_says_how_to_try_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py")],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "`--small` runs tiny models on the CPU" in done.stderr


@pytest.mark.slow
def test_it_runs_in_small(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--small", "--runs", "2", "--arms", "two", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| arm", "| two"]
    (two,) = json.loads(figures.read_text())["arms"]
    assert two["phase_seconds"]["training"] > 0 and two["phase_seconds"]["generating"] > 0
    assert set(two["tokens_per_second"]) == {"tiny", "wide"}
    assert two["peak_bytes"] > 0 and two["estimated_bytes"] > 0
