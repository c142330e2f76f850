"""Paired comparisons: nothing is compared across what differs."""

import json
import math
from pathlib import Path

import pytest

from runner.recipe.parse import Recipe
from runner.report.statistics import build_comparisons, paired_interval
from tests.support.reports import (
    Run,
    completed,
    make_answers,
    make_recipe,
    not_completed,
    report,
    rows_of,
    table_lines,
)


def test_answers_are_compared_where_both_runs_have_them_and_larger_is_better(
    answering_runs: list[Run],
) -> None:
    comparisons = {
        (item.axis, item.unit): item
        for item in build_comparisons(rows_of(answering_runs))
        if item.is_of_answers
    }
    assert list(comparisons) == [
        ("loss", f"{name}, larger is better") for name in ("accuracy", "f1")
    ]
    accuracy = comparisons["loss", "accuracy, larger is better"]
    assert accuracy.mean_difference == pytest.approx(0.75 - 0.375)
    assert (accuracy.num_pairs, accuracy.unpaired) == (
        1,
        (),
    ), "SQuAD has no accuracy, so nothing is missing there"
    f1 = comparisons["loss", "f1, larger is better"]
    assert (f1.num_pairs, f1.unpaired) == (1, ("squad_v2_full has no f1",))


METRIC = "{name: miss, function: 'scores.py:miss', mode: min}"


def run_with_own_metric(root: Path, loss: str, code: str, *judged: int) -> Run:
    """A run whose base and tuned models answer, judged by a function of the project."""
    recipe = make_recipe(
        loss,
        {"loss": loss},
        f"loss={loss}",
        "evaluation.generation={enabled: true, max_new_tokens: 4}",
        f"evaluation.metrics=[{METRIC}]",
    )
    value = 1.0 if loss == "full" else 0.25
    answers = {
        model: score.model_copy(update={"num_judged_by": {"miss": judged[0] if judged else 64}})
        for model, score in make_answers({"miss": 4.0}, {"miss": value}).items()
    }
    return completed(root, recipe, 2.0, answers=answers, contents={"scores.py": code})


def test_a_metric_of_the_project_says_which_way_is_better(tmp_path: Path) -> None:
    runs = [run_with_own_metric(tmp_path, loss, "hash") for loss in ("full", "completion")]
    (miss,) = [item for item in build_comparisons(rows_of(runs)) if item.is_of_answers]
    assert (miss.unit, miss.mean_difference) == ("miss, smaller is better", -0.75)
    text = report(runs)
    assert "larger is better (smaller: miss)" in text and "judged by miss" not in text
    assert any("tuned miss" in line for line in table_lines(text))


def test_rows_that_a_metric_does_not_judge_are_shown(tmp_path: Path) -> None:
    runs = [run_with_own_metric(tmp_path, "full", "hash", 60)]
    assert "judged by miss (base, tuned)" in report(runs) and "60, 60 of 64" in report(runs)


def test_two_functions_of_one_name_are_not_compared(tmp_path: Path) -> None:
    runs = [run_with_own_metric(tmp_path, loss, loss) for loss in ("full", "completion")]
    (miss,) = [item for item in build_comparisons(rows_of(runs)) if item.is_of_answers]
    assert (miss.num_pairs, miss.mean_difference) == (0, None)
    assert miss.unpaired == ("full and completion have different functions for miss",)


def test_interval_by_hand() -> None:
    # mean -0.2, s = 0.1, s / sqrt(3) = 0.0577350; t(0.975, 2 degrees of freedom) = 4.3026527; half
    # width 0.2484138
    interval = paired_interval([-0.1, -0.2, -0.3])
    assert interval == pytest.approx((-0.4484138, 0.0484138), abs=1e-6)
    assert paired_interval([-0.1]) is None
    assert paired_interval([]) is None


