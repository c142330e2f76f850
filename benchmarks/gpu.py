"""Short runs on one GPU: what warm starts, a shared base, several runs at a time and larger batches
do to six LoRA runs with answers.

Run `python benchmarks/gpu.py` in the repository root, on a machine with a GPU. Nothing is fetched:
it builds two models of 0.5B and 1.5B parameters in Qwen2's shapes with random weights, a tokenizer
and rows of invented words (about 300 tokens), and trains each model on 60, 120 and 180 of them. The
base and the tuned model score 24 rows each of validation and test, and answer those of the test.
A random model does not stop by itself, so each answer is as long as the others.

The arms differ from `shared` in one thing each:

| arm | |
|---|---|
| shared | `runner sweep`: warm; what the base model says is computed once for each model |
| warm | with `--own-base`: every run scores and asks its base model itself |
| cold | with `--cold --own-base`: every run also imports its libraries itself |
| two, four | `--slots 2`, `--slots 4`: so many runs at a time share the GPU |
| ones | micro-batches of one row, and answers four at a time, in place of what is suggested |

The batches of the others are those that `runner check` suggests for the recipes of `ones`; where it
suggests none, a micro-batch is the whole global batch, and as many prompts are answered at a time.
Where this checkout's sweep lacks an option, the arm goes without, or is left out as the same as
another one.

Wall seconds are those of the whole sweep. A share is of the wall times the slots: seconds in a
phase (`timing.json`), summed over the runs. The rest is starting, loading, exporting, and slots
without a run. Peak memory is what `nvidia-smi` says is in use on the GPU, five times a second,
beyond what was in use before; beside it is the estimate of `runner check`, for training or answers,
whichever needs more, of as many runs as share the GPU, the largest ones. Tokens are without
padding.

It ends within `--minutes` (8): an arm that would last longer is killed, and those behind it are
left out; both are said. `--small` runs tiny models on the CPU, to see that everything works. Its
memory is that of the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from gpu_runs import (
    GLOBAL_BATCH,
    LARGE,
    ONES,
    SMALL,
    Batches,
    Cell,
    Scale,
    build_folder,
    list_cells,
    write_recipes,
)
from small_runs import (
    ROOT,
    Usage,
    build_environment,
    describe_machine,
    list_descendants,
    measure,
)
from start_up import Memory

from runner.files import load_json
from runner.run.paths import RunPaths

_LOOK_SECONDS: Final = 0.2
_SECONDS_TO_PRINT: Final = 10.0  # kept back at the end
_GIB: Final = 2**30


@dataclass(frozen=True)
class Arm:
    """One sweep of the six runs."""

    name: str
    grid: str = "suggested"
    options: tuple[str, ...] = ()  # of `runner sweep`, in addition to `--slots`
    num_slots: int = 1


# The most important first: the last ones are left out if time runs out.
ARMS: Final = (
    Arm("shared"),
    Arm("warm", options=("--own-base",)),
    Arm("cold", options=("--cold", "--own-base")),
    Arm("two", num_slots=2),
    Arm("four", num_slots=4),
    Arm("ones", grid="ones"),
)


def find_suggestion(text: str) -> Batches | None:
    """The batches that `runner check` suggests, the smallest where models differ; None where it
    suggests no micro-batch.

    >>> find_suggestion("per_device_train_batch_size: 8\\n  generation: {batch_size: 32}")
    Batches(micro_batch=8, evaluation=4, answers=32)
    """
    micro = re.findall(r"per_device_train_batch_size: *(\d+)", text)
    answers = re.findall(r"(?<![\w.])batch_size: *(\d+)", text)
    if not micro:
        return None
    return Batches(
        min(map(int, micro)), ONES.evaluation, min(map(int, answers)) if answers else None
    )


def ask_check(folder: Path, *arguments: str) -> str:
    """Return what `runner check` prints.

    Raises:
        SystemExit: the check refuses the recipes.
    """
    done = subprocess.run(
        [sys.executable, "-m", "runner", "check", *arguments],
        cwd=folder,
        env=build_environment(folder),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"runner check failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def list_options() -> str:
    """The help of `runner sweep`."""
    argv = [sys.executable, "-m", "runner", "sweep", "--help"]
    return subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def choose_arms(names: Sequence[str], help_text: str) -> tuple[list[Arm], list[str]]:
    """The arms that can be measured here, and those that cannot, in words.

    >>> choose_arms(["shared", "warm", "cold"], "--slots N --cold")[1]
    ['`warm` is left out: without --own-base it is `shared`']
    """
    chosen: list[Arm] = []
    left_out = []
    for arm in ARMS:
        if arm.name not in names:
            continue
        missing = [option for option in arm.options if option not in help_text]
        arm = replace(arm, options=tuple(one for one in arm.options if one not in missing))
        twins = [one.name for one in chosen if replace(one, name=arm.name) == arm]
        if twins:
            left_out.append(
                f"`{arm.name}` is left out: without {', '.join(missing)} it is `{twins[0]}`"
            )
        else:
            chosen.append(arm)
    return chosen, left_out


class DeviceMemory:
    """The most memory in use while an arm runs, beyond what was in use before: of the GPU, or of
    the arm's processes on the CPU.
    """

    def __init__(self, *, uses_cpu: bool) -> None:
        self._processes = Memory() if uses_cpu else None
        self._before = None if uses_cpu else read_gpu_bytes()
        self._most = self._before
        self._next_look = 0.0

    def look(self, pid: int) -> None:
        """Note what is in use, five times a second at most; `pid` is an ancestor of the runs."""
        if self._processes is not None:
            self._processes.look(pid)
        elif self._most is not None and time.monotonic() > self._next_look:
            self._most = max(self._most, read_gpu_bytes() or 0)
            self._next_look = time.monotonic() + _LOOK_SECONDS

    @property
    def peak_bytes(self) -> int | None:
        """None where it cannot be read."""
        if self._processes is not None:
            return self._processes.peaks.get("all together", {}).get("Pss")
        if self._before is None or self._most is None:
            return None
        return self._most - self._before


def read_gpu_bytes() -> int | None:
    """Bytes in use on the GPU of the runs, by any process; None where the driver does not say."""
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    argv = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    text = subprocess.run(argv, check=False, capture_output=True, text=True).stdout.strip()
    return int(text) * 2**20 if text.isdigit() else None


@dataclass(frozen=True)
class Measured:
    """One arm: seconds, tokens and bytes."""

    arm: Arm
    wall_seconds: float
    cpu_seconds: float
    phase_seconds: dict[str, float]  # summed over the runs
    num_tokens: int  # of the training rows
    tokens_per_second: dict[str, float]  # model -> in training, of its longest run
    peak_bytes: int | None
    estimated_bytes: int | None  # of as many runs as share the device, the largest

    def share(self, *phases: str) -> float:
        """Of the wall seconds of all slots."""
        seconds = sum(self.phase_seconds.get(phase, 0.0) for phase in phases)
        return seconds / (self.wall_seconds * self.arm.num_slots)


def measure_arm(
    arm: Arm, folder: Path, cells: Sequence[Cell], checked: Mapping[str, Any], deadline: float
) -> Measured | None:
    """The figures of one arm; None if it had to be killed at the deadline.

    Raises:
        SystemExit: a run failed.
    """
    output_root = folder / f"runs-{arm.name}"
    argv = [sys.executable, "-m", "runner", "sweep", f"recipes/{arm.grid}", *arm.options]
    argv += ["--slots", str(arm.num_slots), "--output-root", str(output_root)]
    is_late = False

    def watch(pid: int) -> None:
        nonlocal is_late
        memory.look(pid)
        if time.monotonic() > deadline:
            is_late = True
            for one in list_descendants(pid):
                kill_if_alive(one)

    memory = DeviceMemory(uses_cpu=checked["uses_cpu"])
    try:
        usage = measure(argv, folder, folder / "log.txt", watch=watch)
    except SystemExit:
        if is_late:
            return None
        raise
    measured = read_figures(arm, output_root, cells, checked, usage, memory.peak_bytes)
    shutil.rmtree(output_root)
    return measured


def read_figures(
    arm: Arm,
    output_root: Path,
    cells: Sequence[Cell],
    checked: Mapping[str, Any],
    usage: Usage,
    peak_bytes: int | None,
) -> Measured:
    """The figures of one arm, from what its runs and `runner check` say."""
    runs = [checked["runs"][f"{arm.grid}/{cell.name}"] for cell in cells]
    timings = {
        cell: load_json(RunPaths(output_root / arm.grid / cell.name).attempt(1).timing_path)
        for cell in cells
    }
    phase_seconds: dict[str, float] = {}
    for timing in timings.values():
        for phase, seconds in timing["phase_seconds"].items():
            phase_seconds[phase] = round(phase_seconds.get(phase, 0.0) + seconds, 3)
    # `size` is null where `runner check` could not measure a model.
    sizes = [derive_need(run["size"]) for run in runs if run["size"] is not None]
    largest = sorted(sizes, reverse=True)[: arm.num_slots]
    return Measured(
        arm=arm,
        wall_seconds=round(usage.wall_seconds, 2),
        cpu_seconds=round(usage.cpu_seconds, 2),
        phase_seconds=phase_seconds,
        num_tokens=sum(run["splits"]["train"]["num_tokens"] for run in runs),
        # The first cell of a model has the most rows: its first steps count least.
        tokens_per_second={
            cell.model: timings[cell]["tokens_per_second"] for cell in reversed(cells)
        },
        peak_bytes=peak_bytes,
        estimated_bytes=sum(largest) if len(sizes) == len(runs) else None,
    )


def derive_need(size: Mapping[str, Any]) -> int:
    """Bytes that one run is estimated to need: of a training step, or of its answers.

    >>> derive_need({"memory_bytes": {"total": 5}, "answer_memory_bytes": 7})
    7
    """
    return max(size["memory_bytes"]["total"], size["answer_memory_bytes"] or 0)


def kill_if_alive(pid: int) -> None:
    """SIGKILL for a process of ours."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def build_table(measured: Sequence[Measured]) -> list[str]:
    """Markdown: a row for each arm."""
    models = list(measured[0].tokens_per_second) if measured else []
    lines = [
        "| arm | wall seconds | training | scores | answers | rest | tokens/s of the grid |"
        f" {' | '.join(f'in training, {model}' for model in sorted(models))} |"
        " peak GiB | estimate |",
        "|---|" + "---:|" * (8 + len(models)),
    ]
    for one in measured:
        shares = [
            one.share("training"),
            one.share("evaluating base", "evaluating", "evaluating best"),
            one.share("generating"),
        ]
        cells = [
            f"{one.wall_seconds:.0f}",
            *(f"{share:.0%}" for share in [*shares, 1 - sum(shares)]),
            f"{one.num_tokens / one.wall_seconds:,.0f}",
            *(f"{one.tokens_per_second[model]:,.0f}" for model in sorted(models)),
            *(
                "-" if num_bytes is None else f"{num_bytes / _GIB:.1f}"
                for num_bytes in (one.peak_bytes, one.estimated_bytes)
            ),
        ]
        lines.append(f"| {one.arm.name} | {' | '.join(cells)} |")
    return lines


