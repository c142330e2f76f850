"""One longer LoRA run as `trl sft` and as ours: the paired ratio of their training seconds.

Run `python benchmarks/long_run.py` in the repository root. The run is the first one of grid A or B
of `grid.py`, full loss, with as many steps as `--steps` says, and both sides do the same work as
there; the loss of every step and both scores are compared.

Training seconds are what a process tree uses between two moments: the first step is logged, and the
last. Both sides log every step at the same place of Transformers' loop, score before the first step
and after the last, and save after the last; so nothing but steps, their logs and their metrics lies
between. The moments are seen from outside, every few milliseconds: TRL's in what it prints, ours in
`metrics.jsonl`. CPU seconds are user and system time of all processes of the tree, ours with the
sweep that waits and TRL's with `accelerate launch`; wall seconds are told too, which other work on
the machine moves more.

The two runs of a pair follow each other, and every other pair begins with ours. The interval is
Student's, of the mean over the pairs of the logarithm of the ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from grid import COLD, LOOP, build_arm, compare_scores, write_trl_rows
from scipy.special import stdtrit
from small_runs import (
    SmallGrid,
    build_folder,
    describe_machine,
    find_run,
    list_grids,
    measure,
    read_tree_seconds,
)

_TRL_STEP: Final = b"'loss': "
_OUR_STEP: Final = b'"loss": '


@dataclass(frozen=True)
class TrainingSeconds:
    """Of one run, from the log of its first step to that of its last."""

    cpu: float
    wall: float


@dataclass
class Watch:
    """Counts the steps in a file while a run writes it, and reads the clocks when one has come."""

    path: Path
    sign: bytes  # of a step, once in each of its lines
    seen: list[tuple[int, float, float]] = field(default_factory=list)  # steps, CPU, wall

    def look(self, pid: int) -> None:
        """Note the clocks of the tree below a process, if there are more steps than before."""
        try:
            num_steps = self.path.read_bytes().count(self.sign)
        except FileNotFoundError:
            return
        if num_steps > (self.seen[-1][0] if self.seen else 0):
            self.seen.append((num_steps, read_tree_seconds(pid), time.monotonic()))

    def derive_seconds(self, num_steps: int) -> TrainingSeconds:
        """From the first step that was seen to the last, as of `num_steps - 1` steps.

        Raises:
            SystemExit: too little of the run was seen.
        """
        (first, first_cpu, first_wall), (last, last_cpu, last_wall) = self.seen[0], self.seen[-1]
        if last != num_steps or last - first < num_steps / 2:
            raise SystemExit(f"{self.path}: steps {first} to {last} of {num_steps} were seen")
        scale = (num_steps - 1) / (last - first)
        return TrainingSeconds((last_cpu - first_cpu) * scale, (last_wall - first_wall) * scale)


def measure_training(arm: str, grid: SmallGrid, folder: Path, output_root: Path) -> TrainingSeconds:
    """The training seconds of the grid's one run."""
    log_path = folder / "log.txt"
    log_path.unlink(missing_ok=True)
    if arm == LOOP:
        watch = Watch(log_path, _TRL_STEP)
    else:
        watch = Watch(find_run(output_root, grid, grid.cells[0]).metrics_path, _OUR_STEP)
    measure(build_arm(arm, grid, output_root), folder, log_path, watch=watch.look)
    return watch.derive_seconds(grid.num_steps)


def derive_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of the ratios of pairs, and the ends of its 95% interval.

    >>> mean, low, high = derive_ratio([9.0, 10.0, 9.5], [10.0, 10.0, 10.0])
    >>> f"{mean:.3f}, {low:.3f} to {high:.3f}"
    '0.949, 0.833 to 1.082'
    """
    logs = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(logs), len(logs)
    half_width = stdtrit(count - 1, 0.975) * statistics.stdev(logs) / math.sqrt(count)
    return math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width)


def measure_pairs(
    grid: SmallGrid, folder: Path, num_pairs: int
) -> Mapping[str, list[TrainingSeconds]]:
    """The training seconds of every pair by arm."""
    write_trl_rows(grid, folder)
    seconds: dict[str, list[TrainingSeconds]] = {LOOP: [], COLD: []}
    for number in range(num_pairs + 1):
        arms = [LOOP, COLD] if number % 2 else [COLD, LOOP]
        roots = {arm: folder / f"{arm}-{number}" for arm in arms}
        found = {arm: measure_training(arm, grid, folder, roots[arm]) for arm in arms}
        agreement = compare_scores(grid, roots[LOOP], roots[COLD])
        if number == 0:  # unmeasured: it fills the caches
            print(f"they did the same work: {agreement}", flush=True)
        else:
            for arm in arms:
                seconds[arm].append(found[arm])
            shown = ", ".join(
                f"{arm} {found[arm].cpu:.2f} CPU s, {found[arm].wall:.2f} s" for arm in (LOOP, COLD)
            )
            print(f"  pair {number}: {shown}", flush=True)
        for output_root in roots.values():
            shutil.rmtree(output_root)
    return seconds


def describe(
    name: str,
    seconds: Mapping[str, Sequence[TrainingSeconds]],
    read: Callable[[TrainingSeconds], float],
) -> str:
    """One line: medians, ratio and interval."""
    ours, theirs = ([read(one) for one in seconds[arm]] for arm in (COLD, LOOP))
    ratio, low, high = derive_ratio(ours, theirs)
    return (
        f"{name} seconds of training: trl {statistics.median(theirs):.2f}, ours"
        f" {statistics.median(ours):.2f} (medians); paired ratio {ratio:.3f}, 95% interval"
        f" {low:.3f} to {high:.3f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="training seconds of one longer run: ours against trl sft, in pairs"
    )
    parser.add_argument("--grid", choices=("A", "B"), default="A")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.steps < 3:
        parser.error("an interval needs 2 pairs, and a run 3 steps")
    grids = list_grids(1, arguments.steps)
    grid = next(one for one in grids if one.name == arguments.grid)
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name)
        print(f"{describe_machine()}; {build_folder(folder, [grid])}", flush=True)
        seconds = measure_pairs(grid, folder, arguments.pairs)
    print(f"\ngrid {grid.name}, {arguments.steps} steps, {arguments.pairs} pairs")
    print(describe("CPU", seconds, lambda one: one.cpu))
    print(describe("wall", seconds, lambda one: one.wall))
    if arguments.json is not None:
        figures = {arm: [vars(one) for one in found] for arm, found in seconds.items()}
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
