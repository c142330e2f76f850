"""The times after which an attempt counts as hanging; the rest is shown over real processes in
`tests/engines/test_stalls.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runner.launch.stall import (
    MAX_LOOK_SECONDS,
    SILENT_PHASE_SECONDS,
    Silence,
    StallWatch,
    look_at_sign,
)
from runner.processes import is_stopped, writes_stacks
from runner.run.paths import AttemptPaths
from runner.run.record import Progress

LIMIT = 60.0


def look_every_half_second(silence: Silence, seconds: float, sign: object = "a") -> None:
    began = silence.looked_at
    for number in range(1, round(2 * seconds) + 1):
        silence.look(began + number / 2, sign)


def test_only_time_that_was_watched_counts() -> None:
    silence = Silence(LIMIT, looked_at=0.0, sign="a")
    look_every_half_second(silence, LIMIT - 1)
    assert not silence.is_overdue("training")
    silence.look(silence.looked_at + 86_400, "a")
    assert silence.seconds == LIMIT - 1 + MAX_LOOK_SECONDS and silence.is_overdue("training")
    assert silence.look(silence.looked_at + 0.5, "b") and silence.seconds == 0.0
    assert not silence.look(silence.looked_at - 10, "b") and silence.seconds == 0.0


@given(st.lists(st.tuples(st.floats(-1e3, 1e6), st.integers(0, 1)), max_size=50))
def test_silence_is_never_negative_and_never_longer_than_the_clock_says(
    looks: list[tuple[float, int]],
) -> None:
    silence, now, passed = Silence(LIMIT, 0.0, 0), 0.0, 0.0
    for pause, sign in looks:
        now += pause
        passed += max(0.0, pause)
        has_lived = silence.look(now, sign)
        assert 0.0 <= silence.seconds <= min(passed, len(looks) * MAX_LOOK_SECONDS)
        assert not has_lived or silence.seconds == 0.0


def test_what_waits_for_a_compiler_or_a_network_has_hours() -> None:
    silence = Silence(LIMIT, looked_at=0.0, sign="a")
    look_every_half_second(silence, SILENT_PHASE_SECONDS - 1)
    for phase in ("compiling fused_adam", "downloading x/y", "uploading", "waiting for the others"):
        assert not silence.is_overdue(phase)
    assert silence.is_overdue("saving") and silence.is_overdue("")
    look_every_half_second(silence, 1)
    assert silence.is_overdue("compiling fused_adam")
    patient = Silence(2 * SILENT_PHASE_SECONDS, 0.0, "a", seconds=SILENT_PHASE_SECONDS)
    assert not patient.is_overdue("uploading"), "a limit that is longer counts"
    assert not Silence(None, 0.0, "a", seconds=1e9).is_overdue("training")


def test_what_was_continued_gets_a_part_of_the_time_once() -> None:
    silence = Silence(LIMIT, looked_at=0.0, sign="a")
    look_every_half_second(silence, LIMIT + 5)
    assert silence.grant_grace() and not silence.is_overdue("training")
    look_every_half_second(silence, LIMIT / 4 - 0.5)
    assert not silence.is_overdue("training")
    look_every_half_second(silence, 0.5)
    assert silence.is_overdue("training") and not silence.grant_grace()
    silence.look(silence.looked_at + 0.5, "b")
    look_every_half_second(silence, LIMIT, "b")
    assert silence.is_overdue("training") and silence.grant_grace(), "the next time, again"


class Watched:
    """A watch over real processes, with its messages and actions; `pass_time` is its clock."""

    def __init__(self, tmp_path: Path, owner: str) -> None:
        self.files = AttemptPaths(tmp_path)
        self.files.log_path.write_text("")
        self.said: list[str] = []
        self.ended: list[str] = []
        self.now = 0.0
        self.silence = Silence(2.0, 0.0, None)
        self.watch = StallWatch(
            self.files, owner.__eq__, self.said.append, self.ended.append, self.silence
        )

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            self.watch.look(self.now)


def test_a_sign_of_life_while_stacks_are_asked_for_ends_the_asking(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "nobody")
    progress = Progress(phase="evaluating base", step=0, max_steps=8)
    watched.files.progress_path.write_text(progress.model_dump_json())
    watched.pass_time(0.5)
    watched.pass_time(2.0)
    assert watched.said == [
        "no sign of life for 2 s while evaluating base, step 0/8: asking for the stacks of"
        " 0 processes"
    ]
    os.utime(watched.files.progress_path, (1, 1))
    watched.pass_time(1.5)
    assert watched.ended == [] and "the attempt continues" in watched.files.log_path.read_text()
    watched.pass_time(5.0)
    assert len(watched.ended) == 1 and len(watched.said) == 2, "ended once"
    log = watched.files.log_path.read_text().splitlines()
    assert all(line.startswith("runner: ") for line in log if line)


def test_a_log_that_cannot_be_written_saves_nobody(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "nobody")
    watched.files.log_path.unlink()
    watched.files.log_path.mkdir()
    watched.pass_time(5.0)
    assert len(watched.ended) == 1 and "while starting" in watched.ended[0]


def test_only_who_handles_the_signal_is_asked() -> None:
    program = "import sys; print(flush=True); sys.stdin.read()"
    handles = "from runner.processes import write_stacks_on_request as w; w(); "
    for code, answer in ((program, False), (handles + program, True)):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        assert writes_stacks(process.pid) == answer and not is_stopped(process.pid)
        process.communicate()
        assert not writes_stacks(process.pid), "it is gone"


def test_a_sign_is_any_change_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    signs = [look_at_sign(path)]
    path.write_text("a")
    signs.append(look_at_sign(path))
    os.utime(path, (1, 1))
    signs.append(look_at_sign(path))
    (tmp_path / "new").write_text("a")
    os.utime(tmp_path / "new", (1, 1))
    (tmp_path / "new").replace(path)
    signs.append(look_at_sign(path))
    assert len(set(signs)) == 4 and signs[0] is None
