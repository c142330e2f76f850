"""The rows of a run: read from an entry below the output root where there are many of them and they
were masked before, else drawn and masked, and stored for the next attempt or run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
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
from runner.data.rows import Samples, build_samples
from runner.data.shards import Work
from runner.errors import CorruptFileError
from runner.model.memory import require_space
from runner.recipe.contents import ContentHashes, hash_what_is_there
from runner.run.entries import Entry, find_entry, hold_entry, quarantine_entry, write_entry
from runner.run.paths import content_cache_path, find_output_root, row_entries_dir
from runner.sft.context import RunContext
from runner.sft.generation import refuse_what_cannot_be_judged
from runner.sft.phases import name_rows_phase
from runner.sft.startup import WorldPlace
from runner.strict import list_texts
from runner.text import format_seconds

_SHOW_SECONDS: Final = 0.5  # between two looks at how far masking is
_SAY_SECONDS: Final = 10.0  # between two lines of the log
_BAR_WIDTH: Final = 20
# Of a stored row, beside its tokens and what it says.
_ROW_BYTES: Final = 300
_NUM_MEASURED: Final = 1000


def load_samples(context: RunContext, tokenizer: Any) -> Samples:
    """The rows that a run trains and is scored on; every rank has the same.

    Raises:
        DataError: as `draw_splits`, `build_samples` and `refuse_what_cannot_be_judged`.
    """
    recipe, folder = context.recipe, None
    entries = _Entries(context, tokenizer)
    stated = count_stated_rows(recipe)
    is_small = stated is not None and stated < MIN_STORED_ROWS
    if not is_small and pin_data(recipe, context.contents) is not None:
        # The main process writes while the others wait, and all map the same files.
        folder = context.on_main(entries.find_or_write)
    if folder is not None:
        samples = load_entry(Path(folder))
    else:
        raw = entries.raw
        if raw is None:
            with context.phase(name_rows_phase(recipe.data)):
                raw = draw_splits(recipe.data)
        with context.phase("masking rows"):
            samples = build_samples(recipe.data, tokenizer, raw, sign_of_life=context.sign_of_life)
    with context.phase("masking rows"):
        refuse_what_cannot_be_judged(recipe, samples)
    return samples


class _Entries:
    """The entries of rows below one output root, as one run looks for its own there; only the main
    process does.
    """

    def __init__(self, context: RunContext, tokenizer: Any) -> None:
        self._context, self._tokenizer = context, tokenizer
        self._output_root = find_output_root(context.paths.run_dir)
        self.raw: RawSplits | None = None  # the rows that were drawn, where that was needed

    def find_or_write(self) -> str | None:
        """The folder of the entry, which is written where there is none; None where rows are few,
        or cannot be stored, which is told.

        Raises:
            DataError: as `draw_splits` and `build_samples`.
        """
        context, root = self._context, row_entries_dir(self._output_root)
        try:
            folder = None
            if root.is_dir():
                with context.phase("reading masked rows"):
                    folder = self._name(root)
                    if (entry := _find(folder)) is not None:
                        return str(entry.folder)
            with context.phase(name_rows_phase(context.recipe.data)):
                self.raw = draw_splits(context.recipe.data)
            if _count(self.raw) < MIN_STORED_ROWS:
                return None
            with context.phase("masking rows"):
                return self._write(folder or self._name(root), self.raw)
        except OSError as error:
            _tell(f"warning: masked rows are not stored below {root}: {error}")
            return None

    def _name(self, root: Path) -> Path:
        return root / name_entry(self._build_parts())

    def _build_parts(self) -> dict[str, Any]:
        parts = build_parts(self._context.recipe, self._tokenizer, self._context.contents)
        assert parts is not None, "else nobody would look for an entry"
        return parts

    def _write(self, folder: Path, raw: RawSplits) -> str | None:
        with hold_entry(folder, self._wait):
            self._context.enter_phase("masking rows")
            if (entry := _find(folder, is_ours=True)) is None:
                if self._has_changed():
                    _tell("warning: data files changed since the run was prepared: not stored")
                    return None
                require_space(folder.parent, _estimate_bytes(raw), "the masked rows")
                entry = self._mask(folder, raw)
        return str(entry.folder)

    def _wait(self) -> bool:
        """While another run writes the same rows."""
        self._context.enter_phase("waiting for another run that masks the same rows")
        self._context.sign_of_life()
        return True

    def _has_changed(self) -> bool:
        """True where the files that were just read are not those that the entry is named after."""
        recipe, contents = self._context.recipe, self._context.contents
        named = pin_data(recipe, contents)
        hashes = ContentHashes(content_cache_path(self._output_root))
        now = {**contents, **hash_what_is_there(recipe, hashes, only=named or ())}
        return pin_data(recipe, now) != named

    def _mask(self, folder: Path, raw: RawSplits) -> Entry:
        context, recipe = self._context, self._context.recipe
        work = Work(recipe.data, recipe.model, with_columns=bool(recipe.evaluation.metrics))
        num_cores = count_free_cores(context.place, os.environ)
        bar, began = _Bar(context), time.monotonic()

        def write(temporary: Path) -> None:
            write_rows(
                temporary, raw, work, self._tokenizer, num_cores=num_cores, report=bar.report
            )

        producer = {"run": recipe.run.full_name, "attempt": context.attempt.attempt_dir.name}
        entry = write_entry(folder, write, parts=self._build_parts(), producer=producer)
        seconds = format_seconds(time.monotonic() - began)
        _tell(f"masked {_count(raw):,} rows in {seconds}, stored in {folder}")
        return entry


def _find(folder: Path, *, is_ours: bool = False) -> Entry | None:
    """The entry, verified. One that is damaged is moved aside by the holder of its lock."""
    try:
        began = time.monotonic()
        if (entry := find_entry(folder)) is not None:
            load_entry(folder)
            run, attempt = entry.producer.get("run"), entry.producer.get("attempt")
            seconds = time.monotonic() - began
            _tell(
                f"rows were masked by {run}, attempt {attempt}, and are read from {folder},"
                f" compared with its checksums in {seconds:.1f} s"
            )
        return entry
    except CorruptFileError as error:
        if is_ours:
            moved = quarantine_entry(folder, error.message)
            _tell(f"warning: masked rows are damaged: {error.message}; moved to {moved}")
        return None


def count_free_cores(place: WorldPlace, environment: Mapping[str, str]) -> int:
    """Cores for the main process while the other ranks of this machine wait for it.

    `OMP_NUM_THREADS` is a rank's share of what the launcher has for this run.
    """
    bound = len(os.sched_getaffinity(0))
    threads = environment.get("OMP_NUM_THREADS", "")
    share = int(threads) if threads.isdecimal() else bound // place.local_world_size
    return max(1, min(bound, share * place.local_world_size))


class _Bar:
    """How far masking is, in `progress.json` and now and then in the log."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._began = self._said_at = time.monotonic()
        self._shown_at = 0.0

    def report(self, num_done: int, num_rows: int) -> None:
        """Note how many rows are done; called for each row, perhaps."""
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
            _tell(f"masking rows [{bar:<{_BAR_WIDTH}}] {shown}, {per_second:,.0f} a second")


def _count(raw: RawSplits) -> int:
    return sum(len(getattr(raw, split)) for split in SPLITS)


def _estimate_bytes(raw: RawSplits) -> int:
    """Of the entry, by some of the rows; a token is rarely of fewer than two characters."""
    num_bytes = 0
    for split in SPLITS:
        rows = getattr(raw, split)
        some = rows[:: max(1, len(rows) // _NUM_MEASURED)]
        characters = sum(len(text) for row in some for text in list_texts(list(row.messages)))
        num_bytes += (3 * characters // len(some) + _ROW_BYTES) * len(rows)
    return num_bytes


def _tell(line: str) -> None:
    print(line, flush=True)
