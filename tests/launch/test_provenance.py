"""An attempt records by which runner, libraries and machine it is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runner
from runner.launch.provenance import read_cpu, read_gpus, read_provenance
from runner.recipe.identity import LIBRARIES
from tests.conftest import ROOT

# Reads, takes each line as Python that changes something, and reads again, in one process.
PROGRAM = """
import json, sys
from dataclasses import asdict
from runner.launch.provenance import read_provenance
for line in ["", *sys.argv[1:]]:
    exec(line)
    print(json.dumps(asdict(read_provenance())))
"""
OPEN_MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (b@c)\n"
)
MODULE = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2026\n"
)


def read_in(folder: Path, *changes: str) -> list[dict[str, Any]]:
    """The values that a process with the runner of `folder` reads, before and after each change."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *changes],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder that holds the runner, in no git checkout."""
    folder = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "runner", folder / "runner", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def test_the_runner_is_recorded_by_version_and_source_where_there_is_no_checkout(
    copied: Path,
) -> None:
    edit = "open('runner/text.py', 'a').write('# edited\\n')"
    before, after = read_in(copied, edit)
    assert before["runner_version"] == runner.__version__
    assert before["runner_commit"] is before["runner_is_dirty"] is None
    assert before["source_hash"] == read_provenance().source_hash
    assert after == before | {"source_hash": after["source_hash"]}
    assert after["source_hash"] != before["source_hash"], "an edit is seen by a process that lives"


def test_the_commit_and_whether_it_was_edited_are_recorded_in_a_checkout(copied: Path) -> None:
    (copied / "notes.txt").write_text("beside the runner")
    git(copied, "init", "-q")
    git(copied, "add", "runner")
    git(copied, "commit", "-qm", "one")
    first = git(copied, "rev-parse", "HEAD")
    commit = (
        "import subprocess; subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b',"
        " '-c', 'commit.gpgsign=false', 'commit', '-qam', 'two'], check=True)"
    )
    edit = "open('runner/text.py', 'a').write('# edited\\n')"
    clean, edited, committed = read_in(copied, edit, commit)
    assert (clean["runner_commit"], clean["runner_is_dirty"]) == (first, False)
    assert (edited["runner_commit"], edited["runner_is_dirty"]) == (first, True)
    assert committed["runner_commit"] == git(copied, "rev-parse", "HEAD") != first
    assert committed["runner_is_dirty"] is False
    assert clean["source_hash"] != edited["source_hash"] == committed["source_hash"]


def test_a_runner_that_is_installed_inside_somebody_elses_checkout_has_no_commit(
    copied: Path,
) -> None:
    """`.venv` in a project's folder: its commit is not the runner's."""
    (copied / ".gitignore").write_text("runner/\n")
    git(copied, "init", "-q")
    git(copied, "add", ".gitignore")
    git(copied, "commit", "-qm", "one")
    (found,) = read_in(copied)
    assert found["runner_commit"] is found["runner_is_dirty"] is None


def test_libraries_and_machine_are_recorded_without_torch() -> None:
    found = read_provenance()
    more = {"python", "tokenizers", "datasets", "numpy", "safetensors", "cuda", "driver"}
    assert set(found.versions) == {*LIBRARIES, *more} and all(found.versions.values())
    assert set(found.hardware) == {"cpu", "gpu"} and all(found.hardware.values())
    assert not {"tokenizers", "datasets", "numpy", "safetensors"} & set(LIBRARIES), (
        "checkpoints are compared by these, and older ones do not have more"
    )


@pytest.mark.parametrize(
    ("said", "version"), [(OPEN_MODULE, "550.54.15"), (MODULE, "535.104.05"), ("", None)]
)
def test_driver_and_gpus_are_read_from_the_drivers_own_files(
    tmp_path: Path, said: str, version: str | None
) -> None:
    folder = tmp_path / "driver" / "nvidia"
    for number in range(2):
        gpu_dir = folder / "gpus" / f"0000:0{number}:00.0"
        gpu_dir.mkdir(parents=True)
        (gpu_dir / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\n")
    (folder / "version").write_text(said + "GCC version:  gcc version 11.4.0\n")
    assert read_gpus(tmp_path) == (version, ["NVIDIA H200", "NVIDIA H200"])
    assert read_gpus(tmp_path / "nowhere") == (None, [])


def test_the_processor_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654\n" * 2)
    assert read_cpu(tmp_path) == "AMD EPYC 9654"
    (tmp_path / "cpuinfo").write_text("CPU implementer\t: 0x41\n")
    assert read_cpu(tmp_path) == os.uname().machine
