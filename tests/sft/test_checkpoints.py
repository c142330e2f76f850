"""Which checkpoint counts: marked, whole, of this launch, and with the best weights that it would export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RefusedError
from runner.paths import RunPaths, marker_path
from runner.sft.checkpoints import (
    commit_checkpoint,
    find_resume_step,
    is_intact,
    list_committed,
    prune_checkpoints,
)

FINGERPRINT: dict[str, Any] = {"recipe_digest": "d" * 64, "num_processes": 2, "versions": {"torch": "2.13"}}


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path / "run")
    run.checkpoints_dir.mkdir(parents=True)
    return run


def write(paths: RunPaths, step: int) -> Path:
    """What Transformers leaves behind, subfolders as DeepSpeed makes them."""
    saved_dir = paths.checkpoints_dir / f"checkpoint-{step}"
    (saved_dir / "global_step" / "deep").mkdir(parents=True)
    (saved_dir / "model.safetensors").write_bytes(bytes(range(256)) * step)
    (saved_dir / "global_step" / "deep" / "rank_1.pt").write_bytes(b"shard of step %d" % step)
    (saved_dir / "training_args.bin").write_bytes(b"a pickle with the hub token")
    return saved_dir


def commit(paths: RunPaths, *steps: int) -> None:
    for step in steps:
        commit_checkpoint(write(paths, step), paths, step, FINGERPRINT)


def quarantined(paths: RunPaths) -> list[str]:
    return sorted(path.name for path in paths.quarantine_dir.iterdir()) if paths.quarantine_dir.exists() else []


def test_nothing_to_resume_from(paths: RunPaths) -> None:
    assert find_resume_step(paths, FINGERPRINT) is None
    paths.checkpoints_dir.rmdir()
    assert find_resume_step(paths, FINGERPRINT) is None


def test_a_committed_checkpoint_is_whole_and_holds_no_pickled_arguments(paths: RunPaths) -> None:
    commit(paths, 4, 12, 8)
    assert list_committed(paths) == [4, 8, 12] and find_resume_step(paths, FINGERPRINT) == 12
    checkpoint_dir = paths.checkpoint_dir(8)
    assert not (checkpoint_dir / "training_args.bin").exists()
    marker = json.loads(marker_path(checkpoint_dir).read_text())
    assert marker["step"] == 8 and marker["fingerprint"] == FINGERPRINT
    assert sorted(marker["files"]) == ["global_step/deep/rank_1.pt", "model.safetensors"]
    assert not quarantined(paths)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "global_step/deep/rank_1.pt", "COMMITTED.json"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    paths: RunPaths, damage: Callable[[Path], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(paths, 4, 8)
    damage(paths.checkpoint_dir(8) / name)
    assert find_resume_step(paths, FINGERPRINT) == 4
    assert quarantined(paths) == ["step-8.1"] and list_committed(paths) == [4]
    assert "moved checkpoint step-8 to" in capsys.readouterr().out
    assert find_resume_step(paths, FINGERPRINT) == 4, "once is enough"
    assert quarantined(paths) == ["step-8.1"]


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"files": {"a": 1}}', '{"files": []}', "\x00"])
def test_a_marker_that_is_no_marker_does_not_count(paths: RunPaths, content: str) -> None:
    commit(paths, 4, 8)
    marker_path(paths.checkpoint_dir(8)).write_text(content)
    assert not is_intact(paths.checkpoint_dir(8))
    assert find_resume_step(paths, FINGERPRINT) == 4


def test_what_was_being_written_is_set_aside(paths: RunPaths) -> None:
    commit(paths, 4)
    write(paths, 8)  # killed while Transformers wrote
    write(paths, 6).rename(paths.checkpoint_dir(6))  # killed before the marker
    assert find_resume_step(paths, FINGERPRINT) == 4
    assert quarantined(paths) == ["checkpoint-8.1", "step-6.1"]
    write(paths, 8)
    assert find_resume_step(paths, FINGERPRINT) == 4
    assert quarantined(paths) == ["checkpoint-8.1", "checkpoint-8.2", "step-6.1"], "nothing is overwritten"


def test_a_checkpoint_without_the_best_weights_it_would_export_does_not_count(paths: RunPaths) -> None:
    commit(paths, 2, 4, 8, 12)
    best = {2: 2, 4: 4, 8: 4, 12: 4}
    find_best = lambda folder: best[int(folder.name.removeprefix("step-"))]  # noqa: E731
    assert find_resume_step(paths, FINGERPRINT, find_best) == 12
    _flip_bit(paths.checkpoint_dir(4) / "model.safetensors")
    assert find_resume_step(paths, FINGERPRINT, find_best) == 2
    assert quarantined(paths) == ["step-12.1", "step-4.1", "step-8.1"] and list_committed(paths) == [2]


def test_another_launch_is_refused_and_nothing_is_moved(paths: RunPaths) -> None:
    commit(paths, 4)
    with pytest.raises(RefusedError, match=r"num_processes: 2 -> 1") as refused:
        find_resume_step(paths, {**FINGERPRINT, "num_processes": 1})
    assert "--fresh" in str(refused.value) and "step 4" in str(refused.value)
    assert list_committed(paths) == [4] and not quarantined(paths)


def test_another_version_is_a_warning(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    commit(paths, 4)
    assert find_resume_step(paths, {**FINGERPRINT, "versions": {"torch": "2.14"}}) == 4
    assert 'versions.torch: "2.13" -> "2.14"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep_latest", "best_step", "kept"),
    [(1, None, [16]), (1, 16, [16]), (1, 4, [4, 16]), (2, 8, [8, 12, 16]), (2, 12, [12, 16]), (9, 4, [4, 8, 12, 16])],
)
def test_pruning_keeps_the_latest_and_the_best(
    paths: RunPaths, keep_latest: int, best_step: int | None, kept: list[int]
) -> None:
    commit(paths, 4, 8, 12, 16)
    prune_checkpoints(paths, keep_latest=keep_latest, best_step=best_step)
    assert list_committed(paths) == kept
    assert sorted(path.name for path in paths.checkpoints_dir.iterdir()) == sorted(f"step-{step}" for step in kept)


def test_what_is_not_ours_stays(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    stranger = paths.checkpoints_dir / "my-notes"
    stranger.mkdir()
    (paths.checkpoints_dir / "step-by-step.txt").write_text("a file")
    write(paths, 6).rename(paths.checkpoint_dir(6))  # no marker: may be anything
    prune_checkpoints(paths, keep_latest=1, best_step=None)
    assert stranger.exists() and paths.checkpoint_dir(6).exists() and not paths.checkpoint_dir(4).exists()
    assert find_resume_step(paths, FINGERPRINT) == 8
    assert stranger.exists() and (paths.checkpoints_dir / "step-by-step.txt").exists()


def test_an_interrupted_deletion_is_finished_and_never_resumed(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    doomed = paths.checkpoints_dir / ".deleting-step-4"
    paths.checkpoint_dir(4).rename(doomed)
    os.unlink(doomed / "model.safetensors")
    assert find_resume_step(paths, FINGERPRINT) == 8
    assert not doomed.exists() and not quarantined(paths)
