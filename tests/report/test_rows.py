"""The rows of a report say what the run directories say: nothing guessed, nothing dropped."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from runner.plan.status import read_status
from runner.report.format import FORMATS
from runner.report.rows import axis_text, compare_with_base, list_values
from runner.run.facts import read_facts
from runner.run.record import (
    Failure,
)
from tests.support.reports import (
    Run,
    completed,
    make_recipe,
    not_completed,
    pending,
    report,
    rows_of,
)


def test_one_row_per_run_and_what_is_missing_is_blank(demo_runs: list[Run]) -> None:
    rows = list(csv.DictReader(io.StringIO(report(demo_runs, "csv"))))
    assert len(rows) == len(demo_runs)
    states = {row["run"]: row["state"] for row in rows}
    assert states["gemma_completion_180"] == "failed"
    assert states["llama_completion_120"] == "running"
    assert states["llama_full_060"] == "pending"
    for row in rows:
        names = list(row)
        scores = [row[name] for name in names[names.index("rules") : names.index("num_updates")]]
        facts = [row[name] for name in names[names.index("num_updates") :]]
        assert all(scores) if row["state"] == "completed" else not any(scores + facts)
    for row in json.loads(report(demo_runs, "json"))["rows"]:
        assert (row["tuned_bits_per_byte"] is None) == (row["state"] != "completed")


def test_a_result_counts_only_while_its_run_is_completed(tmp_path: Path) -> None:
    recipe = make_recipe("a", {"lr": 1})
    _, paths, _ = completed(tmp_path, recipe, 2.0)
    changed = make_recipe("a", {"lr": 1}, "training.learning_rate=0.5")
    [row] = rows_of([(changed, paths, read_status(read_facts(paths), changed, {}))])
    assert (row.state, row.tuned.nll_per_completion_token, row.num_test_rows) == (
        "changed",
        None,
        None,
    )


def test_scores_are_sums_over_counts(tmp_path: Path) -> None:
    [row] = rows_of([completed(tmp_path, make_recipe("a", {}), tuned=2.0, base=3.0)])
    assert row.tuned.nll_per_completion_token == 2.0
    assert row.tuned.nll_per_token == 3.0
    # 2 nats x 1000 tokens / ln 2 nats per bit / 4000 bytes
    assert row.tuned.bits_per_byte == pytest.approx(2000 / 0.6931471805599453 / 4000)
    assert row.change == -1.0
    [json_row] = json.loads(
        report([completed(tmp_path, make_recipe("b", {}), tuned=2 / 3)], "json")
    )["rows"]
    assert json_row["tuned_nll_per_completion_token"] == 2 / 3 * 1000 / 1000


def test_nothing_to_divide_by_is_blank(tmp_path: Path) -> None:
    runs = [completed(tmp_path, make_recipe(f"a{x}", {"x": x}), 2.0, num_bytes=0) for x in (1, 2)]
    assert "nan" not in report(runs).lower()
    assert [
        row["tuned_bits_per_byte"] for row in csv.DictReader(io.StringIO(report(runs, "csv")))
    ] == ["", ""]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-2000.0"])
def test_a_score_that_cannot_be_is_refused_by_name(tmp_path: Path, format: str, value: str) -> None:
    recipe = make_recipe("a", {})
    _, paths, _ = completed(tmp_path, recipe, 2.0)
    content = paths.result_path.read_text()
    assert content.count(" 2000.0") == 1
    paths.result_path.write_text(content.replace(" 2000.0", f" {value}"))
    run = (recipe, paths, read_status(read_facts(paths), recipe, {}))
    assert "result.json cannot be read: tuned.test.completion_nll_sum: " in run[2].why
    [row] = rows_of([run])
    assert row.state == "unreadable" and row.tuned.nll_per_token is None
    text = report([run], format)
    assert "nan" not in text.lower() and "2000" not in text


def test_different_test_rows_are_a_warning(tmp_path: Path) -> None:
    def run(name: str, rows_hash: str | None) -> Run:
        return completed(tmp_path, make_recipe(name, {"task": name}), 2.0, rows_hash=rows_hash)

    same = report([run("a", "f" * 64), run("b", "f" * 64)])
    assert (
        "test rows;" not in same and "different test rows" not in same and "no record" not in same
    )
    text = " ".join(report([run("a", "f" * 64), run("b", "0" * 64)]).split())
    assert "**warning:** 2 different sets of test rows" in text
    assert "ffffffffffff (64 rows): a; 000000000000 (64 rows): b" in text
    assert "refused: a and b were scored on different test rows" in text
    assert json.loads(report([run("a", "f" * 64), run("b", "0" * 64)], "json"))["warnings"]


def test_missing_samples_are_named_and_do_no_harm(tmp_path: Path) -> None:
    runs = [completed(tmp_path, make_recipe("a", {}), 2.0, rows_hash=None)]
    assert "**warning:** no record of the test rows of 1 completed run: a" in report(runs)


def test_each_run_is_compared_with_its_base(tmp_path: Path) -> None:
    runs = [
        completed(tmp_path, make_recipe("better", {"x": 1}), tuned=2.9, base=3.0),
        completed(tmp_path, make_recipe("same", {"x": 2}), tuned=3.0, base=3.0),
        completed(tmp_path, make_recipe("worse", {"x": 3}), tuned=3.1, base=3.0),
        pending(tmp_path, make_recipe("later", {"x": 4})),
    ]
    base = compare_with_base(rows_of(runs))
    assert (base.num_completed, base.num_better, base.not_better) == (3, 1, ("same", "worse"))
    sentence = (
        "1 of 3 completed runs beat their base model on test NLL per completion token; no better:"
        " same, worse."
    )
    assert sentence in " ".join(report(runs).split())


def test_rows_are_sorted_by_axes(tmp_path: Path) -> None:
    cells = [("full", 180), ("full", 60), ("completion", 1000), ("full", 1000), ("completion", 60)]
    runs = [
        pending(tmp_path, make_recipe(f"{loss}{n}", {"loss": loss, "n": n})) for loss, n in cells
    ]
    names = ["full60", "full180", "full1000", "completion60", "completion1000"]
    assert [row.name for row in rows_of(runs)] == names


def test_axis_values_keep_their_types_apart(tmp_path: Path) -> None:
    values = ["1", 1, True, 1.0, None, ""]
    runs = [pending(tmp_path, make_recipe(f"r{i}", {"x": value})) for i, value in enumerate(values)]
    # 1 and 1.0 are one value
    texts = [axis_text(value) for value in list_values(rows_of(runs), "x")]
    assert texts == ["1", "1", "true", "null", '""']


@pytest.mark.parametrize("format", FORMATS)
def test_report_does_not_depend_on_attempts_or_clocks(tmp_path: Path, format: str) -> None:
    def runs(root: Path, number: int) -> list[Run]:
        first = completed(root, make_recipe("a", {"x": 1}), 2.0)
        failed = not_completed(
            root, make_recipe("b", {"x": 2}), Failure(kind="data", message=str(root)), number
        )
        return [first, failed]

    texts = [report(runs(tmp_path / str(number), number), format) for number in (1, 2)]
    if format == "json":  # but for the start, which says what was declared in time
        texts = [re.sub(r'("started_at_utc": ").*?"', r'\1"', text) for text in texts]
    assert texts[0] == texts[1]
