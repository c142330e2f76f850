"""Measures how a launch gets its rows: seconds, rows per second and memory, without a cache entry,
when it writes one, and when it reads one.

Run `python benchmarks/rows.py` in the repository root. Each figure comes from a separate
process, which loads the tokenizer and does what a trainer does up to its data set: it draws,
tokenizes and proves rows of about 300 tokens, hashes them for `samples.json`, and builds the
training set. Data of fewer than 5,000 rows take the path `memory`; `first` writes an entry and
`second` reads it. Memory is the peak above the level after the imports, including pages of mapped
files; the number in brackets is the process's own memory at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and "--in" not in sys.argv:
    sys.path.insert(0, str(ROOT))

ARMS: Final = ("memory", "first", "second")
NUM_HELD_OUT: Final = 100  # of validation and of test


def write_project(root: Path, num_rows: int) -> None:
    """A tokenizer and a file of dialogues, none of them twice."""
    from runner.demo.weights import build_tiny_model

    build_tiny_model("gemma2", root / "model")
    generator = random.Random(num_rows)
    with (root / "rows.jsonl").open("w") as stream:
        for number in range(num_rows + 2 * NUM_HELD_OUT):
            turns = [
                f"{speaker}: is {generator.randrange(10**6)} late?"
                for speaker in ("Ann", "Bob") * 8
            ]
            summary = f"Ann and Bob speak of {number}."
            stream.write(json.dumps({"document": "\n".join(turns), "summary": summary}) + "\n")


def build_recipe(root: Path, num_rows: int) -> Any:
    """The recipe of one run on them."""
    from runner.recipe.parse import parse_recipe

    sections = {
        "run": {"grid": "rows", "name": "rows", "axes": {}, "schema_version": 1},
        "model": {"path": str(root / "model"), "dtype": "float32"},
        "adapter": {"method": "none"},
        "quantization": {"method": "none"},
        "data": {
            "train": {"path": str(root / "rows.jsonl")},
            "task": {"name": "summarization", "prompt": "Summarize:\n{document}"},
            "num_train_samples": num_rows,
            "num_validation_samples": NUM_HELD_OUT,
            "num_test_samples": NUM_HELD_OUT,
            "seed": 1,
            "max_length": 2048,
        },
        "loss": "completion",
        "training": {
            "seed": 1,
            "global_batch_size": 8,
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
        },
        "evaluation": {"eval_strategy": "epoch", "per_device_eval_batch_size": 8},
        "early_stopping": {"enabled": False},
        "checkpoints": {"save_strategy": "epoch", "keep_latest": 1},
        "launch": {
            "accelerate_config": str(ROOT / "accelerate_configs/cpu.yaml"),
            "num_processes": 1,
        },
    }
    return parse_recipe(json.dumps(sections), where="rows")


def read_rows(root: Path, num_rows: int, arm: str, num_cores: int) -> dict[str, Any]:
    """One arm, in this process: what it took."""
    import datasets

    from runner.data.rows import build_samples, describe_samples
    from runner.data.tokenizer import load_tokenizer

    if arm != "memory":
        from runner.data.row_entries import build_parts, load_entry, name_entry, write_rows
        from runner.data.shards import Work
        from runner.run.entries import find_entry, write_entry
    from runner.data.draw import draw_splits
    from runner.recipe.contents import ContentHashes, hash_contents

    recipe = build_recipe(root, num_rows)
    contents = hash_contents(recipe, ContentHashes(root / "hashes.json"))
    tokenizer = load_tokenizer(recipe.model)
    before = measure()
    if arm == "memory":
        samples = build_samples(recipe.data, tokenizer, draw_splits(recipe.data))
    else:
        parts = build_parts(recipe, tokenizer, contents)
        assert parts is not None, "every file was hashed"
        folder = root / "entries" / name_entry(parts)
        if arm == "first":
            folder.parent.mkdir(exist_ok=True)
            work = Work(recipe.data, recipe.model)
            raw = draw_splits(recipe.data)
            write_entry(
                folder,
                lambda target: write_rows(target, raw, work, tokenizer, num_cores=num_cores),
                parts=parts,
                producer={},
            )
            del raw
        else:
            assert find_entry(folder) is not None, "the first launch has written it"
        samples = load_entry(folder)
    described = describe_samples(samples, "completion")
    if arm == "memory":  # as `sft.trainer` does
        rows = samples.train.rows
        columns = {
            "input_ids": [list(row.input_ids) for row in rows],
            "labels": [row.labels("completion") for row in rows],
        }
        dataset = datasets.Dataset.from_dict(columns)
    else:
        dataset = samples.train.rows.build_dataset("completion", [])  # type: ignore[attr-defined]
    after = measure()
    assert len(dataset[len(dataset) - 1]["labels"]) > 100
    return {
        "seconds": after["seconds"] - before["seconds"],
        "cpu_seconds": after["cpu_seconds"] - before["cpu_seconds"],
        "peak_mib": after["peak_mib"] - before["mib"],
        "own_mib": after["own_mib"] - before["own_mib"],
        "num_tokens": described["splits"]["train"]["num_tokens"],
        "hash": described["splits"]["train"]["mask_hash"],
    }


def measure() -> dict[str, float]:
    """Time and memory of this process, and CPU seconds of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mib = {name: int(status[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}
    return {
        "seconds": time.monotonic(),
        "cpu_seconds": sum(one.ru_utime + one.ru_stime for one in used),
        "peak_mib": mib["VmHWM"],
        "mib": mib["VmRSS"],
        "own_mib": mib["RssAnon"],
    }


def main() -> None:
    """Measure each arm in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1000,10000,100000", help="numbers of training rows")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--cores", type=int, default=1, help="for the launch that writes")
    parser.add_argument("--in", dest="root", help=argparse.SUPPRESS)  # of the measured process
    arguments = parser.parse_args()
    if arguments.root is not None:
        root, num_rows = Path(arguments.root), int(arguments.rows)
        print(json.dumps(read_rows(root, num_rows, arguments.arms, arguments.cores)))
        return
    lines = [
        "| rows | arm | seconds | CPU seconds | rows per CPU second | peak MiB (own in the end) |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for num_rows in map(int, arguments.rows.split(",")):
        with tempfile.TemporaryDirectory() as name:
            write_project(Path(name), num_rows)
            hashes = set()
            for arm in arguments.arms.split(","):
                command = [sys.executable, __file__, "--in", name, "--rows", str(num_rows)]
                command += ["--arms", arm, "--cores", str(arguments.cores)]
                done = subprocess.run(
                    command,
                    env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))},
                    check=True,
                    capture_output=True,
                    text=True,
                )
                one = json.loads(done.stdout.splitlines()[-1])
                hashes.add(one["hash"])
                lines.append(
                    f"| {num_rows:,} | {arm} | {one['seconds']:.1f} | {one['cpu_seconds']:.2f}"
                    f" | {num_rows / one['cpu_seconds']:,.0f} | {one['peak_mib']:,.0f}"
                    f" ({one['own_mib']:,.0f}) |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
            assert len(hashes) == 1, "every arm has the same labels"
    print("\n".join(lines))  # in one piece: libraries print too


if __name__ == "__main__":
    main()
