"""Finished runs with scores of single rows whose true means are known, for tests of effects."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner.files import write_json_atomic, write_jsonl_atomic
from runner.plan.status import read_status
from runner.recipe.identity import RULES
from runner.recipe.parse import Recipe
from runner.run.facts import read_facts
from runner.run.record import Attempt
from runner.run.result import GenerationScore, SplitScore, TrainResult
from tests.support.reports import Run, make_recipe, write_base

NUM_ROWS, TOKENS_PER_ROW, BYTES_PER_ROW = 40, 10, 50
BASE_NLL = 3.0


def make_attempt(**more: Any) -> Attempt:
    """An attempt that ended without an error; `more` are fields of an attempt."""
    fields: dict[str, Any] = {
        "number": 1,
        "started_at_utc": "2026-01-02T03:04:05+00:00",
        "ended_at_utc": "2026-01-02T03:14:05+00:00",
        "command": ("true",),
        "environment": {},
        "num_processes": 1,
        "host": "host-1",
        "versions": {"torch": "2.13.0", "trl": "1.7.1"},
    }
    return Attempt(**(fields | more))


def draw_noise(seed: int, *names: Any, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Noise of a row of a run: equal for equal names."""
    key = [seed, *(zlib.crc32(str(name).encode()) for name in names)]
    return np.random.default_rng(key).normal(0, 1, num_rows)


def scored(
    root: Path,
    recipe: Recipe,
    nll: float | Sequence[float],
    *,
    base: float = BASE_NLL,
    num_rows: int = NUM_ROWS,
    tokens: int | Sequence[int] = TOKENS_PER_ROW,
    num_bytes: int = BYTES_PER_ROW,
    rows_hash: str | None = None,
    row_prefix: str = "r",
    group_size: int = 1,
    rules: int = RULES,
    contents: dict[str, str] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    references: Sequence[Sequence[str]] | None = None,
    metrics: Mapping[str, float] | None = None,
    own_scores: Mapping[str, Sequence[float | None]] | None = None,
    attempt: Attempt | None = None,
    splits: dict[str, dict[str, Any]] | None = None,
    **result: Any,
) -> Run:
    """A completed run with these nats per completion token in each test row and, if `scores` or
    `own_scores` are given, answers with these scores. `result` are fields of the result.
    """
    attempts = [] if attempt is None else [attempt]
    paths = write_base(root, recipe, *attempts, rules=rules, contents=contents)
    counts = np.broadcast_to(np.asarray(tokens), (num_rows,)).astype(int)
    values = {"base": np.full(num_rows, base), "tuned": np.broadcast_to(nll, (num_rows,))}
    rows: list[dict[str, Any]] = []
    totals = {}
    for model, per_token in values.items():
        some = [
            {
                "model": model,
                "row_id": f"{row_prefix}{at:03}",
                "group": f"g{at // group_size}" if group_size > 1 else f"{row_prefix}{at:03}",
                "completion_nll_sum": float(per_token[at] * counts[at]),
                "template_nll_sum": 0.0,
                "num_completion_tokens": int(counts[at]),
                "nll_sum": float((per_token[at] + 1) * counts[at] * 3),
                "num_tokens": int(counts[at] * 3),
                "num_bytes": num_bytes,
            }
            for at in range(num_rows)
        ]
        rows += some
        totals[model] = SplitScore(
            num_rows=num_rows,
            **{key: sum(row[key] for row in some) for key in list(some[0]) if key[:3] in SUMMED},
        )
    write_jsonl_atomic(paths.eval_rows_path, rows)
    generation = {}
    if scores is not None or own_scores is not None:
        generation = _write_answers(
            paths.predictions_path, rows, recipe, scores, references, metrics, own_scores
        )
    fields: dict[str, Any] = {
        "recipe_digest": "d",
        "outcome": "completed",
        "stop_reason": "num_train_epochs",
        "num_steps": 24,
        "best_step": 20,
        "best_metric": 2.0,
        "metric": "nll_per_completion_token",
        "num_train_rows": 60,
    }
    whole = TrainResult(
        **(fields | {key: value for key, value in result.items() if key in fields}),
        base={"test": totals["base"]},
        tuned={"test": totals["tuned"]},
        generation=generation,
    )
    # Fields that this version does not know are left out when the file is read.
    write_json_atomic(paths.result_path, whole.model_dump(mode="json") | result)
    ids = f"{row_prefix}{num_rows}"
    hashes = {"num_rows": num_rows, "ids_hash": rows_hash or ids, "input_ids_hash": str(tokens)}
    write_json_atomic(paths.samples_path, {"splits": {"test": hashes, **(splits or {})}})
    return recipe, paths, read_status(read_facts(paths), recipe, {})


