"""Two grids of 12 short LoRA runs as a bash loop of `trl sft`, as a cold and as a warm `runner
sweep`: the ratios of their CPU seconds.

Run `python benchmarks/grid.py` in the repository root. Grid A has rows of about 117 tokens, grid B
of about 30; both train a random Gemma of 3.7M parameters for 10 steps of 8 rows, in float32 on one
thread, six runs on the full loss and six on the completion loss.

The rounds are interleaved (loop, cold, warm, loop, ...), and a ratio is of the two of one round, so
that what slows the machine for a while slows both. CPU seconds are user and system time of whole
process trees, launchers and orphans included (`small_runs.measure`). Before the rounds each of the
programs runs one cell unmeasured, which fills the page cache, the bytecode caches, and TRL's cache
of tokenized rows.

The peer does the same work:

- the same rows in the same order: what the recipe draws is written to a JSONL in that order, and
  `--train_sampling_strategy sequential` makes both take it as it is (TRL shuffles nothing else);
- the same model, LoRA, seed, learning rate, schedule, batches, `gradient_checkpointing: false` and
  float32; an accelerate config of its own for the CPU, because `--accelerate_config single_gpu`
  would bring bfloat16, 2.6 times slower on a CPU;
- the same scores: we score validation and test before the first and after the last step; TRL takes
  one data set, so it gets both, 32 rows each, in batches of 32;
- both save one checkpoint with optimizer state and export the adapter.

That they did the same is checked on the runs of full loss: the loss of every step, and both scores.
TRL's mean over batches is the mean of our two scores, because a batch is a split. The runs of
completion loss are not compared: TRL also trains and scores the newline behind the end of a turn,
and its evaluation is of the completions alone. Beyond that we do more than the loop: hashes, synced
files, per-row scores, a verified export.

With `--cold` in `runner sweep --help`, the warm sweep is measured too, and every file that a run
leaves outside its attempts is compared with that of the cold sweep.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from small_runs import (
    MICRO_BATCH,
    NUM_EVAL_ROWS,
    Cell,
    SmallGrid,
    build_folder,
    build_sweep,
    describe_machine,
    find_run,
    has_warm_sweeps,
    list_grids,
    measure,
    run_python,
)

from runner.files import load_json, load_jsonl

LOSS_TOLERANCE: Final = 1e-5
LOOP: Final = "loop"
COLD: Final = "cold"
WARM: Final = "warm"
TITLES: Final = {
    LOOP: "bash loop of `trl sft`",
    COLD: "`runner sweep --cold`",
    WARM: "`runner sweep`",
}
# The targets of a warm sweep, as a share of the loop's CPU seconds.
TARGETS: Final = {"A": 0.35, "B": 0.15}

_WRITE_TRL_ROWS: Final = """
import json, sys
from pathlib import Path
from runner.recipe.parse import load_recipe
from runner.data.rows import build_samples, draw_splits
from runner.data.tokenizer import load_tokenizer
recipe = load_recipe(Path(sys.argv[1]))
splits = draw_splits(recipe.data)
for name, rows in (("train", splits.train), ("test", splits.validation + splits.test)):
    lines = []
    for row in rows:
        *prompt, completion = map(dict, row.messages)
        lines.append(json.dumps({"prompt": prompt, "completion": [completion]}) + "\\n")
    Path(sys.argv[2], f"{name}.jsonl").write_text("".join(lines))
samples = build_samples(recipe.data, load_tokenizer(recipe.model), splits)
lengths = [len(row.input_ids) for row in samples.train.rows]
print(f"{sum(lengths) / len(lengths):.0f}")
"""


@dataclass(frozen=True)
class Ratio:
    """A ratio of CPU seconds over the rounds."""

    median: float
    lowest: float
    highest: float
    num_rounds: int


@dataclass(frozen=True)
class Agreement:
    """The largest differences between TRL's full-loss runs and ours."""

    step_loss: float
    base_score: float
    tuned_score: float


