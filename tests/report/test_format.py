"""A report as it is written; `UPDATE_GOLDEN=1 pytest tests/report` rewrites the golden files."""

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from runner.cli.main import main
from runner.report.effects import Equivalence
from runner.report.format import FORMATS, MAX_WIDTH, format_markdown
from runner.report.wording import describe_equivalence
from runner.run.record import Failure
from tests.conftest import ROOT
from tests.support.effects import make_report, replicated_rows
from tests.support.reports import (
    Run,
    completed,
    make_recipe,
    not_completed,
    pending,
    report,
    table_lines,
)
from tests.support.scored_runs import make_seed_recipe, scored_grid

GOLDEN_DIR = ROOT / "tests" / "golden"


@pytest.fixture
def golden_runs(tmp_path: Path) -> list[Run]:
    """Two losses x two counts x three seeds; the loss depends on the count. One run failed."""
    truth = {("full", 60): 1.3, ("completion", 60): 1.0, ("full", 180): 0.9}
    runs = scored_grid(
        tmp_path,
        {"loss": ["full", "completion"], "num_train_samples": [60, 180]},
        lambda loss, num_train_samples: truth.get((loss, num_train_samples), 0.85),
        num_steps=lambda loss, num_train_samples, seed: 32 if num_train_samples == 60 else 92,
        left_out=[{"loss": "completion", "num_train_samples": 180, "seed": 3}],
        own_seeds=True,
    )
    lost = {"loss": "completion", "num_train_samples": 180}
    failure = Failure(kind="diverged", message="NaN")
    return [*runs, not_completed(tmp_path, make_seed_recipe(lost, 3, 403), failure)]


@pytest.mark.parametrize("format", FORMATS)
def test_golden(golden_runs: list[Run], format: str) -> None:
    path = GOLDEN_DIR / f"report_demo.{format}"
    text = report(golden_runs, format)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    if format == "json":  # not rounded: the last digits are the processor's
        assert round_numbers(json.loads(text)) == round_numbers(json.loads(path.read_text()))
    else:
        assert text == path.read_text()


