from pathlib import Path
from typing import Final

import pytest

from runner.cli.main import main
from runner.run.entries import hold_entry, note_not_shared, write_entry
from runner.run.lease import Lease

NAMES: Final = (f".base/{'01ab' * 16}", f".rows/{'23cd' * 16}")
CACHES: Final = (".recipes.json", "..recipes.json.77-ab.tmp")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An output root with a run, scores of a base model, and masked rows."""
    run_dir = tmp_path / "runs" / "toy" / "a"
    run_dir.mkdir(parents=True)
    (run_dir / "lease").touch()
    (run_dir / "result.json").write_text("{}")
    for name in NAMES:
        folder = tmp_path / "runs" / name
        folder.parent.mkdir()
        write_entry(folder, lambda path: _write(path / "x", "1"), parts={}, producer={})
    for name in CACHES:
        (tmp_path / "runs" / name).write_text("{}")
    return tmp_path / "runs"


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def list_left(root: Path) -> list[str]:
    return [name for name in (*NAMES, *CACHES) if (root / name).exists()]


def test_what_is_shared_goes_and_runs_stay(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", "--output-root", str(root), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{root}/.base: scores and answers of base models, 1 folder, 0.2 KiB" in shown
    assert f"{root}/.rows: masked rows, 1 folder, 0.2 KiB" in shown
    assert f"{root}/.recipes.json: parsed recipes, 2 files, 0.0 KiB" in shown
    assert list_left(root) == [*NAMES, *CACHES]
    assert main(["clean", "--output-root", str(root), "--yes"]) == 0
    assert "removed; runs compute again" in capsys.readouterr().out
    assert list_left(root) == [] and (root / "toy" / "a" / "result.json").exists()
    assert main(["clean", "--output-root", str(root), "--yes"]) == 0
    assert "nothing is shared between runs here" in capsys.readouterr().out


def test_notes_and_locks_go_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / ".base" / ("ff" * 32)
    note_not_shared(folder, "it leaves something")
    with hold_entry(folder, lambda: False), hold_entry(root / NAMES[0], lambda: False):
        pass
    (root / ".base" / "mine.lock").touch()
    assert main(["clean", "--output-root", str(root), "--yes"]) == 0
    assert f"{root}/.base: reasons why scores are not shared, 1 file\n" in capsys.readouterr().out
    assert [path.name for path in (root / ".base").iterdir()] == ["mine.lock"]


def test_a_folder_that_is_not_there_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clean", "--output-root", f"{root}s"]) == 2
    assert f"the folder {root}s does not exist" in capsys.readouterr().err


def test_nothing_goes_where_nobody_can_be_asked(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clean", "--output-root", str(root)]) == 2
    assert "add `--yes`" in capsys.readouterr().err
    assert list_left(root) == [*NAMES, *CACHES]


def test_nothing_goes_while_a_run_may_read_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease(root / "toy" / "a" / "lease")
    assert lease.try_acquire()
    assert main(["clean", "--output-root", str(root), "--yes"]) == 2
    error = capsys.readouterr().err
    assert f"{root}/toy/a is running" in error and f"runner stop {root}/toy/a" in error
    assert list_left(root) == [*NAMES, *CACHES]
    lease.close()


def test_what_is_being_written_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_entry(root / NAMES[0], lambda: False) as is_ours:
        assert is_ours
        assert main(["clean", "--output-root", str(root), "--yes"]) == 1
    captured = capsys.readouterr()
    assert f"warning: {root / NAMES[0]} was kept" in captured.err
    assert list_left(root) == [NAMES[0]]
