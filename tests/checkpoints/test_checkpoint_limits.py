"""Whole runs that archive, strip, upload and resume from the rest: the same bytes as an undisturbed
run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from runner.checkpoints.archive import verify_archive
from runner.checkpoints.marker import is_intact, list_archived, list_committed, load_marker
from runner.checkpoints.remote import RemoteFolder, list_pending
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.modes import list_other_modes, umask_of
from tests.support.remote_places import CREDENTIALS, closed_port, s3_server
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_attempts,
    read_log,
)

pytestmark = pytest.mark.slow

KEEPING = ("checkpoints={keep_latest: 2, keep_best: 2, archive: zip, save_optimizer: false}",)
LORA = RUNS["gemma-lora"]


@pytest.fixture
def end_of_umask() -> Iterator[ExitStack]:
    """Ends with the test."""
    with ExitStack() as stack:
        yield stack


def test_a_run_killed_while_it_archives_strips_and_prunes_ends_with_the_same_bytes(
    finished: Project, monkeypatch: pytest.MonkeyPatch, end_of_umask: ExitStack
) -> None:
    """Limits change no result: the reference run has none of them. Nor does storage that cannot be
    reached. All files follow the umask, in every attempt.
    """
    # For every command of this test; undone at its end
    end_of_umask.enter_context(umask_of(0o027))
    name, overrides = "kept", (*LORA, *KEEPING)
    paths = launch_killed_at(finished, name, *overrides, event="open", path=".step-4.zip.tmp")
    assert list_committed(paths) == [4] and list_archived(paths) == []
    paths = launch_killed_at(
        finished, name, *overrides, event="os.remove", path="step-4/optimizer.pt"
    )
    assert "resuming from step 4" in read_log(paths)
    assert (
        load_marker(paths.checkpoint_dir(4)).is_stripped
        and (paths.checkpoint_dir(4) / "optimizer.pt").exists()
    )
    for variable, value in CREDENTIALS.items():
        monkeypatch.setenv(variable, value)
    nowhere = {
        "endpoint_url": f"http://127.0.0.1:{closed_port()}",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    remote = json.dumps({"url": "s3://sft", "options": nowhere, "num_retries": 0})
    launch(finished, name, *overrides, f"checkpoints.remote={remote}")
    assert "resuming from step 8" in read_log(paths)
    assert_same_outputs(paths, finished.paths("gemma-lora"))
    assert "step-15.zip (EndpointConnectionError" in finished.cli("status", paths.run_dir).stdout
    steps = list_committed(paths)
    assert steps == list_archived(paths) and {12, 15} <= set(steps)
    for step in steps:
        assert is_intact(paths.checkpoint_dir(step))
        assert verify_archive(paths.archive_path(step)) == load_marker(paths.checkpoint_dir(step))
        assert load_marker(paths.checkpoint_dir(step)).is_stripped == (step != 15)
    assert not (paths.checkpoint_dir(4) / "optimizer.pt").exists()
    assert list_other_modes(paths.run_dir, 0o027) == {}


def test_an_empty_machine_continues_from_a_bucket_and_ends_with_the_same_bytes(
    finished: Project,
) -> None:
    """Killed when all had arrived, its directory lost; then once more from the last archive, which
    somebody had saved, under other limits.
    """
    with s3_server("sft") as options:
        remote = {"url": "s3://sft/checkpoints", "options": options, "num_retries": 1, "load": True}
        name, overrides = (
            "remote",
            (*LORA, f"checkpoints={{archive: zip, remote: {json.dumps(remote)}}}"),
        )
        paths = launch_killed_at(finished, name, *overrides, event="os.rename", path="result.json")
        folder = RemoteFolder(f"{remote['url']}/tests/{name}", options)
        assert (
            folder.list_steps() == list_committed(paths) == [12, 15] and list_pending(paths) == []
        )
        folder.delete(15)
        lost = RunPaths(paths.run_dir.rename(paths.run_dir.with_name("lost")))
        launch(finished, name, *overrides)
        assert "resuming from step 12" in read_log(paths)
        assert_same_outputs(paths, finished.paths("gemma-lora"))
        assert folder.list_steps() == [12, 15]
        status = json.loads(finished.cli("status", paths.run_dir, "--json").stdout)[0]
        assert (status["state"], status["pending_uploads"]) == ("completed", [])
    saved = finished.root / "saved" / "backup.zip"
    saved.parent.mkdir()
    shutil.copy(lost.archive_path(15), saved)
    archive_bytes = paths.archive_path(15).read_bytes()
    shutil.rmtree(paths.run_dir)
    arguments = ("launch", "recipe.yaml", *LORA, "checkpoints.keep_latest=9", "--name", name)
    with umask_of(0o027):
        done = finished.cli(*arguments, "--resume", saved)
    assert done.returncode == 0, f"{done.stderr}\n{read_log(paths)}"
    assert list_committed(paths) == [15] and list_other_modes(paths.run_dir, 0o027) == {}
    assert read_attempts(paths)[0]["resume"] == str(saved) and "resuming from step 15" in read_log(
        paths
    )
    assert_same_outputs(paths, finished.paths("gemma-lora"))
    kept = finished.paths("kept")  # killed at other moments, under other limits
    assert kept.archive_path(15).read_bytes() == archive_bytes, "equal runs, equal archives"
