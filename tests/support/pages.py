"""Runs with scores of single rows on disk, and a report of them built by hand, for pages."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from runner.data.draw import draw_splits
from runner.files import write_jsonl_atomic
from runner.recipe.parse import Recipe
from runner.report.effects import AxisEffects, Cell, Effect, Interaction, Metric, Report
from runner.report.rows import ReportRow, Scores
from runner.report.statistics import Interval
from runner.run.paths import RunPaths
from runner.run.result import GenerationScore
from tests.support.reports import make_recipe

NLL = Metric(
    "nll_per_completion_token", "NLL per completion token", "nats per completion token", "min"
)


def write_data(path: Path, num_rows: int, text: str, answer: str = "It is {}.") -> Path:
    """Rows of prompts and answers."""
    rows = []
    for number in range(num_rows):
        words = " ".join(["word"] * (number % 7))
        messages = [
            {"role": "user", "content": f"{text.replace('{}', str(number))} {words}"},
            {"role": "assistant", "content": answer.replace("{}", str(number))},
        ]
        rows.append({"messages": messages})
    write_jsonl_atomic(path, rows)
    return path


def make_row(
    root: Path,
    axes: dict[str, Any],
    data: Path,
    *,
    shift: float,
    state: str = "completed",
    answers: Sequence[str] = (),
    position: int = 0,
    grid: str = "demo",
    num_test: int = 40,
) -> ReportRow:
    """A run whose files have the content of a real run's, with scores that `shift` moves."""
    words = (re.sub(r"[^A-Za-z0-9]+", "-", str(value))[-20:] for value in axes.values())
    name = "_".join(words).strip("-_")
    recipe = make_recipe(
        name,
        axes,
        f"data.train.path={data}",
        f"training.seed={axes.get('seed', 1)}",
        f"data.num_test_samples={num_test}",
        "data.num_validation_samples=4",
        "data.num_train_samples=8",
        grid=grid,
    )
    if state != "completed":
        return ReportRow(recipe, position, state, task="conversations")  # type: ignore[arg-type]
    run_dir = root / "runs" / grid / name
    run_dir.mkdir(parents=True)
    ids = draw_ids(recipe)
    drawn = random.Random(f"{name}")
    scores = write_scores(RunPaths(run_dir), ids, shift, drawn)
    write_curve(RunPaths(run_dir), shift, drawn)
    generation = {}
    if answers:
        write_answers(RunPaths(run_dir), ids, answers)
        score = GenerationScore(
            num_rows=len(ids), num_judged=len(ids), num_unfinished=0, num_unreadable=0, metrics={}
        )
        generation = {"base": score, "tuned": score}
    return ReportRow(
        recipe,
        position,
        "completed",
        run_dir=run_dir,
        task="conversations",
        rules=1,
        base=Scores(scores["base"], None, None),
        tuned=Scores(scores["tuned"], None, None),
        answers=generation,
        best_step=24 if position % 3 else 16,
        num_steps=24,
        stop_reason="early_stopping" if position % 5 == 4 else "num_train_epochs",
        num_updates=24,
        num_trained_tokens=12_345 + 1_000 * position,
        versions={"torch": "2.9.0"},
        source_hash="ab" * 32,
        runner_version="0.1.0",
    )


_IDS: dict[str, list[str]] = {}


def draw_ids(recipe: Recipe) -> list[str]:
    """The ids of the test rows."""
    key = f"{recipe.data.train_sources[0].path} {recipe.data.num_test_samples}"
    if key not in _IDS:
        _IDS[key] = [raw.row_id for raw in draw_splits(recipe.data).test]
    return _IDS[key]


def write_scores(
    paths: RunPaths, ids: Sequence[str], shift: float, drawn: random.Random
) -> dict[str, float]:
    """Write `eval_rows.jsonl` of both models; return their NLL per completion token."""
    rows, found = [], {}
    for model, level in (("base", 3.0), ("tuned", 1.2 + shift)):
        total = tokens = 0.0
        for number, row_id in enumerate(ids):
            count = 8 + number % 20
            own = random.Random(row_id).gauss(0, 0.3)  # the difficulty of the row
            nll = max(0.05, level + own + drawn.gauss(0, 0.12)) * count
            total, tokens = total + nll, tokens + count
            scores = {"completion_nll_sum": nll, "template_nll_sum": 0.1, "nll_sum": nll * 3}
            counts = {"num_tokens": 3 * count, "num_completion_tokens": count, "num_bytes": count}
            row = {"model": model, "row_id": row_id, "group": f"g{number % 6}"}
            rows.append({**row, **scores, **counts})
        found[model] = total / tokens
    write_jsonl_atomic(paths.eval_rows_path, rows)
    return found


def write_curve(paths: RunPaths, shift: float, drawn: random.Random) -> None:
    """`metrics.jsonl`: losses, and the validation split every 4 steps."""
    rows: list[dict[str, Any]] = []
    for step in range(0, 25):
        if step:
            rows.append({"step": step, "epoch": step / 8, "loss": 2.0, "learning_rate": 1e-3})
        if step % 4 == 0:
            nll = 1.2 + shift + 2.5 * math.exp(-step / 6) + drawn.gauss(0, 0.03)
            rows.append({"step": step, "split": "validation", "nll_per_completion_token": nll})
    write_jsonl_atomic(paths.metrics_path, rows)


