"""A folder from which `runner` is started, with an `accelerate` on PATH that follows a test's
script instead of training.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from runner.recipe.identity import list_library_versions
from runner.run.paths import RunPaths, content_cache_path
from tests.conftest import ROOT

BIN_DIR: Final = Path(sys.executable).parent
PATIENCE_SECONDS: Final = 60.0

RECIPE: Final = """\
run: {{grid: toy, name: {name}, axes: {{size: {size}}}}}
model: {{path: models/toy, dtype: float32}}
adapter: {{method: none}}
quantization: {{method: none}}
data:
  train: {{path: data.jsonl}}
  task: {{name: conversations}}
  num_validation_samples: 1
  num_test_samples: 1
  seed: 1
  max_length: 64
loss: full
training:
  {{seed: 1, global_batch_size: 4, per_device_train_batch_size: {micro_batch}, max_steps: 2,
    gradient_checkpointing: false}}
evaluation: {{eval_strategy: "no", per_device_eval_batch_size: 1}}
early_stopping: {{enabled: false}}
checkpoints: {{save_strategy: "no"}}
launch:
  accelerate_config: cpu.yaml
  num_processes: {num_processes}
  num_cpu_threads_per_process: 1
  stall_minutes: {stall_minutes}
  retries: {{{retries}}}
"""

# `told/<run name>` is the script of a run: a verb and its words. Those of the next attempt follow
# `then` on a new line; the last ones apply to all later attempts. Without a script a run completes.
# A prefix moves the verb: `phase NAME` into a phase, `stepped` after a step, `committed` after a
# checkpoint. `told/worker` is the script of its workers, one after the other: `serve`, or a fault.
ACCELERATE: Final = """\
#!{python} -IS
import faulthandler, hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

home = Path(os.environ["FAKE_HOME"])


def is_worker():
    return "runner.sft.worker" in sys.argv


if is_worker():
    sys.path.insert(0, {source!r})
    from runner.sft.worker import serve, take_control

    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    with open(home / "workers", "a") as stream:
        stream.write(f"{{os.getpid()}}\\n")
    number = (home / "workers").read_text().split().index(str(os.getpid())) + 1
    told_path = home / "told" / "worker"
    lines = told_path.read_text().split("\\nthen ") if told_path.exists() else ["serve"]
    told, why_not = lines[min(number, len(lines)) - 1], None
    if told in ("hang", "wait"):  # it imports, for ever or until the test opens the pipe
        with open(home / "started", "w") as stream:
            stream.write(f"worker {{os.getpid()}}\\n")
        signal.pause() if told == "hang" else open(home / "go" / "worker").read()
    elif told.startswith("exit"):
        sys.exit(told.removeprefix("exit "))
    elif told == "cannot fork":
        def fork():
            raise BlockingIOError(11, "Resource temporarily unavailable")

        os.fork = fork
    elif told == "die":
        os.fork = lambda: os.kill(os.getpid(), signal.SIGKILL)
    elif told == "grow":
        kept = []
        os.register_at_fork(after_in_parent=lambda: kept.append(b"x" * 2**26))
    elif told == "speak":
        print("the fake imports", *sys.argv[1:], file=sys.stderr)
    elif told != "serve":
        why_not = told
    versions = json.loads(os.environ["FAKE_VERSIONS"])
    served = serve(take_control(), {{"versions": versions, "why_not": why_not}})
    if served is None:
        os._exit(0)
    attempt = json.loads((Path(served) / "run.json").read_text())["attempts"][-1]
    sys.argv[1:] = attempt["command"][1:]


