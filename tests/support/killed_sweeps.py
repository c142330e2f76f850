"""Sweeps that are killed at random moments and started again until they are done, and tables of the
kills.
"""

from __future__ import annotations

import datetime
import os
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from runner.processes import OWNER_VARIABLE
from runner.run.entries import find_entry, list_stored
from runner.run.lease import is_leased
from runner.run.paths import RunPaths, base_entries_dir, marker_path
from runner.run.record import load_progress, load_record
from runner.run.result import load_result
from tests.conftest import RUNNER, Project, build_environment
from tests.support.training_runs import (
    DEATH_SECONDS,
    assert_same_outputs,
    open_descendants,
    read_attempts,
    snapshot,
)

Victim = Literal["everything", "sweep", "launcher", "worker", "trainer"]

# A sweep with cold starts has no workers.
VICTIMS: Final[dict[str, tuple[Victim, ...]]] = {
    "warm": ("everything", "sweep", "launcher", "worker", "trainer"),
    "cold": ("everything", "sweep", "launcher", "trainer"),
}

# In the environment of a sweep and so of all its descendants, no matter which parent they have.
_TAG: Final = "SWEEP_UNDER_KILLS"
_SWEEP_SECONDS: Final = 900.0
_LOOK_SECONDS: Final = 0.05  # between two searches for the process to kill


@dataclass(frozen=True)
class Run:
    """One run of a killed sweep, and the same run of an undisturbed sweep."""

    recipe_path: Path
    paths: RunPaths
    reference: RunPaths

    @property
    def name(self) -> str:
        return self.paths.run_dir.name


@dataclass(frozen=True)
class Kill:
    """One kill: its time, its victims, and the state of each run (run name -> description, number
    of attempts).
    """

    seconds: float  # after the sweep was started
    victim: Victim
    killed: str  # the number of processes of each role
    stood: dict[str, tuple[str, int]]


