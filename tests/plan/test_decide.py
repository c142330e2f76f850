"""The decision for a run in each state, and its stated reason."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.plan.decide import (
    MAX_BACKOFF_SECONDS,
    MAX_FRUITLESS,
    Action,
    Retry,
    decide,
    decide_retry,
)
from runner.plan.status import RunStatus, State
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.record import DETERMINISTIC_KINDS, Failure, FailureKind
from tests.recipe.test_parse import TEXT

KINDS: tuple[FailureKind, ...] = typing.get_args(FailureKind)


def make_status(state: State, kind: FailureKind | None = None) -> RunStatus:
    failure = None if kind is None else Failure(kind=kind, message="because\n\nhint: do this")
    why = "because" if failure is None else f"{failure.kind}: {failure.message}"
    return RunStatus(state=state, why=why, failure=failure)


@pytest.mark.parametrize(
    ("state", "swept", "rerun"),
    [
        ("pending", "launch", "skip"),
        ("running", "skip", "skip"),
        ("completed", "skip", "skip"),
        ("interrupted", "launch", "launch"),
        ("failed", "launch", "launch"),
        ("changed", "refuse", "refuse"),
        ("damaged", "refuse", "refuse"),
        ("unreadable", "refuse", "refuse"),
    ],
)
def test_each_state_has_one_answer(state: State, swept: Action, rerun: Action) -> None:
    assert decide(make_status(state)).action == swept
    assert decide(make_status(state), only_unfinished=True, retry_failed=True).action == rerun
    assert decide(make_status(state)).why.startswith(f"{state}: because")


def test_the_table_above_is_whole() -> None:
    known = {"pending", "running", "completed", "interrupted", "failed", "changed"}
    assert set(typing.get_args(State)) == known | {"damaged", "unreadable"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lasting_failure_is_tried_again_only_when_asked(kind: FailureKind) -> None:
    status = make_status("failed", kind)
    decision = decide(status)
    assert decision.action == ("skip" if kind in DETERMINISTIC_KINDS else "launch")
    assert ("--retry-failed" in decision.why) == (decision.action == "skip")
    assert decide(status, retry_failed=True).action == "launch"


def test_what_will_happen_again_is_what_the_trainer_cannot_help() -> None:
    assert sorted(DETERMINISTIC_KINDS) == ["configuration", "data", "diverged"]


def test_a_reason_is_one_line() -> None:
    assert "\n" not in decide(make_status("failed", "data")).why


FAILURES = st.sampled_from(KINDS).map(lambda kind: Failure(kind=kind, message="because"))


def make_recipe(**retries: float) -> Recipe:
    stated = ", ".join(f"{key}: {value}" for key, value in retries.items())
    return parse_recipe(TEXT, where="r.yaml", overrides=[f"launch.retries={{{stated}}}"])


def retry_after(
    recipe: Recipe, *failures: Failure, divisor: int = 1, has_made_steps: bool = False
) -> Retry | None:
    return decide_retry(
        recipe,
        failures,
        num_processes=1,
        micro_batch_divisor=divisor,
        has_made_steps=has_made_steps,
    )


@given(
    failures=st.lists(FAILURES, min_size=1, max_size=30),
    transient=st.integers(0, 5),
    lost=st.integers(0, 5),
    out_of_memory=st.integers(0, 5),
    stalled=st.integers(0, 5),
    backoff_seconds=st.floats(0, 1e6),
    has_made_steps=st.booleans(),
)
@settings(max_examples=200)
def test_retries_are_bounded_by_kind_in_number_and_in_time(
    failures: list[Failure],
    transient: int,
    lost: int,
    out_of_memory: int,
    stalled: int,
    backoff_seconds: float,
    has_made_steps: bool,
) -> None:
    budgets = {
        "transient": transient,
        "lost": lost,
        "out_of_memory": out_of_memory,
        "stalled": stalled,
    }
    recipe = make_recipe(**budgets, backoff_seconds=backoff_seconds)
    retry = retry_after(recipe, *failures, has_made_steps=has_made_steps)
    kind = failures[-1].kind
    num_alike = sum(failure.kind == kind for failure in failures)
    budgets["preempted"] = MAX_FRUITLESS
    if kind not in budgets or num_alike > budgets[kind]:
        assert retry is None
        return
    if kind == "out_of_memory":
        assert retry is None or (retry.micro_batch_divisor, retry.delay_seconds) == (2, 0)
        return
    assert retry is not None and retry.number == len(failures) and retry.micro_batch_divisor == 1
    assert (
        0
        <= retry.delay_seconds
        <= max(MAX_BACKOFF_SECONDS, backoff_seconds if kind == "preempted" else 0)
    )
    if kind == "preempted":
        assert retry.delay_seconds == (0 if has_made_steps else backoff_seconds)


def test_the_pause_doubles_up_to_ten_minutes() -> None:
    recipe = make_recipe(transient=2000, backoff_seconds=10)
    failure = Failure(kind="transient", message="because")
    pauses = [
        retry.delay_seconds
        for n in range(1, 10)
        if (retry := retry_after(recipe, *[failure] * n)) is not None
    ]
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    last = retry_after(recipe, *[failure] * 2000)
    assert last is not None and last.delay_seconds == 600


def test_a_taken_port_is_waited_for_only_the_second_time() -> None:
    recipe = make_recipe(transient=2, backoff_seconds=10)
    failure = Failure(kind="transient", message="RuntimeError: EADDRINUSE")
    retries = [retry_after(recipe, *[failure] * n) for n in (1, 2, 3)]
    assert [retry and retry.delay_seconds for retry in retries] == [0, 20, None]


def test_a_micro_batch_is_halved_while_it_divides() -> None:
    failure = Failure(kind="out_of_memory", message="because")
    for size, divisors in ((8, [2, 4, 8, None]), (6, [2, None, None, None]), (1, [None] * 4)):
        batch = [f"training.per_device_train_batch_size={size}", "training.global_batch_size=24"]
        overrides = ["launch={num_processes: 1, retries: {out_of_memory: 9}}", *batch]
        recipe = parse_recipe(TEXT, where="r.yaml", overrides=overrides)
        found = [retry_after(recipe, *[failure] * (n + 1), divisor=2**n) for n in range(4)]
        assert [retry and retry.micro_batch_divisor for retry in found] == divisors
