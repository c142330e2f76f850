"""The numbers of each run in a report, and the facts that make two runs incomparable.

Axes come from the recipe, scores from `result.json`, and provenance from the run's records; a fact
that an older run did not record is None. The only clock time is the start of the first attempt,
which identifies later declarations. `effects` compares the rows, `format` writes them.

Kept light, because every report imports it: per-row scores are in `row_scores`, which is imported
only when they are needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from runner.errors import CorruptFileError, RunnerError, escape_controls
from runner.files import hash_json, load_jsonl
from runner.plan.status import RunStatus, State
from runner.recipe.identity import build_digest_payload
from runner.recipe.parse import Recipe
from runner.run.base_scores import OtherBaseScores
from runner.run.facts import RunFacts
from runner.run.paths import RunPaths
from runner.run.record import Attempt, list_trained
from runner.run.result import GenerationScore, SplitScore
from runner.strict import thaw

if TYPE_CHECKING:
    from runner.report.row_scores import RowScores

Model = Literal["base", "tuned"]
MODELS: Final[tuple[Model, ...]] = ("base", "tuned")
HARDWARE: Final = ("cpu", "gpu")  # from the records of attempts
LikelihoodUnit = Literal["nats per completion token", "bits per byte"]


@dataclass(frozen=True)
class Scores:
    """Scores of one model on the test split; None if there is no score or the denominator is 0."""

    nll_per_completion_token: float | None = None
    nll_per_token: float | None = None
    bits_per_byte: float | None = None  # of the completions; comparable across tokenizers


@dataclass(frozen=True, eq=False)
class ReportRow:
    """One run. All measurements are None unless the run is completed."""

    recipe: Recipe
    position: int  # in the input, from 0
    state: State
    rules: int | None = None  # for drawing and masking its rows
    contents: Mapping[str, str] = field(default_factory=dict)  # path -> SHA-256, as recorded
    num_test_rows: int | None = None
    test_rows_hash: str | None = None  # also None if it is not in `samples.json`
    base: Scores = Scores()
    tuned: Scores = Scores()
    # For "base" and "tuned"; empty: no answers were generated
    answers: Mapping[str, GenerationScore] = field(default_factory=dict)
    # Metric of answers -> key of its function; numbers are comparable only if this is equal
    metric_keys: Mapping[str, str] = field(default_factory=dict)
    best_step: int | None = None
    num_steps: int | None = None
    stop_reason: str | None = None
    # Warnings that another run computed different base scores
    base_warnings: tuple[str, ...] = ()
    run_dir: Path | None = None
    # Task of its test rows; a mean never combines two tasks. `build_rows` adds the source if two
    # sources have the same task.
    task: str = ""
    totals: Mapping[Model, SplitScore] = field(default_factory=dict)  # on the test split
    num_updates: int | None = None
    num_trained_tokens: int | None = None
    schedule_steps: int | None = None
    initial_weights_hash: str | None = None  # of the trained weights, before step 1
    row_order_hash: str | None = None  # of the rows over all steps
    # Split -> ids_hash, input_ids_hash, mask_hash and the counts of `samples.json`, as texts.
    split_hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)  # dotted key -> hub commit
    # Several joined by " then " if the attempts differ
    versions: Mapping[str, str] = field(default_factory=dict)
    source_hash: str | None = None  # of the runner's files; joined likewise
    runner_version: str | None = None
    runner_commit: str | None = None
    runner_is_dirty: bool | None = None  # True if some attempt ran uncommitted files
    # cpu and gpu: only names of models, no other facts of a machine
    hardware: Mapping[str, str] = field(default_factory=dict)
    # Of each attempt in order; equal numbers in a row are listed once. Empty: not recorded.
    num_processes: tuple[int, ...] = ()
    micro_batch_divisors: tuple[int, ...] = ()  # above 1 after running out of memory
    started_at_utc: str | None = None  # the first attempt
    # Declared contrasts: as recorded by the first attempt, and as in the present recipe
    declared_then: tuple[Any, ...] | None = None
    declared_now: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.recipe.run.name

    @property
    def model_name(self) -> str:
        """The base model as named in the recipe, with the revision if there is one."""
        model = self.recipe.model
        return f"{model.path}@{model.revision}" if model.revision else model.path

    @property
    def seed(self) -> int:
        """The seed of training."""
        return self.recipe.training.seed

    @property
    def updates(self) -> int | None:
        """Optimizer steps taken; older runs recorded them as `num_steps` only."""
        return self.num_updates if self.num_updates is not None else self.num_steps

    @property
    def is_best_at_end(self) -> bool | None:
        """True if the best step is the last one, so more updates might improve the score."""
        return None if self.best_step is None else self.best_step == self.num_steps

    @cached_property
    def payload(self) -> Mapping[str, Any]:
        """The part of its recipe that changes the experiment, without `training.seed`."""
        payload = build_digest_payload(self.recipe)
        payload["training"].pop("seed", None)
        return payload

    @cached_property
    def hash_without_seed(self) -> str:
        """Equal for two runs whose recipes differ only in `training.seed`."""
        return hash_json(self.payload)

    @cached_property
    def step_0_key(self) -> tuple[str, ...] | None:
        """Equal for two runs whose scores at step 0 must be equal if they have the same base model;
        None if there is no such score.
        """
        total = self.totals.get("base")
        if total is None or self.base.nll_per_completion_token is None:
            return None
        settings = hash_json([self.payload["model"], self.payload["quantization"]])
        read = self.split_hashes.get("test", {}).get("input_ids_hash", "")
        return settings, f"{total.num_completion_tokens} {total.num_tokens}", read

    def load_scores(self, model: Model) -> RowScores | None:
        """The per-row scores of one model; None if there are none (`why_no_scores`)."""
        found = self._read_scores(model)
        return None if isinstance(found, str) else found

    def why_no_scores(self, model: Model) -> str:
        """The reason why there are no per-row scores; empty if there are."""
        found = self._read_scores(model)
        return found if isinstance(found, str) else ""

    def _read_scores(self, model: Model) -> RowScores | str:
        if model not in self._scores_read:
            self._scores_read[model] = self._read_scores_now(model)
        return self._scores_read[model]

    @cached_property
    def _scores_read(self) -> dict[Model, RowScores | str]:
        return {}

    def _read_scores_now(self, model: Model) -> RowScores | str:
        from runner.report.row_scores import read_row_scores

        if self.run_dir is None or self.state != "completed":
            return f"{self.name} has status {self.state}"
        return read_row_scores(
            RunPaths(self.run_dir),
            model,
            task=self.recipe.data.task,
            own_metrics=[metric.name for metric in self.recipe.evaluation.metrics],
            total=self.totals.get(model),
            answers=self.answers.get(model),
        )

    def load_predictions(self, model: Model) -> list[dict[str, Any]]:
        """The rows of one model in `predictions.jsonl`, in the order of the split; none if
        nothing was generated. They contain whole texts and are not cached.
        """
        from runner.report.row_scores import load_rows

        return (
            []
            if self.run_dir is None
            else load_rows(RunPaths(self.run_dir).predictions_path, model)
        )

    def load_curve(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`: losses and evaluations by step."""
        return [] if self.run_dir is None else load_jsonl(RunPaths(self.run_dir).metrics_path)

    @property
    def grid(self) -> str:
        """The grid of the run."""
        return self.recipe.run.grid

    @property
    def axes(self) -> Mapping[str, Any]:
        """The value on each axis, in the grid's order of axes."""
        return self.recipe.run.axes

    @property
    def change(self) -> float | None:
        """Tuned minus base in nats per completion token: negative is better."""
        base, tuned = self.base.nll_per_completion_token, self.tuned.nll_per_completion_token
        return None if base is None or tuned is None else tuned - base

    @property
    def is_scored(self) -> bool:
        """True if the tuned model has a score in both units."""
        return (
            self.tuned.nll_per_completion_token is not None and self.tuned.bits_per_byte is not None
        )

    def metric(self, model: Model, name: str) -> float | None:
        """A metric of a model's answers on the test split; None if there is none."""
        return self.answers[model].metrics.get(name) if model in self.answers else None

    def score(self, unit: LikelihoodUnit) -> float:
        """The score of the tuned model on the test split; requires `is_scored`."""
        score = (
            self.tuned.bits_per_byte
            if unit == "bits per byte"
            else self.tuned.nll_per_completion_token
        )
        assert score is not None
        return score


