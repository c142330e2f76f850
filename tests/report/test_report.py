"""The report says what the run directories say: nothing guessed, dropped or compared across what
differs.

`UPDATE_GOLDEN=1 pytest tests/report/test_report.py` rewrites the golden files.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from runner.cli.main import main
from runner.data.tasks.squad_v2 import SquadV2Task
from runner.data.tasks.sst2 import Sst2Task
from runner.files import write_json_atomic, write_text_atomic
from runner.plan.status import RunStatus, read_status
from runner.recipe.parse import Recipe, parse_recipe
from runner.report.format import FORMATS, MAX_WIDTH
from runner.report.rows import ReportRow, axis_text, build_rows, compare_with_base
from runner.report.statistics import build_comparisons, paired_interval
from runner.run.facts import read_facts
from runner.run.lease import Lease
from runner.run.paths import RunPaths
from runner.run.record import (
    Attempt,
    Failure,
    GenerationScore,
    RunRecord,
    SplitScore,
    TrainResult,
    write_record,
)
from tests.conftest import ROOT

GOLDEN_DIR = ROOT / "tests" / "golden"
Run = tuple[Recipe, RunPaths, RunStatus]

RECIPE: dict[str, Any] = {
    "model": {"path": "demo_models/gemma", "dtype": "float32"},
    "adapter": {"method": "none"},
    "quantization": {"method": "none"},
    "data": {
        "train": {"path": "data/demo.jsonl"},
        "task": {"name": "conversations"},
        "num_train_samples": 60,
        "num_validation_samples": 32,
        "num_test_samples": 64,
        "seed": 7,
        "max_length": 256,
    },
    "loss": "full",
    "training": {
        "seed": 1,
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3.0,
        "learning_rate": 2e-3,
        "gradient_checkpointing": False,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 8},
    "early_stopping": {"enabled": False},
    "checkpoints": {"save_strategy": "steps", "save_steps": 10},
    "launch": {"accelerate_config": "accelerate_configs/cpu.yaml"},
}
NUM_COMPLETION_TOKENS, NUM_BYTES = 1000, 4000


def make_recipe(name: str, axes: dict[str, Any], *overrides: str, grid: str = "demo") -> Recipe:
    content = RECIPE | {"run": {"grid": grid, "name": name, "axes": axes}}
    return parse_recipe(json.dumps(content), where=name, overrides=overrides)


def make_score(nll: float, num_bytes: int = NUM_BYTES) -> SplitScore:
    return SplitScore(
        num_rows=64,
        num_completion_tokens=NUM_COMPLETION_TOKENS,
        num_tokens=3000,
        num_bytes=num_bytes,
        completion_nll_sum=nll * NUM_COMPLETION_TOKENS,
        nll_sum=(nll + 1) * 3000,
    )


def write_base(root: Path, recipe: Recipe, *attempts: Attempt) -> RunPaths:
    paths = RunPaths(root / recipe.run.grid / recipe.run.name)
    write_json_atomic(
        paths.recipe_path,
        {"recipe": recipe.model_dump(mode="json"), "recipe_digest": "d", "contents": {}},
    )
    write_record(paths, RunRecord(attempts=attempts))
    return paths


def completed(
    root: Path,
    recipe: Recipe,
    tuned: float,
    base: float = 3.0,
    *,
    rows_hash: str | None = "a1" * 32,
    num_bytes: int = NUM_BYTES,
    stop_reason: str = "num_train_epochs",
    answers: dict[str, GenerationScore] | None = None,
) -> Run:
    paths = write_base(root, recipe)
    result = TrainResult(
        recipe_digest="d",
        outcome="completed",
        stop_reason=stop_reason,
        num_steps=24,
        best_step=20,
        best_metric=tuned,
        metric="nll_per_completion_token",
        num_train_rows=60,
        base={"test": make_score(base, num_bytes), "validation": make_score(9.0)},
        tuned={"test": make_score(tuned, num_bytes), "validation": make_score(9.0)},
        generation=answers or {},
    )
    write_json_atomic(paths.result_path, result.model_dump(mode="json"))
    if rows_hash is not None:
        write_json_atomic(
            paths.samples_path, {"splits": {"test": {"num_rows": 64, "ids_hash": rows_hash}}}
        )
    return recipe, paths, read_status(read_facts(paths), recipe, {})


def not_completed(
    root: Path, recipe: Recipe, failure: Failure | None = None, number: int = 1
) -> Run:
    """A failed run, or an interrupted one where there is no failure."""
    attempt = Attempt(
        number=number,
        started_at_utc=f"2026-01-0{number}T00:00:00+00:00",
        ended_at_utc=f"2026-01-0{number}T00:05:00+00:00" if failure else None,
        command=("true",),
        environment={},
        num_processes=1,
        host=f"host-{number}",
        failure=failure,
    )
    paths = write_base(root, recipe, attempt)
    write_text_atomic(paths.attempt(number).log_path, f"started on host-{number}\n")
    return recipe, paths, read_status(read_facts(paths), recipe, {})


def pending(root: Path, recipe: Recipe) -> Run:
    paths = RunPaths(root / recipe.run.grid / recipe.run.name)
    return recipe, paths, read_status(read_facts(paths), recipe, {})


def rows_of(runs: Iterable[Run]) -> list[ReportRow]:
    return build_rows(
        (recipe, read_facts(paths, with_samples=True), status) for recipe, paths, status in runs
    )


def report(runs: Sequence[Run], format: str = "md") -> str:
    rows = rows_of(runs)
    return FORMATS[format](rows, build_comparisons(rows))


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.fixture
def demo_runs(tmp_path: Path) -> Iterator[list[Run]]:
    """Two models x two losses x three sample counts; one run failed, one never started, one is
    running.
    """
    nll = {"gemma": 1.9, "llama": 1.7}
    runs = []
    for model in nll:
        for loss in ("full", "completion"):
            for samples in (60, 120, 180):
                name = f"{model}_{loss}_{samples:03}"
                recipe = make_recipe(
                    name,
                    {"model": model, "loss": loss, "samples": samples, "epochs": 3},
                    f"model.path=demo_models/{model}",
                    f"loss={loss}",
                    f"data.num_train_samples={samples}",
                )
                tuned = (
                    nll[model] - samples / 1000 - (0.05 + samples / 10000) * (loss == "completion")
                )
                if name == "gemma_completion_180":
                    runs.append(
                        not_completed(tmp_path, recipe, Failure(kind="diverged", message="NaN"))
                    )
                elif name in ("llama_full_060", "llama_completion_060"):
                    runs.append(pending(tmp_path, recipe))
                elif name == "gemma_full_060":
                    runs.append(completed(tmp_path, recipe, 3.02, stop_reason="early_stopping"))
                else:
                    runs.append(
                        completed(
                            tmp_path, recipe, tuned, num_bytes=4000 if model == "gemma" else 3600
                        )
                    )
    recipe, paths, _ = runs[-2]
    paths.result_path.unlink()
    with closing(Lease(paths.lease_path)) as lease:
        assert lease.try_acquire()
        runs[-2] = (recipe, paths, read_status(read_facts(paths), recipe, {}))
        yield runs


@pytest.mark.parametrize("format", FORMATS)
def test_golden(demo_runs: list[Run], format: str) -> None:
    path = GOLDEN_DIR / f"report_demo.{format}"
    text = report(demo_runs, format)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def make_answers(*metrics: dict[str, float]) -> dict[str, GenerationScore]:
    """Of the base and of the tuned model."""
    return {
        model: GenerationScore(
            num_rows=64, num_judged=64, num_unfinished=7 * at, num_unreadable=at, metrics=values
        )
        for at, (model, values) in enumerate(zip(("tuned", "base"), reversed(metrics), strict=True))
    }


@pytest.fixture
def answering_runs(tmp_path: Path) -> list[Run]:
    """Two tasks x two losses; one run's models did not answer."""
    runs = []
    names = {"sst2": Sst2Task.METRICS, "squad_v2": SquadV2Task.METRICS}
    prompts = {"sst2": "{sentence}", "squad_v2": "{context} {question}"}
    for task, metrics in names.items():
        for at, loss in enumerate(("full", "completion")):
            recipe = make_recipe(
                f"{task}_{loss}",
                {"task": task, "loss": loss},
                f"loss={loss}",
                f"data.task={{name: {task}, prompt: '{prompts[task]}'}}",
            )
            values = [{name: part * (1 + at) / 4 for name in metrics} for part in (0.5, 1.5)]
            answers = None if (task, loss) == ("squad_v2", "full") else make_answers(*values)
            runs.append(completed(tmp_path, recipe, 2.0 - at / 10, answers=answers))
    return runs


