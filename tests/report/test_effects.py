"""Effects over cells: each situation in which the earlier paired means misled."""

from dataclasses import replace
from pathlib import Path

import pytest

from runner.report.build import build_report
from runner.report.cells import find_seed_axis
from runner.report.effects import AxisEffects, Report
from runner.report.rows import ReportRow
from runner.run.record import Failure
from tests.support.reports import Run, not_completed, pending, rows_of
from tests.support.scored_runs import draw_noise, make_seed_recipe, scored, scored_grid


def report_of(runs: list[Run], **settings: object) -> Report:
    return build_report(rows_of(runs), **settings)  # type: ignore[arg-type]


def find(report: Report, axis: str, metric: str = "nll_per_completion_token") -> AxisEffects:
    [found] = [one for one in report.effects if (one.axis, one.metric.name) == (axis, metric)]
    return found


def told(report: Report) -> str:
    return "\n".join(report.verdicts)


def test_effects_of_opposite_sign_in_two_models_have_no_mean(tmp_path: Path) -> None:
    effects = {"gemma": 0.30, "llama": -0.22}
    runs = scored_grid(
        tmp_path,
        {"model": ["gemma", "llama"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 + (effects[model] if loss == "completion" else 0),
    )
    report = report_of(runs)
    loss = find(report, "loss")
    assert (loss.pooled, loss.depends_on) == (None, ("model",))
    by_model = {effect.at["model"]: effect for effect in loss.simple["model"]}
    for model, truth in effects.items():
        interval = by_model[model].interval
        assert interval is not None and interval.bounds is not None
        assert interval.estimate == pytest.approx(truth, abs=0.05)
        assert by_model[model].is_clear
    text = told(report)
    assert "loss: the effect of full -> completion" in text and "depends on model" in text
    assert "so no overall effect is given" in text
    assert "full is better than completion by 0." in text
    assert "completion is better than full by 0." in text


def test_fifteen_pairs_of_three_models_and_five_seeds_are_five_seeds(tmp_path: Path) -> None:
    """Cells are chosen and no draws: the degrees of freedom are those of the seeds."""
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b", "c"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 - 0.05 * (loss == "completion"),
        seeds=(1, 2, 3, 4, 5),
        sd_run=0.05,
    )
    report = report_of(runs)
    assert [len(cell.runs) for cell in report.cells] == [5] * 6
    assert find_seed_axis(report.rows) == "seed"
    assert {one.axis for one in report.effects} == {"model", "loss"}
    loss = find(report, "loss")
    for effect in loss.shown + loss.cells:
        assert effect.interval is not None
        assert effect.interval.kind == "seeds and rows"
        assert effect.interval.df_seed == 4  # not 14
        assert set(effect.interval.num_seeds) == {5}
    assert len(loss.cells) == 3 and len(loss.simple["model"]) == 3


DEMO_EFFECTS = {60: -0.28, 180: -0.09}


def demo(root: Path, **settings: object) -> list[Run]:
    return scored_grid(
        root,
        {
            "model": ["gemma", "llama"],
            "loss": ["full", "completion"],
            "num_train_samples": [60, 180],
        },
        lambda model, loss, num_train_samples: (
            2.0
            - 0.17 * (num_train_samples == 180)
            + (DEMO_EFFECTS[num_train_samples] if loss == "completion" else 0)
        ),
        **settings,
    )


def test_an_effect_that_depends_on_another_axis_has_no_overall_number(tmp_path: Path) -> None:
    report = report_of(demo(tmp_path))
    loss = find(report, "loss")
    assert loss.pooled is None and "num_train_samples" in loss.depends_on
    for effect in loss.simple["num_train_samples"]:
        assert effect.interval is not None
        truth = DEMO_EFFECTS[effect.at["num_train_samples"]]
        assert effect.interval.estimate == pytest.approx(truth, abs=0.03)
        assert effect.interval.level == pytest.approx(0.975)
    text = told(report)
    assert "depends on" in text and "num_train_samples (interaction p < 0.001)" in text
    assert "completion is better than full by 0.27" in text or "by 0.28" in text
    assert "at num_train_samples=60" in text and "at num_train_samples=180" in text


def test_rows_that_come_with_more_updates_say_so(tmp_path: Path) -> None:
    def count(num_train_samples: int, **_: object) -> int:
        return {60: 32, 180: 92}[num_train_samples]

    rows = rows_of(demo(tmp_path, num_steps=count))
    report = build_report(rows)
    flag = (
        "num_train_samples 60 -> 180 also changes the number of updates (32 -> 92): the difference"
        " is not due to num_train_samples alone"
    )
    samples = find(report, "num_train_samples")
    assert all(flag in effect.flags for effect in samples.shown)
    assert f"{flag}." in report.verdicts
    loss = find(report, "loss")
    assert not any("updates" in flag for effect in loss.shown for flag in effect.flags)
    # What is recorded of the schedule is told in the same sentence where it is the same
    recorded = [replace(row, schedule_steps=row.num_steps) for row in rows]
    for effect in find(build_report(recorded), "num_train_samples").shown:
        [said] = [flag for flag in effect.flags if "updates" in flag]
        assert "updates and the length of the learning-rate schedule (32 -> 92)" in said


def test_equal_updates_are_no_flag(tmp_path: Path) -> None:
    report = report_of(demo(tmp_path, num_steps=46, best_step=40))
    assert not any(effect.flags for one in report.effects for effect in one.shown)


def test_one_pair_of_single_runs_has_no_verdict(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path, {"loss": ["full", "completion"]}, lambda loss: 2.0 + (loss == "full"), seeds=[1]
    )
    report = report_of(runs)
    loss = find(report, "loss")
    assert loss.pooled is None and not loss.simple
    [effect] = loss.cells
    assert effect.interval is not None and effect.interval.kind == "rows"
    assert effect.p_adjusted is None and not effect.is_clear
    [verdict] = report.verdicts
    assert "one seed per cell" in verdict and "better" not in verdict
    assert "`runner compare loss=full loss=completion --grid demo`" in verdict


def test_runs_that_do_not_vary_have_no_interval(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"loss": ["full", "completion"]},
        lambda loss: 2.0,
        sd_run=0.0,
        sd_row=0.0,
    )
    [effect] = find(report_of(runs), "loss").cells
    assert effect.interval is not None
    assert (effect.interval.kind, effect.interval.half_width) == ("identical", None)
    assert effect.p_adjusted is None
    assert "every test row has the same score under" in told(report_of(runs))


