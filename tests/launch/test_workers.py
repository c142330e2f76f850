"""Sweeps that fork their runs from workers, over real processes: the forked runs, their workers,
and the remains after a stop or a kill.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from runner.cli.main import main
from runner.launch.command import LaunchCommand, Placement
from runner.launch.pool import build_command
from runner.launch.worker import Imports, WorkerKey
from runner.launch.workers import Workers
from runner.plan.decide import Launch
from runner.plan.select import select_recipes
from runner.processes import find_processes_of
from runner.run.lease import is_leased
from tests.conftest import ROOT
from tests.support.fake_launcher import (
    FakeLauncher,
    fake,
    finish,
    wait_until_dead,
)

__all__ = ["fake"]

AT_ONCE: Final = "transient: 1, lost: 1, stalled: 1, backoff_seconds: 0"
COLD: Final = "runs start cold, because no worker can fork them: "


def list_starts(fake: FakeLauncher, name: str) -> list[tuple[str, str | None]]:
    """`(started, kind of failure)` of each attempt."""
    return [
        (one["started"], one["failure"] and one["failure"]["kind"]) for one in fake.attempts(name)
    ]


def watch(*pids: int) -> list[int]:
    """Descriptors that become readable when the living processes end."""
    return [os.pidfd_open(pid) for pid in pids]


def is_alive(pid: int) -> bool:
    """False also for what nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_all_dead(fake: FakeLauncher, pidfds: list[int]) -> None:
    for pidfd in pidfds:
        wait_until_dead(pidfd)
        os.close(pidfd)
    assert find_processes_of(lambda owner: str(fake.root) in owner) == []


def add_wandb(fake: FakeLauncher, name: str, told: str) -> None:
    """A run that needs another worker than the others: one with Weights & Biases."""
    fake.add(name, told=told)
    path = fake.root / "recipes" / "toy" / f"{name}.yaml"
    path.write_text(path.read_text() + "tracking: {report_to: [wandb]}\n")


# --- which runs are forked ---


def test_a_sweep_forks_its_runs_from_one_worker(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", "c")
    fake.tell("worker", "speak")
    assert main(["sweep", "recipes/toy", "--dry-run"]) == 0
    commands = capsys.readouterr().out.splitlines()[3:]
    assert main(["sweep", "recipes/toy"]) == 0
    assert len(fake.workers()) == 1
    for name, shown in zip("abc", commands, strict=True):
        assert list_starts(fake, name) == [("warm", None)]
        [attempt] = fake.attempts(name)
        command = LaunchCommand(tuple(attempt["command"]), attempt["environment"])
        assert command.as_shell(os.environ) == shown, "what it comes to"
        [event] = [one for one in fake.events() if one["name"] == name and one["event"] == "start"]
        assert event["is_stdin_the_lease"]
        assert attempt["environment"].items() <= event["environment"].items()
        log = fake.paths(name).attempt(1).log_path.read_text()
        hidden = "wandb bitsandbytes deepspeed scipy matplotlib"
        imports = [*attempt["command"][1:-2], "runner.sft.worker", hidden]
        said = f"  | the fake imports {' '.join(imports)}\n"
        assert f"while its worker imported the libraries:\n{said}" in log
        assert "the fake was told to complete" in log
    assert "worker" not in capsys.readouterr().err
    assert not any(map(is_alive, fake.workers()))


def test_what_cannot_be_forked_starts_cold(fake: FakeLauncher) -> None:
    configs = {
        "deepspeed": "deepspeed_config: {zero_stage: 1}",
        "empty": "",
        "garbage": "[",
        "group": "distributed_type: MULTI_GPU",
        "plain": "distributed_type: NO",
        "several": "use_cpu: true",
    }
    for name, config in configs.items():
        fake.add(name, num_processes=2 if name == "several" else 1)
        (fake.root / f"{name}.yaml").write_text(f"{config}\n")
        path = fake.root / "recipes" / "toy" / f"{name}.yaml"
        path.write_text(path.read_text().replace("cpu.yaml", f"{name}.yaml"))
    assert main(["sweep", "recipes/toy", "--slots", "2"]) == 0
    starts = {name: list_starts(fake, name) for name in configs}
    assert starts.pop("plain") == [("warm", None)] and len(fake.workers()) == 1
    assert set(map(str, starts.values())) == {str([("cold", None)])}


@pytest.mark.parametrize(
    "words", [["sweep", "recipes/toy", "--cold"], ["launch", "recipes/toy/a.yaml"]]
)
def test_cold_starts_no_worker(words: list[str], fake: FakeLauncher) -> None:
    fake.add("a")
    assert main(words) == 0
    assert list_starts(fake, "a") == [("cold", None)] and fake.workers() == []


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("models/odd/config.json", "null"),
        ("models/odd/config.json", "{"),
        ("models/odd/config.json", "[" * 100_000),
        ("odd.yaml", "null"),
        ("odd.yaml", "x: 2024-13-45"),
        ("odd.yaml", "[" * 3_000),
    ],
)
def test_a_recipe_with_odd_files_ends_no_sweep(
    place: str, content: str, fake: FakeLauncher
) -> None:
    fake.add("a", "b")
    shutil.copytree(fake.root / "models" / "toy", fake.root / "models" / "odd")
    shutil.copyfile(fake.root / "cpu.yaml", fake.root / "odd.yaml")
    (fake.root / place).write_text(content)
    path = fake.root / "recipes" / "toy" / "a.yaml"
    recipe = path.read_text()
    odd = recipe.replace("models/toy", "models/odd").replace("cpu.yaml", "odd.yaml")
    path.write_text(odd)
    main(["sweep", "recipes/toy"])
    assert list_starts(fake, "b") == [("warm", None)]
    assert fake.attempts("a"), "the run itself reports the error"


