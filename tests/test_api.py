"""The Python interface: it says what the command line says, from any folder, and without torch."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest

import runner
from runner.errors import RunnerError
from runner.run.paths import RunPaths
from tests.conftest import ROOT
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.scored_runs import scored_grid
from tests.support.studies import said, study
from tests.support.whole_runs import add_files

_ = said, study  # fixtures

__all__ = ["fake", "said", "study"]

PAGE = (ROOT / "docs" / "notebooks.md").read_text()
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the runs of a small grid `demo`, and a notebook folder that is the current
    one.
    """
    project = tmp_path / "project"
    (project / "recipe_templates").mkdir(parents=True)
    (project / "notebooks").mkdir()
    scored_grid(
        project / "runs",
        {"model": ["gemma", "llama"], "loss": ["full", "completion"]},
        lambda model, loss: 1.0 - 0.2 * (loss == "completion"),
    )
    monkeypatch.chdir(project / "notebooks")
    return project


def test_nothing_else_is_public_and_nothing_is_called_like_a_package() -> None:
    packages = {path.stem for path in (ROOT / "runner").iterdir()}
    assert sorted(runner.__all__) == ["build_report", "load_recipe", "load_runs"]
    assert not packages & set(runner.__all__)
    assert set(dir(runner)) == {*runner.__all__, "__version__"}
    with pytest.raises(AttributeError):
        runner.load_run  # noqa: B018


