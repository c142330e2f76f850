"""A run that is killed at any instant, by SIGKILL, ends with the same bytes as one that never
was.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import pytest

from runner.files import load_json
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    forget_end,
    launch,
    launch_killed_at,
    read_attempts,
    read_log,
    read_result,
    snapshot,
    try_launch,
)

pytestmark = pytest.mark.slow


def copy_unfinished(finished: Project, name: str, copy_name: str) -> RunPaths:
    """The run as it was before its last attempt wrote the export and the result, and its launcher
    the end.
    """
    source, copy = finished.paths(name), finished.paths(copy_name)
    shutil.copytree(source.run_dir, copy.run_dir)
    copy.result_path.unlink()
    forget_end(copy)
    shutil.rmtree(copy.model_dir)
    return copy


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def quarantined(paths: RunPaths) -> list[str]:
    return sorted(path.name for path in paths.quarantine_dir.iterdir())


def test_kills_while_saving_scoring_and_exporting(finished: Project) -> None:
    """One run, killed five times; each attempt goes on where the last one left a whole
    checkpoint.
    """
    name, overrides = "killed-often", RUNS["gemma-lora"]
    paths = launch_killed_at(
        finished, name, *overrides, event="open", path="checkpoint-8/trainer_state.json"
    )
    assert (paths.checkpoints_dir / "checkpoint-8" / "adapter_model.safetensors").exists(), (
        "half a checkpoint"
    )
    launch_killed_at(finished, name, *overrides, event="os.rename", path="step-12/COMMITTED.json")
    log = read_log(paths)
    assert "resuming from step 4" in log and quarantined(paths) == ["checkpoint-8.1"]
    assert "moved checkpoint checkpoint-8 to" in log and "still being written" in log
    # The base's scores, which a checkpoint carries, are being put back.
    launch_killed_at(finished, name, *overrides, event="os.rename", path="/eval_rows.jsonl")
    assert quarantined(paths) == ["checkpoint-8.1", "step-12.1"]
    # The final scores stand, the export has not begun.
    launch_killed_at(finished, name, *overrides, event="os.mkdir", path="/.model-partial")
    assert "resuming from step 8" in read_log(paths)
    launch_killed_at(finished, name, *overrides, event="os.rename", path="result.json")
    assert paths.model_dir.exists(), "exported, but without a result the run is not complete"
    launch(finished, name, *overrides)
    assert "resuming from step 15" in read_log(paths)
    assert_same_outputs(paths, finished.paths("gemma-lora"))


def test_patience_of_early_stopping_spans_a_kill(finished: Project) -> None:
    """A full fine-tune whose best step is 4 and which stops at step 10, killed at step 8."""
    reference = read_result(finished.paths("llama-early"))
    assert (reference.best_step, reference.num_steps) == (4, 10)
    name, overrides = "killed-early", RUNS["llama-early"]
    paths = launch_killed_at(
        finished, name, *overrides, event="open", path="checkpoint-8/trainer_state.json"
    )
    launch(finished, name, *overrides)
    assert "resuming from step 6" in read_log(paths)
    assert_same_outputs(paths, finished.paths("llama-early"))


# As in a shell that `torchrun` or `accelerate launch` has started, on the second of two machines.
OF_ANOTHER_LAUNCHER: Final = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "OMPI_COMM_WORLD_SIZE": "2",
    "SLURM_PROCID": "1",
}


def test_damaged_newest_checkpoint_is_set_aside_for_the_one_before(finished: Project) -> None:
    """Also in the environment of another launcher, which changes nothing."""
    copy = copy_unfinished(finished, "gemma-lora", "damaged-newest")
    flip_one_bit(copy.checkpoint_dir(15) / "optimizer.pt")
    launch(finished, "damaged-newest", *RUNS["gemma-lora"], environment=OF_ANOTHER_LAUNCHER)
    assert quarantined(copy) == ["step-15.1"] and "resuming from step 12" in read_log(copy)
    names = ", ".join(sorted(OF_ANOTHER_LAUNCHER))
    assert read_log(copy).startswith(f"removed from the environment of this attempt: {names}\n")
    assert_same_outputs(copy, finished.paths("gemma-lora"))


def test_a_checkpoint_of_other_rows_or_with_damaged_weights_is_not_continued(
    finished: Project,
) -> None:
    """The rows differ as where a library or a data set on the hub changed between two attempts:
    nothing is changed. The damage is in the best checkpoint, which takes those with it that would
    export it.
    """
    name, overrides = "other-rows", RUNS["llama-early"]
    paths = copy_unfinished(finished, "llama-early", name)
    samples = load_json(paths.samples_path)
    was = samples["splits"]["validation"]["mask_hash"]
    samples["splits"]["validation"]["mask_hash"] = "0" * 64
    paths.samples_path.write_text(json.dumps(samples))
    before = snapshot_without_attempts(paths)
    result = try_launch(finished, name, *overrides)
    assert result.returncode == 10
    assert "other-rows failed, data: the rows differ from" in result.stderr
    assert "\n  validation: differs in mask_hash\n" in result.stderr
    assert read_attempts(paths)[-1]["failure"]["kind"] == "data"
    assert snapshot_without_attempts(paths) == before
    weights_path = paths.checkpoint_dir(4) / "model.safetensors"
    weights_path.write_bytes(weights_path.read_bytes()[:-1])
    launch(finished, name, *overrides)
    assert quarantined(paths) == ["step-10.1", "step-4.1"]
    assert "starting at step 0" in read_log(paths)
    assert load_json(paths.samples_path)["splits"]["validation"]["mask_hash"] == was
    assert_same_outputs(paths, finished.paths("llama-early"))


def snapshot_without_attempts(paths: RunPaths) -> dict[str, tuple[int, bytes]]:
    return {
        path: state
        for path, state in snapshot(paths.run_dir).items()
        if "/attempts/" not in path and not path.endswith(("/run.json", "/recipe.json"))
    }
