"""One attempt: its lease, its record, its end; run directories that are damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.errors import RefusedError, RunnerError
from runner.files import load_json, write_json_atomic
from runner.launch.attempt import HeldElsewhere, RunningAttempt, name_owner, start_attempt
from runner.launch.command import LaunchCommand, Placement, build_launch_command
from runner.launch.run_files import close_attempt, open_attempt, prepare_run, take_lease
from runner.plan.decide import Launch
from runner.plan.select import Selected
from runner.plan.status import read_status
from runner.processes import OWNER_VARIABLE
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.parse import Recipe, load_recipe
from runner.run.facts import read_facts
from runner.run.lease import is_leased
from runner.run.paths import RunPaths
from runner.run.record import StopRequest, load_record, load_stop_request
from tests.support.fake_launcher import (
    PATIENCE_SECONDS,
    FakeLauncher,
    fake,
    finish,
    wait_until_dead,
)

__all__ = ["fake"]


@pytest.fixture
def started() -> Iterator[list[RunningAttempt]]:
    """Attempts that are ended after the test in any case."""
    attempts: list[RunningAttempt] = []
    yield attempts
    for attempt in attempts:
        attempt.process.signal_group(signal.SIGKILL)
        attempt.process.wait()
        attempt.lease.close()


def load_toy(fake: FakeLauncher, name: str = "a") -> tuple[Recipe, Mapping[str, str], RunPaths]:
    recipe = load_recipe(fake.root / "recipes" / "toy" / f"{name}.yaml")
    return recipe, hash_contents(recipe, ContentHashes(fake.root / "cache.json")), fake.paths(name)


def load_launch(fake: FakeLauncher, name: str = "a") -> Launch:
    recipe, contents, paths = load_toy(fake, name)
    return Launch(Selected(recipe, Path("recipes", "toy", f"{name}.yaml"), paths), contents, 1)


def start(
    fake: FakeLauncher, started: list[RunningAttempt], name: str = "a"
) -> RunningAttempt | None:
    launch = load_launch(fake, name)
    command = build_launch_command(
        launch.recipe, launch.paths.run_dir, Placement(1), path=os.environ["PATH"]
    )
    attempt = start_attempt(launch, command)
    started += [attempt] if attempt is not None else []
    return attempt


def test_the_lease_is_the_stdin_of_the_child(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a", told="wait")
    attempt = start(fake, started)
    assert attempt is not None
    fake.next_started()
    assert fake.events()[0]["is_stdin_the_lease"]
    attempt.lease.close()
    assert is_leased(attempt.paths.lease_path), "the child alone holds it"
    with pytest.raises(HeldElsewhere):
        start(fake, started)
    fake.let_go("a")
    assert attempt.finish() is None
    assert not is_leased(attempt.paths.lease_path)


def test_the_record_says_what_was_started(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a")
    attempt = start(fake, started)
    assert attempt is not None and attempt.finish() is None
    [record] = load_record(attempt.paths).attempts
    [event] = [event for event in fake.events() if event["event"] == "start"]
    assert record.command[0] == "accelerate" and list(record.command[1:]) == event["argv"][1:]
    assert record.environment.items() <= event["environment"].items()
    assert record.started_at_utc <= (record.ended_at_utc or "")
    assert (record.number, record.num_processes, record.exit_status, record.failure) == (
        1,
        1,
        0,
        None,
    )
    assert record.versions["torch"] and record.host
    assert record.versions["tokenizers"] and record.hardware["cpu"]
    assert record.runner_version and record.source_hash and len(record.source_hash) == 64
    assert "told to complete" in attempt.files.log_path.read_text()


def test_what_another_launcher_left_is_removed_and_named(
    fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "secret-value")
    fake.add("a")
    assert finish(fake.start("launch", "recipes/toy/a.yaml"))[0] == 0
    [event] = [event for event in fake.events() if event["event"] == "start"]
    assert not {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "SLURM_NTASKS"} & {
        *event["environment"]
    }
    assert event["environment"]["ACCELERATE_LOG_LEVEL"] == "info"
    log = fake.paths("a").attempt(1).log_path.read_text()
    names = "ACCELERATE_MIXED_PRECISION, SLURM_NTASKS, WORLD_SIZE"
    assert log.startswith(f"removed from the environment of this attempt: {names}\n")
    assert "secret-value" not in log
    fake.add("b")
    shown = finish(fake.start("launch", "recipes/toy/b.yaml", "--dry-run"))[1]
    assert shown.startswith(f"env -u {names.replace(', ', ' -u ')} ACCELERATE_LOG_LEVEL=info ")


def test_where_nothing_is_removed_the_log_says_nothing(fake: FakeLauncher) -> None:
    fake.add("a")
    assert finish(fake.start("launch", "recipes/toy/a.yaml"))[0] == 0
    assert fake.paths("a").attempt(1).log_path.read_text().startswith("the fake was told")


def test_devices_of_the_surroundings_are_recorded(
    fake: FakeLauncher, started: list[RunningAttempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    fake.add("a")
    attempt = start(fake, started)
    assert attempt is not None and attempt.attempt.devices == "7"


def test_what_outlives_the_launcher_is_ended(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a", told="leave")
    attempt = start(fake, started)
    assert attempt is not None
    pidfd = os.pidfd_open(fake.next_started()[1])
    assert attempt.finish() is None
    wait_until_dead(pidfd)
    os.close(pidfd)
    assert not is_leased(attempt.paths.lease_path)


def test_a_request_to_stop_names_one_attempt_and_is_gone_with_the_next(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a", told="obey")
    first = start(fake, started)
    assert first is not None
    fake.next_started()
    first.request_stop("enough")
    failure = first.finish()
    assert failure is not None and (failure.kind, failure.message.partition(":")[0]) == (
        "preempted",
        "enough",
    )
    assert load_stop_request(first.paths) == StopRequest(
        attempt=1, why="enough", is_of_its_sweep=True
    )
    fake.tell("a", "complete")
    second = start(fake, started)
    assert second is not None and second.finish() is None
    assert not second.paths.stop_path.exists()


def test_what_is_killed_says_why(fake: FakeLauncher, started: list[RunningAttempt]) -> None:
    fake.add("a", told="hang")
    attempt = start(fake, started)
    assert attempt is not None
    fake.next_started()
    attempt.kill("enough")
    failure = attempt.finish()
    assert failure is not None and (failure.kind, failure.message) == ("preempted", "enough")
    assert load_record(attempt.paths).attempts[0].exit_status == -signal.SIGKILL


def test_a_record_that_cannot_be_closed_is_a_warning(
    fake: FakeLauncher, started: list[RunningAttempt], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("b", told="hang")
    attempt = start(fake, started, "b")
    assert attempt is not None
    fake.next_started()
    attempt.paths.record_path.unlink()
    attempt.paths.record_path.mkdir()
    attempt.kill("enough")
    attempt.finish()
    assert "runs/toy/b/attempts/1 was not recorded" in capsys.readouterr().err
    assert not is_leased(attempt.paths.lease_path)


def test_what_an_attempt_leaves_in_other_sessions_is_ended_with_it(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    """An example is a compiler, or a tracker's daemon, that a rank under torchrun has started."""
    fake.add("a", told="leave elsewhere")
    attempt = start(fake, started)
    assert attempt is not None
    pidfd = os.pidfd_open(fake.next_started()[1])
    assert attempt.finish() is None
    wait_until_dead(pidfd)
    os.close(pidfd)


