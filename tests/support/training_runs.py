"""Starts, kills and compares real runs; shared by the slow tests."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from runner.files import load_json, load_jsonl, write_json_atomic, write_text_atomic
from runner.run.paths import RunPaths
from runner.run.result import TrainResult
from tests.conftest import RUNNER, Project, build_environment

DEADLINE_SECONDS: Final = 600
DEATH_SECONDS: Final = 60.0  # for a process to follow its parent on a busy machine

# The uninterrupted runs that the slow tests read and compare with, all of one process on the CPU.
# 22 rows in micro-batches of 2 and global batches of 4: the last batch of an epoch is
# incomplete.
RUNS: Final[dict[str, tuple[str, ...]]] = {
    "gemma-lora": ("adapter.lora_dropout=0.1", "training.num_train_epochs=2.5"),
    # An added pad token: the embedding, tied in Gemma, gets a row.
    "gemma-full": (
        "adapter.method=none",
        "loss=full",
        "training.learning_rate=1e-3",
        "model.pad_token=add",
    ),
    # The worst checkpoint instead of the best: the export differs from the weights in memory after
    # the last step. Its added pad token grows both embeddings, which are saved with the adapter.
    "llama-lora": (
        "model.path=models/llama",
        "model.pad_token=add",
        "checkpoints.mode=max",
        "evaluation.per_device_eval_batch_size=1",
    ),
    "llama-early": (
        "model.path=models/llama",
        "adapter.method=none",
        "data.num_train_samples=8",  # few rows and a high learning rate: overfits immediately
        (
            "training={max_steps: 40, num_train_epochs: null, learning_rate: 1e-2,"
            " lr_scheduler_type: constant}"
        ),
        "early_stopping={enabled: true, metric: nll_per_completion_token, patience: 3}",
        "evaluation.eval_steps=2",
        "checkpoints={save_steps: 2, keep_latest: 1}",
    ),
    "mistral-full": (
        "model.path=models/mistral",
        "adapter.method=none",
        "data.num_train_samples=44",
        "checkpoints.archive=zip",
    ),
    "gemma2-lora": (
        "model.path=models/gemma2",
        "evaluation.eval_strategy=epoch",
        "evaluation.eval_steps=null",
    ),
    # Phi has neither template nor pad token; Ā is the byte 0.
    "phi-full": (
        "model.path=models/phi",
        "model.chat_template=human.jinja",
        "model.pad_token=Ā",
        "adapter.method=none",
        "evaluation.generation={enabled: true, max_new_tokens: 4, num_samples: 5, batch_size: 2}",
    ),
}
FAMILIES: Final = ("gemma", "gemma2", "llama", "mistral", "phi")
_HUMAN_TEMPLATE: Final = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' %}{{- 'Human: ' ~ message['content'] ~ '\\n' }}
    {%- else %}{{- 'Assistant: ' ~ message['content'] ~ eos_token ~ '\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif -%}
"""

# Runs inside training: SIGKILL for its launcher and itself right before the n-th file operation of
# a kind. Python's audit events come before the operation, so the instant is exact and nothing of
# the runner is replaced. If a rank is given, only that rank dies.
_KILLER: Final = """\
import itertools, os, signal, sys

event, suffix, nth, rank = os.environ["KILL_AT"].split(" ")
counts = itertools.count(1)

def _is_meant(name, arguments):
    if "runner.sft" not in sys.orig_argv or rank not in ("all", os.environ.get("RANK", "0")):
        return False
    paths = [str(one) for one in arguments if isinstance(one, (str, os.PathLike))]
    if event == "*":
        return any(part in path for part in suffix.split("|") for path in paths)
    return name == event and any(path.endswith(suffix) for path in paths)

def _hook(name, arguments):
    if _is_meant(name, arguments) and next(counts) == int(nth):
        if rank == "all":
            os.kill(os.getppid(), signal.SIGKILL)  # the launcher; other ranks die with it
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(_hook)
"""