@dataclass
class KilledSweep:
    """One sweep with its own output root, from its first start to its end."""

    project: Project
    output_root: Path
    runs: Sequence[Run]
    is_cold: bool = False
    kills: list[Kill] = field(default_factory=list)
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_checked: bool = False
    _finished: dict[str, dict[str, tuple[int, bytes]]] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[bytes]:
        """Start `runner sweep` with two slots; its output goes to a file next to its runs."""
        command = [RUNNER, "sweep", *(run.recipe_path for run in self.runs), "--slots", "2"]
        command += ["--cold"] if self.is_cold else []
        with self.printed_path.open("ab") as printed:
            return subprocess.Popen(
                [*map(str, command), "--output-root", str(self.output_root)],
                cwd=self.project.root,
                env=build_environment({_TAG: self.tag}),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
            )

    @property
    def printed_path(self) -> Path:
        return self.output_root.with_suffix(".printed")

    def kill(
        self, sweep: subprocess.Popen[bytes], victim: Victim, seconds: float, chance: random.Random
    ) -> None:
        """Send SIGKILL to some or all processes of the sweep; wait until those that must follow are
        gone.
        """
        roles = {pid: name_role(pid) for pid in list_tagged(self.tag)} | {sweep.pid: "sweep"}
        doomed = sorted(roles)
        if victim != "everything":
            doomed = [pid for pid in doomed if roles[pid] == victim]
            doomed = [chance.choice(doomed)] if doomed else []
        names = [roles[pid] for pid in doomed]
        pidfds = [pidfd for pid in doomed if (pidfd := _open_pidfd(pid)) is not None]
        followers = [pidfd for pid in doomed for pidfd in open_descendants(pid)]
        # Opened before the first is killed: none can take another with it and free its number.
        for pidfd in pidfds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in [*pidfds, *followers]:
            assert select.select([pidfd], [], [], DEATH_SECONDS)[0], (
                f"a process outlived the kill of {victim}"
            )
            os.close(pidfd)
        if victim in ("everything", "sweep"):
            sweep.wait()
            assert_nothing_alive(self.tag)
        killed = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        stood = {run.name: describe(run.paths) for run in self.runs}
        self.kills.append(Kill(seconds, victim, killed or "no process", stood))

    def note_finished(self) -> None:
        """Remember the complete and undisturbed runs, whose files must not change from now on."""
        for run in self.runs:
            # Otherwise its log still grows.
            is_over = run.paths.result_path.exists() and not is_leased(run.paths.lease_path)
            if run.name not in self._finished and is_over:
                self._finished[run.name] = snapshot_finished(run.paths)

    def move(self) -> None:
        """Copy the runs, contents only, and continue with the copy: the next sweep knows only what
        the files say.
        """
        aside = self.output_root.with_suffix(".moved")
        self.output_root.rename(aside)
        shutil.copytree(aside, self.output_root, symlinks=True, copy_function=shutil.copyfile)
        shutil.rmtree(aside)
        self._finished.clear()  # files of other times; their contents are compared in the end
        self.note_finished()

    def check(self) -> None:
        """Assert that each run completed once, as in an undisturbed sweep, and that nothing is
        lost, duplicated, mixed up or still running.
        """
        assert_nothing_alive(self.tag)
        grids = {run.paths.run_dir.parent for run in self.runs}
        for grid_dir in grids:
            expected = {run.name for run in self.runs if run.paths.run_dir.parent == grid_dir}
            assert {path.name for path in grid_dir.iterdir()} == expected
        others = {path.name for path in self.output_root.iterdir()} - {path.name for path in grids}
        assert others <= {".base", ".content_hashes.json"}, others
        for stored in list_stored(base_entries_dir(self.output_root)):
            assert find_entry(stored.path) is not None, (
                f"{stored.path} is incomplete, or was moved aside"
            )
        for run in self.runs:
            assert_same_outputs(run.paths, run.reference)
            assert_completed_once(run.paths)
            assert_only_unfinished_in_quarantine(run.paths)
            same_files = {path.name for path in run.paths.run_dir.iterdir()} ^ {
                path.name for path in run.reference.run_dir.iterdir()
            }
            # Another test may have pushed the run that all tests share.
            pushed = {path.name for path in run.reference.run_dir.glob("push*")}
            left = same_files - {run.paths.quarantine_dir.name} - pushed
            assert not left, f"{run.name}: {left}"
        for run in self.runs:
            if run.name in self._finished:
                assert snapshot_finished(run.paths) == self._finished[run.name], (
                    f"{run.name} was touched again"
                )
        self.check_starts()
        self.is_checked = True

    def check_starts(self) -> None:
        """Assert that attempts started warm or cold as intended. A sweep that falls back on cold
        starts without a reason would test no workers; the reason is a worker that was killed before
        it had imported everything.
        """
        num_warm, num_cold = self.count_starts()
        if self.is_cold:
            assert num_warm == 0
            return
        num_workers_killed = sum(kill.victim in ("launcher", "worker") for kill in self.kills)
        num_given_up = self.printed_path.read_text().count("runs start cold, because no worker")
        assert num_given_up <= num_workers_killed, self.printed_path.read_text()
        assert num_cold == 0 or num_given_up > 0, (num_warm, num_cold)

    def count_starts(self) -> tuple[int, int]:
        """Numbers of attempts that were started warm and cold."""
        started = [
            attempt.started for run in self.runs for attempt in load_record(run.paths).attempts
        ]
        return started.count("warm"), started.count("cold")

    def render_kills(self, first_number: int = 1) -> list[str]:
        """One line per kill: the state of each run and, after the arrow, the step from which its
        next attempt resumed.
        """
        lines = []
        for number, kill in enumerate(self.kills, first_number):
            stood = "  ".join(
                f"{self._render_stood(run, *kill.stood[run.name]):<25}" for run in self.runs
            )
            lines.append(
                f"{number:>4}  {kill.seconds:>7.2f} s  {kill.killed:<40}  {stood}".rstrip()
            )
        return lines

    def summarize(self) -> str:
        """One line about the time after the last start; `check` has tested the rest."""
        num_warm, num_cold = self.count_starts()
        results = sum(run.paths.result_path.exists() for run in self.runs)
        aside = sum(len(list(run.paths.quarantine_dir.glob("*"))) for run in self.runs)
        verdict = (
            "each once, every output bit-identical" if self.is_checked else "NOT AS LEFT ALONE"
        )
        return (
            f"{self.output_root.name}: {len(self.kills)} kills, {num_warm} attempts started warm,"
            f" {num_cold} cold, {results} of {len(self.runs)} runs completed, {aside} unfinished"
            f" checkpoints set aside: {verdict}"
        )

    def _render_stood(self, run: Run, words: str, num_attempts: int) -> str:
        if words in ("pending", "completed"):
            return words
        following = run.paths.attempt(num_attempts + 1).log_path
        text = following.read_text(errors="replace") if following.exists() else ""
        found = re.search(r"resuming from (step \d+)|starting at (step 0)", text)
        return f"{words} > {(found[1] or found[2]) if found else '-'}"


