"""A disk that is full, at several moments; with space back, the run ends with the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runner.checkpoints.commit import give_back_on_full_disk
from runner.model.memory import require_room, require_room_for_checkpoint, require_space
from runner.recipe.parse import parse_recipe
from runner.run.paths import RunPaths
from runner.sft.recorder import Recorder
from tests.conftest import RECIPE_TEXT, Project
from tests.support.fake_checkpoints import commit, listing, make_paths
from tests.support.faulty_runs import launch_faulty, make_fault
from tests.support.reports import completed, make_recipe
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    launch,
    read_attempts,
    read_log,
    try_launch,
)
from tests.support.whole_runs import MODEL_FILES, add_files

SHORT = (
    "training={max_steps: 4, num_train_epochs: null}",
    "evaluation={eval_steps: 2}",
    "checkpoints={save_steps: 2}",
)
RECIPE = parse_recipe(RECIPE_TEXT, where="recipe.yaml")


def test_what_does_not_fit_is_refused_with_what_is_free(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a byte")
    with pytest.raises(OSError, match=r"the moon would take .* MiB, .* MiB are free") as refused:
        require_space(tmp_path, 2**60, "the moon")
    assert refused.value.errno == errno.ENOSPC and refused.value.filename == str(tmp_path)


def test_a_checkpoint_is_not_begun_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_paths(tmp_path)
    require_room_for_checkpoint(RECIPE, paths, 4)
    commit(paths, 4)
    require_room_for_checkpoint(RECIPE, paths, 8)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10)
    )
    with pytest.raises(OSError, match="the checkpoint of step 8 would take"):
        require_room_for_checkpoint(RECIPE, paths, 8)


def test_a_run_is_not_begun_that_does_not_fit(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three checkpoints and the one being written, each with two states an element, and the
    export.
    """
    monkeypatch.chdir(project.root)
    paths = make_paths(tmp_path)
    weight = torch.nn.Parameter(torch.zeros(1000, 1000))
    needed = 4 * 1000 * 1000 * (4 * 3 + 1)
    for free, is_enough in ((needed, True), (needed - 1, False)):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if is_enough:
            require_room(RECIPE, paths, [("weight", weight)], 22, 1)
        else:
            with pytest.raises(
                OSError, match=r"the checkpoints that are kept, and the export, would take 49\.6"
            ):
                require_room(RECIPE, paths, [("weight", weight)], 22, 1)
    (paths.checkpoints_dir / "there").write_bytes(b"x")
    require_room(RECIPE, paths, [("weight", weight)], 22, 1)


def test_a_repair_needs_room_for_the_export_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, paths, _ = completed(tmp_path, make_recipe("one", {}), tuned=2.0)
    add_files(paths)
    needed = sum(map(len, MODEL_FILES.values()))
    context: Any = SimpleNamespace(is_main=True, is_repair=True, paths=paths, recipe=recipe)
    trainer: Any = SimpleNamespace(model=torch.nn.Linear(100, 100))
    for free, is_enough in ((needed, True), (needed - 1, False)):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        samples: Any = None
        with nullcontext() if is_enough else pytest.raises(OSError, match="the export would take"):
            Recorder(context, samples).begin(trainer, resume_step=2)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), OSError(errno.EIO, "x")]
)
def test_a_partial_checkpoint_gives_its_room_back(error: OSError, tmp_path: Path) -> None:
    paths = make_paths(tmp_path)
    commit(paths, 4)
    partial = paths.checkpoints_dir / "checkpoint-8"
    partial.mkdir()
    with (
        pytest.raises(OSError),
        give_back_on_full_disk(partial, paths.checkpoint_dir(4), is_main=True),
    ):
        raise error
    is_full = error.errno != errno.EIO
    assert listing(paths.checkpoints_dir) == (["step-4"] if is_full else ["checkpoint-8", "step-4"])


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_a_retry_and_no_bit(finished: Project) -> None:
    """While a marker, the metrics and the result are written: each once, then there is space
    again.
    """
    full = (errno.ENOSPC, os.strerror(errno.ENOSPC))
    done = launch_faulty(
        finished,
        "disk-full",
        *RUNS["gemma-lora"],
        "launch.retries={transient: 3, backoff_seconds: 0}",
        faults=[
            make_fault("os.rename", "COMMITTED.json", "builtins.OSError", *full),
            make_fault("open", "metrics.jsonl", "builtins.OSError", *full, count=8),
            make_fault("os.rename", "/model", "builtins.OSError", *full),
        ],
    )
    paths = finished.paths("disk-full")
    assert done.returncode == 0, done.stderr + read_log(paths)
    failures = [one["failure"] for one in read_attempts(paths)]
    assert [failure and failure["kind"] for failure in failures] == ["transient"] * 3 + [None]
    assert all(failure["message"].startswith("disk full: ") for failure in failures[:3])
    assert not paths.quarantine_dir.exists(), "what was never committed takes no room"
    assert_same_outputs(paths, finished.paths("gemma-lora"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], check=False
    )
    if made.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
@pytest.mark.torture
def test_a_small_disk_at_any_fill(small_disk: Path, project: Project) -> None:
    """From no byte left, where nothing can be recorded, up to where all but the last file fits."""
    project.add_model()
    launch(project, "reference", *SHORT)
    (project.root / "runs" / "tests" / "reference").rename(project.root / "reference")
    shutil.rmtree(project.root / "runs")
    (project.root / "runs").symlink_to(small_disk)
    num_failed = 0
    for free_kib in (0, 24, 416, 448, 480, 512, 544, 576):
        name = f"free-{free_kib}"
        (small_disk / "tests" / name).mkdir(parents=True)
        ballast = small_disk / "ballast"
        free = shutil.disk_usage(small_disk).free
        with ballast.open("wb") as stream:
            stream.write(b"x" * max(0, free - free_kib * 1024))
        first = try_launch(project, name, *SHORT)
        assert "\nTraceback" not in f"\n{first.stderr}", "the log's own is indented"
        ballast.unlink()
        if first.returncode != 0:
            assert (first.returncode, "disk full" in first.stderr) == (
                14,
                True,
            ), f"{free_kib}: {first.stderr}"
            num_failed += 1
            launch(project, name, *SHORT)
        paths = project.paths(name)
        assert_same_outputs(paths, RunPaths(project.root / "reference"))
        assert not paths.quarantine_dir.exists()
        shutil.rmtree(paths.run_dir)
    assert num_failed > 2, "before a record, before the training and within it"
