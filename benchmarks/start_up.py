"""One attempt by phase: where the CPU seconds of short runs go, cold, and warm where the sweep can.

Run `python benchmarks/start_up.py` in the repository root. It sweeps a few runs of grid A or B of
`grid.py` on one slot, and prints for each phase the median over all runs but the first (whose
start also pays for the sweep itself, and for the warm worker), and its share.

Nothing runs inside the measured processes. The benchmark looks at the run directories every few
milliseconds; when a file says that the next phase has begun, it reads user and system time of the
whole process tree from /proc (`small_runs.read_tree_seconds`, resolution 0.01 s). A phase is what
lies between two of these moments:

| phase | ends when |
|---|---|
| launcher | a process `python -m runner.sft RUN_DIR` exists: the sweep and `accelerate launch` |
| imports | `progress.json` names a later phase: the interpreter and its imports, or a fork |
| tokenizer, rows | `samples.json` exists |
| model, trainer | `training_args.json` exists |
| step 0 | `metrics.jsonl` has the base model's scores of test and validation |
| steps | `metrics.jsonl` has the last step |
| validation | `metrics.jsonl` has the score of the last step |
| checkpoint | `progress.json` says `evaluating best` |
| test | `progress.json` says `exporting` |
| export | `result.json` exists |
| exit | the directory of the next attempt exists, or the sweep is over |

`--imports` prints what the trainer's imports cost by package: own time of all modules below a name,
from `python -X importtime`. Weights & Biases, bitsandbytes and DeepSpeed are hidden there as in a
run.

`--memory` prints the memory of a worker, and of a forked and of a cold trainer: the peak of each
figure of `/proc/PID/smaps_rollup`, looked at five times a second. What two processes share counts
half in each one's PSS, and is no longer private.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from small_runs import (
    SmallGrid,
    build_environment,
    build_folder,
    build_sweep,
    describe_machine,
    find_run,
    has_warm_sweeps,
    list_descendants,
    list_grids,
    measure,
    read_tree_seconds,
)

from runner.errors import CorruptFileError
from runner.files import load_json
from runner.processes import OWNER_VARIABLE
from runner.run.paths import RunPaths

PHASES: Final = (
    "launcher",
    "imports",
    "tokenizer, rows",
    "model, trainer",
    "step 0",
    "steps",
    "validation",
    "checkpoint",
    "test",
    "export",
    "exit",
)
_IMPORT: Final = """
import sys
from runner.errors import hide_bitsandbytes_warning
from runner.recipe.libraries import hide_libraries
hide_libraries(["wandb", "bitsandbytes", "deepspeed", "scipy", "matplotlib"])
hide_bitsandbytes_warning()
import runner.sft.train
"""

Moment = tuple[float, float]  # CPU seconds of the tree, wall seconds


# Of `smaps_rollup`, in the order of the table's columns.
_MEMORY: Final = ("Rss", "Pss", "Private_Dirty")
_LOOK_SECONDS: Final = 0.2


class Memory:
    """The peak memory of each role in a tree of processes: `role -> figure -> bytes`."""

    def __init__(self) -> None:
        self.peaks: dict[str, dict[str, int]] = {}
        self._next_look = 0.0

    def look(self, pid: int) -> None:
        """Note what is in use, if the last look is long enough ago not to cost much."""
        if time.monotonic() < self._next_look:
            return
        whole = dict.fromkeys(_MEMORY, 0)
        for descendant in list_descendants(pid):
            try:
                role = name_role(descendant)
                figures = read_memory(descendant)
            except OSError:  # it has ended
                continue
            self._note(role, figures)
            whole = {name: whole[name] + figures[name] for name in _MEMORY}
        self._note("all together", whole)
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def _note(self, role: str, figures: Mapping[str, int]) -> None:
        peaks = self.peaks.setdefault(role, dict.fromkeys(_MEMORY, 0))
        for name in _MEMORY:
            peaks[name] = max(peaks[name], figures[name])

    def build_table(self) -> list[str]:
        """A row for each role, in MiB. The sum of what is resident counts shared pages twice."""
        lines = ["| MiB at most | resident | PSS | private, dirty |", "|---|---:|---:|---:|"]
        for role in sorted(self.peaks):
            cells = [f"{self.peaks[role][name] / 2**20:.0f}" for name in _MEMORY]
            if role == "all together":
                cells[0] = ""
            lines.append(f"| {role} | {' | '.join(cells)} |")
        return lines


def name_role(pid: int) -> str:
    """Role of a process below a sweep; `other` for the sweep itself and helpers like git."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if any(Path(word).name == "accelerate" for word in words[:3]):
        return "launcher"
    if "runner.sft" in words:
        return "trainer, cold"
    if "runner.sft.worker" not in words:
        return "other"
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    is_worker = any(one.startswith(f"{OWNER_VARIABLE}=worker".encode()) for one in environment)
    return "worker" if is_worker else "trainer, forked"


