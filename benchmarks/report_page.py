"""CPU seconds, size and parts of a report with its page, for grids of 12, 216 and 5,000 runs.

Run `python benchmarks/report_page.py` in the repository root (some minutes, most of them to write
5,000 directories), or with some of these numbers as arguments. The runs are directories of real
records: 40 test rows each with scores, a curve of 12 evaluations, answers of base and tuned model.
The command is a process of its own and counts whole, imports included. Goals: 216 runs in 10 CPU
seconds with the page, which is below 3 MB; 5,000 in 60 without.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from runner.files import write_jsonl_atomic  # noqa: E402
from tests.support.scored_runs import make_attempt, scored_grid  # noqa: E402

# Runs -> values of the axes; each cell has three seeds
SHAPES: Final = {12: (2, 2, 1, 1), 216: (3, 2, 4, 3), 5_000: (4, 2, 13, 16)}
MAX_RUNS_WITH_PAGE: Final = 1_000
NUM_ROWS: Final = 40


def build_runs(root: Path, shape: tuple[int, int, int, int]) -> None:
    """Finished runs of models, losses, sample counts and learning rates."""
    counts = [30 * (at + 1) for at in range(shape[2])]
    axes: dict[str, list[Any]] = {
        "model": [f"model-{at}" for at in range(shape[0])],
        "loss": ["full", "completion"][: shape[1]],
        "num_train_samples": counts,
        "learning_rate": [(at + 1) / 1_000 for at in range(shape[3])],
    }

    def truth(loss: str, num_train_samples: int, **_: Any) -> float:
        return 1.5 - 0.2 * (loss == "completion") - 0.1 * (num_train_samples / counts[-1])

    def override(learning_rate: float, **_: Any) -> tuple[str, ...]:
        task = "data.task={name: prompt_completion, prompt: '{question}'}"
        return (task, f"training.learning_rate={learning_rate}")

    runs = scored_grid(
        root,
        axes,
        truth,
        own_seeds=True,
        scores={"exact_match": [float(at % 3 == 0) for at in range(NUM_ROWS)]},
        attempt=make_attempt(),
        num_updates=48,
        schedule_steps=48,
        overrides=override,
    )
    for _, paths, _ in runs:
        curve = [
            {"step": step, "split": "validation", "nll_per_completion_token": 1.2 + 2 / (1 + step)}
            for step in range(0, 49, 4)
        ]
        write_jsonl_atomic(paths.metrics_path, curve)


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """CPU seconds of a command and its peak of memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "runner", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, after.ru_maxrss / 1024


def main() -> None:
    for num_runs in [int(word) for word in sys.argv[1:]] or SHAPES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build_runs(folder / "runs", SHAPES[num_runs])
            found = {"runs": sum(1 for _ in (folder / "runs" / "demo").iterdir())}
            seconds, mib = measure(["report", "runs/demo"], folder)
            measured: dict[str, Any] = {**found, "report_s": round(seconds, 2), "mib": round(mib)}
            if num_runs <= MAX_RUNS_WITH_PAGE:
                page = folder / "report.html"
                seconds, mib = measure(["report", "runs/demo", "--html", "report.html"], folder)
                measured |= {"with_page_s": round(seconds, 2), "mib": round(mib)}
                measured["page_mb"] = round(page.stat().st_size / 1e6, 2)
            print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
