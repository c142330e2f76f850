"""Real runs with and without shared scores of the base model: the same bytes, for any producer of
the scores and any failure while they are written.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from runner.run.base_scores import find_other_base_scores
from runner.run.paths import RunPaths, find_output_root
from runner.run.record import BaseSource, load_base_source
from tests.conftest import RUNNER, Project, build_environment, make_project
from tests.support.faulty_runs import launch_faulty, make_fault
from tests.support.training_runs import (
    assert_same_outputs,
    launch,
    launch_killed_at,
    list_files,
    read_attempts,
    read_log,
)

pytestmark = pytest.mark.slow

# Two steps, an answer to each of a few rows at each evaluation, dropout that draws random numbers.
SHORT: Final = (
    "training={max_steps: 2, num_train_epochs: null}",
    "evaluation={eval_steps: 1, per_device_eval_batch_size: 4}",
    "evaluation.generation={enabled: true, max_new_tokens: 4, num_samples: 5,"
    " during_training: true}",
    "checkpoints={save_steps: 1}",
    "adapter.lora_dropout=0.1",
)
FULL: Final = (*(one for one in SHORT if "lora" not in one), "adapter={method: none}")
RECIPES: Final = {
    "lora": SHORT,
    "lora-full": (*SHORT, "loss=full"),
    "tuned": FULL,
    "tuned-full": (*FULL, "loss=full"),
}


def read_source(paths: RunPaths, attempt: int = 1) -> BaseSource:
    source = load_base_source(paths.attempt(attempt))
    assert source is not None, read_log(paths)
    return source


def list_entries(paths: RunPaths) -> list[Path]:
    root = find_output_root(paths.run_dir) / ".base"
    return [path for path in root.glob("[!.]*") if path.is_dir()]


def read_all(paths: RunPaths) -> dict[str, bytes]:
    """Every file but what differs between any two attempts, checkpoints with their random states
    included.
    """
    return {
        str(path.relative_to(paths.run_dir)): path.read_bytes()
        for path in list_files(paths.run_dir)
        if path not in (paths.record_path, paths.lease_path)
        and paths.attempts_dir not in path.parents
        and path.name != "training_args.bin"  # holds the paths of the run
    }


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, data_path: Path, tiny_model: Callable[[str], Path]
) -> Project:
    """A project with the runs of `RECIPES` in `own`, each with its own scores, and in `shared`."""
    project = make_project(tmp_path_factory.mktemp("scored"), data_path, tiny_model)
    project.add_model()
    for name, overrides in RECIPES.items():
        project.write_recipe(f"recipes/{name}.yaml", *overrides)
    for root, asked in (("own", ["--own-base"]), ("shared", [])):
        done = project.cli("sweep", "recipes", "--output-root", root, *asked)
        assert done.returncode == 0, done.stdout + done.stderr
    return project


def test_a_run_leaves_the_same_bytes_whoever_scored_its_base(scored: Project) -> None:
    """LoRA and full, of two losses each: with its own scores, forked, and started alone."""
    project = scored
    recipes = {name: project.root / "recipes" / f"{name}.yaml" for name in RECIPES}

    def paths(root: str, name: str) -> RunPaths:
        return RunPaths(project.root / root / "tests" / name)

    cold = project.cli("launch", recipes["lora-full"], "--name", "cold", "--output-root", "shared")
    assert cold.returncode == 0, cold.stderr
    assert not (project.root / "own" / ".base").exists()
    assert len(list_entries(paths("shared", "lora"))) == 2, "one of each method"
    for name in recipes:
        assert read_attempts(paths("own", name))[0]["base"] == "own"
        own, shared = read_all(paths("own", name)), read_all(paths("shared", name))
        assert "predictions.jsonl" in own and own.keys() == shared.keys()
        assert [file for file in own if own[file] != shared[file]] == []
    sources = {name: read_source(paths("shared", name)) for name in recipes}
    for kind in ("lora", "tuned"):
        found = sorted(sources[name].source for name in (kind, f"{kind}-full"))
        assert found == ["own", "shared"]
    assert read_source(paths("shared", "cold")).source == "shared"
    assert read_attempts(paths("shared", "cold"))[0]["started"] == "cold"
    assert_same_outputs(paths("shared", "cold"), paths("own", "lora-full"))
    why = project.cli("why", recipes["lora-full"], "--output-root", "shared").stdout
    assert "base scores computed " in why


def test_a_kill_and_a_full_disk_while_an_entry_is_written_cost_the_entry_only(
    scored: Project,
) -> None:
    """The attempt after them keeps one."""
    project, reference = scored, RunPaths(scored.root / "own" / "tests" / "lora")
    full = (errno.ENOSPC, os.strerror(errno.ENOSPC))
    fault = make_fault("open", "/answers.json", "builtins.OSError", *full)
    done = launch_faulty(project, "full", *SHORT, faults=[fault])
    assert done.returncode == 0, done.stderr
    paths = project.paths("full")
    assert "No space left" in str(read_source(paths).why) and list_entries(paths) == []
    assert_same_outputs(paths, reference)
    killed = launch_killed_at(project, "killed", *SHORT, event="open", path="/answers.json")
    assert list_entries(killed) == []
    assert list((project.root / "runs" / ".base").glob(".*.tmp")) != []
    launch(project, "killed", *SHORT)
    assert_same_outputs(killed, reference)
    assert read_source(killed, 2).is_kept and len(list_entries(killed)) == 1
    assert list((project.root / "runs" / ".base").glob(".*.tmp")) == []


def test_two_sweeps_that_want_the_same_scores_compute_them_once_for_each_number_of_ranks(
    project: Project,
) -> None:
    project.add_model()
    commands = []
    for name in ("one", "two"):
        recipe = project.write_recipe(f"{name}.yaml", *SHORT)
        commands.append([str(RUNNER), "sweep", str(recipe)])
    sweeps = [
        subprocess.Popen(
            command,
            cwd=project.root,
            env=build_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for command in commands
    ]
    assert [sweep.wait(timeout=300) for sweep in sweeps] == [0, 0]
    one, two = project.paths("one"), project.paths("two")
    assert sorted(read_source(paths).source for paths in (one, two)) == ["own", "shared"]
    assert len(list_entries(one)) == 1 and find_other_base_scores(project.root / "runs") == []
    assert_same_outputs(one, two)

    # Two ranks share among themselves only.
    ranks = (*SHORT, "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml")
    second = launch(project, "ranks-one", *ranks, num_processes=2)
    third = launch(project, "ranks-two", *ranks, num_processes=2)
    assert read_source(second).source == "own" and read_source(second).is_kept
    assert read_source(third).source == "shared"
    assert_same_outputs(third, second)
