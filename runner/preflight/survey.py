"""One pass over the rows of a grid: over the distinct pairs of model and data, not one per recipe.

Owns which work recipes share, and what is collected. `rows` knows what is said of one row,
`check` how all of it is printed.
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
from runner.preflight.rows import RowFacts, SplitFacts, TokenizerFacts, find_row_doubts, sum_up
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

Value = TypeVar("Value")
# What does not decide which rows are drawn, and in what order: smaller training sets are prefixes
# of larger ones.
_NOT_OF_THE_DRAW: Final = {"num_train_samples": None, "max_length": 1, "truncation": "refuse"}
_PROGRESS_EVERY_SECONDS: Final = 5.0


@dataclass(frozen=True)
class CheckedRun:
    """One recipe whose rows are fit to be trained on."""

    recipe: Recipe
    splits: dict[str, SplitFacts]
    left_out: tuple[str, ...]
    schedule: Schedule
    metrics: tuple[MetricFacts, ...] = ()

    @property
    def name(self) -> str:
        """How it is called in warnings and errors."""
        return self.recipe.run.full_name


@dataclass
class CheckResult:
    """Everything found. Warnings, errors and notes map what is said once to the names of the runs
    that it is about.
    """

    num_recipes: int
    runs: list[CheckedRun] = field(default_factory=list)
    tokenizers: dict[str, TokenizerFacts] = field(default_factory=dict)  # by the model section
    warnings: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    # Keys of recipes that have no effect, which is nobody's mistake.
    notes: dict[str, list[str]] = field(default_factory=dict)
    # What was not looked at, because only the run's own device or model can tell.
    unchecked: dict[str, list[str]] = field(default_factory=dict)

    def warn(self, text: str, name: str) -> None:
        """A doubt about one run; the same doubt about several is said once."""
        self.warnings.setdefault(text, []).append(name)

    def fail(self, error: RunnerError, name: str) -> None:
        """What keeps one run from being trained."""
        self.errors.setdefault(str(error), []).append(name)

    def leave_unchecked(self, text: str, name: str) -> None:
        """What a run uses and nobody could look at."""
        self.unchecked.setdefault(text, []).append(name)


class _Once:
    """Calls a function once per key, and gives its value, or raises its error, as often as
    asked.
    """

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
    """A line on stderr every few seconds: silence of a minute looks like a hang."""

    def __init__(self, num_pairs: int) -> None:
        self._num_pairs = num_pairs
        self._num_done = 0
        self._shown_at = time.monotonic()

    def step(self, name: str) -> None:
        """One more pair of model and data is done."""
        self._num_done += 1
        if time.monotonic() - self._shown_at > _PROGRESS_EVERY_SECONDS:
            self._shown_at = time.monotonic()
            print(
                f"checked {self._num_done} of {self._num_pairs} pairs of model and data: {name}",
                file=sys.stderr,
            )


def check_recipes(
    recipes: Sequence[Recipe],
    output_root: Path = Path("runs"),
    allow_hint: str = "runner check --allow-code",
) -> CheckResult:
    """Load each tokenizer once, draw and mask each row once per tokenizer, and look at every
    recipe.

    The functions that recipes name run where they were allowed to under `output_root`; `allow_hint`
    is the command that allows them.
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
        _note_what_has_no_effect(result, recipe)
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
    """All that decides which rows a section means, also which of its splits are stated."""
    stated = [source.states_split for source in data.sources.values()]
    return f"{data.model_dump_json()} {stated}"


def _note_what_has_no_effect(result: CheckResult, recipe: Recipe) -> None:
    for source in recipe.data.sources.values():
        # What is wrong with a source is said when its rows are drawn.
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
    """The recipes whose functions are all there and may run."""
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
    """The paths of every named file that is not there, which are in one error."""
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
            f"  {path:<{width}}  {keys[path]} of {len(names)} recipes"
            for path, names in concerned.items()
        ]
        count = len(concerned)
        are = (
            "1 file that recipes name is" if count == 1 else f"{count} files that recipes name are"
        )
        error = DataError(
            f"{are} not there:\n" + "\n".join(lines),
            hint=hint_at_missing(concerned),
        )
        for name in dict.fromkeys(name for names in concerned.values() for name in names):
            result.fail(error, name)
    return {*concerned, *models}


class _Draws:
    """Draws the rows of all data sections that differ in nothing but counts and lengths at once."""

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
        except DataError:  # perhaps too few for the widest only
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
    """All recipes of one model on the same rows."""
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
    splits = {split: sum_up(rows) for split, rows in facts.items()}
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
    """Runs that would compute the same numbers: equal in all that matters, whatever their recipes
    call it.
    """
    twins: dict[str, list[CheckedRun]] = {}
    for run in result.runs:
        payload = build_digest_payload(run.recipe)
        del payload["data"], payload["loss"]
        for name in ("chat_template", "chat_template_kwargs", "template_date", "end_of_turn"):
            payload["model"].pop(name, None)  # what they print is in the ids
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
    """`(value, runs)` for each value of `key`, in the order in which they come first."""
    groups: dict[Any, list[CheckedRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.items())
