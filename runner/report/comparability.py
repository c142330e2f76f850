"""Refuses cells that are not comparable, and flags what else differs between compared runs.

There is one sentence for each kind of difference, not one for each pair. A fact that an older run
did not record counts as neither equal nor different; `find_not_recorded` reports it once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runner.recipe.identity import diff_payloads
from runner.report.cells import is_one_recipe
from runner.report.effects import Cell, Metric
from runner.report.row_scores import BITS_PER_BYTE, LIKELIHOODS
from runner.report.rows import ReportRow, axis_text, group_by_rules, group_by_test_rows
from runner.report.wording import describe_version, name_library, name_some
from runner.text import format_count

# Relative tolerance for two scores of one base model at step 0: sums in narrow dtypes depend on the
# batch and the device
_SAME_BASE: Final = 5e-3
_SAME_FLOAT32_BASE: Final = 1e-4
_HASH_CHARACTERS: Final = 12
# Recipe keys that set the number of updates directly
_STATES_UPDATES: Final = frozenset({"training.max_steps", "training.num_train_epochs"})

# Wording of flags that question whether the axis caused the difference
_NOT_ALONE: Final = "the difference is not due to"
_UNEVEN: Final = "only some pairs"
_SURVIVORS: Final = "survivors only"

Runs = tuple[ReportRow, ...]


@dataclass(frozen=True, eq=False)
class Arms:
    """The runs that an effect compares, for each pair of cells: reference and compared value."""

    axis: str
    reference: Any
    compared: Any
    pairs: tuple[tuple[Cell, Cell], ...]
    runs: tuple[tuple[Runs, Runs], ...]  # only runs that count, pair by pair

    @property
    def sides(self) -> tuple[Runs, Runs]:
        """All runs of the reference, and all of the compared value."""
        first = {run.recipe.run.full_name: run for runs, _ in self.runs for run in runs}
        second = {run.recipe.run.full_name: run for _, runs in self.runs for run in runs}
        return tuple(first.values()), tuple(second.values())

    @property
    def names(self) -> tuple[str, str]:
        """Both values with their axis, such as `loss=full`."""
        first, second = axis_text(self.reference), axis_text(self.compared)
        return f"{self.axis}={first}", f"{self.axis}={second}"

    @property
    def change(self) -> str:
        """The change of value, such as `num_train_samples 60 -> 180`."""
        return f"{self.axis} {axis_text(self.reference)} -> {axis_text(self.compared)}"


def find_pair_refusal(metric: Metric, first: Runs, second: Runs) -> str:
    """The reason why two cells are not comparable; empty if they are."""
    for runs in (first, second):
        if not is_one_recipe(runs):
            return (
                f"{_name(runs)} are in one cell, but their recipes differ in"
                f" {', '.join(_list_keys(runs[0], runs[-1]))}, not only in the seed"
            )
    runs = first + second
    return find_joint_refusal(metric, runs) or _find_other_tokenizers(metric, runs)


def find_joint_refusal(metric: Metric, runs: Runs) -> str:
    """The reason why runs of any arms cannot share one mean; empty if they can."""
    checks: tuple[Callable[[Metric, Runs], str], ...] = (
        _find_other_tasks,
        _find_other_rules,
        _find_other_test_rows,
        _find_other_bases,
        _find_other_functions,
    )
    return next(filter(None, (check(metric, runs) for check in checks)), "")


def _find_other_tasks(metric: Metric, runs: Runs) -> str:
    by_task = _group(runs, lambda run: run.task)
    if len(by_task) < 2:
        return ""
    return (
        f"{_list_sides(by_task)} are different tasks, so their scores cannot be subtracted or"
        " averaged"
    )


def _find_other_rules(metric: Metric, runs: Runs) -> str:
    by_rules = _group(runs, lambda run: run.rules)
    if len(by_rules) < 2:
        return ""
    sides = " and ".join(f"{_name(some)} (rules {rules})" for rules, some in by_rules.items())
    return f"{sides} follow different rules for rows and masks"


def _find_other_test_rows(metric: Metric, runs: Runs) -> str:
    by_rows = _group(
        (run for run in runs if run.test_rows_hash is not None), lambda run: run.test_rows_hash
    )
    if len(by_rows) < 2:
        return ""
    sides = " and ".join(_name(some) for some in by_rows.values())
    return f"{sides} were scored on different test rows"


_BASE_FACTS: Final[Mapping[str, Callable[[ReportRow], str | None]]] = {
    "commits": lambda run: run.commits.get("model.path"),
    "contents": lambda run: run.contents.get(run.recipe.model.path),
}


def _find_other_bases(metric: Metric, runs: Runs) -> str:
    """Find runs that name the same base model but started from different ones."""
    named: dict[str, list[ReportRow]] = {}
    for run in runs:
        named.setdefault(run.model_name, []).append(run)
    for model, same in named.items():
        for what, find in _BASE_FACTS.items():
            known = [run for run in same if find(run) is not None]
            by_value = _group(known, find)
            if len(by_value) > 1:
                sides = " and ".join(
                    f"{_name(some)} ({str(value)[:12]})" for value, some in by_value.items()
                )
                return f"{model} had two {what}, so {sides} have different base models"
        if other := _find_other_step_0(same):
            first, second = (run.base.nll_per_completion_token for run in other)
            return (
                f"{other[0].name} and {other[1].name} both name {model}, but score"
                f" {first:.4f} and {second:.4f} nats per completion token at step 0:"
                " these are different base models under one name"
            )
    return ""


def _find_other_step_0(runs: Sequence[ReportRow]) -> tuple[ReportRow, ReportRow] | None:
    """Two runs of one base model whose scores on the same tokens differ at step 0."""
    firsts: dict[tuple[str, ...], ReportRow] = {}
    for run in runs:
        score, key = run.base.nll_per_completion_token, run.step_0_key
        if score is None or key is None:
            continue
        first = firsts.setdefault(key, run)
        before = first.base.nll_per_completion_token
        assert before is not None
        if not is_same_base_score(run, before, score):
            return first, run
    return None


def is_same_base_score(run: ReportRow, first: float, second: float) -> bool:
    """True if two scores at step 0 may be of one base model, given the dtype of a run."""
    return math.isclose(first, second, rel_tol=get_base_tolerance(run))


def get_base_tolerance(run: ReportRow) -> float:
    """The relative tolerance of two base scores for the dtype of a run."""
    return _SAME_FLOAT32_BASE if run.recipe.model.dtype == "float32" else _SAME_BASE


def _find_other_functions(metric: Metric, runs: Runs) -> str:
    if not metric.is_of_answers:
        return ""
    by_key = _group(runs, lambda run: run.metric_keys.get(metric.name))
    if len(by_key) < 2:
        return ""
    sides = " and ".join(_name(some) for some in by_key.values())
    is_own = any(metric.name == one.name for run in runs for one in run.recipe.evaluation.metrics)
    return f"{sides} have different {f'functions for {metric.name}' if is_own else 'tasks'}"


def _find_other_tokenizers(metric: Metric, runs: Runs) -> str:
    """A sentence if the tokens differ: nats per token are comparable only on the same tokens.
    Differences within one base model are found from the counts of its rows.
    """
    if metric.name not in LIKELIHOODS or metric.name == BITS_PER_BYTE:
        return ""
    by_model = _group(runs, lambda run: run.model_name)
    read = {run.split_hashes.get("test", {}).get("input_ids_hash") for run in runs}
    if len(by_model) < 2 or (len(read) == 1 and None not in read):
        return ""
    return (
        f"{' and '.join(by_model)} use different tokens: {metric.unit} are not comparable, bits per"
        " byte are"
    )


def find_flags(arms: Arms) -> tuple[str, ...]:
    """Sentences on other differences between the runs of an effect, and on its limits."""
    if not arms.runs:
        return ()
    differences = count_recipe_differences(arms)
    return tuple(
        filter(
            None,
            (
                *_flag_recipes(arms, differences),
                *_flag_updates(arms, differences),
                _flag_tokens(arms),
                _flag_early_stops(arms),
                _flag_not_converged(arms),
                _flag_training_rows(arms, differences),
                _flag_contents(arms, differences),
                _flag_versions(arms),
                _flag_source(arms),
                _flag_missing(arms),
            ),
        )
    )


def flag_other_tokens(metric: Metric, arms: Arms) -> str:
    """A sentence if a mean combines nats per token of models whose tokens differ."""
    if metric.name not in LIKELIHOODS or metric.name == BITS_PER_BYTE:
        return ""
    by_tokens: dict[str, str] = {}
    for run in (run for side in arms.sides for run in side):
        read = run.split_hashes.get("test", {}).get("input_ids_hash")
        if read is not None and run.model_name not in by_tokens.values():
            by_tokens.setdefault(read, run.model_name)
    if len(by_tokens) < 2:
        return ""
    return (
        f"{_join(list(by_tokens.values()))} use different tokens: the mean combines different units"
    )


def questions_the_axis(flag: str) -> bool:
    """True if a flag must be reported with the effect, because something other than the axis may
    have caused it.
    """
    return any(words in flag for words in (_NOT_ALONE, _UNEVEN, _SURVIVORS))


def count_recipe_differences(arms: Arms) -> dict[str, int]:
    """`dotted key -> number of pairs` whose recipes differ there, the seed left out.

    Keys are in the order of the recipe, followed by files that both recipes name and whose content
    differed.
    """
    keys: list[str] = []
    for first, second in arms.runs:
        keys += _list_keys(first[0], second[0])
    return dict(Counter(keys))


def _list_keys(first: ReportRow, second: ReportRow) -> list[str]:
    lines = diff_payloads(first.payload, second.payload)
    shared = [path for path in first.contents if path in second.contents]
    lines += [
        f"content of {path}: " for path in shared if first.contents[path] != second.contents[path]
    ]
    return [line.partition(": ")[0] for line in lines]


def _flag_recipes(arms: Arms, differences: Mapping[str, int]) -> list[str]:
    """Flag keys that the axis changes together, and keys that it changes only in some pairs,
    which is probably a mistake.
    """
    if not differences:
        return [f"the recipes of {arms.change} differ only in the seed"]
    flags = []
    num_pairs = len(arms.runs)
    even = [key for key, count in differences.items() if count == num_pairs]
    if len(even) > 1:
        flags.append(f"{arms.change} changes {_join(even)} together")
    uneven = [
        f"{key} ({count} of {num_pairs})" for key, count in differences.items() if count < num_pairs
    ]
    if uneven:
        flags.append(f"{_UNEVEN} of {arms.change} differ in {_join(uneven)}")
    return flags


def _flag_updates(arms: Arms, differences: Mapping[str, int]) -> list[str]:
    if set(differences) <= _STATES_UPDATES:
        return []
    updates = _differ(arms, lambda run: None if _is_stopped_early(run) else run.updates)
    schedule = _differ(arms, lambda run: run.schedule_steps)
    both = updates is not None and updates == schedule
    flags = []
    if updates:
        also = "the number of updates and the length of the learning-rate schedule"
        what = also if both else "the number of updates"
        flags.append(
            f"{arms.change} also changes {what} ({updates[0]} -> {updates[1]}):"
            f" {_NOT_ALONE} {arms.axis} alone"
        )
    if schedule and not both:
        flags.append(
            f"{arms.change} also changes the length of the learning-rate schedule"
            f" ({schedule[0]} -> {schedule[1]} steps)"
        )
    return flags


def _flag_tokens(arms: Arms) -> str:
    tokens = _differ(arms, lambda run: run.num_trained_tokens)
    if not tokens:
        return ""
    return f"{arms.change} also changes the number of trained tokens ({tokens[0]} -> {tokens[1]})"


def _differ(arms: Arms, fact: Callable[[ReportRow], int | None]) -> tuple[str, str] | None:
    """The range of a fact in each arm if some pair of cells differs in it."""
    is_other = False
    for first, second in arms.runs:
        one, two = ({fact(run) for run in runs} - {None} for runs in (first, second))
        is_other = is_other or bool(one and two and one != two)
    if not is_other:
        return None
    first, second = arms.sides
    return _range(map(fact, first)), _range(map(fact, second))


def _range(values: Iterable[int | None]) -> str:
    known = sorted(value for value in values if value is not None)
    return f"{known[0]:,}" if known[0] == known[-1] else f"{known[0]:,} to {known[-1]:,}"


def _is_stopped_early(run: ReportRow) -> bool:
    return run.stop_reason == "early_stopping"


def _flag_early_stops(arms: Arms) -> str:
    if not any(_is_stopped_early(run) for runs in arms.sides for run in runs):
        return ""
    return f"early stopping ended {_count_in_arms(arms, _is_stopped_early)}"


def _flag_not_converged(arms: Arms) -> str:
    if not any(run.is_best_at_end for runs in arms.sides for run in runs):
        return ""
    counts = _count_in_arms(arms, lambda run: bool(run.is_best_at_end))
    return f"perhaps not converged: the best step is the last one in {counts}"


def _count_in_arms(arms: Arms, condition: Callable[[ReportRow], bool]) -> str:
    """A text such as `2 of 3 runs of loss=full and 0 of 3 of loss=completion`."""
    counts = [(sum(map(condition, runs)), len(runs)) for runs in arms.sides]
    (first, of_first), (second, of_second) = counts
    names = arms.names
    return (
        f"{first} of {format_count(of_first, 'run')} of {names[0]} and {second} of"
        f" {of_second} of {names[1]}"
    )


def _flag_training_rows(arms: Arms, differences: Mapping[str, int]) -> str:
    """Flag training rows that differ although no key of the recipes changes them."""
    if any(key.startswith(("data.", "content of")) for key in differences):
        return ""
    other = []
    for first, second in arms.runs:
        hashes = {run.split_hashes.get("train", {}).get("ids_hash") for run in first + second}
        if len(hashes - {None}) > 1:
            other.append(f"{first[0].name} and {second[0].name}")
    if not other:
        return ""
    return f"the training rows differ although the recipes select the same: {name_some(other)}"


def _flag_contents(arms: Arms, differences: Mapping[str, int]) -> str:
    """Flag test tokens that differ for the same rows and the same base model."""
    if any(key.startswith("model.") and key != "model.path" for key in differences):
        return ""  # the recipes already show it
    for first, second in arms.runs:
        if first[0].model_name != second[0].model_name:
            continue
        hashes = {run.split_hashes.get("test", {}).get("input_ids_hash") for run in first + second}
        if len(hashes - {None}) > 1:
            return "the test rows are the same, but their tokens (`input_ids`) are not"
    return ""


def _flag_versions(arms: Arms) -> str:
    runs = [run for side in arms.sides for run in side if run.versions]
    names = dict.fromkeys(name for run in runs for name in run.versions)
    other = []
    for name in names:
        by_version = Counter(run.versions.get(name, "not recorded") for run in runs)
        if len(by_version) > 1:
            counts = " and ".join(
                f"{describe_version(name, value)} ({count})" for value, count in by_version.items()
            )
            other.append(f"{name_library(name)} {counts}")
    return f"versions differ between the runs: {name_some(other, '; ')}" if other else ""


def _flag_source(arms: Arms) -> str:
    runs = [run for side in arms.sides for run in side if run.source_hash is not None]
    by_source = _group(runs, lambda run: run.source_hash)
    if len(by_source) < 2:
        return ""
    sides = " and ".join(
        f"{some[0].runner_version or 'unknown'} {str(source)[:12]} ({len(some)})"
        for source, some in by_source.items()
    )
    return f"the runs were made with different sources of the runner: {sides}"


def _flag_missing(arms: Arms) -> str:
    """Flag runs of the cells that have no score. An effect that is paired by seed may use even
    fewer runs; a note on its interval reports that.
    """
    missing = [why for pair in arms.pairs for cell in pair for why in cell.missing]
    if not missing:
        return ""
    is_survivors = any(
        run.state == "failed" for pair in arms.pairs for cell in pair for run in cell.runs
    )
    sides = arms.sides
    planned = [
        len({run.recipe.run.full_name for pair in arms.pairs for run in pair[side].runs})
        for side in (0, 1)
    ]
    counts = " and ".join(
        f"{len(runs)} of {format_count(of, 'run')} of {name}"
        for runs, of, name in zip(sides, planned, arms.names, strict=True)
    )
    what = _SURVIVORS if is_survivors else "not all runs have a score"
    return f"{what}: {counts} remain; missing: {name_some(dict.fromkeys(missing), '; ')}"


def find_not_recorded(rows: Sequence[ReportRow]) -> list[str]:
    """One sentence on facts that some completed runs did not record."""
    completed = [row for row in rows if row.state == "completed"]
    facts: Mapping[str, Callable[[ReportRow], Any]] = {
        "hash of the initial weights": lambda row: row.initial_weights_hash,
        "hash of the order of rows": lambda row: row.row_order_hash,
        "number of trained tokens": lambda row: row.num_trained_tokens,
        "source of the runner": lambda row: row.source_hash,
    }
    lacking = {name: sum(fact(row) is None for row in completed) for name, fact in facts.items()}
    named = [
        f"{name} ({count} of {format_count(len(completed), 'run')})"
        for name, count in lacking.items()
        if count
    ]
    return [f"not recorded, so equality is unknown: {', '.join(named)}"] if named else []


def find_other_scales(rows: Sequence[ReportRow]) -> list[str]:
    """Sentences on sets of runs whose numbers are not comparable with each other."""
    warnings = []
    if len(by_rules := group_by_rules(rows)) > 1:
        sets = [f"rules {rules}: {_name(runs)}" for rules, runs in by_rules.items()]
        warnings.append(
            f"{len(by_rules)} different versions of the rules for rows and masks;"
            f" runs are compared only within one version: {'; '.join(sets)}"
        )
    groups = group_by_test_rows(rows)
    unknown = groups.pop(None, [])
    if len(groups) > 1:
        sets = [
            f"{str(ids_hash)[:_HASH_CHARACTERS]} "
            f" ({format_count(runs[0].num_test_rows or 0, 'row')}): {_name(runs)}"
            for ids_hash, runs in groups.items()
        ]
        warnings.append(
            f"{len(groups)} different sets of test rows;"
            f" numbers are comparable only within one set: {name_some(sets, '; ')}"
        )
    if unknown:
        runs = "1 completed run" if len(unknown) == 1 else f"{len(unknown)} completed runs"
        warnings.append(f"no record of the test rows of {runs}: {_name(unknown)}")
    return warnings + list(dict.fromkeys(one for row in rows for one in row.base_warnings))


def _group(runs: Iterable[ReportRow], key: Callable[[ReportRow], Any]) -> dict[Any, Runs]:
    found: dict[Any, list[ReportRow]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return {value: tuple(some) for value, some in found.items()}


def _list_sides(groups: Mapping[Any, Runs]) -> str:
    return " and ".join(f"{value} ({_name(runs)})" for value, runs in groups.items())


def _name(runs: Sequence[ReportRow]) -> str:
    return name_some([run.name for run in runs])


def _join(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