def sweep_runs(project: Project) -> None:
    """Bring all of `RUNS` to completion, two at a time."""
    add_what_runs_need(project)
    for name, overrides in RUNS.items():
        project.write_recipe(f"recipes/{name}.yaml", *overrides)
    result = project.cli("sweep", "recipes", "--slots", "2")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def add_what_runs_need(project: Project) -> None:
    """Add the models and the chat template that recipes of `RUNS` name."""
    for family in FAMILIES:
        project.add_model(family)
    write_text_atomic(project.root / "human.jinja", _HUMAN_TEMPLATE)


def launch(
    project: Project,
    name: str,
    *overrides: str,
    num_processes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunPaths:
    """Launch a run to its end under a name, and demand that it completes.

    Two workers of pytest-xdist may want the same run: the second one waits and finds it complete.
    """
    with alone_with(project, name):
        result = try_launch(
            project, name, *overrides, num_processes=num_processes, environment=environment
        )
    assert result.returncode == 0, (
        f"{result.stdout}\n{result.stderr}\n{read_log(project.paths(name))}"
    )
    assert load_json(project.paths(name).result_path)["outcome"] == "completed"
    return project.paths(name)


@contextmanager
def alone_with(project: Project, name: str) -> Iterator[None]:
    """Keeps other workers of pytest-xdist, which may share the project, from the same runs."""
    locks_dir = project.root / "locks"
    locks_dir.mkdir(exist_ok=True)
    with (locks_dir / name).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def try_launch(
    project: Project,
    name: str,
    *overrides: str,
    num_processes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Launch a run that may fail."""
    return project.cli(*launch_arguments(name, overrides, num_processes), environment=environment)


def launch_arguments(
    name: str, overrides: tuple[str, ...], num_processes: int | None = None
) -> list[str]:
    """Arguments of `runner` for one run under its own name. If overrides repeat a key, the last one
    counts here; `runner` refuses them.
    """
    overrides = tuple({one.partition("=")[0]: one for one in overrides}.values())
    processes = [] if num_processes is None else ["--num-processes", str(num_processes)]
    return ["launch", "recipe.yaml", *overrides, "--name", name, *processes]


def launch_killed_at(
    project: Project,
    name: str,
    *overrides: str,
    event: str,
    path: str,
    number: int = 1,
    num_processes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunPaths:
    """Launch a run whose processes are all killed the `number`-th time that `event` is about to
    touch a file whose path ends in `path`.
    """
    at = f"{event} {path} {number}"
    result = try_launch_killed_at(
        project, name, *overrides, at=at, num_processes=num_processes, environment=environment
    )
    paths = project.paths(name)
    assert result.returncode == 14 and not paths.result_path.exists(), read_log(paths)
    assert load_json(paths.record_path)["attempts"][-1]["failure"]["kind"] == "lost"
    return paths


def try_launch_killed_at(
    project: Project,
    name: str,
    *overrides: str,
    at: str,
    rank: str = "all",
    num_processes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `launch_killed_at`, without a check of the outcome; `at` is `event path number`.

    The event `*` is any event on a path that contains one of the parts of `path`, which are
    separated by `|`. If `rank` is given, only that rank is killed.
    """
    arguments = launch_arguments(name, overrides, num_processes)
    return run_killed_at(project, *arguments, at=at, rank=rank, environment=environment)


def run_killed_at(
    project: Project,
    *arguments: str,
    at: str,
    rank: str = "all",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`runner ARGUMENTS`, where the processes of an attempt are killed as in
    `try_launch_killed_at`.
    """
    hook_dir = project.root / "killer"
    hook_dir.mkdir(exist_ok=True)
    (hook_dir / "sitecustomize.py").write_text(_KILLER)
    environment = {
        **(environment or {}),
        "KILL_AT": f"{at} {rank}",
        "PYTHONPATH": f"{hook_dir}:{os.environ.get('PYTHONPATH', '')}",
    }
    return project.cli(*arguments, environment=environment)


@contextmanager
def started(project: Project, name: str, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """A launched run while it runs; what is left of it is killed at the end."""
    with started_by(project, *launch_arguments(name, overrides)) as process:
        yield process


@contextmanager
def started_by(project: Project, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`runner ARGUMENTS` while it runs; what is left of it is killed at the end."""
    process = subprocess.Popen(
        [str(RUNNER), *arguments],
        cwd=project.root,
        env=build_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a runner; returns when all that it started has died with it."""
    pidfds = open_descendants(process.pid) if process.poll() is None else []
    process.kill()
    process.wait()
    assert_dies(pidfds)


def wait_for_path(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file exists; it is an error if the process ends first."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert process.poll() is None, f"the run ended before {path} was written"
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.002)


def list_descendants(pid: int) -> list[int]:
    """Process ids of the children, their children and so on, the nearest first; none of a process
    that has ended meanwhile.
    """
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return children + [below for child in children for below in list_descendants(child)]


def open_descendants(pid: int) -> list[int]:
    """A pidfd of each descendant that is alive, for the caller to close."""
    pidfds = []
    for descendant in list_descendants(pid):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            pidfds.append(os.pidfd_open(descendant))
    return pidfds


def assert_dies(pidfds: list[int]) -> None:
    """Wait for processes that nobody signalled to be gone, and close their pidfds."""
    deadline = time.monotonic() + DEATH_SECONDS
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0], (
            "a process outlived its launcher"
        )
        os.close(pidfd)


def kill_launcher(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the runner alone; everything below it must follow by itself."""
    pidfds = open_descendants(process.pid)
    assert len(pidfds) >= 2, "accelerate and the trainer"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_dies(pidfds)


def outputs_of(paths: RunPaths) -> dict[str, bytes]:
    """Every file that must be equal, byte by byte, in an interrupted and an uninterrupted run; the
    result without the checksum of `recipe.json`, which holds the run's name.
    """
    result = load_json(paths.result_path)
    result.pop("result_sha256", None)
    (result.get("files") or {}).pop("recipe.json", None)
    single = [paths.metrics_path, paths.eval_rows_path, paths.samples_path]
    single += [paths.predictions_path] if paths.predictions_path.exists() else []
    return {"result.json": json.dumps(result).encode()} | {
        str(path.relative_to(paths.run_dir)): path.read_bytes()
        for path in [*single, *list_files(paths.model_dir)]
    }


def assert_same_outputs(paths: RunPaths, reference: RunPaths) -> None:
    """Compare `outputs_of` two runs."""
    found, expected = outputs_of(paths), outputs_of(reference)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file of a folder."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in list_files(folder)}


def list_files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forget_end(paths: RunPaths) -> None:
    """Restore the record from before the last attempt ended."""
    content = load_json(paths.record_path)
    content["attempts"][-1] |= {"ended_at_utc": None, "exit_status": None}
    write_json_atomic(paths.record_path, content)


def read_result(paths: RunPaths) -> TrainResult:
    """The parsed `result.json`."""
    return TrainResult.model_validate(load_json(paths.result_path))


def read_losses(paths: RunPaths) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in load_jsonl(paths.metrics_path) if "loss" in row}


def read_evaluations(paths: RunPaths, split: str = "validation") -> dict[int, dict[str, Any]]:
    """Rows of `metrics.jsonl` with the scores of a split, by step."""
    return {row["step"]: row for row in load_jsonl(paths.metrics_path) if row.get("split") == split}


def read_log(paths: RunPaths) -> str:
    """The log of the last attempt."""
    attempts = (load_json(paths.record_path) or {"attempts": []})["attempts"]
    if not attempts:
        return "(no attempt)"
    return paths.attempt(attempts[-1]["number"]).log_path.read_text()


def read_attempts(paths: RunPaths) -> list[dict[str, Any]]:
    """The attempts of a run."""
    attempts: list[dict[str, Any]] = json.loads(paths.record_path.read_text())["attempts"]
    return attempts
