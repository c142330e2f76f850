"""Two simultaneous commands on one grid and one output root: each run is executed once, in any
order.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from runner.cli.main import main
from runner.files import load_json
from runner.recipe.contents import ContentHashes
from tests.conftest import RUNNER
from tests.support.fake_launcher import FakeLauncher, fake, finish, wait_until_dead
from tests.support.toy_grid import GRID, build_toy

__all__ = ["fake"]

NAMES: Final = ("a", "b", "c", "d", "e", "f")


def assert_each_run_once(fake: FakeLauncher, printed: list[tuple[str, str]]) -> None:
    """One attempt per run; one sweep says that it completed it, every other one that it was not its
    own to run.
    """
    assert Counter(fake.started()) == Counter(NAMES)
    assert sorted(path.name for path in (fake.root / "runs" / "toy").iterdir()) == list(NAMES)
    for name in NAMES:
        [attempt] = fake.attempts(name)
        assert (
            attempt["failure"] is None and attempt["exit_status"] == 0 and attempt["ended_at_utc"]
        )
        said = [say_of(name, stdout, stderr) for stdout, stderr in printed]
        assert sorted(said) == ["completed", *["elsewhere"] * (len(printed) - 1)], printed


def say_of(name: str, stdout: str, stderr: str) -> str:
    if f"toy/{name}  completed\n" in stderr:
        return "completed"
    is_elsewhere = (
        f"toy/{name}  completed by another sweep" in stderr or f"skip    toy/{name}  " in stdout
    )
    return "elsewhere" if is_elsewhere else "nothing"


def run_sweeps_together(fake: FakeLauncher, num_sweeps: int) -> None:
    fake.add(*NAMES)
    sweeps = [fake.start("sweep", "recipes/toy", "--slots", "2") for _ in range(num_sweeps)]
    ends = [finish(sweep) for sweep in sweeps]
    assert [code for code, _, _ in ends] == [0] * num_sweeps, ends
    assert_each_run_once(fake, [(stdout, stderr) for _, stdout, stderr in ends])


@pytest.mark.parametrize("attempt", range(2))
def test_two_sweeps_started_together_execute_each_run_once(
    fake: FakeLauncher, attempt: int
) -> None:
    run_sweeps_together(fake, 2)


@pytest.mark.torture
@pytest.mark.parametrize("attempt", range(20))
@pytest.mark.parametrize("num_sweeps", [2, 4])
def test_sweeps_started_together_twenty_times(
    fake: FakeLauncher, num_sweeps: int, attempt: int
) -> None:
    run_sweeps_together(fake, num_sweeps)


def kill_one_of_two(fake: FakeLauncher, chance: random.Random, num_kills: int) -> None:
    """Two sweeps, of which one is killed and started again until both end normally."""
    fake.add(*NAMES)
    sweeps = [fake.start("sweep", "recipes/toy", "--slots", "2") for _ in range(2)]
    for _ in range(num_kills):
        number = chance.randrange(2)
        try:
            sweeps[number].wait(timeout=chance.uniform(0, 1.5))
        except subprocess.TimeoutExpired:
            sweeps[number].kill()
        finish(sweeps[number])
        sweeps[number] = fake.start("sweep", "recipes/toy", "--slots", "2")
    for sweep in sweeps:
        code, _, stderr = finish(sweep)
        assert code == ("interrupted" in stderr.splitlines()[-1]), stderr
    assert main(["sweep", "recipes/toy"]) == 0, (
        "what a killed sweep was running while the other one passed by"
    )
    for name in NAMES:
        attempts = fake.attempts(name)
        assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
        assert all(attempt["ended_at_utc"] is None for attempt in attempts[:-1]), (
            "a run that had ended was run again"
        )
        assert fake.paths(name).result_path.exists()
        ended = [
            event["pid"]
            for event in fake.events()
            if event["name"] == name and event["event"] == "end"
        ]
        assert len(ended) <= 1, "completed twice"


def test_a_sweep_that_is_killed_beside_another_one(fake: FakeLauncher) -> None:
    kill_one_of_two(fake, random.Random(5), num_kills=2)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
def test_sweeps_that_are_killed_beside_another_one(fake: FakeLauncher, seed: int) -> None:
    kill_one_of_two(fake, random.Random(seed), num_kills=10)


def start_between(fake: FakeLauncher, told: str) -> subprocess.Popen[str]:
    """A sweep that has decided to run `b`, and has waited with `a` while another sweep changed the
    state of `b`.
    """
    fake.add("a", told="wait")
    fake.add("b", told=told)
    late = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "a"
    return late


@pytest.mark.parametrize("told", ["fail data row 7 has no messages", "fail crashed boom", "exit 3"])
def test_what_has_failed_in_one_sweep_is_not_tried_again_by_the_other(
    fake: FakeLauncher, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    late = start_between(fake, told)
    assert main(["sweep", "recipes/toy/b.yaml"]) == 1
    fake.let_go("a")
    code, _, stderr = finish(late)
    assert code == 1 and "(by another sweep)" in stderr and "attempts/1/log.txt" in stderr
    assert fake.started() == ["a", "b"] and len(fake.attempts("b")) == 1


def test_what_was_killed_in_one_sweep_goes_on_in_the_other(fake: FakeLauncher) -> None:
    late = start_between(fake, "hang")
    other = fake.start("sweep", "recipes/toy/b.yaml")
    _, pid = fake.next_started()
    pidfd = os.pidfd_open(pid)
    other.kill()
    wait_until_dead(pidfd)
    os.close(pidfd)
    finish(other)
    fake.tell("b", "complete")
    fake.let_go("a")
    assert finish(late)[0] == 0
    assert [attempt["ended_at_utc"] is None for attempt in fake.attempts("b")] == [True, False]


def test_a_running_run_is_not_moved_aside(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    fake.next_started()
    assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == 2
    assert "is running; stop it before starting from step 0" in capsys.readouterr().err
    fake.let_go("a")
    assert finish(sweep)[0] == 0
    assert len(fake.attempts("a")) == 1 and not (fake.root / "runs" / "toy" / ".old").exists()


def test_fresh_launches_and_sweeps_of_one_run_move_it_aside_whole(fake: FakeLauncher) -> None:
    """Each attempt ends in its own directory, and nothing that was moved is lost."""
    fake.add("a")
    assert main(["sweep", "recipes/toy"]) == 0
    commands = [("launch", "recipes/toy/a.yaml", "--fresh"), ("sweep", "recipes/toy")] * 3
    processes = [fake.start(*command) for command in commands]
    ends = [finish(process) for process in processes]
    # A launch is refused while another process runs the very run that it wants to move.
    assert all(
        code == 0 or (code == 2 and "is running; stop it" in stderr) for code, _, stderr in ends
    ), ends
    moved = list((fake.root / "runs" / "toy" / ".old").iterdir())
    assert len(moved) == sum("moved runs/toy/a to" in stderr for _, _, stderr in ends)
    run_dirs = [fake.paths("a").run_dir, *moved]
    attempts = [load_json(run_dir / "run.json")["attempts"] for run_dir in run_dirs]
    assert [len(found) for found in attempts] == [1] * len(run_dirs), (
        "two attempts in one directory, or none"
    )
    assert all((run_dir / "result.json").exists() for run_dir in run_dirs)
    assert len(fake.started()) == len(run_dirs)


def test_the_cache_of_hashes_survives_many_writers(tmp_path: Path) -> None:
    """Each file gets the right hash while other processes write into the shared cache."""
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom runner.recipe.contents import"
        " ContentHashes\nroot = Path(sys.argv[1])\nfor number in range(40):\n    hashes ="
        " ContentHashes(root / '.content_hashes.json')\n    found = {file.name: hashes.hash(file)"
        " for file in sorted(root.glob(sys.argv[2]))}\n    hashes.save()\nprint(json.dumps(found))"
    )
    for number in range(6):
        path = tmp_path / f"{number}.txt"
        path.write_text(str(number))
        os.utime(path, (1, 1))
    patterns = ("[0-3].txt", "[2-5].txt", "*.txt")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), pattern],
            stdout=subprocess.PIPE,
            text=True,
        )
        for pattern in patterns
    ]
    found: dict[str, str] = {}
    for writer in writers:
        stdout, _ = writer.communicate()
        assert writer.returncode == 0
        for name, digest in json.loads(stdout).items():
            assert found.setdefault(name, digest) == digest
    assert len(set(found.values())) == 6
    hashes = ContentHashes(tmp_path / ".content_hashes.json")
    assert all(hashes.known(tmp_path / name) in (digest, None) for name, digest in found.items())
    assert {path.name for path in tmp_path.iterdir()} == {*found, ".content_hashes.json"}


def test_two_renders_and_a_prune_leave_the_recipes_of_one(tmp_path: Path) -> None:
    root = build_toy(tmp_path)()
    render = [str(RUNNER), "render", "toy"]
    subprocess.run(render, cwd=root, check=True, stdout=subprocess.DEVNULL)
    expected = {path.name: path.read_bytes() for path in (root / "recipes" / "toy").iterdir()}
    build_toy(tmp_path)(grid=GRID.replace("180", "240"))
    renders = [
        subprocess.Popen([*render, *more], cwd=root) for more in ([], ["--prune"], ["--prune"], [])
    ]
    assert [one.wait() for one in renders] == [0] * 4
    found = {path.name: path.read_bytes() for path in (root / "recipes" / "toy").iterdir()}
    assert {name for name in expected if "060" in name} == {name for name in found if "060" in name}
    assert len(found) == len(expected) and all(
        "240" in name for name in found.keys() - expected.keys()
    )
    assert all(found[name] == expected[name] for name in found.keys() & expected.keys())