def test_golden_of_answers(answering_runs: list[Run]) -> None:
    path = GOLDEN_DIR / "report_answers.md"
    text = report(answering_runs)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert max(cell_len(line) for line in table_lines(text)) <= MAX_WIDTH


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


def test_one_row_per_run_and_what_is_missing_is_blank(demo_runs: list[Run]) -> None:
    rows = list(csv.DictReader(io.StringIO(report(demo_runs, "csv"))))
    assert len(rows) == len(demo_runs)
    states = {row["run"]: row["state"] for row in rows}
    assert states["gemma_completion_180"] == "failed"
    assert states["llama_completion_120"] == "running"
    assert states["llama_full_060"] == "pending"
    for row in rows:
        measured = list(row.values())[list(row).index("state") + 1 :]
        assert all(measured) if row["state"] == "completed" else not any(measured)
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
    [comparison] = build_comparisons(rows_of(runs))
    assert (comparison.num_pairs, comparison.mean_difference) == (0, None)
    assert comparison.unpaired == ("a1 has no test score, a2 has no test score",)


@pytest.mark.parametrize("format", FORMATS)
def test_a_score_that_is_no_number_is_blank(tmp_path: Path, format: str) -> None:
    run = completed(tmp_path, make_recipe("a", {}), 2.0)
    content = run[1].result_path.read_text()
    assert content.count(" 2000.0") == 1
    run[1].result_path.write_text(content.replace(" 2000.0", " NaN"))
    text = report([run], format)
    assert "nan" not in text.lower()
    assert rows_of([run])[0].tuned.nll_per_token == 3.0