def test_importing_and_reading_load_no_torch(demo: Path) -> None:
    script = (
        "import sys, runner\n"
        "assert not [name for name in sys.modules if name.startswith('runner.')]\n"
        "runs = runner.load_runs('../runs/demo')\n"
        "assert len(runner.build_report(runs).rows) == 12\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_run_gives_what_its_files_hold(demo: Path) -> None:
    runs = runner.load_runs("../runs/demo", where={"loss": "full", "seed": [1, 3]})
    assert [run.axes for run in runs] == [
        {"model": model, "loss": "full", "seed": seed}
        for model in ("gemma", "llama")
        for seed in (1, 3)
    ]
    run = runs[0]
    assert (run.status, run.name) == ("completed", "demo/gemma_full_s1")
    assert run.run_dir == demo / "runs/demo/gemma_full_s1"
    stored = json.loads((run.run_dir / "result.json").read_text())
    assert run.result is not None
    assert (
        run.result.tuned["test"].completion_nll_sum == stored["tuned"]["test"]["completion_nll_sum"]
    )
    lines = (run.run_dir / "eval_rows.jsonl").read_text().splitlines()
    assert run.eval_rows() == [json.loads(line) for line in lines] and lines
    assert run.predictions() == []
    assert run.recipe.loss == "full"


def test_a_report_has_the_numbers_of_the_command_line(
    demo: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    report = runner.build_report(runner.load_runs("demo"))
    monkeypatch.chdir(demo)
    dumped = json.loads(said("report", "runs/demo", "--format", "json")[1])
    assert report.verdicts == dumped["verdicts"] and report.verdicts
    assert report.warnings == dumped["warnings"]
    assert [row["run"] for row in report.rows] == [row["run"] for row in dumped["rows"]]
    for row, other in zip(report.rows, dumped["rows"], strict=True):
        assert row["tuned_nll_per_completion_token"] == other["tuned_nll_per_completion_token"]
        assert row["axes.loss"] == other["axes"]["loss"]
    listed = [
        effect["estimate"]
        for one in dumped["effects"]
        for effect in [
            *([one["pooled"]] if one["pooled"] else []),
            *(effect for levels in one["simple"].values() for effect in levels),
            *one["cells"],
        ]
    ]
    assert [effect["estimate"] for effect in report.effects] == listed
    loss = next(one for one in report.effects if one["axis"] == "loss" and one["is_answer"])
    assert (loss["reference"], loss["compared"]) == ("completion", "full"), "by name of folder"
    assert loss["scope"] == "all cells" and 0 < loss["low"] < loss["estimate"] < loss["high"]
    assert len({tuple(effect) for effect in report.effects}) == 1, "one set of columns"
    assert report._repr_markdown_() == said("report", "runs/demo")[1]


def test_a_part_of_a_grid_says_that_it_is_one(demo: Path) -> None:
    report = runner.build_report(runner.load_runs("demo", where={"model": "gemma"}))
    assert any("6 of 12 runs of grid demo" in warning for warning in report.warnings)


def test_a_damaged_run_has_no_numbers_and_a_lost_one_a_warning(demo: Path) -> None:
    folder = demo / "runs" / "demo"
    altered = RunPaths(folder / "gemma_full_s1")
    add_files(altered)
    (run,) = runner.load_runs(altered.run_dir, verify=True)
    assert (run.status, run.model_path) == ("completed", altered.model_dir)
    content = json.loads(altered.result_path.read_text())
    content["num_train_rows"] += 1
    altered.result_path.write_text(json.dumps(content))
    (folder / "gemma_full_s2" / "recipe.json").write_text("{")
    with pytest.warns(UserWarning, match="gemma_full_s2 is unreadable and left out") as caught:
        runs = runner.load_runs(folder)
    assert caught[0].filename == __file__
    assert len(runs) == 11
    run = next(one for one in runs if one.run_dir == altered.run_dir)
    assert (run.status, run.result, run.model_path, run.eval_rows()) == ("damaged", None, None, [])
    warnings = runner.build_report(runs).warnings
    assert any(warning.startswith("demo/gemma_full_s1 is damaged: ") for warning in warnings)


def test_verify_reads_every_byte(demo: Path) -> None:
    paths = RunPaths(demo / "runs" / "demo" / "gemma_full_s1")
    add_files(paths)
    rows = bytearray(paths.eval_rows_path.read_bytes())
    rows[-3] ^= 1
    paths.eval_rows_path.write_bytes(rows)
    assert [run.status for run in runner.load_runs(paths.run_dir)] == ["completed"]
    assert [run.status for run in runner.load_runs(paths.run_dir, verify=True)] == ["damaged"]


def test_recipe_files_have_the_status_of_today(
    study: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.root / "sub")
    runs = runner.load_runs(["../recipes/toy", "a"])
    assert [(run.name, run.status) for run in runs] == [
        ("toy/a", "completed"),
        ("toy/bb", "pending"),
    ]
    recipe = runner.load_recipe("../recipes/toy/bb.yaml", ["training.learning_rate=0.5"])
    assert recipe.training.learning_rate == 0.5
    assert Path.cwd() == study.root / "sub"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"paths": "nothing"}, "no recipe, run or grid is named"),
        ({"paths": "demo", "where": {"loss": "fll"}}, "the axis 'loss' has no value 'fll'"),
        ({"paths": "demo", "where": {"los": "full"}}, "has the axis 'los'"),
    ],
)
def test_what_is_not_there_is_refused(demo: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(RunnerError, match=re.escape(told)):
        runner.load_runs(**arguments)


@pytest.mark.parametrize(
    "seeds",
    [[1, 2], (1, 2), {1, 2}, frozenset({1, 2}), range(1, 3), iter([1, 2]), numpy.array([1, 2])]
    + [pandas.Series([1, 2]), ["1", 2.0]],
    ids=lambda seeds: type(seeds).__name__,
)
def test_whatever_holds_values_holds_alternatives(demo: Path, seeds: Any) -> None:
    runs = runner.load_runs("demo", where={"loss": "full", "seed": seeds})
    assert [run.axes["seed"] for run in runs] == [1, 2, 1, 2]


@pytest.mark.parametrize("value", [None, True, 0.001, numpy.bool_(True), numpy.float32(0.5)])
def test_a_value_is_of_any_kind(tmp_path: Path, value: Any) -> None:
    values = [None, True, 0.001, 0.5, "text"]
    scored_grid(tmp_path / "runs", {"a": values}, lambda a: 1.0, seeds=(1,))
    (run,) = runner.load_runs(tmp_path / "runs/demo", where={"a": value})
    assert run.axes["a"] == value


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"paths": "demo", "where": {"seed": []}}, "`where` has no value for the axis 'seed'"),
        ({"paths": "demo", "where": [("seed", 1)]}, "expected a dict"),
        ({"paths": "demo", "where": {1: 2}}, "expected a text"),
        ({"paths": ""}, "an empty argument names no recipe, run or grid"),
        ({"paths": b"demo"}, "expected a text or a path"),
    ],
)
def test_wrong_arguments_are_explained(
    demo: Path, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises((RunnerError, TypeError), match=re.escape(expected)):
        runner.load_runs(**arguments)


def test_threads_take_turns(demo: Path, tmp_path: Path) -> None:
    """The current folder is that of all threads, and is the notebook's again afterwards."""
    other = tmp_path / "other"
    (other / "recipe_templates").mkdir(parents=True)
    shutil.copytree(demo / "runs", other / "runs")
    here = Path.cwd()
    paths = [path for _ in range(8) for path in ("../runs/demo", other / "runs/demo")]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(runner.load_runs, paths))
    assert Path.cwd() == here
    for path, runs in zip(paths, found, strict=True):
        assert {run.run_dir.parent for run in runs} == {(here / path).resolve()}
        assert len(runs) == 12


