"""Entries: results that one run computes under an output root and many runs read. An entry is a
folder that is there completely or not at all.

The folder's name is the hash of everything that its content depends on. A writer holds a lock,
writes next to the final place, then renames; the manifest holds the checksum of each file and names
the writer. Readers take no lock. Damaged or wrong entries are moved to `.quarantine/` and never
read again; missing ones are computed again, so removing any of them only costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError
from runner.files import fsync_dir, hash_file, load_json, write_json_atomic
from runner.run.lease import Lease
from runner.run.record import now_utc

_QUARANTINE: Final = ".quarantine"
# `.NAME.HOST-RANDOM.tmp`: being written, or left by a killed writer.
_HOST: Final = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY: Final = re.compile(r"\.(?P<name>[0-9a-f]{64})\.[0-9a-f]{8}-[0-9a-f]{8}\.tmp")
_NAME: Final = re.compile(r"[0-9a-f]{64}")
_ASIDE: Final = re.compile(r"[0-9a-f]{64}-[0-9]+-[0-9a-f]{8}")
# If locks do not work between machines, a writer on another machine may still be active.
_LEFTOVER_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.2  # between two checks of a lock that another process holds


@dataclass(frozen=True)
class Entry:
    """One folder that holds the files named by its manifest. `producer` is the writer and the time;
    no two written entries have the same.
    """

    folder: Path
    producer: Mapping[str, Any]


def find_entry(folder: Path) -> Entry | None:
    """The entry of this name, with each file compared with its checksum; None if there is none.

    Raises:
        CorruptFileError: a file is missing or is not as it was written.
    """
    manifest = load_json(_manifest_path(folder))
    if manifest is None:
        return None
    try:
        files = {str(name): str(sha256) for name, sha256 in manifest["files"].items()}
        producer = dict(manifest["producer"])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise CorruptFileError(f"{_manifest_path(folder)} is not a manifest") from None
    if not files or any(name != Path(name).name for name in files):
        raise CorruptFileError(f"{_manifest_path(folder)} lists no files of this folder")
    for name, sha256 in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or hash_file(path) != sha256:
            raise CorruptFileError(f"{path} is not as it was written")
    return Entry(folder, producer)


@contextmanager
def hold_entry(folder: Path, keep_waiting: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock under which one process computes and writes this entry; True once it is ours.
    While another process holds it, `keep_waiting` is called five times a second; False
    as soon as that returns False.

    The lock belongs to the file system, so it is free as soon as its holder dies, however that
    happens.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
    """
    lock = Lease(_lock_path(folder))
    try:
        while not (is_ours := lock.try_acquire()) and keep_waiting():
            time.sleep(_LOOK_SECONDS)
            if not _is_same_file(lock, folder):  # the entry was removed together with its lock
                lock.close()
                lock = Lease(_lock_path(folder))
        yield is_ours
    finally:
        lock.close()


