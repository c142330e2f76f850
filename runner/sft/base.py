"""Scores and answers of the base model at step 0, reused from another run under this output root or
computed here and stored for others.

`base_key` decides which runs make the same computation. A run that reuses stored scores scores a
few rows itself and compares them. Nothing here fails a run: if the scores cannot be shared, the run
computes its own and logs the reason in one line. The source of the scores is recorded only in the
attempt's `base.json`, so the other files of the run are the same bytes either way.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_type_hints

from accelerate.utils import gather_object
from pydantic import ValidationError
from transformers import Trainer

from runner.data.rows import Samples
from runner.errors import CorruptFileError, put_in_words
from runner.files import MAX_ROWS_BYTES, hash_json, load_json, write_json_atomic
from runner.recipe.evaluation_section import GenerationOn
from runner.run.entries import (
    Entry,
    find_entry,
    find_not_shared,
    hold_entry,
    note_not_shared,
    quarantine_entry,
    write_entry,
)
from runner.run.paths import base_entries_dir, find_output_root
from runner.run.record import BaseProducer, BaseSource
from runner.run.scores import find_impossible
from runner.sft.base_key import (
    ModelState,
    build_parts,
    describe_device,
    explain_own_base,
    read_as_run,
)
from runner.sft.context import RunContext
from runner.sft.evaluate import RowScore
from runner.sft.generation import Answer
from runner.text import format_seconds

NUM_ROWS_SCORED_AGAIN: Final = 4
_WAIT_SECONDS: Final = 600.0
_WAIT_SECONDS_OF_SEVERAL: Final = 120.0
_WAITING: Final = "waiting for another run to score the base model"


@dataclass(frozen=True)
class BaseScores:
    """Everything computed from the base model; without answers if the recipe generates none.

    `again` holds the scores of a few test rows in small batches of their own. The other rows in a
    batch change the last bits of a score, so another run scores the same small batches to compare.
    """

    test: list[RowScore]
    test_answers: list[Answer]
    validation: list[RowScore]
    validation_answers: list[Answer]
    again: list[RowScore] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the files of an entry."""
        scores = {"test": self.test, "validation": self.validation, "again": self.again}
        answers = {"test": self.test_answers, "validation": self.validation_answers}
        for name, splits in (("scores", scores), ("answers", answers)):
            content = {split: [one.as_json() for one in found] for split, found in splits.items()}
            text = json.dumps(content, allow_nan=False)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> BaseScores:
        """The scores that `write` stored, with every number exact to its last bit.

        Raises:
            CorruptFileError: a file has another shape.
        """
        try:
            scores = load_json(folder / "scores.json", MAX_ROWS_BYTES)
            answers = load_json(folder / "answers.json", MAX_ROWS_BYTES)
            return cls(
                test=[_read_score(row) for row in scores["test"]],
                test_answers=[_read_answer(row) for row in answers["test"]],
                validation=[_read_score(row) for row in scores["validation"]],
                validation_answers=[_read_answer(row) for row in answers["validation"]],
                again=[_read_score(row) for row in scores["again"]],
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptFileError(f"{folder} has an unexpected shape: {error!r}") from None


# Checked by hand: pydantic rejects texts with half a surrogate pair, which a row id may contain.
_SCORE_TYPES: Final = get_type_hints(RowScore)


def _read_score(row: Mapping[str, Any]) -> RowScore:
    """Raises: TypeError."""
    score = RowScore(**row)
    for name, expected in _SCORE_TYPES.items():
        _require(type(getattr(score, name)) is expected and _is_finite(getattr(score, name)), row)
    _require(find_impossible(row) is None, row)
    return score


def _read_answer(row: Mapping[str, Any]) -> Answer:
    """Raises: TypeError, KeyError, AttributeError."""
    _require(isinstance(row["references"], list), row)
    answer = Answer.from_json(row)
    texts = [answer.row_id, answer.prediction, *answer.references]
    _require(all(isinstance(text, str) for text in texts), row)
    claims = (answer.is_finished, answer.judgement.is_readable)
    _require(all(isinstance(claim, bool) for claim in claims), row)
    own = [value for value in answer.own_scores.values() if value is not None]
    for value in (*answer.judgement.scores.values(), *own):
        _require(type(value) in (int, float) and _is_finite(value), row)
    return answer


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _require(is_right: bool, row: Mapping[str, Any]) -> None:
    if not is_right:
        raise TypeError(f"row {row['row_id']}")


def obtain_base_scores(
    context: RunContext,
    samples: Samples,
    trainer: Trainer,
    *,
    compute: Callable[[], BaseScores],
    score_again: Callable[[], list[RowScore]],
    wait_seconds: float | None = None,
) -> BaseScores:
    """The scores of the base model; every rank must call this at the same point. `compute` returns
    all of them, `score_again` those of a few test rows. While another run computes them, this one
    waits up to `wait_seconds`; None: ten minutes, or two if other ranks wait in a collective.
    """
    distributed_type = trainer.accelerator.distributed_type.value
    dynamo = trainer.accelerator.state.dynamo_plugin.backend.value
    why = explain_own_base(context.recipe, context.base, distributed_type, dynamo)
    if why is not None:
        _note(context, BaseSource(source="own", why=why))
        return compute()
    device = trainer.accelerator.device
    devices = gather_object([describe_device(device)])
    with _Shelf.open(context, samples) as shelf:
        found, is_ours = context.on_main(
            lambda: (shelf.look(trainer, devices, wait_seconds), shelf.is_ours)
        )
        again = score_again() if found is not None or is_ours else []
        if found is not None:
            tolerance = EXACT if device.type == "cpu" else OF_SUMS
            difference = find_difference(found.again, again, tolerance)
            difference = difference or find_difference(found.test, again, OF_BATCHES)
            if context.on_main(lambda: shelf.judge(difference)):
                return found
        # Every run scores those few rows, so the first forwards may leave state in the model. The
        # other rows must leave none, or a run that skips them would train differently.
        before = ModelState(trainer.model)
        scores = compute()
        change = before.find_change(ModelState(trainer.model))
        change = change or find_difference(scores.test, again, OF_BATCHES)
        context.on_main(lambda: shelf.keep(replace(scores, again=again), change))
    return scores


@dataclass(frozen=True)
class Tolerance:
    """The largest accepted difference between two sums of one row, relative or in nats."""

    relative: float
    nats: float

    def allows(self, one: float, other: float) -> bool:
        """True if the two sums count as equal."""
        return one == other or math.isclose(one, other, rel_tol=self.relative, abs_tol=self.nats)


EXACT: Final = Tolerance(0.0, 0.0)
OF_SUMS: Final = Tolerance(1e-3, 1e-4)  # a GPU may add up in another order
# For other rows in the batch, in the narrowest dtype. It only detects other weights.
OF_BATCHES: Final = Tolerance(0.05, 0.5)


def find_difference(
    theirs: Sequence[RowScore], ours: Sequence[RowScore], tolerance: Tolerance
) -> str | None:
    """Describe the first of our scores that differs from theirs; None if all are equal."""
    by_id = {one.row_id: one.as_json() for one in theirs}
    for our in ours:
        their = by_id.get(our.row_id, {})
        for name, value in our.as_json().items():
            other = their.get(name)
            if name.endswith("nll_sum") and isinstance(other, float):
                is_equal = tolerance.allows(value, other)
            else:
                is_equal = value == other
            if not is_equal:
                return f"test row {our.row_id}: {name} {other}, computed again {value}"
    return None


@dataclass
class _Shelf:
    """The place of one entry, as the main process sees it. It finds, waits for and stores the
    entry, and never raises because of what it finds.
    """

    context: RunContext
    samples: Samples
    _stack: ExitStack
    _key: str | None = None  # the hash of the parts, once they are known
    _parts: Mapping[str, Any] = field(default_factory=dict)
    _entry: Entry | None = None  # the entry that was found
    _producer: BaseProducer | None = None  # the run that wrote it
    is_ours: bool = False  # this run holds the lock under which the entry is written
    _why: str = ""  # the reason why nothing is shared

    @classmethod
    @contextmanager
    def open(cls, context: RunContext, samples: Samples) -> Iterator[_Shelf]:
        """A place that has not been looked up yet; the lock of the entry is released at exit."""
        with ExitStack() as stack:
            yield cls(context, samples, stack)

    @property
    def folder(self) -> Path:
        """The folder of the entry."""
        root = find_output_root(self.context.paths.run_dir)
        assert self._key is not None, "the parts are known"
        return base_entries_dir(root) / self._key

    def look(
        self, trainer: Trainer, devices: Sequence[str], wait_seconds: float | None
    ) -> BaseScores | None:
        """The scores in the entry, or None if there is none; the lock is then ours, unless
        something prevents that.
        """
        context = self.context
        try:
            as_run = read_as_run(context, trainer, devices)
            self._parts = build_parts(context.recipe, context.contents, self.samples, as_run)
            self._key = hash_json(self._parts)
        # A library that refuses to show its settings costs this run time, but does not fail it.
        except Exception as error:
            self._why = f"it is unknown what its scores depend on: {error!r}"
            return None
        if as_run.base is None:
            self._why = "the content of `model.path` when it was loaded is unknown"
            return None
        try:
            found = self._find()
            if found is None and not self._is_not_shared() and self._take_lock(wait_seconds):
                found = self._find()  # another run may have written it meanwhile
                if found is None and self._is_not_shared():
                    self._release()
        except (CorruptFileError, OSError) as error:
            self._why = f"{self.folder} cannot be read or locked: {put_in_words(error)}"
            return None
        if found is not None:  # readers need no lock
            self._release()
        return found

    def _release(self) -> None:
        self._stack.close()
        self.is_ours = False

    def _is_not_shared(self) -> bool:
        """True if a run has found that these scores cannot be shared."""
        if (why := find_not_shared(self.folder)) is not None:
            self._why = why
        return why is not None

    def _find(self) -> BaseScores | None:
        self._entry = None
        try:
            self._entry = entry = find_entry(self.folder)
            if entry is None:
                return None
            found = BaseScores.load(self.folder)
            self._require_rows(found)
            self._producer = _read_producer(entry)
        except CorruptFileError as error:
            moved = quarantine_entry(
                self.folder, error.message, read=self._entry, found_by=self._identify_run()
            )
            done = f"moved to {moved}" if moved else "another process has moved it aside"
            print(f"warning: {error.message}: {done}", flush=True)
            return None
        return found

    def _require_rows(self, found: BaseScores) -> None:
        for split, scores, answers in (
            ("test", found.test, found.test_answers),
            ("validation", found.validation, found.validation_answers),
        ):
            asked = [row.row_id for row in getattr(self.samples, split).rows]
            if [one.row_id for one in scores] != asked:
                raise CorruptFileError(f"{self.folder} has other {split} rows")
            if [one.row_id for one in answers] != asked[: self._limit_answers(split)]:
                raise CorruptFileError(f"{self.folder} has answers to other {split} rows")

    def _limit_answers(self, split: str) -> int | None:
        """The number of rows that are answered; None: all."""
        settings = self.context.recipe.evaluation.generation
        if isinstance(settings, GenerationOn) and (split == "test" or settings.during_training):
            return settings.num_samples
        return 0

    def _take_lock(self, wait_seconds: float | None) -> bool:
        """True if this run gets the lock, immediately or after a wait."""
        self.is_ours = self._stack.enter_context(hold_entry(self.folder, lambda: False))
        if self.is_ours:
            return True
        is_alone = self.context.num_processes == 1
        if wait_seconds is None:
            wait_seconds = _WAIT_SECONDS if is_alone else _WAIT_SECONDS_OF_SEVERAL
        deadline = time.monotonic() + wait_seconds

        def keep_waiting() -> bool:
            self.context.sign_of_life()
            return time.monotonic() < deadline

        with self.context.phase(_WAITING):
            self.is_ours = self._stack.enter_context(hold_entry(self.folder, keep_waiting))
        if not self.is_ours:
            self._why = f"another run has been computing it for {format_seconds(wait_seconds)}"
        return self.is_ours

    def judge(self, difference: str | None) -> bool:
        """True if the scores that were found may be used; otherwise they are quarantined."""
        assert self._producer is not None, "it was found"
        if difference is None:
            source = BaseSource(source="shared", key=self._key, producer=self._producer)
            _note(self.context, source)
            return True
        self._why = (
            f"the scores of {self._producer.run}, attempt {self._producer.attempt}, differ:"
            f" {difference}"
        )
        with contextlib.suppress(CorruptFileError, OSError):
            quarantine_entry(
                self.folder, difference, read=self._entry, found_by=self._identify_run()
            )
        return False

    def keep(self, scores: BaseScores, change: str | None) -> None:
        """Write the entry if this run holds the lock and scoring left the model unchanged."""
        is_kept = False
        if self.is_ours and change is not None:
            self._why = f"scoring is not reproducible, or changes the model: {change}"
            with contextlib.suppress(CorruptFileError, OSError):
                note_not_shared(self.folder, self._why)
        elif self.is_ours:
            try:
                write_entry(
                    self.folder, scores.write, parts=self._parts, producer=self._identify_run()
                )
                is_kept = True
            except (OSError, ValueError) as error:
                self._why = f"{self.folder} cannot be written: {error}"
        _note(
            self.context,
            BaseSource(
                source="own",
                key=self._key,
                producer=self._producer,
                is_kept=is_kept,
                why=None if is_kept else self._why,
            ),
        )

    def _identify_run(self) -> dict[str, Any]:
        number = int(self.context.attempt.attempt_dir.name)
        return {"run": self.context.recipe.run.full_name, "attempt": number}


def _read_producer(entry: Entry) -> BaseProducer:
    try:
        return BaseProducer.model_validate(dict(entry.producer))
    except ValidationError:
        raise CorruptFileError(f"the manifest of {entry.folder} names no producer") from None


def _note(context: RunContext, source: BaseSource) -> None:
    """Log the source of the scores, and write it to `base.json`."""
    if context.is_main:
        print(f"scores of the base model: {source.describe()}", flush=True)
        with contextlib.suppress(CorruptFileError, OSError):
            write_json_atomic(context.attempt.base_path, source.model_dump(mode="json"))
