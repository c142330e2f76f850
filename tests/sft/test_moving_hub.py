"""Real runs that load a model and a data set from a hub whose branch moves between two attempts of
a run, and between two runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.files import load_json
from tests.conftest import Project
from tests.support.moving_hub import MovingHub, moving_hub, read_folder
from tests.support.training_runs import (
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_attempts,
    read_log,
    read_result,
    try_launch,
)

pytestmark = pytest.mark.slow

A, B = "a" * 40, "b" * 40
OVERRIDES = (
    "model.path=org/Tiny-It",
    "data.train.path=org/Some-Rows",
    "training.num_train_epochs=1",
)
DDP = "launch.accelerate_config=accelerate_configs/cpu_ddp.yaml"


@pytest.fixture
def hub(project: Project) -> Iterator[MovingHub]:
    """With a model and a data set at commit A."""
    with moving_hub() as hub:
        hub.commit("models", "org/Tiny-It", A, read_folder(project.add_model("gemma").resolve()))
        hub.commit("datasets", "org/Some-Rows", A, describe_rows(project.root / "data.jsonl"))
        yield hub


def describe_rows(path: Path, *, is_reversed: bool = False) -> dict[str, bytes]:
    """A data set of two configs, of which the second is the one that is meant without a word."""
    lines = path.read_bytes().splitlines(keepends=True)
    rows = b"".join(lines[100:] if is_reversed else lines)
    configs = [
        {"config_name": "few", "data_files": "few.jsonl"},
        {"config_name": "all", "data_files": "all.jsonl", "default": True},
    ]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    return {"all.jsonl": rows, "few.jsonl": b"".join(lines[:20]), "README.md": card}


def move(hub: MovingHub, project: Project) -> None:
    """To another model and other rows."""
    hub.commit("models", "org/Tiny-It", B, read_folder(project.add_model("gemma2").resolve()))
    rows = describe_rows(project.root / "data.jsonl", is_reversed=True)
    hub.commit("datasets", "org/Some-Rows", B, rows)


def test_an_attempt_after_the_branch_moved_loads_what_the_first_one_did(
    project: Project, hub: MovingHub
) -> None:
    """Cold, then warm; and a new run of the same names is another experiment, and told to be.

    On another machine, where only the checkpoints are, they are continued on their own commits
    alone.
    """
    environment = hub.environment(project.root / "cache")
    whole = launch(project, "whole", *OVERRIDES, environment=environment)
    adapter = load_json(whole.model_dir / "adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/Tiny-It", A)
    place = f"file://{project.root}/remote"
    remote = f"checkpoints.remote={{url: '{place}', options: {{auto_mkdir: true}}, load: true}}"
    overrides = (*OVERRIDES, remote, "checkpoints.archive=zip")
    paths = launch_killed_at(
        project,
        "killed",
        *overrides,
        event="os.rename",
        path="step-6/COMMITTED.json",
        environment=environment,
    )
    saved = shutil.copytree(project.root / "remote", project.root / "saved")
    move(hub, project)
    hub.take_requests()
    done = project.cli("sweep", "runs/tests/killed", environment=environment)
    assert done.returncode == 0, f"{done.stderr}\n{read_log(paths)}"
    assert hub.take_requests() == []
    assert [attempt["started"] for attempt in read_attempts(paths)] == ["cold", "warm"]
    assert "resuming from step 4" in read_log(paths)
    assert_same_outputs(paths, whole)
    # The base of another run is known by its commit.
    assert load_json(paths.attempt(1).base_path)["source"] == "shared"

    done = project.cli(
        "export", "runs/tests/killed", "--output", "exported", environment=environment
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in hub.take_requests() if B in line or "main" in line] == []
    assert f"`org/Tiny-It`, revision `{A}`" in (project.root / "exported/README.md").read_text()

    new = launch(project, "new", *OVERRIDES, environment=environment)
    assert load_json(new.recipe_path)["commits"] == {"model.path": B, "data.train.path": B}
    assert read_result(new).base != read_result(whole).base
    shown = project.cli("status", "runs", environment=environment).stderr
    assert shown.count(f"\n  revision: {A}\n") == 2, "for the model and the data set"
    checked = project.cli("check", "runs/tests/new", environment=environment)
    assert checked.returncode == 0 and f"\n  revision: {A}\n" in checked.stdout, checked.stderr

    (archive,) = saved.rglob("step-4.zip")
    shutil.rmtree(paths.run_dir)
    shutil.rmtree(project.root / "remote")
    saved.rename(project.root / "remote")
    other = try_launch(project, "killed", *overrides, environment=environment)
    assert other.returncode == 10, other.stderr
    assert f'commits.model.path: "{A}" -> "{B}"' in other.stderr
    assert f'commits.data.train.path: "{A}" -> "{B}"' in other.stderr
    assert "--resume PATH" in other.stderr
    arguments = ("launch", "recipe.yaml", *overrides, "--name", "killed")
    archive = project.root / "remote" / archive.relative_to(saved)
    done = project.cli(*arguments, "--resume", str(archive), environment=environment)
    assert done.returncode == 0, f"{done.stderr}\n{read_log(paths)}"
    assert load_json(paths.recipe_path)["commits"] == {"model.path": A, "data.train.path": A}
    assert "resuming from step 4" in read_log(paths)


def test_ranks_of_a_later_attempt_ask_nobody_and_what_is_gone_is_refused(
    project: Project, hub: MovingHub
) -> None:
    environment = hub.environment(project.root / "cache")
    paths = launch_killed_at(
        project,
        "killed",
        *OVERRIDES,
        DDP,
        event="os.rename",
        path="step-6/COMMITTED.json",
        num_processes=2,
        environment=environment,
    )
    move(hub, project)
    hub.take_requests()
    elsewhere = hub.environment(project.root / "another machine's cache")
    for repository in hub.repositories.values():
        del repository.commits[A]
    gone = try_launch(project, "killed", *OVERRIDES, DDP, num_processes=2, environment=elsewhere)
    assert gone.returncode == 10 and len(read_attempts(paths)) == 1
    assert f"at the commit {A}, which is neither in the cache" in gone.stderr
    hub.take_requests()
    launch(project, "killed", *OVERRIDES, DDP, num_processes=2, environment=environment)
    assert hub.take_requests() == []
    assert "resuming from step 4" in read_log(paths)