def prepare(folder: Path, scale: Scale, cells: Sequence[Cell]) -> tuple[dict[str, Any], str]:
    """Return the output of `runner check` for both grids, and a line about models and batches."""
    built = build_folder(folder, scale)
    write_recipes(folder, "ones", cells, scale, ONES)
    found = find_suggestion(ask_check(folder, "recipes/ones"))
    batches = found or Batches(GLOBAL_BATCH, GLOBAL_BATCH)
    write_recipes(folder, "suggested", cells, scale, batches)
    runs = json.loads(ask_check(folder, "--json", "recipes/ones", "recipes/suggested"))["runs"]
    sizes = ", ".join(f"{name} {n / 1e6:,.1f}M" for name, n in built["num_parameters"].items())
    source = "suggested" if found else "`runner check` suggests none here"
    answers = batches.answers or batches.evaluation
    line = f"{sizes}; micro-batches of {batches.micro_batch}, {answers} answers at a time: {source}"
    checked = {run["run"]: run for run in runs}
    return {"uses_cpu": scale.uses_cpu, "device": built["device"], "runs": checked}, line


def choose_gpu() -> None:
    """Let everything below use one GPU, the first that is visible.

    Raises:
        SystemExit: there is no NVIDIA driver.
    """
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("no nvidia-smi here, so no GPU: `--small` runs tiny models on the CPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="six short LoRA runs with answers on one GPU")
    parser.add_argument("--arms", default=",".join(arm.name for arm in ARMS))
    parser.add_argument("--runs", type=int, default=6, help="runs of a sweep, at most 6")
    parser.add_argument("--minutes", type=float, default=8.0, help="it ends within")
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.minutes * 60 - _SECONDS_TO_PRINT
    if not arguments.small:
        choose_gpu()
    os.environ["HF_HUB_OFFLINE"] = "1"
    scale = SMALL if arguments.small else LARGE
    cells = list_cells(scale, arguments.runs)
    arms, said = choose_arms(arguments.arms.split(","), list_options())
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)
        checked, line = prepare(folder, scale, cells)
        head = f"{checked['device']['name']}, {describe_machine()}; {line}"
        print(head, flush=True)
        for arm in arms:
            one = None
            if time.monotonic() < deadline:
                one = measure_arm(arm, folder, cells, checked, deadline)
            if one is None:
                said.append(f"`{arm.name}` is left out: {arguments.minutes:g} minutes were over")
                continue
            measured.append(one)
            print(f"  {arm.name}: {one.wall_seconds:.0f} s", flush=True)
    print()
    print("\n".join([*build_table(measured), "", *said]))
    if arguments.json is not None:
        figures = [asdict(one) for one in measured]
        text = json.dumps({"head": head, "arms": figures, "left_out": said}, indent=1)
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
