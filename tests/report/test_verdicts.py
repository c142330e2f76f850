"""The answer in sentences: declared contrasts first, and no claim of equality without evidence."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cli.main import main
from runner.report.axis import identify
from runner.report.build import build_report
from runner.report.effects import AxisEffects, Effect, Report
from runner.report.rows import ReportRow
from runner.report.statistics import benjamini_hochberg, holm
from runner.report.verdicts import write_verdicts
from runner.run.record import Failure
from tests.support.reports import make_recipe, not_completed, pending, rows_of
from tests.support.scored_runs import (
    draw_noise,
    make_attempt,
    make_seed_recipe,
    scored,
    scored_grid,
)

AXES = {"model": ["a", "b"], "loss": ["full", "completion"]}


def contrast(**more: Any) -> SimpleNamespace:
    fields = {"axis": "loss", "from_": "full", "to": "completion", "margin": None}
    return SimpleNamespace(**(fields | {"metric": "nll_per_completion_token"} | more))


def declaring_rows(
    root: Path,
    effect: float,
    declared: Any,
    then: Callable[[ReportRow], Any] | None = None,
    **settings: Any,
) -> list[ReportRow]:
    """Two models x two losses x three seeds; `then` is what a run's first attempt recorded."""
    runs = scored_grid(
        root,
        AXES,
        lambda model, loss: 2.0 + effect * (loss == "completion") + 0.5 * (model == "b"),
        attempt=make_attempt(),
        **({"sd_run": 0.002, "sd_row": 0.02} | settings),
    )
    return [
        replace(
            row,
            declared_now=(declared,),
            declared_then=(declared,) if then is None else then(row),
        )
        for row in rows_of(runs)
    ]


def find_loss(report: Report) -> AxisEffects:
    [found] = [one for one in report.effects if one.axis == "loss"]
    return found


def test_a_declared_contrast_comes_first_and_is_confirmatory(tmp_path: Path) -> None:
    report = build_report(declaring_rows(tmp_path, -0.283, contrast()))
    main = find_loss(report).main
    assert all(effect.is_confirmatory and effect.is_clear for effect in main)
    others = [e for one in report.effects if one.axis != "loss" for e in one.shown]
    assert others and not any(effect.is_confirmatory for effect in others)
    first = next(text for text in report.verdicts if "better" in text)
    assert first.startswith("loss: completion is better than full by 0.28")
    assert (
        "nats per completion token" in first and "3 seeds x 40 test rows, Holm p < 0.001" in first
    )
    assert "exploratory" not in first
    later = [text for text in report.verdicts if text.startswith("model:")]
    assert later and all("exploratory" in text or "depends" in text for text in later)


def test_declared_contrasts_of_a_grid_share_one_error_rate_by_holm(tmp_path: Path) -> None:
    declared = (contrast(), contrast(metric="bits_per_byte"))
    rows = [
        replace(row, declared_now=declared, declared_then=declared)
        for row in declaring_rows(tmp_path, -0.01, contrast(), sd_run=0.02)
    ]
    report = build_report(rows)
    family = [effect for one in report.effects if one.axis == "loss" for effect in one.family]
    # The mean and the effect in each model by both metrics, whichever of them are shown
    assert len(family) == 6 and all(effect.is_confirmatory for effect in family)
    adjusted = dict(zip(map(identify, family), holm(list_p(family)), strict=True))
    others: dict[object, Effect] = {}
    for one in report.effects:
        for effect in one.main:
            assert effect.is_confirmatory == (one.axis == "loss")
            if effect.is_confirmatory:
                assert effect.p_adjusted == adjusted[identify(effect)]
        for effect in one.shown:
            if not effect.is_confirmatory:
                others[identify(effect)] = effect
    by_rate = benjamini_hochberg(list_p(list(others.values())))
    assert [effect.p_adjusted for effect in others.values()] == pytest.approx(by_rate)


def list_p(effects: Sequence[Effect]) -> list[float]:
    p = [effect.interval.p for effect in effects if effect.interval is not None]
    return [one for one in p if one is not None]


