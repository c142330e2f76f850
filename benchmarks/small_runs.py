"""Shared by the benchmarks of short fine-tunes: the folder of a small grid, and the CPU seconds of
a whole process tree.

A folder holds a random model, rows, recipes and an accelerate config for the CPU; everything is
built on the spot and needs no network. Nothing here imports torch: a process that measures others
stays small.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from runner.run.paths import RunPaths  # noqa: E402

MICRO_BATCH: Final = 8
NUM_EVAL_ROWS: Final = 32  # of validation, and of test; one batch each
_PR_SET_CHILD_SUBREAPER: Final = 36
_PRCTL: Final = ctypes.CDLL(None, use_errno=True).prctl
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PATIENCE_SECONDS: Final = 60.0

RECIPE: Final = """\
run: {{grid: {grid}, name: {name}, axes: {{}}, schema_version: 1}}
model: {{path: model, dtype: float32, attn_implementation: sdpa}}
adapter: {{method: lora, r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}}
quantization: {{method: none}}
data:
  train: {{path: {grid}.jsonl}}
  task: {{name: conversations}}
  num_train_samples: {num_train}
  num_validation_samples: {num_eval}
  num_test_samples: {num_eval}
  seed: 1
  max_length: 512
loss: {loss}
training:
  seed: {seed}
  global_batch_size: {micro_batch}
  per_device_train_batch_size: {micro_batch}
  max_steps: {num_steps}
  learning_rate: {learning_rate}
  lr_scheduler_type: linear
  optim: adamw_torch
  max_grad_norm: 1.0
  gradient_checkpointing: false
  train_sampling_strategy: sequential
evaluation: {{eval_strategy: "no", per_device_eval_batch_size: {num_eval}}}
early_stopping: {{enabled: false}}
checkpoints: {{save_strategy: "no"}}
launch: {{accelerate_config: cpu.yaml, num_processes: 1, num_cpu_threads_per_process: 1}}
"""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: what differs from the others."""

    loss: str
    learning_rate: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name.

        >>> Cell("full", "1e-3", 2).name
        'full_1e-3_2'
        """
        return f"{self.loss}_{self.learning_rate}_{self.seed}"


@dataclass(frozen=True)
class SmallGrid:
    """A grid of short runs: its name, the words of a prompt and of an answer, and its cells."""

    name: str
    num_prompt_words: tuple[int, int]
    num_answer_words: tuple[int, int]
    cells: tuple[Cell, ...]
    num_steps: int

    @property
    def num_train_rows(self) -> int:
        """As many as the steps see, each once."""
        return self.num_steps * MICRO_BATCH


def list_cells(num_runs: int) -> tuple[Cell, ...]:
    """Full and completion loss in turn, two learning rates, and as many seeds as it takes.

    >>> [cell.name for cell in list_cells(3)]
    ['full_1e-3_1', 'completion_1e-3_1', 'full_2e-3_1']
    """
    cells = [
        Cell(loss, learning_rate, seed)
        for seed in range(1, num_runs // 4 + 2)
        for learning_rate in ("1e-3", "2e-3")
        for loss in ("full", "completion")
    ]
    return tuple(cells[:num_runs])


def list_grids(num_runs: int, num_steps: int) -> tuple[SmallGrid, SmallGrid]:
    """Grid A, rows of about 117 tokens, and grid B, rows of about 30."""
    cells = list_cells(num_runs)
    return (
        SmallGrid("A", (32, 70), (24, 48), cells, num_steps),
        SmallGrid("B", (5, 10), (3, 6), cells, num_steps),
    )


def write_rows(path: Path, count: int, grid: SmallGrid) -> None:
    """Conversations of invented words."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(2500)]
    with path.open("w") as stream:
        for _ in range(count):
            prompt, answer = (
                " ".join(rng.choices(words, k=rng.randint(*bounds)))
                for bounds in (grid.num_prompt_words, grid.num_answer_words)
            )
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


_BUILD_MODEL: Final = """
import json, sys
from pathlib import Path
from runner.demo.plans import ModelShape
from runner.demo.families import build_tokenizer
from runner.demo.weights import build_model
rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
texts = [message["content"] for row in rows for message in row["messages"]]
tokenizer = build_tokenizer("gemma", texts, vocab_size=2048)
model = build_model("gemma", tokenizer, ModelShape(2048, 256, 768, 4, 8, 4))
model.save_pretrained("model")
tokenizer.save_pretrained("model")
print(f"{model.num_parameters() / 1e6:.1f}M parameters, vocabulary {len(tokenizer)}")
"""


def build_folder(folder: Path, grids: Sequence[SmallGrid]) -> str:
    """Fill a folder with the model, and with rows and recipes of each grid; what the model is."""
    (folder / "cpu.yaml").write_bytes((ROOT / "accelerate_configs" / "cpu.yaml").read_bytes())
    for grid in grids:
        num_rows = grid.num_train_rows + 2 * NUM_EVAL_ROWS
        write_rows(folder / f"{grid.name}.jsonl", num_rows, grid)
        write_recipes(folder, grid)
    # The tokenizer, and with it the model, is the same whichever grids are measured.
    write_rows(folder / "vocabulary.jsonl", 144, list_grids(1, 1)[0])
    return run_python(_BUILD_MODEL, folder, "vocabulary.jsonl")