def test_an_arm_of_survivors_is_named(tmp_path: Path) -> None:
    left_out = [{"loss": "completion", "seed": 2}, {"loss": "completion", "seed": 3}]
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 - 0.2 * (loss == "completion"),
        left_out=[{"model": "a"} | one for one in left_out],
    )
    for seed in (2, 3):
        cell = {"model": "a", "loss": "completion"}
        failure = Failure(kind="diverged", message="NaN")
        runs.append(not_completed(tmp_path, make_seed_recipe(cell, seed), failure))
    report = report_of(runs)
    loss = find(report, "loss")
    flags = [flag for effect in loss.shown for flag in effect.flags]
    assert any(
        "survivors only: 6 of 6 runs of loss=full and 4 of 6 runs of loss=completion remain;"
        " missing: a_completion_s2 (failed); a_completion_s3 (failed)" in flag
        for flag in flags
    )
    assert "survivors only" in told(report)
    assert all(effect.interval is not None for effect in loss.shown)


def test_missing_cells_are_named_and_not_filled_in(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b", "c"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 - 0.2 * (loss == "completion"),
        left_out=[{"model": "c", "loss": "completion"}],
    )
    for seed in (1, 2, 3):
        cell = {"model": "c", "loss": "completion"}
        runs.append(pending(tmp_path, make_seed_recipe(cell, seed)))
    loss = find(report_of(runs), "loss")
    assert len(loss.cells) == 2
    assert loss.unpaired == (
        "c_completion_s1 (pending), c_completion_s2 (pending), c_completion_s3 (pending)",
    )
    without = find(report_of(runs[:-3]), "loss")
    assert without.unpaired == ("c_full_s1 (and 2 more) has no partner with loss completion",)


def test_a_cell_with_two_runs_of_one_seed_counts_neither(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path, {"loss": ["full", "completion"]}, lambda loss: 2.0 + (loss == "full")
    )
    again = make_seed_recipe({"loss": "full"}, 1)
    again = again.model_copy(update={"run": again.run.model_copy(update={"name": "again"})})
    runs.append(scored(tmp_path, again, 9.0))
    [effect] = find(report_of(runs), "loss").cells
    assert effect.interval is not None and effect.interval.num_seeds == (2, 3)
    assert any("full_s1 and again are in the same cell" in flag for flag in effect.flags)


