"""Sweeps on a real Slurm: each run is executed once, despite failures of jobs, daemons and
machines.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.files import load_json
from tests.support.fake_launcher import FakeLauncher, fake, finish, make_fake_launcher
from tests.support.local_slurm import (
    MAX_ARRAY_SIZE,
    LocalSlurm,
    needs_slurm,
    own_slurm,
    shared_slurm,
    wait_until,
)

__all__ = ["fake", "own_slurm", "shared_slurm"]
pytestmark = [needs_slurm, pytest.mark.slow]

SWEEP = ("sweep", "recipes/toy", "--engine", "slurm")


@pytest.fixture
def slurm(
    shared_slurm: LocalSlurm, fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalSlurm]:
    """The shared cluster, to which everything submits that is started here; what a failed test
    leaves in it does not reach the next one.
    """
    use(shared_slurm, monkeypatch)
    yield shared_slurm
    shared_slurm.cancel_all()


def use(cluster: LocalSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.root / "slurm.conf"))


def submissions(fake: FakeLauncher, output_root: str = "runs") -> list[dict[str, Any]]:
    """The submissions below an output root, in the order of the cluster's job numbers: two folders
    of one second differ in a random name.
    """
    found = map(load_json, fake.root.glob(f"{output_root}/.slurm/*/submission.json"))
    return sorted(found, key=lambda one: int(one["job"] or 0))


def wait_until_done(cluster: LocalSlurm) -> None:
    wait_until(lambda: cluster.list_jobs() == {}, "all jobs end")


def is_completed(fake: FakeLauncher, *names: str) -> bool:
    return all(fake.paths(name).result_path.exists() for name in names)


def start_one_of_two(fake: FakeLauncher) -> tuple[str, str]:
    """The run that has started, and the one that waits for it to end."""
    fake.add("a", "b", told="wait")
    assert main([*SWEEP, "--slots", "1"]) == 0
    first, _ = fake.next_started()
    return first, ({"a", "b"} - {first}).pop()


def test_two_at_a_time_each_with_a_gpu_of_its_own(slurm: LocalSlurm, fake: FakeLauncher) -> None:
    (fake.root / "cpu.yaml").write_text("use_cpu: false\n")
    fake.add("a", "b", "c", told="wait")
    assert main([*SWEEP, "--slots", "2"]) == 0
    running = {fake.next_started()[0], fake.next_started()[0]}
    waiting = ({"a", "b", "c"} - running).pop()
    array = submissions(fake)[0]["job"]
    index = {"a": 0, "b": 1, "c": 2}
    assert slurm.list_jobs() == {
        f"{array}_{index[name]}": "RUNNING" if name in running else "PENDING" for name in index
    }
    devices = {name: fake.attempts(name)[0]["devices"] for name in running}
    assert sorted(devices.values()) == ["0", "1"]
    assert {e["name"]: e["environment"]["CUDA_VISIBLE_DEVICES"] for e in fake.events()} == devices
    for name in sorted(running):
        fake.let_go(name)
    assert fake.next_started()[0] == waiting
    fake.let_go(waiting)
    wait_until_done(slurm)
    assert is_completed(fake, "a", "b", "c") and sorted(fake.started()) == ["a", "b", "c"]
    assert {name: fake.attempts(name)[0]["cluster_job"] for name in index} == {
        name: f"slurm {array}_{number}" for name, number in index.items()
    }


def test_what_is_queued_is_not_submitted_again(
    slurm: LocalSlurm, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", told="wait")
    assert main([*SWEEP, "--slots", "1"]) == 0
    running, _ = fake.next_started()
    array = submissions(fake)[0]["job"]
    fake.add("c", told="wait")
    capsys.readouterr()
    assert main(SWEEP) == 0
    output = capsys.readouterr().out
    other = ({"a", "b"} - {running}).pop()
    assert f"skip    toy/{running}  running" in output
    assert (
        f"skip    toy/{other}  queued: slurm {array}_{'ab'.index(other)} is pending"
        " (JobArrayTaskLimit)" in output
    )
    assert "launch  toy/c" in output and [one["runs"] for one in submissions(fake)] == [
        ["toy/a", "toy/b"],
        ["toy/c"],
    ]

    # Runs of the same names below another output root are other runs.
    assert (
        main([*SWEEP, "--output-root", "elsewhere", "--slots", "1", "--slurm-option=--hold"]) == 0
    )
    assert [one["runs"] for one in submissions(fake, "elsewhere")] == [["toy/a", "toy/b", "toy/c"]]
    slurm.run("scancel", submissions(fake, "elsewhere")[0]["job"])
    for name in ("a", "b", "c"):
        fake.let_go(name)
    wait_until_done(slurm)


def test_a_queued_run_whose_recipe_has_changed_is_refused(
    slurm: LocalSlurm, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main([*SWEEP, "--slurm-option=--hold"]) == 0
    array = submissions(fake)[0]["job"]
    path = fake.root / "recipes" / "toy" / "a.yaml"
    before = path.read_text()
    path.write_text(before.replace("max_steps: 2", "max_steps: 3"))
    capsys.readouterr()
    assert main(SWEEP) == 1
    output = capsys.readouterr().out
    assert f"refuse  toy/a  queued with another recipe; run `scancel {array}_0` first" in output
    assert "training.max_steps: 2 -> 3" in output
    slurm.run("scontrol", "release", array)  # the submitted recipe is executed
    wait_until_done(slurm)
    assert load_json(fake.paths("a").recipe_path)["recipe"]["training"]["max_steps"] == 2


def test_a_changed_run_that_is_queued_is_not_moved(
    slurm: LocalSlurm, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise its task would not find the directory, and would start the old recipe."""
    fake.add("a", told="exit 1")
    assert main(["sweep", "recipes/toy"]) == 1
    fake.tell("a", "complete")
    assert main([*SWEEP, "--slurm-option=--hold"]) == 0
    array = submissions(fake)[0]["job"]
    path = fake.root / "recipes" / "toy" / "a.yaml"
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
    capsys.readouterr()
    assert main([*SWEEP, "--fresh", "--yes"]) == 1
    output = capsys.readouterr().out
    assert f"refuse  toy/a  queued: slurm {array}_0 is pending" in output
    assert f"`scancel {array}_0` first" in output
    slurm.run("scancel", array)
    wait_until_done(slurm)
    assert main([*SWEEP, "--fresh", "--yes"]) == 0
    wait_until_done(slurm)
    assert is_completed(fake, "a")
    assert load_json(fake.paths("a").recipe_path)["recipe"]["training"]["max_steps"] == 3


