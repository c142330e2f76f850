"""Uploads during training: committed checkpoints arrive, limits apply there too, and no place can
stop or hang a run.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.marker import is_intact, list_committed
from runner.checkpoints.remote import RemoteFolder, Uploader, list_pending, open_run_folder
from runner.checkpoints.restore import choose_resume_step
from runner.checkpoints.retention import apply_retention, strip_checkpoint
from runner.errors import RefusedError
from runner.files import load_jsonl
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.paths import RunPaths
from tests.conftest import RECIPE_TEXT, ROOT
from tests.support.fake_checkpoints import (
    DIGEST,
    FINGERPRINT,
    commit,
    flip_bit,
    listing,
    make_limits,
    make_paths,
)
from tests.support.remote_places import CREDENTIALS, closed_port, s3_server

VALUES = {4: 3.0, 8: 1.0, 12: 2.0, 16: 4.0, 20: 5.0}
NO_RETRIES = {"config_kwargs": {"retries": {"max_attempts": 0}}}  # of botocore, in addition to ours


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = make_paths(tmp_path)
    run.attempt(1).attempt_dir.mkdir(parents=True)
    return run


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    with s3_server("uploads") as options:
        yield options


@pytest.fixture(params=["file", "memory", "s3"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """A recipe with remote storage of each kind."""
    options = request.getfixturevalue("s3") if request.param == "s3" else {}
    place = f"uploads/{request.node.name}" if request.param == "s3" else str(tmp_path / "place")
    return make_recipe(f"{request.param}://{place}", options, load="true")


def make_recipe(url: str, options: dict[str, Any] | None = None, *, load: str = "false") -> Recipe:
    remote = f"{{url: '{url}', options: {json.dumps(options or {})}, num_retries: 0, load: {load}}}"
    return parse_recipe(
        RECIPE_TEXT, where="recipe.yaml", overrides=(f"checkpoints.remote={remote}",)
    )


def make_uploader(paths: RunPaths, recipe: Recipe, attempt: int = 1) -> Uploader:
    folder, remote = open_run_folder(recipe), recipe.checkpoints.remote
    assert folder is not None and remote is not None
    paths.attempt(attempt).attempt_dir.mkdir(parents=True, exist_ok=True)
    uploader = Uploader(folder, remote, DIGEST, paths, paths.attempt(attempt))
    uploader.start()
    return uploader


def read_rows(paths: RunPaths, attempt: int = 1) -> list[dict[str, Any]]:
    return load_jsonl(paths.attempt(attempt).uploads_path)


def remote_folder(recipe: Recipe) -> RemoteFolder:
    folder = open_run_folder(recipe)
    assert folder is not None
    return folder


def train_on(paths: RunPaths, recipe: Recipe, *steps: int, attempt: int = 1) -> None:
    """An attempt's operations on checkpoints, without the training."""
    uploader, limits = make_uploader(paths, recipe, attempt), make_limits(keep_latest=2)
    for step in steps:
        commit(paths, step, values=VALUES)
        apply_retention(
            paths, limits, [(at, value) for at, value in VALUES.items() if at <= step], DIGEST
        )
        uploader.offer(step)
    uploader.finish()


def test_what_is_committed_arrives_and_the_limits_hold_there_too(
    paths: RunPaths, recipe: Recipe
) -> None:
    train_on(paths, recipe, 4, 8, 12, 16)
    assert remote_folder(recipe).list_steps() == list_committed(paths) == [8, 12, 16]
    assert listing(paths.uploads_dir) == [] and list_pending(paths) == []
    rows = read_rows(paths)
    assert {row["outcome"] for row in rows} == {"uploaded"} and rows[-1]["step"] == 16
    assert (
        rows[-1]["num_tries"] == 1
        and rows[-1]["num_bytes"] > 0
        and rows[-1]["url"].endswith("/tests/base")
    )