def write_answers(paths: RunPaths, ids: Sequence[str], answers: Sequence[str]) -> None:
    """`predictions.jsonl` of both models."""
    rows = []
    for model in ("base", "tuned"):
        for number, row_id in enumerate(ids):
            answer = answers[number % len(answers)]
            given = {"row_id": row_id, "prediction": f"{model}: {answer}", "references": [answer]}
            own = {"is_finished": True, "is_readable": True, "scores": {}}
            rows.append({"model": model, **given, **own})
    write_jsonl_atomic(paths.predictions_path, rows)


def make_cell(rows: Sequence[ReportRow]) -> Cell:
    """A cell of runs that differ in the seed."""
    axes = {axis: value for axis, value in rows[0].axes.items() if axis != "seed"}
    scored = [row for row in rows if row.state == "completed"]
    scores = {row.seed: row.tuned.nll_per_completion_token or 0.0 for row in scored}
    base = {NLL.name: scored[0].base.nll_per_completion_token or 0.0} if scored else {}
    missing = tuple(f"{row.name} ({row.state})" for row in rows if row.state != "completed")
    known = {NLL.name: scores} if scored else {}
    return Cell(rows[0].grid, "conversations", axes, tuple(rows), known, base, missing)


def make_interval(estimate: float, half_width: float = 0.05, **changes: Any) -> Interval:
    """An interval over seeds and rows."""
    settings: dict[str, Any] = {
        **{"kind": "seeds and rows", "estimate": estimate, "half_width": half_width, "p": 0.01},
        **{"level": 0.95, "v_seed": 1e-4, "v_row": 2e-4, "v_res": 5e-5, "df_seed": 4.0},
        **{"df_row": 39.0, "num_groups": 40, "num_seeds": (3, 3)},
    }
    return Interval(**(settings | changes))


def make_effects(cells: Sequence[Cell], axis: str, reference: Any, compared: Any) -> AxisEffects:
    """The effects of two values of an axis over the cells that have both."""
    pairs = []
    for cell in cells:
        if cell.axes[axis] == reference:
            for other in cells:
                if dict(other.axes) == {**cell.axes, axis: compared}:
                    pairs.append((cell, other))

    def effect(at: dict[str, Any], those: Sequence[tuple[Cell, Cell]], **changes: Any) -> Effect:
        differences = [
            fmean(b.scores[NLL.name].values()) - fmean(a.scores[NLL.name].values())
            for a, b in those
            if a.scores and b.scores
        ]
        interval = make_interval(fmean(differences)) if differences else None
        settings: dict[str, Any] = {
            **{"metric": NLL, "axis": axis, "reference": reference, "compared": compared, "at": at},
            **{"pairs": tuple(those), "interval": interval, "noise_floor": 0.06},
            "refused": () if differences else ("no run of these cells has a score",),
            "design": "cells of one base model pool their seeds",
            "p_adjusted": 0.01,
            "is_below_noise": bool(differences) and abs(fmean(differences)) < 0.06,
        }
        return Effect(**(settings | changes))

    others = [name for name in cells[0].axes if name != axis]
    values = {name: list(dict.fromkeys(cell.axes[name] for cell in cells)) for name in others}
    simple = {
        name: tuple(
            effect({name: value}, [pair for pair in pairs if pair[0].axes[name] == value])
            for value in values[name]
        )
        for name in others
        if len(values[name]) > 1
    }
    return AxisEffects(
        grid=cells[0].grid,
        task=cells[0].task,
        metric=NLL,
        axis=axis,
        reference=reference,
        compared=compared,
        pooled=effect({}, pairs, flags=("updates differ: 32 and 92",)) if len(pairs) > 1 else None,
        depends_on=(),
        interactions=tuple(Interaction(name, 0.31, 1.2, (1.0, 8.0)) for name in simple),
        simple=simple,
        cells=tuple(
            effect({name: pair[0].axes[name] for name in others}, [pair]) for pair in pairs
        ),
    )


def make_report(
    root: Path,
    *,
    models: Sequence[str] = ("gemma", "llama"),
    losses: Sequence[str] = ("full", "completion"),
    counts: Sequence[int] = (60, 180),
    seeds: Sequence[int] = (1, 2, 3),
    num_test: int = 40,
    answers: Sequence[str] = (),
    verdicts: Sequence[str] = ("loss: completion is better than full by 0.18 nats.",),
    missing: int = 1,
    text: str = "What is {}?",
    grid: str = "demo",
) -> Report:
    """A grid of three axes and a seed, of which the last `missing` cells failed."""
    root.mkdir(exist_ok=True)
    data = write_data(root / "data.jsonl", num_test + 20, text)
    cells = []
    position = 0
    for model, loss, count in product(models, losses, counts):
        is_missing = len(cells) >= len(models) * len(losses) * len(counts) - missing
        rows = []
        for seed in seeds:
            shift = 0.2 * (model == models[-1]) - 0.2 * (loss == losses[-1]) - count / 1000
            axes = {"model": model, "loss": loss, "count": count, "seed": seed}
            rows.append(
                make_row(
                    root,
                    axes,
                    data,
                    shift=shift + 0.02 * seed,
                    state="failed" if is_missing else "completed",
                    answers=answers,
                    position=position,
                    num_test=num_test,
                    grid=grid,
                )
            )
            position += 1
        cells.append(make_cell(rows))
    contrasts = [("model", models), ("loss", losses), ("count", counts)]
    effects = tuple(
        make_effects(cells, axis, values[0], value)
        for axis, values in contrasts
        for value in values[1:]
    )
    return Report(
        rows=tuple(row for cell in cells for row in cell.runs),
        cells=tuple(cells),
        metrics=(NLL,),
        effects=effects,
        verdicts=tuple(verdicts),
        warnings=("`count` changes the number of updates: 32 and 92.",),
    )
