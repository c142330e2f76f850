"""Writing files so that a kill at any instant leaves the old or the new content, and the lease on a
run directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.errors import CorruptFileError

# Size, mtime and ctime in nanoseconds, inode.
FileState = tuple[int, int, int, int]


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: temporary file in the same folder, fsync, rename, fsync of the
    folder.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """As `write_text_atomic`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _name_temporary(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def fsync_dir(folder: Path) -> None:
    """Make a rename or a new file inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems refuse to sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json_unsynced(path: Path, value: Any) -> None:
    """As `write_json_atomic` for a reader, but gone after a power loss: for what is only drawn,
    many times a second.
    """
    temporary = _name_temporary(path)
    temporary.write_text(dump_json(value))
    temporary.replace(path)


def _name_temporary(path: Path) -> Path:
    """A name of one's own beside a file: process ids are not enough where containers share a file
    system.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def dump_json(value: Any) -> str:
    """The one JSON layout of files that people read: sorted keys, two spaces, NaN refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of `dump_json`."""
    write_text_atomic(path, dump_json(value))


def load_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none.

    Raises:
        CorruptFileError: the file is not JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> Any:
    """What a JSON text says.

    Raises:
        CorruptFileError: it is not JSON; `path` is where it was read.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not JSON: {error}") from None


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row as one write, so that a reader sees whole lines except perhaps the last after
    a kill.

    What a full disk takes of a line is taken back, or the next row would go on in the middle of it.
    """
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as stream:
        start = stream.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += stream.write(line[written:])
        except OSError:
            stream.truncate(start)
            raise


def load_jsonl(path: Path, *, holding: bytes = b"") -> list[dict[str, Any]]:
    """Every whole row of a JSONL file; a torn last line (no newline: the writer was killed) is left
    out. Rows whose text does not hold some bytes are skipped, and not parsed.

    Raises:
        CorruptFileError: another line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole, _, _ = content.rpartition(b"\n")
    lines = whole.split(b"\n")  # not splitlines: a text may hold other line separators
    try:
        rows = [
            json.loads(line)
            for line in lines
            if line and (holding in line or not line.startswith(b"{"))
        ]
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} has a line that is not JSON: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise CorruptFileError(f"{path} has a line that is no JSON object")
    return rows


def write_jsonl_atomic(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file."""
    write_text_atomic(
        path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    )


def hash_file(path: Path, on_block: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; `on_block` is called with each block that was read."""
    digest, block = hashlib.sha256(), bytearray(2**20)
    with path.open("rb", buffering=0) as stream:
        while num_bytes := stream.readinto(block):
            digest.update(memoryview(block)[:num_bytes])
            if on_block is not None:
                on_block()
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order and layout."""
    canonical = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_sources(root: Path, packages: Sequence[str]) -> str:
    """Of the Python files in a folder and in these packages of it, `*` for all, by name and
    content: a checkout that is edited keeps its version.
    """
    paths = [*root.glob("*.py")]
    for name in packages:
        paths += root.glob(f"{name}/**/*.py")
    return hash_json({str(path.relative_to(root)): hash_file(path) for path in sorted(paths)})


def look_at(path: Path | str) -> FileState | None:
    """Size, times and inode of a file, which tell whether it was changed; None where there is none.

    Its ctime tells what was changed under an mtime that was put back.
    """
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
