"""The source of a run's rows: an entry that is written once if there are many, even if it is
damaged later; drawn and masked each time if there are few.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from runner.data.draw import draw_splits
from runner.data.row_entries import MIN_STORED_ROWS, load_entry
from runner.data.rows import Samples, build_samples, describe_samples
from runner.data.stored_rows import StoredRows
from runner.data.tokenizer import load_tokenizer
from runner.errors import DataError
from runner.files import dump_json, hash_file, load_json, write_json_atomic
from runner.recipe.contents import ContentHashes, hash_contents
from runner.run.entries import hold_entry, list_stored
from runner.run.paths import row_entries_dir
from runner.run.record import load_progress
from runner.sft.context import RunContext
from runner.sft.rows import RowStore, Watch, count_free_cores, estimate_bytes, load_samples
from runner.sft.startup import WorldPlace
from tests.conftest import Project
from tests.support.contexts import open_context

LARGE: Final = (
    "data.train.path=large.jsonl",
    f"data.num_train_samples={MIN_STORED_ROWS - 27}",
)


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.root)
    project.add_model()
    return project


def open_run(project: Project, *overrides: str) -> tuple[RunContext, Any]:
    """A run as its training process opens it, and its tokenizer."""
    context = open_context(project, *overrides)
    hashes = ContentHashes(project.root / "hashes.json")
    context.contents = hash_contents(context.recipe, hashes)
    return context, load_tokenizer(context.recipe.model)


def write_large(project: Project) -> None:
    lines = []
    for number in range(MIN_STORED_ROWS):
        turns = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": turns}))
    (project.root / "large.jsonl").write_text("\n".join(lines))


def describe(samples: Samples) -> str:
    return dump_json(describe_samples(samples, "completion"))


def list_entries(project: Project) -> list[str]:
    return [one.path.name for one in list_stored(row_entries_dir(project.root / "runs"))]


def test_few_rows_are_masked_as_ever(here: Project) -> None:
    context, tokenizer = open_run(here, "data.num_train_samples=null")  # as many as there are
    samples = load_samples(context, tokenizer)
    assert isinstance(samples.train.rows, tuple)
    assert describe(samples) == describe(build_samples(context.recipe.data, tokenizer))
    assert not row_entries_dir(here.root / "runs").exists()


def test_many_rows_are_stored_once_and_read_again_or_masked_where_there_is_no_room(
    here: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_large(here)
    context, tokenizer = open_run(here, *LARGE)
    with monkeypatch.context() as full:
        usage = shutil._ntuple_diskusage(10**9, 10**9 - 10_000, 10_000)
        full.setattr(shutil, "disk_usage", lambda _: usage)
        in_memory = load_samples(context, tokenizer)
    assert isinstance(in_memory.train.rows, tuple)
    told = capsys.readouterr().out
    assert "warning: masked rows are not stored below" in told
    assert "the masked rows would take" in told and list_entries(here) == []
    first = load_samples(context, tokenizer)
    assert "masked 5,000 rows in" in capsys.readouterr().out
    second = load_samples(context, tokenizer)
    assert "rows were masked by tests/base, attempt 1," in capsys.readouterr().out
    for samples in (first, second):
        assert isinstance(samples.train.rows, StoredRows)
        assert describe(samples) == describe(in_memory)
        assert tuple(samples.test.rows) == in_memory.test.rows
    assert len(list_entries(here)) == 1


@pytest.fixture
def store(here: Project) -> RowStore:
    """A store with the entry of a few rows in it."""
    store = RowStore(*open_run(here))
    store.write(draw_splits(here.recipe().data))
    return store


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["train-00000.arrow", "rows.json"])
def test_a_damaged_entry_is_moved_aside_and_written_anew(
    here: Project,
    store: RowStore,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    damage(store.folder / name)
    again = RowStore(*open_run(here))
    again.write(draw_splits(here.recipe().data))
    told = capsys.readouterr().out
    (moved,) = (store.folder.parent / ".quarantine").iterdir()
    why = load_json(moved / "why.json")["why"]
    assert f"warning: masked rows are damaged: {why}; moved to {moved}" in told
    after = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    del before["manifest.json"], after["manifest.json"]  # which says when
    assert after == before and load_entry(again.folder).train.rows


def test_an_entry_that_is_whole_but_of_another_shape_is_written_anew(
    here: Project, store: RowStore, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_json(store.folder / "rows.json")
    rows["splits"] = list(rows["splits"])
    write_json_atomic(store.folder / "rows.json", rows)
    manifest = load_json(store.folder / "manifest.json")
    manifest["files"]["rows.json"] = hash_file(store.folder / "rows.json")
    write_json_atomic(store.folder / "manifest.json", manifest)
    RowStore(*open_run(here)).write(draw_splits(here.recipe().data))
    assert "warning: masked rows are damaged:" in capsys.readouterr().out
    assert load_entry(store.folder).train.rows


def test_a_run_waits_for_another_that_masks_the_same_rows(
    here: Project, store: RowStore, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = store.folder.with_name("ready")
    store.folder.rename(ready)
    context, tokenizer = open_run(here)
    other = RowStore(context, tokenizer)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(other.write(draw_splits(context.recipe.data)))
    )
    with hold_entry(store.folder, lambda: False) as is_ours:
        assert is_ours
        thread.start()
        while True:
            progress = load_progress(context.attempt.progress_path)
            if progress is not None and progress.phase.startswith("waiting for another run"):
                break
            assert thread.is_alive()
        ready.rename(store.folder)
    thread.join()
    (entry,) = found
    assert entry.folder == store.folder and entry.producer["run"] == "tests/base"
    assert "rows were masked by" in capsys.readouterr().out


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_run_waits_no_longer_for_one_that_does_not_go_on(
    here: Project, is_stopped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a stopped holder would delay every run that needs the same rows."""
    write_large(here)
    context, tokenizer = open_run(here, *LARGE)
    store = RowStore(context, tokenizer, patience_seconds=0.3)
    lock = store.folder.with_name(f"{store.folder.name}.lock")
    hold = (
        "import sys; from pathlib import Path; from runner.run.lease import Lease;"
        " lock = Lease(Path(sys.argv[1])); print(lock.try_acquire(), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"True\n"
            if is_stopped:
                holder.send_signal(signal.SIGSTOP)
            assert store.find_or_write() is None
            assert store.raw is not None and list_entries(here) == []
        finally:
            holder.kill()
    told = capsys.readouterr().out
    assert f"warning: masked rows are not stored below {store.folder.parent}:" in told
    assert "another run that masks the same rows wrote nothing for" in told
    assert store.find_or_write() == str(store.folder)  # the lock is free again


def test_a_writer_is_at_work_as_long_as_its_files_change(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    watch = Watch(folder, 300.0)
    assert watch.is_working(1000.0) and watch.is_working(1299.0)
    assert not watch.is_working(1300.0), "it has not even begun"
    other, own = tmp_path / ".other.1-a.tmp", tmp_path / ".key.1-a.tmp"
    other.mkdir()
    (other / "train-00000.arrow").write_bytes(b"rows")
    assert not watch.is_working(1301.0), "it writes another entry"
    own.mkdir()
    shard = own / "train-00000.arrow"
    shard.write_bytes(b"rows")
    assert watch.is_working(1400.0) and watch.is_working(1699.0)
    with shard.open("ab") as stream:
        stream.write(b"more")
    assert watch.is_working(1701.0) and not watch.is_working(2001.0)
    os.utime(shard, (0, 0))
    assert watch.is_working(2002.0)


def test_files_that_changed_since_the_run_was_prepared_are_not_stored(here: Project) -> None:
    text = (here.root / "data.jsonl").read_text()
    (here.root / "own.jsonl").write_text(text)
    store = RowStore(*open_run(here, "data.train.path=own.jsonl"))
    (here.root / "own.jsonl").write_text(text + "\n")
    with pytest.raises(OSError, match="data files changed since the run was prepared"):
        store.write(draw_splits(here.recipe("data.train.path=own.jsonl").data))
    assert list_entries(here) == []


def test_the_disk_check_counts_each_row_of_a_split_conversation(here: Project) -> None:
    """`data.turns: split` makes many rows of a conversation, each with its history."""
    turns = []
    for number in range(12):
        turns += [
            {"role": "user", "content": f"{number} " + "why " * 40},
            {"role": "assistant", "content": "so " * 40},
        ]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"row {n}"}, *turns[1:]]})
        for n in range(60)
    ]
    (here.root / "talks.jsonl").write_text("\n".join(lines))
    long = ("data.train.path=talks.jsonl", "data.num_train_samples=30", "data.max_length=4096")
    sizes = {}
    for name in ("last", "split"):
        overrides = (*long, f"data.turns={name}")
        raw = draw_splits(here.recipe(*overrides).data)
        entry = RowStore(*open_run(here, *overrides)).write(raw)
        written = sum(path.stat().st_size for path in entry.folder.glob("*.arrow"))
        sizes[name] = written, estimate_bytes(raw, name)
        assert written < sizes[name][1] < 8 * written
    assert sizes["split"][0] > 4 * sizes["last"][0]


