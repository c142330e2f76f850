"""The checkpoint that counts: marked, intact, of this launch, and with the best weights that it
would export.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.marker import is_intact, list_archived, list_committed, list_files
from runner.checkpoints.retention import strip_checkpoint
from runner.errors import RefusedError
from runner.run.paths import RunPaths, marker_path
from tests.support.fake_checkpoints import (
    FINGERPRINT,
    STATE_FILES,
    commit,
    flip_bit,
    make_paths,
    quarantined,
    resume,
    write,
)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_paths(tmp_path)


def test_nothing_to_resume_from(paths: RunPaths) -> None:
    assert resume(paths) is None
    paths.checkpoints_dir.rmdir()
    assert resume(paths) is None


def test_a_committed_checkpoint_is_whole_and_holds_no_pickled_arguments(paths: RunPaths) -> None:
    commit(paths, 4, 12, 8)
    assert list_committed(paths) == [4, 8, 12] and resume(paths) == 12
    checkpoint_dir = paths.checkpoint_dir(8)
    assert not (checkpoint_dir / "training_args.bin").exists()
    marker = json.loads(marker_path(checkpoint_dir).read_text())
    assert marker["step"] == 8 and marker["fingerprint"] == FINGERPRINT
    assert sorted(marker["files"]) == sorted(
        [*STATE_FILES, "model.safetensors", "trainer_state.json"]
    )
    assert not quarantined(paths)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "zero-filled": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit flipped": flip_bit,
}
COMMITTED_FILES = ("COMMITTED.json", "model.safetensors", "trainer_state.json", *STATE_FILES)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", COMMITTED_FILES)
def test_any_damage_to_any_file_sets_the_checkpoint_aside_for_the_one_before(
    paths: RunPaths, damage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(paths, 4, 8)
    assert {
        str(path.relative_to(paths.checkpoint_dir(8)))
        for path in list_files(paths.checkpoint_dir(8))
    } == {*COMMITTED_FILES}
    DAMAGES[damage](paths.checkpoint_dir(8) / name)
    assert resume(paths) == 4
    assert quarantined(paths) == ["step-8.1"] and list_committed(paths) == [4]
    assert "moved checkpoint step-8 to" in capsys.readouterr().out
    assert resume(paths) == 4, "once is enough"
    assert quarantined(paths) == ["step-8.1"]


def test_what_is_damaged_is_named(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    commit(paths, 4)
    flip_bit(paths.checkpoint_dir(4) / "optimizer.pt")
    assert resume(paths) is None
    assert "optimizer.pt does not match its committed checksum" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["copied", "renamed"])
def test_a_folder_under_the_name_of_another_step_does_not_count(paths: RunPaths, how: str) -> None:
    """Otherwise a stale checkpoint under a newer name would win at every later resume."""
    commit(paths, 4, 8)
    (shutil.copytree if how == "copied" else shutil.move)(
        paths.checkpoint_dir(4), paths.checkpoint_dir(40)
    )
    assert resume(paths) == 8
    assert quarantined(paths) == ["step-40.1"]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"files": {"a": 1}}', '{"files": []}', "\x00"]
)
def test_a_marker_that_is_no_marker_does_not_count(paths: RunPaths, content: str) -> None:
    commit(paths, 4, 8)
    marker_path(paths.checkpoint_dir(8)).write_text(content)
    assert not is_intact(paths.checkpoint_dir(8))
    assert resume(paths) == 4


def test_what_was_being_written_is_set_aside(paths: RunPaths) -> None:
    commit(paths, 4)
    write(paths, 8)  # killed while Transformers wrote
    write(paths, 6).rename(paths.checkpoint_dir(6))  # killed before the marker
    assert resume(paths) == 4
    assert quarantined(paths) == ["checkpoint-8.1", "step-6.1"]
    write(paths, 8)
    assert resume(paths) == 4
    assert quarantined(paths) == ["checkpoint-8.1", "checkpoint-8.2", "step-6.1"], (
        "nothing is overwritten"
    )


def test_a_checkpoint_without_the_best_weights_it_would_export_does_not_count(
    paths: RunPaths,
) -> None:
    commit(paths, 2, 4, 8, 12, values={2: 3.0, 4: 1.0, 8: 2.0, 12: 2.0})
    assert resume(paths) == 12
    flip_bit(paths.checkpoint_dir(4) / "model.safetensors")
    assert resume(paths) == 2
    assert quarantined(paths) == ["step-12.1", "step-4.1", "step-8.1"] and list_committed(
        paths
    ) == [2]


def test_another_launch_is_refused_and_nothing_is_moved(paths: RunPaths) -> None:
    commit(paths, 4)
    with pytest.raises(RefusedError, match=r"num_processes: 2 -> 1") as refused:
        resume(paths, num_processes=1)
    assert "--fresh" in str(refused.value) and "step 4" in str(refused.value)
    assert list_committed(paths) == [4] and not quarantined(paths)


def test_an_interrupted_deletion_is_finished_and_never_resumed(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    doomed = paths.checkpoints_dir / ".deleting-step-4"
    paths.checkpoint_dir(4).rename(doomed)
    os.unlink(doomed / "model.safetensors")
    assert resume(paths) == 8
    assert not doomed.exists() and not quarantined(paths)


def test_a_damaged_folder_is_restored_from_its_archive(
    paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(paths, 4, 8)
    write_archive(paths.checkpoint_dir(8), paths.archive_path(8))
    flip_bit(paths.checkpoint_dir(8) / "optimizer.pt")
    assert resume(paths) == 8 and is_intact(paths.checkpoint_dir(8))
    assert quarantined(paths) == ["step-8.1"]
    assert "restored checkpoint step-8 from" in capsys.readouterr().out


def test_an_archive_alone_is_resumed_from(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    write_archive(paths.checkpoint_dir(8), paths.archive_path(8))
    shutil.rmtree(paths.checkpoint_dir(8))
    assert list_committed(paths) == [4] and list_archived(paths) == [8]
    assert resume(paths) == 8 and list_committed(paths) == [4, 8]


def test_an_archive_that_is_damaged_or_of_another_step_is_moved_aside(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    write_archive(paths.checkpoint_dir(8), paths.archive_path(8))
    shutil.copy(paths.archive_path(8), paths.archive_path(12))
    flip_bit(paths.archive_path(8))
    shutil.rmtree(paths.checkpoint_dir(8))
    assert resume(paths) == 4
    assert quarantined(paths) == ["step-12.zip.1", "step-8.zip.1"]


def test_a_stripped_checkpoint_is_never_resumed_from_but_holds_the_best_weights(
    paths: RunPaths,
) -> None:
    commit(paths, 4, 8, 12, values={4: 1.0})
    strip_checkpoint(paths.checkpoint_dir(4))
    strip_checkpoint(paths.checkpoint_dir(8))
    assert resume(paths) == 12
    assert list_committed(paths) == [4, 8, 12] and not quarantined(paths)
    flip_bit(paths.checkpoint_dir(12) / "model.safetensors")
    assert resume(paths) is None, "nothing whole is left"
    assert list_committed(paths) == [] and quarantined(paths) == [
        "step-12.1",
        "step-4.1",
        "step-8.1",
    ]


def test_a_stripped_checkpoint_newer_than_what_is_resumed_from_is_moved_aside(
    paths: RunPaths,
) -> None:
    commit(paths, 4, 8, 12)
    strip_checkpoint(paths.checkpoint_dir(8))
    flip_bit(paths.checkpoint_dir(12) / "model.safetensors")
    assert resume(paths) == 4, "as after `save_optimizer` was turned off and on"
    assert list_committed(paths) == [4] and quarantined(paths) == ["step-12.1", "step-8.1"]


def test_what_is_not_ours_stays(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    strangers = [
        paths.checkpoints_dir / name
        for name in ("my-notes", "step-by-step.txt", "step-one.zip", "old.zip")
    ]
    for stranger in strangers:
        stranger.write_text("somebody's")
    assert resume(paths) == 8
    assert [stranger.read_text() for stranger in strangers] == ["somebody's"] * 4
