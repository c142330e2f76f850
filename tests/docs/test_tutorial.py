"""docs/tutorial.md, run from the first command to the last; and the five commands of the README.

The words behind the opening backticks of a block say what is expected. `bash` ends with 0, and
`bash exit=N` with N. `bash interrupted` gets a Ctrl-C when its first run trains. `text` quotes
lines of the output of the block before it; `text similar` does so too, but numbers may differ.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from runner.demo.models import build_demo_models
from tests.conftest import ROOT, RUNNER, build_environment
from tests.docs.documents import DOCS, Block, find_blocks

TUTORIAL = DOCS / "tutorial.md"


class Shell:
    """A shell that stays in the folder where the last block left it."""

    def __init__(self, root: Path) -> None:
        self.cwd = root
        self._place_path = root / "place"
        path = f"{RUNNER.parent}:{os.environ['PATH']}"
        self.environment: Mapping[str, str] = build_environment({"PATH": path, "COLUMNS": "120"})

    def run(self, text: str) -> tuple[int, str]:
        """The exit code of a block, which ends at the first command that fails, and its output."""
        script = f"trap 'pwd > {self._place_path}' EXIT\n{text}"
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        self.cwd = Path(self._place_path.read_text().strip())
        return done.returncode, done.stdout

    def interrupt(self, text: str) -> tuple[int, str]:
        """The same for one command that gets a Ctrl-C when a run has begun to train."""
        log_path = self._place_path.with_name("interrupted.log")
        with log_path.open("w") as log:
            sweep = subprocess.Popen(
                ["bash", "-c", f"exec {text}"],
                cwd=self.cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            deadline = time.monotonic() + 600
            while sweep.poll() is None and time.monotonic() < deadline:
                if list(self.cwd.glob("runs/*/*/checkpoints/*/COMMITTED.json")):
                    break
                time.sleep(0.05)
            sweep.send_signal(signal.SIGINT)
            code = sweep.wait(timeout=600)
        return code, log_path.read_text()


def find_absent(quoted: str, printed: str) -> list[str]:
    """The quoted lines that are not printed in this order."""
    lines = iter([line.rstrip() for line in printed.splitlines()])
    return [line for line in quoted.splitlines() if line.rstrip() not in lines]


def hide_numbers(text: str) -> str:
    """The text with N for each number, in one line: numbers move where lines are broken."""
    return " ".join(re.sub(r"[-+]?\d[\d.,]*\d|\d", "N", text).split())


def play(shell: Shell, blocks: list[Block]) -> None:
    """Run the blocks of a page and compare their output with the quotes of the page."""
    printed = ""
    for block in blocks:
        kind, *words = block.info.split()
        if kind == "text":
            if "similar" in words:
                assert hide_numbers(block.text) in hide_numbers(printed)
            else:
                absent = find_absent(block.text, printed)
                assert not absent, f"{absent}\nnot in\n{printed}"
        elif kind == "bash":
            run = shell.interrupt if "interrupted" in words else shell.run
            expected = 130 if "interrupted" in words else 0
            expected = next((int(one[5:]) for one in words if one.startswith("exit=")), expected)
            code, printed = run(block.text)
            assert code == expected, f"{block.text}\n{printed}"


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base models: those that `make demo` has left, else built here."""
    if (ROOT / "demo_models").is_dir():
        return ROOT / "demo_models"
    models_dir = tmp_path_factory.mktemp("models") / "demo_models"
    build_demo_models(models_dir)
    return models_dir


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path, demo_models: Path) -> None:
    blocks = find_blocks(TUTORIAL.read_text(encoding="utf-8"))
    start = next(number for number, one in enumerate(blocks) if "demo-models" in one.text)
    shell = Shell(tmp_path)
    play(shell, blocks[:start])
    shutil.copytree(demo_models, shell.cwd / "demo_models")  # `runner demo-models` finds them built
    play(shell, blocks[start:])


def test_the_five_commands_of_the_readme_take_any_columns(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """All but training, with a tiny model in place of the demo's, on the rows that it shows."""
    blocks = find_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    [sample] = [one.text for one in blocks if one.text.startswith("opened,")]
    head, *rows = sample.splitlines()
    more = [row.replace(",", f",{number}: ", 1) for number in range(20) for row in rows]
    (tmp_path / "tickets.csv").write_text("\n".join([head, *more]) + "\n")
    [commands] = [one.text for one in blocks if "runner init" in one.text]
    assert len(commands.splitlines()) == 5
    models = f"cp -r {tiny_model('gemma').parent} demo_models"
    commands = commands.replace("runner demo-models", models)
    code, printed = Shell(tmp_path).run(commands.replace("--slots 2", "--slots 2 --dry-run"))
    assert code == 0, printed
    assert "12 recipes can be trained" in printed
    assert printed.count("accelerate launch") == 12 and "# first: 12 runs, 12 pending" in printed
    assert (tmp_path / "study" / "report.html").is_file()


def test_a_column_with_spaces_in_its_name_is_a_prompt_as_the_readme_says(tmp_path: Path) -> None:
    rows = "".join(f"{number},text {number},yes\n" for number in range(9))
    (tmp_path / "rows.csv").write_text(f"No.,Customer text,Is it late?\n{rows}")
    option = "--prompt 'Customer text'"
    assert option in (ROOT / "README.md").read_text(encoding="utf-8")
    code, printed = Shell(tmp_path).run(
        f"runner init study --data rows.csv {option} --completion 'Is it late?'"
    )
    assert code == 0 and "read as prompt_completion: Customer text -> Is it late?" in printed


def test_quotes_that_are_not_printed_are_found() -> None:
    printed = "a 12 b\nby 0.53 (95%\n  interval) end\nz"
    assert find_absent("a 12 b\nz", printed) == []
    assert find_absent("a 13 b\nz", printed) == ["a 13 b", "z"]
    assert find_absent("z\na 12 b", printed) == ["a 12 b"]
    assert hide_numbers("by -1.5 (95% interval)") in hide_numbers(printed)
    assert hide_numbers("by 1.5 (95% interval of)") not in hide_numbers(printed)
