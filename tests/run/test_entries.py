import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from runner.errors import CorruptFileError
from runner.run.entries import (
    Entry,
    find_entry,
    hold_entry,
    list_stored,
    quarantine_entry,
    remove_stored,
    write_entry,
)

NAME: Final = "0123456789abcdef" * 4
PARTS: Final = {"rows": "abc"}
PRODUCER: Final = {"run": "toy/a", "attempt": 1}


def write_scores(folder: Path) -> None:
    (folder / "scores.json").write_text("[1.5]")
    (folder / "answers.json").write_text("[]")


def write(folder: Path) -> Entry:
    folder.parent.mkdir(exist_ok=True)
    return write_entry(folder, write_scores, parts=PARTS, producer=PRODUCER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".base" / NAME


def test_an_entry_is_found_with_who_wrote_it(folder: Path) -> None:
    assert find_entry(folder) is None
    written = write(folder)
    found = find_entry(folder)
    assert found == written
    assert found is not None and dict(found.producer).items() >= PRODUCER.items()
    assert json.loads((folder / "manifest.json").read_text())["parts"] == PARTS
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scores.json", "[1.6]"),
        ("answers.json", None),
        ("manifest.json", "{"),
        ("manifest.json", "[]"),
        ("manifest.json", '{"files": {"scores.json": "0"}}'),
        ("manifest.json", '{"files": [], "producer": {}}'),
        ("manifest.json", '{"files": {}, "producer": {}}'),
        ("manifest.json", '{"files": {"../other": "0"}, "producer": {}}'),
    ],
)
def test_damage_is_said_and_moved_aside(folder: Path, name: str, content: str | None) -> None:
    write(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")):
        find_entry(folder)
    moved = quarantine_entry(folder, "it was damaged")
    assert moved is not None and moved.parent == folder.parent / ".quarantine"
    assert json.loads((moved / "why.json").read_text())["why"] == "it was damaged"
    assert find_entry(folder) is None
    assert quarantine_entry(folder, "a second one that looks") is None
    assert write(folder) == find_entry(folder)


def test_nothing_is_left_of_what_cannot_be_written(folder: Path) -> None:
    def fill(temporary: Path) -> None:
        write_scores(temporary)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.parent.mkdir()
    with pytest.raises(OSError, match="No space left"):
        write_entry(folder, fill, parts=PARTS, producer=PRODUCER)
    assert list(folder.parent.iterdir()) == []


WRITER: Final = """
import signal, sys
from pathlib import Path
from runner.run.entries import hold_entry, write_entry

def write(temporary):
    (temporary / "scores.json").write_text("[1.")
    print("writing", flush=True)
    signal.pause()

folder = Path(sys.argv[1])
with hold_entry(folder, lambda: False) as is_ours:
    assert is_ours
    write_entry(folder, write, parts={}, producer={})
"""


def test_a_killed_writer_leaves_no_entry_and_no_lock(folder: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    looks = iter([True, False])
    with hold_entry(folder, lambda: next(looks)) as is_ours:
        assert not is_ours, "while the other one writes"
    [leftover] = list_stored(folder.parent)
    assert not remove_stored(leftover), "and it is left alone"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert find_entry(folder) is None
    with hold_entry(folder, lambda: False) as is_ours:
        assert is_ours
        write(folder)
    assert [one.path for one in list_stored(folder.parent)] == [folder]


def test_what_another_machine_left_goes_when_it_is_old(folder: Path) -> None:
    """If locks do not work between machines, the writer may still be alive."""
    folder.parent.mkdir()
    leftover = folder.with_name(f".{NAME}.00000000-0123abcd.tmp")
    leftover.mkdir()
    (leftover / "scores.json").write_text("[1.")
    write(folder)
    assert [one.path for one in list_stored(folder.parent)] == [leftover, folder]
    for path in (leftover, leftover / "scores.json"):
        os.utime(path, (0, 0))
    quarantine_entry(folder, "wrong", read=find_entry(folder))
    write(folder)
    assert leftover not in [one.path for one in list_stored(folder.parent)]


def test_an_entry_that_another_machine_has_written_meanwhile_stays(folder: Path) -> None:
    """Its files may be mapped there; without working locks, two processes write one entry."""

    elsewhere = folder.parent.with_name("elsewhere") / NAME
    write(elsewhere)

    def write_late(temporary: Path) -> None:
        write_scores(temporary)
        elsewhere.rename(folder)

    folder.parent.mkdir()
    late = write_entry(folder, write_late, parts=PARTS, producer={"run": "toy/late"})
    assert late.producer["run"] == "toy/a" and late == find_entry(folder)
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_a_good_entry_is_not_moved_for_the_one_that_was_there_before(folder: Path) -> None:
    write(folder)
    wrong = find_entry(folder)
    assert quarantine_entry(folder, "wrong", read=wrong) is not None
    write_entry(folder, write_scores, parts=PARTS, producer={"run": "toy/b"})
    assert quarantine_entry(folder, "wrong", read=wrong) is None
    assert quarantine_entry(folder, "damaged, as another run read it") is None
    assert find_entry(folder) is not None


def test_who_waits_gets_the_lock_of_the_next_entry(folder: Path) -> None:
    """Also where the entry and its lock were removed meanwhile."""
    write(folder)
    with hold_entry(folder, lambda: False) as is_first:
        assert is_first

        def remove_lock() -> bool:
            folder.with_name(f"{folder.name}.lock").unlink()
            return True

        with hold_entry(folder, remove_lock) as is_second:
            assert is_second


def test_everything_is_listed_and_removed(folder: Path) -> None:
    assert list_stored(folder.parent) == []
    write(folder)
    quarantine_entry(folder, "wrong", read=find_entry(folder))
    write(folder)
    leftover = folder.with_name(f".{NAME}.77777777-0123abcd.tmp")
    leftover.mkdir()
    (leftover / "scores.json").write_text("[1.")
    stored = list_stored(folder.parent)
    assert [one.path.name.split("-")[0] for one in stored] == [f".{NAME}.77777777", NAME, NAME]
    assert {one.path.name: one.num_bytes for one in stored}[leftover.name] == 3
    with hold_entry(folder, lambda: False):
        pass
    assert all(remove_stored(one) for one in stored)
    assert list_stored(folder.parent) == []
    assert [path.name for path in folder.parent.iterdir()] == [".quarantine"]


def test_what_is_no_entry_is_neither_listed_nor_removed(folder: Path, tmp_path: Path) -> None:
    """A thesis in the scratch folder that `.rows` is a link to, an entry that is a link."""
    write(folder)
    thesis = folder.parent / "thesis"
    thesis.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.with_name("f" * 64).symlink_to(elsewhere)
    linked = tmp_path / ".rows"
    linked.symlink_to(folder.parent)
    [stored] = list_stored(linked)
    assert stored.path == linked / NAME and remove_stored(stored)
    assert thesis.exists() and elsewhere.exists() and not folder.exists()