def test_pairs_are_equal_in_every_other_axis(tmp_path: Path) -> None:
    runs = []
    for samples, full, completion in ((60, 2.0, 1.9), (120, 1.8, 1.6), (180, 1.9, 1.6)):
        for loss, nll in (("full", full), ("completion", completion)):
            axes = {"samples": samples, "loss": loss}
            recipe = make_recipe(
                f"{loss}{samples}", axes, f"loss={loss}", f"data.num_train_samples={samples}"
            )
            runs.append(completed(tmp_path, recipe, nll))
    comparisons = {
        (item.axis, item.reference, item.compared): item
        for item in build_comparisons(rows_of(runs))
    }
    assert set(comparisons) == {
        ("samples", 60, 120),
        ("samples", 60, 180),
        ("samples", 120, 180),
        ("loss", "full", "completion"),
    }
    loss = comparisons["loss", "full", "completion"]
    assert loss.mean_difference == pytest.approx(-0.2)  # completion - full: -0.1, -0.2, -0.3
    assert loss.interval == pytest.approx((-0.4484138, 0.0484138), abs=1e-6)
    assert (loss.num_pairs, loss.unpaired, dict(loss.recipe_differences)) == (3, (), {"loss": 3})
    assert loss.unit == "nats per completion token"
    assert "-0.4484 to +0.0484" in report(runs)


def test_one_pair_has_a_difference_and_no_interval(tmp_path: Path) -> None:
    runs = [
        completed(tmp_path, make_recipe(loss, {"loss": loss}), 2.0 + (loss == "full"))
        for loss in ("full", "x")
    ]
    [comparison] = build_comparisons(rows_of(runs))
    assert (comparison.num_pairs, comparison.mean_difference, comparison.interval) == (
        1,
        -1.0,
        None,
    )
    line = table_lines(report(runs))[-1]
    assert [cell.strip() for cell in line.split("|")][4:6] == ["-1.0000", ""]


def test_no_cell_is_dropped_silently(tmp_path: Path) -> None:
    def recipe(name: str, samples: int, loss: str) -> Recipe:
        return make_recipe(name, {"samples": samples, "loss": loss})

    runs = [
        completed(tmp_path, recipe("f1", 1, "full"), 2.0),
        completed(tmp_path, recipe("c1", 1, "completion"), 1.0),
        completed(tmp_path, recipe("f2", 2, "full"), 2.0),
        not_completed(tmp_path, recipe("c2", 2, "completion")),
        completed(tmp_path, recipe("f3", 3, "full"), 2.0),
        completed(tmp_path, recipe("f4", 4, "full"), 2.0),
        completed(tmp_path, recipe("c4", 4, "completion"), 1.0),
        completed(tmp_path, recipe("c4_again", 4, "completion"), 0.5),
    ]
    loss = build_comparisons(rows_of(runs))[-1]
    assert loss.num_pairs == 1
    assert loss.unpaired == (
        "c2 is interrupted",
        "f3 has no partner with loss completion",
        "c4 and c4_again stand in the same cell",
    )
    note = "`loss`, full and completion: 3 cells without a pair: " + "; ".join(loss.unpaired)
    assert note in report(runs)


def test_runs_of_different_rules_are_never_a_pair_and_the_report_says_so(tmp_path: Path) -> None:
    runs = [
        completed(tmp_path, make_recipe("f1", {"n": 1, "loss": "full"}), 2.0, rules=1),
        completed(tmp_path, make_recipe("c1", {"n": 1, "loss": "x"}), 1.0, rules=1),
        completed(tmp_path, make_recipe("f2", {"n": 2, "loss": "full"}), 2.0, rules=1),
        completed(tmp_path, make_recipe("c2", {"n": 2, "loss": "x"}), 1.0),
        completed(tmp_path, make_recipe("f3", {"n": 3, "loss": "full"}), 2.0),
        completed(tmp_path, make_recipe("c3", {"n": 3, "loss": "x"}), 1.0),
    ]
    loss = build_comparisons(rows_of(runs))[-1]
    assert (loss.axis, loss.num_pairs) == ("loss", 2)
    assert loss.unpaired == (
        "f2 (rules 1) and c2 (rules 2) follow different rules of rows and masks",
    )
    text = report(runs)
    assert (
        "**warning:** 2 different rules of rows and masks; runs are compared only within one:"
        " rules 1: f1, c1, f2; rules 2: c2, f3, c3"
    ) in text
    assert f"`loss`, full and x: 1 cell without a pair: {loss.unpaired[0]}." in text
    header, _, first, *_ = table_lines(text)
    cells = [[cell.strip() for cell in line.split("|")] for line in (header, first)]
    assert dict(zip(*cells, strict=True))["rules"] == "1"
    [row, *_] = json.loads(report(runs, "json"))["rows"]
    assert row["rules"] == 1
    assert report(runs, "csv").splitlines()[0].split(",")[4:6] == ["state", "rules"]
    assert "rules" not in report(runs[:3]) + report(runs[:3], "csv") + report(runs[:3], "json")


