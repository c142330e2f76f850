"""`runner power`: how many seeds and test rows, how many device hours, or why nothing is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.report.planning import limit_factor
from runner.report.power import PowerReport, build_power_reports, format_power
from runner.run.record import RunRecord, write_record
from tests.support.reports import Run, rows_of
from tests.support.scored_runs import make_attempt, scored_grid

AXES = {"model": ["gemma", "llama"], "loss": ["full", "completion"], "num_train_samples": [60, 180]}
HOURS = 1 / 6  # of one attempt of `make_attempt`


def flat(**_: Any) -> float:
    return 2.0


def plan(runs: list[Run], effect: float, **more: Any) -> PowerReport:
    [report] = build_power_reports(rows_of(runs), effect, more.pop("power", 0.8), **more)
    text = format_power(report)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text, "no number is cut off"
    return report


def test_a_repair_is_no_training_time(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, AXES, flat, attempt=make_attempt())
    for _, paths, _ in runs:
        write_record(
            paths, RunRecord(attempts=(make_attempt(), make_attempt(number=2, is_repair=True)))
        )
    assert plan(runs, 0.02).device_hours_per_run == pytest.approx(HOURS)


def test_a_grid_is_planned_for_cells_and_for_axes(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, AXES, flat, attempt=make_attempt(num_processes=2))
    report = plan(runs, 0.02)
    assert (report.num_runs, report.num_cells, report.num_seeds) == (24, 8, 3)
    assert report.num_test_rows == 40
    assert "8 cells, 3 seeds each, 40 test rows" in format_power(report)
    assert report.device_hours_per_run == pytest.approx(2 * HOURS)
    assert [(pool.name, pool.num_cells, pool.nu) for pool in report.pools] == [
        ("demo_models/gemma", 4, 8),
        ("demo_models/llama", 4, 8),
    ]
    names = [one.name for one in report.comparisons]
    assert names == [
        "two cells of demo_models/gemma",
        "two cells of demo_models/llama",
        "model: gemma, llama (mean of 4 pairs)",
        "loss: full, completion (mean of 4 pairs)",
        "num_train_samples: 60, 180 (mean of 4 pairs)",
    ]
    cells, axis = report.comparisons[0], report.comparisons[3]
    assert axis.detectable_now < report.comparisons[1].detectable_now
    assert (cells.precision, cells.degrees_of_freedom) == ("fair", 8)
    assert cells.share_of_runs + cells.share_of_rows + cells.share_of_noise == pytest.approx(1)
    [first, *_] = cells.plans
    assert first.num_test_rows == 40
    assert first.num_seeds is not None and first.num_runs == 8 * first.num_seeds
    assert first.device_hours == pytest.approx(first.num_runs * 2 * HOURS)
    seeds = [one.highest_num_seeds or 1000 for one in cells.plans]
    assert seeds == sorted(set(seeds), reverse=True), "rows that save no seed are not shown"
    smaller = plan(runs, 0.01).comparisons[0].plans[0].highest_num_seeds
    assert smaller is not None and smaller > first.num_seeds
    surer = plan(runs, 0.01, power=0.95).comparisons[0].plans[0].highest_num_seeds
    assert surer is None or surer > smaller


def test_a_pilot_plans_with_the_upper_limit_of_its_spread(tmp_path: Path) -> None:
    report = plan(scored_grid(tmp_path, AXES, flat), 0.02)
    pool = report.pools[0]
    assert f"{pool.sd * limit_factor(8, 0.8):.4f}" in format_power(report)
    assert f"{pool.limit(0.025):.4f} to {pool.limit(0.975):.4f}" in format_power(report)


def test_few_degrees_of_freedom_give_a_range_or_a_rough_number(tmp_path: Path) -> None:
    pair = {"loss": ["full", "completion"]}
    report = plan(scored_grid(tmp_path / "pair", pair, flat, seeds=(1, 2)), 0.03)
    [one] = report.comparisons
    assert (one.precision, one.degrees_of_freedom) == ("range", 2)
    assert one.plans[0].num_seeds is None and one.plans[0].num_runs is None
    low, high = one.plans[0].lowest_num_seeds, one.plans[0].highest_num_seeds
    assert low is not None and high is not None and low < high
    text = format_power(report)
    assert f"{low} to {high}" in text and "give only a range of seeds" in text
    assert "Seeds per cell, at least 3," in text
    assert "no number of runs or hours" in text and "Runs and hours are for" not in text
    four = {"loss": ["full", "completion"], "num_train_samples": [60, 180]}
    report = plan(scored_grid(tmp_path / "four", four, flat, seeds=(1, 2)), 0.03)
    assert {one.precision for one in report.comparisons} == {"rough"}
    assert "(rough)" in format_power(report) and "numbers are rough" in format_power(report)


def test_a_lone_pair_that_shares_seeds_is_planned_as_pairs(tmp_path: Path) -> None:
    pair = {"loss": ["full", "completion"]}
    shared = plan(scored_grid(tmp_path / "shared", pair, flat), 0.03)
    own = plan(scored_grid(tmp_path / "own", pair, flat, own_seeds=True), 0.03)
    assert shared.comparisons[0].detectable_now > own.comparisons[0].detectable_now


def test_two_runs_of_one_cell_are_a_pilot_of_its_model(tmp_path: Path) -> None:
    four = {"loss": ["full", "completion"], "num_train_samples": [60, 180]}
    rest = [{"seed": 2, "loss": "full"}, {"seed": 2, "num_train_samples": 60}]
    runs = scored_grid(tmp_path, four, flat, seeds=(1, 2), left_out=rest)
    report = plan(runs, 0.03)
    assert (report.num_runs, report.num_seeds, report.pools[0].nu) == (5, 1, 1)
    assert all(one.detectable_now is None for one in report.comparisons)
    assert {one.precision for one in report.comparisons} == {"range"}


def test_cells_without_scores_are_told(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, AXES, flat)
    for _, paths, _ in runs[:3]:
        paths.eval_rows_path.unlink()
    report = plan(runs, 0.02)
    assert report.num_runs == 21
    assert "8 cells, mostly 3 seeds each (0 to 3), 40 test rows" in format_power(report)
    assert any("Left out: gemma_full_60_s1 has no" in note for note in report.notes)
    assert "device hours are unknown" in format_power(report)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)

    def make(**settings: Any) -> None:
        scored_grid(tmp_path / "runs", AXES, flat, **settings)

    return make


def test_the_verb_prints_words_or_json(
    project: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    project(attempt=make_attempt())
    assert main(["power", "runs/demo", "--effect", "0.02"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("demo, conversations: NLL per completion token")
    assert "detect with power 80%" in text and "to detect a difference of 0.02" in text
    assert main(["power", "demo", "--effect", "0.02", "--power", "0.9", "--json"]) == 0
    [report] = json.loads(capsys.readouterr().out)
    assert (report["grid"], report["power"], report["num_runs"]) == ("demo", 0.9, 24)
    assert report["comparisons"][0]["plans"][0]["num_test_rows"] == 40
    assert report["pools"][0]["limits"][0] < report["pools"][0]["sd"]
    assert main(["power", "demo", "--effect", "0.02", "--metric", "bits_per_byte"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_the_verb_refuses_with_words(
    project: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    project(seeds=(1,))
    assert main(["power", "runs/demo", "--effect", "0.02"]) == 2
    error = capsys.readouterr().err
    assert "no cell of conversations has two completed runs" in error
    assert "seed: [1, 2, 3]" in error and "runner render demo" in error
    assert main(["power", "runs/demo", "--effect", "0.02", "--metric", "f1"]) == 2
    error = capsys.readouterr().err
    assert "no run of conversations has the metric 'f1'" in error
    assert "--metric nll_per_completion_token | nll_per_token | bits_per_byte" in error


def test_runs_that_do_not_vary_plan_nothing(
    project: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    project(sd_run=0.0, sd_row=0.0)
    assert main(["power", "runs/demo", "--effect", "0.02"]) == 2
    assert "do not vary at all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--effect", "0"], "argument --effect: got '0', expected a number above 0"),
        (["--effect", "small"], "argument --effect: got 'small'"),
        (["--effect", "nan"], "argument --effect: got 'nan'"),
        (["--effect", "1", "--power", "80"], "argument --power: got '80', expected between"),
        ([], "--effect"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["power", "runs", *options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
