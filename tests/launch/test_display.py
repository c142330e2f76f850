"""The lines of a sweep that writes to no terminal: one when something changes, and none by the
clock but after ten minutes.
"""

from __future__ import annotations

import pytest

from runner.files import write_json_atomic
from runner.launch.display import SweepDisplay
from runner.run.paths import AttemptPaths
from tests.support.fake_launcher import FakeLauncher, fake, finish

__all__ = ["fake"]


def test_a_sweep_without_a_terminal_writes_a_line_when_something_changes(
    fake: FakeLauncher,
) -> None:
    fake.add("a", told="phase training live 32")  # for more than six seconds
    fake.add("b", told="fail data because")
    code, _, stderr = finish(fake.start("sweep", "recipes/toy"))
    assert code == 1
    assert stderr.splitlines() == [
        "[0/2] toy/a  starts, attempt 1",
        "[0/2] toy/a  training",
        "[1/2] toy/a  completed",
        "[1/2] toy/b  starts, attempt 1",
        "[2/2] toy/b  data: because",
        "",
        "toy/b failed, data: because",
        "  log: runs/toy/b/attempts/1/log.txt",
        "2 runs: 1 completed, 1 failed",
    ]


def test_phases_that_come_again_and_again_make_one_line(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (fake.paths("a").attempt(number) for number in (1, 2))
    with SweepDisplay(1) as display:
        display.started("toy/a", 1)
        show(display, first, "importing libraries")
        for step in range(0, 40, 8):
            show(display, first, "waiting for the other processes", 0)
            show(display, first, "training", step)
            show(display, first, "evaluating", step)
            show(display, first, "saving", step)
        display.started("toy/a", 2)
        show(display, second, "downloading step 8 from s3://b/c")
        show(display, second, "training", 9)
    assert capsys.readouterr().err.splitlines() == [
        "[0/1] toy/a  starts, attempt 1",
        "[0/1] toy/a  waiting for the other processes, step 0/46",
        "[0/1] toy/a  training, step 0/46",
        "[0/1] toy/a  starts, attempt 2",
        "[0/1] toy/a  downloading step 8 from s3://b/c",
        "[0/1] toy/a  training, step 9/46",
    ]


def show(display: SweepDisplay, files: AttemptPaths, phase: str, step: int | None = None) -> None:
    files.attempt_dir.mkdir(parents=True, exist_ok=True)
    known = {} if step is None else {"step": step, "max_steps": 46}
    write_json_atomic(files.progress_path, {"phase": phase, **known})
    display.update({"toy/a": files}, {}, {"toy/a": 0.0})


def test_after_a_long_time_without_a_line_one_says_what_runs(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    files = fake.paths("a").attempt(1)
    with SweepDisplay(3, quiet_seconds=0.0) as display:
        show(display, files, "training", 5)
        display.update({"toy/a": files}, {"toy/b": "is run by another sweep"}, {"toy/a": 0.0})
    assert capsys.readouterr().err.splitlines()[-1] == (
        "[0/3] still running: toy/a training step 5/46; toy/b is run by another sweep"
    )
