"""Run directories of every state and damage, as version 0.1.0 wrote them, and what is said of them.

`tests/golden/kept_runs/runs.zip` is a project folder of 57 runs: completed, killed, preempted,
failed of each kind, changed, unreadable, with checkpoints that are damaged, stripped, archived,
renamed or of another launch. Their answers are kept as they were printed; `UPDATE_GOLDEN=1`
rewrites the answers, never the runs.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest

from runner.checkpoints.archive import extract_archive, write_archive
from runner.cli.main import main
from runner.files import hash_json
from runner.recipe.identity import list_library_versions
from tests.conftest import ROOT

GOLDEN: Final = ROOT / "tests" / "golden" / "kept_runs"
# Of the libraries when the runs were written.
VERSIONS: Final = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}


def bring_marker_up_to_date(path: Path) -> None:
    """Put today's library versions where the marker has those of its time, and sign it again."""
    content = json.loads(path.read_text())
    signature, versions = content.pop("marker_sha256"), content["fingerprint"]["versions"]
    if signature != hash_json(content):
        return  # damaged, and to stay so
    versions |= {
        name: version
        for name, version in list_library_versions().items()
        if versions[name] == VERSIONS[name]
    }
    path.write_text(json.dumps({**content, "marker_sha256": hash_json(content)}))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project folder, as the current one, under today's library versions."""
    with zipfile.ZipFile(GOLDEN / "runs.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    if list_library_versions() != VERSIONS:
        for path in tmp_path.rglob("COMMITTED.json"):
            bring_marker_up_to_date(path)
        for name in ("archived", "archive_mends"):
            path = tmp_path / "runs" / "states" / name / "checkpoints" / "step-8.zip"
            extract_archive(path, tmp_path / "opened")
            bring_marker_up_to_date(tmp_path / "opened" / "COMMITTED.json")
            path.unlink()
            write_archive(tmp_path / "opened", path)
            shutil.rmtree(tmp_path / "opened")
    return tmp_path


def compare(name: str, said: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(said)
    assert said == (GOLDEN / name).read_text(), "UPDATE_GOLDEN=1 rewrites it"


def test_status_says_what_it_said(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 1
    said = capsys.readouterr().out
    compare("status.json", said)
    states: list[Any] = json.loads(said)
    assert len(states) == 57 and len({one["state"] for one in states}) == 6


def test_why_says_what_it_said(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    for path in sorted(Path("recipes").rglob("*.yaml")):
        assert main(["why", str(path), "--json"]) == 0
        said += capsys.readouterr().out
    compare("why.json", said)


@pytest.mark.parametrize("grid", ["compared", "states"])
def test_the_report_says_what_it_said(
    grid: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", f"recipes/{grid}", "--format", "json"])
    compare(f"report_{grid}.json", capsys.readouterr().out)
