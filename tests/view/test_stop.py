"""`runner stop`: the runs that are asked, the messages, and a sweep that continues with its other
runs.
"""

from __future__ import annotations

import os
import re
import signal

import pytest

from runner.cli.main import main
from runner.files import write_json_atomic
from runner.run.paths import RunPaths
from runner.run.record import load_stop_request
from tests.support.fake_launcher import FakeLauncher, fake, finish

__all__ = ["fake"]


def test_a_running_run_is_asked_and_the_sweep_goes_on_with_the_others(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="obey")
    fake.add("b")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    progress = {"phase": "training", "step": 1, "max_steps": 2}
    write_json_atomic(fake.paths("a").attempt(1).progress_path, progress)
    assert main(["stop", "recipes/toy"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("toy/a  asked attempt 1 to checkpoint and stop (training, step 1/2, on ")
    assert "1 run is not running" in err
    code, _, stderr = finish(sweep)
    assert code == 1
    assert "toy/a stopped, preempted: asked by `runner stop`: stopped at step 1" in stderr
    assert fake.started() == ["a", "b"], "and not again"
    assert fake.attempts("a")[0]["started"] == "warm"


def test_launch_that_was_asked_exits_as_preempted(fake: FakeLauncher) -> None:
    fake.add("a", told="obey")
    launch = fake.start("launch", "recipes/toy/a.yaml")
    fake.next_started()
    assert main(["stop", str(fake.paths("a").run_dir)]) == 0
    assert finish(launch)[0] == 13


def test_only_what_is_meant_is_asked(fake: FakeLauncher) -> None:
    fake.add("a", "bb", told="obey")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    fake.next_started(), fake.next_started()
    assert main(["stop", "recipes/toy", "--where", "size=2"]) == 0
    assert load_stop_request(fake.paths("a")) is None
    assert load_stop_request(fake.paths("bb")) is not None
    assert main(["stop", "recipes/toy/a.yaml"]) == 0
    assert finish(sweep)[0] == 1


def test_nothing_to_stop_is_said_and_nothing_is_written(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    capsys.readouterr()
    before = fake.tree()
    assert main(["stop", "recipes/toy"]) == 0
    assert (
        "nothing to stop: 2 runs are not running; a sweep elsewhere that is only about to start"
        " runs is not asked: press Ctrl-C in its terminal to stop it\n"
    ) in capsys.readouterr().err
    assert main(["stop", "recipes/toy/a.yaml"]) == 0
    assert capsys.readouterr().err == "nothing to stop: 1 run is not running\n", "it is done"
    assert fake.tree() == before
    assert main(["stop", "recipes/nowhere"]) == 2


def test_a_sweep_that_still_imports_is_named_with_the_command_that_stops_it(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    sweep = fake.start("sweep", "recipes/toy")
    sweep.send_signal(signal.SIGSTOP)  # before its first import
    assert main(["stop", "recipes/toy"]) == 1
    said = capsys.readouterr().err
    assert "nothing to stop: 1 run is not running\n" in said
    shown = "may start them, and is not asked: runner sweep recipes/toy\n"
    assert f"process {sweep.pid} {shown}" in said
    hint = re.search(r"hint: kill (\d+)  #", said)
    assert hint is not None
    os.kill(int(hint[1]), signal.SIGTERM)
    sweep.send_signal(signal.SIGCONT)
    assert finish(sweep)[0] != 0
    assert fake.started() == []
    assert main(["stop", "recipes/toy"]) == 0, "no process is left that could start it"


def test_what_is_only_just_being_started_is_not_asked_in_vain(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between taking the lease and opening the attempt there is no number to name."""
    from runner.launch.run_files import take_lease

    fake.add("a")
    paths: RunPaths = fake.paths("a")
    lease = take_lease(paths)
    assert lease is not None
    assert main(["stop", "recipes/toy"]) == 1
    assert (
        "toy/a  is starting or finishing; run `runner stop` again in a few seconds"
        in capsys.readouterr().out
    )
    lease.close()
    assert not paths.stop_path.exists()


def test_a_run_that_waits_for_its_retry_is_not_tried_again(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="fail transient x", retries="transient: 1, backoff_seconds: 500")
    sweep = fake.start("sweep", "recipes/toy")
    assert sweep.stderr is not None
    while "retry 1 of 1 in 500 s" not in (line := sweep.stderr.readline()):
        assert line, "the sweep ended without a retry"
    assert main(["stop", "recipes/toy"]) == 0
    assert "its sweep, if still running, will not retry it" in capsys.readouterr().out
    assert finish(sweep)[0] == 1
    assert fake.started() == ["a"]