def write_entry(
    folder: Path,
    write: Callable[[Path], None],
    *,
    parts: Mapping[str, Any],
    producer: Mapping[str, Any],
) -> Entry:
    """Write and return the entry with the files that `write` puts into its folder; only for the
    holder of the lock. The entry's name is the hash of `parts`.

    Raises:
        OSError: it cannot be written, such as on a full disk; nothing of it is left.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a writer that was killed
        is_ours = leftover.name.startswith(f".{folder.name}.{_HOST}-")
        if is_ours or time.time() - _find_newest(leftover) > _LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = _name_temporary(folder)
    try:
        temporary.mkdir()
        write(temporary)
        written = sorted(path for path in temporary.iterdir())
        for path in written:
            _sync(path)
        described = {
            "files": {path.name: hash_file(path) for path in written},
            "parts": dict(parts),
            "producer": {**producer, "written_at_utc": now_utc()},
        }
        write_json_atomic(_manifest_path(temporary), described)
        # A writer on another machine was faster, where locks do not work between machines; other
        # processes may have mapped its files.
        if folder.exists() and (theirs := _find_whole(folder)) is not None:
            shutil.rmtree(temporary)
            return theirs
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(folder.parent)
    return Entry(folder, described["producer"])


def _find_whole(folder: Path) -> Entry | None:
    try:
        return find_entry(folder)
    except CorruptFileError:
        return None


def quarantine_entry(
    folder: Path,
    why: str,
    *,
    read: Entry | None = None,
    found_by: Mapping[str, Any] | None = None,
) -> Path | None:
    """Move an entry aside so that it is not read again, and record the reason and the finder in
    `why.json`. Returns its new path. `read` is the entry found to be wrong, or None if the files
    are damaged. If another entry has been written in its place since, that one stays and None is
    returned.
    """
    there = _find_whole(folder)
    if there is not None and (read is None or there.producer != read.producer):
        return None
    parent = folder.parent / _QUARANTINE
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"{folder.name}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        folder.rename(target)
    except FileNotFoundError:  # another process was faster
        return None
    facts = {"why": why, "is_damaged": read is None, "found_by": found_by}
    write_json_atomic(target / "why.json", {**facts, "moved_at_utc": now_utc()})
    return target


@dataclass(frozen=True)
class Quarantined:
    """An entry that was moved aside: the reason, its writer, and the run that found the problem,
    each empty if unknown. `is_damaged`: its files were not as they were written.
    """

    path: Path
    why: str
    is_damaged: bool
    producer: Mapping[str, Any]
    found_by: Mapping[str, Any]


def list_quarantined(root: Path) -> list[Quarantined]:
    """The entries below `root` that were moved aside, sorted by path; unreadable parts are left
    out.
    """
    found = []
    for path in sorted(root.glob(f"{_QUARANTINE}/*")):
        reason, manifest = _load_mapping(path / "why.json"), _load_mapping(_manifest_path(path))
        producer, found_by = (
            dict(value) if isinstance(value, Mapping) else {}
            for value in (manifest.get("producer"), reason.get("found_by"))
        )
        why, is_damaged = str(reason.get("why", "")), reason.get("is_damaged") is True
        found.append(Quarantined(path, why, is_damaged, producer, found_by))
    return found


def _load_mapping(path: Path) -> Mapping[str, Any]:
    try:
        content = load_json(path)
    except (CorruptFileError, OSError):
        return {}
    return content if isinstance(content, Mapping) else {}


@dataclass(frozen=True)
class StoredFolder:
    """A folder below a root of entries, and its size: an entry, a quarantined one, or the leftover
    of a killed writer.
    """

    path: Path
    num_bytes: int


def list_stored(root: Path) -> list[StoredFolder]:
    """Everything that entries occupy below `root`, which need not exist. Folders with other names,
    and anything behind a link, are left out.
    """
    known = ((root, _NAME), (root, _TEMPORARY), (root / _QUARANTINE, _ASIDE))
    folders = [
        path
        for folder, name in known
        for path in folder.glob("*")
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return [StoredFolder(path, _count_bytes(path)) for path in sorted(folders)]


def remove_stored(one: StoredFolder) -> bool:
    """Remove it; False if it stays, because a process is writing this entry now or because removal
    is not permitted.
    """
    path = one.path
    if path.parent.name == _QUARANTINE:
        return _remove(path)
    temporary = _TEMPORARY.fullmatch(path.name)
    folder = path.with_name(temporary["name"]) if temporary else path
    with hold_entry(folder, lambda: False) as is_ours:
        if not is_ours:
            return False
        if not temporary:  # for all readers at the same instant: none sees half of it
            with contextlib.suppress(OSError):
                path = path.rename(_name_temporary(folder))
        is_removed = _remove(path)
        if is_removed and not folder.exists():
            _lock_path(folder).unlink(missing_ok=True)
        return is_removed


def _remove(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _name_temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{_HOST}-{os.urandom(4).hex()}.tmp")


def _find_newest(folder: Path) -> float:
    """The newest modification time of a folder and the files in it."""
    newest = 0.0
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, path.stat().st_mtime)
    return newest


def _count_bytes(folder: Path) -> int:
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            num_bytes += path.lstat().st_size
    return num_bytes


def _is_same_file(lock: Lease, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), _lock_path(folder).stat())
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_path(folder: Path) -> Path:
    return folder / "manifest.json"


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def note_not_shared(folder: Path, why: str) -> None:
    """Record next to an entry's place that the entry cannot exist, so that no process waits for it;
    only for the holder of its lock.

    Raises:
        OSError: it cannot be written.
    """
    write_json_atomic(_not_shared_path(folder), {"why": why, "written_at_utc": now_utc()})


def find_not_shared(folder: Path) -> str | None:
    """The reason why this entry cannot exist; None if none was recorded."""
    why = _load_mapping(_not_shared_path(folder)).get("why")
    return why if isinstance(why, str) else None


def list_notes(root: Path) -> list[Path]:
    """The files below `root` which record that an entry cannot exist."""
    return sorted(path for path in root.glob("*.not-shared") if _NAME.fullmatch(path.stem))


def remove_free_locks(root: Path) -> None:
    """Remove the locks of entries that do not exist and that no process is about to write."""
    for path in root.glob("*.lock"):
        folder = path.with_suffix("")
        if _NAME.fullmatch(folder.name) and not folder.exists():
            with hold_entry(folder, lambda: False) as is_ours:
                if is_ours:
                    path.unlink(missing_ok=True)


def _not_shared_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.not-shared")
