"""Completion as bash asks for it: with the function that `register-python-argcomplete` writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

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
