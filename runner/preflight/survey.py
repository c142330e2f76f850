"""One pass over the rows of a grid, by distinct pairs of model and data instead of by recipe.

Owns the sharing of work between recipes and the collected result. `rows` owns the facts of one row,
`check` the output.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from runner.checkpoints.remote import open_run_folder
from runner.data.draw import SPLITS, RawSplits, draw_splits
from runner.data.rows import refuse_same_tokens
from runner.data.sources import go_offline_without_network
from runner.data.tokenizer import load_tokenizer
from runner.errors import DataError, RunnerError
from runner.files import hash_json
from runner.preflight.metrics import (
    MetricFacts,
    find_metric_doubts,
    measure_metrics,
)
from runner.preflight.rows import (
    RowFacts,
    SplitFacts,
    TokenizerFacts,
    find_row_doubts,
    summarize_rows,
)
from runner.recipe.contents import hint_at_missing, list_content_paths, list_missing_files
from runner.recipe.data_files import find_source_files
from runner.recipe.data_section import DataSection
from runner.recipe.hub import list_hub_names
from runner.recipe.identity import build_digest_payload
from runner.recipe.parse import Recipe
from runner.recipe.schedule import Schedule, derive_schedule, find_changed_updates, find_doubts
from runner.recipe.schema import ModelSection
from runner.recipe.trackers import require_trackers
from runner.run.allowed_code import load_code
from runner.text import format_count

Value = TypeVar("Value")
# Keys that do not change which rows are drawn or their order: smaller training sets are prefixes of
# larger ones.
_NOT_OF_THE_DRAW: Final = {"num_train_samples": None, "max_length": 1, "truncation": "refuse"}
_PROGRESS_EVERY_SECONDS: Final = 5.0


@dataclass(frozen=True)
class CheckedRun:
    """One recipe whose rows can be trained on."""

    recipe: Recipe
    splits: dict[str, SplitFacts]
    left_out: tuple[str, ...]
    schedule: Schedule
    metrics: tuple[MetricFacts, ...] = ()

    @property
    def name(self) -> str:
        """The run's name in warnings and errors."""
        return self.recipe.run.full_name


@dataclass
class CheckResult:
    """All findings. Warnings, errors and notes map each text to the names of the runs concerned."""

    num_recipes: int
    runs: list[CheckedRun] = field(default_factory=list)
    tokenizers: dict[str, TokenizerFacts] = field(default_factory=dict)  # by the model section
    warnings: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    # Keys that have no effect although nothing is wrong.
    notes: dict[str, list[str]] = field(default_factory=dict)
    # Not checked, because it needs the run's own device or model.
    unchecked: dict[str, list[str]] = field(default_factory=dict)

    def warn(self, text: str, name: str) -> None:
        """Add a warning about one run; a warning about several runs is printed once."""
        self.warnings.setdefault(text, []).append(name)

    def fail(self, error: RunnerError, name: str) -> None:
        """Add an error that prevents one run from being trained."""
        self.errors.setdefault(str(error), []).append(name)

    def leave_unchecked(self, text: str, name: str) -> None:
        """Add something that a run uses and that could not be checked."""
        self.unchecked.setdefault(text, []).append(name)


