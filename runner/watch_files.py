"""What the live view reads: statuses and losses of many runs, each read again only when its files changed.

Reads files only. A status is derived again when any name, size, time or inode in the run directory, its last attempt or
its checkpoints changed, when the lease changed hands, or when a file that the recipe names did.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.fsio import is_leased
from runner.identity import ContentHashes, list_content_paths
from runner.plan import Retry, foresee_retry
from runner.record import Progress, load_progress, load_record
from runner.selection import Selected
from runner.status import RunStatus, derive_status

FolderState = frozenset[tuple[str, int, int, int]]


@dataclass(frozen=True)
class Reading:
    """One run as it was read: `progress` and `losses` (one per step) are of a running attempt only.

    `retry` is what the sweep that made the last attempt does next, while it lives.
    """

    selected: Selected
    status: RunStatus
    progress: Progress | None = None
    losses: Sequence[float] = ()
    retry: Retry | None = None


class RunsReader:
    """All runs of a view; recipes are taken as they were when it was made."""

    def __init__(self, selected: Sequence[Selected], cache_path: Path) -> None:
        self._contents = _Contents(cache_path)
        self._runs = [_RunReader(one, sorted(set(list_content_paths(one.recipe).values()))) for one in selected]

    def read(self) -> list[Reading]:
        """How all runs stand now, in the order in which they were given."""
        self._contents.refresh()
        return [run.read(self._contents.known(run.content_paths)) for run in self._runs]


class _Contents:
    """`known_contents` for many recipes that name the same few files: each is looked at once per refresh."""

    def __init__(self, cache_path: Path) -> None:
        self._cache_path = cache_path
        self._cache_state: object = ()
        self._hashes = ContentHashes(cache_path)
        self._known: dict[str, str | None] = {}

    def refresh(self) -> None:
        state = _look_at(self._cache_path)
        if state != self._cache_state:
            self._cache_state, self._hashes = state, ContentHashes(self._cache_path)
        self._known.clear()

    def known(self, paths: Sequence[str]) -> dict[str, str]:
        for path in paths:
            if path not in self._known:
                self._known[path] = self._hashes.known(Path(path)) if Path(path).exists() else None
        return {path: digest for path in paths if (digest := self._known[path]) is not None}


@dataclass
class _RunReader:
    selected: Selected
    content_paths: Sequence[str]
    _seen: object = None
    _status: RunStatus | None = None
    _progress: Progress | None = None
    _retry: Retry | None = None
    _losses: LossReader | None = None

    def read(self, contents: Mapping[str, str]) -> Reading:
        paths = self.selected.paths
        seen = (is_leased(paths.lease_path), self._look(), contents)
        if self._status is None or seen != self._seen:
            self._status = derive_status(paths, self.selected.recipe, contents)
            self._seen = seen  # from before: what changed while it was derived is seen the next time
            self._progress = self._retry = None
            if self._status.state == "running":
                self._progress = load_progress(paths.attempt(self._status.num_attempts).progress_path)
            elif self._status.failure is not None:
                self._retry = foresee_retry(self.selected.recipe, load_record(paths).attempts)
        if self._status.state != "running":
            self._losses = None
            return Reading(self.selected, self._status, retry=self._retry)
        self._losses = self._losses or LossReader(paths.metrics_path)
        return Reading(self.selected, self._status, self._progress, self._losses.read())

    def _look(self) -> tuple[FolderState, ...]:
        paths = self.selected.paths
        folders = [paths.run_dir, paths.checkpoints_dir, paths.uploads_dir]
        attempts = _look_into(paths.attempts_dir)
        if numbers := [int(name) for name, *_ in attempts if name.isdecimal()]:
            folders.append(paths.attempt(max(numbers)).attempt_dir)
        return attempts, *map(_look_into, folders)


@dataclass
class LossReader:
    """The training loss of every step in `metrics.jsonl`; what was read is not read again, but for a shorter file."""

    path: Path
    _losses: list[float] = field(default_factory=list)
    _num_bytes: int = 0
    _inode: int = 0

    def read(self) -> Sequence[float]:
        """The losses so far. A resume replaces the file by a shorter one: then all is read anew."""
        try:
            with self.path.open("rb") as stream:
                state = os.fstat(stream.fileno())
                if state.st_ino != self._inode or state.st_size < self._num_bytes:
                    self._losses, self._num_bytes, self._inode = [], 0, state.st_ino
                stream.seek(self._num_bytes)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except OSError:
            return []
        self._num_bytes += len(whole) + len(newline)
        self._losses += [loss for line in whole.split(b"\n") if (loss := _find_loss(line)) is not None]
        return self._losses


def _find_loss(line: bytes) -> float | None:
    """The loss of a row that is a training step."""
    try:
        row: Any = json.loads(line)
        return float(row["loss"])
    except (ValueError, TypeError, KeyError):
        return None


def _look_at(path: Path) -> object:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ino


def _look_into(folder: Path) -> FolderState:
    """Name, size, time and inode of everything directly in a folder; empty where there is none."""
    found: list[tuple[str, int, int, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    state = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # a temporary file
                    continue
                found.append((entry.name, state.st_size, state.st_mtime_ns, state.st_ino))
    except (FileNotFoundError, NotADirectoryError):
        pass
    return frozenset(found)
