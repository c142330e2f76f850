"""A report as it is written; `UPDATE_GOLDEN=1 pytest tests/report` rewrites the golden files."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from rich.cells import cell_len

from runner.cli.main import main
from runner.report.format import FORMATS, MAX_WIDTH
from tests.conftest import ROOT
from tests.support.reports import (
    Run,
    completed,
    make_recipe,
    pending,
    report,
    rows_of,
    table_lines,
)

GOLDEN_DIR = ROOT / "tests" / "golden"


@pytest.mark.parametrize("format", FORMATS)
def test_golden(demo_runs: list[Run], format: str) -> None:
    path = GOLDEN_DIR / f"report_demo.{format}"
    text = report(demo_runs, format)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_golden_of_answers(answering_runs: list[Run]) -> None:
    path = GOLDEN_DIR / "report_answers.md"
    text = report(answering_runs)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert max(cell_len(line) for line in table_lines(text)) <= MAX_WIDTH


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
        [cell.strip() for cell in line.split("|")] for line in table_lines(report(runs))
    ]
    assert [dict(zip(header, row, strict=True))["x"] for row in (without, with_value)] == ["", "1"]
    assert "Equal in every run" not in report(runs)


def test_table_survives_hostile_and_wide_values(tmp_path: Path) -> None:
    values = ["a|b", "c\\|d", "two\nlines", "日本語モデル", "naïve é", "[x](y)"]
    runs = [
        completed(tmp_path, make_recipe(f"r{i}", {"tag|s": value}), 2.0)
        for i, value in enumerate(values)
    ]
    rows = rows_of(runs)
    lines = table_lines(FORMATS["md"](rows, []))
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
    assert "epochs" not in table_lines(text)[0] and "test rows" not in table_lines(text)[0]
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
    assert len(headers) == 2 and "stop reason" in headers[1] and "tuned NLL" in headers[0]


@pytest.mark.parametrize("format", FORMATS)
def test_no_runs_is_a_report_too(format: str) -> None:
    assert report([], format).endswith("\n")


def test_the_command_line_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "recipes", "--format", "xls"])
    assert f"(choose from {', '.join(map(repr, FORMATS))})" in capsys.readouterr().err
