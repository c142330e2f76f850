"""`runner recipe`: the list, one key, JSON, and the schema file; in a folder that is no project."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_pipe_gets_one_line_for_each_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    printed = capsys.readouterr()
    (line,) = [one for one in printed.out.splitlines() if " training.seed " in one]
    assert "required" in line and "random seed" in line
    assert printed.err == "", "only data, in a pipe"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = run_in_terminal(width, "recipe") + run_in_terminal(width, "recipe", "adapter")
    lines += run_in_terminal(width, "recipe", "training.optim")
    assert len(lines) > 200
    # A word that does not fit is not broken: it may be an address.
    wide = [line for line in lines if len(line) > width and " " in line.strip()]
    assert not wide, "\n".join(wide)


def run_in_terminal(width: int, *arguments: str) -> list[str]:
    """The lines that a terminal of a width shows; colors and the like would be seen."""
    import fcntl
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "runner", *arguments],
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    os.close(terminal)
    content = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        content += part
    assert process.wait(timeout=60) == 0
    os.close(controller)
    return content.decode().replace("\r\n", "\n").splitlines()


def test_a_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "checkpoints.save_steps"]) == 0
    printed = capsys.readouterr().out
    assert "integer > 0 or null" in printed
    assert "save_strategy: steps" in printed, "the example has what the key needs"


def test_json_has_one_object_for_each_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)
    assert {"key", "type", "default", "required", "meaning", "example"} <= set(keys[0])
    assert main(["recipe", "--json", "loss"]) == 0
    (loss,) = json.loads(capsys.readouterr().out)
    assert loss["choices"] == ["full", "completion", "last_completion"]
    assert main(["recipe", "--json", "output_dir"]) == 0
    (owned,) = json.loads(capsys.readouterr().out)
    assert owned["decided_by"] == "the run directory"


def test_an_owned_key_names_what_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "training.save_steps"]) == 0
    assert "decided by `checkpoints`" in capsys.readouterr().out


def test_a_misspelt_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "training.learning_rat"]) == 2
    said = capsys.readouterr().err
    assert "did you mean `training.learning_rate`?" in said
    assert "hint: runner recipe training.learning_rate" in said


def test_the_name_of_another_trainer_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "lr"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("training.learning_rate\n")
    assert "`lr` is `training.learning_rate: VALUE` here" in printed.err
    assert main(["recipe", "val_set_size"]) == 2
    assert "num_validation_samples" in capsys.readouterr().err


def test_the_schema_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--json-schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    path = tmp_path / "recipe.schema.json"
    for _ in range(2):  # an older one is replaced
        assert main(["recipe", "--json-schema", path.name]) == 0
        assert json.loads(path.read_text()) == printed
        assert capsys.readouterr().out == f"{path.name}\n"


def test_a_file_of_another_kind_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("loss: full\n")
    assert main(["recipe", "--json-schema", str(path)]) == 2
    assert path.read_text() == "loss: full\n"
    assert "is not a JSON Schema, so it is not replaced" in capsys.readouterr().err
    assert main(["recipe", "--json-schema", "recipe.yaml/schema.json"]) == 2
    assert "recipe.yaml is a file, and should be a folder" in capsys.readouterr().err


def test_a_key_and_the_schema_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "loss", "--json-schema"]) == 2
    assert "hint: runner recipe loss --json" in capsys.readouterr().err