def sweep_under_kills(
    sweep: KilledSweep,
    victims: Sequence[Victim],
    spread: float,
    chance: random.Random,
    *,
    moves: bool = False,
) -> None:
    """Start the sweep again until it is done, with at most as many kills as there are victims, and
    `check` it.

    The moments of the kills are drawn evenly between the start and `spread` times the duration of
    an undisturbed attempt on this machine under its current load. If the victim does not exist at
    its moment, a new moment is drawn once it does.
    """
    typical_seconds = find_typical_seconds([run.reference for run in sweep.runs])
    process, is_killed = sweep.start(), False
    try:
        while True:
            left, seconds = victims[len(sweep.kills) :], chance.uniform(0, spread * typical_seconds)
            if left and not _has_ended(process, seconds):
                if wait_for_role(sweep.tag, left[0], process):
                    seconds = chance.uniform(0, typical_seconds)
                    _has_ended(process, seconds)
                is_killed = left[0] in ("everything", "sweep")
                sweep.kill(process, left[0], seconds, chance)
                sweep.note_finished()
            elif not left and not _has_ended(process, _SWEEP_SECONDS):
                raise AssertionError(f"the sweep does not end:\n{sweep.printed_path.read_text()}")
            if process.poll() is None:
                continue  # a process below it was killed: the sweep continues with the other runs
            if process.returncode == 0:
                break
            # A sweep that lost a training process says so, and names the command to run; a killed
            # one says nothing.
            expected = -signal.SIGKILL if is_killed else 1
            assert process.returncode == expected, sweep.printed_path.read_text()
            if moves and len(sweep.kills) % 3 == 0:
                sweep.move()
            process, is_killed = sweep.start(), False
    finally:
        for pid in list_tagged(sweep.tag):  # only after a failure
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    sweep.check()


def wait_for_role(tag: str, victim: Victim, sweep: subprocess.Popen[bytes]) -> bool:
    """Wait until there is such a process or the sweep has ended; True if there was none at first.

    A worker is killed only while a run trains: without workers, the sweep would continue cold.
    """
    has_waited, wanted = False, {victim, "trainer"} if victim == "worker" else {victim}
    while victim not in ("everything", "sweep"):
        if wanted <= {name_role(pid) for pid in list_tagged(tag)}:
            break
        has_waited = True
        if _has_ended(sweep, _LOOK_SECONDS):
            break
    return has_waited


