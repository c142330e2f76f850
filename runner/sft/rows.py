"""The rows of a run. If there are many and they were masked before, they are read from an entry
below the output root; else they are drawn, masked, and stored for the next attempt or run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from runner.data.draw import SPLITS, RawSplits, draw_splits
from runner.data.row_entries import (
    MIN_STORED_ROWS,
    build_parts,
    count_stated_rows,
    load_entry,
    name_entry,
    pin_data,
    write_rows,
)
from runner.data.rows import Samples, build_samples, expand_turns
from runner.data.shards import Work
from runner.data.stored_rows import BYTES_PER_ROW
from runner.errors import CorruptFileError, put_in_words
from runner.model.memory import require_space
from runner.recipe.contents import ContentHashes, hash_existing
from runner.recipe.schema import Turns
from runner.run.entries import Entry, find_entry, hold_entry, quarantine_entry, write_entry
from runner.run.paths import content_cache_path, find_output_root, row_entries_dir
from runner.sft.context import RunContext
from runner.sft.generation import refuse_unjudgeable
from runner.sft.phases import name_rows_phase
from runner.sft.startup import WorldPlace
from runner.strict import list_texts
from runner.text import format_seconds

_SHOW_SECONDS: Final = 0.5  # between two updates of `progress.json`
_SAY_SECONDS: Final = 10.0  # between two lines of the log
_BAR_WIDTH: Final = 20
_NUM_MEASURED: Final = 1000
# A run that masks writes shards far more often than this, unless it was stopped.
_PATIENCE_SECONDS: Final = 300.0


def load_samples(context: RunContext, tokenizer: Any) -> Samples:
    """The rows that a run is trained and scored on; every rank has the same.

    Raises:
        DataError: as in `draw_splits`, `build_samples` and `refuse_unjudgeable`.
    """
    recipe, raw, samples = context.recipe, None, None
    stated = count_stated_rows(recipe)
    is_small = stated is not None and stated < MIN_STORED_ROWS
    if not is_small and pin_data(recipe, context.contents) is not None:
        store = RowStore(context, tokenizer)
        # The main process writes while the others wait, and all map the same files.
        folder = context.on_main(store.find_or_write)
        raw, samples = store.raw, None if folder is None else _map(Path(folder))
    if samples is None:
        if raw is None:
            with context.phase(name_rows_phase(recipe.data)):
                raw = draw_splits(recipe.data)
        with context.phase("masking rows"):
            samples = build_samples(recipe.data, tokenizer, raw, sign_of_life=context.sign_of_life)
    with context.phase("masking rows"):
        refuse_unjudgeable(recipe, samples)
    return samples


def _map(folder: Path) -> Samples | None:
    try:
        return load_entry(folder)
    except CorruptFileError as error:  # not yet visible on this machine
        _print(f"warning: this process masks its rows itself: {error.message}")
        return None


class RowStore:
    """Finds or writes the entry of one run's rows below the output root; only the main process
    uses it.
    """

    def __init__(
        self, context: RunContext, tokenizer: Any, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._context, self._tokenizer = context, tokenizer
        self._patience_seconds = patience_seconds
        self._output_root = find_output_root(context.paths.run_dir)
        self._root = row_entries_dir(self._output_root)
        self.raw: RawSplits | None = None  # the rows that were drawn, if that was needed

    def find_or_write(self) -> str | None:
        """The folder of the entry, which is written if there is none. None if there are few rows,
        or if they cannot be stored, which is logged.

        Raises:
            DataError: as in `draw_splits` and `build_samples`.
        """
        context = self._context
        try:
            if self._root.is_dir():
                with context.phase("reading masked rows"):
                    if (entry := _find(self.folder)) is not None:
                        return str(entry.folder)
            with context.phase(name_rows_phase(context.recipe.data)):
                self.raw = draw_splits(context.recipe.data)
            if _count(self.raw) < MIN_STORED_ROWS:
                return None
            with context.phase("masking rows"):
                return str(self.write(self.raw).folder)
        except (CorruptFileError, OSError) as error:
            _print(f"warning: masked rows are not stored below {self._root}: {put_in_words(error)}")
            return None

    @cached_property
    def folder(self) -> Path:
        """The folder of the entry, which may not exist yet."""
        return self._root / name_entry(self._parts)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        parts = build_parts(self._context.recipe, self._tokenizer, self._context.contents)
        assert parts is not None, "otherwise no entry is looked up"
        return parts

    def write(self, raw: RawSplits) -> Entry:
        """Write the entry, or wait for another run that is writing it; returns the entry.

        Raises:
            DataError: as in `build_samples`.
            OSError: it cannot be written, data files have changed since the entry was named, or
                the run that is writing it makes no progress.
        """
        watch = Watch(self.folder, self._patience_seconds)

        def wait() -> bool:
            self._context.enter_phase("waiting for another run that masks the same rows")
            self._context.sign_of_life()
            return watch.is_working(time.monotonic())

        with hold_entry(self.folder, wait) as is_ours:
            if not is_ours:
                patience = format_seconds(self._patience_seconds)
                raise OSError(f"another run that masks the same rows wrote nothing for {patience}")
            self._context.enter_phase("masking rows")
            if (entry := _find(self.folder, is_ours=True)) is not None:
                return entry
            self._context.sign_of_life()
            self._require_same_files()
            self._context.sign_of_life()
            num_bytes = estimate_bytes(raw, self._context.recipe.data.turns)
            require_space(self._root, num_bytes, "the masked rows")
            return self._mask(raw)

    def _require_same_files(self) -> None:
        """Check that the files that were just read have not changed.

        Raises:
            OSError: a file has changed.
        """
        recipe, contents = self._context.recipe, self._context.contents
        named = pin_data(recipe, contents)
        hashes = ContentHashes(content_cache_path(self._output_root))
        now = {**contents, **hash_existing(recipe, hashes, only=named or ())}
        if pin_data(recipe, now) != named:
            raise OSError("data files changed since the run was prepared")

    def _mask(self, raw: RawSplits) -> Entry:
        context, recipe = self._context, self._context.recipe
        work = Work(recipe.data, recipe.model)
        num_cores = count_free_cores(context.place, os.environ)
        bar, began = _Bar(context), time.monotonic()

        def write(temporary: Path) -> None:
            write_rows(
                temporary,
                raw,
                work,
                self._tokenizer,
                with_columns=bool(recipe.evaluation.metrics),
                num_cores=num_cores,
                report=bar.report,
            )
            context.sign_of_life()  # next, large files are synced and hashed

        producer = {"run": recipe.run.full_name, "attempt": context.attempt.attempt_dir.name}
        entry = write_entry(self.folder, write, parts=self._parts, producer=producer)
        seconds = format_seconds(time.monotonic() - began)
        _print(f"masked {_count(raw):,} rows in {seconds}, stored in {entry.folder}")
        return entry


class Watch:
    """Watches the progress of the writer of an entry. A writer that was stopped, or whose machine
    is gone, may hold its lock for ever.
    """

    def __init__(self, folder: Path, patience_seconds: float) -> None:
        self._folder, self._patience_seconds = folder, patience_seconds
        self._seen: dict[Path, tuple[int, int]] | None = None
        self._changed_at = 0.0

    def is_working(self, now: float) -> bool:
        """False if the temporary files next to the entry have not changed for
        `patience_seconds`.
        """
        seen = self._look()
        if seen != self._seen:
            self._seen, self._changed_at = seen, now
        return now - self._changed_at < self._patience_seconds

    def _look(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for path in self._folder.parent.glob(f".{self._folder.name}.*.tmp/*"):
            with contextlib.suppress(OSError):  # just renamed or removed
                status = path.stat()
                found[path] = (status.st_size, status.st_mtime_ns)
        return found


def _find(folder: Path, *, is_ours: bool = False) -> Entry | None:
    """The verified entry. The holder of its lock moves a damaged entry aside."""
    entry = None
    try:
        began = time.monotonic()
        if (entry := find_entry(folder)) is not None:
            load_entry(folder)
            run, attempt = entry.producer.get("run"), entry.producer.get("attempt")
            seconds = time.monotonic() - began
            _print(
                f"rows were masked by {run}, attempt {attempt}, and are read from {folder}"
                f" (checksums verified in {seconds:.1f} s)"
            )
        return entry
    except CorruptFileError as error:
        if is_ours:
            moved = quarantine_entry(folder, error.message, read=entry)
            where = "" if moved is None else f"; moved to {moved}"
            _print(f"warning: masked rows are damaged: {error.message}{where}")
        return None


def count_free_cores(place: WorldPlace, environment: Mapping[str, str]) -> int:
    """Cores for the main process while the other ranks of this machine wait for it.

    `OMP_NUM_THREADS` is one rank's share of the launcher's cores for this run.
    """
    bound = len(os.sched_getaffinity(0))
    threads = environment.get("OMP_NUM_THREADS", "")
    share = int(threads) if threads.isdecimal() else bound // place.local_world_size
    return max(1, min(bound, share * place.local_world_size))


class _Bar:
    """Shows the progress of masking in `progress.json`, and from time to time in the log."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._began = self._said_at = time.monotonic()
        self._shown_at = 0.0

    def report(self, num_done: int, num_rows: int) -> None:
        """Show how many rows are done; may be called for each row."""
        now = time.monotonic()
        if now - self._shown_at < _SHOW_SECONDS:
            return
        self._shown_at = now
        shown = f"{num_done:,} of {num_rows:,}"
        self._context.show_in_phase(shown)
        if now - self._said_at >= _SAY_SECONDS:
            self._said_at = now
            bar = "#" * (_BAR_WIDTH * num_done // max(1, num_rows))
            per_second = num_done / (now - self._began)
            _print(f"masking rows [{bar:<{_BAR_WIDTH}}] {shown}, {per_second:,.0f} per second")


def _count(raw: RawSplits) -> int:
    return sum(len(getattr(raw, split)) for split in SPLITS)


def estimate_bytes(raw: RawSplits, turns: Turns) -> int:
    """Estimate the size of the entry from a sample of the rows; a token rarely has fewer than two
    characters.
    """
    num_bytes = 0
    for split in SPLITS:
        rows = getattr(raw, split)
        some = rows[:: max(1, len(rows) // _NUM_MEASURED)]
        expanded = expand_turns(some, turns)
        characters = sum(len(text) for row in expanded for text in list_texts(list(row.messages)))
        measured = 3 * characters + BYTES_PER_ROW * len(expanded)
        num_bytes += measured * len(rows) // max(1, len(some))
    return num_bytes


def _print(line: str) -> None:
    print(line, flush=True)