def derive_ratio(ours: Sequence[float], loop: Sequence[float]) -> Ratio:
    """Ours over the loop, of each round.

    >>> derive_ratio([4.0, 9.0, 5.0], [10.0, 10.0, 10.0])
    Ratio(median=0.5, lowest=0.4, highest=0.9, num_rounds=3)
    """
    ratios = [one / other for one, other in zip(ours, loop, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def build_table(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Grid -> arm -> CPU seconds of each round, as a Markdown table: medians, and the ratios to the
    loop with their range.
    """
    arms = [arm for arm in TITLES if any(arm in by_arm for by_arm in seconds.values())]
    lines = [
        f"| CPU seconds | {' | '.join(TITLES[arm] for arm in arms)} |",
        "|---|" + "---:|" * len(arms),
    ]
    for grid, by_arm in seconds.items():
        cells = []
        for arm in arms:
            cell = f"{statistics.median(by_arm[arm]):.0f}"
            if arm != LOOP and LOOP in by_arm:
                ratio = derive_ratio(by_arm[arm], by_arm[LOOP])
                cell += f" ({ratio.median:.3f}; {ratio.lowest:.3f} to {ratio.highest:.3f})"
            cells.append(cell)
        lines.append(f"| {grid} | {' | '.join(cells)} |")
    return lines


def build_trl(grid: SmallGrid, cell: Cell, output_dir: str) -> list[str]:
    """`trl sft` with the settings of a recipe."""
    settings: dict[str, object] = {
        "accelerate_config": "cpu.yaml",
        "model_name_or_path": "model",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "dataset_name": f"trl_{grid.name}",
        "max_length": 512,
        "completion_only_loss": cell.loss == "completion",
        "loss_type": "nll",
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": MICRO_BATCH,
        "per_device_eval_batch_size": NUM_EVAL_ROWS,
        "gradient_accumulation_steps": 1,
        "max_steps": grid.num_steps,
        "learning_rate": cell.learning_rate,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "seed": cell.seed,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "eval_strategy": "steps",
        "eval_steps": grid.num_steps,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": grid.num_steps,
        "output_dir": output_dir,
    }
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return ["trl", "sft", *flags]


def build_loop(grid: SmallGrid, output_dir: str, cells: Sequence[Cell]) -> list[str]:
    """A bash script of one `trl sft` after the other."""
    commands = [shlex.join(build_trl(grid, cell, f"{output_dir}/{cell.name}")) for cell in cells]
    return ["bash", "-ec", "\n".join(commands)]


def build_arm(
    arm: str, grid: SmallGrid, output_root: Path, cells: Sequence[Cell] | None = None
) -> list[str]:
    """The command of one arm over a grid, or over some of its cells."""
    cells = cells or grid.cells
    if arm == LOOP:
        return build_loop(grid, str(output_root), cells)
    return build_sweep(grid, output_root, is_cold=arm == COLD, cells=cells)


def compare_scores(grid: SmallGrid, loop_dir: Path, output_root: Path) -> Agreement:
    """The largest differences over the runs of full loss.

    Raises:
        SystemExit: they did not do the same work, so that no figure is worth anything.
    """
    step_losses, base_scores, tuned_scores = [0.0], [0.0], [0.0]
    for cell in grid.cells:
        if cell.loss != "full":
            continue
        history = load_json(
            loop_dir / cell.name / f"checkpoint-{grid.num_steps}" / "trainer_state.json"
        )["log_history"]
        theirs = [row["loss"] for row in history if "loss" in row]
        scores = [row["eval_loss"] for row in history if "eval_loss" in row]
        paths = find_run(output_root, grid, cell)
        ours = [row["loss"] for row in load_jsonl(paths.metrics_path) if "loss" in row]
        result = load_json(paths.result_path)
        if not len(theirs) == len(ours) == grid.num_steps or len(scores) != 2:
            raise SystemExit(
                f"{cell.name}: {len(theirs)} steps and {len(scores)} scores of trl, {len(ours)}"
                " steps of ours"
            )
        step_losses += [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
        base_scores.append(abs(scores[0] - derive_mean_score(result["base"])))
        tuned_scores.append(abs(scores[1] - derive_mean_score(result["tuned"])))
    agreement = Agreement(max(step_losses), max(base_scores), max(tuned_scores))
    if max(asdict(agreement).values()) > LOSS_TOLERANCE:
        raise SystemExit(f"the two did not do the same work: {agreement}")
    return agreement


def derive_mean_score(splits: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over splits of the loss of a token, as TRL's evaluation has it of a batch each.

    >>> derive_mean_score({"validation": {"nll_sum": 8.0, "num_tokens": 4},
    ...                    "test": {"nll_sum": 3.0, "num_tokens": 3}})
    1.5
    """
    return statistics.mean(score["nll_sum"] / score["num_tokens"] for score in splits.values())


def find_differences(one: Path, other: Path) -> tuple[int, list[str]]:
    """Count the files of two output roots and list those that differ. Files that describe an
    attempt (times, host, log) are left out.
    """
    files = {
        path.relative_to(root)
        for root in (one, other)
        for path in root.rglob("*")
        if path.is_file() and "attempts" not in path.parts
    }
    compared = sorted(path for path in files if path.name not in ("run.json", "lease"))
    differing = [
        str(path)
        for path in compared
        if not (one / path).is_file()
        or not (other / path).is_file()
        or (one / path).read_bytes() != (other / path).read_bytes()
    ]
    return len(compared), differing


def write_trl_rows(grid: SmallGrid, folder: Path) -> str:
    """Write what the recipes draw as a data set for TRL; the mean number of tokens of a row."""
    trl_rows = folder / f"trl_{grid.name}"
    trl_rows.mkdir()
    first = f"recipes/{grid.name}/{grid.cells[0].name}.yaml"
    return run_python(_WRITE_TRL_ROWS, folder, first, str(trl_rows))


def measure_grid(
    grid: SmallGrid, folder: Path, arms: Sequence[str], num_rounds: int
) -> dict[str, Any]:
    """CPU seconds of every arm in every round, and how far the arms agree."""
    mean_tokens = write_trl_rows(grid, folder)
    print(f"grid {grid.name}: rows of {mean_tokens} tokens on average", flush=True)
    one_of_each = [cell for cell in grid.cells if cell.seed == 1][:2]  # full and completion
    for arm in arms:
        argv = build_arm(arm, grid, folder / f"warm-up-{arm}", one_of_each)
        measure(argv, folder, folder / "log.txt")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    walls: dict[str, list[float]] = {arm: [] for arm in arms}
    found: dict[str, Any] = {}
    for number in range(1, num_rounds + 1):
        roots = {arm: folder / f"{grid.name}-{arm}-{number}" for arm in arms}
        for arm, output_root in roots.items():
            usage = measure(build_arm(arm, grid, output_root), folder, folder / "log.txt")
            seconds[arm].append(round(usage.cpu_seconds, 2))
            walls[arm].append(round(usage.wall_seconds, 2))
            shown = f"{usage.cpu_seconds:.1f} CPU s, {usage.wall_seconds:.1f} s"
            print(f"  round {number} {arm}: {shown}", flush=True)
        if LOOP in arms:
            found["agreement"] = {
                arm: asdict(compare_scores(grid, roots[LOOP], roots[arm]))
                for arm in arms
                if arm != LOOP
            }
        if COLD in arms and WARM in arms:
            num_files, differing = find_differences(roots[COLD], roots[WARM])
            found["files"] = num_files
            found["differing"] = sorted({*found.get("differing", ()), *differing})  # in any round
        for output_root in roots.values():
            shutil.rmtree(output_root)
    return {"mean_tokens": int(mean_tokens), "cpu_seconds": seconds, "wall_seconds": walls, **found}


def describe_agreement(name: str, measured: Mapping[str, Any]) -> list[str]:
    """Describe how closely the arms of a grid agree."""
    lines = []
    for arm, worst in measured.get("agreement", {}).items():
        lines.append(
            f"grid {name}, full loss, trl against {arm}: largest difference of a step's loss"
            f" {worst['step_loss']:.1e}, of the base score {worst['base_score']:.1e}, of the tuned"
            f" score {worst['tuned_score']:.1e}"
        )
    if "files" in measured:
        differing = measured["differing"]
        shown = (
            f"{len(differing)} differ: {', '.join(differing[:5])}" if differing else "none differs"
        )
        lines.append(f"grid {name}, cold against warm: {measured['files']} files, {shown}")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="CPU seconds of small grids: a loop of trl sft against runner sweep"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--grids", default="A,B", help="A, B or both")
    parser.add_argument("--arms", default="loop,cold,warm", help="which to measure")
    parser.add_argument("--runs", type=int, default=12, help="runs of a grid")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args()
    arms = [arm for arm in TITLES if arm in arguments.arms.split(",")]
    if WARM in arms and not has_warm_sweeps():
        print("no warm arm: `runner sweep` here has no --cold, all of its starts are cold")
        arms.remove(WARM)
    chosen = arguments.grids.split(",")
    grids = [g for g in list_grids(arguments.runs, arguments.steps) if g.name in chosen]
    with tempfile.TemporaryDirectory(prefix="grid-") as name:
        folder = Path(name)
        print(f"{describe_machine()}; {build_folder(folder, grids)}", flush=True)
        measured = {grid.name: measure_grid(grid, folder, arms, arguments.rounds) for grid in grids}
    print(
        f"\n{arguments.runs} runs of {arguments.steps} steps; median of {arguments.rounds} rounds,"
        " ratio to the loop (median; lowest to highest)\n"
    )
    print("\n".join(build_table({name: one["cpu_seconds"] for name, one in measured.items()})))
    print()
    for name, one in measured.items():
        print("\n".join(describe_agreement(name, one)))
        if WARM in one["cpu_seconds"] and LOOP in one["cpu_seconds"]:
            ratio = derive_ratio(one["cpu_seconds"][WARM], one["cpu_seconds"][LOOP])
            print(f"grid {name}: warm {ratio.median:.3f} of the loop, target {TARGETS[name]}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": describe_machine(), **measured}, indent=1))


if __name__ == "__main__":
    main()
