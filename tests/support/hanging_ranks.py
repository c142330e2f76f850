"""Ranks of a real attempt that hang or are stopped, and the watch over them; shared by the slow
tests.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from runner.launch.attempt import RunningAttempt, start_attempt
from runner.launch.command import Placement, build_launch_command
from runner.launch.stall import Silence, StallWatch, look_at_sign
from runner.plan.decide import Launch
from runner.plan.select import Selected
from runner.processes import find_processes_of
from runner.recipe.contents import ContentHashes, hash_contents
from runner.run.record import load_progress
from tests.conftest import Project, build_environment
from tests.support.training_runs import DEADLINE_SECONDS

# Runs inside training: one rank never returns from a file operation, so the others wait for it in
# their next collective.
_HANGER: Final = """\
import os, sys, time

def never_comes_back():
    while True:
        time.sleep(1000)

def _hook(name, arguments):
    if name == "os.mkdir" and str(arguments[0]).endswith(os.environ["HANG_AT"]):
        if os.environ.get("RANK") == "1" and "runner.sft" in sys.orig_argv:
            never_comes_back()

sys.addaudithook(_hook)
"""


def start_hanging(
    project: Project, name: str, *overrides: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> RunningAttempt:
    """Start an attempt of two ranks in this process; the second one hangs when it makes the folder
    `at`.
    """
    hook_dir = project.root / "hanger"
    hook_dir.mkdir(exist_ok=True)
    (hook_dir / "sitecustomize.py").write_text(_HANGER)
    path = f"{hook_dir}:{os.environ.get('PYTHONPATH', '')}"
    for key, value in build_environment({"HANG_AT": at, "PYTHONPATH": path}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(project.root)
    recipe = project.recipe(*overrides, f"run.name={name}")
    selected = Selected(recipe, Path("recipe.yaml"), project.paths(name))
    contents = hash_contents(recipe, ContentHashes(project.root / "none.json"))
    command = build_launch_command(
        recipe, selected.paths.run_dir, Placement(2), path=os.environ["PATH"]
    )
    attempt = start_attempt(Launch(selected, contents, 2), command)
    assert attempt is not None
    return attempt


class Watched:
    """The watch over an attempt, as in a sweep, from a moment that the test chooses."""

    def __init__(self, attempt: RunningAttempt, limit_seconds: float) -> None:
        self.said: list[str] = []
        sign = look_at_sign(attempt.files.progress_path)
        silence = Silence(limit_seconds, time.monotonic(), sign)
        self._watch = StallWatch(
            attempt.files, attempt.owner.__eq__, self.said.append, attempt.kill_stalled, silence
        )
        self._attempt = attempt

    def look_until_it_ends(self) -> None:
        """Look twice a second until the attempt is ended."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._attempt.stall is None:
            assert time.monotonic() < deadline, self.said
            self._watch.look(time.monotonic())
            time.sleep(0.2)


def wait_for_phase(attempt: RunningAttempt, *phases: str) -> None:
    """Wait until the training process reports one of these phases."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (progress := load_progress(attempt.files.progress_path)) is None or (
        progress.phase not in phases
    ):
        assert time.monotonic() < deadline, attempt.files.log_path.read_text()
        time.sleep(0.005)


def find_rank(attempt: RunningAttempt, rank: int) -> int:
    """The process id of a rank."""
    for pid in find_processes_of(attempt.owner.__eq__):
        with suppress(OSError):  # one of its helpers has ended meanwhile
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in entries:
                return pid
    raise AssertionError(f"there is no rank {rank}")
