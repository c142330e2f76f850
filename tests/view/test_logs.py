"""`runner logs` during real sweeps: the exact bytes, the right run, and the output to come."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.files import load_json, write_json_atomic
from runner.plan.decide import foresee_retry
from runner.recipe.parse import load_recipe
from runner.run.record import load_record
from tests.support.fake_launcher import BIN_DIR, PATIENCE_SECONDS, FakeLauncher, fake, finish

__all__ = ["fake"]


def print_logs(fake: FakeLauncher, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [str(BIN_DIR / "runner"), "logs", *arguments],
        cwd=fake.root,
        env=fake.environment,
        capture_output=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@contextmanager
def following(fake: FakeLauncher, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = fake.start("logs", "-f", *arguments)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def read_until(stream: object, text: str) -> str:
    """The output of a process until it has printed a text."""
    descriptor, found = stream.fileno(), ""  # type: ignore[attr-defined]
    while text not in found:
        assert select.select([descriptor], [], [], PATIENCE_SECONDS)[0], found
        content = os.read(descriptor, 65536)
        assert content, f"it ended, and printed only: {found}"
        found += content.decode()
    return found


def append(fake: FakeLauncher, name: str, text: str) -> None:
    """Print text as a training process does; the fake's own output follows at its end."""
    with fake.paths(name).attempt(1).log_path.open("a") as stream:
        stream.write(text)


def allow_retries(fake: FakeLauncher, name: str, retries: str) -> None:
    path = fake.root / "recipes" / "toy" / f"{name}.yaml"
    changed, count = re.subn(r"retries: {.*}", f"retries: {retries}", path.read_text())
    assert count == 1
    path.write_text(changed)


def test_the_last_attempt_is_printed_byte_by_byte(fake: FakeLauncher) -> None:
    fake.add("a", told="exit 3")
    assert main(["sweep", "recipes/toy"]) == 1
    assert main(["rerun", "recipes/toy"]) == 1
    content = b"\x1b[31m[bold]red[/bold]\x1b[0m 50%\r100%\n\xff\xfe no UTF-8, no newline"
    fake.paths("a").attempt(2).log_path.write_bytes(content)
    for run in ("recipes/toy/a.yaml", "runs/toy/a", "recipes/toy"):
        done = print_logs(fake, run)
        assert (done.returncode, done.stdout) == (0, content)
        assert done.stderr == b"==> runs/toy/a/attempts/2/log.txt <==\n"
    first = print_logs(fake, "runs/toy/a", "--attempt", "1")
    assert first.stdout == fake.paths("a").attempt(1).log_path.read_bytes()
    assert first.stdout.startswith(b"the fake was told to exit 3\nrunner: attempt 1 ended, lost: ")
    assert b"attempts/1/log.txt" in first.stderr