def test_another_content_of_a_file_that_both_name_is_told_with_the_keys(tmp_path: Path) -> None:
    files = {"data/demo.jsonl": "a" * 64, "models/x": "b" * 64}
    other = {"data/demo.jsonl": "c" * 64, "models/y": "d" * 64}
    runs = [
        completed(tmp_path, make_recipe("f", {"loss": "full"}), 2.0, contents=files),
        completed(tmp_path, make_recipe("c", {"loss": "x"}), 1.0, contents=other),
    ]
    assert "`loss`: the paired recipes differ in content of data/demo.jsonl." in report(runs)


def test_runs_of_two_grids_are_never_a_pair(tmp_path: Path) -> None:
    runs = [
        completed(tmp_path, make_recipe("a", {"loss": "full"}, grid="one"), 2.0),
        completed(tmp_path, make_recipe("b", {"loss": "completion"}, grid="two"), 1.0),
    ]
    [comparison] = build_comparisons(rows_of(runs))
    assert (comparison.num_pairs, len(comparison.unpaired)) == (0, 2)
    assert table_lines(report(runs))[0].split()[:5] == ["|", "run", "|", "grid", "|"]


def test_across_base_models_the_unit_is_bits_per_byte(tmp_path: Path) -> None:
    gemma = completed(
        tmp_path, make_recipe("g", {"model": "g"}, "model.path=m/g"), 2.0, num_bytes=4000
    )
    llama = completed(
        tmp_path, make_recipe("l", {"model": "l"}, "model.path=m/l"), 1.0, num_bytes=1000
    )
    [comparison] = build_comparisons(rows_of([gemma, llama]))
    assert comparison.unit == "bits per byte"
    # per token llama looks better (1 < 2), per byte it is worse: 1 nat/byte against 0.5
    assert comparison.mean_difference == pytest.approx(0.5 / math.log(2))
    assert "| bits per byte |" in report([gemma, llama])


def test_many_values_are_compared_with_the_first_only(tmp_path: Path) -> None:
    runs = [completed(tmp_path, make_recipe(f"s{seed}", {"seed": seed}), 2.0) for seed in range(5)]
    comparisons = build_comparisons(rows_of(runs))
    assert [(item.reference, item.compared) for item in comparisons] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
    ]
    assert "`seed` has 5 values: each is compared with the first, 0, only." in report(runs)
    assert len(build_comparisons(rows_of(runs[:4]))) == 6
    assert "compared with the first" not in report(runs[:4])


def test_what_an_axis_changes_is_named_and_warned_of_when_uneven(tmp_path: Path) -> None:
    def run(samples: int, loss: str, *more: str) -> Run:
        recipe = make_recipe(
            f"{loss}{samples}", {"samples": samples, "loss": loss}, f"loss={loss}", *more
        )
        return completed(tmp_path, recipe, 2.0)

    runs = [
        run(1, "full"),
        run(1, "completion"),
        run(2, "full"),
        run(2, "completion", "training.learning_rate=0.1"),
    ]
    text = report(runs)
    assert "`loss`: the paired recipes differ in loss, training.learning_rate." in text
    assert (
        "**warning:** `loss`, full and completion: only some pairs differ in training.learning_rate"
        " (1 of 2)" in text
    )
    runs[3] = run(2, "completion")
    assert "**warning:** `loss`" not in report(runs)
    assert "**warning:** `samples`: the recipes of its pairs are the same." in report(runs)
