"""The steps at which a run evaluates, saves and stops, decided from recorded values alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState

from runner.checkpoints.marker import find_best_step, list_evaluations
from runner.recipe.evaluation_section import EarlyStoppingOn
from runner.recipe.parse import Recipe
from runner.sft.callbacks import FlowCallback, is_out_of_patience
from tests.conftest import Project

EARLY = "early_stopping={enabled: true, metric: nll_per_token, patience: 2}"
ARGUMENTS: Any = None  # no decision looks at them


def make_rule(patience: int, threshold: float = 0.0, mode: Any = "min") -> EarlyStoppingOn:
    return EarlyStoppingOn(
        enabled=True, metric="nll_per_token", patience=patience, threshold=threshold, mode=mode
    )


def make_state(
    step: int, values: dict[int, float], max_steps: int = 12, epoch: float = 0.5
) -> TrainerState:
    history = [
        {"step": at, "eval_nll_per_token": value, "eval_nll_per_completion_token": value}
        for at, value in values.items()
    ]
    return TrainerState(global_step=step, max_steps=max_steps, epoch=epoch, log_history=history)


def decide(recipe: Recipe, state: TrainerState) -> tuple[bool, bool, bool]:
    """Returns the step's decisions; its evaluation is already in the state."""
    flow, control = FlowCallback(recipe), TrainerControl()
    flow.on_step_end(ARGUMENTS, state, control)
    evaluates = control.should_evaluate
    if evaluates:
        flow.on_evaluate(ARGUMENTS, state, control)
    return evaluates, control.should_save, control.should_training_stop


def test_patience_counts_evaluations_without_improvement() -> None:
    assert not is_out_of_patience([], make_rule(1))
    assert not is_out_of_patience([3.0], make_rule(1))
    assert is_out_of_patience([3.0, 3.0], make_rule(1)), "an equal value is no improvement"
    assert not is_out_of_patience([3.0, 4.0, 2.0, 4.0], make_rule(2)), (
        "an improvement starts the count anew"
    )
    assert is_out_of_patience([3.0, 4.0, 2.0, 4.0, 2.5], make_rule(2))
    assert is_out_of_patience([3.0, 2.95, 2.92], make_rule(2, threshold=0.1))
    assert not is_out_of_patience([3.0, 2.95, 2.85], make_rule(2, threshold=0.1)), (
        "against the best, not the last"
    )
    assert is_out_of_patience([1.0, 0.5, 0.9], make_rule(2, mode="max"))
    assert not is_out_of_patience([1.0, 0.5, 1.1], make_rule(2, mode="max"))


@given(
    st.lists(st.floats(0, 10), max_size=20),
    st.integers(1, 4),
    st.floats(0, 1),
    st.sampled_from(["min", "max"]),
)
def test_patience_is_that_of_a_count_kept_step_by_step(
    values: list[float], patience: int, threshold: float, mode: str
) -> None:
    """Transformers' callback counts in this way: a run stops at the first prefix that is out of
    patience.
    """
    sign = 1 if mode == "min" else -1
    best, count, stop = None, 0, None
    for number, value in enumerate(values):
        if best is None or sign * value < sign * best - threshold:
            best, count = value, 0
        else:
            count += 1
        if count >= patience and stop is None:
            stop = number
    rule = make_rule(patience, threshold, mode)
    prefixes = [
        number for number in range(len(values)) if is_out_of_patience(values[: number + 1], rule)
    ]
    assert (prefixes[0] if prefixes else None) == stop


def test_best_is_the_first_among_equals_and_never_the_base() -> None:
    history = [
        {"step": step, "eval_m": value} for step, value in ((0, 0.1), (4, 2.0), (8, 1.0), (12, 1.0))
    ]
    evaluations = list_evaluations(
        [*history, {"step": 12, "loss": 0.0}, {"step": 12, "eval_other": 0.0}], "m"
    )
    assert evaluations == [(4, 2.0), (8, 1.0), (12, 1.0)]
    assert (find_best_step(evaluations, "min"), find_best_step(evaluations, "max")) == (8, 4)
    assert find_best_step([], "min") is None


def test_steps_evaluate_and_save_as_the_recipe_says(project: Project) -> None:
    recipe = project.recipe("evaluation.eval_steps=2", "checkpoints.save_steps=6")
    falling, rising = {2: 9.0, 4: 8.0}, {2: 9.0, 4: 10.0}
    assert decide(recipe, make_state(3, {2: 9.0})) == (False, False, False)
    assert decide(recipe, make_state(4, falling)) == (True, True, False), "the best so far"
    assert decide(recipe, make_state(4, rising)) == (True, False, False)
    assert decide(recipe, make_state(6, {**rising, 6: 11.0})) == (True, True, False), "due"
    assert decide(recipe, make_state(11, {2: 5.0}, max_steps=11)) == (
        True,
        True,
        False,
    ), "the last step does both"


def test_epochs_evaluate_and_save_at_their_end(project: Project) -> None:
    recipe = project.recipe(
        "evaluation={eval_strategy: epoch, eval_steps: null}",
        "checkpoints={save_strategy: epoch, save_steps: null}",
    )
    assert decide(recipe, make_state(5, {}, epoch=0.83)) == (False, False, False)
    assert decide(recipe, make_state(6, {3: 1.0, 6: 2.0}, epoch=1.0)) == (True, True, False)


def test_epochs_may_be_skipped(project: Project) -> None:
    recipe = project.recipe("checkpoints={save_strategy: epoch, save_steps: null, save_epochs: 2}")
    saves = [
        decide(recipe, make_state(3, {}, epoch=epoch))[1]
        for epoch in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    ]
    assert saves == [False, False, False, True, False, True]


def test_what_is_among_the_best_that_are_kept_is_saved(project: Project) -> None:
    recipe = project.recipe(
        "evaluation.eval_steps=2", "checkpoints={save_steps: 100, keep_best: 2}"
    )
    values = {2: 3.0, 4: 5.0, 6: 4.0, 8: 4.0, 10: 1.0}
    saved = [
        at
        for at in values
        if decide(recipe, make_state(at, {k: v for k, v in values.items() if k <= at}, 50))[1]
    ]
    assert saved == [2, 4, 6, 10], "8 is as good as 6, which came first"


def test_nothing_is_evaluated_before_the_end_where_the_recipe_says_no(project: Project) -> None:
    recipe = project.recipe(
        "evaluation={eval_strategy: 'no', eval_steps: null}",
        "checkpoints={save_strategy: 'no', save_steps: null}",
    )
    assert [decide(recipe, make_state(step, {}, epoch=1.0))[:2] for step in (1, 6)] == [
        (False, False)
    ] * 2
    assert decide(recipe, make_state(12, {12: 1.0})) == (True, True, False)


def test_stopping_early_saves(project: Project) -> None:
    recipe = project.recipe(EARLY, "checkpoints={save_strategy: 'no', save_steps: null}")
    assert decide(recipe, make_state(8, {0: 0.0, 4: 1.0, 8: 2.0})) == (True, False, False)
    assert decide(recipe, make_state(12, {0: 0.0, 4: 1.0, 8: 2.0, 12: 3.0}, max_steps=40)) == (
        True,
        True,
        True,
    )


def test_the_base_model_neither_saves_nor_stops(project: Project) -> None:
    flow, control = FlowCallback(project.recipe(EARLY)), TrainerControl()
    flow.on_evaluate(ARGUMENTS, make_state(0, {0: 1.0}), control)
    assert not control.should_save and not control.should_training_stop
