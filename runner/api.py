"""The Python interface for notebooks and scripts: `load_recipe`, `load_runs` and `build_report`.

It reads and never writes or launches. Numbers and states are those of `runner report` and `runner
status`, because both read by the same functions. Importing it does not import torch.
"""

from __future__ import annotations

import glob
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.errors import RunnerError
from runner.files import load_jsonl
from runner.plan.read import ReadRun, read_runs
from runner.plan.select import UnreadableRun, label_value, match_axes, select_recipes
from runner.plan.status import NOT_VERIFIABLE, State, is_verifiable, verify_files
from runner.project_folder import check_settings, entering, find_project_above, is_same_folder
from runner.recipe import parse
from runner.recipe.cache import RecipeCache
from runner.recipe.contents import KnownContents
from runner.recipe.parse import Recipe
from runner.run.base_scores import find_other_base_scores
from runner.run.paths import RunPaths, content_cache_path, find_output_root, recipe_cache_path
from runner.run.result import TrainResult
from runner.run.siblings import find_absent, find_moved, list_loaded
from runner.strict import thaw
from runner.text import format_count

if TYPE_CHECKING:
    from runner.report.effects import Report

__all__ = ["build_report", "load_recipe", "load_runs"]

StrPath = str | os.PathLike[str]
# The current folder belongs to the whole process: two threads that read runs take turns.
_folder_lock: Final = threading.RLock()


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """One run: its recipe, its state, and the numbers that it recorded."""

    recipe: Recipe
    run_dir: Path  # absolute; it may not exist yet
    status: State  # "completed", "running", "interrupted", ..., as in `runner status`
    why: str  # the reason for the status, in one sentence
    result: TrainResult | None  # None unless the run is completed
    _read: ReadRun

    @property
    def name(self) -> str:
        """`<grid>/<run name>`."""
        return self.recipe.run.full_name

    @property
    def axes(self) -> dict[str, Any]:
        """The run's cell of the grid: axis -> value."""
        axes: dict[str, Any] = thaw(self.recipe.run.axes)
        return axes

    @property
    def model_path(self) -> Path | None:
        """The exported model or adapter; None if the run is not completed or it was removed."""
        model_dir = RunPaths(self.run_dir).model_dir
        return model_dir if self.status == "completed" and model_dir.is_dir() else None

    def metrics(self) -> list[dict[str, Any]]:
        """Losses and evaluations, one dict for each recorded step, in nats per token.

        Also of a run that is not completed; empty if nothing is recorded yet.

        Raises:
            CorruptFileError: the file is damaged.
        """
        return load_jsonl(RunPaths(self.run_dir).metrics_path)

    def eval_rows(self) -> list[dict[str, Any]]:
        """One dict for each test row and model ("base" or "tuned"): summed NLLs in nats, and token
        counts. Empty unless the run is completed.

        Raises:
            CorruptFileError: the file is damaged.
        """
        return self._load(RunPaths(self.run_dir).eval_rows_path)

    def predictions(self) -> list[dict[str, Any]]:
        """One dict for each generated answer: the row, the model ("base" or "tuned"), the text and
        its scores. Empty unless the run is completed and its recipe generates answers.

        Raises:
            CorruptFileError: the file is damaged.
        """
        return self._load(RunPaths(self.run_dir).predictions_path)

    def _load(self, path: Path) -> list[dict[str, Any]]:
        return load_jsonl(path) if self.status == "completed" else []

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.status})"


class ReportTables:
    """The conclusions that runs allow, as plain data.

    `pandas.DataFrame(report.rows)` and `pandas.DataFrame(report.effects)` work as they are. A
    notebook shows the object as the Markdown of `runner report`.
    """

    verdicts: list[str]  # the answer in sentences, declared contrasts first
    warnings: list[str]
    rows: list[dict[str, Any]]  # one per run, with the columns of `runner report --format csv`
    effects: list[dict[str, Any]]  # one per effect; those that answer have `is_answer`

    def __init__(self, report: Report, warnings: Sequence[str]) -> None:
        from runner.report.tables import list_effects, list_rows

        self._report = report
        self.verdicts = list(report.verdicts)
        self.warnings = [*report.warnings, *warnings]
        self.rows = list_rows(report)
        self.effects = list_effects(report)

    def _repr_markdown_(self) -> str:
        from runner.report.format import FORMATS

        return FORMATS["md"](self._report)

    def __repr__(self) -> str:
        return (
            f"ReportTables({format_count(len(self.rows), 'row')},"
            f" {format_count(len(self.effects), 'effect')})"
        )


