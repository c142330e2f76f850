"""Comparisons that are refused, and flags on those that are not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runner.report.build import build_report
from runner.report.effects import Effect, Report
from runner.report.rows import ReportRow
from tests.support.reports import Run, rows_of
from tests.support.scored_runs import make_attempt, make_seed_recipe, scored, scored_grid

LOSSES = {"loss": ["full", "completion"]}


def truth(loss: str, **_: object) -> float:
    return 2.0 - 0.2 * (loss == "completion")


def report_of(runs: list[Run]) -> Report:
    return build_report(rows_of(runs))


def refusals(report: Report, axis: str = "loss") -> str:
    effects = [effect for one in report.effects if one.axis == axis for effect in one.shown]
    assert effects and all(effect.interval is None for effect in effects), "refused: no number"
    return " | ".join(reason for effect in effects for reason in effect.refused)


def flags(report: Report, axis: str = "loss") -> str:
    effects: list[Effect] = [e for one in report.effects if one.axis == axis for e in one.shown]
    assert effects and all(effect.interval is not None for effect in effects), "a number is shown"
    return " | ".join(flag for effect in effects for flag in effect.flags)


def test_two_base_models_under_one_name(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path, LOSSES, truth, base=lambda loss, **_: 3.0 if loss == "full" else 2.9
    )
    report = report_of(runs)
    reason = refusals(report)
    assert "full_s1 and completion_s1 both name demo_models/gemma" in reason
    assert "3.0000 and 2.9000" in reason and "different base models under one name" in reason
    assert "different base models under one name" in "\n".join(report.verdicts)


def test_two_base_models_within_the_seeds_of_one_arm(tmp_path: Path) -> None:
    def base(loss: str, seed: int) -> float:
        return 2.9 if (loss, seed) == ("completion", 3) else 3.0

    assert "different base models" in refusals(
        report_of(scored_grid(tmp_path, LOSSES, truth, base=base))
    )


def test_another_content_of_the_base_model(tmp_path: Path) -> None:
    def contents(loss: str, **_: object) -> dict[str, str]:
        return {"demo_models/gemma": ("a" if loss == "full" else "b") * 64}

    reason = refusals(report_of(scored_grid(tmp_path, LOSSES, truth, contents=contents)))
    assert "demo_models/gemma had two contents" in reason and "aaaaaaaaaaaa" in reason


def test_other_commits_under_one_name(tmp_path: Path) -> None:
    rows = rows_of(scored_grid(tmp_path, LOSSES, truth))
    rows = [
        replace(row, commits={"model.path": ("a" if row.axes["loss"] == "full" else "b") * 40})
        for row in rows
    ]
    assert "demo_models/gemma had two commits" in refusals(build_report(rows))


def test_other_rules_of_rows_and_masks(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, LOSSES, truth, rules=lambda loss, **_: 1 + (loss == "full"))
    assert "follow different rules for rows and masks" in refusals(report_of(runs))


def test_other_scored_tokens_under_one_id_hash(tmp_path: Path) -> None:
    """Two arms that score other parts of the same rows: 583 against 1,044 tokens."""
    few, many = np.full(40, 14), np.full(40, 26)
    few[:23] += 1
    many[:4] += 1
    assert (few.sum(), many.sum()) == (583, 1044)
    runs = scored_grid(
        tmp_path,
        LOSSES,
        truth,
        tokens=lambda loss, **_: few if loss == "full" else many,
        rows_hash="same",
    )
    report = report_of(runs)
    assert len({row.test_rows_hash for row in report.rows}) == 1
    assert (
        "full_s1 (and 2 more) and completion_s1 (and 2 more) have 583 and 1,044 scored tokens under"
        " the same row ids: nats per completion token are not comparable; bits per byte may be"
    ) in refusals(report)
    assert "No estimate for loss (full -> completion): full_s1" in "\n".join(report.verdicts)
    by_bytes = build_report(report.rows, metrics=["bits_per_byte"])
    assert by_bytes.effects[0].cells[0].interval is not None


def test_the_seeds_of_one_cell_on_other_tokens(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, LOSSES, truth, tokens=lambda loss, seed: 11 if seed == 2 else 10)
    assert "which differ only in the seed, have 400 and 440 tokens" in refusals(report_of(runs))


def test_other_test_rows(tmp_path: Path) -> None:
    def prefix(loss: str, **_: object) -> str:
        return "r" if loss == "full" else "s"

    runs = scored_grid(tmp_path / "recorded", LOSSES, truth, row_prefix=prefix)
    assert "were scored on different test rows" in refusals(report_of(runs))
    # The hash is not recorded, or wrong: the rows themselves are looked at
    runs = scored_grid(tmp_path / "hashed", LOSSES, truth, row_prefix=prefix, rows_hash="same")
    assert "were scored on different test rows" in refusals(report_of(runs))


def answering_grid(root: Path) -> list[Run]:
    tasks = {
        "sst2": ("{name: sst2, prompt: '{sentence}'}", {"accuracy": [1.0] * 30 + [0.0] * 10}),
        "squad_v2": (
            "{name: squad_v2, prompt: '{context} {question}'}",
            {"exact_match": [0.0] * 40, "f1": [0.5] * 40},
        ),
    }
    runs = []
    for task, (section, scores) in tasks.items():
        for loss in LOSSES["loss"]:
            for seed in (1, 2, 3):
                cell = {"task": task, "loss": loss}
                recipe = make_seed_recipe(cell, seed, None, f"data.task={section}")
                runs.append(
                    scored(
                        root,
                        recipe,
                        truth(loss) + seed / 100,
                        row_prefix=task,
                        scores=scores,
                        metrics={"f1": 0.9} if task == "sst2" else None,
                    )
                )
    return runs


def test_a_mean_over_two_tasks_is_never_taken(tmp_path: Path) -> None:
    report = report_of(answering_grid(tmp_path))
    assert "are different tasks, so their scores cannot be subtracted or averaged" in refusals(
        report, "task"
    )
    by_task = {(one.task, one.metric.name): one for one in report.effects if one.axis == "loss"}
    assert set(by_task) == {
        ("sst2", "nll_per_completion_token"),
        ("sst2", "accuracy"),
        ("sst2", "f1"),
        ("squad_v2", "nll_per_completion_token"),
        *(("squad_v2", name) for name in ("exact_match", "f1")),
        *(("squad_v2", f"has_answer_{name}") for name in ("exact_match", "f1")),
    }
    for one in by_task.values():
        assert {cell.task for effect in one.shown for pair in effect.pairs for cell in pair} == {
            one.task
        }
        assert not one.simple
    [effect] = by_task["sst2", "f1"].shown
    assert effect.refused == ("f1 of sst2_full_s1 is not a mean over rows, so it has no interval",)
    # The source of the rows distinguishes tasks of one name
    assert {cell.task for cell in report.cells} == {"sst2", "squad_v2"}


def test_one_task_on_two_sources_is_two_tasks(tmp_path: Path) -> None:
    runs = []
    for source in ("a", "b"):
        for seed in (1, 2):
            recipe = make_seed_recipe(
                {"data": source}, seed, None, f"data.train.path=data/{source}.jsonl"
            )
            runs.append(scored(tmp_path, recipe, 2.0, row_prefix=source))
    reason = refusals(report_of(runs), "data")
    assert "conversations of data/a.jsonl" in reason and "are different tasks" in reason


def test_functions_of_one_name_that_differ(tmp_path: Path) -> None:
    metric = "evaluation.metrics=[{name: miss, function: 'scores.py:miss', mode: min}]"
    generation = "evaluation.generation={enabled: true, max_new_tokens: 4}"
    for is_same in (True, False):
        runs = scored_grid(
            tmp_path / str(is_same),
            LOSSES,
            truth,
            own_scores=lambda loss, seed: {"miss": [1.0 * (loss == "full") + seed / 9] * 40},
            contents=lambda loss, same=is_same, **_: {"scores.py": "same" if same else loss},
            overrides=lambda **_: [generation, metric],
        )
        [miss] = [one for one in report_of(runs).effects if one.metric.name == "miss"]
        assert miss.metric.mode == "min"
        [effect] = miss.shown
        if is_same:
            assert effect.interval is not None
            assert effect.interval.estimate == -1.0
        else:
            assert "have different functions for miss" in effect.refused[0]


def change(rows: list[ReportRow], build: Callable[[ReportRow], dict[str, Any]]) -> list[ReportRow]:
    return [replace(row, **build(row)) for row in rows]


def test_flags_are_one_sentence_for_each_kind_of_thing(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], **LOSSES},
        lambda model, loss: truth(loss),
        attempt=lambda model, loss, seed: make_attempt(
            versions={"torch": "2.12" if loss == "full" else "2.13", "trl": "1.7"}
        ),
        stop_reason=lambda loss, seed, **_: (
            "early_stopping" if (loss, seed) == ("full", 1) else "num_train_epochs"
        ),
        best_step=lambda loss, **_: 24 if loss == "completion" else 12,
    )

    def build(row: ReportRow) -> dict[str, Any]:
        is_full = row.axes["loss"] == "full"
        return {
            "num_trained_tokens": 9000 if is_full else 3000,
            "schedule_steps": 24 if is_full else 48,
            "source_hash": ("a" if is_full else "b") * 64,
            "runner_version": "1.0",
        }

    report = build_report(change(rows_of(runs), build))
    [loss] = [one for one in report.effects if one.axis == "loss"]
    for effect in loss.shown:
        text = " | ".join(effect.flags)
        counts = [text.count(word) for word in ("torch", "trl ", "early", "converged", "source")]
        assert counts == [1, 0, 1, 1, 1]
    text = " | ".join((loss.pooled or loss.shown[0]).flags)
    assert "trained tokens (9,000 -> 3,000)" in text
    assert "learning-rate schedule (24 -> 48 steps)" in text
    assert "torch 2.12 (" in text and "and 2.13 (" in text
    assert "runs of loss=full and 0 of" in text
    assert "perhaps not converged: the best step is the last one in 0 of" in text


def test_what_only_some_pairs_change_is_flagged(tmp_path: Path) -> None:
    def overrides(model: str, loss: str, seed: int) -> list[str]:
        return ["training.learning_rate=0.1"] if (model, loss) == ("b", "completion") else []

    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], **LOSSES},
        lambda model, loss: truth(loss),
        overrides=overrides,
    )
    report = report_of(runs)
    text = flags(report)
    assert (
        "only some pairs of loss full -> completion differ in training.learning_rate (1 of 2)"
        in text
    )
    assert "loss full -> completion changes loss and training.learning_rate together" in text
    assert "only some pairs" in "\n".join(report.verdicts)


def test_an_axis_that_changes_nothing_is_flagged(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, {"x": [1, 2]}, lambda x: 2.0 + x / 10)
    assert "the recipes of x 1 -> 2 differ only in the seed" in flags(report_of(runs), "x")


def test_a_cell_whose_recipes_differ_in_more_than_the_seed_is_refused(tmp_path: Path) -> None:
    def overrides(model: str, loss: str, seed: int) -> list[str]:
        is_edited = (model, loss, seed) == ("a", "full", 3)
        return ["training.learning_rate=0.1"] if is_edited else []

    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], **LOSSES},
        lambda model, loss: truth(loss),
        overrides=overrides,
    )
    [loss] = [one for one in report_of(runs).effects if one.axis == "loss"]
    reasons = [reason for effect in loss.cells for reason in effect.refused]
    assert reasons == [
        "a_full_s1, a_full_s2, a_full_s3 are in one cell, but their recipes differ in"
        " training.learning_rate, not only in the seed"
    ]
    assert loss.pooled is not None
    assert any("1 of 2 pairs of cells are left out" in flag for flag in loss.pooled.flags)


def test_what_older_runs_lack_is_not_recorded(tmp_path: Path) -> None:
    rows = rows_of(scored_grid(tmp_path, LOSSES, truth))
    rows[:2] = change(rows[:2], lambda row: {"initial_weights_hash": "w"})
    [warning] = build_report(rows).warnings
    assert "hash of the initial weights (4 of 6 runs)" in warning
    assert warning.startswith("not recorded, so equality is unknown")
