"""Whole matrices with real training: every damage to every file, a kill before every file
operation, at every step.

`test_resume` and `test_commit` have one cell of each class. Hours; part of `make torture` only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoints.marker import list_files
from runner.files import load_jsonl
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.sft.test_resume import copy_unfinished
from tests.support.fake_checkpoints import flip_bit, quarantined
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_log,
    try_launch_killed_at,
)

pytestmark = [pytest.mark.slow, pytest.mark.torture]

DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit": flip_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_costs_the_steps_since_the_checkpoint_before(
    finished: Project, damage: str
) -> None:
    newest = finished.paths("gemma-lora").checkpoint_dir(15)
    names = [path.relative_to(newest) for path in list_files(newest)]
    assert len(names) > 8 and Path("COMMITTED.json") in names
    for number, name in enumerate(names):
        if damage == "cut" and not (newest / name).stat().st_size:
            continue
        copy = copy_unfinished(finished, "gemma-lora", f"damage-{damage}-{number}")
        DAMAGES[damage](copy.checkpoint_dir(15) / name)
        launch(finished, f"damage-{damage}-{number}", *RUNS["gemma-lora"])
        assert "resuming from step 12" in read_log(copy), name
        assert quarantined(copy) == ["step-15.1"]
        assert "1 in quarantine" in finished.cli("status", copy.run_dir).stdout
        assert_same_outputs(copy, finished.paths("gemma-lora"))


def test_a_run_killed_before_every_operation_on_a_checkpoint_ends_with_the_same_bytes(
    finished: Project,
) -> None:
    """In a chain: each attempt resumes from what the last one left, and comes one operation further
    before it dies.
    """
    name, overrides = "killed-at-each", RUNS["gemma-lora"]
    paths = finished.paths(name)
    for number in itertools.count(1):
        done = try_launch_killed_at(
            finished, name, *overrides, at=f"* checkpoint-8|step-8 {number}"
        )
        if done.returncode == 0:
            break
        assert not paths.result_path.exists()
    assert number > 20
    assert_same_outputs(paths, finished.paths("gemma-lora"))


def test_early_stopping_is_the_same_wherever_it_is_interrupted(finished: Project) -> None:
    """Killed before each row of `metrics.jsonl`: at every step, and at every evaluation."""
    reference = finished.paths("llama-early")
    num_rows = len(load_jsonl(reference.metrics_path))
    assert num_rows > 15
    for number in range(1, num_rows + 1):
        name, overrides = f"early-killed-{number}", RUNS["llama-early"]
        paths: RunPaths = launch_killed_at(
            finished, name, *overrides, event="open", path="/metrics.jsonl", number=number
        )
        launch(finished, name, *overrides)
        assert_same_outputs(paths, reference)
