"""Sweeps over real processes: the number of simultaneous runs, their devices, and the remains of a
stopped or killed sweep.
"""

from __future__ import annotations

import os
import signal

import pytest

from runner.cli.main import main
from runner.errors import RefusedError
from runner.files import load_json, write_json_atomic
from runner.launch.command import Placement
from runner.launch.placement import Devices
from runner.plan.decide import Launch
from runner.plan.select import select_recipes
from runner.plan.status import read_status
from runner.processes import StopSignals
from runner.recipe.contents import KnownContents, list_contents
from runner.recipe.parse import load_recipe
from runner.run.facts import read_facts
from runner.run.lease import is_leased
from tests.support.fake_launcher import (
    PATIENCE_SECONDS,
    FakeLauncher,
    fake,
    finish,
    wait_until_dead,
)

__all__ = ["fake"]


def list_states(fake: FakeLauncher, *names: str) -> list[str]:
    recipes = [load_recipe(fake.root / "recipes" / "toy" / f"{name}.yaml") for name in names]
    known = KnownContents(fake.root / "none.json")
    return [
        read_status(
            read_facts(fake.paths(recipe.run.name)), recipe, known.find(list_contents(recipe))
        ).state
        for recipe in recipes
    ]


def test_as_many_at_a_time_as_there_are_slots(fake: FakeLauncher) -> None:
    fake.add("a", "b", "c", "d", told="wait")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    waiting = [fake.next_started()[0], fake.next_started()[0]]
    assert sorted(waiting) == ["a", "b"]  # two processes: either may be the first to say so
    for following in ("c", "d"):
        fake.let_go(waiting.pop(0))
        waiting.append(fake.next_started()[0])
        assert waiting[-1] == following
    for name in waiting:
        fake.let_go(name)
    code, _, stderr = finish(sweep)
    assert code == 0, stderr
    running = most = 0
    for event in fake.events():
        running += 1 if event["event"] == "start" else -1
        most = max(most, running)
    assert most == 2
    assert list_states(fake, "a", "b", "c", "d") == ["completed"] * 4


def test_each_attempt_has_its_own_devices(fake: FakeLauncher) -> None:
    fake.add("a", "b", "c", told="wait")
    sweep = fake.start("sweep", "recipes/toy", "--gpus", "0,1")
    assert {fake.next_started()[0], fake.next_started()[0]} == {"a", "b"}
    fake.let_go("a")
    assert fake.next_started()[0] == "c"
    for name in ("b", "c"):
        fake.let_go(name)
    assert finish(sweep)[0] == 0
    devices = {e["name"]: e["environment"]["CUDA_VISIBLE_DEVICES"] for e in fake.events()}
    assert {devices["a"], devices["b"]} == {"0", "1"} and devices["c"] == devices["a"]
    assert [fake.attempts(name)[0]["devices"] for name in "abc"] == [
        devices[name] for name in "abc"
    ]


def test_a_run_of_two_processes_takes_two_devices(fake: FakeLauncher) -> None:
    fake.add("a", "b", num_processes=2)
    assert main(["sweep", "recipes/toy", "--gpus", "3,5"]) == 0
    assert [
        e["environment"]["CUDA_VISIBLE_DEVICES"] for e in fake.events() if e["event"] == "start"
    ] == ["3,5", "3,5"]
    assert all(e["argv"][e["argv"].index("--num_processes") + 1] == "2" for e in fake.events())


