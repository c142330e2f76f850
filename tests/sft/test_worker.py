"""A worker and its children, over real processes and the real messages; the children follow the
tests' script instead of training.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from runner.launch.command import LaunchCommand
from runner.launch.worker import (
    _FOR_IMPORTS,
    ForkedProcess,
    Imports,
    Worker,
    WorkerError,
    WorkerKey,
)
from runner.processes import find_processes_of, kill_processes_of
from runner.recipe.identity import list_library_versions
from runner.run.lease import Lease, is_leased
from runner.sft.worker import MAX_CHILDREN
from tests.conftest import ROOT, build_environment
from tests.support.fake_launcher import BIN_DIR, PATIENCE_SECONDS, wait_until_dead
from tests.support.local_slurm import wait_until

# The run directory that it is asked to train is Python source, which the child executes.
WORKER: Final = f"""\
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from runner.sft.worker import serve, take_control
exec(os.environ.get("TOLD", ""))
code = serve(take_control(), {{"versions": json.loads(os.environ["VERSIONS"]), "why_not": None}})
if code is not None:
    exec(code)
    sys.stdout.flush()
os._exit(0)
"""
READY: Final = "import signal; print('ready', flush=True); signal.pause()"


@dataclass
class Child:
    """A forked process, and its output, which is complete once all its descendants have ended."""

    process: ForkedProcess
    pidfd: int
    _output: int

    def read_line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._output], [], [], PATIENCE_SECONDS)[0], "it says nothing"
            byte = os.read(self._output, 1)
            assert byte, "it has ended"
            line += byte
        return line.decode()

    def wait_for_end(self) -> None:
        """Wait until it and its descendants have ended, without reading its exit status."""
        wait_until_dead(self.pidfd)
        assert select.select([self._output], [], [], PATIENCE_SECONDS)[0], "it lives on"
        assert os.read(self._output, 1) == b"", "it prints more"


@dataclass
class Pair:
    """A worker, and a separate lease for each child."""

    worker: Worker
    folder: Path
    _num_children: int = 0
    _descriptors: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.worker.popen.pid

    @property
    def owner(self) -> str:
        return f"1.2@{self.folder}/of süße runs:3"

    def lease_path(self, number: int) -> Path:
        return self.folder / str(number) / "lease"

    def fork(self, code: str, owner: str | None = None) -> Child:
        readable, writable = os.pipe()
        self._descriptors.append(readable)
        self._num_children += 1
        lease = Lease(self.lease_path(self._num_children))
        assert lease.try_acquire()
        try:
            process = self.worker.fork(
                Path(textwrap.dedent(code)), owner or self.owner, lease.fileno(), writable
            )
        finally:  # from now on the child alone has them
            lease.close()
            os.close(writable)
        self._descriptors.append(process.open_pidfd())
        return Child(process, self._descriptors[-1], readable)

    def close(self) -> None:
        self.worker.end()
        for descriptor in self._descriptors:
            os.close(descriptor)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Start a worker; `told` is executed before it serves."""
    pairs: list[Pair] = []
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def start_one(told: str = "") -> Pair:
        key = WorkerKey((sys.executable, "-IS", str(script)), (), Imports("", ()))
        versions = json.dumps(list_library_versions())
        environment = {"TOLD": textwrap.dedent(told), "VERSIONS": versions}
        command = LaunchCommand((), environment)
        worker = Worker.start(key, command)
        pairs.append(Pair(worker, tmp_path))
        assert select.select([worker], [], [], PATIENCE_SECONDS)[0]
        worker.begin()
        return pairs[-1]

    yield start_one
    for pair in pairs:
        pair.close()


def list_files(pid: int) -> dict[str, str]:
    """The files that a process has open, by the number of the descriptor."""
    files = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            files[path.name] = os.readlink(path)
    return files


