"""A function of the project runs in its own process, sees nothing of the environment but its
arguments, and is ended by limits; the error names the line.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runner import child
from runner.child import ChildLostError, LimitedChild
from runner.errors import DataError, RefusedError
from runner.functions import FunctionProcess, Metric, UserFunction, read_python_file

WHERE = "data.jsonl line 7"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_source(
    text: str, others: Mapping[str, str] | None = None, **settings: Any
) -> FunctionProcess:
    """The function `build` of a source text, in its own process."""
    return FunctionProcess({"rows.py": text, **(others or {})}, "rows.py", "build", **settings)


def fail(text: str, *arguments: Any, **settings: Any) -> DataError:
    """The error of one call."""
    with open_source(text, **settings) as build, pytest.raises(DataError) as raised:
        build(WHERE, *arguments)
    return raised.value


def test_a_function_gets_and_returns_json() -> None:
    with open_source("def build(row, *more): return [row, more, (1, 2.5, None, 'ü')]") as build:
        assert build(WHERE, {"a": [1, {"b": None}]}, "x") == [
            {"a": [1, {"b": None}]},
            ["x"],
            [1, 2.5, None, "ü"],
        ]


def test_nothing_of_the_environment_reaches_it_but_what_programs_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOME_SETTING"):
        monkeypatch.setenv(name, "not-to-be-seen")
    monkeypatch.setenv("PYTHONHASHSEED", "17")
    with open_source(
        "import os, sys\n"
        "def build(row):\n"
        "    parent = open(f'/proc/{os.getpid()}/environ').read()\n"
        "    return [dict(os.environ), parent, sys.argv, hash('a')]\n"
    ) as build:
        seen = build(WHERE, {})
    assert "not-to-be-seen" not in json.dumps(seen) and "SOME_SETTING" not in seen[0]
    assert seen[0]["PYTHONHASHSEED"] == "0"
    assert set(seen[0]) <= {*child._KEPT_VARIABLES, *child._FIXED_VARIABLES, "LC_CTYPE"}
    with open_source("def build(row): return hash('a')") as build:
        assert build(WHERE, {}) == seen[3], "strings have equal hashes in every process"


def test_what_it_prints_never_comes_between_the_answers(capfd: pytest.CaptureFixture[str]) -> None:
    with open_source(
        "import os, subprocess, sys\n"
        "print('while loading')\n"
        "def build(row):\n"
        "    print('{\"value\": 666}')\n"
        "    os.write(1, b'past Python\\n')\n"
        "    subprocess.run(['echo', 'of a child'])\n"
        "    return sys.stdin.read()\n"
    ) as build:
        assert build(WHERE, {}) == ""
    printed = capfd.readouterr()
    assert printed.out == ""
    for text in ("while loading", '{"value": 666}', "past Python", "of a child"):
        assert text in printed.err


def test_an_exception_names_row_file_and_line() -> None:
    error = fail("import math\n\ndef build(row):\n    x = 1\n    return x / row['n']\n", {"n": 0})
    assert error.message == (
        f"{WHERE}: rows.py line 5, in `build`: ZeroDivisionError: division by zero"
    )
    assert error.hint is not None and "never leaves a row out" in error.hint


def test_the_line_is_that_of_the_projects_own_file_not_of_a_library() -> None:
    error = fail("import json\ndef build(row):\n    return json.loads('{')\n", {})
    assert "rows.py line 3, in `build`: JSONDecodeError" in error.message
    with (
        open_source(
            "from lib.text import wrap\ndef build(row):\n    return wrap(row)\n",
            {"lib/text.py": "def wrap(row):\n    return row['no']\n"},
        ) as build,
        pytest.raises(DataError, match=r"lib/text.py line 2, in `build`: KeyError: 'no'"),
    ):
        build(WHERE, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys\ndef build(row):\n    sys.exit(3)", "rows.py line 3, in `build`: SystemExit"),
        ("import os\ndef build(row):\n    os._exit(3)", "ended its process with exit status 3"),
        (
            "import os, signal\ndef build(row):\n    os.kill(os.getpid(), signal.SIGSEGV)",
            "ended by the signal SIGSEGV",
        ),
        ("def build(row):\n    return {1, 2}", "TypeError: returned a set, which JSON cannot hold"),
        ("def build(row):\n    return '\\ud800'", "UnicodeEncodeError"),
        ("def build(row):\n    return b'x' * (5 << 30)", "rows.py line 2, in `build`: MemoryError"),
        ("def build(row):\n    return build(row)", "rows.py line 2, in `build`: RecursionError"),
        ("def build():\n    return 1", "TypeError: build() takes 0 positional arguments"),
        (
            "import os\ndef build(row):\n    os.close(4); os.write(5, b'no json\\n'); os._exit(0)",
            "in `build`: ",
        ),
    ],
)
def test_whatever_ends_a_call_is_an_error_of_its_row(text: str, words: str) -> None:
    message = fail(text, {}).message
    assert message.startswith(f"{WHERE}: ") and words in message


def test_a_call_that_computes_for_ever_is_ended_by_its_line() -> None:
    error = fail("def build(row):\n    while True:\n        pass\n", {}, cpu_seconds=1)
    assert "rows.py line" in error.message
    assert "used more CPU time than allowed for a call" in error.message


def test_a_call_that_hides_its_limit_is_killed() -> None:
    text = (
        "def build(row):\n    while True:\n        try:\n"
        "            for _ in iter(int, 1): len('x')\n        except BaseException: pass\n"
    )
    assert "exceeded its limit of CPU time" in fail(text, {}, cpu_seconds=1).message


def test_a_call_that_sleeps_for_ever_is_ended_by_its_line() -> None:
    error = fail("import time\ndef build(row):\n    time.sleep(600)\n", {}, wall_seconds=0.2)
    assert "rows.py line 3, in `build`: took longer than allowed for a call" in error.message


def test_a_child_that_stops_listening_is_ended_by_its_parent(here: Path) -> None:
    (here / "deaf.py").write_text(
        "import signal\nfrom runner.child import serve\n"
        "serve(lambda: lambda request: signal.pause())\n"
    )
    os.environ["PYTHONPATH"], before = str(here), os.environ.get("PYTHONPATH", "")
    try:
        with LimitedChild("deaf", wall_seconds=0.5) as deaf:
            with pytest.raises(ChildLostError, match=r"gave no answer within 0.5 s"):
                deaf.ask(1, cpu_seconds=5)
            assert not deaf.is_running
    finally:
        os.environ["PYTHONPATH"] = before


def test_the_next_row_is_answered_after_a_lost_process_and_nothing_stays() -> None:
    text = (
        "import os, subprocess\n"
        "def build(row):\n"
        "    if row == 'die': os._exit(1)\n"
        "    return [os.getpid(), subprocess.Popen(['sleep', '600']).pid]\n"
    )
    with open_source(text) as build:
        first = build(WHERE, "live")
        with pytest.raises(DataError):
            build(WHERE, "die")
        second = build(WHERE, "live")
    for pid in (*first, *second):
        assert _is_gone(pid), "processes of a function end with it"


def _is_gone(pid: int) -> bool:
    """True if a process that was sent SIGKILL ends; the kernel may need a moment for it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 30.0)[0])
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def built(row): pass", "rows.py: defines no function `build`"),
        ("build = 3", "rows.py: defines no function `build`"),
        ("def build(row):\n  return (", "rows.py line 2: SyntaxError: '(' was never closed"),
        ("x = 1\nraise ValueError('no')", "rows.py line 2: ValueError: no"),
        ("import not_there_at_all", "rows.py line 1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(text: str, words: str) -> None:
    with pytest.raises(DataError) as raised, open_source(text):
        pass
    assert words in raised.value.message


def test_files_of_the_project_are_imported_only_by_name(here: Path) -> None:
    """Files on the disk do not count: neither unnamed files nor texts other than those read."""
    (here / "lib").mkdir()
    (here / "lib" / "text.py").write_text("NAME = 'of the disk'")
    (here / "near.py").write_text("NAME = 'beside it'")
    source = "from lib.text import NAME\ndef build(row): return NAME"
    with open_source(source, {"lib/text.py": "NAME = 'as it was read'"}) as build:
        assert build(WHERE, {}) == "as it was read"
    for hint, text in (
        ("name the files of lib/ that it needs in `python_files`", source),
        ("name the file next to the function: python_files: [near.py]", "import near"),
    ):
        with pytest.raises(DataError) as raised, open_source(text):
            pass
        assert raised.value.hint == hint


def test_a_path_of_python_below_the_project_leads_to_no_unnamed_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "lib").mkdir()
    (here / "lib" / "near.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here / "lib"), os.environ["PYTHONPATH"]]))
    with pytest.raises(DataError, match="No module named 'near'"), open_source("import near"):
        pass


def test_a_folder_with_its_own_init_and_a_package_without() -> None:
    others = {"lib/__init__.py": "A = 1", "lib/deep/text.py": "B = 2"}
    source = "import lib\nimport lib.deep.text as t\ndef build(row): return [lib.A, t.B]"
    with open_source(source, others) as build:
        assert build(WHERE, {}) == [1, 2]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("function", "../rows.py:build", "without `.` and `..`"),
        ("function", "/tmp/rows.py:build", "relative to the folder"),
        ("function", "~/rows.py:build", "relative to the folder"),
        ("function", "./rows.py:build", "without `.` and `..`"),
        ("function", "lib//rows.py:build", "relative to the folder"),
        ("function", "lib\\rows.py:build", "relative to the folder"),
        ("function", "rows.py", "a file and a function in it"),
        ("function", "rows.py:a.b", "a file and a function in it"),
        ("function", "rows.txt:build", "ends in .py"),
        ("python_files", ["../text.py"], "without `.` and `..`"),
        ("python_files", ["my-text.py"], "may hold only letters, digits and _"),
        ("python_files", ["json.py"], "would hide Python's module `json`"),
        ("python_files", ["runner/x.py"], "would hide Python's module `runner`"),
    ],
)
def test_paths_stay_in_the_project(key: str, value: Any, words: str) -> None:
    section = {"function": "rows.py:build", key: value}
    with pytest.raises(ValidationError) as raised:
        UserFunction.model_validate_json(json.dumps(section))
    assert words in str(raised.value)