def test_a_run_that_never_fits_is_refused_before_anything_starts(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    fake.add("b", num_processes=2)
    assert main(["sweep", "recipes/toy", "--gpus", "0"]) == 2
    assert "toy/b needs 2 GPUs, one per process; the sweep has 1" in capsys.readouterr().err
    assert fake.events() == []


@pytest.mark.parametrize("gpus", ["", "0,", "0,0", "0, 0"])
def test_devices_must_be_different_and_have_names(gpus: str, fake: FakeLauncher) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy", "--gpus", gpus]) == 2
    assert fake.events() == []


def test_devices_give_a_run_the_cores_of_its_share() -> None:
    cores = os.cpu_count() or 1
    devices = Devices(2, ["0", "1"])
    both = devices.take(2)
    assert both == Placement(2, ("0", "1"), 2 * max(1, cores // 2))
    assert devices.take(1) is None
    devices.release(both)
    assert devices.take(1) == Placement(1, ("0",), max(1, cores // 2))
    slots = Devices(1)
    slot = slots.take(4)
    assert slot == Placement(4, None, cores) and slots.take(1) is None
    slots.release(slot)
    assert slots.take(1) is not None


def test_two_sweeps_execute_each_run_once(fake: FakeLauncher) -> None:
    names = ["a", "b", "c", "d", "e"]
    fake.add(*names, told="wait")
    sweeps = [fake.start("sweep", "recipes/toy", "--slots", "2") for _ in range(2)]
    for _ in names:
        fake.let_go(fake.next_started()[0])
    ends = [finish(sweep) for sweep in sweeps]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(fake.started()) == names
    assert [[one["started"] for one in fake.attempts(name)] for name in names] == [["warm"]] * 5
    assert list_states(fake, *names) == ["completed"] * 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_sweep_lets_its_runs_checkpoint_and_starts_nothing_more(
    number: signal.Signals, fake: FakeLauncher
) -> None:
    fake.add("a", "b", "c", told="obey")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    pidfds = [os.pidfd_open(fake.next_started()[1]) for _ in range(2)]
    assert list_states(fake, "a", "b", "c") == ["running", "running", "pending"]
    sweep.send_signal(number)
    code, _, stderr = finish(sweep)
    assert code == 130
    assert "waiting for 2 runs to checkpoint and exit; a second Ctrl-C" in stderr
    assert f"stopped by {number.name}, not done:\n" in stderr and "Traceback" not in stderr
    assert stderr.count("  has no checkpoint here yet, so it starts from step 0\n") == 2
    assert "  toy/c  was not started\n" in stderr
    assert "`runner sweep recipes/toy --slots 2` continues from here\n" in stderr
    for pidfd in pidfds:
        wait_until_dead(pidfd)
        os.close(pidfd)
    for name in ("a", "b"):
        [attempt] = fake.attempts(name)
        assert (attempt["started"], attempt["failure"]["kind"]) == ("warm", "preempted")
        assert (
            attempt["failure"]["message"]
            == f"the runner was stopped by {number.name}: stopped at step 1, which is saved"
        )
        assert attempt["ended_at_utc"] and attempt["exit_status"] == 0
        assert fake.paths(name).attempt(1).log_path.read_text().splitlines()[-1] == (
            "runner: attempt 1 was asked to stop and did not crash:"
            f" {attempt['failure']['message']}; the next attempt starts from step 0"
        )
    assert not fake.paths("c").run_dir.exists()
    assert list_states(fake, "a", "b", "c") == ["interrupted", "interrupted", "pending"]


def test_a_second_signal_ends_at_once_what_does_not_leave(fake: FakeLauncher) -> None:
    fake.add("a", told="obey")
    fake.add("b", told="hang")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    pids = dict(fake.next_started() for _ in range(2))
    pidfds = {name: os.pidfd_open(pid) for name, pid in pids.items()}
    sweep.send_signal(signal.SIGTERM)
    wait_until_dead(pidfds["a"])  # so the first one was acted upon
    sweep.send_signal(signal.SIGINT)
    assert finish(sweep)[0] == 130
    for pidfd in pidfds.values():
        wait_until_dead(pidfd)
        os.close(pidfd)
    [attempt] = fake.attempts("b")
    why = "the runner was stopped by SIGTERM; a second signal (SIGINT) killed the run"
    assert (attempt["failure"]["kind"], attempt["failure"]["message"]) == ("preempted", why)
    assert (attempt["started"], attempt["exit_status"]) == ("warm", -signal.SIGKILL)
    assert list_states(fake, "a", "b") == ["interrupted", "interrupted"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 13), (signal.SIGHUP, 13), (signal.SIGUSR1, 13)],
)
def test_launch_tells_by_its_exit_code_that_it_was_preempted(
    number: signal.Signals, code: int, fake: FakeLauncher
) -> None:
    fake.add("a", told="obey")
    launch = fake.start("launch", "recipes/toy/a.yaml")
    fake.next_started()
    launch.send_signal(number)
    assert finish(launch)[0] == code


@pytest.mark.parametrize("verb", ["launch", "sweep"])
def test_a_run_that_completes_in_spite_of_a_signal_is_complete(
    verb: str, fake: FakeLauncher
) -> None:
    fake.add("a", told="obey too late")
    process = fake.start(verb, "recipes/toy/a.yaml")
    fake.next_started()
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 0
    assert list_states(fake, "a") == ["completed"]


def test_a_terminal_that_goes_away_takes_no_checkpoint_with_it(fake: FakeLauncher) -> None:
    """HUP comes when nothing can be printed any more."""
    fake.add("a", told="obey")
    sweep = fake.start("sweep", "recipes/toy", has_terminal=True)
    fake.next_started()
    fake.close_terminal()
    sweep.wait(PATIENCE_SECONDS)
    assert sweep.returncode == 130
    [attempt] = fake.attempts("a")
    assert (
        attempt["failure"]["message"]
        == "the runner was stopped by SIGHUP: stopped at step 1, which is saved"
    )


@pytest.mark.parametrize("verb", [["launch"], ["sweep", "--dry-run"]])
def test_a_preview_tells_people_how_to_start_a_run_by_hand(
    fake: FakeLauncher, verb: list[str]
) -> None:
    fake.add("a")
    verb = [*verb, "recipes/toy/a.yaml", "data.seed=2", "--dry-run"]
    shown = ""
    process = fake.start(*dict.fromkeys(verb), has_terminal=True)
    while "accelerate" not in shown or "--prepare" not in shown:
        shown += fake.read_terminal()
    assert process.wait(PATIENCE_SECONDS) == 0
    fake.close_terminal()
    assert "by hand: runner launch recipes/toy/a.yaml data.seed=2 --prepare" in shown
    code, _, stderr = finish(fake.start(*dict.fromkeys(verb)))
    assert (code, stderr) == (0, ""), "a script reads the commands only"


def test_a_broken_pipe_takes_no_checkpoint_with_it(fake: FakeLauncher) -> None:
    """`runner sweep 2>&1 | tee log`: Ctrl-C ends `tee` too."""
    fake.add("a", told="obey")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    assert sweep.stderr is not None
    sweep.stderr.close()
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(PATIENCE_SECONDS) == 130
    [attempt] = fake.attempts("a")
    assert (
        attempt["failure"]["kind"] == "preempted"
        and "SIGINT: stopped at step 1" in attempt["failure"]["message"]
    )


def test_a_stopped_sweep_names_the_step_that_a_run_resumes_from(fake: FakeLauncher) -> None:
    fake.add("a", told="committed obey")
    sweep = fake.start("sweep", "--slots", "1", "recipes/toy", "--where", "size=1", "--cold")
    fake.next_started()
    sweep.send_signal(signal.SIGINT)
    code, _, stderr = finish(sweep)
    assert code == 130
    assert stderr.endswith(
        "stopped by SIGINT, not done:\n  toy/a  resumes from step 1\n"
        "`runner sweep --slots 1 recipes/toy --where size=1 --cold` continues from here\n"
        "1 run: 1 interrupted\n"
    )
    log = fake.paths("a").attempt(1).log_path.read_text()
    assert log.endswith("; the next attempt resumes from step 1\n")


def test_what_was_stopped_goes_on_with_the_same_command(fake: FakeLauncher) -> None:
    fake.add("a", told="obey")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    sweep.send_signal(signal.SIGINT)
    assert finish(sweep)[0] == 130
    fake.tell("a", "complete")
    assert main(["sweep", "recipes/toy"]) == 0
    assert [
        attempt["failure"] and attempt["failure"]["kind"] for attempt in fake.attempts("a")
    ] == ["preempted", None]


def test_a_sweep_in_the_background_keeps_ignoring_what_its_shell_ignores(
    fake: FakeLauncher,
) -> None:
    """`nohup runner sweep` and `runner sweep &` in a script start with HUP or INT ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == [signal.SIGTERM]
            assert os.read(signals.fileno(), 10)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_killing_the_sweep_leaves_nothing_alive_and_no_lease(fake: FakeLauncher) -> None:
    fake.add("a", told="hang")
    sweep = fake.start("sweep", "recipes/toy")
    _, pid = fake.next_started()
    pidfd = os.pidfd_open(pid)
    assert is_leased(fake.paths("a").lease_path)
    sweep.kill()
    wait_until_dead(pidfd)
    os.close(pidfd)
    finish(sweep)
    assert not is_leased(fake.paths("a").lease_path)
    assert list_states(fake, "a") == ["interrupted"]
    assert main(["status", "recipes/toy", "--json"]) == 0


def test_failures_do_not_stop_the_others(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="exit 3")
    fake.add("b")
    fake.add("c", told="fail data row 7 has no messages")
    assert main(["sweep", "recipes/toy"]) == 1
    stderr = capsys.readouterr().err
    assert (
        "toy/a failed, lost: the training process died (exit status 3) without an error message"
        in stderr
    )
    assert "| the fake was told to exit 3" in stderr
    assert f"log: {fake.paths('a').attempt(1).log_path.relative_to(fake.root)}" in stderr
    assert "toy/c failed, data: row 7 has no messages" in stderr
    assert fake.paths("a").attempt(1).log_path.read_text() == (
        "the fake was told to exit 3\nrunner: attempt 1 ended, lost:"
        " the training process died (exit status 3) without an error message\n"
    )
    assert "[3/3]" in stderr
    assert list_states(fake, "a", "b", "c") == ["interrupted", "completed", "failed"]


def test_fail_fast_starts_nothing_more(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="fail crashed boom")
    fake.add("b", "c")
    assert main(["sweep", "recipes/toy", "--fail-fast"]) == 1
    assert "2 runs were not started because of --fail-fast" in capsys.readouterr().err
    assert fake.started() == ["a"]


def test_a_lasting_failure_is_named_and_skipped_until_it_is_asked_for(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("a", "configuration"), ("b", "data"), ("c", "diverged")):
        fake.add(name, told=f"fail {kind} because")
    for name, kind in (("d", "crashed"), ("e", "out_of_memory"), ("f", "transient")):
        fake.add(name, told=f"fail {kind} because")
    fake.add("g", told="exit 0")
    assert main(["sweep", "recipes/toy"]) == 1
    capsys.readouterr()
    for name in "abcdefg":
        fake.tell(name, "complete")
    assert main(["sweep", "recipes/toy"]) == 1
    stdout = capsys.readouterr().out
    for name, kind in (("a", "configuration"), ("b", "data"), ("c", "diverged")):
        assert (
            f"skip    toy/{name}  failed: {kind}: because (would fail again; `--retry-failed`"
            " tries anyway" in stdout
        )
    assert fake.started()[7:] == ["d", "e", "f", "g"]
    assert main(["sweep", "recipes/toy", "--retry-failed"]) == 0
    assert fake.started()[11:] == ["a", "b", "c"]
    assert main(["sweep", "recipes/toy"]) == 0
    assert len(fake.started()) == 14


def test_rerun_takes_up_what_was_begun_and_nothing_else(fake: FakeLauncher) -> None:
    fake.add("a", told="fail data because")
    fake.add("b", told="exit 1")
    fake.add("c")
    assert main(["sweep", "recipes/toy"]) == 1
    fake.add("d")
    fake.tell("a", "complete")
    fake.tell("b", "complete")
    assert main(["rerun", "recipes/toy"]) == 0
    assert fake.started()[3:] == ["a", "b"]
    assert list_states(fake, "a", "b", "c", "d") == [
        "completed",
        "completed",
        "completed",
        "pending",
    ]


def test_a_run_that_is_refused_when_its_turn_comes_fails_alone(fake: FakeLauncher) -> None:
    """Between the plan and its turn, somebody else made the directory of `b` for another
    experiment.
    """
    fake.add("a", "b", "c", told="exit 1")
    main(["sweep", "recipes/toy/b.yaml"])
    fake.tell("a", "wait")
    fake.tell("c", "complete")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    stored = load_json(fake.paths("b").recipe_path)
    stored["contents"]["data.jsonl"] = "0" * 64
    write_json_atomic(fake.paths("b").recipe_path, stored)
    fake.let_go("a")
    code, _, stderr = finish(sweep)
    assert (
        code == 1 and "toy/b failed, configuration: runs/toy/b holds another experiment" in stderr
    )
    assert fake.started() == ["b", "a", "c"]
    assert list_states(fake, "a", "c") == ["completed", "completed"]


def test_dry_run_touches_nothing(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a", "b")
    before = fake.tree()
    assert main(["sweep", "recipes/toy", "--dry-run"]) == 0
    assert main(["launch", "recipes/toy/a.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["launch", "toy/a"], ["launch", "toy/b"]]
    assert (
        all("accelerate launch --config_file cpu.yaml" in line for line in lines[2:])
        and len(lines) == 5
    )
    assert fake.tree() == before and fake.events() == []


def test_a_run_that_cannot_be_prepared_fails_alone(fake: FakeLauncher) -> None:
    """The record of `b` cannot be written, as on a full disk: `a`, which runs, and `c`, which
    waits, continue.
    """
    fake.add("a", told="wait")
    fake.add("b", "c")
    fake.paths("b").run_dir.mkdir(parents=True)
    fake.paths("b").attempts_dir.write_text("in the way")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    fake.next_started()
    fake.let_go("a")
    code, _, stderr = finish(sweep)
    assert (
        code == 1
        and "toy/b failed, configuration: runs/toy/b/attempts is a file" in stderr
        and "Traceback" not in stderr
    )
    assert list_states(fake, "a", "c") == ["completed", "completed"]
    fake.paths("b").attempts_dir.unlink()
    assert main(["sweep", "recipes/toy"]) == 0
    assert fake.started() == ["a", "c", "b"]


def test_refusals_of_devices_name_the_run(fake: FakeLauncher) -> None:
    fake.add("a")
    [selected] = select_recipes(["recipes/toy"], fake.root / "runs")
    with pytest.raises(RefusedError, match="toy/a needs 3 GPUs"):
        Devices(1, ["0"]).check([Launch(selected, {}, 3)])
