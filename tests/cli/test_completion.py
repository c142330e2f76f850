"""Completion as shells ask for it: with the function that `register-python-argcomplete` writes."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.cli.view_arguments import REPORT_FORMATS
from runner.report.format import FORMATS
from tests.conftest import ROOT
from tests.support.scored_runs import scored_grid

_ASK = """
eval "$(register-python-argcomplete runner)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
_python_argcomplete runner "${1##* }" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's recipes, a run that is not among them, and `runner` on the PATH."""
    (tmp_path / "recipe_templates/demo").mkdir(parents=True)
    (tmp_path / "recipe_templates/demo/grid.yaml").touch()
    shutil.copytree(ROOT / "recipes/demo", tmp_path / "recipes/demo")
    run_dir = tmp_path / "runs/old/gemma_long"
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    script = tmp_path / "bin" / "runner"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m runner "$@"\n')
    script.chmod(0o755)
    places = (script.parent, Path(sys.executable).parent, os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, places)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(line: str) -> list[str]:
    """The words that bash offers after `line`."""
    shown = subprocess.run(
        ["bash", "-c", _ASK, "bash", line], check=True, capture_output=True, text=True
    )
    return sorted(shown.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("runner sta", ["status"]),
        ("runner sweep --fai", ["--fail-fast"]),
        ("runner report demo --format ", ["csv", "json", "md", "tex"]),
        ("runner render ", ["demo", "old"]),
        ("runner status recipes/", ["recipes/demo/"]),
        ("runner why gemma_l", ["gemma_long"]),
        ("runner why old/", ["old/gemma_long"]),
        ("runner sweep demo --where lo", ["loss="]),
        ("runner sweep demo --where loss=", ["completion", "full"]),
        ("runner sweep demo --where seed=1,", ["1,2", "1,3"]),
        ("runner sweep demo training.learning_r", ["training.learning_rate="]),
        ("runner sweep demo loss=comp", ["completion"]),
        ("runner recipe training.learning_r", ["training.learning_rate"]),
        ("runner compare loss=full loss=completion --grid demo --axis lo", ["loss"]),
        ("runner init new --from glue", ["glue_squad"]),
        ("runner nonsense --wh", []),
        ("runner sweep demo nothing.like.th", []),
    ],
)
def test_words_that_bash_offers(project: Path, line: str, offered: list[str]) -> None:
    assert ask(line) == offered


def read_documented(shell: str) -> str:
    """The lines of docs/installation.md for the start-up file of a shell."""
    page = (ROOT / "docs/installation.md").read_text()
    [block] = [one for one in page.split("```bash\n") if f"# {shell} (" in one]
    lines = block.partition("```")[0].splitlines()
    return "\n".join(line for line in lines if shell == "zsh" or f"# {shell} (" in line)


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_offers_words_as_documented(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    script = read_documented("fish") + "\ncomplete --do-complete 'runner why gemma_l'"
    shown = subprocess.run(
        ["fish", "--no-config", "-c", script], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["gemma_long"], shown.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_offers_words_as_documented(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Tab on a terminal: zsh completes only there."""
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.setenv("ZDOTDIR", str(project))
    monkeypatch.setenv("TERM", "dumb")
    (project / ".zshrc").write_text("unsetopt zle_bracketed_paste\n" + read_documented("zsh"))
    process, terminal = pty.fork()
    if process == 0:
        os.execvp("zsh", ["zsh", "-d", "-i"])
    shown = b""
    try:
        os.write(terminal, b"echo rea''dy\n")
        for typed, expected in ((b"runner why gemma_l\t", b"ready"), (b"", b"gemma_long")):
            deadline = time.monotonic() + 60
            while expected not in shown.replace(b"\r", b""):
                assert time.monotonic() < deadline, shown
                if select.select([terminal], [], [], 1)[0]:
                    shown += os.read(terminal, 4096)
            os.write(terminal, typed)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)
    assert b"not found" not in shown, shown


def test_runs_of_another_output_root_are_offered(project: Path) -> None:
    (project / "runs").rename(project / "notes/scratch")
    assert ask("runner status --output-root notes/scratch gemma_l") == ["gemma_long"]
    assert ask("runner status gemma_l") == []


def test_a_damaged_run_hides_no_axis_of_the_others(project: Path) -> None:
    shutil.rmtree(project / "recipes")
    cells: dict[str, list[Any]] = {"model": ["gemma", "llama"], "tf32": [None, True]}
    scored_grid(project / "runs", cells, lambda **_: 1.0)
    (project / "runs/demo/gemma_None_s1/recipe.json").write_text("{")
    assert ask("runner report demo --where mod") == ["model="]
    assert ask("runner report runs/demo --where mod") == ["model="]
    assert ask("runner report --where tf32=") == ["null", "true"]


def test_completion_writes_nothing_and_prints_nothing_else(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(folder: Path) -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}

    empty = tmp_path_factory.mktemp("no_project")
    for folder in (project, empty):
        monkeypatch.chdir(folder)
        before = look(folder)
        for line in ("runner sweep demo --where lo", "runner status de", "runner recipe tr"):
            shown = subprocess.run(
                ["bash", "-c", _ASK, "bash", line], check=True, capture_output=True, text=True
            )
            assert shown.stderr == ""
        assert look(folder) == before


@pytest.mark.parametrize("line", ["runner report demo --form", "runner status recipes/"])
def test_completion_imports_nothing_heavy(project: Path, line: str) -> None:
    """A user waits for it after each Tab."""
    environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    script = (
        "import os, sys\n"
        "sys.path.insert(0, os.environ['PYTHONPATH'])\n"
        "leave = os._exit\n"
        "heavy = {'torch', 'scipy', 'numpy', 'pydantic', 'omegaconf', 'matplotlib'}\n"
        "os._exit = lambda code: (print(heavy & set(sys.modules), flush=True), leave(code))\n"
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 8), os.dup2(8, 9)\n"
        "from runner.cli.main import main\n"
        "main([])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "set()\n"


def test_global_completion_finds_the_mark() -> None:
    """Argcomplete reads the first 1,024 bytes of the module of a console script."""
    assert b"PYTHON_ARGCOMPLETE_OK" in (ROOT / "runner/cli/main.py").read_bytes()[:1024]


def test_formats_of_the_parser_are_those_of_the_report() -> None:
    assert list(FORMATS) == list(REPORT_FORMATS)


def test_names_are_those_of_the_project_above(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "notes")
    assert ask("runner status ../recipes/d") == ["../recipes/demo/"]
    assert ask("runner sweep demo --where los") == ["loss="]
    assert ask("runner why gemma_060_full_seed1") == ["gemma_060_full_seed1"]


def test_a_broken_recipe_offers_no_axes_and_prints_nothing(project: Path) -> None:
    next((project / "recipes/demo").iterdir()).write_text("a: [")
    assert ask("runner sweep demo --where ") == []
