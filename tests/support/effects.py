"""Reports built by hand, with effects of known size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.report.cells import build_cells
from runner.report.effects import (
    AxisEffects,
    Cell,
    Effect,
    Equivalence,
    Interaction,
    Metric,
    Report,
)
from runner.report.rows import ReportRow
from runner.report.statistics import Interval
from tests.support.reports import Run, completed, make_recipe, rows_of

NLL = Metric("nll_per_completion_token", "NLL per completion token", "nats per token", "min")


def make_interval(estimate: float, half_width: float | None = 0.05, **fields: Any) -> Interval:
    standard: dict[str, Any] = {
        "kind": "seeds and rows",
        "p": 0.001,
        "level": 0.95,
        "v_seed": 1.2e-4,
        "v_row": 3.4e-5,
        "v_res": 5.6e-6,
        "df_seed": 4.0,
        "df_row": 63.0,
        "num_groups": 64,
        "num_seeds": (3, 3),
    }
    return Interval(estimate=estimate, half_width=half_width, **standard | fields)


def make_effect(
    pairs: Sequence[tuple[Cell, Cell]],
    at: Mapping[str, Any],
    interval: Interval | None,
    **fields: Any,
) -> Effect:
    standard: dict[str, Any] = {"axis": "loss", "reference": "full", "compared": "completion"}
    return Effect(
        metric=NLL, at=dict(at), pairs=tuple(pairs), interval=interval, **standard | fields
    )


def replicated_runs(root: Path) -> list[Run]:
    """Two losses x two counts x three seeds."""
    runs = []
    for at, loss in enumerate(("full", "completion")):
        for samples in (60, 180):
            for seed in (1, 2, 3):
                axes = {"loss": loss, "samples": samples, "seed": seed}
                recipe = make_recipe(
                    f"r{at}_{samples:03}_s{seed}",
                    axes,
                    f"loss={loss}",
                    f"data.num_train_samples={samples}",
                    f"training.seed={seed}",
                )
                tuned = 2.0 - at * (0.3 if samples == 60 else 0.1) + seed / 100
                runs.append(completed(root, recipe, tuned))
    return runs


def make_report(rows: Sequence[ReportRow], **fields: Any) -> Report:
    """The loss depends on the count: 0.3 at 60 rows, 0.1 at 180, which is below the noise."""
    cells = build_cells(rows, "seed")
    by_axes = {(cell.axes["loss"], cell.axes["samples"]): cell for cell in cells}
    full, completion = dict.fromkeys(loss for loss, _ in by_axes)
    sides = {"reference": full, "compared": completion}
    pairs = {n: (by_axes[full, n], by_axes[completion, n]) for n in (60, 180)}
    simple = (
        make_effect(
            [pairs[60]],
            {"samples": 60},
            make_interval(-0.3, level=0.975),
            p_adjusted=0.0021,
            is_confirmatory=True,
            equivalence=Equivalence(0.02, (-0.34, -0.26), False),
            design="pooled by model",
            noise_floor=0.12,
            flags=("updates differ: 32 and 92.",),
            **sides,
        ),
        make_effect(
            [pairs[180]],
            {"samples": 180},
            make_interval(-0.1, level=0.975),
            p_adjusted=0.2,
            why_exploratory="declared since run r0_180_s1, after its first attempt",
            noise_floor=0.12,
            is_below_noise=True,
            flags=("updates differ: 32 and 92.", "survivors only: 1 of 3 runs failed."),
            **sides,
        ),
    )
    cells_effects = tuple(
        make_effect([pair], {"samples": n}, make_interval(-0.3), p_adjusted=0.01, **sides)
        for n, pair in pairs.items()
    )
    refused = make_effect(
        [pairs[60]],
        {"samples": 60},
        None,
        refused=("the tasks differ: sst2 and squad_v2.",),
        **sides,
    )
    effects = AxisEffects(
        grid="demo",
        task="conversations",
        metric=NLL,
        axis="loss",
        pooled=None,
        depends_on=("samples",),
        interactions=(Interaction("samples", 0.004, 12.34, (1.0, 8.0)),),
        simple={"samples": simple},
        cells=cells_effects,
        **sides,
    )
    other = AxisEffects(
        grid="demo",
        task="conversations",
        metric=Metric("f1", "F1", "f1", "max", is_of_answers=True),
        axis="loss",
        pooled=None,
        depends_on=(),
        interactions=(),
        simple={},
        cells=(refused,),
        **sides,
    )
    standard: dict[str, Any] = {
        "rows": tuple(rows),
        "cells": tuple(cells),
        "metrics": (NLL, other.metric),
        "effects": (effects, other),
        "verdicts": ("loss, full -> completion, depends on samples: -0.3 at 60, -0.1 at 180.",),
        "warnings": ("2 different sets of test rows",),
        "noise_floors": {("demo", "conversations", NLL.name): 0.12},
    }
    return Report(**standard | fields)


def replicated_rows(root: Path, completion: Any = "completion") -> list[ReportRow]:
    """The rows of `replicated_runs`, with `completion` in place of that value of the axis; it may
    be a value that no recipe can hold but a record can.
    """
    rows = []
    for row in rows_of(replicated_runs(root)):
        axes = dict(row.axes)
        if axes["loss"] == "completion":
            axes["loss"] = completion
        run = row.recipe.run.model_copy(update={"axes": axes})
        rows.append(replace(row, recipe=row.recipe.model_copy(update={"run": run})))
    return rows
