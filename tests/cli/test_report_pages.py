"""`runner report --html`: the place of the pages, and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.conftest import ROOT, build_environment
from tests.support.scored_runs import make_attempt, scored_grid


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs of two losses, three seeds each, in `runs/demo`."""
    monkeypatch.chdir(tmp_path)
    attempt = make_attempt(
        host="secret-host",
        environment={"API_TOKEN": "hunter2", "HOME": "/home/ann"},
        command=("/home/ann/venv/bin/accelerate", "launch"),
    )
    scored_grid(
        Path("runs"),
        {"loss": ["full", "completion"]},
        lambda loss: 2.0 - 0.2 * (loss == "completion"),
        attempt=attempt,
    )
    return tmp_path


def test_the_page_is_written_beside_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--html", "out/r.html", "--rows", "out/rows", "--figures", "out/figures"]
    assert main(["report", "runs/demo", *arguments, "--without-rows"]) == 0
    out, err = capsys.readouterr()
    assert main(["report", "runs/demo"]) == 0
    assert capsys.readouterr().out == out, "stdout holds the report, as without a page"
    page = (folder / "out/r.html").read_text()
    assert "page: out/r.html (" in err and "rows: 1 page in out/rows" in err
    assert "runner report runs/demo --without-rows --html report.html" in page
    assert "loss: completion → full" in page
    written = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".html", ".pdf"}
    for path in written:
        content = path.read_bytes()
        for secret in ("secret-host", "hunter2", "API_TOKEN", "/home/", str(folder)):
            assert secret.encode() not in content, f"{secret} in {path}"


def test_a_second_page_takes_the_place_of_the_first(folder: Path) -> None:
    (folder / "r.html").write_text("old")
    assert main(["report", "runs/demo", "--html", "r.html"]) == 0
    assert (folder / "r.html").read_text().startswith("<!doctype html>")
    assert not list(folder.glob(".r.html*")), "nothing is left of writing it"


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (["--html", "runs"], "runs is a folder, but the page is one file", "runs/report.html"),
        (["--html", "file/r.html"], "file is a file, so the folder file cannot be created", ""),
        (["--rows", "file"], "file is a file, so the folder file cannot be created", ""),
        (["--figures", "file/x"], "file is a file, so the folder file/x cannot be created", ""),
        (["--without-rows"], "no page is requested", "add --html report.html"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
    hint: str,
) -> None:
    (folder / "file").write_text("mine")
    assert main(["report", "runs/demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and hint in err and "Traceback" not in err and out == ""
    assert (folder / "file").read_text() == "mine"


def test_a_name_that_the_disk_refuses_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "runs/demo", "--html", "x" * 300]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "file name too long" in err and "Traceback" not in err


def test_a_report_without_a_page_draws_nothing(folder: Path) -> None:
    """Matplotlib costs half a second."""
    code = (
        "import sys; from runner.cli.main import main; main(['report', 'runs/demo']);"
        " sys.exit('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=build_environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
