"""One fine-tune through `trl sft` and through `runner launch`, in turn, and the ratio of their
processor seconds.

Run `python benchmarks/single_run.py` in the repository root; it builds its model and rows on the
spot and needs no network. Budget: the whole takes at most 1.05 times their processor seconds; the
exit status is 1 beyond that.

Both train the same rows in the same order from the same model with the same settings, on one core
in float32; the benchmark refuses to print figures when a loss of any step differs by more than
1e-5. Both score the same validation rows before the first and after the last step, save one
checkpoint with its optimizer state and export the adapter. Ours does more than that: it also scores
the base and the tuned model on one test row, which takes no time here, records hashes, syncs files
and verifies the export; `--test-rows` shows what more test rows cost.

Processor seconds are user and system time of the whole process tree, launchers included. The parts
are cut where the loss of a step appears in the program's own output: the benchmark watches that
file and reads the tree's times from /proc at that instant (resolution 0.01 s), so nothing runs
inside the measured processes. Each program first runs once unmeasured, which fills the page cache,
the bytecode caches, and TRL's cache of tokenised rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner.files import load_json, load_jsonl  # noqa: E402
from runner.recipe.parse import Recipe, parse_recipe  # noqa: E402
from runner.run.paths import RunPaths  # noqa: E402

NUM_TRAIN_ROWS: Final = 320
NUM_VALIDATION_ROWS: Final = 32
MICRO_BATCH: Final = 4
ACCUMULATION: Final = 2
LEARNING_RATE: Final = 2e-3
LOSS_TOLERANCE: Final = 1e-5
BUDGET: Final = 1.05
PARTS: Final = ("start-up", "training", "ending", "whole")
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")

RECIPE: Final = """\
run: {{grid: benchmark, name: base, axes: {{}}, schema_version: 1}}
model: {{path: model, dtype: float32, attn_implementation: sdpa}}
adapter: {{method: lora, r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}}
quantization: {{method: none}}
data:
  train: {{path: rows.jsonl}}
  task: {{name: conversations}}
  num_train_samples: {num_train}
  num_validation_samples: {num_validation}
  num_test_samples: {num_test}
  seed: 1
  max_length: 512
loss: full
training:
  seed: 1
  global_batch_size: {global_batch}
  per_device_train_batch_size: {micro_batch}
  max_steps: {max_steps}
  learning_rate: {learning_rate}
  lr_scheduler_type: linear
  optim: adamw_torch
  max_grad_norm: 1.0
  gradient_checkpointing: false
  train_sampling_strategy: sequential
evaluation: {{eval_strategy: "no", per_device_eval_batch_size: {micro_batch}}}
early_stopping: {{enabled: false}}
checkpoints: {{save_strategy: "no"}}
launch: {{accelerate_config: cpu.yaml, num_processes: 1, num_cpu_threads_per_process: 1}}
"""


@dataclass(frozen=True)
class Program:
    """What is started, and how its output tells that the loss of a step is known."""

    argv: tuple[str, ...]
    stdout_path: Path
    output_path: Path
    first_step: str
    last_step: str


def write_rows(path: Path, count: int) -> None:
    """Conversations of invented words."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(2500)]
    with path.open("w") as stream:
        for _ in range(count):
            prompt, answer = (" ".join(rng.choices(words, k=rng.randint(20, 80))) for _ in range(2))
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


def build_model_in_child(folder: Path) -> None:
    """`model/`: a random Gemma of about 3M parameters; in a process of its own, for this one
    imports no torch.
    """
    code = (
        "import json; from pathlib import Path\nfrom runner.demo.plans import ModelShape\nfrom"
        " runner.demo.families import build_tokenizer\nfrom runner.demo.weights import"
        " build_model\nrows = [json.loads(line) for line in"
        " Path('rows.jsonl').read_text().splitlines()]\ntexts = [message['content'] for row in rows"
        " for message in row['messages']]\ntokenizer = build_tokenizer('gemma', texts,"
        " vocab_size=2048)\nmodel = build_model('gemma', tokenizer, ModelShape(2048, 256, 768, 4,"
        " 8, 4))\nmodel.save_pretrained('model'); tokenizer.save_pretrained('model')\nprint(f'"
        "model: {model.num_parameters() / 1e6:.1f}M parameters, vocabulary {len(tokenizer)}')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=build_environment(folder), check=True
    )