def test_rows_that_are_refused_leave_no_entry(here: Project) -> None:
    store = RowStore(*open_run(here, "data.max_length=5"))
    with pytest.raises(DataError, match=r"are longer than `data\.max_length: 5`"):
        store.write(draw_splits(here.recipe("data.max_length=5").data))
    assert list_entries(here) == []


def test_the_cores_of_a_run_are_its_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    two_ranks = WorldPlace(world_size=4, local_world_size=2)
    assert count_free_cores(WorldPlace(), {}) == 8
    assert count_free_cores(two_ranks, {}) == 8
    assert count_free_cores(WorldPlace(), {"OMP_NUM_THREADS": "2"}) == 2
    assert count_free_cores(two_ranks, {"OMP_NUM_THREADS": "2"}) == 4
    assert count_free_cores(WorldPlace(), {"OMP_NUM_THREADS": "64"}) == 8
    assert count_free_cores(two_ranks, {"OMP_NUM_THREADS": "0"}) == 1


def test_masking_shows_how_far_it_is(here: Project) -> None:
    """And is one phase all the same."""
    context, _ = open_run(here)
    with context.phase("masking rows"):
        context._last_progress_at = 0.0  # it was just written
        context.show_in_phase("12,000 of 100,000")
        shown = load_progress(context.attempt.progress_path)
        assert shown is not None and shown.phase == "masking rows, 12,000 of 100,000"
        assert shown.phase_began_at_utc is not None
    context.write_timing(0, 0.0)
    assert load_json(context.attempt.timing_path)["phase_seconds"].keys() == {"masking rows"}
