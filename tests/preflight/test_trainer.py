"""TRL's trainer starts with everything that `runner check` accepts: the check builds the real
configuration, optimizer, schedule and data loader, and names the recipe key if it cannot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from runner.errors import RecipeError
from runner.preflight.check import build_json, format_result
from runner.preflight.survey import CheckResult
from runner.preflight.trainer import check_trainers, replace_arguments
from runner.recipe.hf_fields import REFUSED_VALUES, load_table
from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.schema import Training, TrainingBase
from runner.sft.arguments import build_config, list_arguments
from tests.conftest import RECIPE_TEXT, ROOT, Project

CPU, GPU = "accelerate_configs/cpu.yaml", "accelerate_configs/single_gpu.yaml"
# Optimizers of packages that the project does not install, and what names the package.
PACKAGES: Final = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "galore_adamw": "galore_torch",
    "galore_adamw_8bit": "galore_torch",
    "galore_adafactor": "galore_torch",
    "apollo_adamw": "apollo_torch",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
}
# Schedules that cannot do without arguments.
NEEDED: Final = {
    "cosine_with_min_lr": "{min_lr: 0.0}",
    "cosine_warmup_with_min_lr": "{min_lr_rate: 0.1}",
    "warmup_stable_decay": "{num_decay_steps: 2}",
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def recipe_of(*overrides: str, config: str = CPU) -> Recipe:
    everything = [f"launch.accelerate_config={config}", *overrides]
    return parse_recipe(RECIPE_TEXT, where="r.yaml", overrides=everything)


def check(*recipes: Recipe) -> CheckResult:
    result = CheckResult(len(recipes))
    check_trainers(recipes, result)
    return result


def errors_of(*overrides: str, config: str = CPU) -> list[str]:
    return list(check(recipe_of(*overrides, config=config)).errors)


@pytest.mark.parametrize("name", load_table("SFTConfig")["optim"]["choices"])
def test_every_optimizer_is_built_or_refused_by_name(name: str) -> None:
    stated = [f"training.optim={name}"]
    if name in REFUSED_VALUES["optim"]:
        with pytest.raises(RecipeError, match=f"`{name}` cannot be used here"):
            recipe_of(*stated)
        return
    errors = errors_of(*stated)
    if name not in PACKAGES:
        assert not errors
        return
    assert len(errors) == 1
    assert f"`training.optim: {name}`" in errors[0] and PACKAGES[name] in errors[0]


@pytest.mark.parametrize("name", load_table("SFTConfig")["lr_scheduler_type"]["choices"])
def test_every_schedule_is_built_or_refused_by_name(name: str) -> None:
    stated = [f"training.lr_scheduler_type={name}"]
    if name in REFUSED_VALUES["lr_scheduler_type"]:
        with pytest.raises(RecipeError, match=f"`{name}` cannot be used here"):
            recipe_of(*stated)
        return
    errors = errors_of(*stated)
    if name not in NEEDED:
        assert not errors
        return
    assert len(errors) == 1 and f"`training.lr_scheduler_type: {name}`" in errors[0]
    assert f"hint: `lr_scheduler_kwargs` of `{name}` are" in errors[0]
    assert not errors_of(*stated, f"training.lr_scheduler_kwargs={NEEDED[name]}")


def test_what_is_refused_is_what_the_libraries_know() -> None:
    for key, values in REFUSED_VALUES.items():
        assert set(values) <= set(load_table("SFTConfig")[key]["choices"])


def test_texts_that_have_choices_are_the_libraries() -> None:
    from transformers.training_args import trainer_log_levels

    for level in trainer_log_levels:
        recipe_of(f"training.log_level={level}", f"training.log_level_replica={level}")
    for loss in ("nll", "dft", "chunked_nll"):
        assert not errors_of(f"training.loss_type={loss}"), loss


# The mistakes; the keys that an error names; its text.
MISTAKES: Final[dict[str, tuple[list[str], list[str], str]]] = {
    "a wrong argument of a schedule": (
        ["training.lr_scheduler_kwargs={foo: 1}", "training.lr_scheduler_type=cosine"],
        ["lr_scheduler_kwargs"],
        "`lr_scheduler_kwargs` of `cosine` are num_cycles",
    ),
    "arguments of a schedule that takes none": (
        ["training.lr_scheduler_kwargs={num_cycles: 1}", "training.lr_scheduler_type=constant"],
        ["lr_scheduler_kwargs"],
        "`constant` takes no `lr_scheduler_kwargs`",
    ),
    "arguments that are no mapping": (
        ["training.lr_scheduler_kwargs=cosine"],
        ["lr_scheduler_kwargs"],
        "must be a mapping",
    ),
    "an end above the rate": (
        ["training.lr_scheduler_kwargs={lr_end: 1}", "training.lr_scheduler_type=polynomial"],
        ["lr_scheduler_kwargs"],
        "must be smaller than initial lr",
    ),
    "a rate that cannot be computed at the end": (
        ["training.lr_scheduler_kwargs={power: -1}", "training.lr_scheduler_type=polynomial"],
        ["lr_scheduler_kwargs"],
        "negative power",
    ),
    "a rate below zero": (
        [
            "training.lr_scheduler_kwargs={lr_end: -1}",
            "training.lr_scheduler_type=polynomial",
        ],
        ["lr_scheduler_kwargs"],
        "updates the learning rate would be -",
    ),
    "beta": (["training.adam_beta1=1.5"], ["adam_beta1"], "Invalid beta"),
    "epsilon": (["training.adam_epsilon=-1e-8"], ["adam_epsilon"], "Invalid epsilon"),
    "a rate": (["training.learning_rate=-1"], ["learning_rate"], "Invalid learning rate"),
    "warm-up": (["training.warmup_steps=-1"], ["warmup_steps"], "warmup_steps >= 0"),
    "prefetching without workers": (
        ["training.dataloader_prefetch_factor=2"],
        ["dataloader_prefetch_factor"],
        "dataloader_num_workers",
    ),
    "workers that stay, without workers": (
        ["training.dataloader_persistent_workers=true"],
        ["dataloader_persistent_workers"],
        "num_workers > 0",
    ),
    "a number of workers": (
        ["training.dataloader_num_workers=-1"],
        ["dataloader_num_workers"],
        "non-negative",
    ),
    "a misspelt argument of an optimizer": (
        ["training.optim=sgd", "training.optim_args='mometum=0.9'"],
        ["optim_args"],
        "`sgd` does not read mometum: it reads momentum, dampening",
    ),
    "an argument that goes with another": (
        ["training.optim=sgd", "training.optim_args='nesterov=true'"],
        ["optim_args"],
        "Nesterov momentum requires a momentum",
    ),
    "an argument of an optimizer without any": (
        ["training.optim_args='momentum=0.9'"],
        ["optim_args"],
        "it reads no arguments",
    ),
    "an argument of checkpointing": (
        [
            "training.gradient_checkpointing=true",
            "training.gradient_checkpointing_kwargs={use_reentrnt: true}",
        ],
        ["gradient_checkpointing_kwargs"],
        "use_reentrnt",
    ),
    "a compiler": (["training.torch_compile_backend=gcc"], ["torch_compile_backend"], "GCC"),
    "an absent package": (["training.use_liger_kernel=true"], ["use_liger_kernel"], "liger-kernel"),
    "debugging": (["training.debug=everything"], ["debug"], "underflow_overflow"),
    "a GPU's setting on the CPU": (["training.tf32=true"], ["tf32"], "Ampere"),
    "one of several mistakes": (
        [
            "training.adam_beta1=1.5",
            "training.dataloader_persistent_workers=true",
            "training.lr_scheduler_kwargs={foo: 1}",
        ],
        ["adam_beta1", "lr_scheduler_kwargs", "dataloader_persistent_workers"],
        "unexpected keyword argument 'foo'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_under_its_key(name: str) -> None:
    overrides, keys, words = MISTAKES[name]
    errors = errors_of(*overrides)
    assert len(errors) == len(keys), errors
    for error, key in zip(errors, keys, strict=True):
        assert error.startswith(f"`training.{key}: "), error
        assert error.count("`training.") == 1, error
    assert any(words in error for error in errors), errors


def test_runs_that_share_a_mistake_share_its_error_whatever_else_differs() -> None:
    recipes = [
        recipe_of(
            "training.adam_beta1=1.5", f"training.learning_rate={rate}", f"run.name=rate-{rate}"
        )
        for rate in (0.1, 0.2, 0.3)
    ]
    other = recipe_of("training.adam_beta1=1.5", "training.adam_beta2=2.5", "run.name=other")
    result = check(*recipes, other)
    assert [(text.partition("`:")[0], len(names)) for text, names in result.errors.items()] == [
        ("`training.adam_beta1: 1.5", 4),
        ("`training.adam_beta2: 2.5", 1),
    ]


def test_if_each_of_two_keys_would_fix_it_both_are_named() -> None:
    (error,) = errors_of(
        "training.lr_scheduler_type=polynomial",
        "training.lr_scheduler_kwargs={lr_end: 1e-5}",
        "training.learning_rate=1e-6",
    )
    assert "`training.learning_rate: 1e-06` with `training.lr_scheduler_kwargs:" in error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.seed=-1", "greater than or equal to 0"),
        ("training.seed=4294967296", "less than 4294967296"),
        ("training.optim_args=momentum", "expected `name=value, name=value`"),
        ("training.loss_type=mse", "expected nll, dft or chunked_nll"),
        ("training.log_level=loud", "expected detail, debug, info"),
    ],
)
def test_what_never_works_is_refused_in_the_schema(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(override)


def test_what_has_no_effect_is_a_warning() -> None:
    result = check(
        recipe_of(
            "training.optim=sgd",
            "training.adam_beta1=0.8",
            "training.weight_decay=0.1",
            "training.gradient_checkpointing_kwargs={use_reentrant: false}",
        )
    )
    assert not result.errors
    assert list(result.warnings) == [
        "`training.gradient_checkpointing_kwargs` has no effect without `gradient_checkpointing:"
        " true`",
        "`training.adam_beta1` has no effect under `optim: sgd`",
    ]
    assert not check(recipe_of("training.adam_beta1=0.8")).warnings


def test_what_the_device_alone_knows_is_listed_and_not_refused() -> None:
    overrides = ["training.bf16=true", "training.tf32=true", "training.torch_compile=true"]
    result = check(
        recipe_of(*overrides, "run.name=a", config=GPU),
        recipe_of(*overrides, "run.name=b", config=GPU),
        recipe_of(config="accelerate_configs/zero3.yaml"),
    )
    assert not result.errors
    both = ["tests/a", "tests/b"]
    assert result.unchecked == {
        "`training.bf16`": both,
        "`training.tf32`": both,
        "`training.torch_compile`": both,
        "DeepSpeed of accelerate_configs/zero3.yaml": ["tests/base"],
    }
    assert build_json(result)["not_checked"][0] == {"text": "`training.bf16`", "runs": both}
    lines = list(format_result(result))
    assert "not checked, because it needs the run's device or model:" in lines
    assert "  `training.bf16`  [2 runs]" in lines


def test_what_is_built_is_what_the_trainer_builds(tmp_path: Path) -> None:
    """Under an accelerate config for the CPU nothing is replaced."""
    recipe = recipe_of("training.bf16=true", "training.lr_scheduler_type=cosine")
    arguments, unchecked = replace_arguments(recipe, tmp_path)
    assert not unchecked
    assert arguments == list_arguments(recipe, tmp_path, num_processes=1, uses_cpu=True)
    assert build_config(arguments).lr_scheduler_type.value == "cosine"


def test_a_stated_argument_reaches_the_trainer(tmp_path: Path) -> None:
    """The runner's own arguments take no place of one that a recipe may state."""
    ours = set(list_arguments(recipe_of(), tmp_path, num_processes=1, uses_cpu=False))
    generated = set(Training.model_fields) - set(TrainingBase.model_fields)
    stated = set(recipe_of().training.hugging_face_arguments())
    assert (ours - stated) & generated == {"dataloader_pin_memory"}
    for value in (True, False):
        recipe = recipe_of(f"training.dataloader_pin_memory={value}")
        arguments = list_arguments(recipe, tmp_path, num_processes=1, uses_cpu=False)
        assert arguments["dataloader_pin_memory"] is value


