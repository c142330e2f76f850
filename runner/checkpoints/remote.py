"""Archives of checkpoints in remote storage: list, fetch and delete them, and upload them in the
background.

Training never waits for an upload and never fails because of one. Archives to upload are in
`checkpoints/.uploads/` and leave that folder once they have arrived, so the next attempt sends
those that a killed attempt left there. In remote storage an archive counts only with its `.sha256`
next to it, which is written last. fsspec is imported when a location is opened, not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from runner.checkpoints.archive import TEMPORARY_GLOB, write_archive
from runner.checkpoints.marker import list_committed
from runner.errors import CorruptFileError, RefusedError, RunnerError
from runner.files import append_jsonl, hash_file, load_jsonl
from runner.recipe.launch_section import RemoteStorage
from runner.recipe.parse import Recipe
from runner.run.paths import STEP_PREFIX, AttemptPaths, RunPaths
from runner.run.record import now_utc
from runner.secrets import scrub_json
from runner.text import format_count

OWNER_NAME: Final = "run.json"
_SUM_SUFFIX: Final = ".sha256"
# Only file systems need folders; on an object store, this would create a bucket from a misspelled
# name.
_WITH_FOLDERS: Final = frozenset({"file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs", "ftp"})
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_MAX_PAUSE_SECONDS: Final = 60.0

Result = TypeVar("Result")


class RemoteFolder:
    """A folder of archives, `step-N.zip`, each with its checksum."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Raises: RefusedError if the protocol is unknown or its package is not installed."""
        self.url = url.rstrip("/")
        self._fs, self._root = _open_filesystem(self.url, options)

    def list_steps(self) -> list[int]:
        """Steps that have both archive and checksum, oldest first."""
        self._fs.invalidate_cache()
        try:
            names = {str(path).rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
        except FileNotFoundError:
            return []
        numbers = (name.removeprefix(STEP_PREFIX).removesuffix(".zip") for name in names)
        steps = (int(number) for number in numbers if number.isdecimal())
        return sorted(step for step in steps if {_name(step), _name(step) + _SUM_SUFFIX} <= names)

    def send(self, archive_path: Path, step: int) -> None:
        """Upload an archive unless it is already there; a reader sees all of it or nothing."""
        target, digest, num_bytes = (
            self._path(step),
            hash_file(archive_path),
            archive_path.stat().st_size,
        )
        if self._read(target + _SUM_SUFFIX).startswith(digest):
            return
        self._make_folder()
        self._delete(target + _SUM_SUFFIX)
        self._fs.put_file(str(archive_path), target)
        self._fs.invalidate_cache()
        if (found := self._fs.info(target)["size"]) != num_bytes:
            size = format_count(found, "byte")
            raise OSError(f"{target} has {size} after an upload of {num_bytes}")
        self._fs.pipe_file(target + _SUM_SUFFIX, f"{digest}  {_name(step)}\n".encode())

    def fetch(self, step: int, target_path: Path) -> None:
        """Download an archive.

        Raises:
            FileNotFoundError: it is not there, or its upload was never finished.
            CorruptFileError: the downloaded bytes do not match its checksum.
        """
        self._fs.invalidate_cache()
        stated = self._read(self._path(step) + _SUM_SUFFIX)
        if not stated:
            raise FileNotFoundError(
                f"{self.url}/{_name(step)} is not there, or its upload was never finished"
            )
        self._fs.get_file(self._path(step), str(target_path))
        if not stated.startswith(hash_file(target_path)):
            raise CorruptFileError(f"{self.url}/{_name(step)} does not match its checksum")

    def delete(self, step: int) -> None:
        """Remove an archive, its checksum first, so that a partial archive never counts."""
        self._delete(self._path(step) + _SUM_SUFFIX)
        self._delete(self._path(step))

    def require_owner(self, recipe_digest: str, *, claim: bool) -> None:
        """Check which experiment owns these archives; if none does, `claim` records this one.

        Raises:
            RefusedError: they belong to another experiment, and must be neither overwritten nor
                resumed.
        """
        path, content = (
            f"{self._root}/{OWNER_NAME}",
            json.dumps({"recipe_digest": recipe_digest}) + "\n",
        )
        self._fs.invalidate_cache()
        found = self._read(path)
        if not found and claim:
            self._make_folder()
            self._fs.pipe_file(path, content.encode())
        elif found and found != content:
            raise RefusedError(
                f"{self.url} holds the checkpoints of another experiment",
                hint=(
                    "give the run another name (`--name`), change `checkpoints.remote.url`, or move"
                    " those checkpoints away"
                ),
            )

    def _path(self, step: int) -> str:
        return f"{self._root}/{_name(step)}"

    def _make_folder(self) -> None:
        protocol = self._fs.protocol
        if _WITH_FOLDERS & ({protocol} if isinstance(protocol, str) else set(protocol)):
            self._fs.makedirs(self._root, exist_ok=True)

    def _read(self, path: str) -> str:
        try:
            return str(self._fs.cat_file(path).decode(errors="replace"))
        except FileNotFoundError:
            return ""

    def _delete(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return


def open_run_folder(recipe: Recipe) -> RemoteFolder | None:
    """The folder for a run's archives; None if the recipe names no remote storage. Nothing is sent
    or read yet.

    Raises:
        RefusedError: see `RemoteFolder`.
    """
    remote = recipe.checkpoints.remote
    if remote is None:
        return None
    return RemoteFolder(f"{remote.url.rstrip('/')}/{recipe.run.full_name}", _plain_options(remote))


def open_named_archive(url: str, recipe: Recipe) -> tuple[RemoteFolder, int]:
    """The folder and the step of an archive's URL, `.../step-N.zip`; uses the recipe's own options.

    Raises:
        RefusedError: the URL names no archive, or see `RemoteFolder`.
    """
    folder_url, _, name = url.rpartition("/")
    number = name.removeprefix(STEP_PREFIX).removesuffix(".zip")
    if not number.isdecimal() or name != _name(int(number)):
        raise RefusedError(
            f"{url} does not name a checkpoint archive",
            hint=f"--resume {folder_url}/step-100.zip",
        )
    remote = recipe.checkpoints.remote
    is_alike = remote is not None and remote.url.partition("://")[0] == url.partition("://")[0]
    options = _plain_options(remote) if remote is not None and is_alike else {}
    return RemoteFolder(folder_url, options), int(number)


def retry(
    function: Callable[[], Result], num_retries: int, stop: threading.Event
) -> tuple[Result, int]:
    """The result of `function` and the number of calls: one, plus up to `num_retries` more after
    errors.

    Pauses of 1, 2, 4, ... seconds, at most a minute, end when `stop` is set. Our own errors are not
    retried.
    """
    for number in range(num_retries + 1):
        try:
            return function(), number + 1
        except RunnerError:
            raise
        except Exception:  # each file system has its own errors
            if number == num_retries or stop.wait(min(2.0**number, _MAX_PAUSE_SECONDS)):
                raise
    raise AssertionError("unreachable")


def _name(step: int) -> str:
    return f"{STEP_PREFIX}{step}.zip"


def _plain_options(remote: RemoteStorage) -> dict[str, Any]:
    """The options as fsspec accepts them; the recipe's own are frozen at every depth."""
    options: dict[str, Any] = remote.model_dump(mode="json")["options"]
    return options


def _open_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    import fsspec.core

    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        raise RefusedError(
            f"remote storage at {protocol}:// needs a package that is not installed: {error}",
            hint=(
                f"pip install 'recipe-runner[{extra}]'"
                if extra
                else f"install the package that fsspec needs for {protocol}"
            ),
        ) from None
    except (ValueError, TypeError) as error:
        raise RefusedError(
            f"the remote storage {url} cannot be opened: {error}",
            hint=(
                "`checkpoints.remote.url` is an fsspec URL, such as s3://bucket/folder; `options`"
                " are those of its file system"
            ),
        ) from None
    return filesystem, root.rstrip("/")


PATIENCE_SECONDS: Final = 300.0  # that a completed run waits for pending uploads
_END: Final = -1


class Uploader:
    """A thread with a queue of steps; only the main process of a run has one."""

    def __init__(
        self,
        folder: RemoteFolder,
        remote: RemoteStorage,
        recipe_digest: str,
        paths: RunPaths,
        attempt: AttemptPaths,
    ) -> None:
        self.folder, self._remote, self._recipe_digest = folder, remote, recipe_digest
        self._paths, self._attempt = paths, attempt
        self._queue: queue.Queue[int] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def start(self) -> None:
        """Upload committed checkpoints that have not arrived, then every one offered."""
        for temporary in self._paths.uploads_dir.glob(TEMPORARY_GLOB):
            temporary.unlink()
        arrived = list_arrived(self._paths, self.folder.url)
        for step in list_committed(self._paths):
            if step not in arrived or _pending_path(self._paths, step).exists():
                self.offer(step)
        self._drop_superseded()
        self._thread.start()

    def offer(self, step: int) -> None:
        """Upload the checkpoint of a step in its current state; called after its commit, before it
        is stripped.
        """
        self._drop_superseded()
        # Earlier failures too: the newest alone may not be enough to resume.
        for older in list_pending(self._paths):
            if older < step:
                self._queue.put(older)
        try:
            self._prepare_upload(step)
        # No space, or damaged: training continues, and a later attempt sends it.
        except (OSError, CorruptFileError) as error:
            self._note(step, outcome="failed", message=f"{type(error).__name__}: {error}")
        else:
            self._queue.put(step)

    def finish(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Retry failed uploads once more and wait for pending ones, up to a limit."""
        for step in list_pending(self._paths):
            self._queue.put(step)
        self._queue.put(_END)
        self._thread.join(patience_seconds)
        self._stop.set()
        if self._thread.is_alive():
            for step in list_pending(self._paths):
                self._note(
                    step,
                    outcome="unfinished",
                    message=f"not there {patience_seconds:.0f} s after training ended",
                )

    def _work(self) -> None:
        while (step := self._queue.get()) != _END:
            pending, started = _pending_path(self._paths, step), time.monotonic()
            if not pending.exists():  # superseded, or already sent
                continue
            try:
                num_bytes = pending.stat().st_size
                _, num_tries = retry(
                    partial(self._send, step), self._remote.num_retries, self._stop
                )
            except Exception as error:  # each file system has its own errors
                if pending.exists():  # otherwise superseded, or already sent
                    self._note(step, outcome="failed", message=f"{type(error).__name__}: {error}")
            else:
                seconds = round(time.monotonic() - started, 3)
                self._note(
                    step,
                    outcome="uploaded",
                    num_bytes=num_bytes,
                    num_tries=num_tries,
                    seconds=seconds,
                )

    def _send(self, step: int) -> None:
        pending = _pending_path(self._paths, step)
        self.folder.require_owner(self._recipe_digest, claim=True)
        self.folder.send(pending, step)
        is_resumable = not any(older < step for older in list_pending(self._paths))
        # Otherwise its best weights may still be uploading, and an older one is needed to resume.
        if is_resumable:
            committed = list_committed(self._paths)
            for older in self.folder.list_steps():
                if older < step and older not in committed:
                    self.folder.delete(older)
        pending.unlink(
            missing_ok=True
        )  # last: failures are retried, and an archive that has arrived is not resent

    def _note(self, step: int, **known: Any) -> None:
        row = scrub_json({"step": step, "url": self.folder.url, "at_utc": now_utc(), **known})
        # More important writes report a full disk.
        with contextlib.suppress(CorruptFileError, OSError):
            append_jsonl(self._attempt.uploads_path, row)
        if known["outcome"] != "uploaded":
            print(
                f"warning: upload of step {step} to {self.folder.url}: {known['message']}",
                flush=True,
            )

    def _prepare_upload(self, step: int) -> None:
        pending, archive_path = _pending_path(self._paths, step), self._paths.archive_path(step)
        pending.parent.mkdir(exist_ok=True)
        if pending.exists():
            return
        try:
            os.link(archive_path, pending)  # stays when the archive is replaced or pruned
        except OSError:  # there is none, or the file system has no links
            write_archive(self._paths.checkpoint_dir(step), pending)

    def _drop_superseded(self) -> None:
        committed = list_committed(self._paths)
        for step in list_pending(self._paths):
            if step not in committed:
                _pending_path(self._paths, step).unlink(missing_ok=True)


def list_pending(paths: RunPaths) -> list[int]:
    """Steps whose archives have not arrived, oldest first."""
    stems = [
        path.stem.removeprefix(STEP_PREFIX)
        for path in paths.uploads_dir.glob(f"{STEP_PREFIX}*.zip")
    ]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def list_arrived(paths: RunPaths, url: str) -> set[int]:
    """Steps that some attempt has sent to `url`."""
    arrived: set[int] = set()
    for folder in paths.attempts_dir.glob("*"):
        try:
            rows = load_jsonl(AttemptPaths(folder).uploads_path)
        except CorruptFileError:  # then they are offered again, and found to have arrived
            continue
        arrived |= {
            row["step"] for row in rows if row["url"] == url and row["outcome"] == "uploaded"
        }
    return arrived


def _pending_path(paths: RunPaths, step: int) -> Path:
    return paths.uploads_dir / f"{STEP_PREFIX}{step}.zip"
