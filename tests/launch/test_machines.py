"""Several machines of one run: the facts that Slurm must give, the processes on each machine, and
refusals elsewhere.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from runner.errors import RefusedError, RunnerError
from runner.launch.placement import find_allocation
from tests.support.fake_launcher import FakeLauncher, fake, finish

__all__ = ["fake"]

# Starts its command once per machine, one after the other, and prints its arguments.
SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" > "$FAKE_HOME/srun"
echo "$RUNNER_ATTEMPT" >> "$FAKE_HOME/srun"
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank "$@" < /dev/null; done
"""
SCONTROL = """\
#!/bin/bash
[ "$2" = hostnames ] && printf 'b1\\nb2\\n'
[ "$2" = node ] && echo "NodeName=$3 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=$3"
exit 0
"""
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "b[1-2]"}


@pytest.fixture
def two(fake: FakeLauncher) -> FakeLauncher:
    """A recipe of four processes on two machines, and Slurm's commands on PATH."""
    fake.add("two", num_processes=4)
    path = fake.root / "recipes" / "toy" / "two.yaml"
    path.write_text(
        path.read_text().replace("num_processes: 4", "num_processes: 4\n  num_machines: 2")
    )
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (fake.home / name).write_text(text)
        (fake.home / name).chmod(0o755)
    return fake


def in_slurm(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name, value in {**SLURM, "SLURM_JOB_CPUS_PER_NODE": "8,6", **more}.items():
        monkeypatch.setenv(name, value)


def test_srun_starts_accelerate_once_on_each_machine(
    two: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_slurm(monkeypatch)
    code, _, stderr = finish(two.start("launch", "recipes/toy/two.yaml"))
    assert code == 0, stderr
    told = (two.home / "srun").read_text().splitlines()
    options = told[: told.index("accelerate")]
    assert {
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--kill-on-bad-exit=1",
    } <= {*options}
    assert told[-1] == "1", "the ranks know their attempt"
    starts = [event for event in two.events() if event["event"] == "start"]
    ports = set()
    for rank, event in enumerate(starts):
        given = dict(itertools.pairwise(event["argv"]))
        assert (given["--num_machines"], given["--num_processes"]) == ("2", "4")
        assert (given["--machine_rank"], given["--main_process_ip"]) == (str(rank), "10.0.0.7")
        ports.add(given["--main_process_port"])
        assert event["environment"]["OMP_NUM_THREADS"] == "1", "as the recipe says"
        assert not event["is_stdin_the_lease"]
    assert len(starts) == 2 and len(ports) == 1 and int(ports.pop()) > 0
    (attempt,) = two.attempts("two")
    assert (
        attempt["command"][0] == "srun"
        and attempt["num_processes"] == 4
        and attempt["failure"] is None
    )


@pytest.mark.parametrize("verb", ["launch", "sweep", "sweep --dry-run"])
def test_outside_slurm_it_is_refused(two: FakeLauncher, verb: str) -> None:
    before = two.tree()
    code, stdout, stderr = finish(two.start(*verb.split(), "recipes/toy/two.yaml"))
    assert (
        code == 2
        and "accelerate launch" not in stdout
        and "toy/two needs 2 machines" in stderr
        and "--prepare" in stderr
    )
    assert {
        name: content
        for name, content in two.tree().items()
        if ".content_hashes" not in name and name != "runs"
    } == before


def test_a_sweep_inside_a_job_of_several_machines_takes_none_of_them(
    two: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_slurm(monkeypatch)
    code, _, stderr = finish(two.start("sweep", "recipes/toy"))
    assert code == 2 and "toy/two needs 2 machines" in stderr


def test_by_hand_there_is_one_command_for_each_machine(two: FakeLauncher) -> None:
    for mode in ("--dry-run", "--prepare"):
        code, stdout, stderr = finish(two.start("launch", "recipes/toy/two.yaml", mode))
        refused = (
            "toy/two needs 2 machines, but this is one machine: without `--dry-run` this is"
            " refused here"
        )
        assert (refused in stderr) == (mode == "--dry-run")
        lines = stdout.splitlines()
        assert code == 0 and len(lines) == 2
        for rank, line in enumerate(lines):
            assert f"--num_machines 2 --machine_rank {rank} --main_process_ip FIRST_MACHINE" in line
            assert "--num_processes 4" in line and "--main_process_port 0" not in line


@pytest.mark.parametrize("verb", ["launch", "sweep --yes"])
def test_nothing_is_moved_aside_for_a_run_that_is_refused_here(
    two: FakeLauncher, verb: str
) -> None:
    two.add("one")
    path = two.root / "recipes" / "toy" / "one.yaml"
    assert finish(two.start("launch", "recipes/toy/one.yaml"))[0] == 0
    text = path.read_text().replace("max_steps: 2", "max_steps: 4")
    path.write_text(text.replace("num_processes: 1", "num_processes: 2\n  num_machines: 2"))
    code, _, stderr = finish(two.start(*verb.split(), "recipes/toy/one.yaml", "--fresh"))
    assert code == 2 and "toy/one needs 2 machines, but this is one" in stderr
    assert two.paths("one").result_path.exists()
    assert [one.name for one in two.paths("one").run_dir.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("num_nodes", ["1", "3"])
def test_a_job_of_another_size_is_refused(num_nodes: str) -> None:
    with pytest.raises(
        RefusedError, match=f"the recipe needs 2 machines, but this Slurm job has {num_nodes}"
    ):
        find_allocation({**SLURM, "SLURM_JOB_NUM_NODES": num_nodes}, 2)


def test_slurm_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunnerError, match=r"`scontrol show hostnames b\[1-2\]`: .*No such file"):
        find_allocation(SLURM, 2)
    tool.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    tool.chmod(0o755)
    with pytest.raises(RunnerError, match="Unable to contact slurm controller"):
        find_allocation(SLURM, 2)
    assert find_allocation({}, 2) is None


def test_a_failed_srun_is_a_failed_attempt(
    two: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_slurm(monkeypatch)
    two.tell("two", "fail data no rows")
    code, _, stderr = finish(two.start("launch", "recipes/toy/two.yaml"))
    assert code == 10 and "no rows" in stderr
    assert (
        json.loads(two.paths("two").record_path.read_text())["attempts"][0]["failure"]["kind"]
        == "data"
    )
    assert os.path.exists(two.paths("two").attempt(1).launcher_lock_path)