def test_effects_in_each_model_count_with_their_mean_which_is_not_shown(tmp_path: Path) -> None:
    """Otherwise the interaction's test, which looks at the results, would choose the family."""
    effects = {"a": -0.03, "b": 0.03}
    runs = scored_grid(
        tmp_path, AXES, lambda model, loss: 2.0 + effects[model] * (loss == "completion")
    )
    rows = [
        replace(row, declared_now=(one,), declared_then=(one,))
        for row in rows_of(runs)
        for one in [contrast(margin=0.05)]
    ]
    loss = find_loss(build_report(rows))
    assert loss.depends_on == ("model",) and len(loss.family) == 3
    assert [e.p_adjusted for e in loss.main] == pytest.approx(holm(list_p(loss.family))[:2])
    # Two effects of which each may be called equivalent: each at 2.5%
    assert [e.equivalence and e.equivalence.level for e in loss.main] == pytest.approx([0.95] * 2)
    assert "(95% interval of the difference" in "\n".join(build_report(rows).verdicts)


@pytest.mark.parametrize(
    ("estimate", "p", "said"),
    [
        (
            0.021,
            0.035,
            "; the intervals at the 2 levels are wider, to hold jointly at 95%, and this one",
        ),
        (
            0.050,
            0.061,
            "; the interval excludes 0, but p, adjusted over all ",
        ),
        (0.021, 0.061, "); this does not show that they are equal"),
    ],
)
def test_where_interval_and_p_say_two_things_the_sentence_says_why(
    tmp_path: Path, estimate: float, p: float, said: str
) -> None:
    effects = {"a": -0.03, "b": 0.03}
    runs = scored_grid(
        tmp_path, AXES, lambda model, loss: 2.0 + effects[model] * (loss == "completion")
    )
    rows = [
        replace(row, declared_now=(contrast(),), declared_then=(contrast(),))
        for row in rows_of(runs)
    ]
    report = build_report(rows)
    loss = find_loss(report)

    def change(effect: Effect) -> Effect:
        assert effect.interval is not None and effect.interval.level == 0.975
        interval = replace(effect.interval, estimate=estimate, half_width=0.023)
        return replace(effect, interval=interval, p_adjusted=p)

    simple = {"model": tuple(map(change, loss.simple["model"]))}
    told = write_verdicts(replace(report, effects=(replace(loss, simple=simple),)))
    [first, second] = [text for text in told if "no clear difference" in text]
    assert said in first and said in second


def test_a_declared_contrast_without_a_p_counts_in_the_family(tmp_path: Path) -> None:
    rows = declaring_rows(tmp_path, -0.283, contrast())
    alone = find_loss(build_report(rows)).main[0].p_adjusted
    lost = (contrast(), contrast(metric="rouge"), contrast(to="prompt"))
    more = find_loss(build_report([replace(row, declared_then=lost) for row in rows])).main[0]
    num = len(find_loss(build_report(rows)).family)
    assert alone is not None
    assert more.p_adjusted == pytest.approx(alone * (num + 2) / num)


def test_the_direction_is_that_of_the_declaration(tmp_path: Path) -> None:
    rows = declaring_rows(tmp_path, -0.283, contrast(from_="completion", to="full"))
    loss = find_loss(build_report(rows))
    assert (loss.reference, loss.compared) == ("completion", "full")
    assert all(e.interval is not None and e.interval.estimate > 0.2 for e in loss.main)


def test_a_margin_shows_equivalence_and_no_margin_shows_none(tmp_path: Path) -> None:
    within = build_report(declaring_rows(tmp_path / "in", 0.0, contrast(margin=0.1)))
    text = "\n".join(within.verdicts)
    assert (
        "the two are equivalent within the declared margin of 0.1 nats per completion token" in text
    )
    assert all(e.equivalence is not None and e.equivalence.is_shown for e in find_loss(within).main)
    outside = build_report(declaring_rows(tmp_path / "out", 0.0, contrast(margin=0.0001)))
    text = "\n".join(outside.verdicts)
    assert "equivalence within 0.0001 is not shown" in text
    assert "this does not show that they are equal" in text
    none = build_report(declaring_rows(tmp_path / "none", 0.0, contrast()))
    assert all(effect.equivalence is None for effect in find_loss(none).main)
    assert "are equivalent" not in "\n".join(none.verdicts)


