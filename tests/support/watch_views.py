"""Runs as the live view gets them, built in memory: no files, no processes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from runner.plan.status import RunStatus
from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.schema import Scalar
from runner.run.record import Failure, Progress
from runner.view.progress import RunView
from tests.conftest import RECIPE_TEXT

RECIPE: Final = parse_recipe(RECIPE_TEXT, where="a test")


def make_recipe(axes: Mapping[str, Scalar], name: str | None = None, grid: str = "demo") -> Recipe:
    """The test recipe in another cell of a grid."""
    name = name or "_".join(str(value) for value in axes.values()) or "only"
    run = RECIPE.run.model_copy(update={"grid": grid, "name": name, "axes": dict(axes)})
    return RECIPE.model_copy(update={"run": run})


def make_view(
    state: str,
    axes: Mapping[str, Scalar],
    *,
    name: str | None = None,
    grid: str = "demo",
    **known: Any,
) -> RunView:
    """A run in a state of any name; `known` goes to its status or to the view."""
    recipe = make_recipe(axes, name, grid)
    own = {
        key: known.pop(key)
        for key in ("log_path", "hint", "retry", "progress", "losses")
        if key in known
    }
    known = {"why": state, "num_attempts": 0 if state == "pending" else 1, **known}
    return RunView(recipe, RunStatus.model_construct(state=state, **known), **own)


def make_running(
    axes: Mapping[str, Scalar], step: int, max_steps: int, *, seconds_per_step: float, **known: Any
) -> RunView:
    """A run in training."""
    losses = [4.0 / (1 + 0.1 * number) for number in range(step)]
    progress = Progress(
        phase="training",
        step=step,
        max_steps=max_steps,
        loss=losses[-1],
        tokens_per_second=1234.5,
        seconds_per_step=seconds_per_step,
    )
    told = {"why": "training", "step": step, "max_steps": max_steps, "loss": losses[-1]}
    return make_view("running", axes, progress=progress, losses=losses, **told, **known)


def make_grid(states: Sequence[str], grid: str = "demo", **axes: Sequence[Scalar]) -> list[RunView]:
    """One run per cell, the states in turn."""
    cells = itertools.product(*axes.values())
    return [
        make_view(state, dict(zip(axes, cell, strict=True)), grid=grid)
        for cell, state in zip(cells, itertools.cycle(states), strict=False)
    ]


def make_failure(kind: Any, message: str) -> dict[str, Any]:
    """The failure in the status of a failed run."""
    return {"why": f"{kind}: {message}", "failure": Failure(kind=kind, message=message)}
