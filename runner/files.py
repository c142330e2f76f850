"""Writes files so that a kill at any instant leaves the old or the new content, and reads them
safely: a folder, a pipe or an endless file in their place is an error with a clear message.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from runner.errors import CorruptFileError
from runner.text import format_bytes

# For one record, such as `run.json`: an attempt takes 2 KiB, or 6 with the end of its log.
MAX_RECORD_BYTES: Final = 32 << 20
# For files that grow with the data: rows, scores, the names of all tensors of a model.
MAX_ROWS_BYTES: Final = 2 << 30


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a plain file; does not wait for a pipe.

    Raises:
        FileNotFoundError: nothing has this name.
        CorruptFileError: something other than a file has it.
        OSError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        refuse_other_kind(path, error)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse_other_kind(path)
    return descriptor


def refuse_other_kind(path: Path, error: OSError | None = None, *, wanted: str = "file") -> None:
    """Refuse a path at which something other than a plain file exists, or other than a folder if
    that is `wanted`. Does nothing if `error` has another cause.

    Raises:
        CorruptFileError: something else is there, or a part of the path above is not a folder.
    """
    if error is not None and error.errno not in _OF_OTHER_KINDS:
        return
    place = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
    kind, expected = _find_kind(place), wanted if place == path else "folder"
    if kind is not None and kind != expected:
        raise CorruptFileError(
            f"{place} is {_KINDS.get(kind, kind)}, and should be a {expected}",
            hint=f"check what it is and move it away: mv {shlex.quote(str(place))}"
            f" {shlex.quote(f'{place}.aside')}",
        )


_KINDS: Final = {"file": "a file", "folder": "a folder"}
_OF_OTHER_KINDS: Final = (
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENXIO,
)


def _find_kind(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            return None
        circle = "a link that leads in a circle"
        return circle if error.errno == errno.ELOOP else "a link that leads nowhere"
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket or a device"


def open_to_append(path: Path) -> BinaryIO:
    """An unbuffered file opened for appending, created if it does not exist.

    Raises:
        CorruptFileError: something other than a file has its name.
        OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(open_plain(path, flags), "ab", buffering=0)


def is_plain(path: Path) -> bool:
    """True for a file, False if nothing has this name.

    Raises:
        CorruptFileError: something else has it.
        OSError: it cannot be checked.
    """
    try:
        state = path.stat()
    except OSError as error:
        refuse_other_kind(path, error)
        if isinstance(error, FileNotFoundError):
            return False
        raise
    if not stat.S_ISREG(state.st_mode):
        refuse_other_kind(path)
    return True