def round_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: round_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_numbers(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def test_golden_of_answers(answering_runs: list[Run]) -> None:
    path = GOLDEN_DIR / "report_answers.md"
    text = report(answering_runs)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert max(cell_len(line) for line in text.splitlines()) <= MAX_WIDTH


def test_the_answer_comes_first_then_effects_then_cells(golden_runs: list[Run]) -> None:
    text = report(golden_runs)
    at = [text.index(part) for part in ("\n- ", "**warning:**", "## Effects", "## Scores")]
    assert at == sorted(at)
    assert max(cell_len(line) for line in text.splitlines()) <= MAX_WIDTH


def test_seeds_are_collapsed_in_every_table(golden_runs: list[Run]) -> None:
    text = report(golden_runs)
    headers = [line for line in table_lines(text) if "tuned NLL" in line]
    assert headers and not any("| seed " in line or "| run " in line for line in headers)
    assert "2 of 3" in text and "Runs without a score: completion_180_s3 (failed)." in text
    assert "0.8" in text and " ± " in text


def test_what_an_axis_also_changes_stands_beside_its_number(golden_runs: list[Run]) -> None:
    text = report(golden_runs).replace("\n  ", " ")
    assert (
        "**flag:** num_train_samples 60 -> 180 also changes the number of updates (32 -> 92)"
        in text
    )
    assert "survivors only" in text


def test_effects_are_drawn_with_all_that_limits_them(tmp_path: Path) -> None:
    text = format_markdown(make_report(replicated_rows(tmp_path)))
    line = next(line for line in table_lines(text) if line.startswith("| samples=180"))
    assert "(-0.1000)" in line and "exploratory, below noise" in line and "3 x 64" in line
    assert "| 97.5% interval |" in " ".join(text.split()) and "confirmatory" in text
    for part in (
        "- depends on `samples`: no mean over its levels is shown",
        "`samples`: F(1, 8) = 12.34, p = 0.0040",
        "| samples=60 | 1.2e-04 (4) | 3.4e-05 (63) | 5.6e-06 |",
        "pooled by model",
        "samples=60: margin 0.02: the 90% interval -0.3400 to -0.2600 lies outside it:"
        " the difference is larger",
        "samples=180: declared since run r0_180_s1, after its first attempt",
        "- noise floor: 0.1200",
        "- **flag:** updates differ: 32 and 92.",
        "- **flag:** samples=180: survivors only: 1 of 3 runs failed.",
        "- F1: refused: the tasks differ: sst2 and squad_v2.",
    ):
        assert part in " ".join(text.split()), part


def test_runs_of_different_rules_are_told_apart(tmp_path: Path) -> None:
    runs = [
        completed(tmp_path, make_recipe(loss, {"loss": loss}, f"loss={loss}"), 2.0, rules=rules)
        for rules, loss in enumerate(("full", "completion"), start=1)
    ]
    text = " ".join(report(runs).split())
    assert (
        "**warning:** 2 different versions of the rules for rows and masks; runs are compared only"
        " within one version: rules 1: full; rules 2: completion" in text
    )
    assert "full (rules 1) and completion (rules 2) follow different rules" in text
    assert "| rules |" in text and "rules" not in report(runs[:1])
    assert json.loads(report(runs, "json"))["rows"][0]["rules"] == 1


def test_what_an_axis_changes_is_named_and_what_it_changes_in_some_pairs(tmp_path: Path) -> None:
    def rate(loss: str, num_train_samples: int, seed: int) -> list[str]:
        is_odd = (loss, num_train_samples) == ("completion", 180)
        return ["training.learning_rate=0.1"] if is_odd else []

    axes = {"loss": ["full", "completion"], "num_train_samples": [60, 180]}
    text = report(scored_grid(tmp_path, axes, lambda loss, num_train_samples: 1, overrides=rate))
    assert "- the recipes differ in loss, training.learning_rate (only in 1 of 2 pairs)" in text
    runs = [completed(tmp_path, make_recipe(f"same{x}", {"x": x}), 2.0) for x in (1, 2)]
    assert "- **warning:** the recipes in each pair are the same" in report(runs)


def test_many_values_are_compared_with_the_first_only(tmp_path: Path) -> None:
    runs = [completed(tmp_path, make_recipe(f"r{x}", {"x": x}), 2.0) for x in range(5)]
    text = report(runs)
    assert "- more than 4 values: each is compared only with the first" in text
    assert text.count("### x: ") == 4
    assert "with the first only" not in report(runs[:4])


def test_one_seed_gives_scores_and_no_effect(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, {"loss": ["full", "completion"]}, lambda loss: 1.0, seeds=(1,))
    text = report(runs)
    assert "no verdict" in text and "`runner compare demo/full_s1 demo/completion_s1`" in text
    assert "difference" not in "".join(table_lines(text)) and "| full_s1" in text
    [effects] = json.loads(report(runs, "json"))["effects"]
    assert effects["cells"][0]["kind"] == "rows"
    assert r"\caption{Effects" not in report(runs, "tex")


def test_answers_in_csv_and_json_are_complete(answering_runs: list[Run]) -> None:
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(report(answering_runs, "csv")))}
    assert (
        rows["sst2_full"]["tuned_accuracy"] == "0.375"
        and rows["sst2_full"]["base_num_unfinished"] == "7"
    )
    assert rows["sst2_full"]["tuned_no_answer_accuracy"] == rows["squad_v2_full"]["tuned_f1"] == ""
    parsed = {row["run"]: row for row in json.loads(report(answering_runs, "json"))["rows"]}
    assert parsed["sst2_completion"]["base_f1"] == 0.25
    assert parsed["squad_v2_full"]["base_num_unreadable"] is None


def test_a_change_that_rounds_to_zero_has_no_minus(tmp_path: Path) -> None:
    text = report([completed(tmp_path, make_recipe("a", {}), tuned=2.99999, base=3.0)])
    assert "+0.0000" in text and "-0.0000" not in text


def test_an_axis_that_only_some_runs_have_is_blank_in_the_others(tmp_path: Path) -> None:
    runs = [pending(tmp_path, make_recipe("a", {"x": 1})), pending(tmp_path, make_recipe("b", {}))]
    header, _, without, with_value = [
        [cell.strip() for cell in line.split("|")] for line in table_lines(report(runs))[:4]
    ]
    assert [dict(zip(header, row, strict=True))["x"] for row in (without, with_value)] == ["", "1"]
    assert "Equal in every run" not in report(runs)


def test_table_survives_hostile_and_wide_values(tmp_path: Path) -> None:
    values = ["a|b", "c\\|d", "two\nlines", "日本語モデル", "naïve é", "[x](y)"]
    runs = [
        completed(tmp_path, make_recipe(f"r{i}", {"tag|s": value}), 2.0)
        for i, value in enumerate(values)
    ]
    scores = report(runs).partition("## Scores")[2]
    table = next(block for block in scores.split("\n\n") if block.startswith("| run"))
    lines = table.splitlines()
    assert len(lines) == len(values) + 2
    assert len({cell_len(line) for line in lines}) == 1
    text = "\n".join(lines)
    assert "a\\|b" in text and "c\\\\\\|d" in text and "two lines" in text and "tag\\|s" in text
    # every line has as many unescaped pipes as the header
    bare = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines]
    assert len(set(bare)) == 1
    assert [row["axes.tag|s"] for row in csv.DictReader(io.StringIO(report(runs, "csv")))] == values


