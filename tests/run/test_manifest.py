"""The manifest of a completed run: each damage to each file is seen, and nothing else is damage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from runner.errors import CorruptFileError
from runner.files import load_json, write_json_atomic
from runner.run.manifest import (
    find_damage,
    find_other_export,
    find_other_result,
    find_other_sizes,
    is_model_removed,
    measure_files,
    restore_model_files,
)
from runner.run.paths import RunPaths
from runner.run.result import TrainResult, load_result
from tests.support.reports import completed, make_recipe
from tests.support.whole_runs import BY_BYTES, BY_SIZE, FILES, MODEL_FILES, add_files, record

DAMAGES = BY_SIZE | BY_BYTES
RECORDED = (*FILES, "recipe.json")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A completed run with every file that is recorded."""
    _, paths, _ = completed(tmp_path, make_recipe("one", {}), tuned=2.0)
    add_files(paths)
    return paths


def load(paths: RunPaths) -> TrainResult:
    result = load_result(paths)
    assert result is not None and result.files is not None
    return result


def find_by_size(paths: RunPaths) -> dict[str, str]:
    files = load(paths).files or {}
    return find_other_sizes(files, measure_files(paths, files))


def find(paths: RunPaths) -> dict[str, str]:
    return find_damage(paths, load(paths).files or {})


def test_a_whole_run_has_no_damage(paths: RunPaths) -> None:
    assert set(load(paths).files or {}) == set(RECORDED)
    assert (find_by_size(paths), find(paths), find_other_result(paths)) == ({}, {}, {})
    (paths.model_dir / ".nfs0001").touch()  # of file systems and desktops
    (paths.run_dir / "tensorboard").mkdir()
    shutil.rmtree(paths.checkpoints_dir, ignore_errors=True)
    assert find(paths) == {}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_to_each_file_is_seen(paths: RunPaths, name: str, damage: str) -> None:
    DAMAGES[damage](paths.run_dir / name)
    assert list(find(paths)) == [name]
    assert list(find_by_size(paths)) == ([name] if damage in BY_SIZE else [])


def test_a_model_that_is_gone_as_a_whole_is_no_damage(paths: RunPaths) -> None:
    for path in paths.model_dir.iterdir():
        path.unlink()
    for _ in range(2):  # an empty folder, and none
        files = load(paths).files or {}
        assert is_model_removed(files, measure_files(paths, files))
        assert (find_by_size(paths), find(paths)) == ({}, {})
        if paths.model_dir.exists():
            paths.model_dir.rmdir()
    BY_BYTES["zeroed"](paths.metrics_path)
    assert list(find(paths)) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "vocab.txt", "a.py"],
)
def test_what_the_run_has_not_written_is_named(paths: RunPaths, name: str) -> None:
    (paths.model_dir / name).write_bytes(b"other weights")
    assert find_by_size(paths) == {}
    assert find(paths) == {f"model/{name}": "was not written by the run"}


def test_what_no_library_loads_is_no_damage(paths: RunPaths) -> None:
    for name in ("README.md", "notes.txt", "LICENSE", "scores.png"):
        (paths.model_dir / name).touch()
    assert find(paths) == {}


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_is_missing(paths: RunPaths, kind: str) -> None:
    path = paths.run_dir / "model" / "tokenizer.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # reading it must not block
    else:
        path.symlink_to("nowhere")
    assert find(paths) == {"model/tokenizer.json": "is missing"}


@pytest.mark.parametrize("name", ["../other/result.json", "/etc", "model//x", "", "a\x1b[2J"])
def test_a_name_that_leads_elsewhere_is_refused(paths: RunPaths, name: str) -> None:
    content = load_json(paths.result_path)
    content["files"][name] = {"size": 1, "sha256": "0" * 64}
    write_json_atomic(paths.result_path, content)
    with pytest.raises(CorruptFileError, match="is outside the run directory"):
        load_result(paths)
    with pytest.raises(ValidationError):
        TrainResult.model_validate(content)


def test_a_result_that_was_edited_is_named(paths: RunPaths) -> None:
    content = load_json(paths.result_path)
    write_json_atomic(paths.result_path, content | {"best_metric": 1.25})
    assert list(find_other_result(paths)) == ["result.json"]
    del content["result_sha256"]
    write_json_atomic(paths.result_path, content)
    assert list(find_other_result(paths)) == ["result.json"], "a list of files is always signed"
    content["files"] = None  # an older run has neither
    write_json_atomic(paths.result_path, content)
    assert find_other_result(paths) == {}
    for hostile in ("[]", '{"result_sha256": "0", "x": NaN}'):
        paths.result_path.write_text(hostile)
        assert len(find_other_result(paths)) == (0 if hostile == "[]" else 1)