def test_seeds_of_their_own_are_still_seeds(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 + 0.3 * (loss == "full"),
        own_seeds=True,
    )
    loss = find(report_of(runs), "loss")
    assert dict(loss.recipe_differences) == {"loss": 2}
    assert all("pooled over 2 cells of" in effect.design for effect in loss.cells)


def test_two_cells_alone_are_paired_where_seeds_share_their_start(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path, {"loss": ["full", "completion"]}, lambda loss: 2.0 + (loss == "full")
    )
    rows = rows_of(runs)

    def find_design(rows: list[ReportRow]) -> str:
        return find(build_report(rows), "loss").cells[0].design

    assert "Welch" in find_design(rows), "not recorded is not the same"
    same = [
        replace(row, initial_weights_hash=f"w{row.seed}", row_order_hash=f"o{row.seed}")
        for row in rows
    ]
    assert "paired by seed (3 shared, same initial weights and row order" in find_design(same)
    other = [replace(row, row_order_hash="other") if row.name == "full_s2" else row for row in same]
    assert "Welch" in find_design(other)


def test_across_base_models_the_unit_is_bits_per_byte(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 + 0.3 * (model == "b"),
        tokens=lambda model, **_: 10 if model == "a" else 14,
    )
    report = report_of(runs)
    metrics = {one.axis: one.metric.name for one in report.effects}
    # A mean over models of other tokens is taken in bits per byte, too
    assert metrics == {"model": "bits_per_byte", "loss": "bits_per_byte"}
    asked = find(report_of(runs, metrics=["nll_per_completion_token"]), "loss")
    assert asked.pooled is not None and asked.pooled.interval is None
    assert "scored tokens under the same row ids" in asked.pooled.refused[0]
    assert all(effect.interval is not None for effect in asked.simple["model"])
    model = find(report_of(runs, metrics=["nll_per_completion_token"]), "model")
    assert model.pooled is not None and "bits per byte are" in model.pooled.refused[0]


def test_rows_may_be_fixed_on_request(tmp_path: Path) -> None:
    report = report_of(demo(tmp_path), rows_fixed=True)
    for effect in find(report, "loss").shown:
        assert effect.interval is not None and effect.interval.kind == "seeds"
    assert "these test rows only" in told(report)


def test_many_values_are_compared_with_the_first_only(tmp_path: Path) -> None:
    def compared(values: list[int]) -> list[tuple[int, int]]:
        runs = scored_grid(
            tmp_path / str(len(values)), {"num_train_samples": values}, lambda num_train_samples: 2
        )
        return [(one.reference, one.compared) for one in report_of(runs).effects]

    assert compared([1, 2, 3, 4, 5]) == [(1, 2), (1, 3), (1, 4), (1, 5)]
    assert len(compared([1, 2, 3, 4])) == 6


def test_below_the_noise_of_single_runs(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"model": ["a", "b"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 - 0.001 * (loss == "completion"),
        sd_run=0.05,
    )
    report = report_of(runs)
    [floor] = [value for key, value in report.noise_floors.items() if "nll" in key[2]]
    assert floor > 0.1
    assert all(effect.is_below_noise for effect in find(report, "loss").shown)


def test_p_values_are_adjusted_over_all_contrasts(tmp_path: Path) -> None:
    report = report_of(demo(tmp_path))
    effects = [effect for one in report.effects for effect in (*one.shown, *one.cells)]
    assert all(not effect.is_confirmatory for effect in effects)
    for effect in effects:
        assert effect.interval is not None and effect.interval.p is not None
        assert effect.p_adjusted is not None and effect.p_adjusted >= effect.interval.p


def test_an_axis_called_seed_that_changes_more_is_no_repetition(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path, make_seed_recipe({"loss": "full"}, seed, None, f"data.seed={seed}"), 2.0)
        for seed in (1, 2)
    ]
    report = report_of(runs)
    assert find_seed_axis(report.rows) is None
    assert any("`seed` changes more in the recipes" in one for one in report.warnings)


DECLARED_LOSS = (
    "run.declared=[{axis: loss, from: full, to: completion, metric: nll_per_completion_token,"
    " margin: 0.05}]"
)
OPPOSITE = {60: 0.30, 180: -0.30}


