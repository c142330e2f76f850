"""The lock of a killed compilation is removed, that of a live one never. Torch's own FileBaton,
real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.files import load_json
from runner.sft.startup import find_file_system, list_build_folders, remove_stale_lock
from tests.conftest import Project
from tests.sft.test_distributed import ZERO_3
from tests.support.training_runs import (
    RUNS,
    add_what_runs_need,
    launch,
    read_log,
    try_launch_killed_at,
)

MAKER = """\
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("made", flush=True)
sys.stdin.read()
baton.release()
"""


@contextmanager
def holding(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has made the lock as torch does, and keeps it until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "made\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def make_old(path: Path) -> None:
    os.utime(path, (time.time() - 60, time.time() - 60))


def test_a_lock_stays_while_its_maker_lives_and_goes_once_it_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert remove_stale_lock(tmp_path) is None, "there is none"
    with holding(lock) as maker:
        make_old(lock)
        said = remove_stale_lock(tmp_path)
        assert lock.exists() and said is not None and "waits for another process" in said
        maker.send_signal(signal.SIGKILL)
        maker.wait()
        said = remove_stale_lock(tmp_path)
    assert not lock.exists() and said is not None and said.startswith(f"removed {lock}")


def test_a_maker_that_was_looked_at_releases_its_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holding(lock) as maker:
        make_old(lock)
        remove_stale_lock(tmp_path)
        maker.communicate("")
        assert maker.returncode == 0 and not lock.exists()


def test_what_a_killed_maker_had_started_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    make_old(lock)
    # Cwd as torch gives it to ninja.
    compiler = subprocess.Popen(["cat"], cwd=tmp_path, stdin=subprocess.PIPE)
    cleaner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import sys; from pathlib import Path; from runner.sft.startup import"
                " remove_stale_lock\nprint('looking', flush=True);"
                " print(remove_stale_lock(Path(sys.argv[1])))"
            ),
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert cleaner.stdout is not None and cleaner.stdout.readline() == "looking\n"
    with pytest.raises(subprocess.TimeoutExpired):
        cleaner.wait(0.5)
    assert lock.exists()
    compiler.communicate()
    assert cleaner.communicate()[0].startswith("removed ") and not lock.exists()


@pytest.mark.parametrize("content", ["fresh", "not empty", "a folder", "a link"])
def test_what_is_no_old_lock_of_torchs_stays(content: str, tmp_path: Path) -> None:
    lock, target = tmp_path / "lock", tmp_path / "target"
    target.touch()
    if content == "a folder":
        lock.mkdir()
    elif content == "a link":
        lock.symlink_to(target)
    else:
        lock.write_text("1234" if content == "not empty" else "")
    if content == "fresh":  # and so it stays, however long the machine takes to look at it
        os.utime(lock, (time.time() + 60, time.time() + 60))
    else:
        make_old(lock)
    assert remove_stale_lock(tmp_path) is not None
    assert lock.exists() and target.exists()


def test_a_lock_that_another_machine_may_have_is_told_from_its_file_system() -> None:
    assert find_file_system(Path("/proc/self/status")) == "proc"
    assert find_file_system(Path("/dev/shm")) == "tmpfs"


def test_only_folders_of_the_named_extensions_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cpu_adam", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert list_build_folders(["fused_adam", "cpu_adam"]) == [tmp_path / "cpu_adam"]


@pytest.mark.slow
@pytest.mark.torture
def test_a_run_that_was_killed_while_deepspeed_compiled_completes(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_what_runs_need(project)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    overrides = (ZERO_3, *RUNS["gemma-full"])
    # Ninja is started in the build folder, under the lock.
    at = "subprocess.Popen /deepspeed_shm_comm 1"
    killed = try_launch_killed_at(project, "zero", *overrides, at=at, num_processes=2)
    assert killed.returncode == 14 and lock.exists(), read_log(project.paths("zero"))
    paths = launch(project, "zero", *overrides, num_processes=2)
    assert f"removed {lock}" in read_log(paths) and not lock.exists()
    seconds = load_json(paths.attempt(2).timing_path)["phase_seconds"]
    compiling = ("compiling DeepSpeed's extension", "waiting for another process that compiles")
    spent = [value for name, value in seconds.items() if name.startswith(compiling)]
    assert spent and max(spent) > 1, seconds