def test_a_contrast_declared_after_a_start_is_exploratory(tmp_path: Path) -> None:
    def then(row: ReportRow) -> tuple[Any, ...]:
        return () if row.name == "a_full_s2" else (contrast(),)

    report = build_report(declaring_rows(tmp_path, -0.283, contrast(), then))
    main = find_loss(report).main
    why = "declared after demo/a_full_s2 started on 2026-01-02"
    touched = [effect for effect in main if effect.why_exploratory]
    assert touched and all(effect.why_exploratory == why for effect in touched)
    assert not any(effect.is_confirmatory for effect in touched)
    assert f"exploratory: {why}, Benjamini-Hochberg" in "\n".join(report.verdicts)


def test_a_margin_that_was_changed_later_does_not_count(tmp_path: Path) -> None:
    rows = declaring_rows(
        tmp_path, -0.283, contrast(margin=0.5), lambda row: (contrast(margin=0.02),)
    )
    for effect in find_loss(build_report(rows)).main:
        assert effect.equivalence is None and not effect.is_confirmatory
        assert effect.why_exploratory.startswith("declared with a margin of 0.02 when demo/")


def test_a_run_that_recorded_no_declaration_makes_it_exploratory(tmp_path: Path) -> None:
    rows = declaring_rows(tmp_path, -0.283, contrast(), lambda row: None)
    assert not any(effect.is_confirmatory for effect in find_loss(build_report(rows)).main)


def test_a_declaration_of_what_is_not_there_is_a_warning_by_name(tmp_path: Path) -> None:
    for wrong, said in (
        ({"axis": "rank"}, "no run has the axis `rank`; available: model, loss, seed"),
        ({"to": "prompt"}, "no run has loss prompt; available: full, completion"),
        ({"metric": "rouge"}, "no run has the metric `rouge`"),
    ):
        rows = declaring_rows(tmp_path / str(said), 0.0, contrast(**wrong))
        warnings = build_report(rows).warnings
        assert any(said in text and text.startswith("demo declares") for text in warnings)


def test_a_declared_metric_is_compared_where_it_would_not_be_chosen(tmp_path: Path) -> None:
    rows = declaring_rows(tmp_path, -0.283, contrast(metric="bits_per_byte"))
    loss = [one for one in build_report(rows).effects if one.axis == "loss"]
    assert [one.metric.name for one in loss] == ["bits_per_byte", "nll_per_completion_token"]
    assert [any(e.is_confirmatory for e in one.main) for one in loss] == [True, False]


def test_what_is_not_clear_is_never_told_as_equal(tmp_path: Path) -> None:
    runs = scored_grid(tmp_path, {"loss": ["full", "completion"]}, lambda loss: 2.0, sd_run=0.05)
    [verdict] = build_report(rows_of(runs)).verdicts
    assert verdict.startswith("No clear difference, which does not show that the values are equal")
    assert "significant" not in verdict


def test_a_larger_metric_of_answers_is_better(tmp_path: Path) -> None:
    sst2 = "data.task={name: sst2, prompt: '{sentence}'}"
    runs = scored_grid(
        tmp_path,
        {"loss": ["full", "completion"]},
        lambda loss: 2.0,
        overrides=lambda **_: [sst2],
        scores=lambda loss, seed: {
            "accuracy": [float(at % 10 < 3 + 6 * (loss == "full")) for at in range(40)]
        },
    )
    text = "\n".join(build_report(rows_of(runs)).verdicts)
    assert "loss: full is better than completion by 0.600 in accuracy" in text


