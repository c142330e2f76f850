"""Runs whose rows are stored: after any damage to the entry or the attempt, each ends with the
bytes of a run that masked its rows itself.
"""

from __future__ import annotations

import json
from typing import Final

import pytest

from runner.data.row_entries import MIN_STORED_ROWS
from runner.run.entries import list_stored
from runner.run.paths import row_entries_dir
from tests.conftest import Project
from tests.support.training_runs import (
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_log,
    try_launch_killed_at,
)

SHORT: Final = (
    "data.train.path=large.jsonl",
    "data.num_train_samples=4999",  # of two ranks, one lacks a row in the end
    "training={max_steps: 2, num_train_epochs: null}",
    "evaluation={eval_steps: 1}",
    "checkpoints={save_steps: 1}",
)


def write_large(project: Project) -> None:
    lines = []
    for number in range(MIN_STORED_ROWS + 100):
        turns = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": turns}))
    (project.root / "large.jsonl").write_text("\n".join(lines))


def launch_without_entry(
    project: Project, name: str, *overrides: str, num_processes: int | None = None
) -> None:
    """A run that finds no folder to store rows in."""
    entries = row_entries_dir(project.root / "runs")
    entries.parent.mkdir(exist_ok=True)
    entries.write_text("no folder")
    launch(project, name, *SHORT, *overrides, num_processes=num_processes)
    assert "warning: masked rows are not stored below" in read_log(project.paths(name))
    entries.unlink()


def list_kinds(project: Project) -> list[str]:
    """Entries and their leftovers, without the random part of their names."""
    stored = list_stored(row_entries_dir(project.root / "runs"))
    return ["leftover" if one.path.name.startswith(".") else "entry" for one in stored]


@pytest.mark.slow
def test_runs_with_and_without_an_entry_end_with_the_same_bytes(project: Project) -> None:
    project.add_model()
    write_large(project)
    launch_without_entry(project, "memory")
    reference = project.paths("memory")
    paths = project.paths("killed")
    try_launch_killed_at(project, "killed", *SHORT, at="os.rename rows.json 1")
    assert list_kinds(project) == ["leftover"]
    launch_killed_at(project, "killed", *SHORT, event="os.rename", path="COMMITTED.json", number=2)
    assert "masked 5,026 rows in" in read_log(paths)
    assert list_kinds(project) == ["entry"]
    for name in ("killed", "other"):
        project.write_recipe(f"recipes/{name}.yaml", *SHORT)
    done = project.cli("sweep", "recipes")  # one worker forks both
    assert done.returncode == 0, done.stderr
    assert "resuming from" in read_log(paths)
    for name in ("killed", "other"):
        log = read_log(project.paths(name))
        assert "rows were masked by tests/killed, attempt 2," in log
        assert_same_outputs(project.paths(name), reference)


@pytest.mark.slow
def test_two_ranks_map_what_one_of_them_wrote(project: Project) -> None:
    project.add_model()
    write_large(project)
    gloo = "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml"
    launch_without_entry(project, "memory", gloo, num_processes=2)
    for name, said in (("first", "masked 5,026 rows in"), ("second", "rows were masked by")):
        launch(project, name, *SHORT, gloo, num_processes=2)
        assert read_log(project.paths(name)).count(said) == 1
        assert_same_outputs(project.paths(name), project.paths("memory"))
    assert list_kinds(project) == ["entry"]
