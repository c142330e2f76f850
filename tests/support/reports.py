"""Runs with results of known scores, and reports of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runner.files import write_json_atomic, write_text_atomic
from runner.plan.status import RunStatus, read_status
from runner.recipe.identity import RULES
from runner.recipe.parse import Recipe, parse_recipe
from runner.report.build import build_report
from runner.report.format import FORMATS
from runner.report.rows import ReportRow, build_rows
from runner.run.facts import read_facts
from runner.run.paths import RunPaths
from runner.run.record import Attempt, Failure, RunRecord, write_record
from runner.run.result import GenerationScore, SplitScore, TrainResult

NUM_COMPLETION_TOKENS, NUM_BYTES = 1000, 4000
Run = tuple[Recipe, RunPaths, RunStatus]

RECIPE: dict[str, Any] = {
    "model": {"path": "demo_models/gemma", "dtype": "float32"},
    "adapter": {"method": "none"},
    "quantization": {"method": "none"},
    "data": {
        "train": {"path": "data/demo.jsonl"},
        "task": {"name": "conversations"},
        "num_train_samples": 60,
        "num_validation_samples": 32,
        "num_test_samples": 64,
        "seed": 7,
        "max_length": 256,
    },
    "loss": "full",
    "training": {
        "seed": 1,
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3.0,
        "learning_rate": 2e-3,
        "gradient_checkpointing": False,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 8},
    "early_stopping": {"enabled": False},
    "checkpoints": {"save_strategy": "steps", "save_steps": 10},
    "launch": {"accelerate_config": "accelerate_configs/cpu.yaml"},
}


def make_recipe(name: str, axes: dict[str, Any], *overrides: str, grid: str = "demo") -> Recipe:
    content = RECIPE | {"run": {"grid": grid, "name": name, "axes": axes}}
    return parse_recipe(json.dumps(content), where=name, overrides=overrides)


def make_score(nll: float, num_bytes: int = NUM_BYTES) -> SplitScore:
    return SplitScore(
        num_rows=64,
        num_completion_tokens=NUM_COMPLETION_TOKENS,
        num_tokens=3000,
        num_bytes=num_bytes,
        completion_nll_sum=nll * NUM_COMPLETION_TOKENS,
        nll_sum=(nll + 1) * 3000,
    )


def write_base(
    root: Path,
    recipe: Recipe,
    *attempts: Attempt,
    rules: int = RULES,
    contents: dict[str, str] | None = None,
) -> RunPaths:
    paths = RunPaths(root / recipe.run.grid / recipe.run.name)
    stated = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": "d"}
    write_json_atomic(paths.recipe_path, stated | {"contents": contents or {}, "rules": rules})
    write_record(paths, RunRecord(attempts=attempts))
    return paths


def completed(
    root: Path,
    recipe: Recipe,
    tuned: float,
    base: float = 3.0,
    *,
    rows_hash: str | None = "a1" * 32,
    num_bytes: int = NUM_BYTES,
    stop_reason: str = "num_train_epochs",
    answers: dict[str, GenerationScore] | None = None,
    rules: int = RULES,
    contents: dict[str, str] | None = None,
) -> Run:
    paths = write_base(root, recipe, rules=rules, contents=contents)
    result = TrainResult(
        recipe_digest="d",
        outcome="completed",
        stop_reason=stop_reason,
        num_steps=24,
        best_step=20,
        best_metric=tuned,
        metric="nll_per_completion_token",
        num_train_rows=60,
        base={"test": make_score(base, num_bytes), "validation": make_score(9.0)},
        tuned={"test": make_score(tuned, num_bytes), "validation": make_score(9.0)},
        generation=answers or {},
    )
    write_json_atomic(paths.result_path, result.model_dump(mode="json"))
    if rows_hash is not None:
        write_json_atomic(
            paths.samples_path, {"splits": {"test": {"num_rows": 64, "ids_hash": rows_hash}}}
        )
    return recipe, paths, read_status(read_facts(paths), recipe, {})


def not_completed(
    root: Path, recipe: Recipe, failure: Failure | None = None, number: int = 1
) -> Run:
    """A failed run, or an interrupted one if there is no failure."""
    attempt = Attempt(
        number=number,
        started_at_utc=f"2026-01-0{number}T00:00:00+00:00",
        ended_at_utc=f"2026-01-0{number}T00:05:00+00:00" if failure else None,
        command=("true",),
        environment={},
        num_processes=1,
        host=f"host-{number}",
        failure=failure,
    )
    paths = write_base(root, recipe, attempt)
    write_text_atomic(paths.attempt(number).log_path, f"started on host-{number}\n")
    return recipe, paths, read_status(read_facts(paths), recipe, {})


def pending(root: Path, recipe: Recipe) -> Run:
    paths = RunPaths(root / recipe.run.grid / recipe.run.name)
    return recipe, paths, read_status(read_facts(paths), recipe, {})


def rows_of(runs: Iterable[Run]) -> list[ReportRow]:
    return build_rows(
        (recipe, read_facts(paths, with_samples=True), status) for recipe, paths, status in runs
    )


def report(runs: Sequence[Run], format: str = "md") -> str:
    rows = rows_of(runs)
    return FORMATS[format](build_report(rows))


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def make_answers(*metrics: dict[str, float]) -> dict[str, GenerationScore]:
    """Answers of the base model and of the tuned model."""
    return {
        model: GenerationScore(
            num_rows=64, num_judged=64, num_unfinished=7 * at, num_unreadable=at, metrics=values
        )
        for at, (model, values) in enumerate(zip(("tuned", "base"), reversed(metrics), strict=True))
    }
