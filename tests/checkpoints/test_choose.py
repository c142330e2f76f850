"""The choice of a checkpoint: each way in which checkpoints can be damaged, with the step that is
resumed, the checkpoints that are moved aside and why, and the verdict on every checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.choose import (
    Choice,
    Move,
    Policy,
    Restore,
    Verification,
    Wanted,
    choose,
    read_inventory,
)
from runner.checkpoints.commit import commit_checkpoint
from runner.checkpoints.retention import strip_checkpoint
from runner.errors import RefusedError
from runner.run.paths import RunPaths, marker_path
from tests.support.fake_checkpoints import (
    FINGERPRINT,
    commit,
    flip_bit,
    make_limits,
    make_paths,
    quarantined,
    resume,
    write,
)

LIMITS = make_limits(keep_latest=9)
VALUES = {4: 3.0, 8: 1.0, 12: 2.0}  # step 8 is the best


def lose(paths: RunPaths, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(paths.checkpoint_dir(step))


def damage(paths: RunPaths, step: int, name: str = "optimizer.pt") -> None:
    flip_bit(paths.checkpoint_dir(step) / name)


def pack(paths: RunPaths, *steps: int) -> None:
    for step in steps:
        write_archive(paths.checkpoint_dir(step), paths.archive_path(step))


def strip(paths: RunPaths, *steps: int) -> None:
    for step in steps:
        strip_checkpoint(paths.checkpoint_dir(step))


NEXT: Final = "; an attempt would resume from here"
OLDER: Final = "; older than the deciding checkpoint"
MOVED: Final = "; an attempt would move it to quarantine"
FLIPPED: Final = "optimizer.pt does not match its committed checksum"
BAD_MARKER: Final = "checkpoints/step-12/COMMITTED.json was changed: its checksum does not match"
BAD_ARCHIVE: Final = (
    "checkpoints/step-12.zip is not a readable ZIP archive: Bad CRC-32 for file"
    " 'step-12/model.safetensors'"
)
UNCOMMITTED: Final = "its files differ from those committed: "
UNFINISHED: Final = "never finished; an attempt would move it to quarantine"
LOST_BEST: Final = "the best weights so far, of step 8, are lost"
NO_BEST: Final = ", but its best weights, of step 8, are lost" + MOVED
STRIPPED: Final = "it was stripped of its optimizer state, and nothing newer can be resumed"
NO_STATE: Final = (
    "intact, but without optimizer state: its weights can be used, but it cannot be resumed"
)


@dataclass(frozen=True)
class Case:
    """Damage to checkpoints 4, 8 and 12, and the right answer."""

    happen: Callable[[RunPaths], Any]
    step: int | None
    verdicts: dict[str, str]
    moves: tuple[tuple[str, str], ...] = ()
    restored: tuple[int, ...] = ()


WHOLE: Final = {"step-12": "intact" + NEXT, "step-8": "intact" + OLDER, "step-4": "intact" + OLDER}
BACK_TO_8: Final = {"step-8": "intact" + NEXT, "step-4": "intact" + OLDER}


def newest_damaged(happen: Callable[[RunPaths], Any], what: str) -> Case:
    """The step before is resumed."""
    verdicts = {"step-12": f"damaged: {what}{MOVED}", **BACK_TO_8}
    return Case(happen, 8, verdicts, (("step-12", UNCOMMITTED + what),))


CASES: dict[str, Case] = {
    "whole": Case(lambda run: None, 12, WHOLE),
    "newest damaged": newest_damaged(lambda run: damage(run, 12), FLIPPED),
    "newest marker damaged": newest_damaged(
        lambda run: damage(run, 12, "COMMITTED.json"), BAD_MARKER
    ),
    "newest cut": newest_damaged(
        lambda run: (run.checkpoint_dir(12) / "model.safetensors").write_bytes(b"x"),
        "model.safetensors has 1 byte, 3072 were committed",
    ),
    "newest marker missing": Case(
        lambda run: marker_path(run.checkpoint_dir(12)).unlink(),
        8,
        {**BACK_TO_8, "step-12": UNFINISHED},
        (("step-12", "it was still being written when its attempt died"),),
    ),
    "oldest damaged": Case(
        lambda run: damage(run, 4), 12, {**WHOLE, "step-4": f"damaged: {FLIPPED}{OLDER}"}
    ),
    "best damaged": Case(
        lambda run: damage(run, 8),
        4,
        {
            "step-12": "intact" + NO_BEST,
            "step-8": f"damaged: {FLIPPED}{MOVED}",
            "step-4": "intact" + NEXT,
        },
        (("step-8", UNCOMMITTED + FLIPPED), ("step-12", LOST_BEST)),
    ),
    "best lost": Case(
        lambda run: lose(run, 8),
        4,
        {"step-12": "intact" + NO_BEST, "step-4": "intact" + NEXT},
        (("step-12", LOST_BEST),),
    ),
    "best lost, newest restored": Case(
        lambda run: (pack(run, 12), damage(run, 12), lose(run, 8)),
        4,
        {
            "step-12": f"damaged ({FLIPPED}), but intact in step-12.zip" + NO_BEST,
            "step-4": "intact" + NEXT,
        },
        (
            ("step-12", UNCOMMITTED + FLIPPED),
            ("step-12.zip", LOST_BEST),
            ("step-12", LOST_BEST),
        ),
        restored=(12,),
    ),
    "all damaged": Case(
        lambda run: [damage(run, step) for step in VALUES],
        None,
        {f"step-{step}": f"damaged: {FLIPPED}{MOVED}" for step in (12, 8, 4)},
        tuple((f"step-{step}", UNCOMMITTED + FLIPPED) for step in (12, 8, 4)),
    ),
    "newest damaged, whole as an archive": Case(
        lambda run: (pack(run, 12), damage(run, 12)),
        12,
        {**WHOLE, "step-12": f"damaged ({FLIPPED}), but intact in step-12.zip{NEXT}"},
        (("step-12", UNCOMMITTED + FLIPPED),),
        restored=(12,),
    ),
    "newest lost, whole as an archive": Case(
        lambda run: (pack(run, 12), lose(run, 12)),
        12,
        {**WHOLE, "step-12": f"damaged (its folder is missing), but intact in step-12.zip{NEXT}"},
        restored=(12,),
    ),
    "newest lost, archive damaged": Case(
        lambda run: (pack(run, 12), lose(run, 12), flip_bit(run.archive_path(12))),
        8,
        {
            "step-12": f"damaged: its folder is missing, and {BAD_ARCHIVE}{MOVED}",
            **BACK_TO_8,
        },
        (("step-12.zip", BAD_ARCHIVE),),
    ),
    "archive of another step": Case(
        lambda run: (pack(run, 4), shutil.copy(run.archive_path(4), run.archive_path(16))),
        12,
        {
            "step-16": "damaged: its folder is missing, and step-16.zip holds the checkpoint of"
            f" another step{MOVED}",
            **WHOLE,
        },
        (("step-16.zip", "it holds the checkpoint of another step"),),
    ),
    "best lost, whole as an archive": Case(
        lambda run: (pack(run, 8), lose(run, 8)),
        12,
        {**WHOLE, "step-8": f"damaged (its folder is missing), but intact in step-8.zip{OLDER}"},
        restored=(8,),
    ),
    "newest stripped": Case(
        lambda run: strip(run, 12),
        8,
        {"step-12": NO_STATE, **BACK_TO_8},
        (("step-12", STRIPPED),),
    ),
    "best stripped": Case(lambda run: strip(run, 8), 12, WHOLE),
    "all but the damaged newest stripped": Case(
        lambda run: (strip(run, 4, 8), damage(run, 12)),
        None,
        {"step-12": f"damaged: {FLIPPED}{MOVED}", "step-8": NO_STATE, "step-4": NO_STATE},
        (("step-12", UNCOMMITTED + FLIPPED), ("step-8", STRIPPED), ("step-4", STRIPPED)),
    ),
    "an older one under a newer name": Case(
        lambda run: shutil.copytree(run.checkpoint_dir(4), run.checkpoint_dir(40)),
        12,
        {"step-40": f"damaged: it is the checkpoint of step 4{MOVED}", **WHOLE},
        (("step-40", UNCOMMITTED + "it is the checkpoint of step 4"),),
    ),
    "unfinished": Case(
        lambda run: write(run, 16),
        12,
        {**WHOLE, "checkpoint-16": UNFINISHED},
        (("checkpoint-16", "it was still being written when its attempt died"),),
    ),
    "nothing": Case(lambda run: shutil.rmtree(run.checkpoints_dir), None, {}),
}


def make(root: Path, case: str) -> RunPaths:
    paths = make_paths(root)
    commit(paths, 4, 8, 12, values=VALUES)
    CASES[case].happen(paths)
    return paths


def contents(paths: RunPaths) -> dict[str, tuple[int, bytes]]:
    files = (path for path in paths.run_dir.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def decide(
    paths: RunPaths, wanted: Wanted = "auto", *, has_run_out_of_memory: bool = False, **changed: Any
) -> Choice:
    """The choice, with every byte of every checkpoint read; archives are unpacked elsewhere."""
    scratch_dir = paths.run_dir.with_name("scratch")
    policy = Policy(
        Verification(paths, LIMITS, scratch_dir),
        has_run_out_of_memory=has_run_out_of_memory,
        judges_all=True,
    )
    try:
        return choose(read_inventory(paths), wanted, {**FINGERPRINT, **changed}, policy)
    finally:
        shutil.rmtree(scratch_dir, ignore_errors=True)


def list_verdicts(paths: RunPaths, choice: Choice) -> dict[str, str]:
    here = f"{paths.run_dir}/"
    return {verdict.name: verdict.what.replace(here, "") for verdict in choice.verdicts}


def list_moves(paths: RunPaths, choice: Choice) -> list[tuple[str, str]]:
    here = f"{paths.run_dir}/"
    return [
        (move.name, move.why.replace(here, "")) for move in choice.moves if isinstance(move, Move)
    ]


@pytest.mark.parametrize("case", CASES)
def test_what_is_continued_and_moved_aside_and_said(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, right = make(tmp_path, case), CASES[case]
    before = contents(paths)
    choice = decide(paths)
    assert contents(paths) == before, "to choose changes nothing"
    assert (choice.step, choice.refusal) == (right.step, None)
    assert list_verdicts(paths, choice) == right.verdicts
    assert [verdict.name for verdict in choice.verdicts] == list(right.verdicts), "newest first"
    assert [verdict.name for verdict in choice.verdicts if verdict.is_next] == (
        [] if right.step is None else [f"step-{right.step}"]
    )
    assert list_moves(paths, choice) == list(right.moves)
    assert [move.step for move in choice.moves if not isinstance(move, Move)] == [*right.restored]
    capsys.readouterr()
    assert resume(paths) == right.step, "as the training process does"
    printed = capsys.readouterr().out.splitlines()
    moved = [line.split()[3] for line in printed if line.startswith("warning: moved checkpoint")]
    assert moved == [name for name, _ in right.moves]
    assert sorted(name.rpartition(".")[0] for name in quarantined(paths)) == sorted(moved)
    restored = [line.split()[2] for line in printed if line.startswith("restored checkpoint")]
    assert restored == [f"step-{step}" for step in right.restored]


@pytest.mark.parametrize("case", CASES)
def test_the_newest_that_verifies_is_refused_to_another_launch(case: str, tmp_path: Path) -> None:
    paths, right = make(tmp_path, case), CASES[case]
    sound = [
        name for name, what in right.verdicts.items() if what.startswith(("intact", "damaged ("))
    ]
    choice = decide(paths, num_processes=1)
    assert choice.step is None
    if not sound:
        assert choice.refusal is None
        assert resume(paths, num_processes=1) is None
        return
    said = list_verdicts(paths, choice)
    assert [
        name for name in said if "from a different launch: num_processes: 2 -> 1" in said[name]
    ] == [sound[0]]
    assert choice.refusal is not None and f"of {sound[0].replace('-', ' ')} " in str(choice.refusal)
    with pytest.raises(RefusedError) as refused:
        resume(paths, num_processes=1)
    assert str(refused.value) == str(choice.refusal)
    assert [name.rpartition(".")[0] for name in quarantined(paths)] == sorted(
        name for name, _ in list_moves(paths, choice)
    )


def test_only_other_micro_batches_of_training_are_left_behind(tmp_path: Path) -> None:
    paths = make(tmp_path, "whole")
    larger = "it was written in larger micro-batches, before the run ran out of memory"
    for changed in ({}, {"num_processes": 1}):  # nothing from before is resumed
        choice = decide(paths, has_run_out_of_memory=True, per_device_train_batch_size=1, **changed)
        assert (choice.step, choice.refusal) == (None, None)
        assert list_moves(paths, choice) == [(f"step-{step}", larger) for step in (4, 8, 12)]
        assert set(list_verdicts(paths, choice).values()) == {
            "intact, in larger micro-batches, which ran out of memory;"
            " an attempt would set it aside"
        }
    choice = decide(paths, has_run_out_of_memory=True, per_device_eval_batch_size=1)
    assert choice.refusal is not None and not choice.moves
    choice = decide(paths, per_device_train_batch_size=1)
    assert choice.refusal is not None and not choice.moves


def test_best_weights_that_are_left_behind_are_lost(tmp_path: Path) -> None:
    paths = make(tmp_path, "whole")
    lose(paths, 12)
    smaller = {"per_device_train_batch_size": 1}
    commit_checkpoint(write(paths, 12, VALUES), paths, 12, {**FINGERPRINT, **smaller})
    choice = decide(paths, has_run_out_of_memory=True, **smaller)
    assert (choice.step, choice.refusal) == (None, None)
    assert [name for name, _ in list_moves(paths, choice)] == ["step-4", "step-8", "step-12"]
    assert list_moves(paths, choice)[-1] == ("step-12", LOST_BEST)


def test_an_unfinished_folder_is_moved_aside_before_its_archive_is_restored(tmp_path: Path) -> None:
    paths = make(tmp_path, "whole")
    pack(paths, 12)
    marker_path(paths.checkpoint_dir(12)).unlink()
    first, second = decide(paths).moves
    assert first == Move("step-12", "it was still being written when its attempt died")
    assert isinstance(second, Restore) and second.step == 12
    assert resume(paths) == 12 and quarantined(paths) == ["step-12.1"]


def test_no_more_is_read_than_the_answer_needs(tmp_path: Path) -> None:
    """Checkpoints older than the resumed one may be damaged: they are not read."""
    paths = make(tmp_path, "newest damaged, whole as an archive")
    damage(paths, 4)
    policy = Policy(Verification(paths, LIMITS, tmp_path / "scratch"))
    choice = choose(read_inventory(paths), "auto", FINGERPRINT, policy)
    assert choice.step == 12 and [move.name for move in choice.moves if isinstance(move, Move)] == [
        "step-12"
    ]
    shutil.copytree(paths.checkpoint_dir(4), paths.checkpoint_dir(40))
    by_markers = choose(read_inventory(paths), "auto", FINGERPRINT, Policy())
    assert by_markers.step == 12, "no byte is read but for the markers"


def test_weights_are_chosen_without_a_launch(tmp_path: Path) -> None:
    paths = make(tmp_path, "best damaged")
    verification = Verification(paths, LIMITS, tmp_path / "scratch")
    chosen = {
        wanted: choose(read_inventory(paths), wanted, None, Policy(verification)).step
        for wanted in ("latest", "best")
    }
    assert chosen == {"latest": 12, "best": 4}
    strip(paths, 4, 12)
    assert choose(read_inventory(paths), "latest", None, Policy(verification)).step == 12
    assert choose(read_inventory(paths), "best", None, Policy(verification)).step == 4