def build_environment(folder: Path) -> dict[str, str]:
    """Offline, one thread, output at once, and this checkout's `runner`; the same for both
    programs.
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


def write_trl_rows(folder: Path) -> None:
    """The rows that the recipe draws, in its order, as the data set of `trl sft`."""
    code = (
        "import json, os, sys; from pathlib import Path\nfrom runner.recipe.parse import"
        " load_recipe; from runner.data.rows import draw_splits\nsplits ="
        " draw_splits(load_recipe(Path('recipe.yaml')).data)\nfor name, rows in (('train',"
        " splits.train), ('test', splits.validation)):\n    lines = [json.dumps({'messages':"
        " list(map(dict, row.messages))}) + '\\n' for row in rows]\n    Path('trl_rows',"
        " f'{name}.jsonl').write_text(''.join(lines))\n"
    )
    (folder / "trl_rows").mkdir()
    subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=build_environment(folder), check=True
    )


def build_trl(recipe: Recipe, folder: Path, name: str) -> Program:
    """`trl sft` with the settings of the recipe."""
    adapter, training = recipe.adapter.model_dump(), recipe.training
    assert training.max_steps is not None
    settings: dict[str, object] = {
        "accelerate_config": "cpu.yaml",
        "model_name_or_path": "model",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "dataset_name": "trl_rows",
        "max_length": recipe.data.max_length,
        "loss_type": "nll",
        "use_peft": True,
        "lora_r": adapter["r"],
        "lora_alpha": adapter["lora_alpha"],
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": MICRO_BATCH,
        "per_device_eval_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": training.max_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "seed": training.seed,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "eval_strategy": "steps",
        "eval_steps": training.max_steps,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": training.max_steps,
        "output_dir": name,
    }
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    last = f"'epoch': '{training.max_steps * recipe.global_batch_size / NUM_TRAIN_ROWS:.4g}'"
    output_path = folder / f"{name}.txt"
    return Program(("trl", "sft", *flags), output_path, output_path, "{'loss': ", last)


def build_ours(recipe: Recipe, folder: Path, name: str) -> Program:
    """`runner launch` of the recipe, under a name of its own."""
    log_path = find_run(folder, name).attempt(1).log_path
    steps = recipe.training.max_steps
    argv = ("runner", "launch", "recipe.yaml", "--name", name)
    return Program(
        argv,
        folder / f"{name}.txt",
        log_path,
        f"step 1/{steps}  loss",
        f"step {steps}/{steps}  loss",
    )


def find_run(folder: Path, name: str) -> RunPaths:
    """The run directory of one launch of ours."""
    return RunPaths(folder / "runs" / "benchmark" / name)


def read_tree_seconds(pid: int) -> float:
    """User and system seconds of a process, of its living descendants, and of those that they have
    reaped.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(child) for task in tasks for child in (task / "children").read_text().split()
        ]
    # Ended in this moment: its parent is about to count it.
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own = sum(int(field) for field in fields[11:15]) / _TICKS_PER_SECOND
    return own + sum(read_tree_seconds(child) for child in children)


def measure(program: Program, folder: Path) -> dict[str, float]:
    """Processor seconds of one run, by part."""
    at: dict[str, float] = {}
    with program.stdout_path.open("wb") as stdout:
        process = subprocess.Popen(
            program.argv,
            cwd=folder,
            env=build_environment(folder),
            stdout=stdout,
            stderr=subprocess.STDOUT,
        )
        while True:
            text = (
                program.output_path.read_text(errors="replace")
                if program.output_path.exists()
                else ""
            )
            for part, pattern in (
                ("start-up", program.first_step),
                ("training", program.last_step),
            ):
                if part not in at and pattern in text:
                    at[part] = read_tree_seconds(process.pid)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or len(at) != 2:
        raise SystemExit(
            f"{' '.join(program.argv[:2])} failed or printed no losses:\n{text[-4000:]}"
        )
    whole = usage.ru_utime + usage.ru_stime
    return {
        "start-up": at["start-up"],
        "training": at["training"] - at["start-up"],
        "ending": whole - at["training"],
        "whole": whole,
    }