def test_the_lease_is_free_once_an_attempt_has_finished(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    """A killed process returns its memory first, for which time it has no environment and still its
    files.
    """
    fake.add("a", told="die")
    attempt = start(fake, started)
    assert attempt is not None
    fake.next_started()
    assert attempt.finish() is None
    assert not is_leased(attempt.paths.lease_path)


def test_nobody_waits_for_another_holder_of_the_lease(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    """For example, another sweep acquires it as soon as the attempt releases it."""
    fake.add("a", told="leave unknown")
    attempt = start(fake, started)
    assert attempt is not None
    holder = fake.next_started()[1]
    attempt.process.wait()
    began = time.monotonic()
    assert attempt.finish() is None
    seconds = time.monotonic() - began
    assert is_leased(attempt.paths.lease_path) and seconds < 10, "a third of the longest wait"
    os.kill(holder, signal.SIGKILL)


def test_what_is_left_of_earlier_attempts_is_ended_by_the_next(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a", "aa", told="complete")
    fake.paths("a").run_dir.mkdir(parents=True)
    half_written = fake.paths("a").run_dir / ".samples.json.1-ab.tmp"
    half_written.write_text("{")
    owners = []
    for name in ("a", "aa"):
        fake.paths(name).run_dir.mkdir(parents=True, exist_ok=True)
        fake.paths(name).lease_path.touch()
        owners.append(name_owner(fake.paths(name)))
    # Another container's run of the same path.
    owners.append(f"0.0@{fake.paths('a').run_dir.resolve()}")
    environments = [{**os.environ, OWNER_VARIABLE: f"{owner}:7"} for owner in owners]
    own, *foreign = (
        subprocess.Popen(["sleep", "1000"], env=environment) for environment in environments
    )
    try:
        attempt = start(fake, started)
        assert attempt is not None and attempt.finish() is None
        assert own.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        assert [process.poll() for process in foreign] == [None, None] and not half_written.exists()
    finally:
        for process in (own, *foreign):
            process.kill()
            process.wait()


def test_a_lasting_failure_is_not_called_a_preemption(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a", told="fail data because")
    attempt = start(fake, started)
    assert attempt is not None
    attempt.process.wait()
    attempt.stop_reason = "the sweep was stopped"
    failure = attempt.finish()
    assert failure is not None and (failure.kind, failure.message) == ("data", "because")


def test_a_result_of_another_digest_is_no_success(
    fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a")
    attempt = start(fake, started)
    assert attempt is not None and attempt.finish() is None
    result = load_json(attempt.paths.result_path)
    attempt.paths.result_path.unlink()
    before = attempt.paths.record_path.read_bytes()
    with pytest.raises(RefusedError, match=r"completed it, but result\.json is missing"):
        start(fake, started)
    assert attempt.paths.record_path.read_bytes() == before
    attempt.paths.record_path.unlink()
    fake.tell("a", f"write result.json {json.dumps(result | {'recipe_digest': 'another'})}")
    again = start(fake, started)
    assert again is not None
    failure = again.finish()
    assert failure is not None and failure.kind == "lost"
    status = read_status(read_facts(again.paths), *load_toy(fake)[:2])
    assert status.state == "changed" and "the result has another" in status.why
    with pytest.raises(RefusedError, match="the result has another"):
        start(fake, started)


@pytest.mark.parametrize("name", ["result.json", "attempts/{number}/failure.json"])
@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", '{"kind": "tired", "message": 3}'])
def test_a_damaged_file_of_the_trainer_is_a_failure(
    name: str, text: str, fake: FakeLauncher, started: list[RunningAttempt]
) -> None:
    fake.add("a", told=f"write {name} {text}")
    attempt = start(fake, started)
    assert attempt is not None
    failure = attempt.finish()
    assert failure is not None and failure.kind == "crashed"
    assert name.format(number=1) in failure.message


@pytest.mark.parametrize("name", ["recipe.json", "run.json", "result.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"attempts": [{"number": "one"}], "recipe": {}}',
        "\xff",
        "[" * 100_000,
        "null",
    ],
    ids=["empty", "cut", "list", "types", "bytes", "deep", "null"],
)
def test_a_damaged_record_stops_its_own_run_only(
    name: str, text: str, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", told="exit 1")
    main(["sweep", "recipes/toy"])
    (fake.paths("a").run_dir / name).write_bytes(text.encode("latin-1"))
    fake.tell("b", "complete")
    capsys.readouterr()
    assert main(["launch", "recipes/toy/a.yaml"]) == 2
    stderr = capsys.readouterr().err
    assert "is unreadable: " in stderr and f"runs/toy/a/{name}" in stderr and "--fresh" in stderr
    assert main(["sweep", "recipes/toy"]) == 1
    assert f"refuse  toy/a  unreadable: runs/toy/a/{name}" in capsys.readouterr().out
    for named in ("recipes/toy", "runs"):
        assert main(["status", named]) == 1
        shown = capsys.readouterr()
        assert (
            "toy/b  completed" in shown.out
            and "toy/a  unreadable" in shown.out
            and name in shown.out
        )
        assert "hint: unreadable: `runner launch recipes/toy/a.yaml --fresh`" in shown.err
        assert main(["status", named, "--json"]) == 1
        states = {row["name"]: row["state"] for row in json.loads(capsys.readouterr().out)}
        assert states == {"a": "unreadable", "b": "completed"}
        assert main(["report", named]) == 1
        assert "warning: toy/a is unreadable" in capsys.readouterr().err
    assert fake.started() == ["a", "b", "b"]
    fake.tell("a", "complete")
    assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == 0
    assert main(["status", "recipes/toy"]) == 0


@pytest.mark.parametrize(
    ("attempts", "why"),
    [
        ('[{"number": 0}]', "number"),
        ('[{"number": 1, "started_at_utc": "yesterday"}]', "started_at_utc"),
        ('[{"number": 1, "started_at_utc": "2026-01-01T00:00:00"}]', "zone"),
        ('[{"number": 1, "micro_batch_divisor": 0}]', "micro_batch_divisor"),
    ],
)
def test_attempts_that_cannot_be_are_unreadable(
    attempts: str, why: str, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="exit 1")
    main(["sweep", "recipes/toy"])
    [attempt] = fake.attempts("a")
    write_json_atomic(
        fake.paths("a").record_path, {"attempts": [attempt | one for one in json.loads(attempts)]}
    )
    capsys.readouterr()
    assert main(["status", "recipes/toy"]) == 1
    assert why in capsys.readouterr().out


def test_a_progress_file_that_a_power_loss_cut_off_does_no_harm(fake: FakeLauncher) -> None:
    fake.add("a", told="write attempts/{number}/progress.json ")
    assert main(["sweep", "recipes/toy"]) == 1
    assert main(["status", "recipes/toy"]) == 0


def test_a_launcher_that_cannot_be_started_is_recorded(fake: FakeLauncher) -> None:
    fake.add("a")
    recipe, contents, paths = load_toy(fake)
    command = LaunchCommand(("nowhere/accelerate", "launch"), {})
    with pytest.raises(RunnerError, match="nowhere/accelerate cannot be started"):
        start_attempt(load_launch(fake), command)
    [attempt] = load_record(paths).attempts
    assert (
        attempt.ended_at_utc
        and attempt.failure is not None
        and "cannot be started" in attempt.failure.message
    )
    assert not is_leased(paths.lease_path)
    assert read_status(read_facts(paths), recipe, contents).state == "failed"


def test_the_record_is_opened_before_anything_starts(fake: FakeLauncher) -> None:
    """A launcher that is killed immediately leaves an attempt without an end, which is an
    interrupted run.
    """
    fake.add("a")
    recipe, contents, paths = load_toy(fake)
    lease = take_lease(paths)
    assert lease is not None
    prepare_run(recipe, contents, read_facts(paths))
    attempt = open_attempt(
        load_launch(fake), LaunchCommand(("accelerate",), {}), read_facts(paths), 1, (None, None)
    )
    paths.attempt(attempt.number).log_path.touch()
    lease.close()
    assert read_status(read_facts(paths), recipe, contents).state == "interrupted"


def test_close_attempt_ends_the_last_one_only(fake: FakeLauncher) -> None:
    fake.add("a")
    paths = fake.paths("a")
    for _ in range(2):
        open_attempt(
            load_launch(fake),
            LaunchCommand(("accelerate",), {}),
            read_facts(paths),
            1,
            ("c0ffee", True),
        )
    close_attempt(read_facts(paths), 5, None)
    first, second = load_record(paths).attempts
    assert (first.exit_status, second.exit_status) == (None, 5)
    assert (first.number, second.number, second.git_commit, second.git_is_dirty) == (
        1,
        2,
        "c0ffee",
        True,
    )
