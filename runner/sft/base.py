"""What the untouched model scores and answers at step 0: taken from the run that has computed it
under this output root, or computed here and kept for others.

`base_key` says for which runs that is the same computation. Each run that takes the scores of
another one scores a few rows for itself and holds them against what it was given. Nothing here
fails a run: where something is in the way, it scores by itself and says so in one line. Where the
scores came from stands in the attempt's `base.json`, so that the files of the run are the same
bytes either way.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import Trainer

from runner.data.rows import Samples
from runner.errors import CorruptFileError
from runner.files import hash_json, load_json, write_json_atomic
from runner.run.entries import Entry, find_entry, hold_entry, quarantine_entry, write_entry
from runner.run.paths import base_entries_dir, find_output_root
from runner.sft.base_key import ModelState, build_parts, explain_own_base, read_as_run
from runner.sft.context import RunContext
from runner.sft.evaluate import RowScore
from runner.sft.generation import Answer

NUM_ROWS_SCORED_AGAIN: Final = 4
_WAIT_SECONDS: Final = 600.0
# The other ranks wait in a collective meanwhile.
_WAIT_SECONDS_OF_SEVERAL: Final = 120.0
# Of a score on a GPU, which may add up in another order.
_RELATIVE: Final = 1e-3
_NATS: Final = 1e-4
_WAITING: Final = "waiting for another run to score the base model"


@dataclass(frozen=True)
class BaseScores:
    """All that is computed of the untouched model; no answers where none are asked for."""

    test: list[RowScore]
    test_answers: list[Answer]
    validation: list[RowScore]
    validation_answers: list[Answer]

    def write(self, folder: Path) -> None:
        """As the files of an entry."""
        scores = {"test": self.test, "validation": self.validation}
        answers = {"test": self.test_answers, "validation": self.validation_answers}
        for name, splits in (("scores", scores), ("answers", answers)):
            content = {split: [one.as_json() for one in found] for split, found in splits.items()}
            text = json.dumps(content, allow_nan=False)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> BaseScores:
        """What `write` wrote, every number to its last bit.

        Raises:
            CorruptFileError: a file has another shape.
        """
        try:
            scores, answers = load_json(folder / "scores.json"), load_json(folder / "answers.json")
            return cls(
                test=[RowScore(**row) for row in scores["test"]],
                test_answers=[Answer.from_json(row) for row in answers["test"]],
                validation=[RowScore(**row) for row in scores["validation"]],
                validation_answers=[Answer.from_json(row) for row in answers["validation"]],
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptFileError(f"{folder} is of another shape: {error!r}") from None


def obtain_base_scores(
    context: RunContext,
    samples: Samples,
    trainer: Trainer,
    *,
    compute: Callable[[], BaseScores],
    score_again: Callable[[], Mapping[int, RowScore]],
) -> BaseScores:
    """The scores of the base model; every rank must ask at the same point. `compute` makes them
    all, `score_again` those of a few test rows.
    """
    distributed_type = trainer.accelerator.distributed_type.value
    why = explain_own_base(context.recipe, context.base, distributed_type)
    if why is not None:
        _note(context, {"source": "own", "why": why}, f"computed here: {why}")
        return compute()
    as_run = read_as_run(context, trainer)
    with _Shelf.open(
        context, build_parts(context.recipe, context.contents, samples, as_run)
    ) as shelf:
        found = context.on_main(shelf.look)
        if found is not None:
            difference = find_difference(
                found.test, score_again(), is_exact=trainer.accelerator.device.type == "cpu"
            )
            if context.on_main(lambda: shelf.judge(difference)):
                return found
        before = ModelState(trainer.model)
        scores = compute()
        change = before.find_change(ModelState(trainer.model))
        context.on_main(lambda: shelf.keep(scores, change))
    return scores


def find_difference(
    theirs: Sequence[RowScore], ours: Mapping[int, RowScore], *, is_exact: bool
) -> str | None:
    """The first score of ours that is not theirs; None where all are equal, on a GPU up to the
    order in which it adds up.
    """
    for index, our in sorted(ours.items()):
        their = theirs[index] if index < len(theirs) else None
        if their == our:
            continue
        if their is None or is_exact or not _is_close(their, our):
            shown = "no such row" if their is None else f"{their.nll_sum!r} nats"
            return f"test row {our.row_id}: {shown}, computed again {our.nll_sum!r}"
    return None


def _is_close(their: RowScore, our: RowScore) -> bool:
    ours = our.as_json()
    return all(
        math.isclose(value, ours[name], rel_tol=_RELATIVE, abs_tol=_NATS)
        if name.endswith("nll_sum")
        else value == ours[name]
        for name, value in their.as_json().items()
    )


@dataclass
class _Shelf:
    """The place of one entry, as the main process sees it: looks, waits, keeps, and never raises
    for what it finds.
    """

    context: RunContext
    parts: Mapping[str, Any]
    folder: Path
    _stack: ExitStack
    _entry: Entry | None = None
    _is_ours: bool = False  # the lock, under which the entry is written
    _why: str = ""  # nothing is kept
    _mismatch: Mapping[str, Any] | None = None  # of an entry that was found

    @classmethod
    @contextmanager
    def open(cls, context: RunContext, parts: Mapping[str, Any]) -> Iterator[_Shelf]:
        """The place of the entry with this key; its lock is free again afterwards."""
        folder = base_entries_dir(find_output_root(context.paths.run_dir)) / hash_json(parts)
        with ExitStack() as stack:
            yield cls(context, parts, folder, stack)

    def look(self) -> BaseScores | None:
        """What the entry holds; None where there is none, and then the lock is ours unless
        something is in the way.
        """
        if self.parts["as_run"]["base"] is None:
            self._why = "nothing says which content `model.path` had when it was loaded"
            return None
        try:
            found = self._find()
            if found is None and self._take_lock():
                found = self._find()  # another run may have written it meanwhile
        except OSError as error:
            self._why = f"{self.folder} cannot be read or locked: {error}"
            return None
        if found is not None:  # readers need no lock
            self._stack.close()
            self._is_ours = False
        return found

    def _find(self) -> BaseScores | None:
        try:
            self._entry = find_entry(self.folder)
            return None if self._entry is None else BaseScores.load(self.folder)
        except CorruptFileError as error:
            self._entry = None
            moved = quarantine_entry(self.folder, error.message, found_by=self._who())
            print(f"base scores: {error.message}; moved to {moved}", flush=True)
            return None

    def _take_lock(self) -> bool:
        """Whether the lock is ours, at once or after a while."""
        self._is_ours = self._stack.enter_context(hold_entry(self.folder, lambda: False))
        if self._is_ours:
            return True
        is_alone = self.context.num_processes == 1
        seconds = _WAIT_SECONDS if is_alone else _WAIT_SECONDS_OF_SEVERAL
        deadline = time.monotonic() + seconds

        def go_on() -> bool:
            self.context.sign_of_life()
            return time.monotonic() < deadline

        with self.context.phase(_WAITING):
            self._is_ours = self._stack.enter_context(hold_entry(self.folder, go_on))
        if not self._is_ours:
            self._why = f"another run has been at it for {seconds / 60:.0f} min"
        return self._is_ours

    def judge(self, difference: str | None) -> bool:
        """Whether what was found may be taken; else it goes into quarantine."""
        assert self._entry is not None, "it was found"
        producer = dict(self._entry.producer)
        whose = f"{producer.get('run')}, attempt {producer.get('attempt')}"
        if difference is None:
            facts = {"source": "shared", "key": self.folder.name, "producer": producer}
            _note(self.context, facts, f"those of {whose}; some rows scored again are equal")
            return True
        self._why = f"those of {whose} are not what is computed here: {difference}"
        self._mismatch = {"producer": producer, "difference": difference}
        with contextlib.suppress(OSError):
            quarantine_entry(self.folder, difference, found_by=self._who())
        return False

    def keep(self, scores: BaseScores, change: str | None) -> None:
        """Write the entry, where the lock is ours and the model is as it was before."""
        facts: dict[str, Any] = {"source": "own", "key": self.folder.name}
        if change is not None:
            self._why = f"this model keeps something of what it was shown: {change}"
        elif self._is_ours:
            try:
                write_entry(self.folder, scores.write, parts=self.parts, producer=self._who())
                _note(
                    self.context, {**facts, "is_kept": True}, "computed here, and kept for others"
                )
                return
            except (OSError, ValueError) as error:
                self._why = f"{self.folder} cannot be written: {error}"
        if self._mismatch is not None:
            facts["mismatch"] = self._mismatch
        _note(
            self.context,
            {**facts, "is_kept": False, "why": self._why},
            f"computed here: {self._why}",
        )

    def _who(self) -> dict[str, Any]:
        number = int(self.context.attempt.attempt_dir.name)
        return {"run": self.context.recipe.run.full_name, "attempt": number}


def _note(context: RunContext, facts: Mapping[str, Any], said: str) -> None:
    """Say where the scores come from, in the log and in `base.json`."""
    if context.is_main:
        print(f"base scores: {said}", flush=True)
        with contextlib.suppress(OSError):
            write_json_atomic(context.attempt.base_path, facts)
