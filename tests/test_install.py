"""`make` installs with uv, which gets pip's settings, or with pip.

uv and pip are fake programs here that note their arguments; nothing is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTE = """
import json, os, sys
from pathlib import Path
folder = Path(os.environ["NOTES"])
variables = {name: value for name, value in os.environ.items() if name.startswith("UV_")}
with (folder / "calls.jsonl").open("a") as stream:
    call = {"program": PROGRAM, "arguments": sys.argv[1:], "uv": variables}
    stream.write(json.dumps(call) + "\\n")
"""
PIP = """
if sys.argv[1:3] == ["config", "list"]:
    print((folder / "settings").read_text(), end="")
if sys.argv[-1] == "uv" and (folder / "has_uv").exists():
    package = Path(__file__).parents[1] / "uv"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    package.joinpath("__main__.py").write_text(folder.joinpath("uv_program").read_text())
"""
EDITABLE = ["--editable", ".[dev]"]


@dataclass(frozen=True)
class Call:
    """One call of uv or pip."""

    program: str
    arguments: list[str]
    uv: dict[str, str]


class Machine:
    """A machine with pip settings, with uv on PATH, in its index, or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / "packages"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.packages / "pip").mkdir(parents=True)
        (self.packages / "pip" / "__init__.py").write_text("")
        (self.packages / "pip" / "__main__.py").write_text(f"PROGRAM = 'pip'{NOTE}{PIP}")
        self.settle()
        self.set_uv_code(0)

    def settle(self, *lines: str) -> None:
        """Say what `pip config list` prints."""
        (self.folder / "settings").write_text("".join(f"{line}\n" for line in lines))

    def set_uv_code(self, code: int) -> None:
        """Say how uv ends, wherever it comes from."""
        program = f"PROGRAM = 'uv'{NOTE}sys.exit({code})\n"
        (self.folder / "uv_program").write_text(program)

    def put_uv_on_path(self) -> None:
        """Have uv before anything is installed."""
        uv = self.bin / "uv"
        uv.write_text(f"#!{sys.executable}\n{(self.folder / 'uv_program').read_text()}")
        uv.chmod(0o755)

    def put_uv_into_index(self) -> None:
        """Let pip find uv."""
        (self.folder / "has_uv").touch()

    def install(self, **variables: str) -> tuple[list[Call], str]:
        """The recorded calls and the output."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
        environment = {
            **kept,
            "PATH": str(self.bin),
            # -S hides the real uv, if there is one next to the real pip.
            "PYTHONPATH": str(self.packages),
            "NOTES": str(self.folder),
            **variables,
        }
        argv = [sys.executable, "-S", str(ROOT / ".ci" / "install.py"), ".[dev]"]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        calls = [Call(**json.loads(line)) for line in lines]
        return [call for call in calls if call.arguments[0] != "config"], done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_uv_on_path_installs_what_is_pinned_and_gets_the_settings_of_pip(machine: Machine) -> None:
    machine.put_uv_on_path()
    machine.settle(
        "global.index-url='https://one.example/simple'",
        "global.timeout='60'",
        "install.index-url='https://two.example/simple'",
        r"global.extra-index-url='\nhttps://three.example\nfile:///four'",
        ":env:.find-links='/wheels /more'",
        ":env:.trusted-host=''",
        "download.no-binary='torch'",
    )
    calls, printed = machine.install()
    assert [call.program for call in calls] == ["uv"] and not printed
    arguments = calls[0].arguments
    assert arguments[:2] == ["pip", "install"] and arguments[-2:] == EDITABLE
    assert arguments[arguments.index("--python") + 1] == sys.executable
    assert arguments[arguments.index("--constraint") + 1] == str(ROOT / "constraints.txt")
    assert calls[0].uv == {
        "UV_DEFAULT_INDEX": "https://two.example/simple",
        "UV_INDEX": "https://three.example file:///four",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_HTTP_TIMEOUT": "60",
    }


def test_own_variables_of_uv_win(machine: Machine) -> None:
    machine.put_uv_on_path()
    machine.settle("global.index-url='https://one.example/simple'")
    calls, _ = machine.install(UV_DEFAULT_INDEX="https://own.example/simple")
    assert calls[0].uv == {"UV_DEFAULT_INDEX": "https://own.example/simple"}


def test_uv_comes_from_the_index_where_it_is_missing(machine: Machine) -> None:
    machine.put_uv_into_index()
    calls, printed = machine.install()
    assert [call.program for call in calls] == ["pip", "uv"] and not printed
    assert calls[0].arguments[-3:] == ["--constraint", str(ROOT / "constraints.txt"), "uv"]
    assert calls[1].arguments[-2:] == EDITABLE


def test_pip_installs_where_there_is_no_uv(machine: Machine) -> None:
    calls, printed = machine.install()
    assert [call.program for call in calls] == ["pip", "pip"]
    assert calls[1].arguments[-2:] == EDITABLE and "--constraint" in calls[1].arguments
    assert printed == "the package index has no uv for this machine: pip installs\n"


def test_pip_installs_where_uv_fails(machine: Machine) -> None:
    machine.set_uv_code(2)
    machine.put_uv_on_path()
    calls, printed = machine.install()
    assert [call.program for call in calls] == ["uv", "pip"]
    assert printed == "uv failed with 2: pip installs\n"


def test_pip_installs_where_uv_would_not_heed_what_it_is_told(machine: Machine) -> None:
    machine.put_uv_on_path()
    machine.settle("global.only-binary=':all:'", "global.proxy='http://proxy.example:3128'")
    calls, printed = machine.install()
    assert [call.program for call in calls] == ["pip"]
    assert printed == "pip gets only-binary, proxy, which uv would ignore: pip installs\n"


def test_the_examples_of_the_installer() -> None:
    argv = [sys.executable, "-m", "doctest", str(ROOT / ".ci" / "install.py")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_uv_itself_is_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in pinned if line.startswith("uv==")]