@dataclass(frozen=True)
class BaseComparison:
    """Completed runs compared with their own base model, on test NLL per completion token."""

    num_completed: int
    num_better: int
    not_better: tuple[str, ...]
    unknown: tuple[str, ...]  # completed, but without both scores


def build_rows(runs: Iterable[tuple[Recipe, RunFacts, RunStatus]]) -> list[ReportRow]:
    """One row per run, sorted by grid, then by axes: numbers by value, all else in input
    order. The facts must have been read `with_samples`.
    """
    rows = _name_tasks([_build_row(position, *run) for position, run in enumerate(runs)])
    grids = list(dict.fromkeys(row.grid for row in rows))
    keys = {axis: list(map(axis_key, list_values(rows, axis))) for axis in list_axes(rows)}

    def rank(row: ReportRow) -> tuple[int, ...]:
        cell = []
        for axis, values in keys.items():
            cell.append(values.index(axis_key(row.axes[axis])) if axis in row.axes else -1)
        return grids.index(row.grid), *cell, row.position

    return sorted(rows, key=rank)


def name_other_base_scores(
    rows: Iterable[ReportRow], found: Sequence[OtherBaseScores]
) -> list[ReportRow]:
    """The rows, each with the warnings about the base scores that its run kept or read."""
    return [
        replace(
            row,
            base_warnings=tuple(
                one.describe() for one in found if row.recipe.run.full_name in one.runs
            ),
        )
        for row in rows
    ]


