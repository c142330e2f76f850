"""Results are named after the code that a process has loaded, not after later versions of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.data.provenance import list_editable
from tests.conftest import ROOT
from tests.support.installed import install_editable

SAY = "from runner.data.provenance import SOURCE_OF_RUNNER, hash_installed\n"


def say(script: str, *folders: Path) -> list[str]:
    """The output of a process that looks for modules in these folders first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", SAY + script]
    done = subprocess.run(
        command, cwd=folders[0], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_sources_that_are_edited_after_the_import_are_not_those_that_were_loaded(
    tmp_path: Path,
) -> None:
    shutil.copytree(ROOT / "runner", tmp_path / "runner")
    edited = tmp_path / "runner" / "sft" / "evaluate.py"
    edit = f"import pathlib\npathlib.Path({str(edited)!r}).write_text('pass')\n"
    print_it = "print(SOURCE_OF_RUNNER)"
    before = say(print_it, tmp_path)
    assert say(edit + print_it, tmp_path) == before
    assert say(print_it, tmp_path) != before


def test_what_is_installed_after_the_import_is_not_what_a_later_process_loads(
    tmp_path: Path,
) -> None:
    installed = tmp_path / "other-1.0.dist-info"
    install = f"import os\nos.mkdir({str(installed)!r})\n"
    print_it = "print(hash_installed())"
    before = say(print_it, tmp_path, ROOT)
    meanwhile = say(install + print_it, tmp_path, ROOT)
    after = say(print_it, tmp_path, ROOT)
    assert len({*before, *meanwhile, *after}) == 3
    assert say(print_it, tmp_path, ROOT) == after


def test_what_is_edited_in_place_is_named_but_for_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install_editable(tmp_path, "recipe-runner")
    install_editable(tmp_path, "copied", is_editable=False)
    assert list_editable() == []
    install_editable(tmp_path, "lab-tools")
    (tmp_path / "older.egg-link").write_text("/src/older")
    (tmp_path / "torn-1.0.dist-info").mkdir()
    (tmp_path / "torn-1.0.dist-info" / "direct_url.json").write_text("{")
    assert list_editable() == ["lab-tools", "older", "torn"]
