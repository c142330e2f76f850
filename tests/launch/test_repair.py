"""`runner launch --repair` on the launch side: refusals, records, and a check of the result even if
the training process reports success.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.marker import build_marker, write_marker
from runner.cli.main import main
from runner.files import load_json
from runner.run.paths import RunPaths
from runner.run.record import load_record
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.whole_runs import BY_BYTES, BY_SIZE, add_files

__all__ = ["fake"]

REPAIR = ("launch", "recipes/toy/a.yaml", "--repair")
CONFIG = '{"r": 8}\n'
BEST_STEP = 2  # of the runs that the fake completes


@pytest.fixture
def paths(fake: FakeLauncher) -> RunPaths:
    """A completed run with its best checkpoint and a damaged file of its model."""
    fake.add("a", told="complete")
    assert main(["sweep", "recipes/toy"]) == 0
    paths = fake.paths("a")
    add_files(paths)
    folder = paths.checkpoint_dir(BEST_STEP)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    write_marker(folder, build_marker(folder, BEST_STEP, {}))
    (paths.model_dir / "adapter_config.json").write_text(CONFIG.replace("8", "9"))
    return paths


def test_a_repair_is_an_attempt_that_trains_nothing(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    before = paths.result_path.read_bytes(), paths.recipe_path.read_bytes()
    fake.tell("a", f"write model/adapter_config.json {CONFIG}")
    assert main(REPAIR) == 0
    assert "model/ is rewritten from step 2" in capsys.readouterr().err
    first, second = load_record(paths).attempts
    assert (first.is_repair, second.is_repair, second.failure) == (False, True, None)
    assert (paths.result_path.read_bytes(), paths.recipe_path.read_bytes()) == before
    assert main(["status", "recipes/toy", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["num_attempts"]) == ("completed", 2)
    assert main(REPAIR) == 0, "nothing to repair"
    assert "nothing to repair" in capsys.readouterr().out
    assert len(load_record(paths).attempts) == 2
    assert main(["sweep", "recipes/toy"]) == 0


def test_a_trainer_that_leaves_damage_behind_has_failed(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.tell("a", "exit 0")
    assert main(REPAIR) == 14
    assert load_record(paths).attempts[-1].failure is not None
    fake.tell("a", "fail configuration the export of step 2 is not the one that was recorded")
    assert main(REPAIR) == 10
    assert "is not the one that was recorded" in capsys.readouterr().err
    assert main(["why", "recipes/toy/a.yaml"]) == 0
    said = capsys.readouterr().out
    assert "state       damaged: model/adapter_config.json does not match its" in said
    assert "failure     configuration: the export of step 2" in said
    assert main(["sweep", "recipes/toy"]) == 0, "a bit is not seen by sizes"


def test_a_model_that_was_removed_is_written_again(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(paths.model_dir)
    assert main(["why", "recipes/toy/a.yaml"]) == 0
    assert "model removed: `runner launch RECIPE --repair` restores it" in capsys.readouterr().out
    fake.tell("a", "exit 0")
    assert main(REPAIR) == 14, "the model is not there"


def test_the_archive_of_the_best_checkpoint_will_do(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(paths.checkpoint_dir(BEST_STEP), paths.archive_path(BEST_STEP))
    BY_BYTES["zeroed"](paths.checkpoint_dir(BEST_STEP) / "adapter_model.safetensors")
    fake.tell("a", f"write model/adapter_config.json {CONFIG}")
    assert main(REPAIR) == 0


@pytest.mark.parametrize("what", ["folder", "archive", "both"])
def test_a_best_checkpoint_that_does_not_verify_is_refused(
    fake: FakeLauncher, paths: RunPaths, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, archive = paths.checkpoint_dir(BEST_STEP), paths.archive_path(BEST_STEP)
    write_archive(folder, archive)
    BY_SIZE["cut"](archive)
    if what == "archive":
        shutil.rmtree(folder)
        expected = "no longer exists, and "
    else:
        BY_BYTES["bit flipped"](folder / "adapter_model.safetensors")
        expected = "does not verify: adapter_model.safetensors does not match its"
    if what == "folder":
        archive.unlink()
    kept = {path: path.read_bytes() for path in paths.run_dir.rglob("*") if path.is_file()}
    assert main(REPAIR) == 2
    said = capsys.readouterr().err
    assert f"the best checkpoint, of step 2, {expected}" in said
    assert "put step-2 or step-2.zip back into runs/toy/a/checkpoints" in said
    assert {path: path.read_bytes() for path in paths.run_dir.rglob("*") if path.is_file()} == kept


def test_what_is_not_of_the_model_is_not_repaired(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    BY_SIZE["cut"](paths.metrics_path)
    assert main(REPAIR) == 2
    said = capsys.readouterr().err
    assert "has damage that `--repair` cannot fix:\n  metrics.jsonl has" in said
    assert "restore the files from a copy of the run" in said and "--fresh" in said


def test_a_file_that_is_not_of_the_run_has_to_go_first(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    (paths.model_dir / "pytorch_model.bin").touch()
    assert main(REPAIR) == 2
    assert "mv runs/toy/a/model/pytorch_model.bin" in capsys.readouterr().err


def test_a_dry_run_of_a_repair_changes_nothing(
    fake: FakeLauncher, paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_json(paths.record_path)
    assert main([*REPAIR, "--dry-run"]) == 0
    shown, said = capsys.readouterr()
    assert "accelerate launch" in shown and "model/ would be rewritten from step 2" in said
    assert load_json(paths.record_path) == before and Path(paths.model_dir).is_dir()