def list_axes(rows: Iterable[ReportRow]) -> list[str]:
    """Every axis that some run has, in the order of the input."""
    return list(dict.fromkeys(axis for row in _in_input_order(rows) for axis in row.axes))


def list_values(rows: Iterable[ReportRow], axis: str) -> list[Any]:
    """The different values of an axis: numbers first, ascending, then all else in the order
    of the input.
    """
    values: dict[str, Any] = {}
    for row in _in_input_order(rows):
        if axis in row.axes:
            values.setdefault(axis_key(row.axes[axis]), row.axes[axis])
    return sorted(values.values(), key=lambda value: (0, value) if is_number(value) else (1, 0))


def is_number(value: Any) -> bool:
    """True if an axis value sorts as a number; a boolean does not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def axis_text(value: Any) -> str:
    """Format an axis value for people; never empty, because a blank means that a run lacks the
    axis.

    >>> [axis_text(value) for value in ("full", 60, True, None, "", ("q", "v"))]
    ['full', '60', 'true', 'null', '""', '["q", "v"]']
    """
    return (
        value
        if isinstance(value, str) and value.strip()
        else json.dumps(thaw(value), ensure_ascii=False)
    )


def list_metrics(rows: Iterable[ReportRow]) -> list[str]:
    """Every metric of answers that some run has, in the order of its task."""
    return list(
        dict.fromkeys(
            name for row in rows for score in row.answers.values() for name in score.metrics
        )
    )


def require_metrics(names: Iterable[str] | None, rows: Iterable[ReportRow]) -> None:
    """Raise RunnerError if no run has one of these metrics."""
    from runner.report.row_scores import LIKELIHOODS

    known = [*LIKELIHOODS, *list_metrics(rows)]
    if unknown := [name for name in names or () if name not in known]:
        raise RunnerError(
            f"no run has the metric {unknown[0]!r}", hint=f"the metrics are {', '.join(known)}"
        )


def list_smaller_is_better(rows: Iterable[ReportRow]) -> list[str]:
    """The metrics of answers for which smaller is better."""
    modes = {name: mode for row in rows for name, mode in row.recipe.metric_modes.items()}
    return [name for name, mode in modes.items() if mode == "min"]


def join_numbers(numbers: Sequence[int]) -> str | None:
    """Format the numbers of a run's attempts; None if there are none.

    >>> join_numbers((8,)), join_numbers((1, 2)), join_numbers(())
    ('8', '1 then 2', None)
    """
    return " then ".join(map(str, numbers)) or None


def compare_with_base(rows: Iterable[ReportRow]) -> BaseComparison:
    """Compare each completed run with its step 0."""
    completed = [row for row in rows if row.state == "completed"]
    changes = [(row.name, row.change) for row in completed]
    return BaseComparison(
        num_completed=len(completed),
        num_better=sum(change is not None and change < 0 for _, change in changes),
        not_better=tuple(name for name, change in changes if change is not None and change >= 0),
        unknown=tuple(name for name, change in changes if change is None),
    )


def group_by_test_rows(rows: Iterable[ReportRow]) -> dict[str | None, list[ReportRow]]:
    """Group completed runs by the hash of their test rows; None if it was not recorded. Runs with
    different hashes are not comparable.
    """
    groups: dict[str | None, list[ReportRow]] = {}
    for row in rows:
        if row.state == "completed":
            groups.setdefault(row.test_rows_hash, []).append(row)
    return groups


def group_by_rules(rows: Iterable[ReportRow]) -> dict[int, list[ReportRow]]:
    """Group completed runs by the rules for their rows and masks, ascending. Runs with different
    rules are not comparable.
    """
    groups: dict[int, list[ReportRow]] = {}
    for row in rows:
        if row.rules is not None:
            groups.setdefault(row.rules, []).append(row)
    return dict(sorted(groups.items()))


def _in_input_order(rows: Iterable[ReportRow]) -> list[ReportRow]:
    return sorted(rows, key=lambda row: row.position)


def axis_key(value: Any) -> str:
    """Equal keys for equal values: 1 and 1.0 are one value; 1, "1" and true are three."""
    is_whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if is_whole else thaw(value), sort_keys=True)


def _build_row(position: int, recipe: Recipe, facts: RunFacts, status: RunStatus) -> ReportRow:
    try:
        result = facts.result if status.state == "completed" else None
        samples = facts.samples if result is not None else None
        stored, attempts = facts.stored, facts.attempts
    except (CorruptFileError, OSError):
        return ReportRow(recipe, position, "unreadable", task=recipe.data.task.name)
    row = ReportRow(
        recipe,
        position,
        status.state,
        run_dir=facts.paths.run_dir,
        task=recipe.data.task.name,
        started_at_utc=attempts[0].started_at_utc if attempts else None,
        declared_then=tuple(getattr(stored.recipe.run, "declared", ())) if stored else None,
        declared_now=tuple(getattr(recipe.run, "declared", ())),
    )
    if result is None:
        return row
    base, tuned = result.base.get("test"), result.tuned.get("test")
    return replace(
        row,
        rules=stored.rules if stored else None,
        contents=stored.contents if stored else {},
        commits=getattr(stored, "commits", {}),
        num_test_rows=tuned.num_rows if tuned else None,
        test_rows_hash=_find_ids_hash(samples),
        split_hashes=_find_split_hashes(samples),
        base=_build_scores(base),
        tuned=_build_scores(tuned),
        totals=_leave_out_none({"base": base, "tuned": tuned}),
        answers=result.generation,
        metric_keys=_key_metrics(recipe, stored.contents if stored is not None else {}),
        best_step=result.best_step,
        num_steps=result.num_steps,
        stop_reason=result.stop_reason,
        num_updates=getattr(result, "num_updates", None),
        num_trained_tokens=getattr(result, "num_trained_tokens", None),
        schedule_steps=getattr(result, "schedule_steps", None),
        initial_weights_hash=getattr(result, "initial_weights_hash", None),
        row_order_hash=getattr(result, "row_order_hash", None),
        **_find_provenance(attempts),
    )


def _name_tasks(rows: list[ReportRow]) -> list[ReportRow]:
    """The rows, with the source added to each task that has several sources of test rows."""
    sources = [_name_test_source(row) for row in rows]
    known: dict[str, set[str]] = {}
    for row, source in zip(rows, sources, strict=True):
        known.setdefault(row.task, set()).add(source)
    return [
        replace(row, task=f"{row.task} of {source}") if len(known[row.task]) > 1 else row
        for row, source in zip(rows, sources, strict=True)
    ]


def _name_test_source(row: ReportRow) -> str:
    data = row.recipe.data
    sources = (data.test,) if data.test is not None else data.train_sources
    return " and ".join(
        f"{source.path} ({source.config_name})" if source.config_name else source.path
        for source in sources
    )


def _find_provenance(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Versions and the runner's source from the attempts that may have trained."""
    trained = [
        attempt
        for attempt in list_trained(attempts)
        if attempt.failure is None or attempt.failure.kind not in ("configuration", "data")
    ]
    names = dict.fromkeys(name for attempt in trained for name in attempt.versions)
    versions = {name: _join(attempt.versions.get(name) for attempt in trained) for name in names}
    hardware = {name: _join(one.hardware.get(name) for one in trained) for name in HARDWARE}
    return {
        "versions": _leave_out_none(versions),
        "hardware": _leave_out_none(hardware),
        "num_processes": _list_changes(attempt.num_processes for attempt in trained),
        "micro_batch_divisors": _list_changes(attempt.micro_batch_divisor for attempt in trained),
        "runner_is_dirty": _is_any([attempt.runner_is_dirty for attempt in trained]),
        **{
            name: _join(getattr(attempt, name, None) for attempt in trained)
            for name in ("source_hash", "runner_version", "runner_commit")
        },
    }


