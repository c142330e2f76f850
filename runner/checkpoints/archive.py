"""A checkpoint as one ZIP file: written completely or not at all, with the same bytes each time,
and read as untrusted input.

An archive holds one folder, `step-N/`, with the marker first and then every file that the marker
states. Nothing is compressed: weights do not shrink, and a stored archive cannot grow when it is
read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from runner.checkpoints.marker import Marker, load_marker, parse_marker, sync_folder
from runner.errors import CorruptFileError
from runner.files import fsync_dir
from runner.run.paths import STEP_PREFIX, marker_path

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest time that a ZIP can state
_CHUNK_BYTES: Final = 1 << 20
_MAX_MARKER_BYTES: Final = 16 << 20
TEMPORARY_GLOB: Final = f".{STEP_PREFIX}*.zip.tmp"


class ArchiveError(CorruptFileError):
    """A file that is not an archive of one intact checkpoint."""


def write_archive(checkpoint_dir: Path, archive_path: Path) -> None:
    """Pack a committed checkpoint. It appears under its name only after it was read back and
    verified.

    Raises:
        OSError: the written bytes do not match the marker, so the folder was damaged after its
            commit.
    """
    marker = load_marker(checkpoint_dir)
    top = f"{STEP_PREFIX}{marker.step}"
    # fixed: the next attempt overwrites a leftover
    temporary = archive_path.with_name(f".{archive_path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                for name in (marker_path(checkpoint_dir).name, *sorted(marker.files)):
                    _add_file(archive, checkpoint_dir / name, f"{top}/{name}")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            verify_archive(temporary)
        except ArchiveError as error:
            raise OSError(
                f"{checkpoint_dir} was damaged after it was committed: {error.message}"
            ) from None
        temporary.replace(archive_path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(archive_path.parent)


def verify_archive(archive_path: Path) -> Marker:
    """The marker of an archive, after every byte was read and compared with it.

    Raises:
        ArchiveError: see `read_archive`.
    """
    return read_archive(archive_path, None)


def extract_archive(archive_path: Path, target_dir: Path) -> Marker:
    """Unpack a checkpoint into `target_dir`, which must not exist. Nothing is left there unless all
    of it is intact.

    Raises:
        ArchiveError: see `read_archive`.
    """
    target_dir.mkdir(parents=True)
    try:
        marker = read_archive(archive_path, target_dir)
        sync_folder(target_dir)
    except BaseException:
        shutil.rmtree(target_dir, ignore_errors=True)
        raise
    return marker


def load_archived_marker(archive_path: Path) -> Marker:
    """The marker inside an archive, after its entries were compared with it; their bytes are not
    read.

    Raises:
        ArchiveError: see `read_archive`.
    """
    with _opened(archive_path) as archive:
        return _check_entries(archive, archive_path)


def read_archive(archive_path: Path, target_dir: Path | None) -> Marker:
    """Compare every byte of an archive with its marker, and write the files into `target_dir` if
    one is given.

    Raises:
        ArchiveError: it is not a ZIP file; it holds a duplicate name, a name that leads outside, a
            link, or a compressed or encrypted entry; it states more bytes than it holds; or its
            files are not exactly those that its marker states.
    """
    with _opened(archive_path) as archive:
        marker = _check_entries(archive, archive_path)
        top = f"{STEP_PREFIX}{marker.step}"
        for name, stated in marker.files.items():
            with archive.open(f"{top}/{name}") as source:
                digest = _copy(
                    source, None if target_dir is None else target_dir / name, stated.num_bytes
                )
            if digest != stated.sha256:
                raise ArchiveError(f"{archive_path}: {name} does not match the marker")
        if target_dir is not None:
            name = marker_path(target_dir).name
            with archive.open(f"{top}/{name}") as source:
                _copy(source, target_dir / name, _MAX_MARKER_BYTES)
        return marker


# Errors other than its own `BadZipFile` that `zipfile` raises on files made to break it.
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    UnicodeError,
    AssertionError,
)
# An offset before the start of the file; a name that is a file and a folder.
_ZIP_ERRNOS: Final = (errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def _opened(archive_path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; errors that a hostile one causes in `zipfile` are raised as `ArchiveError`."""
    try:
        with zipfile.ZipFile(archive_path) as archive:
            yield archive
    except (*_ZIP_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _ZIP_ERRNOS:
            raise  # the disk's, not the archive's
        raise ArchiveError(f"{archive_path} is not a readable ZIP archive: {error}") from None


def _add_file(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # Unix, whatever wrote it
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = path.stat().st_size  # from 2 GiB on, the entry is written with 64-bit sizes
    with path.open("rb") as source, archive.open(info, "w") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _check_entries(archive: zipfile.ZipFile, archive_path: Path) -> Marker:
    """The marker, after every entry was compared with it by name, kind and size."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise ArchiveError(f"{archive_path} holds a name twice")
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir() or kind not in (0, stat.S_IFREG):
            raise ArchiveError(f"{archive_path}: {entry.filename!r} is not a plain file")
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.flag_bits & 1
            or entry.compress_size != entry.file_size
        ):
            raise ArchiveError(f"{archive_path}: {entry.filename!r} is compressed or encrypted")
    if sum(entry.file_size for entry in entries) > archive_path.stat().st_size:
        raise ArchiveError(f"{archive_path} states more bytes than it holds")
    suffix = f"/{marker_path(Path()).name}"
    found = [
        entry
        for entry in entries
        if entry.filename.endswith(suffix) and entry.filename.count("/") == 1
    ]
    if len(found) != 1 or found[0].file_size > _MAX_MARKER_BYTES:
        raise ArchiveError(f"{archive_path} does not hold one checkpoint with its marker")
    try:
        marker = parse_marker(
            json.loads(archive.read(found[0])), f"{archive_path}: {found[0].filename}"
        )
    except (ValueError, RecursionError) as error:
        raise ArchiveError(str(error)) from None
    top = f"{STEP_PREFIX}{marker.step}"
    stated = {f"{top}/{name}": entry.num_bytes for name, entry in marker.files.items()}
    stated[f"{top}{suffix}"] = found[0].file_size
    if stated != {entry.filename: entry.file_size for entry in entries}:
        raise ArchiveError(f"{archive_path} does not hold exactly the files that its marker states")
    return marker


def _copy(source: IO[bytes], target_path: Path | None, max_bytes: int) -> str:
    """SHA-256 of the copied bytes, at most `max_bytes` plus one."""
    digest, num_left = hashlib.sha256(), max_bytes + 1
    if target_path is not None:
        target_path.parent.mkdir(parents=True, exist_ok=True)
    with open(
        os.devnull if target_path is None else target_path, "wb" if target_path is None else "xb"
    ) as target:
        while num_left > 0 and (chunk := source.read(min(_CHUNK_BYTES, num_left))):
            digest.update(chunk)
            target.write(chunk)
            num_left -= len(chunk)
    return digest.hexdigest()
