"""A task is one file: once it is in the folder of tasks, a recipe can name it, and a run is judged
by it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Final

import pytest

from runner.files import load_json
from runner.grid.starter import SHARED_FOLDERS
from runner.sft.generation import load_answers
from tests.conftest import ROOT, Project

TASK_FILE: Final = '''\
"""The task `parity`: even and odd numbers, judged by how short the answers are."""

from typing import Literal

from runner.data.tasks.base import Judgement, Task, build_answered, require_column
from runner.strict import Text


class ParityTask(Task):
    METRICS = ("brevity", "most_brevity")
    RECOGNISED_BY = ((("number",), {"even_text": "straight"}),)

    name: Literal["parity"]
    even_text: Text = "even"

    def build_example(self, row, where):
        number = require_column(row, "number", where)
        answer = "odd" if number % 2 else self.even_text
        return build_answered(where, f"{number}?", answer, (answer,))

    def judge(self, prediction, references):
        return Judgement({"brevity": 1 / (1 + len(prediction))})

    def combine_scores(self, judged):
        most = max(scores["brevity"] for references, scores in judged)
        return super().combine_scores(judged) | {"most_brevity": most}
'''
TASK: Final = "{name: parity, even_text: straight}"
TRAINING: Final = (
    "training={num_train_epochs: null, max_steps: 4}",
    "evaluation.generation={enabled: true, max_new_tokens: 4, during_training: true}",
    "checkpoints={metric: brevity, mode: max}",
)


@pytest.fixture(scope="module")
def with_parity(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a copy of the package that has one file more."""
    folder = tmp_path_factory.mktemp("with_parity")
    shutil.copytree(
        ROOT / "runner", folder / "runner", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "runner" / "data" / "tasks" / "parity.py").write_text(TASK_FILE)
    for name in ("recipe_templates", "sweeps", "data", *SHARED_FOLDERS):  # the stock files
        (folder / name).symlink_to(ROOT / name)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def numbers(project: Project) -> Project:
    """A project whose rows are numbers."""
    project.add_model()
    (project.root / "data.jsonl").unlink()
    rows = [json.dumps({"number": number}) for number in range(60)]
    (project.root / "data.jsonl").write_text("\n".join(rows))
    return project


def test_the_file_is_all_that_a_recipe_needs_to_name_the_task(
    numbers: Project, with_parity: Mapping[str, str]
) -> None:
    dry = ("launch", "recipe.yaml", "--dry-run", "--name", "parity")
    done = numbers.cli(*dry, f"data.task={TASK}", *TRAINING, environment=with_parity)
    assert done.returncode == 0, done.stderr
    done = numbers.cli(*dry, "data.task={name: parity, evem_text: x}", environment=with_parity)
    assert done.returncode == 2 and "did you mean `even_text`?" in done.stderr
    done = numbers.cli(*dry, "data.task={name: parities}", environment=with_parity)
    assert "math_tools, python or parity" in done.stderr, "new tasks are listed last"
    done = numbers.cli(*dry, f"data.task={TASK}")
    assert "`name` is the text 'parity', expected conversations," in done.stderr


def test_the_file_is_all_that_init_needs_to_recognise_its_rows(
    numbers: Project, with_parity: Mapping[str, str]
) -> None:
    init = ("init", "study", "--data", "data.jsonl")
    done = numbers.cli(*init)
    assert done.returncode == 2 and "cannot tell the task from the columns: number" in done.stderr
    done = numbers.cli(*init, environment=with_parity)
    assert done.returncode == 0, done.stderr
    template = numbers.root / "study" / "recipe_templates" / "first" / "recipe.yaml.j2"
    assert '    name: "parity"\n    even_text: "straight"\n' in template.read_text()


@pytest.mark.slow
def test_a_run_trains_and_is_judged_by_the_task(
    numbers: Project, with_parity: Mapping[str, str]
) -> None:
    text = numbers.recipe_path.read_text()
    numbers.recipe_path.write_text(text.replace("{name: conversations}", TASK))
    done = numbers.cli("check", "recipe.yaml", environment=with_parity)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    launch = ("launch", "recipe.yaml", "--name", "parity", *TRAINING)
    done = numbers.cli(*launch, environment=with_parity)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    paths = numbers.paths("parity")
    result = load_json(paths.result_path)
    assert result["metric"] == "brevity" and 0 < result["best_metric"] <= 1
    for model in ("base", "tuned"):
        answers = load_answers(paths.predictions_path, model)
        assert {answer.references for answer in answers} == {("straight",), ("odd",)}
        scores = [1 / (1 + len(answer.prediction)) for answer in answers]
        assert result["generation"][model]["metrics"] == {
            "brevity": pytest.approx(sum(scores) / len(scores)),
            "most_brevity": max(scores),
        }
