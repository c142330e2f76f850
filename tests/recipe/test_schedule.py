"""Updates, warm-up, evaluations and checkpoints of a run, counted before it starts."""

from __future__ import annotations

import pytest

from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.schedule import derive_schedule, find_changed_updates, find_doubts
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
        (("training.warmup_steps=100",), 60, "warmup takes 100 updates, but the run has 30"),
        (("training.num_train_epochs=1",), 22, "only 6 optimizer updates"),
        (("training.num_train_epochs=20",), 3, "larger than the 3 training rows"),
        (("training.num_train_epochs=null", "training.max_steps=12"), 60, "run sees 48 of 60 rows"),
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


def said_of(*runs: tuple[dict[str, object], int, tuple[str, ...]]) -> dict[str, list[str]]:
    """The warnings about runs, each given by its axes, its rows and its overrides."""
    pairs = []
    for number, (axes, rows, overrides) in enumerate(runs):
        one = recipe(*overrides, f"run={{name: r{number}, grid: g}}")
        one = one.model_copy(update={"run": one.run.model_copy(update={"axes": axes})})
        pairs.append((one, derive_schedule(one, rows)))
    return dict(find_changed_updates(pairs))


def test_an_axis_that_changes_the_number_of_updates_is_named_once() -> None:
    """One warning for all pairs of runs, whose other axes are equal."""
    eight = ("training.global_batch_size=8", "training.num_train_epochs=4")
    grid = [
        ({"loss": loss, "rows": rows, "seed": seed}, rows, eight)
        for loss in ("full", "completion")
        for rows in (60, 180)
        for seed in (1, 2)
    ]
    [(text, names)] = said_of(*grid).items()
    assert text == (
        "`rows` 60 -> 180 changes the number of updates 32 -> 92: the runs also differ in"
        " training length; set `training.max_steps` instead of `num_train_epochs` to compare `rows`"
        " alone"
    )
    assert names == [f"g/r{number}" for number in range(8)]
    equal = ("training={max_steps: 46, num_train_epochs: null}", "training.global_batch_size=8")
    assert said_of(*[(axes, rows, equal) for axes, rows, _ in grid]) == {}


def test_different_changes_of_one_axis_are_told_together() -> None:
    def accumulate(size: int) -> tuple[str, ...]:
        return (f"training.global_batch_size={size}", "training.num_train_epochs=1")

    said = said_of(
        *(({"batch": size, "rows": n}, n, accumulate(size)) for size in (4, 8) for n in (16, 32))
    )
    assert [text.partition(":")[0] for text in said] == [
        "`batch` 4 -> 8 changes the number of updates 4 -> 2 (elsewhere 8 -> 4)",
        "`rows` 16 -> 32 changes the number of updates 4 -> 8 (elsewhere 2 -> 4)",
    ]


def test_an_axis_that_states_the_length_is_meant_to_change_it() -> None:
    def last(steps: int) -> tuple[str, ...]:
        return (f"training={{max_steps: {steps}, num_train_epochs: null}}",)

    assert said_of(*(({"steps": n}, 60, last(n)) for n in (10, 20))) == {}
    epochs = [({"epochs": n}, 60, (f"training.num_train_epochs={n}",)) for n in (1, 2)]
    assert said_of(*epochs) == {}
    # Another task is no comparison at all.
    tasks = [({"task": "a"}, 60, ()), ({"task": "b"}, 90, ("data.task={name: alpaca}",))]
    assert said_of(*tasks) == {}