def write_export(paths: RunPaths) -> None:
    """Write the recorded export next to the model."""
    for name, content in MODEL_FILES.items():
        target = paths.model_partial_dir / name.removeprefix("model/")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def test_another_export_is_told_file_by_file(paths: RunPaths) -> None:
    write_export(paths)
    files = load(paths).files or {}
    shutil.rmtree(paths.model_dir)
    assert find_other_export(paths, files) == []
    (paths.model_partial_dir / "adapter_config.json").write_text('{"r": 9}\n')
    (paths.model_partial_dir / "tokenizer.json").unlink()
    lines = find_other_export(paths, files)
    assert [line.partition(" would ")[0] for line in lines] == [
        "model/adapter_config.json",
        "model/tokenizer.json",
    ]


@pytest.mark.parametrize("is_removed", [False, True])
def test_what_another_version_of_a_library_writes_besides_is_left_out(
    paths: RunPaths, is_removed: bool
) -> None:
    files = load(paths).files or {}
    write_export(paths)
    (paths.model_partial_dir / "new.json").write_text("{}")
    if is_removed:
        shutil.rmtree(paths.model_dir)
    else:
        DAMAGES["cut"](paths.model_dir / "adapter_model.safetensors")
        (paths.model_partial_dir / "tokenizer.json").write_text('{"version": "2.0"}')
        (paths.model_partial_dir / "adapter_config.json").unlink()
    assert find_other_export(paths, files) == [], "a whole export needs no other"
    restore_model_files(paths, files)
    assert find(paths) == {} and not (paths.model_dir / "new.json").exists()


def test_a_model_is_restored_file_by_file(paths: RunPaths) -> None:
    files = load(paths).files or {}
    for damage in ("zeroed", "cut", "missing"):
        DAMAGES[damage](paths.model_dir / "adapter_model.safetensors")
        kept = (paths.model_dir / "adapter_config.json").stat()
        write_export(paths)
        restore_model_files(paths, files)
        assert find(paths) == {} and not paths.model_partial_dir.exists()
        assert (paths.model_dir / "adapter_config.json").stat() == kept, "whole files stay"
    for is_there in (True, False):
        shutil.rmtree(paths.model_dir)
        if is_there:
            paths.model_dir.mkdir()
        write_export(paths)
        restore_model_files(paths, files)
        assert find(paths) == {} and not paths.model_partial_dir.exists()


KILLED = """\
import itertools, os, signal, sys
from pathlib import Path
from runner.run.manifest import restore_model_files
from runner.run.paths import RunPaths
from runner.run.result import load_result
paths, nth = RunPaths(Path(sys.argv[1])), int(sys.argv[2])
files, counts = load_result(paths).files, itertools.count(1)
def hook(event, arguments):
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.mkdir"):
        if next(counts) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
restore_model_files(paths, files)
"""


def test_a_kill_at_any_instant_of_restoring_leaves_no_file_worse(paths: RunPaths) -> None:
    number, codes = 0, [-signal.SIGKILL]
    while codes[-1] == -signal.SIGKILL:
        number += 1
        shutil.rmtree(paths.model_partial_dir, ignore_errors=True)
        for name in MODEL_FILES:
            (paths.run_dir / name).write_bytes(b"damaged")
        write_export(paths)
        before = {name: b"damaged" for name in MODEL_FILES}
        command = [sys.executable, "-c", KILLED, str(paths.run_dir), str(number)]
        codes.append(subprocess.run(command, check=False).returncode)
        for name, content in MODEL_FILES.items():
            assert (paths.run_dir / name).read_bytes() in (before[name], content)
        shutil.rmtree(paths.model_partial_dir, ignore_errors=True)
        write_export(paths)
        restore_model_files(paths, load(paths).files or {})
        assert find(paths) == {}
    assert codes[-1] == 0 and number > len(MODEL_FILES), "each rename was one of the instants"


def test_a_record_says_what_is_there(paths: RunPaths) -> None:
    paths.predictions_path.unlink()  # of a run that generates no answers
    record(paths)
    assert set(load(paths).files or {}) == set(RECORDED) - {"predictions.jsonl"}
    assert find(paths) == {}
