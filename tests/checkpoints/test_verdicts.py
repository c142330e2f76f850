"""What `runner why` says of checkpoints is what the trainer then does, and saying it changes
nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.choose import Outlook, judge_checkpoints
from runner.checkpoints.restore import choose_resume_step
from runner.checkpoints.retention import strip_checkpoint
from runner.errors import RefusedError
from runner.recipe.parse import parse_recipe
from runner.run.paths import RunPaths, marker_path
from tests.conftest import RECIPE_TEXT
from tests.support.fake_checkpoints import (
    FINGERPRINT,
    commit,
    flip_bit,
    make_limits,
    make_paths,
    write,
)

LIMITS = make_limits(keep_latest=9)
RECIPE = parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=("checkpoints.keep_latest=9",))
VALUES = {4: 3.0, 8: 1.0, 12: 2.0}  # step 8 is the best


def lose(paths: RunPaths, step: int) -> None:
    shutil.rmtree(paths.checkpoint_dir(step))


def damage(paths: RunPaths, step: int, name: str = "optimizer.pt") -> None:
    flip_bit(paths.checkpoint_dir(step) / name)


def pack(paths: RunPaths, *steps: int) -> None:
    for step in steps:
        write_archive(paths.checkpoint_dir(step), paths.archive_path(step))


CASES: dict[str, Callable[[RunPaths], Any]] = {
    "whole": lambda run: None,
    "newest damaged": lambda run: damage(run, 12),
    "newest marker damaged": lambda run: damage(run, 12, "COMMITTED.json"),
    "newest marker missing": lambda run: marker_path(run.checkpoint_dir(12)).unlink(),
    "newest cut": lambda run: (run.checkpoint_dir(12) / "model.safetensors").write_bytes(b"x"),
    "best damaged": lambda run: damage(run, 8),
    "best lost": lambda run: lose(run, 8),
    "all damaged": lambda run: [damage(run, step) for step in VALUES],
    "newest damaged, whole as an archive": lambda run: (pack(run, 12), damage(run, 12)),
    "newest lost, whole as an archive": lambda run: (pack(run, 12), lose(run, 12)),
    "newest lost, archive damaged": lambda run: (
        pack(run, 12),
        lose(run, 12),
        flip_bit(run.archive_path(12)),
    ),
    "archive of another step": lambda run: (
        pack(run, 4),
        shutil.copy(run.archive_path(4), run.archive_path(16)),
    ),
    "best lost, whole as an archive": lambda run: (pack(run, 8), lose(run, 8)),
    "newest stripped": lambda run: strip_checkpoint(run.checkpoint_dir(12)),
    "best stripped": lambda run: strip_checkpoint(run.checkpoint_dir(8)),
    "all but the damaged newest stripped": lambda run: (
        [strip_checkpoint(run.checkpoint_dir(step)) for step in (4, 8)],
        damage(run, 12),
    ),
    "an older one under a newer name": lambda run: shutil.copytree(
        run.checkpoint_dir(4), run.checkpoint_dir(40)
    ),
    "unfinished": lambda run: write(run, 16),
    "nothing": lambda run: shutil.rmtree(run.checkpoints_dir),
}


def make(root: Path, case: str) -> RunPaths:
    paths = make_paths(root)
    commit(paths, 4, 8, 12, values=VALUES)
    CASES[case](paths)
    return paths


def contents(paths: RunPaths) -> dict[str, tuple[int, bytes]]:
    files = (path for path in paths.run_dir.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("num_processes", [2, 1])
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_what_happens(case: str, num_processes: int, tmp_path: Path) -> None:
    paths = make(tmp_path, case)
    before = contents(paths)
    fingerprint = {**FINGERPRINT, "num_processes": num_processes}
    outlook = judge_checkpoints(paths, LIMITS, fingerprint, 1)
    assert contents(paths) == before
    found: int | None = None
    is_refused = False
    try:
        found = choose_resume_step(paths, RECIPE, fingerprint, "auto")
    except RefusedError:
        is_refused = True
    assert (outlook.start_step, outlook.is_refused) == (found, is_refused)
    assert [verdict.name for verdict in outlook.verdicts if verdict.is_next] == [
        f"step-{found}"
    ] * (found is not None)
    moved = {path.name.partition(".")[0] for path in paths.quarantine_dir.glob("*")}
    said = {verdict.name for verdict in outlook.verdicts if "quarantine" in verdict.what}
    assert said <= moved, "what is said to be moved is moved"


def judge(paths: RunPaths, **changed: Any) -> dict[str, str]:
    outlook: Outlook = judge_checkpoints(paths, LIMITS, {**FINGERPRINT, **changed}, 1)
    return {verdict.name: verdict.what for verdict in outlook.verdicts}


def test_damage_is_named(tmp_path: Path) -> None:
    paths = make(tmp_path, "whole")
    whole = judge(paths)
    assert list(whole) == ["step-12", "step-8", "step-4"] and "go on from here" in whole["step-12"]
    damage(paths, 12)
    (paths.checkpoint_dir(8) / "rng_state_0.pth").unlink()
    model_path = paths.checkpoint_dir(4) / "model.safetensors"
    model_path.write_bytes(model_path.read_bytes()[:-1])
    found = judge(paths)
    assert "optimizer.pt holds other bytes than were committed" in found["step-12"]
    assert "rng_state_0.pth is missing" in found["step-8"]
    assert "model.safetensors has 1023 bytes, 1024 were committed" in found["step-4"]


def test_each_reason_is_said(tmp_path: Path) -> None:
    refused = judge(make(tmp_path / "a", "whole"), num_processes=1)
    assert "of another launch: num_processes: 2 -> 1" in refused["step-12"]
    lost = judge(make(tmp_path / "b", "best lost"))
    assert (
        "its best weights, of step 8, are lost" in lost["step-12"]
        and "go on from here" in lost["step-4"]
    )
    assert "without optimizer state" in judge(make(tmp_path / "c", "newest stripped"))["step-12"]
    packed = judge(make(tmp_path / "d", "newest damaged, whole as an archive"))
    assert (
        "but whole in step-12.zip" in packed["step-12"] and "go on from here" in packed["step-12"]
    )
    assert "never finished" in judge(make(tmp_path / "e", "unfinished"))["checkpoint-16"]
    assert judge(make_paths(tmp_path / "f")) == {}


def test_larger_micro_batches_of_before_are_told_apart(tmp_path: Path) -> None:
    paths = make(tmp_path, "whole")
    outlook = judge_checkpoints(paths, LIMITS, {**FINGERPRINT, "per_device_train_batch_size": 1}, 2)
    assert (outlook.start_step, outlook.is_refused) == (None, False)
    assert all("ran out of memory" in verdict.what for verdict in outlook.verdicts)
