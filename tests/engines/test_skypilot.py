"""SkyPilot tasks: one machine that sweeps the pending runs; where SkyPilot is installed, its own
parser reads them.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.engines.manifests import PendingRun
from runner.engines.skypilot import SkypilotOptions, build_task_file
from runner.errors import RefusedError
from tests.conftest import ROOT
from tests.support.submissions import (
    DEMO,
    DEMO_2,
    EIGHT_GPUS,
    OPTIONS,
    compare_with_golden,
    make_pending,
)

BUCKET = SkypilotOptions(OPTIONS.output_root, OPTIONS.image, storage="s3://my-bucket/runs")


@pytest.fixture(autouse=True)
def project_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def list_tasks() -> list[tuple[tuple[PendingRun, ...], SkypilotOptions]]:
    on_gpus = replace(BUCKET, gpu_type="H100", fail_fast=True, retry_failed=True, is_cold=True)
    return [
        (make_pending(DEMO, DEMO_2), replace(BUCKET, num_slots=2)),
        (make_pending(DEMO, EIGHT_GPUS), on_gpus),
    ]


def test_files_of_committed_recipes() -> None:
    texts = [build_task_file(runs, options) for runs, options in list_tasks()]
    compare_with_golden(texts, "skypilot_tasks.yaml")


def test_a_machine_has_gpus_for_all_slots() -> None:
    options = replace(BUCKET, num_slots=2, gpu_type="A100")
    task = yaml.safe_load(build_task_file(make_pending(EIGHT_GPUS, DEMO), options))
    assert task["resources"]["accelerators"] == "A100:16"
    assert f"--gpus {','.join(map(str, range(16)))}" in task["run"]
    with pytest.raises(RefusedError, match="no type is named"):
        build_task_file(make_pending(EIGHT_GPUS), BUCKET)


def test_the_machine_sweeps_every_run_whatever_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["$HOME", "a b$(touch pwned)'\"", "-x", "`touch pwned`;touch pwned"]
    (tmp_path / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    for number, name in enumerate(names):
        (tmp_path / f"{name}.yaml").write_text(
            (ROOT / DEMO).read_text().replace("gemma_060_full_seed1", f"run{number}", 1)
        )
    monkeypatch.chdir(tmp_path)
    tool = tmp_path / "bin" / "runner"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    tool.chmod(0o755)
    runs = make_pending(*(f"./{name}.yaml" for name in names))
    task = yaml.safe_load(build_task_file(runs, BUCKET))
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env={"PATH": f"{tool.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    recipes = [f"./{name}.yaml" if name.startswith("-") else f"{name}.yaml" for name in names]
    (mount,) = task["file_mounts"]
    assert done.stdout.splitlines() == ["sweep", *recipes, "--output-root", mount, "--slots", "1"]
    assert not (tmp_path / "pwned").exists()


def test_skypilot_reads_the_tasks(tmp_path: Path) -> None:
    """SkyPilot and its dependencies are too heavy to be installed for this: see docs/engines.md for
    the command.
    """
    sky: Any = pytest.importorskip("sky")
    for runs, options in list_tasks():
        path = tmp_path / "task.yaml"
        path.write_text(build_task_file(runs, options))
        task = sky.Task.from_yaml(str(path))
        (resources,) = task.resources
        assert task.num_nodes == 1 and resources.image_id
        assert bool(resources.accelerators) == (options.gpu_type is not None)
        assert list(task.storage_mounts) == list(yaml.safe_load(path.read_text())["file_mounts"])