def remove_file(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        CorruptFileError: it is a folder.
        OSError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        refuse_other_kind(path, error)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and its parents if they do not exist.

    Raises:
        CorruptFileError: something else has one of these names.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse_other_kind(folder, error, wanted="folder")
        raise


def list_folder(folder: Path) -> list[str]:
    """The sorted names in a folder; empty if it does not exist.

    Raises:
        CorruptFileError: something else has its name.
        OSError: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        refuse_other_kind(folder, error, wanted="folder")
        if isinstance(error, FileNotFoundError):
            return []
        raise


def read_plain(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> bytes | None:
    """The bytes of a file, or None if it does not exist.

    Raises:
        CorruptFileError: something else has its name, or it is longer than `max_bytes`.
        OSError: it cannot be read.
    """
    try:
        descriptor = open_plain(path)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(descriptor).st_size
        # Memory is allocated after this check; a file that grows in between is not read to its end
        content = stream.read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(content) > max_bytes:
        raise CorruptFileError(
            f"{path} has {format_bytes(max(size, len(content)))} and was not read:"
            f" the limit for this file is {format_bytes(max_bytes)}"
        )
    return content


# Size, mtime and ctime in nanoseconds, inode.
FileState = tuple[int, int, int, int]


def write_text_atomic(path: Path, text: str) -> None:
    """Replace the content of `path`: temporary file in the same folder, fsync, rename, fsync of the
    folder.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Like `write_text_atomic`, for bytes."""
    make_folder(path.parent)
    temporary = _name_temporary(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        _put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        refuse_other_kind(path, error)
        raise


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


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` at least the mode that a new file gets there.

    safetensors writes through a temporary file of mode 0600 and keeps that mode whatever the umask.
    This only adds mode bits. It leaves folders alone, because `chmod` may clear their setgid bit.
    The mode comes from a probe file: reading the umask means setting it for all threads, and a
    folder's default ACL would override it.
    """
    probe = _name_temporary(folder / "mode")
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    try:
        wanted = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for path in folder.rglob("*"):
        state = path.lstat()
        mode = stat.S_IMODE(state.st_mode)
        if stat.S_ISREG(state.st_mode) and mode | wanted != mode:
            path.chmod(mode | wanted)


def write_json_unsynced(path: Path, value: Any) -> None:
    """Like `write_json_atomic`, but the file may be lost after a power loss. For values that are
    only displayed, many times a second.
    """
    temporary = _name_temporary(path)
    temporary.write_text(dump_json(value))
    temporary.replace(path)


def _name_temporary(path: Path) -> Path:
    """A unique name next to a file; a process id is not enough where containers share a disk."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def dump_json(value: Any) -> str:
    """JSON in the layout of files for people: sorted keys, two spaces; refuses NaN."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_atomic(path: Path, value: Any) -> None:
    """Like `write_text_atomic`, for a value as JSON."""
    write_text_atomic(path, dump_json(value))


def load_json(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """The content of a JSON file, or None if it does not exist.

    Raises:
        CorruptFileError: it is not JSON, is longer than `max_bytes`, or is not a file.
    """
    content = read_plain(path, max_bytes)
    return None if content is None else parse_json(content, path)


def parse_json(content: bytes, path: Path) -> Any:
    """The value of a JSON text.

    Raises:
        CorruptFileError: it is not JSON; `path` names its file.
    """
    if not content.strip(b" \t\r\n"):
        raise CorruptFileError(f"{path} is not JSON: it is empty")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not JSON: {_explain(error, content)}") from None


def _explain(error: ValueError | RecursionError, content: bytes) -> str:
    """The reason why a text is not JSON, as the end of a sentence."""
    if (place := content.find(b"\0")) >= 0:
        return f"it holds NUL bytes from byte {place + 1:,} on, as a power loss may leave them"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text from byte {error.start + 1:,} on"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # Python's limit of digits
        return f"a number in it has more than {sys.get_int_max_str_digits():,} digits"
    return str(error)


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row in one write, so that a reader sees whole lines, except perhaps the last one
    after a kill.

    A line that a full disk cuts off is removed, or the next row would continue it.
    """
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with open_to_append(path) as stream:
        start = stream.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += stream.write(line[written:])
        except OSError:
            stream.truncate(start)
            raise


def load_jsonl(path: Path, *, holding: bytes = b"") -> list[dict[str, Any]]:
    """Every whole row of a JSONL file; a torn last line (no newline, because the writer was killed)
    is left out. Rows whose text does not contain `holding` are skipped without parsing.

    Raises:
        CorruptFileError: another line is not a JSON object, or it is not a file, or too long.
    """
    content = read_plain(path, MAX_ROWS_BYTES)
    if content is None:
        return []
    whole, _, _ = content.rpartition(b"\n")
    # Not splitlines, because a text may contain other line separators.
    lines = [
        (number, line)
        for number, line in enumerate(whole.split(b"\n"), 1)
        if line and (holding in line or not line.startswith(b"{"))
    ]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{path}: line {number:,} is not JSON: {_explain(error, line)}"
            raise CorruptFileError(what) from None
        if not isinstance(row, dict):
            raise CorruptFileError(f"{path}: line {number:,} is not a JSON object")
        rows.append(row)
    return rows


def write_jsonl_atomic(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file."""
    write_text_atomic(
        path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    )


def hash_file(path: Path, on_block: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; `on_block` is called after each block that was read."""
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
    """A hash of the Python files in a folder and in these packages of it (`*`: all), by name and
    content, because an edited checkout keeps its version number.
    """
    paths = [*root.glob("*.py")]
    for name in packages:
        paths += root.glob(f"{name}/**/*.py")
    return hash_json({str(path.relative_to(root)): hash_file(path) for path in sorted(paths)})


def look_at(path: Path | str) -> FileState | None:
    """Size, times and inode of a file, which show if it was changed; None if it does not exist.

    The ctime shows a change even if the mtime was reset.
    """
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