def test_arrays_are_split_where_the_cluster_wants_it(slurm: LocalSlurm, fake: FakeLauncher) -> None:
    names = [f"run{number:02}" for number in range(MAX_ARRAY_SIZE + 2)]
    fake.add(*names)
    assert main(SWEEP) == 0
    assert sorted(len(one["runs"]) for one in submissions(fake)) == [2, MAX_ARRAY_SIZE]
    wait_until_done(slurm)
    assert is_completed(fake, *names) and sorted(fake.started()) == names


def test_a_cancelled_run_is_interrupted_and_goes_on_with_the_next_sweep(
    slurm: LocalSlurm, fake: FakeLauncher
) -> None:
    fake.add("a", told="hang\nthen complete")
    assert main(SWEEP) == 0
    fake.next_started()
    slurm.run("scancel", submissions(fake)[0]["job"])
    wait_until_done(slurm)
    assert len(fake.attempts("a")) == 1 and not is_completed(fake, "a")
    assert "interrupted" in finish(fake.start("status", "recipes/toy"))[1]
    assert main(SWEEP) == 0
    wait_until_done(slurm)
    assert is_completed(fake, "a") and len(fake.attempts("a")) == 2


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_sweep_killed_while_it_submits_loses_nothing(
    is_taken: bool, slurm: LocalSlurm, fake: FakeLauncher
) -> None:
    fake.add("a", "b", told="wait")
    sbatch = fake.home / "sbatch"
    submit = '/usr/bin/sbatch "$@"' if is_taken else ":"
    sbatch.write_text(f"#!/bin/bash\n{submit}\nkill -9 $PPID\n")
    sbatch.chmod(0o755)
    assert finish(fake.start(*SWEEP))[0] == -9
    assert [one["job"] for one in submissions(fake)] == [None]
    sbatch.unlink()
    assert main(SWEEP) == 0
    assert len(submissions(fake)) == (1 if is_taken else 2)
    for name in ("a", "b"):
        fake.let_go(name)
    wait_until_done(slurm)
    assert is_completed(fake, "a", "b") and sorted(fake.started()) == ["a", "b"]


def test_a_run_that_was_submitted_twice_is_executed_once(
    slurm: LocalSlurm, fake: FakeLauncher
) -> None:
    fake.add("a", told="wait")
    assert main(SWEEP) == 0
    fake.next_started()
    script = next(fake.root.glob("runs/.slurm/*/job.sh"))
    again = slurm.run("sbatch", "--parsable", f"--chdir={script.parent}", str(script)).strip()
    wait_until(lambda: f"{again}_0" not in slurm.list_jobs(), "the second task ends")
    assert "ExitCode=14:0" in slurm.run("scontrol", "show", "job", again), (
        "0 would say that the run is done"
    )
    assert "toy/a  running" in (script.parent / f"{again}_0.txt").read_text()
    fake.let_go("a")
    wait_until_done(slurm)
    assert is_completed(fake, "a") and fake.started() == ["a"]