def test_the_loss_of_a_router_needs_a_router(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.preflight.survey import check_recipes

    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    recipe = project.recipe("training.router_aux_loss_coef=0.1")
    result = check_recipes([recipe])
    check_trainers([recipe], result)
    (error,) = result.errors
    assert error.startswith("`training.router_aux_loss_coef: 0.1`: models/gemma has no router")


def test_the_same_mistake_of_many_runs_is_built_and_said_once(project: Project) -> None:
    project.add_model("gemma")
    for seed in (1, 2):
        project.write_recipe(
            f"recipes/tests/seed-{seed}.yaml", f"training.seed={seed}", "training.adam_beta1=1.5"
        )
    project.write_recipe("recipes/tests/good.yaml", "training.bf16=true")
    done = project.call("check", "recipes/tests")
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "`training.adam_beta1: 1.5`: the trainer would not start" in done.stderr
    assert "2 of 3 recipes cannot be trained" in done.stderr
    as_json = project.call("check", "recipes/tests", "--json")
    content = json.loads(as_json.stdout)
    assert [len(error["runs"]) for error in content["errors"]] == [2]
    assert content["not_checked"] == []


def test_the_command_line_names_every_mistake(project: Project) -> None:
    project.add_model("gemma")
    cases = [
        (overrides, f"`training.{keys[0]}: ", words) for overrides, keys, words in MISTAKES.values()
    ]
    cases += [
        ([f"training.lr_scheduler_type={name}"], f"`training.lr_scheduler_type: {name}`", "hint: ")
        for name in NEEDED
    ]
    for number, (overrides, _, _) in enumerate(cases):
        project.write_recipe(f"recipes/tests/case-{number}.yaml", *overrides)
    done = project.call("check", "recipes/tests")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{len(cases)} of {len(cases)} recipes cannot be trained" in done.stderr
    for _, key, words in cases:
        assert key in done.stderr and words in done.stderr, (key, words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr_scheduler_type: reduce_lr_on_plateau", "`reduce_lr_on_plateau` cannot be used here"),
        ("optim: schedule_free_adamw", "`schedule_free_adamw` cannot be used here"),
        ("optim: lomo", "no checkpoint would hold its state"),
    ],
)
def test_the_command_line_names_the_line(project: Project, line: str, words: str) -> None:
    text = RECIPE_TEXT.replace("  lr_scheduler_type: linear\n", f"  {line}\n")
    (project.root / "recipes" / "tests").mkdir(parents=True)
    (project.root / "recipes" / "tests" / "a.yaml").write_text(text)
    done = project.call("check", "recipes/tests")
    number = text[: text.index(line)].count("\n") + 1
    assert done.returncode == 2 and words in done.stderr
    assert f"line {number} " in done.stderr and "Traceback" not in done.stderr


def test_nothing_of_the_process_is_changed() -> None:
    import logging

    import torch
    from transformers.utils import logging as library

    before = (library.get_verbosity(), logging.root.manager.disable)
    assert not errors_of("training.log_level=debug", "training.full_determinism=true")
    assert (library.get_verbosity(), logging.root.manager.disable) == before
    assert not torch.are_deterministic_algorithms_enabled()