def test_a_link_is_not_read(here: Path) -> None:
    (here / "real.py").write_text("")
    (here / "folder").mkdir()
    (here / "folder" / "rows.py").write_text("")
    (here / "link.py").symlink_to("real.py")
    (here / "linked").symlink_to("folder")
    (here / "tube.py").touch()
    assert read_python_file("folder/rows.py").content == b""
    for path in ("link.py", "linked/rows.py"):
        with pytest.raises(RefusedError, match="is a link to"):
            read_python_file(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_python_file("none.py")
    (here / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_python_file("latin.py")
    (here / "tube.py").unlink()
    os.mkfifo(here / "tube.py")
    with pytest.raises(RefusedError, match="is not a file"):
        read_python_file("tube.py")
    (here / "large.py").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(RefusedError, match="1 MiB"):
        read_python_file("large.py")


def test_a_section_without_its_sources_runs_nothing() -> None:
    section = UserFunction(function="rows.py:build")
    with pytest.raises(RefusedError, match="was not allowed to run"), section.open_function():
        pass


def test_values_that_json_cannot_say_arrive_as_texts_or_are_refused() -> None:
    from datetime import date

    with open_source("def build(row): return row") as build:
        row = {"at": date(2026, 1, 2), "seen": (1, float("inf")), 3: True}
        assert build(WHERE, row) == {"at": "2026-01-02", "seen": [1, float("inf")], "3": True}
        with pytest.raises(DataError, match="holds bytes"):
            build(WHERE, {"image": b"\x89PNG"})


@pytest.fixture
def scored() -> Iterator[Any]:
    metric = Metric(name="given", function="scores.py:score", mode="max").with_sources(
        {
            "scores.py": "import numpy\n"
            "def score(prediction, references, row):\n"
            "    return eval(row['return'])\n"
        }
    )
    with metric.open_score() as score:
        yield lambda text: score("p", ("r",), {"return": text}, WHERE)


def test_a_metric_is_one_finite_number_or_none(scored: Any) -> None:
    for text, value in (
        ("1", 1.0),
        ("-2.5", -2.5),
        ("True", 1.0),
        ("None", None),
        ("numpy.float32(0.5)", 0.5),
        ("float([prediction, references] == ['p', ['r']])", 1.0),
    ):
        assert scored(text) == value, text
    for text in ("float('nan')", "float('inf')", "10**400", "'1'", "[1]", "{}"):
        with pytest.raises(DataError, match="for the metric `given`"):
            scored(text)