def read_losses(
    folder: Path, trl_name: str, our_name: str, max_steps: int
) -> tuple[list[float], list[float]]:
    """The loss of every step, of theirs and of ours."""
    history = load_json(folder / trl_name / f"checkpoint-{max_steps}" / "trainer_state.json")[
        "log_history"
    ]
    rows = load_jsonl(find_run(folder, our_name).metrics_path)
    return [row["loss"] for row in history if "loss" in row], [
        row["loss"] for row in rows if "loss" in row
    ]


def require_equal(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The largest difference of a step's loss; no figure is worth anything when the two did not do
    the same.
    """
    if len(theirs) != len(ours):
        raise SystemExit(f"{len(theirs)} steps of trl against {len(ours)} of ours")
    worst = max(abs(one - other) for one, other in zip(theirs, ours, strict=True))
    if worst > LOSS_TOLERANCE:
        raise SystemExit(
            f"the losses differ by up to {worst:.3g}: the two runs did not do the same work"
        )
    return worst


def describe(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[list[str], float]:
    """The table, and our ratio for the whole."""
    lines = [f"{'CPU seconds':<12}{'trl sft':>24}{'runner launch':>24}{'ratio':>8}"]
    ratio = 0.0
    for part in PARTS:
        cells, medians = [], []
        for name in ("trl", "runner"):
            values = sorted(run[part] for run in measured[name])
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.2f} ({values[0]:.2f} to {values[-1]:.2f})")
        ratio = medians[1] / medians[0]
        lines.append(f"{part:<12}{cells[0]:>24}{cells[1]:>24}{ratio:>8.3f}")
    return lines, ratio


def measure_in_turn(
    recipe: Recipe, folder: Path, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Seconds of every run of both programs, and the largest difference between their losses."""
    assert recipe.training.max_steps is not None
    measured: dict[str, list[dict[str, float]]] = {"trl": [], "runner": []}
    worst = 0.0
    for repeat in range(repeats + 1):  # the first one only fills the caches
        names = {"trl": f"trl-{repeat}", "runner": f"ours-{repeat}"}
        programs = {
            "trl": build_trl(recipe, folder, names["trl"]),
            "runner": build_ours(recipe, folder, names["runner"]),
        }
        for program, command in programs.items():
            seconds = measure(command, folder)
            if repeat > 0:
                measured[program].append(seconds)
            shown = "  ".join(f"{part} {value:.2f}" for part, value in seconds.items())
            print(f"{f'run {repeat}' if repeat else 'warm-up'} {program:<7} {shown}", flush=True)
        losses = read_losses(folder, names["trl"], names["runner"], recipe.training.max_steps)
        worst = max(worst, require_equal(*losses))
    return measured, worst


def main() -> None:
    """Measure and print; exit status 1 when the whole is over budget."""
    parser = argparse.ArgumentParser(
        description="processor seconds of one fine-tune: trl sft against runner launch"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--test-rows", type=int, default=1, help="rows that only ours scores, base and tuned"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="single-run-") as name:
        folder = Path(name)
        (folder / "cpu.yaml").symlink_to(ROOT / "accelerate_configs" / "cpu.yaml")
        write_rows(
            folder / "rows.jsonl", NUM_TRAIN_ROWS + NUM_VALIDATION_ROWS + arguments.test_rows
        )
        text = RECIPE.format(
            num_train=NUM_TRAIN_ROWS,
            num_validation=NUM_VALIDATION_ROWS,
            num_test=arguments.test_rows,
            global_batch=MICRO_BATCH * ACCUMULATION,
            micro_batch=MICRO_BATCH,
            max_steps=arguments.steps,
            learning_rate=LEARNING_RATE,
        )
        (folder / "recipe.yaml").write_text(text)
        build_model_in_child(folder)
        write_trl_rows(folder)
        measured, worst = measure_in_turn(
            parse_recipe(text, where="benchmark"), folder, arguments.repeats
        )
    lines, ratio = describe(measured)
    print(
        f"\n{arguments.steps} steps each, largest difference of a loss {worst:.1e}; medians (and"
        " range)\n"
    )
    print("\n".join(lines))
    sys.exit(0 if ratio <= BUDGET else 1)


if __name__ == "__main__":
    main()