def test_two_seeds_say_how_little_they_show(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"loss": ["full", "completion"]},
        lambda loss: 2.0 + 1.0 * (loss == "full"),
        seeds=(1, 2),
        sd_run=0.001,
    )
    assert "2 seeds: only very large differences can be detected" in "\n".join(
        build_report(rows_of(runs)).verdicts
    )


def test_of_many_exploratory_contrasts_the_rest_is_named(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"num_train_samples": list(range(1, 12))},
        lambda num_train_samples: 3.0 - num_train_samples / 5,
        seeds=(1, 2),
    )
    verdicts = build_report(rows_of(runs)).verdicts
    assert sum(" is better than " in text for text in verdicts) == 8
    [rest] = [text for text in verdicts if text.startswith("Also clear, or dependent")]
    assert "num_train_samples (1 -> 10, nats per completion token)" in rest and "1 -> 11" in rest


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    waiting = [pending(tmp_path / "w", make_recipe(f"r{x}", {"x": x})) for x in (1, 2)]
    assert build_report(rows_of(waiting)).verdicts == ("No run has a score yet.",)
    alone = [scored(tmp_path / "a", make_recipe("alone", {"x": 1}), 2.0)]
    assert build_report(rows_of(alone)).verdicts == (
        "The runs differ in no axis other than the seed, so there is nothing to compare.",
    )
    assert build_report([]).verdicts == ("No run has a score yet.",)


@pytest.mark.parametrize("is_declared", [True, False])
def test_an_arm_without_any_score_is_told(tmp_path: Path, is_declared: bool) -> None:
    rows = [
        replace(row, declared_then=(contrast(),), declared_now=(contrast(),))
        if is_declared
        else row
        for row in lose_an_arm(tmp_path)
    ]
    text = "\n".join(build_report(rows).verdicts)
    reason = "completion_60_s1 (failed), completion_60_s2 (failed); completion_180_s1 (failed)"
    declared = "declared, full -> completion, NLL per completion token"
    named = declared if is_declared else "full -> completion"
    assert f"No estimate for loss ({named}): {reason}" in text


def lose_an_arm(root: Path) -> list[ReportRow]:
    """Every run of one loss failed."""
    axes = {"loss": ["full"], "num_train_samples": [60, 180]}
    runs = scored_grid(root, axes, lambda loss, num_train_samples: 2.0, seeds=(1, 2))
    for samples in axes["num_train_samples"]:
        for seed in (1, 2):
            cell = {"loss": "completion", "num_train_samples": samples}
            failure = Failure(kind="diverged", message="NaN")
            runs.append(not_completed(root, make_seed_recipe(cell, seed), failure))
    return rows_of(runs)


def test_a_declared_metric_that_no_run_of_an_arm_has_is_told(tmp_path: Path) -> None:
    declared = contrast(metric="accuracy")
    rows = [replace(row, declared_now=(declared,)) for row in lose_an_arm(tmp_path)]
    sst2 = "data.task={name: sst2, prompt: '{sentence}'}"
    other = make_recipe("other", {"loss": "prompt", "num_train_samples": 60, "seed": 1}, sst2)
    more = rows_of([scored(tmp_path, other, 2.0, scores={"accuracy": [1.0] * 40})])
    text = "\n".join(build_report([*rows, *more]).verdicts)
    assert "No estimate for" in text and "(declared, full -> completion, accuracy)" in text


def test_an_axis_whose_cells_never_meet_is_told(tmp_path: Path) -> None:
    """`rank` exists with LoRA alone, so that the two methods have no cells in common."""
    runs = []
    for at, axes in enumerate(({"method": "full"}, {"method": "lora", "rank": 4})):
        for seed in (1, 2):
            overrides = (f"training.seed={seed}", f"training.learning_rate={at + 1}e-4")
            recipe = make_recipe(f"r{at}_s{seed}", axes | {"seed": seed}, *overrides)
            runs.append(scored(tmp_path, recipe, 2.0 + draw_noise(seed, at)))
    text = "\n".join(build_report(rows_of(runs)).verdicts)
    assert "No estimate for method (full -> lora): r0_s1 (and 1 more) has no partner with" in text


