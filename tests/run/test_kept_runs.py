"""Run directories of every state and damage, as version 0.1.0 wrote them, and the output of the
verbs about them.

`tests/golden/kept_runs/runs.zip` is a project folder of 57 runs: completed, killed, preempted,
failed of each kind, changed, unreadable, with checkpoints that are damaged, stripped, archived,
renamed or of another launch. The output is kept as it was printed; `UPDATE_GOLDEN=1` rewrites the
output, never the runs.

The rows of these runs were drawn by rules 1, which no later runner resumes; the output for them is
in `rules_1.json`. All other output is of the same runs with today's rules in their records.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from runner.checkpoints.archive import ArchiveError, extract_archive, write_archive
from runner.cli.main import main
from runner.errors import CorruptFileError
from runner.files import dump_json, hash_json
from runner.recipe.identity import RULES, list_library_versions
from runner.run.paths import RunPaths
from runner.run.record import load_stored_recipe, now_utc
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


def bring_rules_up_to_date(run_dir: Path) -> None:
    """Put today's rules and the digest under them wherever the run has those of its time."""
    paths = RunPaths(run_dir)
    try:
        stored = load_stored_recipe(paths)
    except CorruptFileError:
        return  # and to stay so
    if stored is None:
        return
    for path in (paths.recipe_path, paths.result_path):
        if path.exists():
            path.write_text(path.read_text().replace(stored.recipe_digest, stored.current_digest))
    content = json.loads(paths.recipe_path.read_text())
    paths.recipe_path.write_text(json.dumps({**content, "rules": RULES}))
    digests = {stored.recipe_digest: stored.current_digest}
    for path in paths.checkpoints_dir.rglob("COMMITTED.json"):
        bring_marker_up_to_date(path, digests)
    for path in paths.checkpoints_dir.glob("*.zip"):
        opened_dir = run_dir / "opened"
        try:
            extract_archive(path, opened_dir)
        except ArchiveError:
            continue
        bring_marker_up_to_date(opened_dir / "COMMITTED.json", digests)
        path.unlink()
        write_archive(opened_dir, path)
        shutil.rmtree(opened_dir)


def bring_marker_up_to_date(path: Path, digests: Mapping[str, str]) -> None:
    """Put today's digest and library versions where the marker has those of its time, and sign it
    again.
    """
    content = json.loads(path.read_text())
    signature, fingerprint = content.pop("marker_sha256"), content["fingerprint"]
    if signature != hash_json(content):
        return  # damaged, and to stay so
    versions, digest = fingerprint["versions"], fingerprint["recipe_digest"]
    fingerprint["recipe_digest"] = digests.get(digest, digest)
    versions |= {
        name: version
        for name, version in list_library_versions().items()
        if versions[name] == VERSIONS[name]
    }
    path.write_text(json.dumps({**content, "marker_sha256": hash_json(content)}))


@pytest.fixture
def as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project folder, as the current one; its runs are of rules 1."""
    with zipfile.ZipFile(GOLDEN / "runs.zip") as archive:
        archive.extractall(tmp_path)
    # Models had to have no weights then, and an empty folder is not in the hash of a model.
    (tmp_path / "models" / "toy" / "model.safetensors").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kept(as_written: Path) -> Path:
    """The project folder, as the current one, under today's rules and library versions."""
    for run_dir in (as_written / "runs").glob("*/*"):
        bring_rules_up_to_date(run_dir)
    return as_written


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
    compare(f"report_{grid}.json", select_numbers(capsys.readouterr().out))


def select_numbers(said: str) -> str:
    """A report's numbers for each run; effects are in tests/report. Other tests cover rules, and
    the digest that holds them.
    """
    content = json.loads(said)
    rows = [
        {name: value for name, value in row.items() if name not in ("rules", "recipe_digest")}
        for row in content["rows"]
    ]
    return dump_json({"rows": rows, "base": content["base"]})


def test_runs_of_rules_1_stay_completed_and_what_has_a_checkpoint_is_changed(
    as_written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else changes: runs without a checkpoint start at step 0 anyway."""
    assert main(["status", "--json"]) == 1
    now: list[Any] = json.loads(capsys.readouterr().out)
    lines = [f"{one['grid']}/{one['name']}  {one['state']}: {one['why']}\n" for one in now]
    compare("rules_1.txt", "".join(lines))
    line = "rules of rows and masks: 1 -> 2 (only a runner with rules 1 can resume it)"
    before = json.loads((GOLDEN / "status.json").read_text())
    for one, other in zip(now, before, strict=True):
        paths = RunPaths(Path(one["run_dir"]))
        has_checkpoint = any(paths.checkpoints_dir.glob("step-*"))
        is_asked = other["state"] in ("interrupted", "failed", "changed") and has_checkpoint
        if is_asked and not paths.result_path.exists():
            assert (one["state"], one["differences"][-1]) == ("changed", line)
        else:
            assert one["state"] == other["state"]


def test_the_report_of_completed_runs_of_rules_1_is_the_same(
    as_written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", "recipes/compared", "--format", "json"])
    compare("report_compared.json", select_numbers(capsys.readouterr().out))


def test_a_sweep_tells_once_what_rules_1_change_and_fresh_moves_it(
    as_written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "rules of rows and masks: 1 -> 2 (only a runner with rules 1 can resume it)"
    assert main(["sweep", "recipes/states", "--dry-run"]) == 2
    assert "recipe missing_data names files that do not exist" in capsys.readouterr().err
    Path("data/gone.jsonl").write_text("{}\n")
    assert main(["sweep", "recipes/states", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert said.count("rules of rows and masks") == 1 and f" 32 runs  {line}\n" in said
    assert "refuse  34 runs are changed: " in said and "runner report runs/states\n" in said
    assert main(["sweep", "recipes/states", "--dry-run", "--fresh"]) == 1, "others have failed"
    said = capsys.readouterr().out
    assert f"fresh   34 runs would be moved into runs/.changed-{now_utc()[:10]}\n" in said
    assert "launch  states/killed  pending: never started\n" in said


def test_nothing_of_a_run_of_rules_1_is_continued_and_why_and_launch_say_so_in_the_same_words(
    as_written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    line = "rules of rows and masks: 1 -> 2 (only a runner with rules 1 can resume it)"
    assert main(["why", "recipes/states/killed.yaml"]) == 0
    said = capsys.readouterr().out
    assert f"next        refuse: changed: the runner changed since the run was made: {line}" in said
    assert "intact, but from a different launch: recipe_digest: " in said
    assert main(["launch", "recipes/states/killed.yaml"]) == 2
    said = capsys.readouterr().err
    assert line in said and "hint: runner launch recipes/states/killed.yaml --fresh" in said
    for path, content in before.items():
        assert path.read_bytes() == content, path
