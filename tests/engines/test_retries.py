"""Automatic retries: which failures, after how long, and the other runs meanwhile; over real
processes.
"""

from __future__ import annotations

import fcntl
import json
import signal
from typing import Any

import pytest

from runner.cli.main import main
from runner.run.record import EXIT_CODES, FailureKind
from tests.support.fake_launcher import FakeLauncher, fake, finish

__all__ = ["fake"]

AT_ONCE = "transient: 3, lost: 1, backoff_seconds: 0"


def list_ends(fake: FakeLauncher, name: str) -> list[tuple[int, str | None]]:
    """`(retry, kind)` of each attempt."""
    return [
        (one["retry"], one["failure"] and one["failure"]["kind"]) for one in fake.attempts(name)
    ]


def test_what_may_pass_is_tried_again_until_it_does(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add(
        "a",
        told="fail transient stale\nthen fail transient again\nthen exit 7\nthen complete",
        retries=AT_ONCE,
    )
    assert main(["sweep", "recipes/toy"]) == 0
    assert list_ends(fake, "a") == [(0, "transient"), (1, "transient"), (2, "lost"), (3, None)]
    stderr = capsys.readouterr().err
    assert "toy/a  transient: stale; retry 1 of 3 right away" in stderr
    assert (
        "toy/a  lost: the training process died (exit status 7) without an error message;"
        " retry 1 of 1 right away" in stderr
    )
    assert "[1/1] toy/a  completed" in stderr and " failed" not in stderr


def test_each_kind_has_a_budget_and_the_last_outcome_counts(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="fail transient x", retries="transient: 2, lost: 1, backoff_seconds: 0")
    fake.add("b", told="exit 1", retries=AT_ONCE)
    assert main(["sweep", "recipes/toy"]) == 1
    assert list_ends(fake, "a") == [(0, "transient"), (1, "transient"), (2, "transient")]
    assert list_ends(fake, "b") == [(0, "lost"), (1, "lost")]
    stderr = capsys.readouterr().err
    assert stderr.count("toy/a failed, transient: x") == 1 and "[2/2]" in stderr
    assert main(["sweep", "recipes/toy"]) == 1, "a user started it: the budget is full again"
    assert [retry for retry, _ in list_ends(fake, "a")] == [0, 1, 2] * 2


@pytest.mark.parametrize(
    "kind",
    ["configuration", "data", "diverged", "crashed", "out_of_memory", "transient", "stalled"],
)
def test_launch_returns_a_code_for_each_kind(kind: FailureKind, fake: FakeLauncher) -> None:
    fake.add("a", told=f"fail {kind} because")
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES[kind]
    assert list_ends(fake, "a") == [(0, kind)], "never automatically"


def test_launch_tries_again_too(fake: FakeLauncher) -> None:
    fake.add("a", told="fail transient x\nthen complete", retries=AT_ONCE)
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    assert list_ends(fake, "a") == [(0, "transient"), (1, None)]


def test_preempted_runs_are_taken_up_free_of_charge(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [
        "fail preempted by the cluster",
        *["stepped committed fail preempted by the cluster"] * 6,
        "complete",
    ]
    fake.add("a", told="\nthen ".join(told), retries="transient: 0, lost: 0, backoff_seconds: 0.01")
    assert main(["sweep", "recipes/toy"]) == 0
    assert [kind for _, kind in list_ends(fake, "a")] == ["preempted"] * 7 + [None]
    stderr = capsys.readouterr().err
    assert stderr.count("resumes in 0.01 s") == 1 and stderr.count("resumes right away") == 6


def test_what_somebody_asked_to_leave_is_not_taken_up_again(fake: FakeLauncher) -> None:
    request = json.dumps({"attempt": 1, "why": "asked"})
    fake.add("a", told=f"write stop {request}\nthen complete", retries=AT_ONCE)
    main(["launch", "recipes/toy/a.yaml"])
    assert fake.started() == ["a"]
    assert main(["launch", "recipes/toy/a.yaml"]) == 0, "the request was to that attempt"


def test_others_go_on_while_one_waits_and_a_stop_ends_the_wait(fake: FakeLauncher) -> None:
    fake.add("a", told="fail transient x", retries="transient: 1, backoff_seconds: 500")
    fake.add("b", "c", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    for name in "bc":
        assert fake.next_started()[0] == name
        fake.let_go(name)
    assert sweep.stderr is not None
    while "toy/c  completed" not in (line := sweep.stderr.readline()):
        assert line, "the sweep ended without completing c"
    sweep.send_signal(signal.SIGINT)
    assert finish(sweep)[0] == 130
    assert fake.started() == ["a", "b", "c"]
    assert list_ends(fake, "a") == [(0, "transient")]


def test_fail_fast_gives_up_what_waits(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="fail transient x", retries="transient: 1, backoff_seconds: 500")
    fake.add("b", told="fail data y")
    fake.add("c")
    assert main(["sweep", "recipes/toy", "--fail-fast"]) == 1
    stderr = capsys.readouterr().err
    assert "toy/b failed, data: y" in stderr and "toy/a failed, transient: x" in stderr
    assert "1 run was not started" in stderr and fake.started() == ["a", "b"]


def test_a_port_that_is_taken_is_tried_again_at_once(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "speak torch.distributed.DistNetworkError: failed to listen. code: EADDRINUSE, address"
        " already in use"
    )
    fake.add("a", told=f"{said}\nthen complete", retries="transient: 1, backoff_seconds: 500")
    assert main(["sweep", "recipes/toy"]) == 0
    assert list_ends(fake, "a") == [(0, "transient"), (1, None)]
    assert "retry 1 of 1 right away" in capsys.readouterr().err


def test_a_launcher_that_fails_by_itself_is_not_a_trainer_that_vanished(fake: FakeLauncher) -> None:
    fake.add("a", told="speak", retries=AT_ONCE)
    fake.add("b", told="complete")
    log = "x\nTraceback (most recent call last):\nValueError: 'NOPE' is not a valid DistributedType"
    launcher = (fake.home / "accelerate").read_text()
    (fake.home / "accelerate").write_text(
        launcher.replace('note("end")', f"print({log!r})\nnote('end')")
    )
    assert main(["sweep", "recipes/toy"]) == 1
    assert list_ends(fake, "a") == [(0, "configuration")] and list_ends(fake, "b") == [(0, None)]


def list_divisors(fake: FakeLauncher, name: str) -> list[int]:
    return [one["micro_batch_divisor"] for one in fake.attempts(name)]


def test_out_of_memory_halves_the_micro_batch_if_the_recipe_allows_it(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    oom = "fail out_of_memory CUDA out of memory"
    fake.add(
        "a", told=f"{oom}\nthen {oom}\nthen complete", retries="out_of_memory: 2", micro_batch=4
    )
    fake.add("b", told=f"{oom}\nthen complete", retries="out_of_memory: 0", micro_batch=4)
    fake.add("c", told=f"{oom}\nthen complete", retries="out_of_memory: 2", micro_batch=1)
    fake.add("d", told=oom, retries="out_of_memory: 1", micro_batch=4)
    assert main(["sweep", "recipes/toy"]) == 1
    assert [list_divisors(fake, name) for name in "abcd"] == [[1, 2, 4], [1], [1], [1, 2]]
    stderr = capsys.readouterr().err
    assert "retry 1 of 2 from step 0, micro-batch 4 -> 2, same global batch" in stderr
    assert "retry 2 of 2 from step 0, micro-batch 2 -> 1, same global batch" in stderr


def test_the_divisor_stays_until_the_run_or_the_micro_batch_is_another(fake: FakeLauncher) -> None:
    oom = "fail out_of_memory CUDA out of memory"
    known: dict[str, Any] = {"retries": "out_of_memory: 1, transient: 0", "micro_batch": 4}
    fake.add("a", told=f"{oom}\nthen fail transient x\nthen fail transient x", **known)
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES["transient"]
    assert main(["sweep", "recipes/toy"]) == 1
    assert main(["launch", "recipes/toy/a.yaml", "--prepare"]) == 0
    assert list_divisors(fake, "a") == [1, 2, 2, 2]
    fake.add("a", **{**known, "micro_batch": 2})
    assert main(["sweep", "recipes/toy"]) == 1
    assert list_divisors(fake, "a")[4:] == [1], "the recipe states another micro-batch now"
    fake.add("a", told=oom, **known)
    assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == EXIT_CODES["out_of_memory"]
    assert list_divisors(fake, "a") == [1, 2]
    assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == EXIT_CODES["out_of_memory"]
    assert list_divisors(fake, "a") == [1, 2]


def test_a_divisor_that_does_not_fit_other_processes_is_refused(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    """A global batch of 4 as 2 processes x 2; with the micro-batch halved twice nothing is left to
    divide.
    """
    fake.add(
        "a", told="fail out_of_memory x", retries="out_of_memory: 9", micro_batch=2, num_processes=2
    )
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES["out_of_memory"]
    assert list_divisors(fake, "a") == [1, 2]


def test_each_failure_keeps_the_end_of_its_log_without_secrets(
    fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "canary-canary-canary")
    fake.add("a", told="speak canary-canary-canary")
    assert main(["sweep", "recipes/toy"]) == 1
    [attempt] = fake.attempts("a")
    assert attempt["failure"]["log_tail"] == ["the fake was told to speak ***"]
    assert "canary" not in capsys.readouterr().err + fake.paths("a").record_path.read_text()


def test_a_cache_that_cannot_be_written_stops_nothing(fake: FakeLauncher) -> None:
    fake.add("a")
    (fake.root / "runs" / ".content_hashes.json").mkdir(parents=True)
    assert main(["sweep", "recipes/toy"]) == 0


def test_a_new_checkpoint_between_two_failures_renews_the_budget(fake: FakeLauncher) -> None:
    told = "fail transient x\nthen committed fail transient y\nthen fail transient z\nthen complete"
    fake.add("a", told=told, retries="transient: 1, backoff_seconds: 0")
    assert main(["sweep", "recipes/toy"]) == 1
    assert list_ends(fake, "a") == [(0, "transient"), (1, "transient"), (1, "transient")]
    assert main(["sweep", "recipes/toy"]) == 0


def test_preempted_again_and_again_before_a_checkpoint_is_a_failure(fake: FakeLauncher) -> None:
    fake.add("a", told="fail preempted by the cluster", retries="backoff_seconds: 0")
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES["transient"], (
        "not 13, which is queued again for ever"
    )
    assert [kind for _, kind in list_ends(fake, "a")] == ["preempted"] * 4


def test_a_retry_whose_run_is_still_held_is_no_success(fake: FakeLauncher) -> None:
    """A machine out of reach, with ranks that may live, holds `ranks`."""
    fake.add("a", told="fail transient x", retries="transient: 2, backoff_seconds: 1")
    launch = fake.start("launch", "recipes/toy/a.yaml")
    assert launch.stderr is not None
    while "retry 1 of 2" not in (line := launch.stderr.readline()):
        assert line, "it ended without a retry"
    with fake.paths("a").ranks_lock_path.open("a+b") as ranks:
        fcntl.flock(ranks, fcntl.LOCK_SH)
        code, _, stderr = finish(launch)
    assert code == EXIT_CODES["transient"] and "hold the run" in stderr
    assert fake.started() == ["a"]


def test_a_cluster_is_not_told_that_a_held_run_is_done(
    fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("a", told="wait")
    launch = fake.start("launch", "recipes/toy/a.yaml")
    fake.next_started()
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES["transient"]
    fake.let_go("a")
    assert finish(launch)[0] == 0
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