def test_one_seed_of_a_declared_contrast_is_told(tmp_path: Path) -> None:
    rows = declaring_rows(tmp_path, -0.1, contrast(), seeds=(1,))
    text = "\n".join(build_report(rows).verdicts)
    assert "loss: full -> completion at model=a: one seed, so no verdict" in text


def test_a_chosen_part_of_a_grid_confirms_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = "{axis: loss, from: full, to: completion, metric: nll_per_completion_token}"
    runs = scored_grid(
        tmp_path / "runs",
        AXES,
        lambda model, loss: 2.0 - 0.3 * (loss == "full"),
        overrides=lambda **_: [f"run.declared=[{declared}]"],
        attempt=make_attempt(),
    )
    tried = runs[0][0].model_copy(
        update={
            "run": runs[0][0].run.model_copy(update={"name": "tried", "overrides": ("loss=full",)})
        }
    )
    scored(tmp_path / "runs", tried, 2.0)
    folders = [str(paths.run_dir) for _, paths, _ in runs]

    def report_on(*arguments: str) -> str:
        root = str(tmp_path / "runs")
        assert main(["report", *arguments, "--format", "json", "--output-root", root]) == 0
        return capsys.readouterr().out

    whole = json.loads(report_on(*folders))
    assert not any("are not in this report" in text for text in whole["warnings"])
    assert any("Holm p" in text for text in whole["verdicts"])
    for chosen in (folders[:1] + folders[2:], [*folders, "--where", "seed=1,3"]):
        part = json.loads(report_on(*chosen))
        num = 12 - len(part["rows"])
        why = f"{num} of 12 runs of grid demo {'is' if num == 1 else 'are'} not in this report"
        # Runs of overrides are no cells of the grid, and are not missed
        [warning] = [text for text in part["warnings"] if text.startswith(why)]
        assert "tried" not in warning and "a_full_s2" in warning
        told = [text for text in part["verdicts"] if text.startswith("loss: full is better")]
        assert told and all(f"exploratory: {why}, Benjamini-Hochberg" in text for text in told)


def test_both_intervals_of_a_sentence_say_how_much_better_the_better_one_is(tmp_path: Path) -> None:
    axes = {"loss": ["full", "completion"]}
    for effect, better in ((-0.1, "completion"), (0.1, "full")):
        runs = scored_grid(
            tmp_path / better, axes, lambda loss, by=effect: 2.0 + by * (loss == "completion")
        )
        one = contrast(margin=0.095)
        rows = [replace(row, declared_now=(one,), declared_then=(one,)) for row in rows_of(runs)]
        [text] = build_report(rows).verdicts
        assert text.startswith(f"loss: {better} is better than")
        found = re.findall(r"interval (?:of the difference )?(-?[0-9.]+) to (-?[0-9.]+)", text)
        (low, high), (low_90, high_90) = (tuple(map(float, two)) for two in found)
        assert 0 < low < low_90 < high_90 < high


def test_more_than_the_margin_is_told_as_such(tmp_path: Path) -> None:
    text = "\n".join(build_report(declaring_rows(tmp_path, -0.283, contrast(margin=0.02))).verdicts)
    assert "; this exceeds the declared margin of 0.02." in text
    assert "equivalence" not in text


def test_a_clear_difference_below_the_noise_says_of_how_many_pairs(tmp_path: Path) -> None:
    rows = declaring_rows(tmp_path, -0.02, contrast(), sd_run=0.01, seeds=range(1, 13))
    text = "\n".join(build_report(rows).verdicts)
    assert (
        "; this is below the noise floor: two single runs of one recipe differ by less than 0.0"
        in text
    )


def test_runs_of_one_cell_have_scores_that_do_not_compare(tmp_path: Path) -> None:
    runs = [scored(tmp_path, make_recipe(name, {}), 2.0) for name in ("one", "two")]
    [verdict] = build_report(rows_of(runs)).verdicts
    assert (
        verdict
        == "The runs have scores, but no two are comparable: one and two are in the same cell."
    )
