"""A repaired `model/` has the bytes of the first export after any damage, or stays as it is."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from runner.files import load_json, write_json_atomic
from runner.run.manifest import record_files, sign_result
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.training_runs import (
    assert_same_outputs,
    list_files,
    outputs_of,
    read_attempts,
    read_log,
    read_result,
    run_killed_at,
)
from tests.support.whole_runs import BY_BYTES, BY_SIZE

pytestmark = pytest.mark.slow


def copy_run(finished: Project, name: str, copy_name: str) -> RunPaths:
    """A completed run under another name, with its own recipe."""
    source, copy = finished.paths(name), finished.paths(copy_name)
    shutil.copytree(source.run_dir, copy.run_dir)
    stored = load_json(copy.recipe_path)
    stored["recipe"]["run"]["name"] = copy_name
    write_json_atomic(copy.recipe_path, stored)
    result = load_json(copy.result_path)
    del result["result_sha256"]
    (renamed,) = record_files([copy.recipe_path], copy.run_dir).values()
    result["files"]["recipe.json"] = renamed.model_dump()
    write_json_atomic(copy.result_path, sign_result(result))
    recipe = dict(stored["recipe"])
    path = finished.root / "copied" / f"{copy_name}.yaml"
    path.parent.mkdir(exist_ok=True)
    write_json_atomic(path, recipe)
    return copy


def repair(finished: Project, name: str) -> subprocess.CompletedProcess[str]:
    return finished.cli("launch", f"copied/{name}.yaml", "--repair")


@pytest.mark.parametrize("name", ["llama-lora", "gemma-full", "mistral-full"])
def test_a_repaired_model_has_the_bytes_of_the_first_export(finished: Project, name: str) -> None:
    paths = copy_run(finished, name, f"repaired-{name}")
    weights = next(path for path in list_files(paths.model_dir) if path.suffix == ".safetensors")
    BY_BYTES["zeroed"](weights)
    BY_SIZE["cut"](paths.model_dir / "tokenizer_config.json")
    done = finished.cli("export", f"runs/tests/{paths.run_dir.name}", "--output", "exports/never")
    assert done.returncode == 2 and "is damaged" in done.stderr
    if name == "mistral-full":  # which archives its checkpoints
        shutil.rmtree(paths.checkpoint_dir(read_result(paths).best_step))
    done = repair(finished, paths.run_dir.name)
    assert done.returncode == 0, f"{done.stderr}\n{read_log(paths)}"
    assert_same_outputs(paths, finished.paths(name))
    assert not paths.model_partial_dir.exists() and not paths.quarantine_dir.exists()
    assert [one["is_repair"] for one in read_attempts(paths)] == [False, True]
    status = finished.cli("status", f"runs/tests/{paths.run_dir.name}")
    assert status.returncode == 0 and "completed" in status.stdout


def test_a_removed_model_is_written_again_and_a_kill_on_the_way_leaves_nothing_worse(
    finished: Project,
) -> None:
    paths = copy_run(finished, "gemma-lora", "repaired-killed")
    shutil.rmtree(paths.model_dir)
    arguments = ("launch", "copied/repaired-killed.yaml", "--repair")
    for at in ("os.mkdir /.model-partial 1", "os.rename /.model-partial 1"):
        done = run_killed_at(finished, *arguments, at=at)
        assert done.returncode == 14 and not paths.model_dir.exists(), read_log(paths)
        status = finished.cli("status", "runs/tests/repaired-killed")
        assert status.returncode == 0 and "model removed" in status.stdout
    assert repair(finished, "repaired-killed").returncode == 0, read_log(paths)
    assert_same_outputs(paths, finished.paths("gemma-lora"))


def test_another_export_than_was_recorded_leaves_the_old_one(finished: Project) -> None:
    """Another version of a library could write it; here the record is changed."""
    paths = copy_run(finished, "gemma-lora", "repaired-otherwise")
    result = load_json(paths.result_path)
    del result["result_sha256"]
    result["files"]["model/generation_config.json"]["sha256"] = "0" * 64
    write_json_atomic(paths.result_path, sign_result(result))
    assert repair(finished, "repaired-otherwise").returncode == 10, "that file is damaged"
    record = load_json(paths.record_path)
    record["attempts"][0]["versions"] |= {"cuda": "99", "transformers": "4.0.0"}
    write_json_atomic(paths.record_path, record)
    before = outputs_of(paths)
    done = repair(finished, "repaired-otherwise")
    assert done.returncode == 10, read_log(paths)
    assert "is not the one that was recorded" in done.stderr
    assert "model/generation_config.json would have" in done.stderr
    assert "transformers 4.0.0 (now" in done.stderr and "cuda 99" not in done.stderr
    assert outputs_of(paths) == before and not paths.model_partial_dir.exists()