def test_a_change_that_rounds_to_zero_has_no_minus(tmp_path: Path) -> None:
    text = report([completed(tmp_path, make_recipe("a", {}), tuned=2.99999, base=3.0)])
    assert "+0.0000" in text and "-0.0000" not in text


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


def test_different_test_rows_are_a_warning(tmp_path: Path) -> None:
    def run(name: str, rows_hash: str | None) -> Run:
        return completed(tmp_path, make_recipe(name, {"task": name}), 2.0, rows_hash=rows_hash)

    same = report([run("a", "f" * 64), run("b", "f" * 64)])
    assert (
        "test rows;" not in same and "different test rows" not in same and "no record" not in same
    )
    text = report([run("a", "f" * 64), run("b", "0" * 64)])
    assert "**warning:** 2 different sets of test rows" in text
    assert "ffffffffffff (64 rows): a; 000000000000 (64 rows): b" in text
    assert "**warning:** `task`: 1 pair scored on different test rows." in text
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
    assert "1 of 3 completed runs beat their base on test NLL; not: same, worse." in report(runs)


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
    compared = [
        (axis_text(item.reference), axis_text(item.compared))
        for item in build_comparisons(rows_of(runs))
    ]
    # 1 and 1.0 are one value
    assert compared == [("1", "1"), ("1", "true"), ("1", "null"), ("1", '""')]


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
def test_report_does_not_depend_on_attempts_or_clocks(tmp_path: Path, format: str) -> None:
    def runs(root: Path, number: int) -> list[Run]:
        first = completed(root, make_recipe("a", {"x": 1}), 2.0)
        failed = not_completed(
            root, make_recipe("b", {"x": 2}), Failure(kind="data", message=str(root)), number
        )
        return [first, failed]

    assert report(runs(tmp_path / "1", 1), format) == report(runs(tmp_path / "2", 2), format)


@pytest.mark.parametrize("format", FORMATS)
def test_no_runs_is_a_report_too(format: str) -> None:
    assert report([], format).endswith("\n")


def test_the_command_line_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "recipes", "--format", "xls"])
    assert f"(choose from {', '.join(map(repr, FORMATS))})" in capsys.readouterr().err
