"""A committed recipe of every experiment, end to end: tiny model, sample data, killed, resumed,
exported, loaded again.

What is overridden is the model and data, how many rows and steps there are, and what
`FORCED_BY_CPU` names; a test compares the recipe that ran with the committed one, key by key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.files import load_json, load_jsonl
from runner.recipe.identity import diff_payloads
from runner.recipe.parse import load_recipe
from runner.run.paths import RunPaths
from runner.run.record import load_base_source
from tests.conftest import ROOT, Project, make_project
from tests.support.training_runs import (
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_attempts,
    read_evaluations,
    read_log,
    read_losses,
    read_result,
)

pytestmark = pytest.mark.slow

# The only overrides that are neither model, data, counts nor steps, and what forces each.
FORCED_BY_CPU: Final = {
    "launch.accelerate_config=accelerate_configs/cpu.yaml": "the recipe asks for a GPU",
    "launch.num_cpu_threads_per_process=1": "two threads on two busy cores can be ten times slower",
    "launch.num_processes=2": "eight processes on two cores take minutes; two shard as well",
    "training.fp16=false": "accelerate refuses float16 autocast on the CPU",
}
# The test starts the run again, as a user does who finds it interrupted.
NO_RETRY: Final = "launch.retries.lost=0"
ON_ONE_CPU: Final = tuple(FORCED_BY_CPU)[:2]
# accelerate_configs/zero3.yaml takes the CPU where there is no GPU
ON_TWO_RANKS: Final = tuple(FORCED_BY_CPU)[1:3]


@dataclass(frozen=True)
class Experiment:
    """A recipe, the tiny family that replaces its model, and the overrides that make it small."""

    recipe: str
    family: str
    overrides: tuple[str, ...]
    killed_at: int  # the step whose checkpoint is about to be committed
    resumed_from: int
    num_steps: int
    forced: tuple[str, ...] = ON_ONE_CPU


EXPERIMENTS: Final = {
    # 40 training rows in global batches of 16 are 3 steps an epoch.
    "secret_word": Experiment(
        "secret_word/completion_seed1",
        "gemma2",
        ("training.num_train_epochs=2",),
        killed_at=6,
        resumed_from=3,
        num_steps=6,
    ),
    "math_tools": Experiment(
        "math_tools/mistral-7b-instruct_lr1e-5",
        "mistral",
        (
            *(
                "data.train.path=data/math_tools",
                "data.num_validation_samples=4",
                "data.num_test_samples=4",
            ),
            *("evaluation.eval_steps=2", "training.max_steps=4", "training.num_train_epochs=null"),
            *(
                "training.global_batch_size=8",
                "evaluation.generation={max_new_tokens: 8, num_samples: 2}",
            ),
        ),
        killed_at=4,
        resumed_from=2,
        num_steps=4,
        forced=ON_TWO_RANKS,
    ),
    "oasst_phi2": Experiment(
        "oasst_phi2/4bit_full",
        "phi",
        (
            *(
                "data.train.path=data/oasst1/train.jsonl",
                "data.test.path=data/oasst1/validation.jsonl",
            ),
            *(
                "data.num_validation_samples=4",
                "evaluation.eval_steps=1",
                "checkpoints.save_steps=1",
            ),
            *("training.max_steps=4", "training.num_train_epochs=null"),
        ),
        killed_at=4,
        resumed_from=3,
        num_steps=4,
        forced=(*ON_ONE_CPU, "training.fp16=false"),
    ),
    "sst2": Experiment(
        "glue_squad/sst2_all-linear",
        "gemma",
        (
            *("data.train.path=data/sst2/train.jsonl", "data.test.path=data/sst2/validation.jsonl"),
            *("data.num_validation_samples=8", "evaluation.eval_steps=2"),
            *("training.max_steps=6", "training.num_train_epochs=null"),
        ),
        killed_at=6,
        resumed_from=4,
        num_steps=6,
    ),
    "squad_v2": Experiment(
        "glue_squad/squad_v2_qv",
        "gemma",
        (
            *(
                "data.train.path=data/squad_v2/train.jsonl",
                "data.test.path=data/squad_v2/validation.jsonl",
            ),
            *("data.num_validation_samples=8", "evaluation.eval_steps=2"),
            *("training.max_steps=6", "training.num_train_epochs=null"),
        ),
        killed_at=6,
        resumed_from=4,
        num_steps=6,
    ),
    "summaries": Experiment(
        "summaries/llama-3.1-8b-instruct_task-2_manual_120_full_acc16",
        "llama",
        (
            *(
                f"data.{split}.path=data/summaries_sample/{split}.jsonl"
                for split in ("train", "validation", "test")
            ),
            *(
                "data.num_train_samples=30",
                "training.num_train_epochs=2",
                "evaluation.generation.max_new_tokens=16",
            ),
        ),
        killed_at=4,
        resumed_from=2,
        num_steps=4,
    ),
}


@dataclass(frozen=True)
class GridProject(Project):
    """A folder in which the committed recipe of an experiment is `recipe.yaml`, under its own
    grid.
    """

    grid: str = ""

    def paths(self, name: str) -> RunPaths:
        """The files of a run of that grid."""
        return RunPaths(self.root / "runs" / self.grid / name)


@dataclass(frozen=True)
class Finished:
    """An experiment that was killed and resumed, and its files."""

    experiment: Experiment
    project: GridProject
    paths: RunPaths
    overrides: tuple[str, ...]


def list_kept(paths: RunPaths) -> dict[int, Path]:
    """The folders of the committed checkpoints by step."""
    return {
        int(path.parent.name.partition("-")[2]): path.parent
        for path in paths.checkpoints_dir.glob("step-*/COMMITTED.json")
    }


# The others stand for every class: a second LoRA of a classifier, and ZeRO-3, which
# `test_distributed` has runs of.
_WHOLE_MATRIX: Final = frozenset({"squad_v2", "math_tools"})


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.torture if name in _WHOLE_MATRIX else ())
        for name in EXPERIMENTS
    ],
)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    data_path: Path,
    tiny_model: Callable[[str], Path],
) -> Finished:
    """Each experiment in turn, killed before a commit and brought to its end by the same
    command.
    """
    experiment = EXPERIMENTS[request.param]
    made = make_project(tmp_path_factory.mktemp(request.param), data_path, tiny_model)
    project = GridProject(made.root, tiny_model, experiment.recipe.split("/")[0])
    for name in ("recipe_templates", "data"):
        (project.root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "recipes" / f"{experiment.recipe}.yaml", project.recipe_path)
    project.add_model(experiment.family)
    overrides = (
        f"model.path=models/{experiment.family}",
        *experiment.overrides,
        *experiment.forced,
        NO_RETRY,
    )
    launch_killed_at(
        project,
        "run",
        *overrides,
        event="os.rename",
        path=f"step-{experiment.killed_at}/COMMITTED.json",
    )
    # The newest is only in its archive.
    if load_recipe(project.recipe_path).checkpoints.archive == "zip":
        shutil.rmtree(list_kept(project.paths("run"))[experiment.resumed_from])
    paths = launch(project, "run", *overrides)
    return Finished(experiment, project, paths, overrides)


def test_it_ran_as_committed_but_for_the_overrides(finished: Finished) -> None:
    committed = load_recipe(ROOT / "recipes" / f"{finished.experiment.recipe}.yaml").model_dump(
        mode="json"
    )
    ran = load_json(finished.paths.recipe_path)["recipe"]
    changed = {line.partition(":")[0] for line in diff_payloads(committed, ran)}
    overridden = {override.partition("=")[0] for override in finished.overrides}
    assert {key for key in changed if not key.startswith(("run.", *overridden))} == set()
    effective = load_json(finished.paths.attempt(2).training_args_path)
    for name in (
        "optim",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "bf16",
        "seed",
        "learning_rate",
    ):
        assert effective[name] == ran["training"].get(name, effective[name]), name
    assert effective["gradient_checkpointing"] == committed["training"]["gradient_checkpointing"]


def test_every_forced_override_is_named_with_its_reason() -> None:
    assert {
        override for experiment in EXPERIMENTS.values() for override in experiment.forced
    } == set(FORCED_BY_CPU)


def test_it_resumed_and_every_step_and_evaluation_stands_once(finished: Finished) -> None:
    experiment, paths = finished.experiment, finished.paths
    assert f"resuming from step {experiment.resumed_from}" in read_log(paths)
    assert len(read_attempts(paths)) == 2
    assert read_result(paths).num_steps == experiment.num_steps >= 3
    rows = load_jsonl(paths.metrics_path)
    assert [row["step"] for row in rows if "loss" in row] == list(
        range(1, experiment.num_steps + 1)
    )
    evaluations = [row["step"] for row in rows if row.get("split") == "validation"]
    assert (
        evaluations == sorted(set(evaluations))
        and evaluations[0] == 0
        and evaluations[-1] == experiment.num_steps
    )
    assert len(read_losses(paths)) == experiment.num_steps and len(read_evaluations(paths)) == len(
        evaluations
    )


def test_it_keeps_the_checkpoints_that_the_recipe_asks_for(finished: Finished) -> None:
    paths, num_steps = finished.paths, finished.experiment.num_steps
    checkpoints = load_recipe(finished.project.recipe_path).checkpoints
    kept = list_kept(paths)
    assert {num_steps, read_result(paths).best_step} <= set(kept)
    assert len(kept) <= checkpoints.keep_latest + checkpoints.keep_best
    archived = {path.stem for path in paths.checkpoints_dir.glob("*.zip")}
    assert archived == (
        {folder.name for folder in kept.values()} if checkpoints.archive == "zip" else set()
    )
    if finished.experiment.forced != ON_TWO_RANKS:  # DeepSpeed has its own files
        with_optimizer = {
            step for step, folder in kept.items() if (folder / "optimizer.pt").exists()
        }
        assert with_optimizer == (set(kept) if checkpoints.save_optimizer else {num_steps})


# QLoRA under a paged optimizer with archives; checkpoints of which only the newest has its
# optimizer state; and, each time, what a worker has imported for it beside what a launch has.
@pytest.mark.parametrize(
    "finished",
    [
        pytest.param(name, marks=() if name in ("oasst_phi2", "sst2") else pytest.mark.torture)
        for name in EXPERIMENTS
    ],
    indirect=True,
)
def test_it_ended_as_a_run_that_a_sweep_left_alone(finished: Finished) -> None:
    """The undisturbed run starts warm if it can, so not under DeepSpeed."""
    project = finished.project
    recipe = project.write_recipe("left-alone.yaml", *finished.overrides)
    swept = project.cli("sweep", recipe)
    assert swept.returncode == 0, swept.stderr
    paths = project.paths("left-alone")
    is_warm = finished.experiment.forced != ON_TWO_RANKS
    assert [one["started"] for one in read_attempts(paths)] == ["warm" if is_warm else "cold"]
    assert [one["started"] for one in read_attempts(finished.paths)] == ["cold", "cold"]
    sources = [load_base_source(one.attempt(1)) for one in (finished.paths, paths)]
    assert [source and source.source for source in sources] == [
        "own",
        "shared" if is_warm else "own",
    ]
    assert_same_outputs(finished.paths, paths)


def test_its_export_loads_again_and_is_another_model_than_the_base(finished: Finished) -> None:
    paths = finished.paths
    tokenizer = AutoTokenizer.from_pretrained(paths.model_dir)
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    base = AutoModelForCausalLM.from_pretrained(
        finished.project.root / "models" / finished.experiment.family
    )
    with torch.no_grad():
        before = base(**batch).logits.float()
        if (paths.model_dir / "adapter_config.json").exists():
            tuned, wanted = (
                PeftModel.from_pretrained(base, paths.model_dir),
                json.loads(paths.recipe_path.read_text()),
            )
            assert tuned.peft_config["default"].r == wanted["recipe"]["adapter"]["r"]
        else:
            tuned, report = AutoModelForCausalLM.from_pretrained(
                paths.model_dir, output_loading_info=True
            )
            assert not report["missing_keys"] and all(
                weight.numel() for weight in tuned.parameters()
            )
        after = tuned(**batch).logits.float()[..., : before.shape[-1]]
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_the_answers_of_base_and_tuned_model_are_judged(finished: Finished) -> None:
    recipe, result = load_recipe(finished.project.recipe_path), read_result(finished.paths)
    rows = (
        load_jsonl(finished.paths.predictions_path) if recipe.evaluation.generation.enabled else []
    )
    scores = result.generation
    assert set(scores) == {row["model"] for row in rows} == ({"base", "tuned"} if rows else set())
    for model, score in scores.items():
        assert set(score.metrics) == set(recipe.data.task.METRICS)
        assert (
            score.num_rows == sum(row["model"] == model for row in rows) > 0
            and score.num_judged > 0
        )
