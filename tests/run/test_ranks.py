"""Two locks: ranks end with their launcher wherever they run, and a run with a living rank is
nobody else's.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.launch.run_files import take_lease
from runner.run.lease import has_ranks, hold_launcher_lock, wait_for_ranks
from runner.run.paths import RunPaths
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher, fake, finish

__all__ = ["fake"]

RANK = """\
import signal, sys
from pathlib import Path
from runner.run.paths import RunPaths
from runner.run.lease import join_attempt

lease = join_attempt(RunPaths(Path(sys.argv[1])), int(sys.argv[2]))
print("joined", flush=True)
signal.pause()
"""
LAUNCHER = """\
import signal, sys
from pathlib import Path
from runner.run.paths import RunPaths
from runner.run.lease import hold_launcher_lock

lock = hold_launcher_lock(RunPaths(Path(sys.argv[1])).attempt(1))
print("holds", flush=True)
signal.pause()
"""


@contextmanager
def rank(paths: RunPaths, number: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A process that joins an attempt; what is left of it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(paths.run_dir), str(number)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], PATIENCE_SECONDS)[0]
    return process.stdout.readline()


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "runs" / "toy" / "one")


def test_ranks_end_when_the_launcher_lets_go_and_the_run_is_taken_until_then(
    paths: RunPaths,
) -> None:
    assert not has_ranks(paths)
    launcher = hold_launcher_lock(paths.attempt(1))
    with rank(paths) as one, rank(paths) as other:
        assert [read_line(one), read_line(other)] == ["joined\n"] * 2
        assert has_ranks(paths) and take_lease(paths) is None
        launcher.close()
        wait_for_ranks(paths, PATIENCE_SECONDS)
        assert [one.wait(PATIENCE_SECONDS), other.wait(PATIENCE_SECONDS)] == [-signal.SIGKILL] * 2
    assert not has_ranks(paths)
    lease = take_lease(paths)
    assert lease is not None
    lease.close()


def test_ranks_end_with_a_launcher_that_is_killed(paths: RunPaths) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(paths.run_dir)], stdout=subprocess.PIPE, text=True
    )
    assert read_line(launcher) == "holds\n"
    with rank(paths) as one:
        assert read_line(one) == "joined\n"
        launcher.kill()
        launcher.communicate()
        assert one.wait(PATIENCE_SECONDS) == -signal.SIGKILL


def test_a_rank_that_comes_late_touches_nothing(paths: RunPaths) -> None:
    hold_launcher_lock(paths.attempt(1)).close()
    newer = hold_launcher_lock(paths.attempt(2))
    with rank(paths) as late:
        stdout, stderr = late.communicate(timeout=PATIENCE_SECONDS)
    newer.close()
    assert (late.returncode, stdout) == (1, "")
    assert "`runner launch` has ended, or this file system does not share locks" in stderr
    assert sorted(
        str(path.relative_to(paths.run_dir)) for path in paths.run_dir.rglob("*") if path.is_file()
    ) == [
        *("attempts/1/launcher", "attempts/2/launcher", "ranks"),
    ]


def test_a_run_with_a_living_rank_is_running(fake: FakeLauncher) -> None:
    fake.add("one")
    fake.tell("one", "exit 1")
    assert finish(fake.start("launch", "recipes/toy/one.yaml"))[0] != 0
    paths = fake.paths("one")
    launcher = hold_launcher_lock(paths.attempt(1))
    with rank(paths) as one:
        assert read_line(one) == "joined\n"
        assert " running " in finish(fake.start("status", "recipes/toy"))[1]
        assert "running" in finish(fake.start("launch", "recipes/toy/one.yaml"))[1]
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
    launcher.close()
    assert " running " not in finish(fake.start("status", "recipes/toy"))[1]
    assert len(fake.attempts("one")) == 1
