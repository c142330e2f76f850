"""The facts of a run directory are read once, lease first, and only what changed is read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from runner.errors import CorruptFileError
from runner.files import append_jsonl, write_json_atomic
from runner.plan.status import read_status
from runner.recipe.parse import load_recipe
from runner.run.facts import Part, read_facts
from runner.run.lease import Lease
from runner.run.paths import RunPaths
from runner.run.record import (
    Failure,
    Progress,
    RunRecord,
    StopRequest,
    load_record,
    write_record,
)
from tests.support.fake_checkpoints import interrupt
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher, fake

__all__ = ["fake"]

RECIPE: Final = "recipes/toy/a.yaml"
# The command line with every `open` of its process told, also those that find no file.
COUNTING: Final = """
import json, os, sys

opened = []

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened.append(os.path.abspath(arguments[0]))

sys.addaudithook(note)
from runner.cli.main import main

code = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(opened))
sys.exit(code)
"""


@pytest.fixture
def paths(fake: FakeLauncher) -> RunPaths:
    """A run whose launcher was killed after training failed; every kind of file exists."""
    fake.add("a")
    paths = interrupt(load_recipe(Path(RECIPE)), fake.paths("a"))
    files = paths.attempt(1)
    write_json_atomic(files.progress_path, Progress(phase="training", step=4).model_dump())
    write_json_atomic(files.failure_path(), Failure(kind="lost", message="gone").model_dump())
    write_json_atomic(paths.stop_path, StopRequest(attempt=1, why="enough").model_dump())
    paths.uploads_dir.mkdir()
    (paths.uploads_dir / "step-4.zip").touch()
    append_jsonl(files.uploads_path, {"outcome": "failed", "message": "no network\nat all"})
    return paths


def count_opens(paths: RunPaths, *arguments: str) -> Counter[str]:
    """The number of times a command opened each file of the run, except those in a checkpoint."""
    told_path = paths.run_dir.parent / "opened.json"
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, str(told_path), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    opened = [Path(name) for name in json.loads(told_path.read_text())]
    told_path.unlink()
    inside = [path for path in opened if paths.run_dir in path.parents and not path.is_dir()]
    names = [str(path.relative_to(paths.run_dir)) for path in inside if path.suffix != ".tmp"]
    return Counter(name for name in names if not name.startswith("checkpoints/"))


@pytest.mark.parametrize("named", [RECIPE, "runs/toy/a"])
@pytest.mark.parametrize("verb", ["status", "why", "report"])
def test_a_question_opens_each_file_once(verb: str, named: str, paths: RunPaths) -> None:
    opens = count_opens(paths, verb, named)
    assert {"lease", "recipe.json", "run.json", "attempts/1/failure.json"} <= set(opens)
    if named != RECIPE:
        opens["recipe.json"] -= 1  # for the project, before anything of it is read
    assert set(opens.values()) == {1}, opens


def test_a_completed_run_is_reported_from_one_look_at_each_file(paths: RunPaths) -> None:
    subprocess.run([sys.executable, "-m", "runner", "launch", RECIPE, "--fresh"], check=True)
    write_json_atomic(paths.samples_path, {})
    opens = count_opens(paths, "report", RECIPE)
    assert opens.pop("result.json") == 2, "once more for its checksum"
    assert "samples.json" in opens and set(opens.values()) == {1}, opens
    assert "samples.json" not in count_opens(paths, "status", RECIPE), "as long as the data is"


def test_a_prepared_launch_looks_once_before_the_lease_and_once_under_it(paths: RunPaths) -> None:
    opens = count_opens(paths, "launch", RECIPE, "--prepare")
    assert opens["recipe.json"] == opens["run.json"] == 2
    assert max(opens.values()) == 2, opens
    assert len(load_record(paths).attempts) == 2


def test_what_cannot_be_read_is_a_value_until_it_is_asked_for(paths: RunPaths) -> None:
    recipe = load_recipe(Path(RECIPE))
    paths.result_path.write_text("{")
    facts = read_facts(paths)
    assert len(facts.attempts) == 1 and facts.stored is not None and facts.has_result
    for _ in range(2):
        with pytest.raises(CorruptFileError, match=r"result\.json is not JSON"):
            _ = facts.result
    assert read_status(facts, recipe, {}).state == "unreadable"
    paths.result_path.unlink()
    paths.record_path.unlink()
    paths.record_path.mkdir()
    facts = read_facts(paths)
    for ask in (lambda: facts.attempts, lambda: facts.progress, lambda: facts.failure):
        with pytest.raises(CorruptFileError, match=r"run\.json is a folder, and should be a file"):
            ask()
    assert facts.result is None and not facts.has_result


def test_facts_do_not_change_with_the_directory(paths: RunPaths) -> None:
    facts = read_facts(paths)
    recipe = load_recipe(Path(RECIPE))
    before = read_status(facts, recipe, {})
    paths.result_path.write_text("{")
    write_record(paths, RunRecord())
    (paths.uploads_dir / "step-4.zip").unlink()
    paths.attempt(1).failure_path().unlink()
    with closing(Lease(paths.lease_path)) as lease:
        assert lease.try_acquire()
        assert read_status(facts, recipe, {}) == before
    assert (before.state, before.upload_failure) == ("interrupted", "no network")


def test_only_what_changed_is_read_again(paths: RunPaths) -> None:
    first = read_facts(paths)
    files = paths.attempt(1)
    kept: tuple[Part, ...] = ("recipe", "record", "stop", "upload_rows")
    write_json_atomic(files.progress_path, Progress(phase="training", step=5).model_dump())
    again = read_facts(paths, first.found)
    assert all(again.found[part] is first.found[part] for part in kept)
    assert first.progress is not None and first.progress.step == 4
    assert again.progress is not None and again.progress.step == 5
    text = paths.record_path.read_text()
    assert '"host": "here"' in text
    # In place, of the same length: only its time differs.
    paths.record_path.write_text(text.replace('"host": "here"', '"host": "HERE"'))
    os.utime(paths.record_path, (1e9, 1e9))
    third = read_facts(paths, again.found)
    assert third.last is not None and third.last.host == "HERE"
    paths.recipe_path.unlink()
    assert read_facts(paths, third.found).stored is None


def test_the_lease_is_looked_at_but_for_ones_own(paths: RunPaths) -> None:
    assert not read_facts(paths).is_running
    with closing(Lease(paths.lease_path)) as lease:
        assert lease.try_acquire()
        facts = read_facts(paths)
        assert facts.is_leased and facts.is_running
        assert not read_facts(paths, facts.found, lease=lease).is_running
    assert not read_facts(paths, facts.found).is_running, "never known from before"


def test_samples_are_there_only_where_they_were_asked_for(paths: RunPaths) -> None:
    write_json_atomic(paths.samples_path, {"splits": {}})
    assert read_facts(paths, with_samples=True).samples == {"splits": {}}
    with pytest.raises(KeyError):
        _ = read_facts(paths).samples
