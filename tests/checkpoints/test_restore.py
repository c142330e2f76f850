"""Checkpoints that an attempt resumes from: its own, named ones, copies and archives elsewhere."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.commit import commit_checkpoint
from runner.checkpoints.marker import is_intact, list_committed, load_marker
from runner.checkpoints.remote import RemoteFolder, open_run_folder
from runner.checkpoints.restore import choose_resume_step, resolve_checkpoint
from runner.checkpoints.retention import strip_checkpoint
from runner.errors import DataError, RefusedError
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.paths import RunPaths
from tests.conftest import RECIPE_TEXT
from tests.support.fake_checkpoints import (
    FINGERPRINT,
    commit,
    commit_under,
    dies_at,
    flip_bit,
    listing,
    make_limits,
    make_paths,
    quarantined,
    write,
)

VALUES = {4: 3.0, 8: 1.0, 12: 2.0}
LIMITS = make_limits(keep_latest=9)
RECIPE = parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=("checkpoints.keep_latest=9",))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = make_paths(tmp_path)
    commit(run, 4, 8, 12, values=VALUES)
    return run


@pytest.fixture
def elsewhere(tmp_path: Path) -> RunPaths:
    """Checkpoints of the same run on another machine."""
    run = make_paths(tmp_path / "elsewhere")
    commit(run, 4, 8, 12, values=VALUES)
    return run


@pytest.fixture
def empty(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "empty")


def choose(paths: RunPaths, resume: str | Path) -> int | None:
    paths.run_dir.mkdir(exist_ok=True)
    return choose_resume_step(paths, RECIPE, FINGERPRINT, str(resume))


def refusal(paths: RunPaths, resume: str | Path) -> str:
    with pytest.raises(RefusedError) as refused:
        choose(paths, resume)
    return str(refused.value)


def test_auto_and_latest_go_on_from_the_newest(paths: RunPaths, empty: RunPaths) -> None:
    assert choose(paths, "auto") == choose(paths, "latest") == 12 and not quarantined(paths)
    assert choose(empty, "auto") is None
    assert "holds no checkpoint" in refusal(empty, "latest") and "holds no checkpoint" in refusal(
        empty, "best"
    )


def test_what_is_asked_before_resuming_can_leave_everything_as_it_is(
    paths: RunPaths, elsewhere: RunPaths
) -> None:
    """Also a damaged one, which would be moved aside first."""
    before = sorted(path for path in paths.run_dir.rglob("*"))

    def refuse() -> None:
        raise DataError("other rows")

    for resume in ("best", str(elsewhere.checkpoint_dir(12)), "latest", "auto"):
        if resume == "auto":
            flip_bit(paths.checkpoint_dir(12) / "optimizer.pt")
        with pytest.raises(DataError, match="other rows"):
            choose_resume_step(paths, RECIPE, FINGERPRINT, resume, before_resuming=refuse)
        assert sorted(path for path in paths.run_dir.rglob("*")) == before
    assert choose_resume_step(paths, RECIPE, FINGERPRINT, "auto") == 8


def test_nothing_is_asked_before_a_start_at_step_0(paths: RunPaths, empty: RunPaths) -> None:
    asked: list[None] = []
    empty.run_dir.mkdir()
    for step in (4, 8, 12):
        flip_bit(paths.checkpoint_dir(step) / "model.safetensors")
    for run in (empty, paths):
        chosen = choose_resume_step(
            run, RECIPE, FINGERPRINT, "auto", before_resuming=lambda: asked.append(None)
        )
        assert chosen is None
    assert asked == [] and len(quarantined(paths)) == 3


def test_latest_refuses_where_auto_takes_an_older_one(paths: RunPaths) -> None:
    flip_bit(paths.checkpoint_dir(12) / "optimizer.pt")
    message = refusal(paths, "latest")
    assert "does not verify" in message and "without `--resume`" in message
    assert list_committed(paths) == [4, 8, 12] and not quarantined(paths), "nothing was moved"
    assert choose(paths, "auto") == 8 and quarantined(paths) == ["step-12.1"]


def test_latest_refuses_when_its_best_weights_are_damaged(paths: RunPaths) -> None:
    flip_bit(paths.checkpoint_dir(8) / "model.safetensors")
    assert "step-8 does not verify" in refusal(paths, "latest")


def test_best_rewinds_and_moves_what_is_newer_aside(paths: RunPaths) -> None:
    write_archive(paths.checkpoint_dir(12), paths.archive_path(12))
    assert choose(paths, "best") == 8
    assert list_committed(paths) == [4, 8] and quarantined(paths) == ["step-12.1", "step-12.zip.1"]


def test_nothing_is_continued_from_a_stripped_one(paths: RunPaths) -> None:
    strip_checkpoint(paths.checkpoint_dir(8))
    assert "stripped of its optimizer state" in refusal(paths, "best")
    assert "stripped of its optimizer state" in refusal(paths, paths.checkpoint_dir(8))
    assert list_committed(paths) == [4, 8, 12]


def test_without_an_evaluation_there_is_no_best(tmp_path: Path) -> None:
    run = make_paths(tmp_path)
    commit(run, 4)
    assert "nothing was evaluated" in refusal(run, "best")


@pytest.mark.parametrize("is_archive", [False, True])
def test_a_path_of_the_run_itself_rewinds_to_it(paths: RunPaths, is_archive: bool) -> None:
    write_archive(paths.checkpoint_dir(4), paths.archive_path(4))
    assert choose(paths, paths.archive_path(4) if is_archive else paths.checkpoint_dir(4)) == 4
    assert list_committed(paths) == [4] and quarantined(paths) == ["step-12.1", "step-8.1"]


@pytest.mark.parametrize("is_archive", [False, True])
def test_a_copy_elsewhere_is_imported_with_its_best_weights(
    elsewhere: RunPaths, empty: RunPaths, tmp_path: Path, is_archive: bool
) -> None:
    (elsewhere.checkpoint_dir(12) / "somebody's notes").write_text("not in the marker")
    source = elsewhere.checkpoint_dir(12)
    if is_archive:
        (tmp_path / "usb").mkdir()
        for step in (8, 12):
            write_archive(elsewhere.checkpoint_dir(step), tmp_path / "usb" / f"step-{step}.zip")
        source = tmp_path / "usb" / "step-12.zip"
    assert choose(empty, source) == 12
    assert list_committed(empty) == [8, 12] and is_intact(empty.checkpoint_dir(12))
    assert listing(empty.checkpoints_dir) == ["step-12", "step-8"]
    assert not (empty.checkpoint_dir(12) / "somebody's notes").exists()
    assert source.exists(), "the copy elsewhere stays"


def test_a_name_says_nothing_about_the_step(
    elsewhere: RunPaths, empty: RunPaths, tmp_path: Path
) -> None:
    write_archive(elsewhere.checkpoint_dir(8), tmp_path / "backup.zip")
    assert choose(empty, tmp_path / "backup.zip") == 8 and list_committed(empty) == [8]


def test_an_import_needs_the_best_weights_it_would_export(
    elsewhere: RunPaths, empty: RunPaths
) -> None:
    shutil.rmtree(elsewhere.checkpoint_dir(8))
    message = refusal(empty, elsewhere.checkpoint_dir(12))
    assert "best weights at step 8" in message and "step-8.zip" in message
    commit(empty, 8, values=VALUES)
    assert choose(empty, elsewhere.checkpoint_dir(12)) == 12, "the run has them itself"


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    paths: RunPaths, elsewhere: RunPaths
) -> None:
    other = {**FINGERPRINT, "recipe_digest": "e" * 64}
    with pytest.raises(RefusedError, match="recipe_digest") as refused:
        choose_resume_step(paths, RECIPE, other, str(elsewhere.checkpoint_dir(12)))
    assert "of the same recipe" in str(refused.value)
    assert list_committed(paths) == [4, 8, 12] and not quarantined(paths)


@pytest.mark.parametrize("policy", ["warn", "refuse"])
@pytest.mark.parametrize("resume", ["auto", "best"])
def test_another_version_is_a_warning_or_a_refusal_as_the_recipe_says(
    paths: RunPaths, policy: str, resume: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse_recipe(
        RECIPE_TEXT, where="recipe.yaml", overrides=(f"launch.on_version_change={policy}",)
    )
    updated = {**FINGERPRINT, "versions": {"torch": "2.14"}}
    if policy == "refuse":
        with pytest.raises(RefusedError, match=r'versions.torch: "2.13" -> "2.14"') as refused:
            choose_resume_step(paths, recipe, updated, resume)
        assert (
            refused.value.hint is not None
            and "launch.on_version_change: warn" in refused.value.hint
        )
        return
    assert choose_resume_step(paths, recipe, updated, resume) == (12 if resume == "auto" else 8)
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if "different version" in line
    ]
    assert len(warnings) == 1 and 'versions.torch: "2.13" -> "2.14"' in warnings[0]
    assert choose_resume_step(paths, recipe, FINGERPRINT, "auto") is not None
    assert "different version" not in capsys.readouterr().out


def test_damage_elsewhere_is_refused_and_nothing_of_the_run_is_touched(
    paths: RunPaths, elsewhere: RunPaths
) -> None:
    flip_bit(elsewhere.checkpoint_dir(4) / "model.safetensors")
    assert "its files differ from those committed" in refusal(paths, elsewhere.checkpoint_dir(4))
    (elsewhere.checkpoint_dir(4) / "model.safetensors").unlink()
    (elsewhere.checkpoint_dir(4) / "model.safetensors").symlink_to(
        paths.checkpoint_dir(4) / "model.safetensors"
    )
    assert "not a plain file" in refusal(paths, elsewhere.checkpoint_dir(4))
    assert "there is no checkpoint" in refusal(paths, elsewhere.checkpoint_dir(5))
    assert "marker" in refusal(paths, elsewhere.run_dir)
    assert list_committed(paths) == [4, 8, 12] and not quarantined(paths)
    assert choose(paths, "auto") == 12 and len(listing(paths.checkpoints_dir)) == 3


def test_another_checkpoint_of_the_same_step_is_moved_aside(
    paths: RunPaths, elsewhere: RunPaths
) -> None:
    shutil.rmtree(elsewhere.checkpoint_dir(4))
    commit(elsewhere, 4, values={4: 2.5})
    assert choose(paths, elsewhere.checkpoint_dir(4)) == 4
    assert quarantined(paths) == ["step-12.1", "step-4.1", "step-8.1"]


def test_an_import_killed_at_any_instant_is_done_by_asking_again(
    paths: RunPaths, elsewhere: RunPaths, tmp_path: Path
) -> None:
    for step in (4, 8):  # another course, whose best step is 4
        shutil.rmtree(elsewhere.checkpoint_dir(step))
        commit(elsewhere, step, values={4: 0.5, 8: 1.0})
    write_archive(elsewhere.checkpoint_dir(4), elsewhere.archive_path(4))
    shutil.rmtree(elsewhere.checkpoint_dir(4))
    for number in itertools.count(1):
        run = RunPaths(tmp_path / "killed")
        shutil.copytree(paths.run_dir, run.run_dir)
        is_killed = dies_at(
            run.run_dir,
            number,
            lambda: choose(RunPaths(tmp_path / "killed"), elsewhere.checkpoint_dir(8)),
        )
        step = choose(run, "auto")
        assert step in (4, 8, 12) and is_intact(run.checkpoint_dir(step)), (
            "the run can always go on"
        )
        assert choose(run, elsewhere.checkpoint_dir(8)) == 8
        assert listing(run.checkpoints_dir) == ["step-4", "step-8"]
        assert load_marker(run.checkpoint_dir(8)) == load_marker(elsewhere.checkpoint_dir(8))
        shutil.rmtree(run.run_dir)
        if not is_killed:
            break
    assert number > 15


def test_weights_are_found_for_those_who_only_read(paths: RunPaths, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert resolve_checkpoint(paths, LIMITS, "latest", scratch) == paths.checkpoint_dir(12)
    assert resolve_checkpoint(paths, LIMITS, "best", scratch) == paths.checkpoint_dir(8)
    assert resolve_checkpoint(
        paths, LIMITS, str(paths.checkpoint_dir(4)), scratch
    ) == paths.checkpoint_dir(4)
    write_archive(paths.checkpoint_dir(8), paths.archive_path(8))
    strip_checkpoint(paths.checkpoint_dir(8))
    assert resolve_checkpoint(paths, LIMITS, "best", scratch) == paths.checkpoint_dir(8), (
        "stripped ones hold weights"
    )
    flip_bit(paths.checkpoint_dir(8) / "model.safetensors")
    assert resolve_checkpoint(paths, LIMITS, "best", scratch) == scratch / "step-8" and is_intact(
        scratch / "step-8"
    )
    assert (
        resolve_checkpoint(paths, LIMITS, str(paths.archive_path(8)), scratch / "more").name
        == "step-8"
    )
    assert not quarantined(paths) and list_committed(paths) == [
        4,
        8,
        12,
    ], "nothing of the run was changed"
    for damaged in (
        paths.checkpoint_dir(8),
        paths.run_dir / "nowhere",
        paths.checkpoint_dir(4) / "optimizer.pt",
    ):
        with pytest.raises(RefusedError):
            resolve_checkpoint(paths, LIMITS, str(damaged), scratch / "no")
    with pytest.raises(RefusedError, match="no checkpoint that verifies"):
        resolve_checkpoint(make_paths(tmp_path / "bare"), LIMITS, "best", scratch)


CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
SMALLER = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def commit_cut(paths: RunPaths, cut: dict[str, int], *steps: int) -> None:
    for step in steps:
        commit_checkpoint(write(paths, step, {}), paths, step, FINGERPRINT | cut)


def test_checkpoints_of_before_it_went_out_of_memory_are_left_behind(tmp_path: Path) -> None:
    paths = make_paths(tmp_path)
    commit_cut(paths, CUT, 4, 8)
    write_archive(paths.checkpoint_dir(8), paths.archive_path(8))
    with pytest.raises(RefusedError, match="per_device_train_batch_size: 2 -> 1"):
        choose_resume_step(paths, RECIPE, FINGERPRINT | SMALLER, "auto")
    shutil.rmtree(paths.checkpoint_dir(8))  # of which the archive is left
    for resume in ("none", "auto"):
        assert choose_resume_step(paths, RECIPE, FINGERPRINT | SMALLER, resume, divisor=2) is None
    assert list_committed(paths) == [] and quarantined(paths) == ["step-4.1", "step-8.zip.1"]
    commit_cut(paths, SMALLER, 4, 8)
    assert choose_resume_step(paths, RECIPE, FINGERPRINT | SMALLER, "auto", divisor=2) == 8
    assert quarantined(paths) == ["step-4.1", "step-8.zip.1"], "its own stay"
    with pytest.raises(RefusedError, match="per_device_train_batch_size: 2 -> 1"):
        named = str(paths.quarantine_dir / "step-4.1")
        choose_resume_step(paths, RECIPE, FINGERPRINT | SMALLER, named, divisor=2)


def open_remote(root: Path) -> tuple[Recipe, RemoteFolder]:
    """A recipe that loads from remote storage, and its folder there."""
    remote = (
        f"checkpoints.remote={{url: 'file://{root}/remote', options: {{auto_mkdir: true}},"
        " load: true}"
    )
    recipe = parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=(remote,))
    folder = open_run_folder(recipe)
    assert folder is not None
    return recipe, folder


def test_archives_of_before_it_went_out_of_memory_are_not_fetched(tmp_path: Path) -> None:
    recipe, folder = open_remote(tmp_path)
    sender = make_paths(tmp_path / "sender")
    commit_cut(sender, CUT, 4, 8)
    folder.require_owner(FINGERPRINT["recipe_digest"], claim=True)
    for step in (4, 8):
        write_archive(sender.checkpoint_dir(step), sender.archive_path(step))
        folder.send(sender.archive_path(step), step)
    paths, current = make_paths(tmp_path / "receiver"), FINGERPRINT | SMALLER
    with pytest.raises(RefusedError, match="per_device_train_batch_size"):
        choose_resume_step(paths, recipe, current, "auto", folder)
    assert choose_resume_step(paths, recipe, current, "auto", folder, divisor=2) is None
    smaller = make_paths(tmp_path / "smaller")
    commit_cut(smaller, SMALLER, 4)
    write_archive(smaller.checkpoint_dir(4), smaller.archive_path(4))
    folder.send(smaller.archive_path(4), 4)
    assert choose_resume_step(paths, recipe, current, "auto", folder, divisor=2) == 4


def test_what_was_loaded_at_another_commit_is_refused(tmp_path: Path) -> None:
    """From elsewhere, where nothing else says what the checkpoint was trained on."""
    recipe, folder = open_remote(tmp_path)
    known = {**FINGERPRINT, "commits": {"model.path": "a" * 40}}
    elsewhere = make_paths(tmp_path / "elsewhere")
    commit_under(elsewhere, 4, known)
    source = str(elsewhere.checkpoint_dir(4))
    write_archive(elsewhere.checkpoint_dir(4), elsewhere.archive_path(4))
    folder.require_owner(FINGERPRINT["recipe_digest"], claim=True)
    folder.send(elsewhere.archive_path(4), 4)
    for number, commits in enumerate(({"model.path": "b" * 40}, {})):
        moved = {**FINGERPRINT, "commits": commits}
        for resume, remote in ((source, None), ("auto", folder)):
            paths = make_paths(tmp_path / f"{number} {resume[:1]}")
            with pytest.raises(RefusedError, match=r"commits\.model\.path: .*aaa") as refused:
                choose_resume_step(paths, recipe, moved, resume, remote)
            assert "--resume PATH" in str(refused.value) and not list_committed(paths)
    same = make_paths(tmp_path / "same")
    assert choose_resume_step(same, recipe, known, source) == 4
    assert choose_resume_step(make_paths(tmp_path / "nobody"), recipe, FINGERPRINT, source) == 4
    older = make_paths(tmp_path / "older")
    commit(older, 4)
    assert choose_resume_step(older, recipe, known, "auto") == 4
