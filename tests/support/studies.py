"""A small project, a folder that is no project, and commands that are started anywhere."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.support.fake_launcher import BIN_DIR, FakeLauncher


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is no project, with different files under the names that recipes use."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "data.jsonl").write_text('{"other": "rows"}\n')
    (folder / "cpu.yaml").write_text("use_cpu: false\n")
    return folder


@pytest.fixture
def study(fake: FakeLauncher) -> FakeLauncher:
    """A project with a completed and a pending run, and a folder `sub` in it."""
    (fake.root / "runner.toml").touch()
    (fake.root / "sub").mkdir()
    fake.add("a", "bb")
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    return fake


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command; restores the current folder."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        before = Path.cwd()
        code = main([*map(str, arguments)])
        assert Path.cwd() == before
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def other(study: FakeLauncher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, elsewhere."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(study.root, root, ignore=shutil.ignore_patterns("fake"), dirs_exist_ok=True)
    return root


def say_from_root(root: Path, text: str) -> str:
    """Output from another folder, with paths as in the project's folder."""
    note = f"note: the project is {root}; paths are relative to it\n"
    assert text.count(note) <= 1
    return text.replace(note, "").replace(f"cd {root} && ", "")


def paste(line: str, study: FakeLauncher) -> None:
    path = f"{study.environment['PATH']}:{BIN_DIR}"
    subprocess.run(["bash", "-c", line], env={**study.environment, "PATH": path}, check=True)
