"""An attempt that is asked to stop: its moment, its message, and the files that it does not touch.
Real processes and signals.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner.errors import PreemptedError
from runner.files import load_json, write_json_atomic
from runner.run.paths import RunPaths
from runner.run.record import StopRequest
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace

# One rank: reports that it listens, and follows its script, line by line, until it is ended.
RANK = """\
import json, os, sys, threading
from pathlib import Path
from runner.run.paths import RunPaths
from runner.files import write_json_atomic
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace

paths, rank = RunPaths(Path(sys.argv[1])), int(sys.argv[2])
place = WorldPlace.read({**os.environ, "RANK": sys.argv[2], "WORLD_SIZE": sys.argv[3]})
preemption = Preemption(paths, 3, place)
preemption.listen(
    lambda failure: write_json_atomic(paths.attempt(3).failure_path(rank), failure.model_dump())
)
print("listening", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
BUSY_IN_C = "import ctypes; print('busy', flush=True); ctypes.CDLL(None).sleep(1000)"


class Rank:
    """Such a process."""

    def __init__(self, run_dir: Path, rank: int = 0, num_processes: int = 1) -> None:
        self.paths, self.number = RunPaths(run_dir), rank
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(run_dir), str(rank), str(num_processes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.expect("listening")

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == line

    def tell(self, line: str, answer: str = "done") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.expect(answer)

    def failure(self) -> tuple[str, str]:
        """Kind and message that it left, once it has ended."""
        self.process.wait(60)
        content = load_json(self.paths.attempt(3).failure_path(self.number))
        return content["kind"], content["message"]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_outside_training_it_leaves_at_once_also_from_inside_a_library(
    number: signal.Signals, tmp_path: Path
) -> None:
    rank = Rank(tmp_path)
    rank.tell(BUSY_IN_C, "busy")
    rank.process.send_signal(number)
    assert rank.failure() == (
        "preempted",
        f"{number.name} on rank 0: stopped outside training, so there was nothing to save",
    )
    assert rank.process.returncode == 1
    rank.end()


def test_the_stop_file_asks_the_attempt_that_it_names_and_rank_0_alone_looks(
    tmp_path: Path,
) -> None:
    paths = RunPaths(tmp_path)
    write_json_atomic(paths.stop_path, StopRequest(attempt=2, why="stale").model_dump())
    ranks = [Rank(tmp_path, rank, 2) for rank in (0, 1)]
    for rank in ranks:
        rank.tell("preemption.needs_peers = False")
    for text in ("", "{", '{"attempt": "three"}'):
        paths.stop_path.write_text(text)
    write_json_atomic(paths.stop_path, StopRequest(attempt=3, why="enough").model_dump())
    assert ranks[0].failure()[1].startswith("enough: stopped outside training")
    ranks[1].tell("pass")
    assert ranks[1].process.poll() is None
    for rank in ranks:
        rank.end()


def test_inside_training_it_stays_until_the_end_of_the_step(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.tell("preemption.begin_training()")
    rank.tell("print(preemption.agree(None))", "False")
    rank.expect("done")
    rank.process.send_signal(signal.SIGUSR1)
    rank.tell("while preemption._asked_by is None: threading.Event().wait(0.01)")
    rank.tell("print(preemption.agree(None))", "True")
    rank.expect("done")
    assert rank.process.stdin is not None
    rank.process.stdin.write("preemption.end_training(7)\n")
    rank.process.stdin.flush()
    _, stderr = rank.process.communicate()
    assert "PreemptedError: SIGUSR1 on rank 0: stopped at step 7, which is saved" in stderr
    assert not rank.paths.attempt(3).attempt_dir.exists(), "the caller records it"


def test_training_that_ends_by_itself_while_it_is_asked_leaves_too(tmp_path: Path) -> None:
    preemption = Preemption(RunPaths(tmp_path), 1, WorldPlace())
    preemption.begin_training()
    preemption.end_training(4)
    preemption.begin_training()
    preemption._asked_by = "SIGTERM on rank 0"
    with pytest.raises(
        PreemptedError, match="SIGTERM on rank 0: stopped at step 4, which is saved"
    ):
        preemption.end_training(4)


def test_a_process_that_fails_by_itself_is_left_to_say_so(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.tell("preemption.ignore()")
    rank.process.send_signal(signal.SIGTERM)
    rank.tell("while preemption._asked_by is None: threading.Event().wait(0.01)")
    rank.tell("threading.Event().wait(1)")
    assert rank.process.poll() is None
    rank.end()


def test_a_launcher_that_ends_the_rest_after_a_kill_is_no_preemption(tmp_path: Path) -> None:
    """torchrun sends TERM to the other ranks when one is gone; a rank that was killed from outside
    is lost, not preempted.
    """
    launcher = f"""\
import os, signal, subprocess, sys
command = [sys.executable, "-c", {RANK!r}, {str(tmp_path)!r}]
environment = {{**os.environ, "LOCAL_WORLD_SIZE": "2"}}
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
ranks = [subprocess.Popen([*command, str(rank), "2"], **pipes) for rank in (0, 1)]
for rank in ranks:
    assert rank.stdout.readline() == "listening\\n"
if sys.argv[1] == "training":
    ranks[0].stdin.write("preemption.begin_training()\\n")
    ranks[0].stdin.flush()
    assert ranks[0].stdout.readline() == "done\\n"
if sys.argv[2] == "killed":
    ranks[1].kill()
    ranks[1].wait()
ranks[0].terminate()
assert ranks[0].wait(60) == 1
ranks[1].kill()
"""
    expected = {"killed": "lost", "alive": "preempted"}
    for where, peer in (("training", "killed"), ("loading", "killed"), ("loading", "alive")):
        subprocess.run([sys.executable, "-c", launcher, where, peer], check=True)
        failure_path = RunPaths(tmp_path).attempt(3).failure_path(0)
        found = load_json(failure_path)
        assert found["kind"] == expected[peer] and found["has_lost_peer"] == (peer == "killed"), (
            where,
            found,
        )
        failure_path.unlink()


def test_children_do_not_speak_for_their_parent(tmp_path: Path) -> None:
    """A data loader's worker is ended by TERM. The wake-up pipe of the training process, which it
    inherits, must not get the signal.
    """
    rank = Rank(tmp_path)
    rank.tell("import signal; work = lambda: signal.raise_signal(signal.SIGTERM)")
    rank.tell(
        "import multiprocessing; child = multiprocessing.get_context('fork').Process(target=work)"
    )
    rank.tell("child.start(); child.join(); print(child.exitcode)", "-15")
    rank.expect("done")
    rank.tell("threading.Event().wait(1)")
    assert rank.process.poll() is None
    rank.end()


def test_listening_needs_nothing_heavy() -> None:
    code = "import runner.sft.preemption, sys; print(json.dumps([name for name in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "accelerate", "numpy"} & set(json.loads(result.stdout))