def write_recipes(folder: Path, grid: SmallGrid) -> None:
    """Write `recipes/<grid>/<run>.yaml` of every cell."""
    (folder / "recipes" / grid.name).mkdir(parents=True)
    for cell in grid.cells:
        text = RECIPE.format(
            **asdict(cell),
            grid=grid.name,
            name=cell.name,
            num_train=grid.num_train_rows,
            num_eval=NUM_EVAL_ROWS,
            num_steps=grid.num_steps,
            micro_batch=MICRO_BATCH,
        )
        (folder / "recipes" / grid.name / f"{cell.name}.yaml").write_text(text)


def run_python(code: str, folder: Path, *arguments: str) -> str:
    """The last line that a piece of code prints, run in a process of its own that may import
    torch.
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=build_environment(folder),
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return result.stdout.splitlines()[-1]


def build_environment(folder: Path) -> dict[str, str]:
    """Offline, one thread, output at once, and this checkout's `runner`; the same for everything
    that is measured.
    """
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets_cache"),
    }


def find_run(output_root: Path, grid: SmallGrid, cell: Cell) -> RunPaths:
    """The run directory of one of our runs."""
    return RunPaths(output_root / grid.name / cell.name)


def has_warm_sweeps() -> bool:
    """True if this checkout's sweep starts its runs from a warm worker unless `--cold` is given."""
    argv = [sys.executable, "-m", "runner", "sweep", "--help"]
    shown = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return "--cold" in shown


def build_sweep(
    grid: SmallGrid, output_root: Path, *, is_cold: bool, cells: Sequence[Cell] | None = None
) -> list[str]:
    """`runner sweep` of a grid, or of some of its cells."""
    recipes = [f"recipes/{grid.name}/{cell.name}.yaml" for cell in cells or grid.cells]
    argv = ["runner", "sweep", *recipes, "--output-root", str(output_root)]
    return [*argv, "--cold"] if is_cold and has_warm_sweeps() else argv


@dataclass(frozen=True)
class Usage:
    """Seconds of a whole process tree."""

    cpu_seconds: float
    wall_seconds: float


def measure(
    argv: Sequence[str],
    folder: Path,
    log_path: Path,
    watch: Callable[[int], object] | None = None,
) -> Usage:
    """Seconds of a command and of everything that it starts: user and system time of all processes
    that have ended when it is over, also of those whose parents went before them.

    A small process starts the command as their subreaper (`prctl(2)`), waits until none is left,
    and reads `RUSAGE_CHILDREN`. Only a process whose parent ignores SIGCHLD would be missed.
    `watch` is called with its id again and again while the command runs.

    Raises:
        SystemExit: the command failed, or left a process alive for a minute.
    """
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            outcome = _supervise(argv, folder, log_path)
            os.write(writer, json.dumps(outcome).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if watch is not None:
                watch(pid)
            time.sleep(0.005 if watch is not None else 0.05)
        text = stream.read()
    wall_seconds = time.monotonic() - started
    outcome = json.loads(text) if text else {"status": "no report of the process that watched it"}
    if outcome["status"] != 0:
        tail = log_path.read_text(errors="replace")[-4000:]
        raise SystemExit(f"{' '.join(argv[:3])} failed: {outcome['status']}\n{tail}")
    return Usage(outcome["cpu_seconds"], wall_seconds)


def _supervise(argv: Sequence[str], folder: Path, log_path: Path) -> Mapping[str, object]:
    _PRCTL(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with log_path.open("wb") as stream:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=build_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    status: int | str = "still running"
    deadline = float("inf")
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == process.pid:
            status = os.waitstatus_to_exitcode(code)
            deadline = time.monotonic() + _PATIENCE_SECONDS
        if pid == 0:
            if time.monotonic() > deadline:
                left = list_descendants(os.getpid())
                for descendant in left:
                    os.kill(descendant, signal.SIGKILL)
                status = f"{len(left)} processes were left alive"
                break
            time.sleep(0.01)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"status": status, "cpu_seconds": used.ru_utime + used.ru_stime}


def list_descendants(pid: int) -> list[int]:
    """The living descendants of a process, parents first."""
    found: list[int] = []
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(child) for task in tasks for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return found
    for child in children:
        found += [child, *list_descendants(child)]
    return found


def read_tree_seconds(pid: int) -> float:
    """User and system seconds of a process, of its living descendants, and of those that they have
    waited for (`/proc/PID/stat`, resolution 0.01 s).
    """
    seconds = 0.0
    for one in (pid, *list_descendants(pid)):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        # Ended in this moment: its parent is about to count it.
        except (FileNotFoundError, ProcessLookupError):
            continue
        seconds += sum(int(field) for field in fields[11:15]) / _TICKS_PER_SECOND
    return seconds


def describe_machine() -> str:
    """Cores and versions, for the head of a table."""
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}"