SUMMED = ("com", "tem", "num", "nll")


def _write_answers(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    scores: Mapping[str, Sequence[float]] | None,
    references: Sequence[Sequence[str]] | None,
    metrics: Mapping[str, float] | None,
    own_scores: Mapping[str, Sequence[float | None]] | None,
) -> dict[str, GenerationScore]:
    answers: list[dict[str, Any]] = []
    num_rows = len(rows) // 2
    for row_at, row in enumerate(rows):
        at = row_at % num_rows
        answer = {
            "model": row["model"],
            "row_id": row["row_id"],
            "prediction": "yes",
            "references": list(references[at]) if references is not None else ["yes"],
            "is_finished": True,
            "is_readable": True,
            "scores": {name: values[at] for name, values in (scores or {}).items()},
        }
        if own_scores is not None:
            answer["own_scores"] = {name: values[at] for name, values in own_scores.items()}
        answers.append(answer)
    write_jsonl_atomic(path, answers)
    task = recipe.data.task
    parts = [
        task.score_row(tuple(answer["references"]), answer["scores"])
        for answer in answers[:num_rows]
        if answer["scores"]
    ]
    names = dict.fromkeys(name for part in parts for name in part)
    means = {name: float(np.mean([part[name] for part in parts if name in part])) for name in names}
    num_judged_by = {}
    for name, values in (own_scores or {}).items():
        judged = [value for value in values if value is not None]
        num_judged_by[name] = len(judged)
        means[name] = float(np.mean(judged))
    score = GenerationScore(
        num_rows=num_rows,
        num_judged=len(parts),
        num_unfinished=0,
        num_unreadable=0,
        metrics=means | dict(metrics or {}),
        num_judged_by=num_judged_by,
    )
    return {"base": score, "tuned": score}


def scored_grid(
    root: Path,
    axes: Mapping[str, Sequence[Any]],
    nll: Any,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    sd_run: float = 0.01,
    sd_row: float = 0.05,
    left_out: Sequence[Mapping[str, Any]] = (),
    own_seeds: bool = False,
    **settings: Any,
) -> list[Run]:
    """A run for each combination of the axes and each seed; `nll(**axes)` is the true mean of a
    cell. The axes `model`, `loss` and `num_train_samples` set the recipe keys of these names.
    `settings` are arguments of `scored`; functions among them are called with the axes.
    """
    cells: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        cells = [cell | {name: value} for cell in cells for value in values]
    runs = []
    difficulty = draw_noise(0, "difficulty")
    for number, cell in enumerate(cells):
        for seed in seeds:
            if any(one.items() <= (cell | {"seed": seed}).items() for one in left_out):
                continue
            trained = seed + 100 * (number + 1) if own_seeds else seed
            noise = draw_noise(trained, *cell.values())
            shift = sd_run * draw_noise(trained, *cell.values(), "run", num_rows=1)[0]
            values = nll(**cell) + shift + sd_row * noise + 0.2 * difficulty
            given = {
                key: value(**cell, seed=seed) if callable(value) else value
                for key, value in settings.items()
            }
            runs.append(
                scored(
                    root,
                    make_seed_recipe(cell, seed, trained, *given.pop("overrides", ())),
                    values,
                    **given,
                )
            )
    return runs


def make_seed_recipe(
    cell: Mapping[str, Any], seed: int, trained: int | None = None, *more: str
) -> Recipe:
    """The recipe of one cell and seed."""
    overrides = [f"training.seed={seed if trained is None else trained}"]
    if "model" in cell:
        overrides.append(f"model.path=demo_models/{cell['model']}")
    if "loss" in cell:
        overrides.append(f"loss={cell['loss']}")
    if "num_train_samples" in cell:
        overrides.append(f"data.num_train_samples={cell['num_train_samples']}")
    name = "_".join([*map(str, cell.values()), f"s{seed}"])
    return make_recipe(name, dict(cell) | {"seed": seed}, *overrides, *more)