def test_an_empty_machine_goes_on_from_there(
    paths: RunPaths, recipe: Recipe, tmp_path: Path
) -> None:
    train_on(paths, recipe, 4, 8, 12, 16)
    other = make_paths(tmp_path / "other-machine")
    folder = remote_folder(recipe)
    assert choose_resume_step(other, recipe, FINGERPRINT, "none", folder) is None, (
        "`--fresh` means it"
    )
    assert choose_resume_step(other, recipe, FINGERPRINT, "auto", folder) == 16
    assert list_committed(other) == [8, 16] and is_intact(other.checkpoint_dir(8)), (
        "the best one came along"
    )
    assert listing(other.checkpoints_dir) == ["step-16", "step-8"]
    flip_bit(other.checkpoint_dir(16) / "optimizer.pt")
    strip_checkpoint(other.checkpoint_dir(8))
    assert choose_resume_step(other, recipe, FINGERPRINT, "auto", folder) == 16, (
        "what is left here is of no use"
    )
    shutil.rmtree(other.run_dir)
    url = f"{folder.url}/step-12.zip"
    other.run_dir.mkdir()
    assert choose_resume_step(other, recipe, FINGERPRINT, url, None) == 12 and list_committed(
        other
    ) == [8, 12]


def test_what_is_damaged_there_is_passed_over(
    paths: RunPaths, recipe: Recipe, tmp_path: Path
) -> None:
    train_on(paths, recipe, 4, 8, 12)
    folder = remote_folder(recipe)
    folder._fs.pipe_file(f"{folder._root}/step-12.zip", b"damaged")
    other = make_paths(tmp_path / "other-machine")
    assert choose_resume_step(other, recipe, FINGERPRINT, "auto", folder) == 8
    with pytest.raises(RefusedError, match="checksum"):
        choose_resume_step(other, recipe, FINGERPRINT, f"{folder.url}/step-12.zip", folder)
    with pytest.raises(RefusedError, match="is not there"):
        choose_resume_step(other, recipe, FINGERPRINT, f"{folder.url}/step-99.zip", folder)
    with pytest.raises(RefusedError, match="num_processes"):
        other_launch = {**FINGERPRINT, "num_processes": 1}
        choose_resume_step(make_paths(tmp_path / "third"), recipe, other_launch, "auto", folder)
    with pytest.raises(RefusedError, match="another experiment"):
        other_recipe = {**FINGERPRINT, "recipe_digest": "e" * 64}
        choose_resume_step(make_paths(tmp_path / "fourth"), recipe, other_recipe, "auto", folder)


def test_an_empty_place_is_no_reason_not_to_start(paths: RunPaths, recipe: Recipe) -> None:
    assert choose_resume_step(paths, recipe, FINGERPRINT, "auto", remote_folder(recipe)) is None


