"""Runs whose models answer: equal if interrupted or not, on any number of ranks, and trained as
without answers.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.files import load_jsonl
from runner.run.paths import RunPaths
from runner.sft.generation import load_answers
from tests.conftest import ROOT, Project
from tests.support.training_runs import (
    RUNS,
    assert_same_outputs,
    launch,
    launch_killed_at,
    list_files,
    read_evaluations,
    read_log,
    read_result,
)

pytestmark = pytest.mark.slow

# One-letter labels and a high learning rate: the tiny model learns to answer with one of them in 8
# steps.
SST2 = (
    f"data.train.path={ROOT}/data/sst2/train.jsonl",
    f"data.test={{path: {ROOT}/data/sst2/validation.jsonl}}",
    "data.task={name: sst2, prompt: 'Review: {sentence}', label_texts: ['n', p]}",
    "data={num_train_samples: 40, num_test_samples: null}",
    "adapter.r=16",
    (
        "training={learning_rate: 3e-2, num_train_epochs: null, max_steps: 16,"
        " gradient_checkpointing: true}"
    ),
    (
        "evaluation={eval_steps: 8, generation: {enabled: true, max_new_tokens: 6, during_training:"
        " true}}"
    ),
    "checkpoints={save_steps: 8, metric: accuracy, mode: max}",
)


@pytest.fixture(scope="module")
def answered(workplace: Project) -> RunPaths:
    """An uninterrupted run on SST-2, whose best checkpoint is chosen by the accuracy of its
    answers.
    """
    workplace.add_model("gemma")
    return launch(workplace, "sst2", *SST2)


def test_answers_are_stored_and_scored(answered: RunPaths) -> None:
    result = read_result(answered)
    answers = {model: load_answers(answered.predictions_path, model) for model in ("base", "tuned")}
    test_rows = [
        row["row_id"] for row in load_jsonl(answered.eval_rows_path) if row["model"] == "base"
    ]
    for model, found in answers.items():
        score = result.generation[model]
        assert [answer.row_id for answer in found] == test_rows
        assert (
            score.metrics["accuracy"]
            == sum(answer.judgement.scores["accuracy"] for answer in found) / 24
        )
        assert (score.num_rows, score.num_judged) == (24, 24)
        assert score.num_unfinished == sum(not answer.is_finished for answer in found)
    assert result.generation["base"].num_unfinished > 0 == result.generation["tuned"].num_unfinished
    assert (
        result.generation["tuned"].metrics["accuracy"]
        > result.generation["base"].metrics["accuracy"]
    )


def test_the_best_checkpoint_is_chosen_by_the_answers(answered: RunPaths) -> None:
    result = read_result(answered)
    evaluations = read_evaluations(answered)
    assert list(evaluations) == [0, 8, 16]
    assert all(row["generation"]["num_rows"] == 12 and "f1" in row for row in evaluations.values())
    values = {step: row["accuracy"] for step, row in evaluations.items() if step > 0}
    assert (result.metric, result.best_metric) == (
        "accuracy",
        max(values.values()) or pytest.fail("nothing learned"),
    )
    assert values[result.best_step] == result.best_metric


def test_an_interrupted_run_answers_the_same(workplace: Project, answered: RunPaths) -> None:
    paths = launch_killed_at(
        workplace, "sst2-killed", *SST2, event="os.rename", path="step-16/COMMITTED.json"
    )
    assert load_answers(paths.predictions_path, "base") and not load_answers(
        paths.predictions_path, "tuned"
    )
    launch(workplace, "sst2-killed", *SST2)
    assert "resuming from step 8" in read_log(paths)
    assert_same_outputs(paths, answered)


def test_two_ranks_under_zero_3_answer_the_same(workplace: Project, answered: RunPaths) -> None:
    zero_3 = "launch.accelerate_config=accelerate_configs/zero3.yaml"
    paths = launch(workplace, "sst2-zero-3", zero_3, *SST2, num_processes=2)
    assert paths.predictions_path.read_bytes() == answered.predictions_path.read_bytes()
    assert read_result(paths).generation == read_result(answered).generation


def test_a_run_that_answers_trains_as_one_that_does_not(finished: Project) -> None:
    """With dropout, so that a random number drawn while answering would change every later step."""
    generation = (
        "evaluation.generation={enabled: true, max_new_tokens: 4, num_samples: 5, during_training:"
        " true}"
    )
    paths, silent = (
        launch(finished, "answering", generation, *RUNS["gemma-lora"]),
        finished.paths("gemma-lora"),
    )
    assert load_jsonl(silent.metrics_path) == [
        without_generation(row) for row in load_jsonl(paths.metrics_path)
    ]
    assert paths.eval_rows_path.read_bytes() == silent.eval_rows_path.read_bytes()
    assert [path.read_bytes() for path in list_files(paths.model_dir)] == [
        path.read_bytes() for path in list_files(silent.model_dir)
    ]
    assert not silent.predictions_path.exists() and read_result(silent).generation == {}
    assert [
        answer.judgement.scores for answer in load_answers(paths.predictions_path, "tuned")
    ] == [{}] * 5


def without_generation(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "generation"}


def test_a_metric_of_the_project_chooses_the_checkpoint_and_stops_training(
    workplace: Project,
) -> None:
    """One that is better when it is smaller; another one, which never gets better, stops the run
    after two evaluations.
    """
    workplace.add_model("gemma")
    rows = [{"q": f"What is {n}+{n}?", "a": f"It is {2 * n}.", "most": 5} for n in range(60)]
    (workplace.root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace.root / "own.py").write_text(
        "def build(row):\n"
        "    print('built')\n"
        "    return [{'role': 'user', 'content': row['q']},\n"
        "            {'role': 'assistant', 'content': row['a']}]\n"
        "def words_off(prediction, references, row):\n"
        "    return abs(len(prediction.split()) - row['most'])\n"
        "def flat(prediction, references, row):\n"
        "    return None if row['q'] == 'What is 1+1?' else 1\n"
    )
    metrics = ", ".join(
        f"{{name: {n}, function: 'own.py:{n}', mode: min}}" for n in ("words_off", "flat")
    )
    own = (
        "data.train.path=sums.jsonl",
        "data.task={name: python, function: 'own.py:build'}",
        f"evaluation.metrics=[{metrics}]",
        "evaluation.generation={enabled: true, max_new_tokens: 8, during_training: true}",
        "checkpoints={metric: words_off, mode: min}",
        "early_stopping={enabled: true, metric: flat, mode: min, patience: 1}",
    )
    recipe = workplace.write_recipe("own.json", *own)
    assert workplace.cli("check", recipe, "--allow-code").returncode == 0
    paths = launch(workplace, "own", *own)
    result, evaluations = read_result(paths), read_evaluations(paths)
    assert list(evaluations) == [0, 4, 8] and result.stop_reason == "early_stopping"
    values = {step: row["words_off"] for step, row in evaluations.items() if step > 0}
    assert result.best_metric == min(values.values()) == values[result.best_step]
    for model in ("base", "tuned"):
        answers = load_answers(paths.predictions_path, model)
        off = [abs(len(answer.prediction.split()) - 5) for answer in answers]
        assert [answer.own_scores["words_off"] for answer in answers] == off
        score = result.generation[model]
        assert score.metrics["words_off"] == sum(off) / 15
        assert score.metrics["flat"] == 1 and score.num_judged_by["words_off"] == 15
    log = read_log(paths)
    assert "built" in log and "eval_words_off" in log
    report = workplace.cli("report", paths.run_dir)
    assert "larger is better (smaller: words_off, flat)" in report.stdout