def write_whole(path, content):  # as a trainer does: another sweep may read it at any time
    temporary = path.with_name(f".{{path.name}}.{{os.getpid()}}-0.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


run_dir = Path(sys.argv[-1])
told_path = home / "told" / run_dir.name
number = len(json.loads((run_dir / "run.json").read_text())["attempts"])
lines = told_path.read_text().split("\\nthen ") if told_path.exists() else ["complete"]
verb, _, words = lines[min(number, len(lines)) - 1].partition(" ")
progress_path = run_dir / "attempts" / str(number) / "progress.json"
if verb == "phase":
    phase, verb, words = (*words.split(" ", 2), "")[:3]
    write_whole(progress_path, dict(phase=phase))
if verb == "stepped":
    progress = dict(phase="training", step=1, max_steps=2)
    write_whole(progress_path, progress)
    verb, _, words = words.partition(" ")
if verb == "committed":
    (run_dir / "checkpoints" / f"step-{{number}}").mkdir(parents=True)
    (run_dir / "checkpoints" / f"step-{{number}}" / "COMMITTED.json").write_text("{{}}")
    verb, _, words = words.partition(" ")
HANGING_RANK = (
    "import faulthandler, os, signal, sys\\n"
    "faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)\\n"
    "os.close(int(sys.argv[1]))\\n"
    "def in_a_collective():\\n"
    "    while True: signal.pause()\\n"
    "in_a_collective()"
)

FULL_OF_MEMORY = (  # small pages, which take the longest to return
    "import mmap, time\\n"
    "memory = mmap.mmap(-1, 2**30)\\n"
    "memory.madvise(mmap.MADV_NOHUGEPAGE)\\n"
    "for start in range(0, 2**30, 4096): memory[start] = 1\\n"
    "print(flush=True)\\n"
    "time.sleep(1000)"
)


def has_environment(pid):
    try:
        return (Path("/proc") / str(pid) / "environ").read_bytes() != b""
    except OSError:
        return False


def never_ends():
    while True:
        signal.pause()


lease, stdin = (run_dir / "lease").stat(), os.fstat(0)


def note(event):
    line = json.dumps({{
        "event": event, "name": run_dir.name, "pid": os.getpid(), "argv": sys.argv,
        "environment": dict(os.environ),
        "is_stdin_the_lease": (lease.st_dev, lease.st_ino) == (stdin.st_dev, stdin.st_ino),
    }})
    # In one piece: two fakes may write at the same time, and each may be killed at any time.
    with open(home / "events.jsonl", "ab", buffering=0) as stream:
        stream.write(line.encode() + b"\\n")


def tell_started(pid):
    with open(home / "started", "w") as stream:
        stream.write(f"{{run_dir.name}} {{pid}}\\n")


def write_model():
    contents = {{"model/config.json": b'{{}}', "model/model.safetensors": bytes(range(256)),
                "model/tokenizer.json": run_dir.name.encode()}}
    (run_dir / "model").mkdir(exist_ok=True)
    for name, content in contents.items():
        (run_dir / name).write_bytes(content)
    return {{name: dict(size=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in contents.items()}}


def complete(digest, words=""):
    score = dict(num_rows=1, num_completion_tokens=1, num_tokens=1, num_bytes=1,
                 completion_nll_sum=1.0, nll_sum=1.0)
    result = dict(recipe_digest=digest, outcome="completed", stop_reason="max_steps", num_steps=2,
                  best_step=2, best_metric=1.0, metric="nll_per_completion_token", num_train_rows=1,
                  base={{"test": score}}, tuned={{"test": score}})
    if words == "model":  # with a manifest
        result["files"] = write_model()
        plain = json.dumps(result, sort_keys=True, separators=(",", ":"))
        result["result_sha256"] = hashlib.sha256(plain.encode()).hexdigest()
    write_whole(run_dir / "result.json", result)


digest = json.loads((run_dir / "recipe.json").read_text())["recipe_digest"]
note("start")
print("the fake was told to", verb, words)
if verb == "wait":  # until the test opens the pipe; then what stands behind it, or `complete`
    tell_started(os.getpid())
    open(home / "go" / run_dir.name).read()
    verb, _, words = (words or "complete").partition(" ")
if verb == "complete":
    complete(digest, words)
elif verb == "hang":
    tell_started(os.getpid())
    signal.pause()
elif verb == "stall":  # hangs; with words, a rank in its own session hangs too
    if words:
        readable, writable = os.pipe()
        subprocess.Popen([sys.executable, "-IS", "-c", HANGING_RANK, str(writable)],
                         start_new_session=True, pass_fds=[writable],
                         env={{**os.environ, "RANK": "1"}})
        os.close(writable)
        os.read(readable, 1)  # until the rank handles the signal, too
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    if progress_path.exists():
        progress_path.touch()  # the silence begins here
    tell_started(os.getpid())
    never_ends()
elif verb == "live":  # this number of signs of life, five a second
    tell_started(os.getpid())
    for _ in range(int(words)):
        progress_path.touch()
        time.sleep(0.2)
    complete(digest)
elif verb == "obey":  # the stop file, as training does; with words, it completes nevertheless
    tell_started(os.getpid())
    request = dict(attempt=None)
    while request["attempt"] != number:
        time.sleep(0.01)
        if (run_dir / "stop").exists():
            request = json.loads((run_dir / "stop").read_text())
    if words == "too late":
        complete(digest)
    else:
        message = request["why"] + ": stopped at step 1, which is saved"
        failure = dict(kind="preempted", message=message)
        write_whole(run_dir / "attempts" / str(number) / "failure.json", failure)
elif verb == "leave":  # a process of its group that outlives it, or one that nobody finds
    known = dict(env={{}}) if words == "unknown" else {{}}
    child = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=words != "", **known)
    tell_started(child.pid)
    complete(digest)
elif verb == "die":  # while another process still returns its memory
    child = subprocess.Popen([sys.executable, "-IS", "-c", FULL_OF_MEMORY], stdout=subprocess.PIPE)
    child.stdout.read(1)
    tell_started(child.pid)
    complete(digest)
    child.kill()
    while has_environment(child.pid):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
elif verb == "fail":
    kind, _, message = words.partition(" ")
    failure = dict(kind=kind, message=message)
    write_whole(run_dir / "attempts" / str(number) / "failure.json", failure)
elif verb == "write":  # any text as one of the files of the run
    name, _, text = words.partition(" ")
    (run_dir / name.format(number=number)).write_text(text)
note("end")
sys.exit(int(words) if verb == "exit" else 0)
"""


@dataclass
class FakeLauncher:
    """The folder, and the two pipes through which the fake reports that it runs and is released."""

    root: Path
    _started: int
    _terminal: int = -1

    @property
    def home(self) -> Path:
        return self.root / "fake"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.home}:{BIN_DIR}:{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": path,
            "FAKE_HOME": str(self.home),
            "FAKE_VERSIONS": json.dumps(list_library_versions()),
            "COLUMNS": "200",
        }

    def add(
        self,
        *names: str,
        num_processes: int = 1,
        told: str | None = None,
        retries: str = "transient: 0, lost: 0, stalled: 0",
        micro_batch: int = 1,
        stall_seconds: float | None = None,
    ) -> None:
        """Write recipes `recipes/toy/<name>.yaml`, and the fake's script for each."""
        for name in names:
            path = self.root / "recipes" / "toy" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            known = {
                "num_processes": num_processes,
                "retries": retries,
                "micro_batch": micro_batch,
                "stall_minutes": "null" if stall_seconds is None else stall_seconds / 60,
            }
            path.write_text(RECIPE.format(name=name, size=len(name), **known))
            if told is not None:
                self.tell(name, told)

    def tell(self, name: str, told: str) -> None:
        (self.home / "told" / name).write_text(told)
        pipe = self.home / "go" / name
        if told.startswith("wait") and not pipe.exists():
            os.mkfifo(pipe)

    def paths(self, name: str) -> RunPaths:
        return RunPaths(self.root / "runs" / "toy" / name)

    def start(self, *arguments: str, has_terminal: bool = False) -> subprocess.Popen[str]:
        """Start `runner ARGUMENTS` in its own process, with Ctrl-C as in a terminal."""
        outputs = self._open_terminal() if has_terminal else subprocess.PIPE
        process = subprocess.Popen(
            [str(BIN_DIR / "runner"), *arguments],
            cwd=self.root,
            env=self.environment,
            stdin=outputs if has_terminal else subprocess.DEVNULL,
            stdout=outputs,
            stderr=outputs,
            text=True,
            start_new_session=has_terminal,
            preexec_fn=_take_terminal if has_terminal else _take_signals,
        )
        if has_terminal:
            os.close(outputs)
        return process

    def _open_terminal(self) -> int:
        self._terminal, child_side = pty.openpty()
        return child_side

    def read_terminal(self) -> str:
        """Output since the last call; waits until there is some."""
        assert select.select([self._terminal], [], [], PATIENCE_SECONDS)[0], "nothing was written"
        return os.read(self._terminal, 2**16).decode()

    def close_terminal(self) -> None:
        """Close the terminal, as closing its window does."""
        os.close(self._terminal)

    def next_started(self) -> tuple[str, int]:
        """Run name and process id of the next fake that reports that it runs."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._started], [], [], PATIENCE_SECONDS)[0], (
                "nothing was started"
            )
            line += os.read(self._started, 1)
        name, pid = line.split()
        return name.decode(), int(pid)

    def let_go(self, name: str) -> None:
        """End the wait of a run."""
        (self.home / "go" / name).write_text("")

    def events(self) -> list[dict[str, Any]]:
        path = self.home / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def workers(self) -> list[int]:
        """Process ids of the workers, in the order of their start."""
        path = self.home / "workers"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def started(self) -> list[str]:
        """Names of the started runs, in order."""
        return [event["name"] for event in self.events() if event["event"] == "start"]

    def tree(self) -> Mapping[str, tuple[int, bytes]]:
        """Modification time and content of every file, except the fake's own files and the cache of
        hashes, which every command writes that reads recently changed inputs.
        """
        cache = content_cache_path(self.root / "runs")
        return {
            str(path.relative_to(self.root)): (
                0 if path == cache.parent else path.stat().st_mtime_ns,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in sorted(self.root.rglob("*"))
            if self.home not in path.parents and path != cache
        }

    def attempts(self, name: str) -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = json.loads(self.paths(name).record_path.read_text())[
            "attempts"
        ]
        return attempts


def make_fake_launcher(root: Path) -> FakeLauncher:
    home = root / "fake"
    for folder in (home / "told", home / "go", root / "models" / "toy"):
        folder.mkdir(parents=True)
    script = ACCELERATE.format(python=sys.executable, source=str(ROOT))
    (home / "accelerate").write_text(script)
    (home / "accelerate").chmod(0o755)
    os.mkfifo(home / "started")
    (root / "models" / "toy" / "config.json").write_text("{}")
    (root / "models" / "toy" / "model.safetensors").write_bytes(b"weights")
    (root / "data.jsonl").write_text("{}\n")
    (root / "cpu.yaml").write_text("use_cpu: true\n")
    return FakeLauncher(root, os.open(home / "started", os.O_RDWR | os.O_NONBLOCK))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    """A fake launcher in the current folder; its `accelerate` is the first on PATH, also in this
    process.
    """
    launcher = make_fake_launcher(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "FAKE_HOME", "FAKE_VERSIONS"):
        monkeypatch.setenv(name, launcher.environment[name])
    return launcher


def wait_until_dead(pidfd: int) -> None:
    assert select.select([pidfd], [], [], PATIENCE_SECONDS)[0], "the process is still alive"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that is about to end."""
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, stdout, stderr


def _take_terminal() -> None:
    _take_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _take_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
