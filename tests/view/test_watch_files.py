"""The live view shows the same as `runner status` derives, after any change, and reads little
twice.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.files import append_jsonl, load_json, write_json_atomic, write_jsonl_atomic
from runner.launch import display
from runner.plan.select import Selected, select_recipes
from runner.plan.status import RunStatus, read_status
from runner.recipe.contents import KnownContents, list_contents
from runner.run.failures import HINTS, UNREADABLE_HINT
from runner.run.paths import content_cache_path
from runner.run.record import Progress, now_utc
from runner.view.watch import LossReader, RunsReader, build_views
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher, fake, finish
from tests.support.whole_runs import FILES, add_files

__all__ = ["fake"]


def select(fake: FakeLauncher) -> list[Selected]:
    return select_recipes(["recipes/toy"], Path("runs"))


def derive(selected: list[Selected]) -> list[RunStatus]:
    known = KnownContents(content_cache_path(Path("runs")))
    return [
        read_status(one.read_facts(), one.recipe, known.find(list_contents(one.recipe)))
        for one in selected
    ]


def without_clock(statuses: list[RunStatus]) -> list[RunStatus]:
    return [status.model_copy(update={"seconds": None}) for status in statuses]


def test_statuses_follow_every_change(fake: FakeLauncher) -> None:
    fake.add("a", "b", "c", "d", told="complete")
    fake.tell("c", "fail data no rows")
    fake.tell("d", "exit 3")
    selected = select(fake)
    reader = RunsReader(selected, content_cache_path(Path("runs")))

    def states() -> list[str]:
        statuses = [reading.status for reading in reader.read()]
        assert without_clock(statuses) == without_clock(derive(selected))
        return [status.state for status in statuses]

    assert states() == ["pending"] * 4
    assert main(["sweep", "recipes/toy"]) == 1
    assert states() == ["completed", "completed", "failed", "interrupted"]
    fake.tell("c", "complete")
    assert main(["rerun", "recipes/toy"]) == 1
    assert states() == ["completed", "completed", "completed", "interrupted"]
    write_json_atomic(
        fake.paths("a").result_path,
        {**json.loads(fake.paths("a").result_path.read_text()), "num_steps": 7},
    )
    assert states()[0] == "completed" and reader.read()[0].status.step == 7
    (fake.paths("b").quarantine_dir / "step-1").mkdir(parents=True)
    assert reader.read()[1].status.quarantined == ("step-1",)
    (fake.paths("b").uploads_dir).mkdir(parents=True)
    assert reader.read()[1].status.pending_uploads == ()
    (fake.paths("b").uploads_dir / "step-1.zip").touch()
    assert reader.read()[1].status.pending_uploads == ("step-1.zip",)
    before, after = reader.read(), reader.read()
    assert all(one.status is other.status for one, other in zip(before, after, strict=True)), (
        "nothing is read again"
    )
    shutil.rmtree(fake.paths("b").run_dir)
    assert states() == ["completed", "pending", "completed", "interrupted"]


def test_a_running_attempt_is_read_with_its_progress_and_losses(fake: FakeLauncher) -> None:
    fake.add("a", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    reader = RunsReader(select(fake), content_cache_path(Path("runs")))
    (reading,) = reader.read()
    assert (reading.status.state, reading.progress, list(reading.losses)) == ("running", None, [])
    for step in (1, 2):
        append_jsonl(fake.paths("a").metrics_path, {"step": step, "loss": 3.0 - step})
        progress = Progress(phase="training", step=step, max_steps=2, seconds_per_step=1.5)
        write_json_atomic(fake.paths("a").attempt(1).progress_path, progress.model_dump())
        (reading,) = reader.read()
        assert reading.status.step == step and reading.progress == progress
        assert list(reading.losses) == [2.0, 1.0][:step]
    fake.let_go("a")
    assert finish(sweep)[0] == 0
    (reading,) = reader.read()
    assert (reading.status.state, reading.progress, list(reading.losses)) == ("completed", None, [])


def test_a_long_phase_grows_while_no_file_changes(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    files = fake.paths("a").attempt(1)
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=20)

    def shows_time(text: str, phase: str = "compiling") -> bool:
        """However long it has taken to come here; a duration of a minute is not in seconds."""
        seconds = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
        found = re.search(rf"{phase}, (\d+) s", text)
        return found is not None and 20 <= int(found[1]) <= seconds + 2

    progress = Progress(phase="compiling", phase_began_at_utc=began.isoformat(timespec="seconds"))
    write_json_atomic(files.progress_path, progress.model_dump())
    reader = RunsReader(select(fake), content_cache_path(Path("runs")))
    why = reader.read()[0].status.why
    assert shows_time(why)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while reader.read()[0].status.why == why:
        assert time.monotonic() < deadline
    assert main(["status", "recipes/toy"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"running .* compiling, ", out) and shows_time(out)
    assert main(["status", "recipes/toy", "--watch"]) == 0
    assert shows_time(capsys.readouterr().out)
    assert shows_time(display._describe(files, 40.0)[0]), "the sweep's line and bar"
    os.utime(files.progress_path, (time.time() + 500, time.time() - 240))
    why = reader.read()[0].status.why
    assert shows_time(why), "none is missed in such a phase"
    masking = progress.model_copy(update={"phase": "masking rows"})
    write_json_atomic(files.progress_path, masking.model_dump())
    shown = "masking rows, no progress for 4 min"
    os.utime(files.progress_path, (1, time.time() - 240))
    assert reader.read()[0].status.why.startswith(shown)
    assert main(["status", "recipes/toy"]) == 0
    assert shown in capsys.readouterr().out
    os.utime(files.progress_path, (1, time.time() + 500))
    assert shows_time(reader.read()[0].status.why, "masking rows")
    assert main(["status", "recipes/toy"]) == 0
    assert shows_time(capsys.readouterr().out, "masking rows")
    assert select(fake)[0].read_facts().measure_silence(now_utc()) == 0, "by a clock that is ahead"
    assert display._describe(files, 240.0)[0] == "masking rows, no progress for 4 min"
    training = progress.model_copy(update={"phase": "saving", "step": 1, "max_steps": 2})
    write_json_atomic(files.progress_path, training.model_dump())
    assert re.fullmatch(r"saving, \d+ s, step 1/2", display._describe(files, 40.0)[0])
    assert main(["stop", "recipes/toy"]) == 0
    assert re.search(r"stop \(saving, \d+ s, step 1/2, on ", capsys.readouterr().out)
    fake.let_go("a")
    assert finish(sweep)[0] == 0


def test_a_failed_run_that_its_sweep_tries_again_is_said_to_wait(fake: FakeLauncher) -> None:
    fake.add("a", told="fail transient the network")
    fake.add("b", told="fail data no rows")
    assert main(["sweep", "recipes/toy"]) == 1
    for path in Path("recipes/toy").iterdir():  # not part of the experiment
        path.write_text(path.read_text().replace("transient: 0", "transient: 2"))
    waiting, failed = build_views(RunsReader(select(fake), content_cache_path(Path("runs"))).read())
    assert (waiting.state, waiting.retry) == (
        "waiting",
        "retry 1 of 2 in 10 s, if its sweep is still running",
    )
    assert (failed.state, failed.retry) == ("failed", None)
    assert failed.hint == HINTS["data"]
    assert failed.log_path == "runs/toy/b/attempts/1/log.txt"
    record = load_json(fake.paths("b").record_path)
    record["attempts"][0]["number"] = 3
    write_json_atomic(fake.paths("b").record_path, record)
    (_, renumbered) = build_views(RunsReader(select(fake), content_cache_path(Path("runs"))).read())
    assert renumbered.log_path == "runs/toy/b/attempts/3/log.txt"
    fake.paths("b").record_path.write_text("no JSON")
    (_, damaged) = build_views(RunsReader(select(fake), content_cache_path(Path("runs"))).read())
    assert (damaged.state, damaged.hint) == ("unreadable", UNREADABLE_HINT)


def test_a_data_file_that_changed_changes_its_runs(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    assert main(["sweep", "recipes/toy"]) == 0
    reader = RunsReader(select(fake), content_cache_path(Path("runs")))
    before = reader.read()
    assert [reading.status.state for reading in before] == ["completed"] * 2
    assert reader.read()[0].status is before[0].status
    cache = content_cache_path(Path("runs"))
    entries = load_json(cache)
    entries[str(Path("data.jsonl").resolve())][-1] = "f" * 64  # as another sweep would write it
    write_json_atomic(cache, entries)
    assert [reading.status.state for reading in reader.read()] == ["changed"] * 2


def test_losses_are_read_on_and_anew_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = LossReader(path)
    assert list(reader.read()) == []
    rows = [{"step": step, "loss": float(step)} for step in range(1, 6)]
    for row in rows:
        append_jsonl(path, row)
    append_jsonl(path, {"step": 5, "split": "test"})
    with path.open("ab") as stream:
        stream.write(b'{"step": 6, "lo')
    assert list(reader.read()) == [1, 2, 3, 4, 5], "the last line is not whole yet"
    with path.open("ab") as stream:
        stream.write(b'ss": 6.0}\n')
    assert list(reader.read()) == [1, 2, 3, 4, 5, 6]
    write_jsonl_atomic(path, rows[:2])  # a resume from step 2
    assert list(reader.read()) == [1, 2]
    append_jsonl(path, {"step": 3, "loss": 9.0})
    assert list(reader.read()) == [1, 2, 9]
    # Another file, and a longer one.
    write_jsonl_atomic(path, [{"step": step, "loss": 7.0} for step in range(50)])
    assert list(reader.read()) == [7.0] * 50
    path.write_bytes(b"not json\n[1]\n" + b'{"step": 1, "loss": 2.5}\n')
    assert list(reader.read()) == [2.5]


def test_a_file_of_a_completed_run_that_is_cut_is_seen(fake: FakeLauncher) -> None:
    """No folder changes by it, and nothing else that is looked at."""
    fake.add("a", told="complete")
    assert main(["sweep", "recipes/toy"]) == 0
    add_files(fake.paths("a"))
    selected = select(fake)
    reader = RunsReader(selected, content_cache_path(Path("runs")))

    def read() -> RunStatus:
        (reading,) = reader.read()
        assert without_clock([reading.status]) == without_clock(derive(selected))
        return reading.status

    assert read().state == "completed" and read().state == "completed"
    for name in FILES:
        path = fake.paths("a").run_dir / name
        content = path.read_bytes()
        os.truncate(path, len(content) - 1)
        assert (read().state, list(read().damage)) == ("damaged", [name])
        (view,) = build_views(reader.read())
        assert view.state == "damaged" and view.hint is not None
        with path.open("r+b") as stream:  # the same file
            stream.write(content)
        assert read().state == "completed"
    shutil.rmtree(fake.paths("a").model_dir)
    assert read().notes == "model removed"
