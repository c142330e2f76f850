"""Two arms compared row by row: the test rows that each wins, by length, group and base difficulty,
and the texts of each row.

A comparison is of two cells that differ on one axis; a row's score under an arm is the mean over
the seeds of its cell. Answers and references were recorded by the runs. Prompts are read from the
present data files under the same row ids, if those files are on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from runner.errors import RunnerError
from runner.files import hash_json
from runner.recipe.data_section import DataSection
from runner.report.effects import Cell, Effect, Metric, Report
from runner.report.labels import (
    choose_effects,
    describe_contrast,
    describe_source,
    list_places,
    name_panel,
)
from runner.report.row_scores import Floats
from runner.report.rows import Model, ReportRow, axis_text
from runner.report.wording import name_cell

NUM_BINS: Final = 4  # for lengths and difficulties
MAX_GROUPS: Final = 8
MAX_DATA_BYTES: Final = 64 * 2**20  # of files that are read again for the prompts


@dataclass(frozen=True)
class RowTexts:
    """The prompt, references and answers of a row; empty if not recorded."""

    prompt: str = ""
    references: tuple[str, ...] = ()
    base: str = ""
    reference: str = ""
    compared: str = ""


@dataclass(frozen=True)
class Part:
    """Some rows of a comparison, with the results of the compared arm on them."""

    name: str
    num_rows: int
    num_wins: int  # rows on which the compared arm is better
    num_ties: int
    mean_difference: float


@dataclass(frozen=True, eq=False)
class RowComparison:
    """The scores of each test row under two arms; arrays are in the order of `row_ids`."""

    source: str  # grid and task
    axis: str
    place: str  # the other axes
    title: str
    metric: Metric
    reference_name: str
    compared_name: str
    reference_cell: Cell
    compared_cell: Cell
    row_ids: tuple[str, ...]
    groups: tuple[str, ...]
    units: Floats
    base_scores: Floats  # NaN if the base has none
    reference_scores: Floats
    compared_scores: Floats
    is_declared: bool = False

    @cached_property
    def differences(self) -> Floats:
        """Compared minus reference."""
        return self.compared_scores - self.reference_scores

    @property
    def num_rows(self) -> int:
        """Number of rows with a score under both arms."""
        return len(self.row_ids)

    @cached_property
    def gains(self) -> Floats:
        """Differences with the sign that is above 0 if the compared arm is better."""
        return self.differences * (1 if self.metric.mode == "max" else -1)

    @property
    def num_wins(self) -> int:
        """Number of rows on which the compared arm is better."""
        return int((self.gains > 0).sum())

    @cached_property
    def order(self) -> list[int]:
        """Positions of rows by absolute difference, largest first."""
        return [int(at) for at in np.argsort(-np.abs(self.differences), kind="stable")]

    def list_parts(self) -> list[tuple[str, list[Part]]]:
        """The rows by length, by base difficulty and, if rows share groups, by group."""
        parts = []
        if len(np.unique(self.units)) > 1:
            what = "bytes" if self.metric.name == "bits_per_byte" else "tokens"
            parts.append((f"length in {what}", self._bin(self.units, digits=0)))
        if np.isfinite(self.base_scores).all() and len(np.unique(self.base_scores)) > 1:
            parts.append(("score of the base model", self._bin(self.base_scores, digits=3)))
        if 1 < len(set(self.groups)) < len(self.groups):
            parts.append(("group", self._group()))
        return [(what, those) for what, those in parts if len(those) > 1]

    def _bin(self, values: Floats, digits: int) -> list[Part]:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_BINS + 1)))
        places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        parts = []
        for at in range(len(edges) - 1):
            name = f"{edges[at]:.{digits}f} to {edges[at + 1]:.{digits}f}"
            parts += self._describe(name, places == at)
        return parts

    def _group(self) -> list[Part]:
        groups = np.array(self.groups)
        names, counts = np.unique(groups, return_counts=True)
        largest = names[np.argsort(-counts, kind="stable")][:MAX_GROUPS]
        parts = [part for name in largest for part in self._describe(str(name), groups == name)]
        rest = ~np.isin(groups, largest)
        return parts + self._describe(f"{len(names) - len(largest)} other groups", rest)

    def _describe(self, name: str, chosen: Any) -> list[Part]:
        number = int(chosen.sum())
        if not number:
            return []
        gains = self.gains[chosen]
        wins, ties = int((gains > 0).sum()), int((gains == 0).sum())
        return [Part(name, number, wins, ties, float(self.differences[chosen].mean()))]


def build_row_comparisons(report: Report) -> list[RowComparison]:
    """A comparison for each pair of cells that an effect compares, declared contrasts
    first, then in the order of the report.
    """
    scores = _CellScores()
    found: dict[tuple[int, int, str], RowComparison] = {}
    for grid, task in list_places(report):
        source = describe_source(report, grid, task)
        for effects in choose_effects(report, grid, task):
            declared = effects.pooled is not None and effects.pooled.is_confirmatory
            for effect in effects.cells:
                for pair in effect.pairs:
                    key = (id(pair[0]), id(pair[1]), effects.metric.name)
                    if key not in found and not effect.refused:
                        one = _compare(source, effect, pair, scores)
                        if one is not None:
                            is_declared = declared or effect.is_confirmatory
                            found[key] = replace(one, is_declared=is_declared)
    return sorted(found.values(), key=lambda one: not one.is_declared)


@dataclass(frozen=True, eq=False)
class _MeanScores:
    """The mean score of each row over the runs of a cell, NaN for a row without units."""

    row_ids: tuple[str, ...]
    groups: tuple[str, ...]
    means: Floats
    units: Floats


class _CellScores:
    """Computes mean scores of rows over the runs of a cell, each only once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Model, str], _MeanScores | None] = {}

    def find(self, cell: Cell, model: Model, metric: str) -> _MeanScores | None:
        """The means; None if a run has no per-row scores, or if the rows differ."""
        key = (id(cell), model, metric)
        if key not in self._known:
            self._known[key] = self._load(cell, model, metric)
        return self._known[key]

    def _load(self, cell: Cell, model: Model, metric: str) -> _MeanScores | None:
        loaded = [run.load_scores(model) for run in cell.runs if run.state == "completed"]
        scores = [one for one in loaded if one is not None and metric in one.sums]
        if not scores or any(one.row_ids != scores[0].row_ids for one in scores):
            return None
        units = scores[0].units[metric]
        total = np.mean([one.sums[metric] for one in scores], axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(units > 0, total / units, np.nan)
        return _MeanScores(scores[0].row_ids, scores[0].groups, means, units)


def _compare(
    source: str, effect: Effect, pair: tuple[Cell, Cell], scores: _CellScores
) -> RowComparison | None:
    metric = effect.metric.name
    first, second = (scores.find(cell, "tuned", metric) for cell in pair)
    if first is None or second is None:
        return None
    positions = {row_id: at for at, row_id in enumerate(second.row_ids)}
    reference = first.means
    places = np.array([positions.get(row_id, -1) for row_id in first.row_ids], dtype=int)
    compared = np.where(places >= 0, second.means[places], np.nan)
    kept = np.flatnonzero(np.isfinite(reference) & np.isfinite(compared))
    if not len(kept):
        return None
    base = scores.find(pair[0], "base", metric)
    is_same = base is not None and base.row_ids == first.row_ids
    base_scores = base.means if base is not None and is_same else np.full(len(reference), np.nan)
    others = {axis: value for axis, value in pair[0].axes.items() if axis != effect.axis}
    place = name_cell(others)
    return RowComparison(
        source=source,
        axis=effect.axis,
        place=name_panel(others) or effect.axis,
        title=f"{describe_contrast(effect)}{f', at {place}' if place else ''}",
        metric=effect.metric,
        reference_name=axis_text(effect.reference),
        compared_name=axis_text(effect.compared),
        reference_cell=pair[0],
        compared_cell=pair[1],
        row_ids=tuple(first.row_ids[at] for at in kept),
        groups=tuple(first.groups[at] for at in kept),
        units=first.units[kept],
        base_scores=base_scores[kept],
        reference_scores=reference[kept],
        compared_scores=compared[kept],
    )


class TextSource:
    """Finds the texts of rows. Files are read once; unreadable ones yield no text."""

    def __init__(self) -> None:
        self._prompts: dict[str, dict[str, RowTexts]] = {}
        self._answers: dict[tuple[int, Model], dict[str, Mapping[str, Any]]] = {}

    def find(self, one: RowComparison) -> dict[str, RowTexts]:
        """Row id -> texts for one comparison; answers are of the first run of each cell."""
        texts = dict(self._load_prompts(one.reference_cell.runs[0]))
        answers = {
            "base": self._load_answers(one.reference_cell, "base"),
            "reference": self._load_answers(one.reference_cell, "tuned"),
            "compared": self._load_answers(one.compared_cell, "tuned"),
        }
        found = {}
        for row_id in one.row_ids:
            given = {name: rows[row_id] for name, rows in answers.items() if row_id in rows}
            row = texts.get(row_id, RowTexts())
            references = [_read_texts(answer.get("references")) for answer in given.values()]
            said = {name: str(answer["prediction"]) for name, answer in given.items()}
            found[row_id] = RowTexts(
                row.prompt, references[0] if references else row.references, **said
            )
        return found

    def _load_answers(self, cell: Cell, model: Model) -> dict[str, Mapping[str, Any]]:
        key = (id(cell), model)
        if key not in self._answers:
            rows: list[dict[str, Any]] = []
            for run in cell.runs:
                if run.state == "completed" and run.answers:
                    try:
                        rows = run.load_predictions(model)
                    except (RunnerError, OSError):
                        continue
                    break
            self._answers[key] = {
                str(row["row_id"]): row for row in rows if "row_id" in row and "prediction" in row
            }
        return self._answers[key]

    def _load_prompts(self, run: ReportRow) -> dict[str, RowTexts]:
        """The prompt and last completion of each test row by row id. An id is a hash of the
        row's content, so a row with this id is the row that the run was tested on.
        """
        data = run.recipe.data
        stated = data.model_dump(mode="json", exclude={"num_train_samples", "seed", "max_length"})
        key = hash_json(stated)
        if key not in self._prompts:
            self._prompts[key] = _draw_texts(data)
        return self._prompts[key]


def _draw_texts(data: DataSection) -> dict[str, RowTexts]:
    """Read texts; none if that needs the project's own code, the network or much time."""
    from runner.data.draw import draw_splits

    paths = [Path(source.path) for source in data.sources.values()]
    if data.task.name == "python" or sum(map(_measure, paths)) > MAX_DATA_BYTES:
        return {}
    try:
        drawn = draw_splits(data).test
    except (RunnerError, OSError):
        return {}
    found = {}
    for raw in drawn:
        *before, last = raw.messages if raw.turn is None else raw.messages[: raw.turn + 1]
        turns = [(str(one["role"]), str(one.get("content", ""))) for one in before]
        prompt = "\n\n".join(f"{role}: {text}" for role, text in turns)
        if len(turns) == 1:
            prompt = turns[0][1]
        found[raw.row_id] = RowTexts(prompt, raw.references or (str(last.get("content", "")),))
    return found


def _measure(path: Path) -> float:
    """The bytes of a file or of the files in a folder; infinite if it is missing."""
    if path.is_file():
        return path.stat().st_size
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return sum(file.stat().st_size for file in files) if files else math.inf


def _read_texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()
