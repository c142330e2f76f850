"""Attempts that show no sign of life, over real processes: continued, asked for their stacks,
ended, tried again; and those that only look like it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from runner.cli.main import main
from runner.processes import find_processes_of
from runner.run.record import EXIT_CODES
from tests.support.fake_launcher import BIN_DIR, FakeLauncher, fake, finish

__all__ = ["fake"]

AT_ONCE = "stalled: 1, backoff_seconds: 0"
LIMIT = 0.7  # seconds


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    while text not in (line := process.stderr.readline()):
        assert line, f"it ended without saying {text!r}"
    return line


def test_what_hangs_is_ended_with_its_stacks_and_tried_again(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add(
        "a",
        told="stepped committed stall twice\nthen complete",
        retries=AT_ONCE,
        stall_seconds=3 * LIMIT,  # the second attempt starts cold, which takes a part of it
    )
    assert main(["sweep", "recipes/toy"]) == 0
    first, second = fake.attempts("a")
    assert (first["failure"]["kind"], second["failure"]) == ("stalled", None)
    assert (first["started"], second["started"]) == ("warm", "cold")
    assert (second["retry"], second["resume"]) == (1, "auto"), "from the newest checkpoint"
    assert re.fullmatch(
        r"no sign of life for \d s while training, step 1/2; the stacks of 2 processes are in the"
        r" log",
        first["failure"]["message"],
    )
    log = fake.paths("a").attempt(1).log_path.read_text()
    parts = re.split(r"runner: stacks of rank (\d), process [^:]*:", log)
    stacks = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert "never_ends" in stacks["0"] and "in_a_collective" in stacks["1"]
    assert "in_a_collective" not in stacks["0"], "each under its own heading"
    stderr = capsys.readouterr().err
    assert (
        "toy/a  no sign of life for" in stderr and "asking for the stacks of 2 processes" in stderr
    )
    assert "toy/a  stalled: no sign of life" in stderr and "retry 1 of 1 right away" in stderr
    assert find_processes_of(lambda owner: str(fake.root) in owner) == []


def test_a_hang_before_the_first_sign_fails_when_its_budget_is_spent(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="stall", retries="stalled: 0", stall_seconds=LIMIT)
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES["stalled"] == 14
    stderr = capsys.readouterr().err
    assert "toy/a failed, stalled: no sign of life" in stderr and "while starting" in stderr
    assert main(["status", "recipes/toy"]) == 0
    shown = capsys.readouterr()
    assert "failed" in shown.out and "stalled: no sign of life" in shown.out
    assert "hint: stalled: the stacks in the log show what hung" in shown.err


def test_a_process_that_cannot_answer_is_not_asked(fake: FakeLauncher) -> None:
    """It would die of the signal, before the attempt's failure is known."""
    fake.add("a", told="hang", retries="stalled: 0", stall_seconds=LIMIT)
    assert main(["launch", "recipes/toy/a.yaml"]) == EXIT_CODES["stalled"]
    [attempt] = fake.attempts("a")
    assert attempt["exit_status"] == -signal.SIGKILL
    assert "the stacks of 0 processes" in attempt["failure"]["message"]


def test_what_was_stopped_is_continued(fake: FakeLauncher) -> None:
    fake.add("a", told="wait", stall_seconds=LIMIT)
    sweep = fake.start("sweep", "recipes/toy")
    _, pid = fake.next_started()
    os.kill(pid, signal.SIGSTOP)
    line = read_until(sweep, "was stopped; continued")
    assert line.startswith("toy/a  no sign of life for") and f"process {pid}" in line
    fake.let_go("a")
    assert finish(sweep)[0] == 0
    assert [one["failure"] for one in fake.attempts("a")] == [None]
    log = fake.paths("a").attempt(1).log_path.read_text()
    assert "runner: no sign of life" in log and "stacks" not in log


def test_what_is_slow_is_no_hang(fake: FakeLauncher) -> None:
    """Each slow run takes longer than the hanging one, which is ended."""
    fake.add("a", told="stall", retries="stalled: 0", stall_seconds=LIMIT)
    fake.add("b", told="phase evaluating live 15", stall_seconds=LIMIT)
    fake.add("c", told="phase compiling wait", stall_seconds=LIMIT)
    fake.add("d", told="wait", stall_seconds=None)
    os.mkfifo(fake.home / "go" / "c")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "4")
    lines = [read_until(sweep, "/4] toy/")]
    while "[2/4]" not in lines[-1]:
        lines.append(read_until(sweep, "/4] toy/"))
    assert any("toy/a  stalled" in line for line in lines)
    for name in "cd":
        fake.let_go(name)
    assert finish(sweep)[0] == 1
    kinds = [one["failure"] and one["failure"]["kind"] for n in "abcd" for one in fake.attempts(n)]
    assert kinds == ["stalled", None, None, None]


def test_a_watcher_that_was_stopped_has_watched_nobody(fake: FakeLauncher) -> None:
    """The watcher is stopped for longer than the limit, as the hanging run shows."""
    limit = 2.5
    fake.add("a", "c", told="wait", stall_seconds=limit)
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    fake.next_started(), fake.next_started()
    os.kill(sweep.pid, signal.SIGSTOP)
    fake.add("b", told="stall", retries="stalled: 0", stall_seconds=limit)
    assert main(["launch", "recipes/toy/b.yaml"]) == EXIT_CODES["stalled"]
    fake.let_go("c")
    os.kill(sweep.pid, signal.SIGCONT)
    read_until(sweep, "toy/c  completed")  # and then it looks at the other one
    fake.let_go("a")
    assert finish(sweep)[0] == 0
    assert "no sign of life" not in fake.paths("a").attempt(1).log_path.read_text()
    assert [one["failure"] for one in fake.attempts("a")] == [None]


def test_a_run_that_was_asked_to_leave_and_hangs_is_not_tried_again(fake: FakeLauncher) -> None:
    fake.add("a", told="stall\nthen complete", retries=AT_ONCE, stall_seconds=LIMIT)
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    sweep.send_signal(signal.SIGINT)
    assert finish(sweep)[0] == 130
    assert [one["failure"]["kind"] for one in fake.attempts("a")] == ["stalled"]


@pytest.mark.parametrize("stated", ["0", "-1", "soon", "true", ".inf", ".nan"])
def test_a_limit_that_is_none_is_refused(stated: str, fake: FakeLauncher) -> None:
    fake.add("a")
    arguments = ["launch", "recipes/toy/a.yaml", f"launch.stall_minutes={stated}"]
    result = subprocess.run(
        [sys.executable, str(BIN_DIR / "runner"), *arguments],
        cwd=fake.root,
        env=fake.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and "launch.stall_minutes" in result.stderr
    assert fake.started() == []