def read_memory(pid: int) -> dict[str, int]:
    """Bytes of a process, all its mappings summed by the kernel."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    rows = {words[0].rstrip(":"): int(words[1]) * 1024 for words in map(str.split, lines)}
    return {name: rows[name] for name in _MEMORY}


class Timeline:
    """The moments at which the runs of one sweep have ended their phases."""

    def __init__(self, grid: SmallGrid, output_root: Path) -> None:
        self._grid = grid
        self._runs = [find_run(output_root, grid, cell) for cell in grid.cells]
        self.ends: list[list[Moment]] = [[] for _ in self._runs]

    def look(self, pid: int) -> None:
        """Note the phases that have ended since the last look."""
        current = next((n for n, ends in enumerate(self.ends) if len(ends) < len(PHASES)), None)
        if current is None:
            return
        for number in range(current, min(current + 2, len(self._runs))):
            # The next run begins when the one before has ended, so its sign ends that one's exit.
            num_ended = self._count_ended(number, pid)
            if num_ended is None:
                break
            if number > current and len(self.ends[current]) == len(PHASES) - 1:
                self._note(current, len(PHASES), pid)
            self._note(number, num_ended, pid)

    def finish(self, cpu_seconds: float, wall_seconds: float) -> None:
        """The sweep is over."""
        self.ends[-1] += [(cpu_seconds, wall_seconds)] * (len(PHASES) - len(self.ends[-1]))

    def _note(self, number: int, num_ended: int, pid: int) -> None:
        missing = num_ended - len(self.ends[number])
        if missing > 0:
            self.ends[number] += [(read_tree_seconds(pid), time.monotonic())] * missing

    def _count_ended(self, number: int, pid: int) -> int | None:
        """Number of phases that have ended, up to the result; None before the attempt."""
        paths = self._runs[number]
        attempt = paths.attempt(1)
        if not attempt.log_path.parent.exists():
            return None
        if paths.result_path.exists():
            return PHASES.index("export") + 1
        phase = read_phase(attempt.progress_path)
        if phase in ("evaluating best", "exporting"):
            return PHASES.index("checkpoint" if phase == "evaluating best" else "test") + 1
        num_rows = count_lines(paths.metrics_path)
        last_step = 2 + self._grid.num_steps
        for name, wanted in (("validation", last_step + 1), ("steps", last_step), ("step 0", 2)):
            if num_rows >= wanted:
                return PHASES.index(name) + 1
        if attempt.training_args_path.exists():
            return PHASES.index("model, trainer") + 1
        if paths.samples_path.exists():
            return PHASES.index("tokenizer, rows") + 1
        if phase is not None:
            return PHASES.index("imports") + 1
        return 1 if has_trainer(pid, paths) else 0


def read_phase(path: Path) -> str | None:
    """The phase in `progress.json`, None before there is one behind the imports."""
    try:
        progress = load_json(path)
    except (OSError, CorruptFileError):
        return None
    if progress is None or progress["phase"] in ("starting", "importing libraries"):
        return None
    return progress["phase"]


def count_lines(path: Path) -> int:
    """Number of lines in a file so far."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def has_trainer(pid: int, paths: RunPaths) -> bool:
    """True if the tree has the trainer of a run, not only its launcher."""
    for descendant in list_descendants(pid):
        try:
            words = Path(f"/proc/{descendant}/cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "runner.sft" in words and not any("accelerate" in word for word in words):
            return any(word.endswith(paths.result_path.parent.name) for word in words)
    return False


def derive_phases(ends: Sequence[Sequence[float]], start: float) -> list[dict[str, float]]:
    """Seconds of each phase of each run, from the moments at which phases ended.

    >>> derive_phases([[1.0] * 10 + [3.0]], start=0.5)[0]["exit"]
    2.0
    """
    runs = []
    before = start
    for moments in ends:
        seconds = {}
        for phase, moment in zip(PHASES, moments, strict=True):
            seconds[phase] = moment - before
            before = moment
        runs.append(seconds)
    return runs


def build_table(
    cpu: Sequence[Mapping[str, float]], wall: Sequence[Mapping[str, float]]
) -> list[str]:
    """Medians over all runs but the first, and the first run's CPU seconds beside them."""
    medians = {phase: statistics.median(run[phase] for run in cpu[1:]) for phase in PHASES}
    walls = {phase: statistics.median(run[phase] for run in wall[1:]) for phase in PHASES}
    whole = sum(medians.values())
    lines = [
        "| phase | CPU seconds | share | wall seconds | first run, CPU seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for phase in PHASES:
        lines.append(
            f"| {phase} | {medians[phase]:.2f} | {medians[phase] / whole:.0%} |"
            f" {walls[phase]:.2f} | {cpu[0][phase]:.2f} |"
        )
    lines.append(
        f"| whole | {whole:.2f} | 100% | {sum(walls.values()):.2f} | {sum(cpu[0].values()):.2f} |"
    )
    return lines


def sum_imports(text: str) -> list[tuple[str, float]]:
    """Seconds of own time below each top-level name in the output of `-X importtime`, the most
    first.

    >>> sum_imports("import time:      2000 |       2000 |   torch.nn\\n"
    ...             "import time:      1000 |       3000 | torch\\n")
    [('torch', 0.003)]
    """
    seconds: dict[str, float] = {}
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, re.MULTILINE):
        top = name.partition(".")[0]
        seconds[top] = seconds.get(top, 0.0) + int(own) / 1e6
    return sorted(seconds.items(), key=lambda item: -item[1])


def measure_imports(folder: Path) -> list[tuple[str, float]]:
    """Seconds of the trainer's imports by package."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", _IMPORT],
        cwd=folder,
        env=build_environment(folder),
        check=True,
        capture_output=True,
        text=True,
    )
    return sum_imports(result.stderr)


def measure_sweep(grid: SmallGrid, folder: Path, *, is_cold: bool) -> list[str]:
    """The table of one sweep."""
    output_root = folder / ("cold" if is_cold else "warm")
    timeline = Timeline(grid, output_root)
    argv = build_sweep(grid, output_root, is_cold=is_cold)
    started = time.monotonic()
    usage = measure(argv, folder, folder / "log.txt", watch=timeline.look)
    timeline.finish(usage.cpu_seconds, started + usage.wall_seconds)
    cpu = derive_phases([[one for one, _ in ends] for ends in timeline.ends], 0.0)
    wall = derive_phases([[one for _, one in ends] for ends in timeline.ends], started)
    return build_table(cpu, wall)


def measure_memory(grid: SmallGrid, folder: Path, *, is_cold: bool) -> list[str]:
    """The table of one sweep's memory."""
    memory, output_root = Memory(), folder / ("cold" if is_cold else "warm")
    argv = build_sweep(grid, output_root, is_cold=is_cold)
    measure(argv, folder, folder / "log.txt", watch=memory.look)
    return memory.build_table()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="one attempt by phase, in CPU and wall seconds")
    parser.add_argument("--grid", choices=("A", "B"), default="B")
    parser.add_argument("--runs", type=int, default=4, help="of the sweep, at least 2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--imports", action="store_true", help="the imports by package, instead")
    parser.add_argument("--memory", action="store_true", help="memory by role, instead")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("--runs must be at least 2: the first run is shown beside the others")
    grids = list_grids(arguments.runs, arguments.steps)
    grid = next(one for one in grids if one.name == arguments.grid)
    with tempfile.TemporaryDirectory(prefix="start-up-") as name:
        folder = Path(name)
        print(describe_machine())
        if arguments.imports:
            measure_imports(folder)  # fills the caches
            for package, seconds in measure_imports(folder)[:20]:
                print(f"{seconds:6.2f}  {package}")
            return
        build_folder(folder, [grid])
        is_able = has_warm_sweeps()
        if not is_able:
            print("cold alone: `runner sweep` here has no --cold, all of its starts are cold")
        for is_cold in (True, False) if is_able else (True,):
            print(
                f"\n{'cold' if is_cold else 'warm'}, grid {grid.name}, {arguments.steps} steps,"
                f" {arguments.runs} runs\n"
            )
            build = measure_memory if arguments.memory else measure_sweep
            print("\n".join(build(grid, folder, is_cold=is_cold)), flush=True)


if __name__ == "__main__":
    main()