def other_tokens(root: Path, effects: dict[int, float]) -> list[Run]:
    """Two models whose tokens do not compare, so that nothing is the mean of all cells."""
    return scored_grid(
        root,
        {
            "model": ["gemma", "llama"],
            "loss": ["full", "completion"],
            "num_train_samples": [60, 180],
        },
        lambda model, loss, num_train_samples: (
            1.0 + (loss == "completion") * effects[num_train_samples]
        ),
        own_seeds=True,
        tokens=lambda model, **_: 10 if model == "gemma" else 12,
        overrides=lambda **_: [DECLARED_LOSS],
    )


def test_a_mean_within_one_model_is_gated_where_there_is_none_over_all(tmp_path: Path) -> None:
    runs = other_tokens(tmp_path, OPPOSITE)
    report = report_of(runs, metrics=["nll_per_completion_token"])
    loss = find(report, "loss")
    assert loss.pooled is not None and loss.pooled.interval is None
    for effect in loss.simple["model"]:
        assert (effect.interval, effect.depends_on) == (None, ("num_train_samples",))
        assert effect.refused == ("the effect depends on num_train_samples, so there is no mean",)
    # The cells answer, each at a level at which all four hold together
    answers = [effect for effect in loss.main if effect.interval is not None]
    assert len(answers) == 4 and set(answers) < set(loss.shown)
    for effect in answers:
        assert effect.interval is not None and effect.is_clear
        truth = OPPOSITE[effect.at["num_train_samples"]]
        assert effect.interval.estimate == pytest.approx(truth, abs=0.05)
        assert effect.interval.level == pytest.approx(1 - 0.05 / 4)
    text = "\n".join(one for one in report.verdicts if one.startswith("loss:"))
    assert "no estimate for full -> completion at model=gemma: the effect depends on" in text
    assert "full is better than completion by 0." in text
    assert "completion is better than full by 0." in text
    assert "no clear difference" not in text and "equivalent" not in text


def test_a_mean_within_one_model_is_shown_where_nothing_speaks_against_it(tmp_path: Path) -> None:
    runs = other_tokens(tmp_path, {60: 0.2, 180: 0.2})
    loss = find(report_of(runs, metrics=["nll_per_completion_token"]), "loss")
    assert [effect.depends_on for effect in loss.main] == [(), ()]
    assert [len(effect.pairs) for effect in loss.main] == [2, 2]


def test_a_mean_over_another_axis_that_it_depends_on_says_so(tmp_path: Path) -> None:
    """No effect in one model, as the mean of opposite effects at two counts of rows."""
    runs = scored_grid(
        tmp_path,
        {
            "model": ["gemma", "llama"],
            "loss": ["full", "completion"],
            "num_train_samples": [60, 180],
        },
        lambda model, loss, num_train_samples: (
            1.0 + (loss == "completion") * (OPPOSITE[num_train_samples] + 0.1 * (model == "gemma"))
        ),
        own_seeds=True,
        overrides=lambda **_: [DECLARED_LOSS],
    )
    report = report_of(runs)
    loss = find(report, "loss")
    assert set(loss.depends_on) == {"model", "num_train_samples"}
    for effect in loss.simple["model"]:
        assert effect.depends_on == ("num_train_samples",) and effect.equivalence is None
    [llama] = [text for text in report.verdicts if "at model=llama" in text and "loss:" in text]
    assert "; it is a mean over num_train_samples, on which it also depends" in llama
    assert "equivalent" not in llama


def test_an_axis_called_seed_that_sets_no_seed_repeats_nothing(tmp_path: Path) -> None:
    """Three runs of one recipe and one `training.seed` are one trained model, and not three."""
    runs = [
        scored(tmp_path, make_seed_recipe({"loss": loss}, seed, 1), 2.0 + draw_noise(1, loss) / 9)
        for loss in ("full", "completion")
        for seed in (1, 2, 3)
    ]
    report = report_of(runs)
    assert find_seed_axis(report.rows) == "seed"
    [effect] = find(report, "loss").cells
    assert effect.interval is not None
    assert (effect.interval.kind, set(effect.interval.num_seeds)) == ("rows", {1})
    assert not effect.is_clear and "better" not in told(report)
    for cell in report.cells:
        assert [len(scores) for scores in cell.scores.values()] == [1] * len(cell.scores)
        first, *others = [run.name for run in cell.runs]
        assert list(cell.missing) == [
            f"{name} has the same training.seed as {first}" for name in others
        ]
    [warning] = [text for text in report.warnings if "does not set" in text]
    assert "in every run: full_s2, full_s3, completion_s2, and 1 more have the seed of" in warning