def test_a_run_that_is_given_twice_counts_once(demo: Path) -> None:
    runs = runner.load_runs("demo")
    report = runner.build_report([*runs, *runner.load_runs("../runs/demo/gemma*")])
    assert report.rows == runner.build_report(runs).rows and len(report.rows) == 12
    with pytest.raises(TypeError, match="expected the runs that `load_runs` returns"):
        runner.build_report("demo")  # type: ignore[arg-type]


def test_a_metric_that_no_run_has_is_refused(demo: Path) -> None:
    runs = runner.load_runs("demo")
    with pytest.raises(RunnerError, match="no run has the metric 'accuracy'"):
        runner.build_report(runs, metrics=["accuracy"])
    one = runner.build_report(runs, metrics="nll_per_token")
    assert {effect["metric"] for effect in one.effects} == {"nll_per_token"}


def test_a_single_override_needs_no_list() -> None:
    path = ROOT / "recipes/demo/gemma_060_full_seed1.yaml"
    assert runner.load_recipe(path, "training.learning_rate=0.5").training.learning_rate == 0.5


def test_runs_and_reports_can_be_cached(demo: Path) -> None:
    """`joblib`, Streamlit and `multiprocessing` pickle the objects that they keep or send."""
    runs = runner.load_runs("demo")
    again = pickle.loads(pickle.dumps(runs))
    assert [run.recipe for run in again] == [run.recipe for run in runs]
    assert again[0].eval_rows() == runs[0].eval_rows()
    report = runner.build_report(again)
    assert copy.deepcopy(report).effects == runner.build_report(runs).effects == report.effects


def test_user_code_is_type_checked(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import runner\n"
        "runs = runner.load_runs('demo', where={'seed': [1, 2]})\n"
        "for run in runs:\n"
        "    count: str = run.recipe.data.num_train_samples\n"
        "rows: int = runner.build_report(runs).rows\n"
    )
    shown = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"user.py:(\d+): error: Incompatible types", shown.stdout)
    assert found == ["4", "5"], shown.stdout + shown.stderr


def test_the_example_of_the_page_runs(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    recipes = demo / "recipes"
    recipes.symlink_to(ROOT / "recipes")
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/notebooks.md", "exec"), names)
    assert "demo/gemma_full_s1 completed" in capsys.readouterr().out
    assert isinstance(names["answers"], pandas.DataFrame) and len(names["answers"])
