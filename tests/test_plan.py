"""What happens to a run in each state, and that the reason is said."""

from __future__ import annotations

import typing

import pytest

from runner.plan import Action, decide
from runner.record import DETERMINISTIC_KINDS, Failure, FailureKind, RunStatus, State

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
    ],
)
def test_each_state_has_one_answer(state: State, swept: Action, rerun: Action) -> None:
    assert decide(make_status(state)).action == swept
    assert decide(make_status(state), only_unfinished=True, retry_failed=True).action == rerun
    assert decide(make_status(state)).why.startswith(f"{state}: because")


def test_the_table_above_is_whole() -> None:
    assert set(typing.get_args(State)) == {"pending", "running", "completed", "interrupted", "failed", "changed"}


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
