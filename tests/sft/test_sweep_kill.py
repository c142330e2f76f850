"""The headline: a sweep that is killed again and again, and started again, ends as one that was
left alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import pytest

from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.killed_sweeps import (
    VICTIMS,
    KilledSweep,
    Run,
    Victim,
    choose_seed,
    sweep_under_kills,
)
from tests.support.training_runs import RUNS, add_what_runs_need, alone_with, read_attempts

# LoRA and full fine-tunes, both losses, one that stops early, one that is archived, one that
# answers.
NAMES: Final = ("gemma-lora", "gemma-full", "llama-early", "llama-lora", "mistral-full", "phi-full")
# About eight seconds of training each, so that most of the kills come while something is computed
# or saved.
LONG: Final = {
    "gemma-lora": ("training.num_train_epochs=12.5",),
    "gemma-full": ("training.num_train_epochs=12", "checkpoints.keep_best=2"),
    "llama-lora": ("training.num_train_epochs=12",),
    "mistral-full": ("training.num_train_epochs=8", "checkpoints.save_optimizer=false"),
    "phi-full": ("training.num_train_epochs=12", "evaluation.generation.during_training=true"),
}

Tell = Callable[[list[str]], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Lines for the terminal, and for `torture/<test>.txt` in the project."""

    def write(lines: list[str]) -> None:
        text = "\n".join(lines) + "\n"
        path = request.config.rootpath / "torture" / f"{request.node.name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return write


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_one_left_alone(finished: Project) -> None:
    seed = choose_seed()
    print(f"KILL_SEED={seed}")
    sweep = KilledSweep(
        finished, finished.root / "killed", list_runs(finished, "recipes", "killed", "runs")
    )
    chance = random.Random(seed)
    victims = chance.sample(VICTIMS["warm"], k=5)
    sweep_under_kills(sweep, victims, spread=2.0, chance=chance)
    print("\n".join(sweep.render_kills()))
    assert sweep.kills, "it was done before the first kill"
    recipes = [str(run.recipe_path) for run in sweep.runs]
    roots = ("runs", "killed")
    command = ("report", *recipes, "--format", "csv", "--output-root")
    reports = [finished.cli(*command, root).stdout for root in roots]
    assert reports[0] == reports[1] and reports[0].count(",completed,") == 6
    again = finished.cli("sweep", *recipes, "--output-root", "killed")
    assert again.returncode == 0 and again.stdout.count("skip") == 6


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory, workplace: Project) -> Project:
    """The workplace with a sweep of longer runs, complete under `alone`."""
    with alone_with(workplace, "alone"):
        add_what_runs_need(workplace)
        for name in NAMES:
            workplace.write_recipe(f"long/{name}.yaml", *RUNS[name], *LONG.get(name, ()))
        result = workplace.cli("sweep", "long", "--slots", "2", "--output-root", "alone")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return workplace


@pytest.mark.torture
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "wanted", "num_kills", "spread"),
    [
        ("warm", "any", int(os.environ.get("KILLS", "30")), 2.2),
        ("cold", "any", 12, 1.3),
        ("warm", "everything", 10, 2.2),
        ("warm", "worker", 10, 1.5),
        ("warm", "trainer", 10, 1.5),
    ],
)
def test_sweeps_killed_many_times(
    left_alone: Project,
    mode: str,
    wanted: Victim | Literal["any"],
    num_kills: int,
    spread: float,
    tell: Tell,
) -> None:
    """As many sweeps as that number of kills takes; after each third kill, a copy of the files
    continues.
    """
    seed, sweeps = choose_seed(), []
    chance, lines = random.Random(seed), [f"SIGKILL to {wanted}, {mode}, KILL_SEED={seed}"]
    among = VICTIMS[mode] if wanted == "any" else (wanted,)
    victims = [chance.choice(among) for _ in range(num_kills)]
    try:
        while (num_done := sum(len(sweep.kills) for sweep in sweeps)) < num_kills:
            root = f"killed-{mode}-{wanted}-{len(sweeps) + 1}"
            runs = list_runs(left_alone, "long", root, "alone")
            sweep = KilledSweep(left_alone, left_alone.root / root, runs, mode == "cold")
            sweeps.append(sweep)
            sweep_under_kills(sweep, victims[num_done:], spread, chance, moves=True)
        num_warm = sum(sweep.count_starts()[0] for sweep in sweeps)
        assert mode == "cold" or num_warm > 0, "nothing was shown of workers"
    finally:
        names = "  ".join(f"{name:<25}" for name in NAMES)
        lines.append(f"{'kill':>4}  {'after':>9}  {'whom':<40}  {names}".rstrip())
        for sweep in sweeps:
            num_before = sum(len(other.kills) for other in sweeps[: sweeps.index(sweep)])
            lines += sweep.render_kills(num_before + 1)
        lines += [sweep.summarize() for sweep in sweeps]
        tell(lines)


@pytest.mark.torture
@pytest.mark.slow
def test_two_sweeps_at_once_train_each_run_once(finished: Project) -> None:
    sweep = KilledSweep(
        finished, finished.root / "together", list_runs(finished, "recipes", "together", "runs")
    )
    assert [process.wait() for process in (sweep.start(), sweep.start())] == [
        0,
        0,
    ], sweep.printed_path.read_text()
    sweep.check()
    assert [len(read_attempts(run.paths)) for run in sweep.runs] == [1] * 6
    assert sweep.printed_path.read_text().count("completed\n") == 6


def list_runs(project: Project, recipes: str, output_root: str, reference_root: str) -> list[Run]:
    def paths(root: str, name: str) -> RunPaths:
        return RunPaths(project.root / root / "tests" / name)

    return [
        Run(Path(recipes, f"{name}.yaml"), paths(output_root, name), paths(reference_root, name))
        for name in NAMES
    ]
