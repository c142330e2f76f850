"""A sweep over run directories with odd objects under the names of its files: those runs fail with
a clear error, and the others are run.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.fake_launcher import FakeLauncher, fake, finish

__all__ = ["fake"]


def test_odd_files_of_some_runs_stop_no_other_run(fake: FakeLauncher) -> None:
    odd = {
        "lease": (Path.mkdir, "lease is a folder, and should be a file"),
        "stop": (Path.mkdir, "stop is a folder, and should be a file"),
        "attempts": (Path.touch, "attempts is a file, and should be a folder"),
        "attempts/1/log.txt": (os.mkfifo, "attempts/1/log.txt is a pipe, and should be a file"),
        "checkpoints": (Path.touch, "checkpoints is a file, and should be a folder"),
        "": (Path.touch, " is a file, and should be a folder"),
    }
    fake.add(*[f"r{number}" for number in range(len(odd))], "whole", told="complete")
    for number, (name, (make, _)) in enumerate(odd.items()):
        path = fake.paths(f"r{number}").run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    code, stdout, stderr = finish(fake.start("sweep", "recipes/toy", "--slots", "2"))
    assert code == 1 and fake.started() == ["whole"], stderr
    for number, (name, (_, said)) in enumerate(odd.items()):
        folder = f"runs/toy/r{number}"
        assert f"{folder}/{said}" if name else f"{folder}{said}" in stdout + stderr, name
    assert "Traceback" not in stderr and "[Errno" not in stdout + stderr
    assert fake.attempts("r3")[0]["failure"]["kind"] == "configuration"
    # As the hints say
    for number, name in enumerate(odd):
        path = fake.paths(f"r{number}").run_dir / name
        path.rename(path.with_name(f"{path.name}.aside"))
    code, _, stderr = finish(fake.start("sweep", "recipes/toy", "--retry-failed", "--slots", "2"))
    assert code == 0, stderr