def test_attempts_go_by_their_numbers(fake: FakeLauncher) -> None:
    fake.add("a", told="exit 3")
    assert main(["sweep", "recipes/toy"]) == 1
    assert main(["rerun", "recipes/toy"]) == 1
    paths = fake.paths("a")
    record = load_json(paths.record_path)
    record["attempts"][1]["number"] = 4  # as if a user has removed two
    write_json_atomic(paths.record_path, record)
    paths.attempt(2).attempt_dir.rename(paths.attempt(4).attempt_dir)
    assert b"attempts/4/log.txt" in print_logs(fake, "runs/toy/a").stderr
    followed = print_logs(fake, "runs/toy/a", "--attempt", "1", "--follow").stderr.decode()
    assert re.findall(r"attempts/(\d)/log.txt", followed) == ["1", "4"]
    refused = print_logs(fake, "runs/toy/a", "--attempt", "2")
    assert refused.returncode == 2
    assert b"toy/a has 2 attempts; there is no attempt 2" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["recipes/toy/new.yaml"],
            ["toy/new has no attempt yet", "hint: runner launch recipes/toy/new.yaml"],
        ),
        (["runs/toy/a", "--attempt", "2"], ["toy/a has 1 attempt; there is no attempt 2"]),
        (
            ["recipes/toy"],
            [
                "3 runs match and none of them are running",
                "hint: runner logs runs/toy/a",
                "runs/toy/b",
            ],
        ),
        (["recipes/other"], ["no recipe, run or grid is named"]),
    ],
)
def test_what_cannot_be_printed_is_told(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    fake.add("a", "b")
    assert main(["sweep", "recipes/toy"]) == 0
    fake.add("new")
    capsys.readouterr()
    assert main(["logs", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_a_run_that_was_prepared_by_hand_has_no_log(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main(["launch", "recipes/toy/a.yaml", "--prepare"]) == 0
    assert main(["logs", "runs/toy/a"]) == 2
    assert "attempt 1 of toy/a has no log" in capsys.readouterr().err


def test_of_a_folder_the_one_that_runs_is_meant(fake: FakeLauncher) -> None:
    fake.add("a", "c")
    fake.add("b", "d", told="wait")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "1")
    assert fake.next_started()[0] == "b"
    append(fake, "b", "step 1")
    done = print_logs(fake, "recipes/toy")
    assert (done.returncode, done.stdout) == (0, b"step 1")
    assert b"runs/toy/b/" in done.stderr
    other = fake.start("launch", "recipes/toy/d.yaml")
    assert fake.next_started()[0] == "d"
    both = print_logs(fake, "recipes/toy")
    assert both.returncode == 2
    assert (
        b"2 of them are running" in both.stderr
        and b"runs/toy/d" in both.stderr
        and b"runs/toy/a" not in both.stderr
    )
    for name, process in (("d", other), ("b", sweep)):
        fake.let_go(name)
        assert finish(process)[0] == 0


def test_following_prints_what_comes_and_ends_with_the_run(fake: FakeLauncher) -> None:
    fake.add("a", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    with following(fake, "recipes/toy") as logs:
        for text in ("first [b]", "second \x1b[2K"):
            append(fake, "a", text)
            assert read_until(logs.stdout, text).endswith(text), "also without a newline"
        append(fake, "a", "x" * 300_000)
        fake.let_go("a")
        code, stdout, stderr = finish(logs)
        assert code == 0 and stdout.endswith("x" * 300_000 + "the fake was told to wait \n")
        assert stderr.splitlines() == [
            "==> runs/toy/a/attempts/1/log.txt <==",
            "==> the run is completed <==",
        ]
    assert finish(sweep)[0] == 0


def test_following_moves_on_to_the_next_attempt(fake: FakeLauncher) -> None:
    fake.add("a", told="wait")  # makes the pipe
    fake.tell("a", "fail transient the network\nthen wait")
    allow_retries(fake, "a", "{transient: 1, lost: 0, backoff_seconds: 0.5}")
    sweep = fake.start("sweep", "recipes/toy")
    assert [fake.next_started()[0]] == ["a"], "the second attempt"
    with following(fake, "runs/toy/a", "--attempt", "1") as logs:
        told = read_until(logs.stderr, "attempts/2/log.txt <==")
        assert told.startswith("==> runs/toy/a/attempts/1/log.txt <==")
        fake.let_go("a")
        code, stdout, _ = finish(logs)
        assert code == 0 and stdout.count("the fake was told to") == 2
    assert finish(sweep)[0] == 0


def test_following_says_that_another_attempt_is_due(fake: FakeLauncher) -> None:
    fake.add("a", told="fail transient the network")
    allow_retries(fake, "a", "{transient: 1, lost: 0, backoff_seconds: 600}")
    sweep = fake.start("sweep", "recipes/toy")
    read_until(sweep.stderr, "retry 1 of 1")
    with following(fake, "runs/toy/a") as logs:
        told = read_until(logs.stderr, "Ctrl-C quits")
        assert (
            "attempt 1 ended, transient: the network; retry 1 of 1 in 600 s, if its sweep is still"
            " running; Ctrl-C quits" in told
        )
        logs.send_signal(signal.SIGINT)
        assert finish(logs)[0] == 0
    sweep.send_signal(signal.SIGINT)
    assert finish(sweep)[0] in (1, 130)


@pytest.mark.parametrize(
    ("told", "last_line"),
    [
        ("fail data no rows", "==> attempt 1 ended, data: no rows <=="),
        (
            "exit 3",
            "==> attempt 1 ended, lost: the training process died (exit status 3)"
            " without an error message <==",
        ),
    ],
)
def test_following_ends_where_nothing_is_tried_again(
    fake: FakeLauncher, told: str, last_line: str
) -> None:
    fake.add("a", told=told)
    assert main(["sweep", "recipes/toy"]) == 1
    code, stdout, stderr = finish(fake.start("logs", "--follow", "runs/toy/a"))
    assert (code, stderr.splitlines()[-1]) == (0, last_line)
    assert stdout.startswith("the fake was told to")


def test_ctrl_c_is_the_usual_way_to_leave(fake: FakeLauncher) -> None:
    fake.add("a", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    with following(fake, "runs/toy/a") as logs:
        append(fake, "a", "step 1")
        read_until(logs.stdout, "step 1")
        logs.send_signal(signal.SIGINT)
        code, _, stderr = finish(logs)
        assert code == 0 and "Traceback" not in stderr
    fake.let_go("a")
    assert finish(sweep)[0] == 0


def test_a_reader_that_leaves_is_no_error(fake: FakeLauncher) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy"]) == 0
    fake.paths("a").attempt(1).log_path.write_bytes(b"line\n" * 100_000)
    done = subprocess.run(
        ["bash", "-c", "runner logs runs/toy/a | head -1"], cwd=fake.root, env=fake.environment,
        capture_output=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.stdout == b"line\n" and b"Traceback" not in done.stderr


def test_a_retry_is_foreseen_from_the_record_alone(fake: FakeLauncher) -> None:
    fake.add("a", told="fail transient x\nthen fail transient y\nthen complete")
    allow_retries(fake, "a", "{transient: 1, lost: 0, backoff_seconds: 0.01}")
    assert main(["sweep", "recipes/toy"]) == 1
    recipe = load_recipe(Path("recipes/toy/a.yaml"))
    attempts = load_record(fake.paths("a")).attempts
    assert [attempt.retry for attempt in attempts] == [0, 1]
    first, second = (foresee_retry(recipe, attempts[:number]) for number in (1, 2))
    assert first is not None and first.number == 1 and "retry 1 of 1" in first.why
    assert second is None, "the budget is used up"
    assert foresee_retry(recipe, ()) is None
    killed = attempts[0].model_copy(update={"failure": None, "ended_at_utc": None})
    assert foresee_retry(recipe, (killed,)) is None
