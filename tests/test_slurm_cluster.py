"""Sweeps on a real Slurm: each run is executed once, whatever happens to jobs, daemons and machines."""

from __future__ import annotations

import pytest
from fake_launcher import FakeLauncher, fake
from local_slurm import LocalSlurm, needs_slurm, shared_slurm, wait_until

from runner.cli import main
from runner.fsio import load_json

__all__ = ["fake", "shared_slurm"]
pytestmark = [needs_slurm, pytest.mark.slow]

SWEEP = ("sweep", "recipes/toy", "--engine", "slurm")


@pytest.fixture
def slurm(shared_slurm: LocalSlurm, fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> LocalSlurm:
    """The shared cluster, to which everything submits that is started here."""
    use(shared_slurm, monkeypatch)
    return shared_slurm


def use(cluster: LocalSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.root / "slurm.conf"))


def submissions(fake: FakeLauncher) -> list[dict[str, object]]:
    """What was submitted below `runs`, in order."""
    return [load_json(path) for path in sorted(fake.root.glob("runs/.slurm/*/submission.json"))]


def wait_until_done(cluster: LocalSlurm) -> None:
    wait_until(lambda: cluster.list_jobs() == {}, "all jobs end")


def is_completed(fake: FakeLauncher, *names: str) -> bool:
    return all(fake.paths(name).result_path.exists() for name in names)


def test_two_at_a_time_each_with_a_gpu_of_its_own(slurm: LocalSlurm, fake: FakeLauncher) -> None:
    (fake.root / "cpu.yaml").write_text("use_cpu: false\n")
    fake.add("a", "b", "c", told="wait")
    assert main([*SWEEP, "--slots", "2"]) == 0
    running = {fake.next_started()[0], fake.next_started()[0]}
    waiting = ({"a", "b", "c"} - running).pop()
    array = submissions(fake)[0]["job"]
    index = {"a": 0, "b": 1, "c": 2}
    assert slurm.list_jobs() == {
        f"{array}_{index[name]}": "RUNNING" if name in running else "PENDING" for name in index
    }
    devices = {name: fake.attempts(name)[0]["devices"] for name in running}
    assert sorted(devices.values()) == ["0", "1"]
    assert {e["name"]: e["environment"]["CUDA_VISIBLE_DEVICES"] for e in fake.events()} == devices
    for name in sorted(running):
        fake.let_go(name)
    assert fake.next_started()[0] == waiting
    fake.let_go(waiting)
    wait_until_done(slurm)
    assert is_completed(fake, "a", "b", "c") and sorted(fake.started()) == ["a", "b", "c"]
    assert {name: fake.attempts(name)[0]["cluster_job"] for name in index} == {
        name: f"slurm {array}_{number}" for name, number in index.items()
    }