def test_a_child_is_a_process_like_one_that_was_started_for_the_run_alone(
    start: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    monkeypatch.delenv("JE_ARROW_MALLOC_CONF", raising=False)
    pair = start()
    earlier = pair.fork(READY)
    earlier.read_line()
    child = pair.fork("""
        import json, os, signal
        print(json.dumps({"session": os.getsid(0), "environment": dict(os.environ)}), flush=True)
        signal.pause()
    """)
    said, pid = json.loads(child.read_line()), child.process.pid
    assert (said["session"], os.getpgid(pid)) == (pid, pid)
    files = list_files(pid)
    assert set(files) == {"0", "1", "2"}, "no lease of another, no socket"
    assert files["0"] == str(pair.lease_path(2)), "and its own as stdin"
    assert files["1"] == files["2"] != list_files(earlier.process.pid)["1"]
    assert said["environment"]["RUNNER_OWNER"] == pair.owner
    assert said["environment"]["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0", "as it is for the sweep"
    assert "JE_ARROW_MALLOC_CONF" not in said["environment"]


def test_the_imports_start_no_thread_and_touch_no_gpu(
    start: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    entries = Path(f"/proc/{start().pid}/environ").read_text().split("\0")
    assert "JE_ARROW_MALLOC_CONF=background_thread:false" in entries
    assert "PYTORCH_NVML_BASED_CUDA_CHECK=1" in entries


def test_a_lease_is_free_once_the_child_that_has_it_is_gone(start: Callable[..., Pair]) -> None:
    pair = start()
    child = pair.fork(READY)
    child.read_line()
    assert is_leased(pair.lease_path(1)), "it alone holds it"
    child.process.signal_group(signal.SIGKILL)
    assert child.process.wait() == -signal.SIGKILL
    assert not is_leased(pair.lease_path(1)) and pair.worker.is_alive()
    numbers = set(list_files(pair.pid))
    assert len(numbers) == 4 and numbers > {"0", "1", "2"}, "and the socket"


def test_the_processes_of_a_child_are_found_by_its_owner_and_no_others(
    start: Callable[..., Pair],
) -> None:
    pair = start()
    owner, other_owner = pair.owner, f"{pair.owner}1"
    before = Path(f"/proc/{pair.pid}/environ").read_bytes()
    assert find_processes_of(owner.__eq__) == []
    child = pair.fork("""
        import os, signal, subprocess
        if (forked := os.fork()) == 0:
            signal.pause()
        executed = subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
        print(os.getpid(), forked, executed, flush=True)
        signal.pause()
    """)
    pids = sorted(map(int, child.read_line().split()))
    assert find_processes_of(owner.__eq__) == pids
    assert find_processes_of(lambda found: found.startswith(owner)) == pids, "whole, and no more"
    assert Path(f"/proc/{pair.pid}/environ").read_bytes() == before
    assert kill_processes_of(owner.__eq__) == 3
    child.wait_for_end()
    other = pair.fork(READY, owner=other_owner)
    other.read_line()
    assert find_processes_of(owner.__eq__) == []
    assert find_processes_of(other_owner.__eq__) == [other.process.pid]


def test_an_owner_for_whom_there_is_no_room_ends_the_child(start: Callable[..., Pair]) -> None:
    child = start().fork(READY, owner="o" * 5000)
    wait_until_dead(child.pidfd)
    assert child.process.wait() == 1


@pytest.mark.parametrize("ends", ["killed", "let go", "let go without a child"])
def test_nothing_outlives_a_worker(ends: str, start: Callable[..., Pair]) -> None:
    pair = start()
    child = None if ends == "let go without a child" else pair.fork(READY)
    if child is not None:
        child.read_line()
    if ends == "killed":
        os.kill(pair.pid, signal.SIGKILL)
    else:
        pair.worker.control.close()
    status = pair.worker.popen.wait(PATIENCE_SECONDS)
    assert status == (-signal.SIGKILL if ends == "killed" else 0)
    if child is not None:
        child.wait_for_end()
        assert not is_leased(pair.lease_path(1))
    if ends == "killed" and child is not None:
        assert child.process.wait() is None, "no process is left that knows"
        assert pair.worker.is_worn


def test_a_worker_whose_answer_nobody_reads_is_let_go(start: Callable[..., Pair]) -> None:
    """The kernel resets its connection to a sweep that was killed before it had read everything."""
    pair = start()
    with (pair.folder / "lease").open("w") as lease:
        request = {"run_dir": READY, "owner": pair.owner, "environment": {}}
        message = json.dumps(request).encode()
        socket.send_fds(pair.worker.control, [message], [lease.fileno(), lease.fileno()])
        assert select.select([pair.worker], [], [], PATIENCE_SECONDS)[0], "it has answered"
    pair.worker.control.close()
    assert pair.worker.popen.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import os; os._exit(3)", 3),
        ("raise SystemExit(7)", 7),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_the_status_of_a_child_is_told(code: str, status: int, start: Callable[..., Pair]) -> None:
    pair = start()
    child = pair.fork(code)
    assert child.process.wait() == status
    assert not pair.worker.is_worn


def test_what_a_child_leaves_in_its_group_ends_with_it(start: Callable[..., Pair]) -> None:
    child = start().fork("import subprocess; subprocess.Popen(['sleep', '1000'])")
    assert child.process.wait() == 0
    child.wait_for_end()


def test_a_worker_is_worn_after_so_many_children(start: Callable[..., Pair]) -> None:
    pair = start()
    worn = []
    for _ in range(MAX_CHILDREN):
        child = pair.fork("pass")
        assert child.process.wait() == 0
        worn.append(pair.worker.is_worn)
    assert worn == [False] * (MAX_CHILDREN - 1) + [True]


@pytest.mark.parametrize(
    ("grown", "is_worn"),
    [
        ("b'x' * int(0.3 * size)", False),
        ("b'x' * int(0.7 * size)", True),
        ("threading.Thread(target=signal.pause, daemon=True).start()", True),
    ],
)
def test_a_worker_is_worn_when_it_has_grown(
    grown: str, is_worn: bool, start: Callable[..., Pair]
) -> None:
    pair = start(f"""
        import os, signal, threading
        kept = []

        def grow():
            size = 4096 * int(open("/proc/self/statm").read().split()[1])
            kept.append({grown})

        os.register_at_fork(after_in_parent=grow)
    """)
    child = pair.fork("pass")
    assert child.process.wait() == 0
    assert pair.worker.is_worn is is_worn


def test_a_worker_that_cannot_fork_says_why_and_keeps_no_lease(
    start: Callable[..., Pair],
) -> None:
    pair = start("""
        import os

        def fork():
            raise BlockingIOError(11, "Resource temporarily unavailable")

        os.fork = fork
    """)
    for number in (1, 2):
        with pytest.raises(OSError, match=r"^\[Errno 11\] Resource temporarily unavailable$"):
            pair.fork("pass")
        assert not is_leased(pair.lease_path(number))


def test_a_worker_that_has_ended_forks_nothing(start: Callable[..., Pair]) -> None:
    pair = start()
    os.kill(pair.pid, signal.SIGKILL)
    pair.worker.popen.wait()
    assert not pair.worker.is_alive() and pair.worker.find_change() == "it has ended"
    with pytest.raises(OSError):
        pair.fork("pass")


def test_a_worker_with_other_versions_is_refused(start: Callable[..., Pair]) -> None:
    """An upgrade between the sweep's look and the worker's imports."""
    with pytest.raises(WorkerError, match=r"other versions than the sweep: .*torch absent -> \d"):
        start("os.environ['VERSIONS'] = '{}'")


HIDDEN: Final = ("wandb", "bitsandbytes", "deepspeed", "scipy", "matplotlib")
# What the state of a process is after the imports: of accelerate, of torch, and settings of a run.
AFTER_IMPORTS: Final = f"""\
import gc, json, weakref
from runner.sft.worker import _import
versions, why_not = _import({HIDDEN!r})
gc.unfreeze()
import accelerate.state, torch, transformers
from transformers.conversion_mapping import _checkpoint_conversion_mapping_cache as architectures
print(json.dumps({{
    "why_not": why_not,
    "state": list(accelerate.state.PartialState._shared_state),
    "cuda": torch.cuda.is_initialized(),
    "settings": sum(issubclass(type(one), transformers.TrainingArguments)
                    for one in gc.get_objects()),
    "left for the end": sum(one.atexit for one in weakref.finalize._registry),
    "knows architectures": bool(architectures),
}}))
"""


@pytest.mark.slow
def test_the_imports_leave_nothing_that_a_fork_does_not_survive() -> None:
    """One thread, also where NumPy and torch may use two; nothing open; no state of a run."""
    path = str(ROOT / "accelerate_configs" / "cpu.yaml")
    launch = (str(BIN_DIR / "accelerate"), "launch", "--config_file", path)
    key = WorkerKey((*launch, "--num_processes", "1"), (), Imports("", HIDDEN))
    worker = Worker.start(key, LaunchCommand((), build_environment({"OMP_NUM_THREADS": "2"})))
    try:
        assert select.select([worker], [], [], 300)[0]
        worker.begin()
        children = Path(f"/proc/{worker.popen.pid}/task/{worker.popen.pid}/children").read_text()
        [pid] = map(int, children.split())
        assert len(os.listdir(f"/proc/{pid}/task")) == 1
        # The one that it has just sent is closed next.
        wait_until(lambda: "anon_inode:[pidfd]" not in list_files(pid).values(), "it is closed")
        files = list_files(pid)
        stdin, _, _ = (files.pop(number) for number in "012")
        assert stdin == os.devnull
        # NVML, which counts the GPUs for torch, survives a fork; what CUDA opens does not.
        others = {name for name in files.values() if not name.startswith("/dev/nvidia")}
        assert len(others) == 1 and others.pop().startswith("socket:")
        assert not any(name.startswith("/dev/nvidia-uvm") for name in files.values())
    finally:
        worker.end()
    looked = subprocess.run(
        [sys.executable, "-c", AFTER_IMPORTS],
        env=build_environment({"OMP_NUM_THREADS": "2", **_FOR_IMPORTS}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said = json.loads(looked.stdout)
    assert said == {
        "why_not": None,
        "state": [],
        "cuda": False,
        "settings": 0,
        "left for the end": 0,  # otherwise each child does it too at its exit
        "knows architectures": True,  # otherwise each child builds the table of them
    }