def _list_changes(values: Iterable[int]) -> tuple[int, ...]:
    """The values in order, without those equal to the previous one."""
    return tuple(value for value, _ in groupby(values))


def _is_any(claims: Sequence[bool | None]) -> bool | None:
    """True if any claim is; None if none is true and some are unknown."""
    if True in claims:
        return True
    return None if None in claims or not claims else False


def _join(values: Iterable[str | None]) -> str | None:
    known = dict.fromkeys(escape_controls(value) for value in values if value is not None)
    return " then ".join(known) or None


def _leave_out_none(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _find_split_hashes(samples: Any) -> dict[str, dict[str, str]]:
    """The hashes and counts of each split in `samples.json`."""
    splits = samples.get("splits") if isinstance(samples, Mapping) else None
    if not isinstance(splits, Mapping):
        return {}
    return {
        escape_controls(str(split)): {
            escape_controls(str(name)): escape_controls(str(value))
            for name, value in described.items()
            if isinstance(value, str | int)
        }
        for split, described in splits.items()
        if isinstance(described, Mapping)
    }


def _key_metrics(recipe: Recipe, contents: Mapping[str, str]) -> dict[str, str]:
    """A key for the code of each metric: the task, or a function by its files' content."""
    keys = dict.fromkeys(recipe.data.task.METRICS, f"the task {recipe.data.task.name}")
    for metric in recipe.evaluation.metrics:
        hashes = [contents.get(path) for path in metric.list_files().values()]
        keys[metric.name] = hash_json([metric.model_dump(mode="json"), hashes])
    return keys


def _find_ids_hash(samples: Any) -> str | None:
    try:
        return escape_controls(str(samples["splits"]["test"]["ids_hash"]))
    except (TypeError, LookupError):
        return None


def _build_scores(score: SplitScore | None) -> Scores:
    if score is None:
        return Scores()
    return Scores(
        nll_per_completion_token=_divide(score.completion_nll_sum, score.num_completion_tokens),
        nll_per_token=_divide(score.nll_sum, score.num_tokens),
        bits_per_byte=score.bits_per_byte if math.isfinite(score.completion_nll_sum) else None,
    )


def _divide(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None
