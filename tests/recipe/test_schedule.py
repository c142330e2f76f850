"""Updates, warm-up, evaluations and checkpoints of a run, counted before it starts."""

from __future__ import annotations

import pytest

from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.schedule import derive_schedule, find_doubts
from tests.conftest import RECIPE_TEXT


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=overrides)


SIXTEEN = (
    "training.global_batch_size=null",
    "training.gradient_accumulation_steps=16",
    "training.per_device_train_batch_size=1",
)


def test_sixty_rows_at_accumulation_16_are_four_updates_an_epoch() -> None:
    schedule = derive_schedule(
        recipe(*SIXTEEN, "training.num_train_epochs=10", "training.warmup_steps=0.1"), 60
    )
    assert (schedule.updates_per_epoch, schedule.last_batch_rows, schedule.num_updates) == (
        4,
        12,
        40,
    )
    assert schedule.num_warmup_updates == 4
    assert (schedule.num_evaluations, schedule.num_checkpoints) == (10, 10)


@pytest.mark.parametrize(
    ("overrides", "rows", "doubt"),
    [
        (("training.warmup_steps=100",), 60, "warm-up takes 100 updates and the run has 30"),
        (("training.num_train_epochs=1",), 22, "only 6 optimizer updates"),
        (("training.num_train_epochs=20",), 3, "larger than the 3 training rows"),
        (("training.num_train_epochs=null", "training.max_steps=12"), 60, "48 of 60 rows are seen"),
        (
            ("evaluation.eval_steps=30",),
            60,
            "`evaluation.eval_steps: 30` is not below the 30 updates",
        ),
        (
            ("checkpoints.save_steps=500",),
            60,
            "`checkpoints.save_steps: 500` is not below the 30 updates",
        ),
        (
            ("early_stopping={enabled: true, metric: nll_per_token, patience: 8}",),
            60,
            "`early_stopping.patience: 8` can never run out in 8 evaluations",
        ),
    ],
)
def test_what_is_seldom_meant_is_said(overrides: tuple[str, ...], rows: int, doubt: str) -> None:
    one = recipe(*overrides)
    assert any(doubt in text for text in find_doubts(one, derive_schedule(one, rows)))


def test_retries_that_cannot_help_are_doubted() -> None:
    """The micro-batch of 2 can be halved once, one of 3 never."""
    for size, is_doubted in ((2, False), (3, True)):
        batch = f"training.per_device_train_batch_size={size}"
        one = recipe("launch.retries.out_of_memory=2", batch, "training.global_batch_size=12")
        assert (
            any("cannot be halved" in text for text in find_doubts(one, derive_schedule(one, 60)))
            == is_doubted
        )


def test_an_ordinary_run_raises_no_doubt() -> None:
    one = recipe("training.warmup_steps=3")
    schedule = derive_schedule(one, 60)
    assert list(find_doubts(one, schedule)) == []
    assert (schedule.num_evaluations, schedule.num_updates, schedule.num_epochs) == (8, 30, 2)


def test_epochs_evaluate_and_save_at_their_ends() -> None:
    one = recipe(
        "evaluation={eval_strategy: epoch, eval_steps: null}",
        "checkpoints={save_strategy: epoch, save_steps: null, save_epochs: 2}",
        "training.num_train_epochs=5",
    )
    schedule = derive_schedule(one, 22)
    assert (schedule.updates_per_epoch, schedule.num_evaluations, schedule.num_checkpoints) == (
        6,
        5,
        3,
    )


def test_more_processes_keep_the_updates() -> None:
    one = recipe()
    assert derive_schedule(one, 22).accumulation == 2
    assert derive_schedule(one, 22, num_processes=2).accumulation == 1
    assert (
        derive_schedule(one, 22).num_updates
        == derive_schedule(one, 22, num_processes=2).num_updates
        == 12
    )


def test_dropping_the_incomplete_micro_batch_is_counted() -> None:
    assert derive_schedule(recipe("training.dataloader_drop_last=true"), 21).num_rows == 20