def test_a_place_that_cannot_be_reached_fails_no_training_and_gets_everything_later(
    paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    nowhere = make_recipe(
        "s3://bucket/x",
        {"endpoint_url": f"http://127.0.0.1:{closed_port()}", **NO_RETRIES},
        load="true",
    )
    train_on(paths, nowhere, 8)
    assert list_pending(paths) == list_committed(paths) == [8]
    assert {row["outcome"] for row in read_rows(paths)} == {"failed"}
    assert "EndpointConnectionError" in read_rows(paths)[0]["message"]
    with pytest.raises(OSError, match="cannot be read"):
        choose_resume_step(
            make_paths(tmp_path / "other"), nowhere, FINGERPRINT, "auto", remote_folder(nowhere)
        )
    reachable = make_recipe(f"file://{tmp_path}/place")
    train_on(paths, reachable, 12, attempt=2)
    assert remote_folder(reachable).list_steps() == [8, 12] and list_pending(paths) == []


def test_an_older_one_stays_there_until_the_best_weights_have_arrived(
    paths: RunPaths, tmp_path: Path
) -> None:
    """The upload of step 8, the best, fails; alone, step 12 could not be resumed."""
    recipe = make_recipe(f"file://{tmp_path / 'place'}", load="true")
    folder = remote_folder(recipe)
    train_on(paths, recipe, 4)
    in_the_way = tmp_path / "place" / recipe.run.grid / recipe.run.name / "step-8.zip"
    in_the_way.mkdir()
    train_on(paths, recipe, 8, 12, 16, attempt=2)
    assert list_pending(paths) == [8] and folder.list_steps() == [4, 12, 16]
    assert (
        choose_resume_step(make_paths(tmp_path / "second"), recipe, FINGERPRINT, "auto", folder)
        == 4
    )
    folder.delete(4)
    with pytest.raises(RefusedError, match="none can be resumed"):
        choose_resume_step(make_paths(tmp_path / "third"), recipe, FINGERPRINT, "auto", folder)
    in_the_way.rmdir()
    train_on(paths, recipe, 20, attempt=3)
    assert list_pending(paths) == [] and folder.list_steps() == list_committed(paths) == [8, 16, 20]


def test_the_best_weights_must_be_of_the_same_course(paths: RunPaths, tmp_path: Path) -> None:
    """The run went back to step 4 and trained on otherwise: its step 8 is not the one that step 12
    knows.
    """
    recipe = make_recipe(f"file://{tmp_path / 'place'}", load="true")
    folder = remote_folder(recipe)
    train_on(paths, recipe, 4, 8, 12)
    other = make_paths(tmp_path / "other")
    commit(other, 8, values=VALUES | {8: 1.5})
    write_archive(other.checkpoint_dir(8), tmp_path / "step-8.zip")
    folder.delete(8)
    folder.send(tmp_path / "step-8.zip", 8)
    assert (
        choose_resume_step(make_paths(tmp_path / "second"), recipe, FINGERPRINT, "auto", folder)
        == 8
    )


def test_a_place_of_another_experiment_is_left_alone(paths: RunPaths, recipe: Recipe) -> None:
    remote_folder(recipe).require_owner("e" * 64, claim=True)
    train_on(paths, recipe, 4)
    assert remote_folder(recipe).list_steps() == [] and list_pending(paths) == [4]
    assert "another experiment" in read_rows(paths)[0]["message"]


def test_what_was_committed_before_there_was_a_place_is_sent_as_well(
    paths: RunPaths, tmp_path: Path
) -> None:
    recipe = make_recipe(f"file://{tmp_path}/place")
    commit(paths, 4, 8, values=VALUES)
    train_on(paths, recipe)
    assert remote_folder(recipe).list_steps() == [4, 8]
    train_on(paths, recipe, attempt=2)
    assert read_rows(paths, 2) == [], "nothing is sent twice"


def test_newer_ones_of_an_earlier_life_stay_there(paths: RunPaths, tmp_path: Path) -> None:
    recipe = make_recipe(f"file://{tmp_path}/place")
    train_on(paths, recipe, 4, 8, 12, 16)
    again = make_paths(tmp_path / "again")
    train_on(again, recipe, 4, 8)
    assert remote_folder(recipe).list_steps() == [4, 8, 12, 16]


def test_a_server_that_never_answers_hangs_nobody(tmp_path: Path) -> None:
    """The process ends on its own while the upload still waits for an answer."""
    code = """
import sys
from pathlib import Path
from tests.checkpoints.test_remote import commit, make_paths, make_recipe, make_uploader
paths = make_paths(Path(sys.argv[1]))
uploader = make_uploader(paths, make_recipe("s3://bucket/x", {"endpoint_url": sys.argv[2]}))
commit(paths, 4)
uploader.offer(4)
uploader.finish(patience_seconds=0.5)
print("left")
"""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", code, str(tmp_path), url]
        environment = {
            "PATH": "/usr/bin",
            "PYTHONPATH": ":".join(path for path in sys.path if path),
            **CREDENTIALS,
        }
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
    assert result.returncode == 0 and result.stdout.endswith("left\n"), result.stderr
    paths = RunPaths(tmp_path / "run")
    assert [row["outcome"] for row in read_rows(paths)] == ["unfinished"] and list_pending(
        paths
    ) == [4]
