"""`runner status --watch` on a real terminal, during a real sweep, and its output without a
terminal.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from runner.cli.main import main
from runner.view.progress import ASCII, UNICODE
from runner.view.watch import choose_glyphs
from tests.support.fake_launcher import BIN_DIR, PATIENCE_SECONDS, FakeLauncher, fake, finish

__all__ = ["fake"]

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
CONTROLS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Terminal:
    """A pseudo-terminal with a process in its foreground, and all that it wrote."""

    master: int
    process: subprocess.Popen[bytes]
    written: bytes = b""

    def screen(self) -> str:
        """The last drawn screen, from the top left corner on."""
        return CONTROLS.sub(b"", self.written.rpartition(b"\x1b[H")[2]).decode(errors="replace")

    def read_until(self, is_seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_seen():
            assert self._read(deadline - time.monotonic()), f"not seen:\n{self.screen()}"

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            content = os.read(self.master, 65536)
        except OSError:  # a terminal reports in this way that no process has it open
            return False
        self.written += content
        return bool(content)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextmanager
def on_terminal(fake: FakeLauncher, *arguments: str) -> Iterator[tuple[Terminal, int]]:
    """`runner ARGUMENTS` on a terminal of 100 x 30, and our own descriptor of the terminal's other
    end.
    """
    master, slave = pty.openpty()
    environment = {
        name: value
        for name, value in fake.environment.items()
        if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        [str(BIN_DIR / "runner"), *arguments],
        cwd=fake.root,
        env={**environment, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        yield Terminal(master, process), slave
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)
        os.close(slave)


def test_it_follows_a_sweep_and_leaves_the_terminal_as_it_was(fake: FakeLauncher) -> None:
    fake.add("a", "b", told="wait")
    fake.add("ccc", told="fail data the rows are gone")
    with on_terminal(fake, "status", "--watch", "recipes/toy") as (terminal, slave):
        before = termios.tcgetattr(slave)
        terminal.read_until(lambda: "· pending 3" in terminal.screen())
        sweep = fake.start("sweep", "recipes/toy")
        assert fake.next_started()[0] == "a"
        terminal.read_until(
            lambda: "▶ running 1" in terminal.screen() and "▶ a" in terminal.screen()
        )
        fake.let_go("a")
        assert fake.next_started()[0] == "b"
        terminal.read_until(
            lambda: "✓ completed 1" in terminal.screen() and "▶ b" in terminal.screen()
        )
        fake.let_go("b")
        assert finish(sweep)[0] == 1
        terminal.read_until(lambda: "✗ ccc  data: the rows are gone" in terminal.screen())
        os.write(terminal.master, b"\x03")
        terminal.read_until(
            lambda: (
                LEAVE in terminal.written and "nothing left to do" in after(terminal.written, LEAVE)
            )
        )
        assert terminal.process.wait(PATIENCE_SECONDS) == 0
        assert termios.tcgetattr(slave) == before
        assert terminal.written.count(ENTER) == terminal.written.count(LEAVE) == 1
        assert terminal.written.rindex(SHOW_CURSOR) > terminal.written.rindex(HIDE_CURSOR)
        assert "✓ completed 2" in after(terminal.written, LEAVE), (
            "the last state stays on the screen"
        )
        assert "Traceback" not in terminal.screen()


def after(written: bytes, mark: bytes) -> str:
    """The text written after the last mark; empty if there is none."""
    return (
        CONTROLS.sub(b"", written.rpartition(mark)[2]).decode(errors="replace")
        if mark in written
        else ""
    )


def test_it_ends_by_itself_when_every_run_is_completed(fake: FakeLauncher) -> None:
    fake.add("a", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    with on_terminal(fake, "status", "--watch", "recipes/toy") as (terminal, _):
        terminal.read_until(lambda: "▶ running 1" in terminal.screen())
        fake.let_go("a")
        assert finish(sweep)[0] == 0
        terminal.read_until(lambda: LEAVE in terminal.written)
        assert terminal.process.wait(PATIENCE_SECONDS) == 0


def test_it_fills_the_terminal_and_follows_its_size(fake: FakeLauncher) -> None:
    fake.add(*(f"run-{number:02}" for number in range(40)))
    with on_terminal(fake, "status", "--watch", "recipes/toy") as (terminal, _):
        terminal.read_until(
            lambda: "pending 40" in terminal.screen() and terminal.screen().count("\n") == 29
        )
        terminal.resize(60, 12)
        # Of the larger screen, too, so many lines may have arrived.
        terminal.read_until(
            lambda: (
                terminal.screen().count("\n") == 11
                and all(len(line) <= 60 for line in terminal.screen().splitlines())
            )
        )
        terminal.process.send_signal(signal.SIGTERM)
        terminal.read_until(lambda: LEAVE in terminal.written and SHOW_CURSOR in terminal.written)
        assert terminal.process.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(fake: FakeLauncher) -> None:
    fake.add("a")
    with on_terminal(fake, "status", "--watch", "recipes/toy") as (terminal, _):
        terminal.read_until(lambda: "pending 1" in terminal.screen())
        os.write(terminal.master, b"\x1a")
        terminal.read_until(lambda: LEAVE in terminal.written)
        pid, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
        assert pid == terminal.process.pid and os.WIFSTOPPED(status)
        terminal.process.send_signal(signal.SIGCONT)
        terminal.read_until(lambda: terminal.written.count(ENTER) == 2)
        os.write(terminal.master, b"\x03")
        terminal.read_until(lambda: terminal.written.count(LEAVE) == 2)
        assert terminal.process.wait(PATIENCE_SECONDS) == 0


def test_without_a_terminal_it_prints_one_snapshot(
    fake: FakeLauncher, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "bb")
    before = fake.tree()
    done = fake.start("status", "--watch", "recipes/toy")
    code, stdout, stderr = finish(done)
    assert (code, stderr) == (0, "")
    assert "toy: 2 runs" in stdout and "· pending 2" in stdout
    assert "\x1b" not in stdout and max(map(len, stdout.splitlines())) <= 200
    assert fake.tree() == before, "it writes nothing"


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_is_no_terminal_whatever_the_environment_says(
    fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    fake.add("a")
    code, stdout, _ = finish(fake.start("status", "--watch", "recipes/toy"))
    assert code == 0 and ENTER.decode() not in stdout


def test_nothing_to_watch_prints_nothing(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--watch"]) == 0
    assert capsys.readouterr().out == ""


def test_an_output_that_has_no_such_symbols_gets_plain_ones() -> None:
    assert choose_glyphs("utf-8") is choose_glyphs("UTF8") is UNICODE
    assert choose_glyphs("iso8859-1") is choose_glyphs("ascii") is ASCII
