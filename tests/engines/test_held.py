"""Two sweeps over the same runs, and what becomes of a run that one of them holds when the other
one comes to it; over real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.launch.held import HeldRuns
from runner.plan.decide import Launch
from runner.plan.select import select_recipes
from runner.run.record import load_stop_request
from tests.support.fake_hub import FakeHub
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher, fake, finish
from tests.support.pushes import add, hub, read_push

__all__ = ["fake", "hub"]

Sweep = subprocess.Popen[str]


def list_kinds(fake: FakeLauncher, name: str) -> list[str | None]:
    """The failure of each attempt; `killed` where no end is recorded."""
    return [
        "killed" if one["ended_at_utc"] is None else one["failure"] and one["failure"]["kind"]
        for one in fake.attempts(name)
    ]


def wait_for(sweep: Sweep, text: str) -> str:
    """The line of a sweep's stderr that holds the text."""
    assert sweep.stderr is not None
    while text not in (line := sweep.stderr.readline()):
        assert line, f"the sweep ended before it said {text!r}"
    return line


def start_both(fake: FakeLauncher, told: str) -> tuple[Sweep, Sweep]:
    """A sweep of `a` and `b` that has completed `a` and waits for `b`, which the other one
    holds.
    """
    fake.add("a", told="wait")
    fake.add("b", told=told)
    waiting = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "a"
    holding = fake.start("sweep", "recipes/toy/b.yaml")
    assert fake.next_started()[0] == "b"
    fake.let_go("a")
    line = wait_for(waiting, "waiting for 1 run")
    assert line.startswith(
        f"waiting for 1 run that another sweep holds: toy/b (process {holding.pid} on "
    )
    return waiting, holding


def test_a_stopped_sweep_says_what_another_one_has_taken_up_meanwhile(fake: FakeLauncher) -> None:
    fake.add("a", told="obey\nthen wait")
    fake.add("b", told="wait")
    os.mkfifo(fake.home / "go" / "a")
    stopped = fake.start("sweep", "recipes/toy", "--slots", "2", "--cold")
    assert {fake.next_started()[0] for _ in "ab"} == {"a", "b"}
    stopped.send_signal(signal.SIGINT)
    assert wait_for(stopped, "toy/a  preempted").startswith("[0/2] "), "it is not done"
    other = fake.start("sweep", "recipes/toy/a.yaml", "--cold")
    assert fake.next_started()[0] == "a"
    fake.let_go("b")
    code, _, stderr = finish(stopped)
    assert code == 130 and "[1/2] toy/b  completed\n" in stderr
    assert "stopped, preempted" not in stderr, "each is reported once, by its end"
    assert f"  toy/a  is now run by another sweep (process {other.pid} on " in stderr
    fake.let_go("a")
    assert finish(other)[0] == 0


def test_a_run_whose_sweep_is_interrupted_is_taken_up(fake: FakeLauncher) -> None:
    waiting, holding = start_both(fake, "obey\nthen complete")
    holding.send_signal(signal.SIGINT)
    assert finish(holding)[0] == 130
    code, _, stderr = finish(waiting)
    assert code == 0 and "[2/2] toy/b  completed\n" in stderr
    assert stderr.endswith("\n2 runs: 2 completed\n")
    assert list_kinds(fake, "b") == ["preempted", None]


def test_a_run_whose_sweep_is_killed_is_taken_up(fake: FakeLauncher) -> None:
    waiting, holding = start_both(fake, "hang\nthen complete")
    holding.kill()
    finish(holding)
    code, _, stderr = finish(waiting)
    assert code == 0 and stderr.endswith("\n2 runs: 2 completed\n")
    assert list_kinds(fake, "b") == ["killed", None]


def test_a_run_that_somebody_stops_is_left(fake: FakeLauncher) -> None:
    waiting, holding = start_both(fake, "obey\nthen complete")
    assert main(["stop", "recipes/toy/b.yaml"]) == 0
    ends = [finish(one) for one in (holding, waiting)]
    assert [code for code, _, _ in ends] == [1, 1]
    stderr = ends[1][2]
    reason = "preempted: (by another sweep) asked by `runner stop`: stopped at step 1"
    assert f"toy/b stopped, {reason}" in stderr
    assert stderr.endswith("\n2 runs: 1 completed, 1 interrupted\n")
    assert list_kinds(fake, "b") == ["preempted"]
    assert main(["sweep", "recipes/toy"]) == 0, "a new request gets it"


