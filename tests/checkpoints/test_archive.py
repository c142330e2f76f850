"""One checkpoint, one ZIP: the same bytes each time, and no file that somebody made can lead
outside.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.checkpoints.archive import (
    ArchiveError,
    extract_archive,
    load_archived_marker,
    verify_archive,
    write_archive,
)
from runner.checkpoints.marker import is_intact, list_files, load_marker
from runner.files import hash_json
from runner.run.paths import RunPaths, marker_path
from tests.support.fake_checkpoints import commit, flip_bit, listing, make_paths

Entry = tuple[zipfile.ZipInfo, bytes]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = make_paths(tmp_path)
    commit(run, 4)
    write_archive(run.checkpoint_dir(4), run.archive_path(4))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in list_files(folder)}


def test_what_is_packed_comes_out_again(paths: RunPaths, tmp_path: Path) -> None:
    marker = extract_archive(paths.archive_path(4), tmp_path / "out")
    assert marker == load_marker(paths.checkpoint_dir(4)) == verify_archive(paths.archive_path(4))
    assert contents(tmp_path / "out") == contents(paths.checkpoint_dir(4)) and is_intact(
        tmp_path / "out"
    )
    assert listing(paths.checkpoints_dir) == ["step-4", "step-4.zip"], "no temporary file is left"


def test_equal_checkpoints_are_equal_archives(paths: RunPaths, tmp_path: Path) -> None:
    other = make_paths(tmp_path / "other")
    commit(other, 4)
    write_archive(other.checkpoint_dir(4), tmp_path / "other.zip")
    assert (tmp_path / "other.zip").read_bytes() == paths.archive_path(4).read_bytes()


def test_any_unzip_program_makes_a_checkpoint_of_it(paths: RunPaths, tmp_path: Path) -> None:
    with zipfile.ZipFile(paths.archive_path(4)) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "by-hand")
    assert is_intact(tmp_path / "by-hand" / "step-4")


def test_a_damaged_folder_is_never_archived(paths: RunPaths) -> None:
    before = paths.archive_path(4).read_bytes()
    flip_bit(paths.checkpoint_dir(4) / "model.safetensors")
    with pytest.raises(OSError, match="damaged after it was committed"):
        write_archive(paths.checkpoint_dir(4), paths.archive_path(4))
    assert paths.archive_path(4).read_bytes() == before and listing(paths.checkpoints_dir) == [
        "step-4",
        "step-4.zip",
    ]


def read_entries(archive_path: Path) -> list[Entry]:
    with zipfile.ZipFile(archive_path) as archive:
        return [(entry, archive.read(entry)) for entry in archive.infolist()]


def write_entries(archive_path: Path, entries: list[Entry]) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(archive_path, "w") as archive:
        warnings.simplefilter("ignore")  # of a duplicate name
        for info, content in entries:
            archive.writestr(info, content)


def add(name: str, content: bytes = b"hostile") -> Callable[[list[Entry]], list[Entry]]:
    return lambda entries: [*entries, (zipfile.ZipInfo(name), content)]


def rename_first_file(name: str) -> Callable[[list[Entry]], list[Entry]]:
    """As `add`, with a marker that agrees: its checksum is right, because the author of an archive
    can make one.
    """

    def change(entries: list[Entry]) -> list[Entry]:
        marker = json.loads(entries[0][1])
        del marker["marker_sha256"]
        first = entries[1][0].filename.removeprefix("step-4/")
        marker["files"][name] = marker["files"].pop(first)
        marker["marker_sha256"] = hash_json(marker)
        renamed = (zipfile.ZipInfo(f"step-4/{name}"), entries[1][1])
        return [(entries[0][0], json.dumps(marker).encode()), renamed, *entries[2:]]

    return change


def make_link(entries: list[Entry]) -> list[Entry]:
    entries[1][0].external_attr = (stat.S_IFLNK | 0o777) << 16
    return entries


def compress(entries: list[Entry]) -> list[Entry]:
    entries[1][0].compress_type = zipfile.ZIP_DEFLATED
    return entries


def repeat(entries: list[Entry]) -> list[Entry]:
    return [*entries, entries[1]]


def grow(entries: list[Entry]) -> list[Entry]:
    return [*entries[:1], (entries[1][0], entries[1][1] + b"more"), *entries[2:]]


def swap_contents(entries: list[Entry]) -> list[Entry]:
    return [*entries[:1], (entries[1][0], bytes(len(entries[1][1]))), *entries[2:]]


@pytest.mark.parametrize(
    "change",
    [
        add("../outside"),
        add("/outside"),
        add("step-4/../../outside"),
        add("step-4\\..\\outside"),
        add("step-4/more"),
        add("step-4/folder/"),
        add("step-5/COMMITTED.json", b"{}"),
        rename_first_file("../../outside"),
        rename_first_file("/outside"),
        rename_first_file("a\\b"),
        rename_first_file("COMMITTED.json"),
        rename_first_file("model.safetensors/below-a-file"),
        rename_first_file("a\nb"),
        rename_first_file("x" * 300),
        make_link,
        compress,
        repeat,
        grow,
        swap_contents,
        lambda entries: entries[1:],
        lambda entries: entries[:-1],
        lambda entries: [],
        lambda entries: [(entries[0][0], b"[" * 100_000), *entries[1:]],
        lambda entries: [(entries[0][0], b'{"step": NaN}'), *entries[1:]],
    ],
)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    paths: RunPaths, tmp_path: Path, change: Callable[[list[Entry]], list[Entry]]
) -> None:
    hostile = tmp_path / "in" / "hostile.zip"
    hostile.parent.mkdir()
    write_entries(hostile, change(read_entries(paths.archive_path(4))))
    before = listing(tmp_path)
    with pytest.raises(ArchiveError):
        extract_archive(hostile, tmp_path / "in" / "out")
    assert listing(tmp_path / "in") == ["hostile.zip"] and listing(tmp_path) == before


def nest(num_entries: int) -> tuple[list[zipfile.ZipInfo], list[bytes]]:
    """Entries of which each holds the next one, header and all, so that they share their bytes; the
    outermost first.
    """
    infos: list[zipfile.ZipInfo] = []
    contents = [b"x" * 1000]
    for number in range(num_entries):
        stream, info = io.BytesIO(), zipfile.ZipInfo(f"step-4/{number:04d}")
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(info, contents[0])
            infos.insert(0, info)
            contents.insert(0, stream.getvalue()[: archive.start_dir])
    return infos, contents


def test_entries_that_share_their_bytes_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """Everything agrees, checksums included, but the stated total grows with the square of the
    file.
    """
    infos, contents = nest(200)
    files = {
        info.filename.removeprefix("step-4/"): {
            "num_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for info, content in zip(infos, contents[1:], strict=True)
    }
    marker = {"step": 4, "fingerprint": {}, "files": files, "stripped_files": []}
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr(
            "step-4/COMMITTED.json", json.dumps(marker | {"marker_sha256": hash_json(marker)})
        )
        start = archive.fp.tell()
        archive.fp.write(contents[0])
        archive.start_dir = archive.fp.tell()
        for depth, info in enumerate(infos):
            info.header_offset = start + depth * (30 + len(info.filename))
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    assert sum(len(content) for content in contents[1:]) > 10 * bomb.stat().st_size
    with pytest.raises(ArchiveError, match="more bytes than it holds"):
        extract_archive(bomb, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    run = make_paths(tmp_path_factory.mktemp("pristine"))
    commit(run, 1)
    write_archive(run.checkpoint_dir(1), run.archive_path(1))
    return run


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_bytes_it_is_refused_in_words_or_holds_what_it_states(
    tmp_path_factory: pytest.TempPathFactory, pristine: RunPaths, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    content = bytearray(pristine.archive_path(1).read_bytes())
    anywhere, directory = (
        st.integers(0, len(content) - 1),
        st.integers(len(content) - 600, len(content) - 1),
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(anywhere | directory)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    fuzzed = root / "fuzzed.zip"
    fuzzed.write_bytes(content)
    try:
        extract_archive(fuzzed, root / "out")
    except ArchiveError:
        assert not (root / "out").exists()
    else:
        assert contents(root / "out") == contents(pristine.checkpoint_dir(1))
    assert set(listing(root)) <= {"fuzzed.zip", "out"}


def test_an_entry_that_begins_before_the_file_is_refused_in_words(
    pristine: RunPaths, tmp_path: Path
) -> None:
    content = bytearray(pristine.archive_path(1).read_bytes())
    content[-6] += 1  # where the directory begins, so all entries seem to begin one byte earlier
    (tmp_path / "shifted.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match="not a readable ZIP archive"):
        extract_archive(tmp_path / "shifted.zip", tmp_path / "out")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.mktemp("noise")
    (root / "noise.zip").write_bytes(content)
    with pytest.raises(ArchiveError):
        load_archived_marker(root / "noise.zip")


def test_the_marker_is_the_first_entry(paths: RunPaths) -> None:
    with zipfile.ZipFile(paths.archive_path(4)) as archive:
        assert archive.namelist()[0] == f"step-4/{marker_path(Path()).name}"
