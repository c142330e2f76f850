"""Sends archives to remote storage in the background: training never waits for it and never fails by it.

What still has to go lies in `checkpoints/.uploads/`: an archive leaves that folder when it has arrived. So an attempt
that is killed, or a place that cannot be reached, leaves there what the next attempt sends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from runner.archives import TEMPORARY_GLOB, write_archive
from runner.errors import CorruptFileError
from runner.fsio import append_jsonl, load_jsonl
from runner.markers import list_committed
from runner.paths import STEP_PREFIX, AttemptPaths, RunPaths
from runner.recipe_sections import RemoteStorage
from runner.record import now_utc
from runner.secrets import scrub_json
from runner.sft.storage import RemoteFolder, retry

PATIENCE_SECONDS: Final = 300.0  # that a completed run waits for what is still on its way
_END: Final = -1


class Uploader:
    """A thread with a queue of steps; only the main process of a run has one."""

    def __init__(
        self, folder: RemoteFolder, remote: RemoteStorage, recipe_digest: str, paths: RunPaths, attempt: AttemptPaths
    ) -> None:
        self.folder, self._remote, self._recipe_digest = folder, remote, recipe_digest
        self._paths, self._attempt = paths, attempt
        self._queue: queue.Queue[int] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def start(self) -> None:
        """Send what is committed and has not arrived, then whatever is offered."""
        for temporary in self._paths.uploads_dir.glob(TEMPORARY_GLOB):
            temporary.unlink()
        arrived = list_arrived(self._paths, self.folder.url)
        for step in list_committed(self._paths):
            if step not in arrived or _pending_path(self._paths, step).exists():
                self.offer(step)
        self._drop_superseded()
        self._thread.start()

    def offer(self, step: int) -> None:
        """Send the checkpoint of a step as it is now; called after its commit, before anything is stripped of it."""
        self._drop_superseded()
        for older in list_pending(self._paths):  # what failed before: the newest alone may not be continuable
            if older < step:
                self._queue.put(older)
        try:
            self._lay_ready(step)
        except (OSError, CorruptFileError) as error:  # no space, or damaged: training goes on, a later attempt sends it
            self._note(step, outcome="failed", message=f"{type(error).__name__}: {error}")
        else:
            self._queue.put(step)

    def finish(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Try once more what failed and wait for what is on its way, but not for ever."""
        for step in list_pending(self._paths):
            self._queue.put(step)
        self._queue.put(_END)
        self._thread.join(patience_seconds)
        self._stop.set()
        if self._thread.is_alive():
            for step in list_pending(self._paths):
                self._note(step, outcome="unfinished", message=f"not there {patience_seconds:.0f} s after training")

    def _work(self) -> None:
        while (step := self._queue.get()) != _END:
            pending, started = _pending_path(self._paths, step), time.monotonic()
            if not pending.exists():  # superseded, or sent meanwhile
                continue
            try:
                num_bytes = pending.stat().st_size
                _, num_tries = retry(partial(self._send, step), self._remote.num_retries, self._stop)
            except Exception as error:  # each file system has kinds of its own
                if pending.exists():  # else it was superseded, or sent meanwhile
                    self._note(step, outcome="failed", message=f"{type(error).__name__}: {error}")
            else:
                seconds = round(time.monotonic() - started, 3)
                self._note(step, outcome="uploaded", num_bytes=num_bytes, num_tries=num_tries, seconds=seconds)

    def _send(self, step: int) -> None:
        pending = _pending_path(self._paths, step)
        self.folder.require_owner(self._recipe_digest, claim=True)
        self.folder.send(pending, step)
        is_continuable = not any(older < step for older in list_pending(self._paths))
        if is_continuable:  # else its best weights may be on their way, and an older one is what can be continued
            committed = list_committed(self._paths)
            for older in self.folder.list_steps():
                if older < step and older not in committed:
                    self.folder.delete(older)
        pending.unlink(
            missing_ok=True
        )  # last: what fails here is tried again, and an archive that is there is not resent

    def _note(self, step: int, **known: Any) -> None:
        row = scrub_json({"step": step, "url": self.folder.url, "at_utc": now_utc(), **known})
        with contextlib.suppress(OSError):  # a full disk is told by what matters more
            append_jsonl(self._attempt.uploads_path, row)
        if known["outcome"] != "uploaded":
            print(f"warning: upload of step {step} to {self.folder.url}: {known['message']}", flush=True)

    def _lay_ready(self, step: int) -> None:
        pending, archive_path = _pending_path(self._paths, step), self._paths.archive_path(step)
        pending.parent.mkdir(exist_ok=True)
        if pending.exists():
            return
        try:
            os.link(archive_path, pending)  # stays when the archive is replaced or pruned
        except OSError:  # there is none, or the file system knows no links
            write_archive(self._paths.checkpoint_dir(step), pending)

    def _drop_superseded(self) -> None:
        committed = list_committed(self._paths)
        for step in list_pending(self._paths):
            if step not in committed:
                _pending_path(self._paths, step).unlink(missing_ok=True)


def list_pending(paths: RunPaths) -> list[int]:
    """Steps whose archives have not arrived, oldest first."""
    stems = [path.stem.removeprefix(STEP_PREFIX) for path in paths.uploads_dir.glob(f"{STEP_PREFIX}*.zip")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def list_arrived(paths: RunPaths, url: str) -> set[int]:
    """Steps that some attempt has sent to `url`."""
    arrived: set[int] = set()
    for folder in paths.attempts_dir.glob("*"):
        try:
            rows = load_jsonl(AttemptPaths(folder).uploads_path)
        except CorruptFileError:  # then they are offered again, and found to be there
            continue
        arrived |= {row["step"] for row in rows if row["url"] == url and row["outcome"] == "uploaded"}
    return arrived


def _pending_path(paths: RunPaths, step: int) -> Path:
    return paths.uploads_dir / f"{STEP_PREFIX}{step}.zip"