def find_typical_seconds(references: Sequence[RunPaths]) -> float:
    """Median seconds of an attempt from start to end."""
    clock = datetime.datetime.fromisoformat
    seconds = [
        (clock(attempt["ended_at_utc"]) - clock(attempt["started_at_utc"])).total_seconds()
        for reference in references
        for attempt in read_attempts(reference)
    ]
    return statistics.median(seconds)


def list_tagged(tag: str) -> dict[int, list[str]]:
    """`process id -> argv` of every living process that was started with the tag, no matter which
    parent it has now.
    """
    needle, found = f"{_TAG}={tag}".encode(), {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    argv = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[int(folder.name)] = argv
    return found


def name_role(pid: int) -> str:
    """Role of a process below a sweep: `launcher` (of an attempt or of a worker), `worker`,
    `trainer` or `other`; empty once it is gone. A forked training process has the command line of
    its worker, but another owner.
    """
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    if any(Path(word).name == "accelerate" for word in argv[:3]):
        return "launcher"
    is_worker = any(one.startswith(f"{OWNER_VARIABLE}=worker of ".encode()) for one in environment)
    if "runner.sft.worker" in argv:
        return "worker" if is_worker else "trainer"
    return "trainer" if "runner.sft" in argv else "other"


def assert_nothing_alive(tag: str) -> None:
    """Wait until every process of a sweep is gone; nobody signals them any more.

    Looks again until it finds none: one may have been started just before its parent died.
    """
    deadline = time.monotonic() + DEATH_SECONDS
    while alive := list_tagged(tag):
        for pid, argv in alive.items():
            pidfd = _open_pidfd(pid)
            if pidfd is not None:
                left = max(0.0, deadline - time.monotonic())
                assert select.select([pidfd], [], [], left)[0], f"{pid} lives on: {' '.join(argv)}"
                os.close(pidfd)


def assert_completed_once(paths: RunPaths) -> None:
    """Assert that attempts are numbered without a gap, and that only the last one completed the
    run.
    """
    attempts = read_attempts(paths)
    assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    folders = sorted(int(path.name) for path in paths.attempts_dir.iterdir())
    assert folders == [attempt["number"] for attempt in attempts]
    *earlier, last = attempts
    for attempt in earlier:
        assert attempt["ended_at_utc"] is None or attempt["failure"] is not None, (
            "two attempts ended with a result"
        )
    assert last["failure"] is None
    said = [n for n in folders if "\ncompleted at step " in _read_text(paths.attempt(n).log_path)]
    assert said in ([], [len(attempts)]), "an attempt other than the last completed it"


def assert_only_unfinished_in_quarantine(paths: RunPaths) -> None:
    """Assert that no committed checkpoint was moved aside, since none was damaged."""
    for folder in paths.quarantine_dir.glob("*"):
        assert re.fullmatch(r"(checkpoint|step)-\d+\.\d+", folder.name), folder
        assert not marker_path(folder).exists(), f"{folder} was committed"


def snapshot_finished(paths: RunPaths) -> dict[str, tuple[int, bytes]]:
    """The files of a complete run that must not change again: all but the record, whose attempt may
    still be closed.
    """
    found = {Path(name): state for name, state in snapshot(paths.run_dir).items()}
    return {
        str(path): state
        for path, state in found.items()
        if path not in (paths.record_path, paths.lease_path)
    }


def describe(paths: RunPaths) -> tuple[str, int]:
    """State of a run on disk, such as a word and a step, and its number of attempts."""
    attempts = load_record(paths).attempts
    num_attempts = len(attempts)
    if load_result(paths) is not None:
        return "completed", num_attempts
    if num_attempts == 0:
        return "pending", 0
    progress = load_progress(paths.attempt(attempts[-1].number).progress_path)
    if progress is None:
        return "starting", num_attempts
    return f"{progress.phase} {progress.step}", num_attempts


def choose_seed() -> int:
    """`KILL_SEED`, or a new seed each time."""
    return int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
        return True
    return False


def _open_pidfd(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.pidfd_open(pid)
    return None


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