def test_constant_axes_are_said_once(demo_runs: list[Run]) -> None:
    text = report(demo_runs)
    assert "Equal in every run: epochs=3; test rows 64." in text
    assert not any("epochs" in line or "test rows" in line for line in table_lines(text)[:1])
    assert "axes.epochs" in report(demo_runs, "csv")


def test_no_line_is_wider_than_a_terminal(tmp_path: Path) -> None:
    axes = {"model": "gemma-2-9b", "task": "task-1", "samples": 60, "loss": "completion"}
    runs = []
    for loss, reason in (("completion", "early_stopping"), ("full", "num_train_epochs")):
        for samples in (60, 120):
            for task in ("task-1", "task-2"):
                cell = axes | {"loss": loss, "samples": samples, "task": task}
                recipe = make_recipe("_".join(map(str, cell.values())), cell, f"loss={loss}")
                runs.append(completed(tmp_path, recipe, 2.0, stop_reason=reason))
    text = report(runs)
    assert max(cell_len(line) for line in table_lines(text)) <= MAX_WIDTH
    headers = [line for line in table_lines(text) if line.startswith("| run")]
    assert len(headers) > 1 and "stop reason" in headers[-1] and "tuned NLL" in headers[0]


def test_each_noise_floor_names_its_cells(tmp_path: Path) -> None:
    found = make_report(replicated_rows(tmp_path))
    assert "- noise floor: 0.1200\n" in format_markdown(found)
    first, *others = found.effects
    at_60, at_180 = first.simple["samples"]
    simple = {"samples": (replace(at_60, noise_floor=10.0), replace(at_180, noise_floor=9.0))}
    effects = replace(first, simple=simple)
    text = format_markdown(replace(found, effects=(effects, *others)))
    assert "- noise floor: 9.0000 (samples=180), 10.0000 (samples=60)\n" in text


def test_effects_at_many_long_values_fit_and_are_told_apart(tmp_path: Path) -> None:
    value = "a_value_of_some_length_number"
    axes = {
        "loss": ["full", "completion"],
        **{f"axis_{name}": [f"{value}_{at}" for at in (1, 2)] for name in ("one", "two")},
    }
    text = report(scored_grid(tmp_path, axes, lambda **cell: 1.0 + 0.1 * (cell["loss"] == "full")))
    assert max(cell_len(line) for line in text.splitlines()) <= MAX_WIDTH
    section = text.partition("### loss: full -> completion")[2].partition("### ")[0]
    scopes = [line.split("|")[1].strip() for line in table_lines(section) if "axis_" in line]
    assert len(set(scopes)) == 4


def test_many_effects_are_counted_and_not_all_drawn(tmp_path: Path) -> None:
    rows = replicated_rows(tmp_path)
    made = make_report(rows)
    effects = made.effects[0]
    many = replace(effects, simple={"samples": effects.simple["samples"] * 20})
    text = format_markdown(replace(made, effects=(many,)))
    assert "- and 16 more; `--format json` has all" in text
    # One line with the difference, one with its variances
    assert sum(line.startswith("| samples=") for line in table_lines(text)) == 2 * 24


def test_keys_that_are_too_wide_are_numbered(tmp_path: Path) -> None:
    axes = {f"a_long_name_of_an_axis_{at}": [f"value {at}", f"other {at}"] for at in range(5)}
    runs = [
        completed(tmp_path, make_recipe(f"r{at}", {k: v[at] for k, v in axes.items()}), 2.0)
        for at in (0, 1)
    ]
    text = report(runs)
    assert max(cell_len(line) for line in text.splitlines()) <= MAX_WIDTH
    assert "| cell |" in text and "other 4" in text


@pytest.mark.parametrize("format", FORMATS)
def test_no_runs_is_a_report_too(format: str) -> None:
    assert report([], format).endswith("\n")


def test_the_command_line_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "recipes", "--format", "xls"])
    assert f"(choose from {', '.join(map(repr, FORMATS))})" in capsys.readouterr().err


def test_an_interval_beyond_the_margin_shows_a_larger_difference(tmp_path: Path) -> None:
    effect = make_report(replicated_rows(tmp_path)).effects[0].shown[0]
    found = {
        "lies outside it: the difference is larger": Equivalence(
            0.02, (-0.34, -0.26), is_shown=False
        ),
        "extends beyond it: equivalence is not shown": Equivalence(
            0.02, (-0.01, 0.03), is_shown=False
        ),
        "lies inside it: equivalence is shown": Equivalence(0.02, (0.0, 0.01), is_shown=True),
    }
    for told, equivalence in found.items():
        assert describe_equivalence(replace(effect, equivalence=equivalence)).endswith(told)
