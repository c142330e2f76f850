"""Odd objects under the name of a file that a verb reads: the verb names the file in its error,
does not wait for it, and reads no more than such a file can hold.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from runner.files import MAX_RECORD_BYTES
from tests.conftest import RECIPE_TEXT
from tests.run.test_hostile_records import INTERRUPTED, put
from tests.test_fuzz import Place, make_run, place

__all__ = ["place"]

FILES: Final = (
    "recipe.json",
    "run.json",
    "lease",
    "ranks",
    "stop",
    "result.json",
    "samples.json",
    "metrics.jsonl",
    "eval_rows.jsonl",
    "predictions.jsonl",
    "tracking.json",
    "push.json",
    "attempts/1/log.txt",
    "attempts/1/launcher",
    "attempts/1/logs.txt",
    "attempts/1/progress.json",
    "attempts/1/failure.json",
    "attempts/1/timing.json",
    "attempts/1/base.json",
    "attempts/1/uploads.jsonl",
    "checkpoints/step-4/COMMITTED.json",
    "checkpoints/.uploads/step-4.zip",
    "../../.content_hashes.json",
    "../../.recipes.json",
    "../../.allowed_code.json",
    "../../.slurm/a/submission.json",
)
FOLDERS: Final = (
    "attempts",
    "attempts/1",
    "checkpoints",
    "checkpoints/step-4",
    "checkpoints/.uploads",
    "quarantine",
    "model",
    ".",
    "..",
    "../../.base",
    "../../.rows",
    "../../.slurm",
)
Make = Callable[[Path], Any]
# Odd objects in place of a file; all but the first also in place of a folder.
KINDS: Final[dict[str, Make]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
CONTENTS: Final = {
    "empty": b"",
    "too deep": b"[" * 100_000 + b"\n",
    "not UTF-8": b"\xff\xfe{}\n",
    "NUL bytes": b"\0" * 5000 + b"\n",
    "digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "beyond numbers": b'{"step": 1e999, "num_steps": NaN, "attempts": [{"number": 1e999}]}\n',
    "a number": b"5\n",
    "a text": b'"text"\n',
    "lists": b"[[1], null]\n",
}
SHORT: Final = (("status", "case.yaml", "--json"), ("why", "case.yaml"))
VERBS: Final = (
    *SHORT,
    ("status", "runs"),
    ("sweep", "case.yaml", "--dry-run"),
    ("launch", "case.yaml", "--dry-run"),
    ("report", "case.yaml"),
    ("logs", "case.yaml"),
    ("stop", "case.yaml"),
    ("compare", "case.yaml", "other.yaml"),
    ("clean", "--dry-run"),
)


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Ends a test that waits for a pipe."""

    def end(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def lay(run: Path, name: str, make: Make, *, has_result: bool) -> Path:
    """Put something in the place of a file or folder of a run that has its `result.json` or not."""
    path = Path(os.path.normpath(run / name))
    if not has_result and name != "result.json":
        INTERRUPTED(run)
    if name.endswith("uploads.jsonl"):  # read where something is pending
        (run / "checkpoints/.uploads").mkdir()
        (run / "checkpoints/.uploads/step-4.zip").write_text("")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    return path


def answer(place: Place, *arguments: str) -> str:
    printed = place.run(*arguments)
    assert "[Errno" not in printed, printed
    return printed


def write_recipes(place: Place) -> None:
    place.write("case.yaml", RECIPE_TEXT)
    place.write("other.yaml", RECIPE_TEXT.replace("name: base", "name: other"))


def take_away(place: Place) -> None:
    runs = place.root / "runs"
    runs.unlink() if runs.is_symlink() or runs.is_file() else shutil.rmtree(runs, True)


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_answered_in_words(
    place: Place, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_recipes(place)
    names = FILES if kind == "a folder" else (*FILES, *FOLDERS)
    for number, name in enumerate(names):
        lay(make_run(place), name, KINDS[kind], has_result=number % 2 == 0)
        for arguments in VERBS if kind == "a pipe" else (VERBS[number % len(VERBS)], *SHORT):
            answer(place, *arguments)
    take_away(place)


def test_a_file_in_the_place_of_a_folder_is_answered_in_words(place: Place) -> None:
    write_recipes(place)
    for name in FOLDERS:
        for has_result in (True, False):
            lay(make_run(place), name, Path.touch, has_result=has_result)
            for arguments in VERBS:
                answer(place, *arguments)
    take_away(place)


@pytest.mark.parametrize("content", CONTENTS)
def test_odd_contents_are_answered_in_words(place: Place, content: str) -> None:
    write_recipes(place)
    for number, name in enumerate(FILES):
        run = make_run(place)
        lay(run, name, lambda path: path.write_bytes(CONTENTS[content]), has_result=number % 2 == 0)
        for arguments in (*SHORT, VERBS[number % len(VERBS)]):
            answer(place, *arguments)


def test_what_is_too_long_is_not_read(place: Place) -> None:
    write_recipes(place)

    def make(path: Path) -> None:
        with path.open("wb") as stream:
            stream.truncate(40 << 20)

    for name in ("recipe.json", "run.json", "result.json", "attempts/1/failure.json"):
        lay(make_run(place), name, make, has_result=name == "recipe.json")
        printed = answer(place, "status", "runs")
        what = "has 40.0 MiB and was not read: the limit for this file is 32.0 MiB"
        assert f"{name} {what}" in printed
    assert MAX_RECORD_BYTES == 32 << 20
    for name in FILES:
        lay(make_run(place), name, make, has_result=False)
        for arguments in SHORT:
            answer(place, *arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lease", ("status", "runs")),
        ("ranks", ("status", "runs")),
        ("run.json", ("status", "runs")),
        ("run.json", ("sweep", "case.yaml", "--dry-run")),
        ("recipe.json", ("status", "runs")),
        ("recipe.json", ("launch", "case.yaml", "--prepare")),
        ("result.json", ("why", "case.yaml")),
        ("samples.json", ("compare", "case.yaml", "other.yaml")),
        ("attempts/1/failure.json", ("status", "case.yaml")),
        ("attempts/1/uploads.jsonl", ("status", "case.yaml")),
        ("attempts/1/log.txt", ("logs", "case.yaml")),
        ("checkpoints/step-4/COMMITTED.json", ("why", "case.yaml")),
        ("lease", ("launch", "case.yaml", "--prepare")),
        ("stop", ("launch", "case.yaml", "--prepare")),
    ],
)
@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_the_file_is_named_and_what_it_is(
    place: Place, name: str, arguments: tuple[str, ...], kind: str
) -> None:
    if name == "stop" and kind == "a pipe":
        return  # removed as a request to stop an earlier attempt is
    write_recipes(place)
    run = make_run(place)
    lay(run, name, KINDS[kind], has_result=name == "samples.json")
    assert f"{name} is {kind}, and should be a file" in answer(place, *arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["run.json", "recipe.json", "result.json"])
def test_what_may_not_be_read_is_named_without_a_number(place: Place, name: str) -> None:
    write_recipes(place)
    path = make_run(place) / name
    path.chmod(0)
    assert f"{name}: permission denied" in answer(place, "status", "runs")
    path.chmod(0o644)


def test_a_clock_that_was_set_back_gives_no_negative_seconds(place: Place) -> None:
    write_recipes(place)
    put("run.json", "attempts.0.ended_at_utc", "2025-12-31T23:59:00+01:00")(make_run(place))
    printed = answer(place, "status", "case.yaml")
    assert "attempt 1: its end is recorded before its start (the clock was set back)" in printed
    assert "-" not in printed.partition("attempt 1")[0].replace("tests/base", "")
    (state,) = json.loads(answer(place, "status", "case.yaml", "--json"))
    assert state["seconds"] is None and state["set_back_attempts"] == [1]
    for arguments in (("power", "runs", "--effect", "0.1"), ("report", "runs"), *VERBS):
        assert " -6" not in answer(place, *arguments)
    put("run.json", "attempts.0.ended_at_utc", "2026-01-01T01:01:00+01:00")(make_run(place))
    (state,) = json.loads(answer(place, "status", "case.yaml", "--json"))
    assert state["seconds"] == 60.0 and state["set_back_attempts"] == []


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 2, "error: standard output is closed, so nothing can be shown"),
        ("<&- >&- 2>&-", 2, ""),
        ("2>&- <&-", 0, "tests/base"),
        (">/dev/full", 2, "error: no space left on device (standard output, or a file"),
    ],
)
def test_closed_and_full_outputs(place: Place, redirect: str, code: int, said: str) -> None:
    write_recipes(place)
    make_run(place)
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m runner status case.yaml {redirect}'],
        capture_output=True,
        text=True,
        check=False,
        cwd=place.root,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == code and said in printed and "Traceback" not in printed, printed
    assert "[Errno" not in printed and "Exception ignored" not in printed