def test_a_request_to_stop_outlives_the_sweep_that_was_to_carry_it_out(fake: FakeLauncher) -> None:
    """Asked for in vain: the sweep is interrupted, or killed, before the run has left."""
    waiting, holding = start_both(fake, "hang\nthen complete")
    assert main(["stop", "recipes/toy/b.yaml"]) == 0
    holding.send_signal(signal.SIGINT)
    wait_for(holding, "stopping: waiting for 1 run")
    holding.kill()
    finish(holding)
    request = load_stop_request(fake.paths("b"))
    assert request is not None and request.why == "asked by `runner stop`"
    code, _, stderr = finish(waiting)
    assert code == 1 and "toy/b stopped, preempted: (by another sweep) asked by" in stderr
    assert fake.started() == ["a", "b"]


def test_a_run_that_the_other_sweep_completes_counts_as_such(fake: FakeLauncher) -> None:
    waiting, holding = start_both(fake, "wait")
    fake.let_go("b")
    assert finish(holding)[0] == 0
    code, _, stderr = finish(waiting)
    assert code == 0 and "[2/2] toy/b  completed by another sweep\n" in stderr
    assert stderr.endswith("\n2 runs: 2 completed\n")
    assert list_kinds(fake, "b") == [None]


def start_both_pushing(fake: FakeLauncher, hub: FakeHub) -> tuple[Sweep, Sweep]:
    """As `start_both`, but the sweep that holds `b` has completed it and is pushing it."""
    add(fake, "b")
    fake.add("a", told="wait")
    fake.tell("b", "wait complete model")
    waiting = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "a"
    holding = fake.start("sweep", "recipes/toy/b.yaml")
    assert fake.next_started()[0] == "b"
    fake.let_go("a")
    wait_for(waiting, "waiting for 1 run")
    hold = hub.hold("/lfs/")
    fake.let_go("b")
    assert hold.reached.wait(PATIENCE_SECONDS)
    wait_for(waiting, "toy/b  completed by another sweep")
    wait_for(waiting, "toy/b  waiting for its push to lab/b by another process")
    return waiting, holding


def test_a_run_whose_sweep_is_killed_while_it_pushes_is_pushed(
    fake: FakeLauncher, hub: FakeHub
) -> None:
    waiting, holding = start_both_pushing(fake, hub)
    holding.kill()
    finish(holding)
    hub.let_go()
    code, _, stderr = finish(waiting)
    push = read_push(fake, "b")
    assert code == 0 and push is not None and push["state"] == "pushed"
    assert f"toy/b  pushed to lab/b, commit {1:040x}" in stderr and "pending" not in stderr
    assert len(fake.attempts("b")) == 1


def test_a_run_that_the_other_sweep_pushes_is_waited_for(fake: FakeLauncher, hub: FakeHub) -> None:
    waiting, holding = start_both_pushing(fake, hub)
    hub.let_go()
    ends = [finish(one) for one in (holding, waiting)]
    assert [code for code, _, _ in ends] == [0, 0]
    assert f"toy/b  pushed to lab/b, commit {1:040x}" in ends[1][2]
    assert len(hub.repositories["lab/b"].messages) == 1


def test_a_run_that_fails_for_good_in_the_other_sweep_has_failed(fake: FakeLauncher) -> None:
    waiting, holding = start_both(fake, "wait fail data row 7 has no messages")
    fake.let_go("b")
    ends = [finish(one) for one in (holding, waiting)]
    assert [code for code, _, _ in ends] == [1, 1]
    stderr = ends[1][2]
    assert "toy/b failed, data: (by another sweep) row 7 has no messages\n" in stderr
    assert stderr.endswith("\n2 runs: 1 completed, 1 failed\n")
    assert len(fake.attempts("b")) == 1


def test_a_retry_that_its_sweep_does_not_live_to_make_is_made(fake: FakeLauncher) -> None:
    told = "fail transient x\nthen complete"
    fake.add("a", told="wait")
    fake.add("b", told=told, retries="transient: 1, backoff_seconds: 1")
    late = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "a"
    fake.add("b", told=told, retries="transient: 1, backoff_seconds: 500")  # for the other one
    other = fake.start("sweep", "recipes/toy/b.yaml")
    wait_for(other, "retry 1 of 1 in 500 s")
    other.kill()
    finish(other)
    fake.let_go("a")
    wait_for(late, "toy/b  transient: (by another sweep) x; retry 1 of 1 in 1 s")
    assert finish(late)[0] == 0
    assert [(one["retry"], one["failure"] is None) for one in fake.attempts("b")] == [
        (0, False),
        (1, True),
    ]


