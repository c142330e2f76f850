"""The resources that a run needs on its machines, from its recipe and its launch config."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import RunnerError
from runner.launch.placement import Resources, derive_resources
from runner.recipe.parse import Recipe, load_recipe
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def project_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the launch configs are named from there


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/math_tools/gemma-7b-it_lr5e-6.yaml", overrides)


def test_what_a_run_asks_of_its_machines() -> None:
    assert derive_resources(recipe()) == Resources(1, 8, None)
    assert derive_resources(recipe("launch.num_machines=2")) == Resources(2, 4, None)
    threads = "launch.num_cpu_threads_per_process=3"
    on_cpu = "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml"
    assert derive_resources(recipe("launch.num_machines=2", threads)) == Resources(2, 4, 12)
    assert derive_resources(recipe(on_cpu, "launch.num_processes=2", threads)) == Resources(1, 0, 6)


def test_a_launch_config_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunnerError, match=r"accelerate_configs/zero3\.yaml does not exist"):
        derive_resources(recipe())