def test_one_run_that_repeats_the_seed_of_another_does_not_count(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path, {"loss": ["full", "completion"]}, lambda loss: 2.0 + (loss == "full")
    )
    runs.append(scored(tmp_path, make_seed_recipe({"loss": "full"}, 4, 1), 2.0))
    report = report_of(runs)
    [effect] = find(report, "loss").cells
    assert effect.interval is not None and effect.interval.num_seeds == (3, 3)
    assert any("full_s4 has the same training.seed as full_s1" in flag for flag in effect.flags)
    assert any("full_s4 has the seed of another run" in text for text in report.warnings)


def test_an_effect_paired_by_seed_says_how_many_of_the_runs_that_are_left_count(
    tmp_path: Path,
) -> None:
    runs = scored_grid(
        tmp_path,
        {"model": ["gemma", "llama"], "loss": ["full", "completion"]},
        lambda model, loss: 1.0 + 0.03 * (loss == "full"),
        seeds=(1, 2, 3, 4, 5, 6, 7),
        left_out=[{"model": "gemma", "loss": "full", "seed": seed} for seed in (6, 7)],
        sd_run=0.05,
    )
    [at_gemma, at_llama] = find(report_of(runs), "loss").simple["model"]
    assert at_gemma.interval is not None and at_llama.interval is not None
    assert "10 of 12 runs count here" in at_gemma.interval.note
    [flag] = [flag for flag in at_gemma.flags if "not all runs" in flag]
    assert "5 of 5 runs of loss=full and 7 of 7 runs of loss=completion remain" in flag
    assert at_llama.interval.note == "" and at_llama.interval.num_seeds == (7, 7)


def test_rows_in_other_groups_are_refused_whichever_run_comes_first(tmp_path: Path) -> None:
    """The error over rows is that of groups: those of the first run are not those of all."""
    runs = {
        size: [
            scored(tmp_path, make_seed_recipe({"loss": loss}, seed), 1.0 + seed, group_size=size)
            for seed in (1, 2, 3)
        ]
        for loss, size in (("full", 1), ("completion", 10))
    }
    for order in ((1, 10), (10, 1)):
        [effect] = find(report_of([run for size in order for run in runs[size]]), "loss").cells
        assert effect.interval is None
        [reason] = effect.refused
        assert f"test rows differently ({40 // order[0]} and {40 // order[1]} groups)" in reason


def test_a_cell_whose_runs_group_rows_differently_is_refused(tmp_path: Path) -> None:
    runs = [
        scored(
            tmp_path,
            make_seed_recipe({"loss": loss}, seed),
            1.0 + seed / 10,
            group_size=5 if (loss, seed) == ("full", 2) else 10,
        )
        for loss in ("full", "completion")
        for seed in (1, 2, 3)
    ]
    [effect] = find(report_of(runs), "loss").cells
    assert effect.interval is None
    assert (
        "full_s1 and full_s2 group the same test rows differently (4 and 8 groups)"
        in effect.refused[0]
    )


def test_a_mean_over_models_of_other_tokens_says_so(tmp_path: Path) -> None:
    """The rows have equally many tokens, but different pieces of text."""
    runs = scored_grid(
        tmp_path,
        {"model": ["gemma", "llama"], "loss": ["full", "completion"]},
        lambda model, loss: 2.0 + 0.3 * (loss == "full"),
        own_seeds=True,
    )
    models = "demo_models/gemma and demo_models/llama"
    flag = f"{models} use different tokens: the mean combines different units"
    same = rows_of(runs)
    other = [
        replace(row, split_hashes={"test": {"input_ids_hash": row.model_name}}) for row in same
    ]
    for rows, is_flagged in ((same, False), (other, True)):
        loss = find(build_report(rows), "loss")
        assert loss.pooled is not None and (flag in loss.pooled.flags) == is_flagged
        assert not any(flag in effect.flags for effect in loss.simple["model"])