def load_recipe(path: StrPath, overrides: str | Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, checked; `overrides` are `key=value`, as on the command line.

    Its sections are attributes: `load_recipe("recipes/demo/a.yaml").training.learning_rate`.

    Raises:
        RecipeError: all problems together, with lines and dotted keys.
    """
    return parse.load_recipe(Path(path), _list_texts(overrides))


def load_runs(
    paths: StrPath | Iterable[StrPath],
    *,
    where: Mapping[str, Any] | None = None,
    output_root: StrPath = "runs",
    verify: bool = False,
) -> list[Run]:
    """The runs of recipe files, run directories, folders or globs of them, or names of grids and
    runs, each once and in order.

    `where` keeps the runs with these axis values; a list, or anything else that holds values, has
    alternatives: `where={"loss": "completion", "seed": [1, 2]}`. `verify` reads every byte that
    completed runs recorded, as `runner report --verify` does. A run that cannot be read is left out
    with a Python warning.

    Paths are relative to the current folder, as everywhere in Python, and `output_root` to the
    project that the paths are in. The current folder changes to the project while runs are read.
    Threads may call this function at the same time, and take turns; other code in another thread
    would notice the change.

    Raises:
        RunnerError: a path names nothing, a recipe is wrong, or `where` matches nothing.
    """
    texts = _list_texts(paths)
    conditions = _list_conditions(where)
    shown = " and ".join(f"{axis}={','.join(labels)}" for axis, labels in conditions)
    by_project: dict[Path, list[str]] = {}
    found: dict[Path, Run] = {}
    with _folder_lock:
        for text in texts:
            project, inside = _find_project(text)
            by_project.setdefault(project, []).append(inside)
        for project, inside_texts in by_project.items():
            with entering(project):
                for run in _load_inside(inside_texts, Path(output_root), conditions, shown, verify):
                    found.setdefault(Path(os.path.realpath(run.run_dir)), run)
    return list(found.values())


def build_report(
    runs: Iterable[Run], *, metrics: str | Sequence[str] | None = None, rows_fixed: bool = False
) -> ReportTables:
    """The verdicts, rows and effects of `runner report` for these runs.

    A run that is given twice counts once. `metrics` are compared instead of those that fit; with
    `rows_fixed`, intervals describe these test rows only.

    Raises:
        RunnerError: no run has a metric of that name.
    """
    from runner.report.build import build_report as build
    from runner.report.rows import build_rows, name_other_base_scores, require_metrics

    read = list(_by_folder(runs).values())
    dirs = [(recipe.run.grid, facts.paths.run_dir) for recipe, facts, _ in read]
    roots = sorted({find_output_root(run_dir) for _, run_dir in dirs})
    rows = name_other_base_scores(
        build_rows(read), [one for root in roots for one in find_other_base_scores(root)]
    )
    names = None if metrics is None else _list_texts(metrics)
    require_metrics(names, rows)
    report = build(rows, metrics=names, rows_fixed=rows_fixed, absent=find_absent(dirs))
    return ReportTables(report, _list_warnings(read))


def _find_project(text: str) -> tuple[Path, str]:
    """The project of an argument, and the argument as it is written inside the project."""
    here = Path.cwd()
    matches = [text] if os.path.lexists(text) else glob.glob(text, recursive=True)
    if matches:
        text = os.path.abspath(text)
        project = find_project_above(Path(os.path.abspath(matches[0])))
    else:  # a name, or nothing
        project = find_project_above(here)
    if project is None:
        return here, text
    check_settings(project)
    if not is_same_folder(project, here) and os.path.isabs(text):
        text = os.path.relpath(text, project) if Path(text).is_relative_to(project) else text
    return project, text


def _by_folder(runs: Iterable[Run]) -> dict[str, ReadRun]:
    """The runs by run directory, so that each is there once.

    Raises:
        TypeError: one of them is no run.
    """
    found: dict[str, ReadRun] = {}
    for run in [runs] if isinstance(runs, Run | str) else runs:
        if not isinstance(run, Run):
            raise TypeError(f"got {run!r}, expected the runs that `load_runs` returns")
        found.setdefault(os.path.realpath(run.run_dir), run._read)
    return found


def _list_texts(values: StrPath | Iterable[StrPath]) -> list[str]:
    """Texts or paths as a list of texts; a single one may come without a list.

    Raises:
        TypeError: one of them is neither.
    """
    texts = []
    for value in [values] if isinstance(values, str | bytes | os.PathLike) else values:
        text = os.fspath(value)
        if not isinstance(text, str):
            raise TypeError(f"got {value!r}, expected a text or a path")
        texts.append(text)
    return texts


def _list_conditions(where: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    """`where` as axes and texts of values, as they are typed on a command line.

    Raises:
        TypeError: it is no mapping, or an axis has no name.
        RunnerError: an axis has no value.
    """
    if where is None:
        return []
    if not isinstance(where, Mapping):
        raise TypeError(f'got {where!r} as `where`, expected a dict such as {{"seed": [1, 2]}}')
    conditions = []
    for axis, values in where.items():
        if not isinstance(axis, str):
            raise TypeError(f"got {axis!r} as an axis of `where`, expected a text")
        # An axis value is a text, a number, a boolean or None, so whatever holds several values
        # has alternatives.
        is_one = isinstance(values, str) or not isinstance(values, Iterable)
        labels = [_label(value) for value in ([values] if is_one else values)]
        if not labels:
            raise RunnerError(
                f"`where` has no value for the axis {axis!r}, so no run matches",
                hint="leave the axis out to keep all of its values",
            )
        conditions.append((axis, labels))
    return conditions


def _label(value: Any) -> str:
    """An axis value as it is typed on a command line; NumPy's scalars like Python's."""
    item = getattr(value, "item", None)
    return label_value(item() if callable(item) else value)


def _load_inside(
    texts: Sequence[str],
    output_root: Path,
    conditions: Sequence[tuple[str, Sequence[str]]],
    shown: str,
    verify: bool,
) -> list[Run]:
    """The runs, read in the current folder, which is their project."""
    unreadable: list[UnreadableRun] = []
    # The cache of recipes is used and never saved: this module does not write.
    cache = RecipeCache(recipe_cache_path(output_root))
    selected = select_recipes(
        texts, output_root, unreadable=unreadable, load=cache.load, prefer="both"
    )
    known = KnownContents(content_cache_path(output_root))
    absolute = [
        replace(
            one,
            paths=RunPaths(one.paths.run_dir.absolute()),
            source_path=one.source_path.absolute(),
        )
        for one in match_axes(selected, conditions, shown)
    ]
    runs = []
    for read in read_runs(absolute, known):
        recipe, facts, status = read
        if verify:
            if status.state == "completed" and not is_verifiable(facts):
                _warn(f"{recipe.run.full_name} {NOT_VERIFIABLE}")
            status = verify_files(facts, status)
            read = recipe, facts, status
        result = facts.result if status.state == "completed" else None
        run_dir = facts.paths.run_dir
        runs.append(Run(recipe, run_dir, status.state, status.why, result, read))
    for lost in unreadable:
        _warn(f"{lost.full_name} is unreadable and left out: {lost.why}")
    for path in sorted(known.outdated):
        _warn(
            f"{path} was modified after its content was last read, and is not read here; runs that"
            " use it may be changed"
        )
    return runs


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _list_warnings(read: Sequence[ReadRun]) -> list[str]:
    """Warnings about the runs themselves, which `runner report` prints to stderr."""
    loaded = []
    found = []
    for recipe, facts, status in read:
        if status.state in ("damaged", "unreadable"):
            found.append(f"{recipe.run.full_name} is {status.state}: {status.why}")
        elif facts.stored is not None:
            loaded += list_loaded(facts.paths.run_dir, facts.stored)
    return [*(moved.describe() for moved in find_moved(loaded)), *found]
