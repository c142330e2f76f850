"""The content of a run directory, read once. `status`, `why`, `watch`, `report`, `stop` and `logs`
answer from it, and a launch decides by it under the lease.

The lease is checked first. A run that no process holds does not change while it is read, so if the
lease is free, everything read after that check is final. `plan` interprets the facts; checkpoints
are in `checkpoints`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from runner.errors import CorruptFileError
from runner.files import (
    MAX_ROWS_BYTES,
    FileState,
    is_plain,
    list_folder,
    load_json,
    load_jsonl,
    look_at,
)
from runner.run.lease import Lease, has_ranks, is_leased
from runner.run.manifest import measure_files
from runner.run.paths import RunPaths
from runner.run.record import (
    Attempt,
    Failure,
    Progress,
    PushRecord,
    RunRecord,
    StopRequest,
    StoredRecipe,
    load_failure,
    load_progress,
    load_push,
    load_record,
    load_stop_request,
    load_stored_recipe,
    now_utc,
)
from runner.run.result import TrainResult, load_result


@dataclass(frozen=True)
class Found:
    """The content found at one path, or the reason why it cannot be read."""

    content: Any = None
    error: CorruptFileError | OSError | None = None
    # State of the file just before it was read, from `look_at`; None: there was none.
    state: FileState | None = None

    def get(self) -> Any:
        """The content.

        Raises:
            CorruptFileError, OSError: it could not be read.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)  # else each raise would make it longer
        return self.content


RunPart = Literal[
    "lease", "ranks", "record", "recipe", "result", "stop", "push", "uploads", "quarantine", "files"
]
LastAttemptPart = Literal["log", "progress", "failure", "upload_rows"]
Part = RunPart | LastAttemptPart | Literal["samples"]
NOTHING_KNOWN: Final[Mapping[Part, Found]] = MappingProxyType({})


@dataclass(frozen=True)
class RunFacts:
    """The content of one run directory, read once.

    A property whose file cannot be read raises the original error (CorruptFileError or OSError), so
    that unreadable content is not mistaken for absent content.
    """

    paths: RunPaths
    read_at_utc: str
    found: Mapping[Part, Found]

    @property
    def is_leased(self) -> bool:
        """True if a live process other than the reader holds the lease."""
        return bool(self._get("lease"))

    @property
    def is_running(self) -> bool:
        """True if a process holds the lease, or a rank on any machine is alive."""
        return self.is_leased or bool(self._get("ranks"))

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The attempts so far."""
        record: RunRecord = self._get("record")
        return record.attempts

    @property
    def last(self) -> Attempt | None:
        """The last attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def stored(self) -> StoredRecipe | None:
        """The recipe that the directory was made for."""
        stored: StoredRecipe | None = self._get("recipe")
        return stored

    @property
    def result(self) -> TrainResult | None:
        """The result of a completed run."""
        result: TrainResult | None = self._get("result")
        return result

    @property
    def has_result(self) -> bool:
        """True if there is a result, readable or not."""
        found = self.found["result"]
        return found.content is not None or found.error is not None

    @property
    def is_result_lost(self) -> bool:
        """True if an attempt is recorded to have written a result that is no longer there.

        The training process syncs `result.json` before its launcher records the end, so a power
        loss cannot explain this.
        """
        return not self.has_result and any(
            attempt.ended_at_utc is not None and attempt.failure is None
            for attempt in self.attempts
        )

    @property
    def file_sizes(self) -> Mapping[str, int]:
        """The sizes of the manifest's files that exist; empty if there is no manifest."""
        if "files" not in self.found:
            return {}
        sizes: Mapping[str, int] = self._get("files")
        return sizes

    @property
    def stop_request(self) -> StopRequest | None:
        """The request to stop an attempt; None also if it cannot be read."""
        request: StopRequest | None = self._get("stop")
        return request

    @property
    def push(self) -> PushRecord | None:
        """The last push to the hub that was requested. None also if its record cannot be read: a
        push can be repeated, and does not affect the run.
        """
        push: PushRecord | None = self.found["push"].content
        return push

    @property
    def progress(self) -> Progress | None:
        """The progress of the last attempt; None before its first step."""
        if self.last is None:
            return None
        progress: Progress | None = self._get("progress")
        return progress

    def measure_silence(self, at_utc: str) -> float | None:
        """Seconds since the last sign of life of the last attempt, or since its start. Never
        negative, even if the clocks of its machine and file system disagree.
        """
        if self.last is None:
            return None
        began = datetime.datetime.fromisoformat(self.last.started_at_utc).timestamp()
        state = self.found["progress"].state
        sign = began if state is None else state[1] / 1e9
        return max(0.0, datetime.datetime.fromisoformat(at_utc).timestamp() - sign)

    @property
    def failure(self) -> Failure | None:
        """The failure of the last attempt: the launcher's record, otherwise the training
        process's.
        """
        if self.last is None:
            return None
        if self.last.failure is not None:
            return self.last.failure
        failure: Failure | None = self._get("failure")
        return failure

    @property
    def has_log(self) -> bool:
        """True if the last attempt has a log; an attempt that was only prepared has none."""
        return self.last is not None and bool(self._get("log"))

    @property
    def quarantined(self) -> tuple[str, ...]:
        """Names of the checkpoints that were moved aside."""
        return tuple(sorted(self._get("quarantine")))

    @property
    def pending_uploads(self) -> tuple[str, ...]:
        """Names of the archives that have not reached remote storage, by step."""
        names: list[str] = self._get("uploads")
        return tuple(sorted(names, key=lambda name: (len(name), name)))

    @property
    def upload_failure(self) -> str | None:
        """First line of the newest upload failure, while any archive is pending."""
        if self.last is None or not self.pending_uploads:
            return None
        rows: list[dict[str, Any]] = self._get("upload_rows")
        failed = [row for row in rows if row.get("outcome") != "uploaded" and "message" in row]
        return str(failed[-1]["message"]).partition("\n")[0] if failed else None

    @property
    def samples(self) -> Any:
        """`samples.json`, if it was read `with_samples`."""
        return self._get("samples")

    def _get(self, part: Part) -> Any:
        return self.found[part].get()


