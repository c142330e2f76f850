"""What is computed once under an output root and read by many runs: folders of files that are there
whole or not at all.

An entry is a folder whose name is the hash of all that its content depends on. It is written beside
its place under a lock, then renamed; its manifest holds the checksum of each file and who wrote it.
Readers take no lock. What is damaged, or is found to be wrong, is moved to `.quarantine/` and never
read again; what is missing is computed again, so removing any of it costs time only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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
_LOOK_SECONDS: Final = 0.2  # between two looks at a lock that another process holds


@dataclass(frozen=True)
class Entry:
    """One folder whose files are those that its manifest names. `producer` is who wrote it."""

    folder: Path
    producer: Mapping[str, Any]


def find_entry(folder: Path) -> Entry | None:
    """The entry of this name, each file compared with its checksum; None where there is none.

    Raises:
        CorruptFileError: a file is missing or is not what was written.
    """
    manifest = load_json(_manifest_path(folder))
    if manifest is None:
        return None
    try:
        files = {str(name): str(sha256) for name, sha256 in manifest["files"].items()}
        producer = dict(manifest["producer"])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise CorruptFileError(f"{_manifest_path(folder)} is no manifest") from None
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file() or hash_file(path) != sha256:
            raise CorruptFileError(f"{path} is not what was written")
    return Entry(folder, producer)


@contextmanager
def hold_entry(folder: Path, go_on: Callable[[], bool]) -> Iterator[bool]:
    """The lock under which one process computes and writes this entry: True once it is ours. While
    another one holds it, `go_on` is called five times a second; False as soon as it says no.

    The lock is the file system's: it is free the moment its holder dies, in whatever way.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
    """
    lock = Lease(_lock_path(folder))
    try:
        while not (is_ours := lock.try_acquire()) and go_on():
            time.sleep(_LOOK_SECONDS)
            if not _is_same_file(lock, folder):  # its entry was removed, and the lock with it
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
    """The entry with the files that `write` puts into the folder that it is given; only for the
    holder of its lock. `parts` are what the name of the entry is the hash of.

    Raises:
        OSError: it cannot be written, such as on a full disk; nothing of it is left.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a writer that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
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
        if folder.exists():  # without a manifest: nobody reads it
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(folder.parent)
    return Entry(folder, described["producer"])


def quarantine_entry(
    folder: Path, why: str, *, found_by: Mapping[str, Any] | None = None
) -> Path | None:
    """Move an entry aside so that nobody reads it again, with the reason in `why.json` and who
    found it; returns where it is, None where another process was faster.
    """
    parent = folder.parent / _QUARANTINE
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"{folder.name}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        folder.rename(target)
    except FileNotFoundError:
        return None
    write_json_atomic(
        target / "why.json", {"why": why, "found_by": found_by, "moved_at_utc": now_utc()}
    )
    return target


@dataclass(frozen=True)
class Quarantined:
    """An entry that was moved aside: why, who had written it, and who found it wrong; empty where
    nobody can tell.
    """

    path: Path
    why: str
    producer: Mapping[str, Any]
    found_by: Mapping[str, Any]


def list_quarantined(root: Path) -> list[Quarantined]:
    """The entries below `root` that were moved aside, sorted by path; what cannot be read of them
    is left out.
    """
    found = []
    for path in sorted(root.glob(f"{_QUARANTINE}/*")):
        reason, manifest = _load_mapping(path / "why.json"), _load_mapping(_manifest_path(path))
        producer, found_by = (
            dict(value) if isinstance(value, Mapping) else {}
            for value in (manifest.get("producer"), reason.get("found_by"))
        )
        found.append(Quarantined(path, str(reason.get("why", "")), producer, found_by))
    return found


def _load_mapping(path: Path) -> Mapping[str, Any]:
    try:
        content = load_json(path)
    except (CorruptFileError, OSError):
        return {}
    return content if isinstance(content, Mapping) else {}


@dataclass(frozen=True)
class StoredFolder:
    """A folder below one of entries, and its bytes: an entry, one in quarantine, or what a killed
    writer left.
    """

    path: Path
    num_bytes: int


def list_stored(root: Path) -> list[StoredFolder]:
    """Everything that entries take up below `root`, which need not exist."""
    folders = [path for path in root.glob("*") if path.is_dir() and path.name != _QUARANTINE]
    folders += [path for path in root.glob(f"{_QUARANTINE}/*") if path.is_dir()]
    return [StoredFolder(path, _count_bytes(path)) for path in sorted(folders)]


def remove_stored(one: StoredFolder) -> bool:
    """Remove it; False where a process is writing this entry now."""
    if one.path.parent.name == _QUARANTINE:
        shutil.rmtree(one.path, ignore_errors=True)
        return True
    name = one.path.name
    if name.startswith("."):  # `.NAME.PID-RANDOM.tmp`
        name = name[1:].rpartition(".tmp")[0].rpartition(".")[0]
    folder = one.path.with_name(name)
    with hold_entry(folder, lambda: False) as is_ours:
        if is_ours:
            shutil.rmtree(one.path, ignore_errors=True)
            _lock_path(folder).unlink(missing_ok=True)
        return is_ours


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
    """Say beside the place of an entry that there can be none, so that nobody waits for it; only
    for the holder of its lock.

    Raises:
        OSError: it cannot be written.
    """
    write_json_atomic(_not_shared_path(folder), {"why": why, "written_at_utc": now_utc()})


def find_not_shared(folder: Path) -> str | None:
    """The reason for which there can be no such entry; None where nobody has said so."""
    why = _load_mapping(_not_shared_path(folder)).get("why")
    return why if isinstance(why, str) else None


def _not_shared_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.not-shared")