class _Once:
    """Calls a function once per key, and returns its value or raises its error on every call."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Any] = {}

    def __call__(self, key: str, function: Callable[[], Value]) -> Value:
        if key not in self._outcomes:
            try:
                self._outcomes[key] = function()
            except RunnerError as error:
                self._outcomes[key] = error
        outcome = self._outcomes[key]
        if isinstance(outcome, RunnerError):
            raise outcome
        value: Value = outcome
        return value


class _Progress:
    """Prints a line to stderr every few seconds, because a silent minute looks like a hang."""

    def __init__(self, num_pairs: int) -> None:
        self._num_pairs = num_pairs
        self._num_done = 0
        self._shown_at = time.monotonic()

    def step(self, name: str) -> None:
        """Count one more pair of model and data."""
        self._num_done += 1
        if time.monotonic() - self._shown_at > _PROGRESS_EVERY_SECONDS:
            self._shown_at = time.monotonic()
            print(
                f"checked {self._num_done} of {format_count(self._num_pairs, 'pair')} of model and"
                f" data: {name}",
                file=sys.stderr,
            )


def check_recipes(
    recipes: Sequence[Recipe],
    output_root: Path = Path("runs"),
    allow_hint: str = "runner check --allow-code",
) -> CheckResult:
    """Load each tokenizer once, draw and mask each row once per tokenizer, and check every recipe.

    The recipes' functions run if they were allowed under `output_root`; `allow_hint` is the command
    that allows them.
    """
    result = CheckResult(len(recipes))
    if any(map(list_hub_names, recipes)):
        go_offline_without_network()
    missing = _find_missing_files(recipes, result)
    recipes = _load_functions(recipes, output_root, allow_hint, missing, result)
    draws = _Draws([recipe.data for recipe in recipes])
    once = _Once()
    pairs: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in recipes:
        pairs.setdefault((recipe.model.model_dump_json(), _describe_data(recipe.data)), []).append(
            recipe
        )
        _note_ineffective(result, recipe)
        try:
            require_trackers(recipe)
            open_run_folder(recipe)
        except RunnerError as error:
            _fail_all(result, error, [recipe])
    progress = _Progress(len(pairs))
    for (model_key, _), group in pairs.items():
        model, data = group[0].model, group[0].data
        tokenizer, raw = None, None
        try:
            if not missing & set(_own_paths(group[0], "model")):
                tokenizer = once(model_key, partial(_load_tokenizer_facts, model))
        except RunnerError as error:
            _fail_all(result, error, group)
        try:
            if not missing & set(_own_paths(group[0], "data")):
                raw = draws.draw(data)
        except RunnerError as error:
            _fail_all(result, error, group)
        if tokenizer is not None and raw is not None:
            result.tokenizers[model_key] = tokenizer
            _check_pair(result, group, tokenizer, raw, once)
        progress.step(f"{model.path} on {data.train_sources[0].path}")
    _find_twins(result)
    for text, names in find_changed_updates([(run.recipe, run.schedule) for run in result.runs]):
        result.warnings[text] = names
    return result


def _describe_data(data: DataSection) -> str:
    """Everything that decides which rows a section selects, including which splits it states."""
    stated = [source.states_split for source in data.sources.values()]
    return f"{data.model_dump_json()} {stated}"


def _note_ineffective(result: CheckResult, recipe: Recipe) -> None:
    for source in recipe.data.sources.values():
        # Problems of a source are reported when its rows are drawn.
        with suppress(DataError):
            notes = find_source_files(source).notes if Path(source.path).exists() else ()
            for note in notes:
                result.notes.setdefault(note, []).append(recipe.run.full_name)


def _load_functions(
    recipes: Sequence[Recipe],
    output_root: Path,
    allow_hint: str,
    missing: Set[str],
    result: CheckResult,
) -> list[Recipe]:
    """The recipes whose functions all exist and may run."""
    ready = []
    for recipe in recipes:
        if missing.isdisjoint(recipe.list_python_files().values()):
            try:
                ready.append(load_code(recipe, output_root, allow_hint))
            except RunnerError as error:
                _fail_all(result, error, [recipe])
    return ready


def _load_tokenizer_facts(model: ModelSection) -> TokenizerFacts:
    return TokenizerFacts(load_tokenizer(model))


def _fail_all(result: CheckResult, error: RunnerError, group: Sequence[Recipe]) -> None:
    for recipe in group:
        result.fail(error, recipe.run.full_name)


def _own_paths(recipe: Recipe, section: str) -> list[str]:
    return [
        path for key, path in list_content_paths(recipe).items() if key.startswith(f"{section}.")
    ]


def _find_missing_files(recipes: Sequence[Recipe], result: CheckResult) -> set[str]:
    """The paths of all missing files that recipes name; one error lists them."""
    concerned: dict[str, list[str]] = {}
    keys: dict[str, str] = {}
    models: set[str] = set()  # also folders that lack a file
    for recipe in recipes:
        for key, path in list_missing_files(recipe).items():
            concerned.setdefault(path, []).append(recipe.run.full_name)
            keys[path] = key
            models |= {recipe.model.path} if key == "model.path" else set()
    if concerned:
        width = max(map(len, concerned))
        lines = [
            f"  {path:<{width}}  {keys[path]} of {format_count(len(names), 'recipe')}"
            for path, names in concerned.items()
        ]
        count = len(concerned)
        are = (
            "1 file that recipes name is" if count == 1 else f"{count} files that recipes name are"
        )
        error = DataError(
            f"{are} missing:\n" + "\n".join(lines),
            hint=hint_at_missing(concerned),
        )
        for name in dict.fromkeys(name for names in concerned.values() for name in names):
            result.fail(error, name)
    return {*concerned, *models}


class _Draws:
    """Draws rows once for all data sections that differ only in counts and lengths."""

    def __init__(self, sections: Sequence[DataSection]) -> None:
        self._once = _Once()
        self._counts: dict[str, set[int | None]] = {}
        for data in sections:
            self._counts.setdefault(self._key(data), set()).add(data.num_train_samples)

    @staticmethod
    def _key(data: DataSection) -> str:
        return _describe_data(data.model_copy(update=_NOT_OF_THE_DRAW))

    def draw(self, data: DataSection) -> RawSplits:
        """The rows of one section. Raises: DataError, as `draw_splits` does."""
        counts = self._counts[self._key(data)]
        widest = None if None in counts else max(count for count in counts if count is not None)
        try:
            raw = self._draw(data, widest)
        except DataError:  # perhaps there are too few only for the largest
            return self._draw(data, data.num_train_samples)
        return replace(raw, train=raw.train[: data.num_train_samples])

    def _draw(self, data: DataSection, count: int | None) -> RawSplits:
        task = data.task.for_check()
        wanted = data.model_copy(update={"num_train_samples": count, "task": task})
        return self._once(f"{self._key(data)} {count}", lambda: draw_splits(wanted))


def _check_pair(
    result: CheckResult,
    group: Sequence[Recipe],
    tokenizer: TokenizerFacts,
    raw: RawSplits,
    once: _Once,
) -> None:
    """Check all recipes with one model on the same rows."""
    facts: dict[str, list[RowFacts]] = {}
    try:
        for split in SPLITS:
            facts[split] = tokenizer.facts_of(getattr(raw, split), split, group[0].data)
        used = {split: [row for row in rows if row.is_used] for split, rows in facts.items()}
        refuse_same_tokens(
            {
                split: [(row.where, row.whole_hash) for row in rows if row.is_last_turn]
                for split, rows in used.items()
            }
        )
    except RunnerError as error:
        _fail_all(result, error, group)
        return
    splits = {split: summarize_rows(rows) for split, rows in facts.items()}
    doubts = find_row_doubts(group[0].model, tokenizer, facts, splits)
    for recipe in group:
        key = f"{_describe_data(recipe.data)} {recipe.evaluation.model_dump_json()}"
        try:
            measured = once(key, partial(measure_metrics, recipe, raw))
        except RunnerError as error:
            _fail_all(result, error, [recipe])
            continue
        run = CheckedRun(
            recipe,
            splits,
            tuple(raw.left_out.describe()),
            derive_schedule(recipe, splits["train"].num_rows),
            measured,
        )
        result.runs.append(run)
        for doubt in [*doubts, *find_doubts(recipe, run.schedule), *find_metric_doubts(measured)]:
            result.warn(doubt, run.name)


def _find_twins(result: CheckResult) -> None:
    """Warn about runs that would compute the same numbers, however their recipes put it."""
    twins: dict[str, list[CheckedRun]] = {}
    for run in result.runs:
        payload = build_digest_payload(run.recipe)
        del payload["data"], payload["loss"]
        for name in ("chat_template", "chat_template_kwargs", "template_date", "end_of_turn"):
            payload["model"].pop(name, None)  # their effect is in the ids
        rows = {
            split: [
                facts.ids_hash,
                facts.mask_hashes[run.recipe.loss if split == "train" else "completion"],
            ]
            for split, facts in run.splits.items()
        }
        twins.setdefault(hash_json({"recipe": payload, "rows": rows}), []).append(run)
    for group in twins.values():
        if len(group) > 1:
            labels = Counter(run.recipe.loss for run in group)
            why = (
                " although their losses differ: they train the same tokens"
                if len(labels) > 1
                else ""
            )
            names = ", ".join(run.name for run in group)
            for run in group:
                result.warn(f"these runs are the same experiment{why}: {names}", run.name)


def group_runs(runs: Sequence[CheckedRun], key: Any) -> list[tuple[Any, list[CheckedRun]]]:
    """`(value, runs)` for each value of `key`, in order of first occurrence."""
    groups: dict[Any, list[CheckedRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.items())
