"""No secret stays in a log, from whichever process it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.secrets import scrub_log

CANARY = "canary-0123456789"
PRINTING = """
import logging, os, sys, threading, warnings
from runner.secrets import scrub_output
scrub_output()
secret = os.environ["MY_API_KEY"]
print("print", secret, flush=True)
print("stderr", {"key": secret}, file=sys.stderr)
logging.basicConfig(); logging.getLogger("x").warning("logged %s", secret)
warnings.warn(f"warned {secret}")
thread = threading.Thread(target=lambda: 1 / int(secret)); thread.start(); thread.join()
os.write(1, f"past Python: {secret}\\n".encode())
print("\\ud800 half a character")
raise RuntimeError(f"401 for https://me:{secret}@host")
"""


def test_what_a_process_prints_is_scrubbed_and_the_rest_when_it_is_over(tmp_path: Path) -> None:
    log_path = tmp_path / "log.txt"
    with log_path.open("wb") as log:
        environment = {**os.environ, "MY_API_KEY": CANARY}
        done = subprocess.run(
            [sys.executable, "-c", PRINTING], stdout=log, stderr=log, env=environment, check=False
        )
    assert done.returncode == 1
    text = log_path.read_text()
    assert [line for line in text.splitlines() if CANARY in line] == [f"past Python: {CANARY}"]
    for words in (
        "print ***",
        "stderr {",
        "logged ***",
        "warned ***",
        "ValueError",
        "\\ud800 half",
        "401 for https",
    ):
        assert words in text, words


def test_a_finished_log_loses_its_secrets_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    path = tmp_path / "log.txt"
    path.write_bytes(b"\xff one\r\n" + CANARY.encode() + b"\n" + b"x" * 100 + b"\ntwo \x1b[0m")
    assert scrub_log(path)
    assert path.read_bytes() == b"\xff one\r\n***\n" + b"x" * 100 + b"\ntwo \x1b[0m"
    before = path.stat()
    assert not scrub_log(path) and path.stat().st_ino == before.st_ino, (
        "a clean log is not written again"
    )
    assert not scrub_log(tmp_path / "none.txt") and os.listdir(tmp_path) == ["log.txt"]


def test_a_secret_on_the_edge_of_a_piece_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    path = tmp_path / "log.txt"
    around = "y" * 63 + "\n"
    # A piece ends eight characters into the secret.
    start = around * (8 * 2**20 // 64 - 1) + "y" * 56
    path.write_text(f"{start}{CANARY}\n{around}")
    assert scrub_log(path) and path.read_text() == f"{start}***\n{around}"
