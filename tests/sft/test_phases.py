"""The phases before training, which depend on the hub's caches and on the extensions that DeepSpeed
still has to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from runner.files import load_json, write_json_atomic
from runner.recipe.data_section import DataSection
from runner.run.paths import RunPaths
from runner.sft.__main__ import _announce_imports
from runner.sft.phases import announce_compilations, name_compilation, name_rows_phase
from runner.sft.startup import WorldPlace
from tests.conftest import ROOT, Project
from tests.support.training_runs import launch_killed_at

_NAMES: Final = """\
import json
from runner.recipe.schema import ModelSection
from runner.sft.phases import name_model_phase, name_tokenizer_phase

def name(path, **more):
    model = ModelSection(path=path, dtype="float32", **more)
    return [name_tokenizer_phase(model), name_model_phase(model)]

print(json.dumps([name("models"), name("lab/tiny"), name("lab/tiny", revision="v2")]))
"""
DOWNLOADING: Final = ["downloading the tokenizer of lab/tiny", "downloading lab/tiny"]
LOADING: Final = ["loading the tokenizer", "loading the model"]


def name_model_phases(root: Path, **environment: str) -> list[list[str]]:
    """The phases of a folder, of `lab/tiny` and of another revision of it, with an empty cache."""
    (root / "models").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", _NAMES],
        cwd=root,
        env={**kept, "HF_HOME": str(root / "home"), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    phases: list[list[str]] = json.loads(done.stdout)
    return phases


def test_models_that_are_not_in_the_cache_are_downloaded(tmp_path: Path) -> None:
    assert name_model_phases(tmp_path) == [LOADING, DOWNLOADING, DOWNLOADING]
    assert name_model_phases(tmp_path, HF_HUB_OFFLINE="1") == [LOADING, LOADING, LOADING]
    repository = tmp_path / "home" / "hub" / "models--lab--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "tokenizer_config.json").write_text("{}")
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(shards))
    (snapshot / "one.safetensors").touch()
    half = [LOADING[0], DOWNLOADING[1]]
    assert name_model_phases(tmp_path)[1] == half, "a shard is missing"
    (snapshot / "two.safetensors").touch()
    assert name_model_phases(tmp_path) == [LOADING, LOADING, DOWNLOADING]


def test_data_sets_that_are_not_in_the_cache_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("datasets").config
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "rows.jsonl").touch()

    def name(train: str, test: str) -> str:
        return name_rows_phase(
            DataSection.model_validate(
                {
                    "train": {"path": train},
                    "test": {"path": test},
                    "task": {"name": "conversations"},
                    "num_validation_samples": 1,
                    "seed": 1,
                    "max_length": 8,
                }
            )
        )

    local = str(tmp_path / "rows.jsonl")
    assert name(local, "missing.jsonl") == "reading rows", "a file that is missing is no data set"
    assert name("lab/TinyRows", "lab/TinyRows") == "downloading lab/TinyRows"
    assert name("lab/TinyRows", "other") == "downloading lab/TinyRows, other"
    (tmp_path / "lab___tiny_rows").mkdir()
    assert name("lab/TinyRows", local) == "reading rows"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert name(local, "other") == "reading rows"


def test_an_extension_is_compiled_waited_for_or_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert name_compilation("cpu_adam") == "compiling DeepSpeed's extension cpu_adam"
    folder = tmp_path / "cpu_adam"
    (folder / "lock").touch()
    waiting = f"waiting for another process that compiles in {folder}"
    assert name_compilation("cpu_adam") == waiting
    (folder / "lock").unlink()
    (folder / "cpu_adam.o").touch()
    assert name_compilation("cpu_adam") == "compiling DeepSpeed's extension cpu_adam"
    (folder / "cpu_adam.so").touch()
    assert name_compilation("cpu_adam") is None


def test_deepspeed_says_what_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders = pytest.importorskip("deepspeed.ops.op_builder.builder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    original = builders.OpBuilder.jit_load
    monkeypatch.setattr(builders.OpBuilder, "jit_load", original)  # put back after the test
    entered: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        entered.append(name)
        yield
        entered.append("over")

    class Extension(builders.OpBuilder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("tiny")

        def absolute_name(self) -> str:
            return "deepspeed.ops.tiny"

        def sources(self) -> list[str]:
            return [str(tmp_path / "tiny.cpp")]

        def is_compatible(self, verbose: bool = False) -> bool:
            entered.append("loading")
            return False

    def load() -> None:
        with pytest.raises(RuntimeError, match="Unable to JIT load the tiny op"):
            Extension().load()

    announce_compilations(phase)
    load()
    assert entered == ["loading"], "without DeepSpeed nothing is changed"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    announce_compilations(phase)
    entered.clear()
    load()
    assert entered == ["compiling DeepSpeed's extension tiny", "loading"]
    (tmp_path / "tiny" / "tiny.so").touch()
    entered.clear()
    load()
    assert entered == ["loading"]


def test_the_first_phase_is_of_the_last_attempt_by_its_number(tmp_path: Path) -> None:
    now = "2026-01-01T00:00:00+00:00"
    facts = {"started_at_utc": now, "command": [], "environment": {}, "num_processes": 1}
    attempts = [{"number": number, "host": "here", **facts} for number in (1, 3)]
    write_json_atomic(RunPaths(tmp_path).record_path, {"attempts": attempts})
    files = RunPaths(tmp_path).attempt(3)
    files.attempt_dir.mkdir(parents=True)
    _announce_imports(tmp_path, WorldPlace.read({}))
    assert load_json(files.progress_path)["phase"] == "importing libraries"


@pytest.mark.slow
def test_the_first_phase_is_told_before_the_imports(project: Project) -> None:
    project.add_model()
    paths = launch_killed_at(project, "imports", event="import", path="runner.sft.train")
    progress = load_json(paths.attempt(1).progress_path)
    assert progress["phase"] == "importing libraries" and progress["phase_began_at_utc"]
