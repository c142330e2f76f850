"""Two grids of finished runs, shared by the tests of rows, comparisons and formats."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runner.data.tasks.squad_v2 import SquadV2Task
from runner.data.tasks.sst2 import Sst2Task
from runner.plan.status import read_status
from runner.run.facts import read_facts
from runner.run.lease import Lease
from runner.run.record import (
    Failure,
)
from tests.support.reports import Run, completed, make_answers, make_recipe, not_completed, pending


@pytest.fixture
def demo_runs(tmp_path: Path) -> Iterator[list[Run]]:
    """Two models x two losses x three sample counts; one run failed, one never started, one is
    running.
    """
    nll = {"gemma": 1.9, "llama": 1.7}
    runs = []
    for model in nll:
        for loss in ("full", "completion"):
            for samples in (60, 120, 180):
                name = f"{model}_{loss}_{samples:03}"
                recipe = make_recipe(
                    name,
                    {"model": model, "loss": loss, "samples": samples, "epochs": 3},
                    f"model.path=demo_models/{model}",
                    f"loss={loss}",
                    f"data.num_train_samples={samples}",
                )
                tuned = (
                    nll[model] - samples / 1000 - (0.05 + samples / 10000) * (loss == "completion")
                )
                if name == "gemma_completion_180":
                    runs.append(
                        not_completed(tmp_path, recipe, Failure(kind="diverged", message="NaN"))
                    )
                elif name in ("llama_full_060", "llama_completion_060"):
                    runs.append(pending(tmp_path, recipe))
                elif name == "gemma_full_060":
                    runs.append(completed(tmp_path, recipe, 3.02, stop_reason="early_stopping"))
                else:
                    runs.append(
                        completed(
                            tmp_path, recipe, tuned, num_bytes=4000 if model == "gemma" else 3600
                        )
                    )
    recipe, paths, _ = runs[-2]
    paths.result_path.unlink()
    with closing(Lease(paths.lease_path)) as lease:
        assert lease.try_acquire()
        runs[-2] = (recipe, paths, read_status(read_facts(paths), recipe, {}))
        yield runs


@pytest.fixture
def answering_runs(tmp_path: Path) -> list[Run]:
    """Two tasks x two losses; one run's models did not answer."""
    runs = []
    names = {"sst2": Sst2Task.METRICS, "squad_v2": SquadV2Task.METRICS}
    prompts = {"sst2": "{sentence}", "squad_v2": "{context} {question}"}
    for task, metrics in names.items():
        for at, loss in enumerate(("full", "completion")):
            recipe = make_recipe(
                f"{task}_{loss}",
                {"task": task, "loss": loss},
                f"loss={loss}",
                f"data.task={{name: {task}, prompt: '{prompts[task]}'}}",
            )
            values = [{name: part * (1 + at) / 4 for name in metrics} for part in (0.5, 1.5)]
            answers = None if (task, loss) == ("squad_v2", "full") else make_answers(*values)
            runs.append(completed(tmp_path, recipe, 2.0 - at / 10, answers=answers))
    return runs