def test_a_retry_starts_cold(fake: FakeLauncher) -> None:
    fake.add("a", told="exit 1\nthen complete", retries=AT_ONCE)
    assert main(["sweep", "recipes/toy"]) == 0
    assert list_starts(fake, "a") == [("warm", "lost"), ("cold", None)]


def test_runs_that_hide_other_libraries_have_another_worker_for_as_long_as_it_is_needed(
    fake: FakeLauncher,
) -> None:
    fake.add("a", "d")
    add_wandb(fake, "b", told="complete")
    fake.add("c", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "c"
    plain, with_wandb = fake.workers()
    assert (is_alive(plain), is_alive(with_wandb)) == (True, False), "of b alone"
    fake.let_go("c")
    assert finish(sweep)[0] == 0
    assert len(fake.workers()) == 2 and fake.started() == ["a", "b", "c", "d"]
    assert [list_starts(fake, name) for name in "abcd"] == [[("warm", None)]] * 4
    assert not any(map(is_alive, fake.workers()))


def test_no_worker_is_kept_for_a_retry(fake: FakeLauncher) -> None:
    fake.add("a", told="fail transient x", retries="transient: 1, backoff_seconds: 500")
    add_wandb(fake, "b", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "b"
    assert [is_alive(pid) for pid in fake.workers()] == [False, True]
    sweep.send_signal(signal.SIGINT)
    fake.let_go("b")
    assert finish(sweep)[0] == 130


def test_runs_with_the_same_command_and_environment_have_the_same_worker(
    fake: FakeLauncher,
) -> None:
    fake.add("a", "b")
    add_wandb(fake, "c", told="complete")
    selected = select_recipes(["recipes/toy"], fake.root / "runs")
    a, b, c = (Launch(one, {}, 1) for one in selected)
    workers = Workers(print, are_wanted=True)

    def find_key(run: Launch, gpu: str = "0") -> WorkerKey | None:
        return workers.find_key(run, build_command(run, Placement(1, (gpu,))))

    key = find_key(a)
    assert key is not None and key == find_key(b)
    assert key not in (find_key(c), find_key(a, gpu="1"))
    (fake.root / "cpu.yaml").write_text("use_cpu: true\nmixed_precision: bf16\n")
    assert find_key(a) not in (key, None), "its start settings are outdated"


def test_each_slot_has_a_worker(fake: FakeLauncher) -> None:
    fake.add("a", "b", told="wait")
    fake.add("c", "d")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    names = [fake.next_started()[0] for _ in range(2)]
    assert len(fake.workers()) == 2
    for name in names:
        fake.let_go(name)
    assert finish(sweep)[0] == 0
    assert len(fake.workers()) == 2 and sorted(fake.started()) == ["a", "b", "c", "d"]


def test_a_worn_worker_is_replaced(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a", "b", "c")
    fake.tell("worker", "grow\nthen serve")
    assert main(["sweep", "recipes/toy"]) == 0
    assert len(fake.workers()) == 2
    assert [list_starts(fake, name) for name in "abc"] == [[("warm", None)]] * 3
    assert "worker" not in capsys.readouterr().err, "no message is needed"


# --- workers that fork nothing ---


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("an import has begun to use the GPU", "an import has begun to use the GPU"),
        ("exit no module named torch", "the worker has ended\n  | no module named torch"),
    ],
)
def test_without_a_worker_runs_start_cold_and_it_is_said_once(
    told: str, said: str, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    fake.tell("worker", told)
    assert main(["sweep", "recipes/toy"]) == 0
    assert [list_starts(fake, name) for name in "ab"] == [[("cold", None)]] * 2
    stderr = capsys.readouterr().err
    assert stderr.count(COLD) == 1 and f"{COLD}{said}\n" in stderr
    assert len(fake.workers()) == 1


def test_a_worker_that_lives_goes_on_when_another_one_has_failed(fake: FakeLauncher) -> None:
    said: list[str] = []
    workers = Workers(said.append, are_wanted=True)
    key, command = WorkerKey(("accelerate", "launch"), (), Imports("", ())), LaunchCommand((), {})
    living = workers.start(key, command)
    assert living is not None and workers.begin(living)
    try:
        fake.tell("worker", "exit")
        failing = workers.start(key, command)
        assert failing is not None and not workers.begin(failing)
        assert len(said) == 1 and "the worker has ended" in said[0]
        assert workers.start(key, command) is None, "a third one would fail too"
        workers.release(living)
        assert workers.take(key) is living and len(said) == 1
    finally:
        living.end()


def test_a_worker_that_is_killed_while_it_imports_costs_no_run(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    fake.tell("worker", "hang")
    sweep = fake.start("sweep", "recipes/toy")
    _, pid = fake.next_started()
    os.kill(pid, signal.SIGKILL)
    code, _, stderr = finish(sweep)
    assert code == 0 and stderr.count(COLD) == 1 and f"{COLD}the worker has ended\n" in stderr
    assert [list_starts(fake, name) for name in "ab"] == [[("cold", None)]] * 2


def test_a_worker_that_never_has_imported_everything_is_ended(fake: FakeLauncher) -> None:
    fake.tell("worker", "hang")
    said: list[str] = []
    workers = Workers(said.append, are_wanted=True)
    key = WorkerKey(("accelerate", "launch"), (), Imports("", ()))
    worker = workers.start(key, LaunchCommand((), {}))
    assert worker is not None and not worker.is_overdue(time.monotonic())
    fake.next_started()
    worker.deadline = 0.0
    assert not workers.begin(worker)
    assert worker.popen.returncode == -signal.SIGKILL
    assert said == [f"{COLD}its imports took more than 900 s"]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("cannot fork", "[Errno 11] Resource temporarily unavailable"),
        ("die", "the worker has ended"),
    ],
)
def test_a_run_starts_cold_in_the_same_attempt_when_its_worker_fails(
    told: str, why: str, fake: FakeLauncher
) -> None:
    fake.add("a", "b")
    fake.tell("worker", f"{told}\nthen serve")
    assert main(["sweep", "recipes/toy"]) == 0
    assert list_starts(fake, "a") == [("cold", None)]
    log = fake.paths("a").attempt(1).log_path.read_text()
    assert log.startswith(f"starting cold, because its worker could not fork it: {why}")
    assert "the fake was told to complete" in log
    assert list_starts(fake, "b") == [("warm", None)] and fake.started() == ["a", "b"]


# --- kills ---


def test_a_run_is_lost_with_its_worker_and_tried_again(
    fake: FakeLauncher,
) -> None:
    fake.add("a", told="hang\nthen complete", retries=AT_ONCE)
    fake.add("b")
    sweep = fake.start("sweep", "recipes/toy")
    _, pid = fake.next_started()
    pidfds = watch(pid, *fake.workers())
    os.kill(fake.workers()[0], signal.SIGKILL)
    code, _, stderr = finish(sweep)
    assert code == 0, stderr
    assert_all_dead(fake, pidfds)
    assert list_starts(fake, "a") == [("warm", "lost"), ("cold", None)]
    assert fake.attempts("a")[0]["exit_status"] is None
    assert list_starts(fake, "b") == [("warm", None)] and len(fake.workers()) == 2


def test_a_killed_run_does_not_take_its_worker_with_it(fake: FakeLauncher) -> None:
    fake.add("a", told="hang")
    fake.add("b")
    sweep = fake.start("sweep", "recipes/toy")
    os.kill(fake.next_started()[1], signal.SIGKILL)
    assert finish(sweep)[0] == 1
    assert list_starts(fake, "a") == [("warm", "lost")]
    assert fake.attempts("a")[0]["exit_status"] == -signal.SIGKILL
    assert list_starts(fake, "b") == [("warm", None)] and len(fake.workers()) == 1


def start_with_idle_worker(fake: FakeLauncher) -> tuple[subprocess.Popen[str], int]:
    """A sweep in which `a` is done, `b` waits, and `c` is going to be forked from a worker that is
    idle meanwhile.
    """
    fake.add("a")
    add_wandb(fake, "b", told="wait")
    fake.add("c", retries=AT_ONCE)
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "b"
    return sweep, fake.workers()[0]


def test_an_idle_worker_that_is_killed_is_replaced(fake: FakeLauncher) -> None:
    sweep, worker = start_with_idle_worker(fake)
    [pidfd] = watch(worker)
    os.kill(worker, signal.SIGKILL)
    wait_until_dead(pidfd)
    fake.let_go("b")
    code, _, stderr = finish(sweep)
    assert code == 0 and stderr.count("a new worker starts: it has ended\n") == 1
    assert list_starts(fake, "c") == [("warm", None)] and len(fake.workers()) == 3


def test_an_idle_worker_that_is_stopped_is_continued(fake: FakeLauncher) -> None:
    sweep, worker = start_with_idle_worker(fake)
    os.kill(worker, signal.SIGSTOP)
    fake.let_go("b")
    assert finish(sweep)[0] == 0
    assert list_starts(fake, "c") == [("warm", None)] and len(fake.workers()) == 2


def test_a_sweep_that_is_killed_while_a_worker_imports_leaves_nothing(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    fake.tell("worker", "hang\nthen serve")
    sweep = fake.start("sweep", "recipes/toy")
    pidfds = watch(fake.next_started()[1])
    sweep.kill()
    assert_all_dead(fake, pidfds)
    finish(sweep)
    assert not fake.paths("a").run_dir.exists()
    assert main(["sweep", "recipes/toy"]) == 0
    assert fake.started() == ["a", "b"]


@pytest.mark.parametrize("victims", ["sweep", "all"])
def test_a_sweep_that_is_killed_while_a_child_runs_leaves_nothing(
    victims: str, fake: FakeLauncher
) -> None:
    fake.add("a")
    fake.add("b", told="hang\nthen complete")
    sweep = fake.start("sweep", "recipes/toy")
    _, pid = fake.next_started()
    [worker] = fake.workers()
    pidfds = watch(pid, worker)
    for victim in [sweep.pid] if victims == "sweep" else [pid, worker, sweep.pid]:
        os.kill(victim, signal.SIGKILL)
    assert_all_dead(fake, pidfds)
    finish(sweep)
    assert not is_leased(fake.paths("b").lease_path)
    assert main(["sweep", "recipes/toy"]) == 0
    assert [list_starts(fake, name) for name in "ab"] == [
        [("warm", None)],
        [("warm", None), ("warm", None)],
    ]
    assert fake.started() == ["a", "b", "b"]


@pytest.mark.parametrize("words", ["", " elsewhere"])
def test_what_a_child_leaves_is_ended(words: str, fake: FakeLauncher) -> None:
    fake.add("a", told=f"leave{words}")
    fake.add("b", told="wait")
    sweep = fake.start("sweep", "recipes/toy")
    name, left = fake.next_started()
    assert name == "a"
    assert fake.next_started()[0] == "b"
    assert not is_alive(left), "before the next run starts"
    fake.let_go("b")
    assert finish(sweep)[0] == 0
    assert [list_starts(fake, name) for name in "ab"] == [[("warm", None)]] * 2


# --- stops and failures ---


def test_a_stop_while_a_worker_imports_starts_nothing(fake: FakeLauncher) -> None:
    """And the worker is gone before those that run have left."""
    fake.add("a", "b", told="wait")
    fake.tell("worker", "serve\nthen hang")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2")
    pids = dict(fake.next_started() for _ in range(2))
    pidfds, importing = watch(*fake.workers()), os.pidfd_open(pids.pop("worker"))
    sweep.send_signal(signal.SIGINT)
    wait_until_dead(importing)
    [name] = pids
    fake.let_go(name)
    code, _, stderr = finish(sweep)
    assert code == 130 and "`runner sweep recipes/toy --slots 2` continues" in stderr
    assert_all_dead(fake, pidfds)
    assert fake.started() == [name]
    assert not fake.paths("b" if name == "a" else "a").run_dir.exists()


def test_fail_fast_does_not_wait_for_a_worker(fake: FakeLauncher) -> None:
    fake.add("a", "b", told="wait fail crashed boom")
    fake.tell("worker", "serve\nthen hang")
    sweep = fake.start("sweep", "recipes/toy", "--slots", "2", "--fail-fast")
    pids = dict(fake.next_started() for _ in range(2))
    pidfds = watch(pids.pop("worker"))
    [name] = pids
    fake.let_go(name)
    code, _, stderr = finish(sweep)
    assert code == 1 and "1 run was not started because of --fail-fast" in stderr
    assert_all_dead(fake, pidfds)
    assert len(fake.started()) == 1


# --- changes since the imports ---


def run_with_change(
    fake: FakeLauncher, change: Callable[[], object], path: Path
) -> tuple[int, str, str]:
    """The end of a sweep of two runs; the change is made while the first one runs."""
    fake.add("a", told="wait")
    fake.add("b")
    sweep = subprocess.Popen(
        [sys.executable, "-m", "runner", "sweep", "recipes/toy"],
        cwd=fake.root,
        env={**fake.environment, "PYTHONPATH": f"{path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    fake.next_started()
    change()
    fake.let_go("a")
    return finish(sweep)


def test_an_edited_program_is_imported_anew(fake: FakeLauncher) -> None:
    tree = fake.root / "tree"
    shutil.copytree(ROOT / "runner", tree / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    edited = tree / "runner" / "sft" / "train.py"
    code, _, stderr = run_with_change(fake, edited.touch, tree)
    assert code == 0 and f"a new worker starts: {edited} has changed\n" in stderr, stderr
    assert [list_starts(fake, name) for name in "ab"] == [[("warm", None)]] * 2
    assert len(fake.workers()) == 2


def test_a_library_that_is_installed_meanwhile_is_said(fake: FakeLauncher) -> None:
    """The second worker finds it too late: here it says the versions of the first one."""
    info = fake.root / "site" / "trl-999.dist-info"

    def install() -> None:
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 999\n")

    info.parent.mkdir()
    code, _, stderr = run_with_change(fake, install, info.parent)
    assert code == 0, stderr
    assert re.search(r"a new worker starts: trl \S+ -> 999 was installed meanwhile\n", stderr)
    assert re.search(rf"{COLD}it has other versions than the sweep: trl \S+ -> 999\n", stderr)
    assert list_starts(fake, "b") == [("cold", None)] and len(fake.workers()) == 2
    assert fake.attempts("b")[0]["versions"]["trl"] == "999"