def test_paths_and_options_with_strange_letters_arrive(
    slurm: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a 'b' \"c\" $(touch hacked) `touch hacked` ;&|é"
    root.mkdir()
    fake = make_fake_launcher(root)
    for name in ("PATH", "FAKE_HOME"):
        monkeypatch.setenv(name, fake.environment[name])
    monkeypatch.chdir(root)
    fake.add("a")
    comment = 'it\'s "mine" and $HOME #1'
    assert (
        main([*SWEEP, "--output-root", "my 'runs' $A", f"--slurm-option=--comment={comment}"]) == 0
    )
    wait_until_done(slurm)
    assert (root / "my 'runs' $A" / "toy" / "a" / "result.json").exists()
    submission = next(root.glob("*/.slurm/*/submission.json"))
    assert comment in slurm.run("scontrol", "show", "job", load_json(submission)["job"])
    assert (submission.parent / f"{load_json(submission)['job']}_0.txt").exists()


def test_a_killed_node_comes_back_and_its_run_goes_on(
    own_slurm: LocalSlurm, fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(own_slurm, monkeypatch)
    fake.add("a", told="hang\nthen complete")
    assert main(SWEEP) == 0
    fake.next_started()
    own_slurm.kill("node0")
    own_slurm.kill_jobs()
    own_slurm.start_node("node0")
    own_slurm.wait_until_idle()
    assert is_completed(fake, "a") and len(fake.attempts("a")) == 2
    assert fake.attempts("a")[0]["ended_at_utc"] is None
    assert len({attempt["cluster_job"] for attempt in fake.attempts("a")}) == 1, (
        "Slurm itself queued it again"
    )


def test_a_controller_that_is_away_loses_nothing(
    own_slurm: LocalSlurm, fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(own_slurm, monkeypatch)
    first, second = start_one_of_two(fake)
    own_slurm.kill("slurmctld", signal.SIGTERM)
    fake.tell(second, "complete")
    fake.let_go(first)
    wait_until(lambda: is_completed(fake, first), "the run ends without a controller")
    own_slurm.start_controller()
    assert main(SWEEP) == 0  # jobs that the controller has forgotten are submitted again
    own_slurm.wait_until_idle()
    assert is_completed(fake, "a", "b") and sorted(fake.started()) == ["a", "b"]


def test_a_controller_that_is_killed_as_a_run_starts_doubles_nothing(
    own_slurm: LocalSlurm, fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm 22.05 may not know any more that the task began: it starts it again, or holds it and
    drains its node.
    """
    use(own_slurm, monkeypatch)
    first, second = start_one_of_two(fake)
    own_slurm.kill("slurmctld")
    own_slurm.start_controller()
    fake.tell(second, "complete")
    fake.let_go(first)
    wait_until(lambda: is_completed(fake, first), "the run goes on to its end")
    assert main(SWEEP) == 0

    def is_idle() -> bool:
        if own_slurm.node_state("node0").rstrip("*") in ("drained", "draining", "down"):
            own_slurm.run("scontrol", "update", "nodename=node0", "state=resume")
        for job in own_slurm.list_jobs():
            own_slurm.succeeds("scontrol", "release", job)
        return own_slurm.list_jobs() == {}

    wait_until(is_idle, "all jobs end", pause_seconds=0.5)
    assert is_completed(fake, "a", "b") and sorted(fake.started()) == ["a", "b"]


def test_a_power_loss_of_everything_loses_nothing(
    own_slurm: LocalSlurm, fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(own_slurm, monkeypatch)
    fake.add("a", "b", "c", told="hang\nthen complete")
    assert main([*SWEEP, "--slots", "2"]) == 0
    begun = {fake.next_started()[0], fake.next_started()[0]}
    own_slurm.kill_all()
    fake.tell(({"a", "b", "c"} - begun).pop(), "complete")
    own_slurm.start_all()
    assert main(SWEEP) == 0
    own_slurm.wait_until_idle()
    assert is_completed(fake, "a", "b", "c")
    assert {name: len(fake.attempts(name)) for name in "abc"} == {
        name: 2 if name in begun else 1 for name in "abc"
    }


def test_a_run_that_is_preempted_is_queued_again(slurm: LocalSlurm, fake: FakeLauncher) -> None:
    fake.add("a", told="obey\nthen complete")
    assert main([*SWEEP, "--slurm-option=--gres=gpu:2"]) == 0
    fake.next_started()
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--gres=gpu:2", "--wrap=:"
    ).strip()
    wait_until_done(slurm)
    assert "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", urgent)
    assert is_completed(fake, "a") and len(fake.attempts("a")) == 2
    assert fake.attempts("a")[0]["failure"]["kind"] == "preempted"
    assert len({attempt["cluster_job"] for attempt in fake.attempts("a")}) == 1


def test_a_run_that_reaches_its_time_limit_is_queued_again(
    slurm: LocalSlurm, fake: FakeLauncher
) -> None:
    fake.add("a", told="obey\nthen complete")
    assert main([*SWEEP, "--time-limit", "1", "--stop-before-seconds", "59"]) == 0
    fake.next_started()
    wait_until_done(slurm)
    assert is_completed(fake, "a") and len(fake.attempts("a")) == 2
    assert fake.attempts("a")[0]["failure"]["kind"] == "preempted"
    assert len({attempt["cluster_job"] for attempt in fake.attempts("a")}) == 1