def test_a_sweep_that_waits_is_stopped_at_once_and_says_for_what_it_waited(
    fake: FakeLauncher,
) -> None:
    waiting, holding = start_both(fake, "wait")
    waiting.send_signal(signal.SIGINT)
    code, _, stderr = finish(waiting)
    assert code == 130
    held = f"  toy/b  is held by process {holding.pid} on "
    assert "stopped by SIGINT, not done:\n" + held in stderr
    assert stderr.endswith(
        "`runner sweep recipes/toy` continues from here\n2 runs: 1 completed, 1 running elsewhere\n"
    )
    fake.let_go("b")
    assert finish(holding)[0] == 0


def test_what_runs_when_a_sweep_begins_is_named_and_not_waited_for(fake: FakeLauncher) -> None:
    fake.add("a", told="wait")
    fake.add("b")
    holding = fake.start("sweep", "recipes/toy/a.yaml")
    assert fake.next_started()[0] == "a"
    code, stdout, stderr = finish(fake.start("sweep", "recipes/toy"))
    assert code == 0 and "skip    toy/a  running: " in stdout
    assert stderr.endswith("\n2 runs: 1 completed, 1 running elsewhere\n")
    fake.let_go("a")
    assert finish(holding)[0] == 0


def test_what_was_running_when_a_sweep_began_and_is_left_since_is_not_done(
    fake: FakeLauncher,
) -> None:
    fake.add("a", told="hang")
    fake.add("b", told="wait")
    holding = fake.start("sweep", "recipes/toy/a.yaml")
    assert fake.next_started()[0] == "a"
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "b"
    holding.kill()
    finish(holding)
    fake.let_go("b")
    code, _, stderr = finish(sweep)
    assert code == 1 and stderr.endswith("\n2 runs: 1 completed, 1 interrupted\n")
    assert "toy/a was running when this sweep began and is interrupted now: attempt 1" in stderr


def test_what_was_running_when_a_sweep_began_and_has_failed_since_is_named(
    fake: FakeLauncher,
) -> None:
    fake.add("a", told="wait fail data row 7 has no messages")
    fake.add("b", told="wait")
    holding = fake.start("sweep", "recipes/toy/a.yaml")
    assert fake.next_started()[0] == "a"
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "b"
    fake.let_go("a")
    assert finish(holding)[0] == 1
    fake.let_go("b")
    code, _, stderr = finish(sweep)
    assert code == 1 and stderr.endswith("\n2 runs: 1 completed, 1 failed\n")
    told = "toy/a was running when this sweep began and is failed now: data: row 7 has no messages"
    assert f"{told}\n  hint: " in stderr


def test_an_odd_file_of_a_held_run_ends_that_run_alone(fake: FakeLauncher) -> None:
    waiting, holding = start_both(fake, "wait")
    lease_path = fake.paths("b").lease_path
    lease_path.rename(lease_path.with_name("aside"))
    lease_path.mkdir()
    code, _, stderr = finish(waiting)
    assert code == 1 and "lease is a folder, and should be a file" in stderr
    assert "Traceback" not in stderr
    assert stderr.endswith("\n2 runs: 1 completed, 1 unreadable\n")
    fake.let_go("b")
    finish(holding)


@pytest.mark.parametrize("is_changed", [True, False])
def test_inputs_that_changed_while_a_run_waited_are_never_recorded_as_before(
    fake: FakeLauncher, is_changed: bool
) -> None:
    waiting, holding = start_both(fake, "hang\nthen complete")
    config = fake.root / "models" / "toy" / "config.json"
    if is_changed:
        config.write_text('{"other": 1}')
    else:
        config.touch()
    holding.kill()
    finish(holding)
    code, _, stderr = finish(waiting)
    if not is_changed:
        assert code == 0 and stderr.endswith("\n2 runs: 2 completed\n")
        return
    assert code == 1 and len(fake.attempts("b")) == 1
    assert "inputs of toy/b changed after it was planned:\n  models/toy has another" in stderr
    assert "toy/a was pending when this sweep began and is changed now: " in stderr
    assert stderr.endswith("\n2 runs: 2 changed\n")


def test_each_held_run_is_named_once(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    held = HeldRuns()
    for one in select_recipes(["recipes/toy"], Path("runs")):
        held.add(Launch(one, {}, 1))
        said = held.describe_unreported()
        assert said is not None and said.startswith("waiting for 1 run that another sweep holds")
        assert said.count("toy/") == 1 and one.full_name in said
    assert held.describe_unreported() is None