def read_facts(
    paths: RunPaths,
    known: Mapping[Part, Found] = NOTHING_KNOWN,
    *,
    lease: Lease | None = None,
    with_samples: bool = False,
) -> RunFacts:
    """The facts of a run. Each file is opened at most once, and an error is raised only when the
    content is requested.

    A file in `known` whose size, times and inode are unchanged is not opened. `lease` is the run's
    lease if the caller holds it; then no other process does. `samples.json` is as long as the data,
    and is read only `with_samples`.
    """

    def read(part: Part, path: Path, load: Callable[[], Any]) -> Found:
        return _read(path, load, known.get(part))

    # First, see above. A held lease is enough to know: then the ranks' lock is not touched.
    is_held = _find(lambda: lease is None and is_leased(paths.lease_path))
    is_asked = lease is None and not is_held.content
    found: dict[Part, Found] = {
        "lease": is_held,
        "ranks": _find(lambda: is_asked and has_ranks(paths)),
        "record": read("record", paths.record_path, lambda: load_record(paths)),
        "recipe": read_stored_recipe(paths, known.get("recipe")),
        "result": read("result", paths.result_path, lambda: load_result(paths)),
        "stop": read("stop", paths.stop_path, lambda: load_stop_request(paths)),
        "push": read("push", paths.push_path, lambda: load_push(paths)),
        "uploads": _find(
            lambda: [name for name in list_folder(paths.uploads_dir) if name.endswith(".zip")]
        ),
        "quarantine": _find(lambda: list_folder(paths.quarantine_dir)),
    }
    result: TrainResult | None = found["result"].content
    manifest = None if result is None else result.files
    if manifest is not None:
        # Always checked again: truncating a file does not change its folder.
        found["files"] = _find(lambda: measure_files(paths, manifest))
    record: RunRecord | None = found["record"].content
    if record is not None and record.attempts:
        files, last = paths.attempt(record.attempts[-1].number), record.attempts[-1]
        found["log"] = _find(lambda: is_plain(files.log_path))
        path = files.progress_path
        found["progress"] = read("progress", path, lambda: load_progress(path))
        if last.failure is None:
            found["failure"] = _find(lambda: load_failure(files))
        if found["uploads"].content:
            rows_path = files.uploads_path
            found["upload_rows"] = read("upload_rows", rows_path, lambda: load_jsonl(rows_path))
    if with_samples:
        found["samples"] = read(
            "samples", paths.samples_path, lambda: load_json(paths.samples_path, MAX_ROWS_BYTES)
        )
    return RunFacts(paths, now_utc(), found)


def read_stored_recipe(paths: RunPaths, known: Found | None = None) -> Found:
    """`recipe.json`, as `read_facts` keeps it."""
    return _read(paths.recipe_path, lambda: load_stored_recipe(paths), known)


def _read(path: Path, load: Callable[[], Any], known: Found | None) -> Found:
    """The content of a file; `known` if the file has not changed since then."""
    state = look_at(path)
    if state is None:  # absent or inaccessible: loading it shows which
        return _find(load)
    if known is not None and known.error is None and known.state == state:
        return known
    return _find(load, state)


def _find(load: Callable[[], Any], state: FileState | None = None) -> Found:
    try:
        return Found(load(), state=state)
    except (CorruptFileError, OSError) as error:
        return Found(error=error, state=state)
