"""Checkpoints that are kept, archived and stripped; a kill at any instant loses nothing."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints.archive import load_archived_marker, verify_archive
from runner.checkpoints.commit import commit_checkpoint
from runner.checkpoints.marker import is_intact, list_archived, list_committed, load_marker
from runner.checkpoints.retention import apply_retention, choose_kept
from runner.run.paths import RunPaths
from tests.support.fake_checkpoints import (
    DIGEST,
    FINGERPRINT,
    commit,
    commit_under,
    dies_at,
    flip_bit,
    listing,
    make_limits,
    make_paths,
    quarantined,
    resume,
    write,
)

VALUES = {4: 3.0, 8: 1.0, 12: 2.0, 16: 4.0, 20: 5.0}


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_paths(tmp_path)


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"keep_latest": 1, "keep_best": 1}, [8, 20]),
        ({"keep_latest": 2, "keep_best": 1}, [8, 16, 20]),
        ({"keep_latest": 1, "keep_best": 3}, [4, 8, 12, 20]),
        ({"keep_latest": 2, "keep_best": 5}, [4, 8, 12, 16, 20]),
        # Both among the best and the newest.
        ({"keep_latest": 1, "keep_best": 2, "mode": "max"}, [16, 20]),
        ({"keep_latest": 9, "keep_best": 9}, [4, 8, 12, 16, 20]),
    ],
)
def test_the_newest_and_the_best_are_limits_of_their_own(
    keys: dict[str, Any], kept: list[int]
) -> None:
    assert choose_kept([4, 8, 12, 16, 20], list(VALUES.items()), make_limits(**keys)) == kept


def test_only_evaluated_steps_can_be_the_best() -> None:
    evaluations = [(4, 3.0), (12, 2.0), (14, 0.0)]  # 14 was evaluated, but never saved
    assert choose_kept([4, 6, 8, 12, 16], evaluations, make_limits(keep_best=2)) == [4, 12, 16]
    assert choose_kept([4, 6, 8], [], make_limits(keep_best=2)) == [8]
    assert choose_kept([4, 8, 12], [(4, 1.0), (8, 1.0)], make_limits()) == [4, 12], (
        "the first among equals"
    )


def test_pruning_touches_nothing_but_committed_checkpoints(paths: RunPaths) -> None:
    commit(paths, 4, 8, 12)
    strangers = [
        paths.checkpoints_dir / name for name in ("notes", "step-by-step", "step-2.zip", "step-6")
    ]
    for stranger in strangers:
        stranger.write_text("somebody's")
    apply_retention(paths, make_limits(), [], DIGEST)
    assert list_committed(paths) == [12]
    assert listing(paths.checkpoints_dir) == sorted(
        ["step-12", *(stranger.name for stranger in strangers)]
    )


def test_times_of_folders_say_nothing(paths: RunPaths) -> None:
    """After a copy without times, or a clock that was set back, the newest is the one with the
    highest step.
    """
    commit(paths, 4, 8, 12, 16, values=VALUES)
    for age, step in enumerate((16, 8, 12, 4)):
        os.utime(paths.checkpoint_dir(step), (age, age))
    apply_retention(paths, make_limits(keep_latest=2), [(4, 3.0), (8, 1.0)], DIGEST)
    assert list_committed(paths) == [8, 12, 16]


def test_what_this_run_has_not_written_is_neither_deleted_nor_counted(paths: RunPaths) -> None:
    commit(paths, 4, 8, 12, values=VALUES)
    # A user keeps another run's checkpoint here.
    commit_under(paths, 2, {**FINGERPRINT, "recipe_digest": "e" * 64})
    commit_under(paths, 99, {**FINGERPRINT, "recipe_digest": "e" * 64})
    # A copy under another step's name.
    shutil.copytree(paths.checkpoint_dir(4), paths.checkpoint_dir(6))
    paths.checkpoint_dir(12).rename(paths.checkpoint_dir(50))
    for name in ("step-1 (copy)", "step-008", "backup"):
        shutil.copytree(paths.checkpoint_dir(8), paths.checkpoints_dir / name)
    strangers = {"step-2", "step-6", "step-50", "step-99", "step-1 (copy)", "step-008", "backup"}
    before = {
        path: path.read_bytes()
        for name in strangers
        for path in (paths.checkpoints_dir / name).rglob("*.pt")
    }
    apply_retention(paths, make_limits(archive="zip", save_optimizer=False), [(4, 3.0)], DIGEST)
    assert set(listing(paths.checkpoints_dir)) == {
        *strangers,
        "step-4",
        "step-4.zip",
        "step-8",
        "step-8.zip",
    }
    assert (
        before
        and all(path.read_bytes() == content for path, content in before.items())
        and not quarantined(paths)
    )


def test_a_committed_one_whose_marker_was_damaged_is_moved_aside_and_never_deleted(
    paths: RunPaths,
) -> None:
    commit(paths, 4, 8)
    flip_bit(paths.checkpoint_dir(4) / "COMMITTED.json")
    apply_retention(paths, make_limits(), [], DIGEST)
    assert list_committed(paths) == [8] and quarantined(paths) == ["step-4.1"]


def test_each_checkpoint_that_stays_is_archived_and_goes_together_with_its_archive(
    paths: RunPaths,
) -> None:
    limits = make_limits(archive="zip", keep_latest=2)
    for step in VALUES:
        commit(paths, step, values=VALUES)
        apply_retention(
            paths, limits, [(at, value) for at, value in VALUES.items() if at <= step], DIGEST
        )
    assert list_committed(paths) == list_archived(paths) == [8, 16, 20]
    for step in (8, 16, 20):
        assert verify_archive(paths.archive_path(step)) == load_marker(paths.checkpoint_dir(step))
    apply_retention(paths, make_limits(archive="none"), list(VALUES.items()), DIGEST)
    assert listing(paths.checkpoints_dir) == ["step-20", "step-20.zip", "step-8", "step-8.zip"], (
        "older archives stay"
    )


def test_an_archive_that_is_missing_or_damaged_is_written_again(paths: RunPaths) -> None:
    limits = make_limits(archive="zip", keep_latest=2)
    commit(paths, 4, 8)
    apply_retention(paths, limits, [], DIGEST)
    before = paths.archive_path(8).read_bytes()
    paths.archive_path(4).unlink()
    paths.archive_path(8).write_bytes(before[:-30])
    apply_retention(paths, limits, [], DIGEST)
    assert list_archived(paths) == [4, 8] and paths.archive_path(8).read_bytes() == before
    assert quarantined(paths) == ["step-8.zip.1"]


@pytest.mark.parametrize("damaged", ["COMMITTED.json", "model.safetensors"])
def test_a_damaged_one_that_nobody_needs_stops_nothing(paths: RunPaths, damaged: str) -> None:
    limits = make_limits(keep_latest=3, archive="zip", save_optimizer=False)
    commit(paths, 4, 8, 12, values={8: 1.0})
    flip_bit(paths.checkpoint_dir(4) / damaged)
    apply_retention(paths, limits, [(8, 1.0)], DIGEST)
    assert quarantined(paths) == ["step-4.1"] and list_committed(paths) == [8, 12]


def test_optimizer_state_stays_in_the_newest_only(paths: RunPaths) -> None:
    limits = make_limits(save_optimizer=False, keep_latest=2, archive="zip")
    for step in VALUES:
        commit(paths, step, values=VALUES)
        apply_retention(
            paths, limits, [(at, value) for at, value in VALUES.items() if at <= step], DIGEST
        )
        assert (
            is_intact(paths.checkpoint_dir(step))
            and not load_marker(paths.checkpoint_dir(step)).is_stripped
        )
    for step in (8, 16):
        assert (
            is_intact(paths.checkpoint_dir(step))
            and load_marker(paths.checkpoint_dir(step)).is_stripped
        )
        assert listing(paths.checkpoint_dir(step)) == [
            "COMMITTED.json",
            "model.safetensors",
            "trainer_state.json",
        ]
        assert verify_archive(paths.archive_path(step)).is_stripped
    assert resume(paths) == 20


def test_weights_that_only_deepspeed_holds_are_not_stripped(paths: RunPaths) -> None:
    commit(paths, 4, 8)
    checkpoint_dir = paths.checkpoint_dir(4)
    (checkpoint_dir / "model.safetensors").rename(checkpoint_dir / "optimizer.bin")
    commit_again = paths.checkpoints_dir / "checkpoint-4"
    checkpoint_dir.rename(commit_again)
    (commit_again / "COMMITTED.json").unlink()
    commit_checkpoint(commit_again, paths, 4, FINGERPRINT)
    apply_retention(paths, make_limits(save_optimizer=False, keep_latest=2), [], DIGEST)
    assert not load_marker(paths.checkpoint_dir(4)).is_stripped and is_intact(
        paths.checkpoint_dir(4)
    )


def test_a_kill_at_any_instant_loses_nothing(tmp_path: Path) -> None:
    """Commit, archive, prune and strip are killed before every single change of a file, then
    finished from the rest.
    """
    limits = make_limits(save_optimizer=False, archive="zip", keep_latest=2)
    known = {step: [(at, value) for at, value in VALUES.items() if at <= step] for step in VALUES}

    def work(run: RunPaths) -> None:
        if 16 not in list_committed(run):
            commit_checkpoint(run.checkpoints_dir / "checkpoint-16", run, 16, FINGERPRINT)
        apply_retention(run, limits, known[16], DIGEST)

    before = make_paths(tmp_path / "before")
    for step in (8, 10, 12):
        commit(before, step, values=VALUES)
        apply_retention(before, limits, known.get(step, known[8]), DIGEST)
    write(before, 16, VALUES)  # all ranks have saved
    assert (
        list_committed(before) == [8, 10, 12]
        and not load_marker(before.checkpoint_dir(12)).is_stripped
    )
    expected = RunPaths(tmp_path / "expected")
    shutil.copytree(before.run_dir, expected.run_dir)
    work(expected)
    assert (
        list_committed(expected) == [8, 12, 16]
        and load_marker(expected.checkpoint_dir(12)).is_stripped
    )
    for number in itertools.count(1):
        run = RunPaths(tmp_path / "killed")
        shutil.copytree(before.run_dir, run.run_dir)
        is_killed = dies_at(run.run_dir, number, lambda: work(RunPaths(tmp_path / "killed")))
        newest = max(list_committed(run))
        assert newest >= 12 and is_intact(run.checkpoint_dir(newest)), "never without a whole one"
        assert not load_marker(run.checkpoint_dir(newest)).is_stripped
        assert is_intact(run.checkpoint_dir(8)), "never without the best one"
        assert resume(run) == newest
        if newest == 12:  # the resumed attempt trains and saves again
            write(run, 16, VALUES)
        work(run)
        assert _contents(run) == _contents(expected), f"killed before change {number}"
        assert quarantined(run) in ([], ["checkpoint-16.1"], ["step-16.1"])
        shutil.rmtree(run.run_dir)
        if not is_killed:
            break
    assert number > 20


def _contents(paths: RunPaths) -> dict[str, bytes]:
    files = (path for path in paths.checkpoints_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(paths.run_dir)): path.read_bytes() for path in files}


def test_archives_hold_the_marker_of_their_folder_without_reading_it_all(paths: RunPaths) -> None:
    commit(paths, 4)
    apply_retention(paths, make_limits(archive="zip"), [], DIGEST)
    assert load_archived_marker(paths.archive_path(4)) == load_marker(paths.checkpoint_dir(4))
    flip_bit(paths.archive_path(4))  # in the contents
    assert load_archived_marker(paths.archive_path(4)).step == 4
