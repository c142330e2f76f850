"""Engines are found by their files: the options of each, and an engine that is only a new file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.engines import load_engines
from runner.cli.main import main
from tests.conftest import ROOT
from tests.support.fake_launcher import FakeLauncher, fake
from tests.test_imports import list_loaded

__all__ = ["fake"]

NEW_ENGINE = """
from dataclasses import dataclass
import sys

ONLY_WRITES_FILES = False
OPTIONS = {"--greeting": {"default": "hello", "help": "echo: said to each run"}}


@dataclass(frozen=True)
class EchoOptions:
    greeting: str


def parse_options(arguments):
    return EchoOptions(arguments.greeting)


def submit(plan, options):
    for run in plan({}, sys.stderr):
        print(options.greeting, run.full_name)
    return 0
"""
# Runs the command line as if `echo.py` lay in `runner/engines`.
PROGRAM = """
import sys
import runner.engines
runner.engines.__path__.append(sys.argv[1])
from runner.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def run_with_echo(fake: FakeLauncher, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder = fake.home / "more engines"
    folder.mkdir(exist_ok=True)
    (folder / "echo.py").write_text(NEW_ENGINE)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *arguments],
        cwd=fake.root,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_the_engines_that_there_are() -> None:
    engines = load_engines()
    assert {name: engine.ONLY_WRITES_FILES for name, engine in engines.items()} == {
        "local": False,
        "slurm": False,
        "kubernetes": True,
        "skypilot": True,
    }
    assert [*engines] == ["local", "slurm", "kubernetes", "skypilot"], "in the order of `--help`"


def test_a_new_engine_is_one_file(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    words = ("sweep", "recipes/toy", "--engine", "echo", "--greeting", "good morning")
    done = run_with_echo(fake, *words)
    assert (done.returncode, done.stdout) == (0, "good morning toy/a\ngood morning toy/b\n")
    assert "launch  toy/a" in done.stderr and fake.started() == []
    for verb in ("sweep", "rerun"):
        usage = run_with_echo(fake, verb, "--help").stdout
        assert "{echo,local,slurm" in usage and "echo: said to each run" in usage


def test_engines_are_imported_in_a_moment(tmp_path: Path) -> None:
    names = [path.stem for path in (ROOT / "runner" / "engines").glob("[!_]*.py")]
    program = f"import {', '.join(f'runner.engines.{name}' for name in names)}"
    slow = {"pydantic", "yaml", "omegaconf", "jinja2", "rich"}
    assert len(names) > len(load_engines()) and not list_loaded(program, tmp_path) & slow
    usage = "from runner.cli.main import main\ntry: main(['sweep', '--help'])\nexcept SystemExit: 0"
    assert not list_loaded(usage, tmp_path) & slow


@pytest.mark.parametrize(
    "words", [["rerun", "recipes/toy", "--engine", "kubernetes"], ["sweep", "x", "--engine", "pbs"]]
)
def test_an_engine_that_the_verb_does_not_have_is_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "argument --engine: invalid choice" in capsys.readouterr().err
