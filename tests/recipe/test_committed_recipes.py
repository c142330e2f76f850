"""The committed recipes, templates and sweeps load; each recipe is what its template renders."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runner.files import hash_json
from runner.grid.recipe_files import compare
from runner.grid.render import render_grid
from runner.grid.spec import list_grids, load_cards
from runner.recipe.identity import (
    _BEHAVIOUR_BEFORE,
    build_resume_fingerprint,
    derive_digest,
    diff_payloads,
)
from runner.recipe.parse import Recipe, load_recipe
from runner.recipe.schema import PassThrough
from runner.strict import Section
from tests.conftest import ROOT

TEMPLATES = ROOT / "recipe_templates"
GRIDS = list_grids(TEMPLATES)
MODELS = ("gemma-2-9b-it", "llama-3.1-8b-instruct", "mistral-7b-instruct")


@cache
def recipes_of(grid: str) -> dict[str, Recipe]:
    return {
        path.stem: load_recipe(path) for path in sorted((ROOT / "recipes" / grid).glob("*.yaml"))
    }


def test_each_folder_of_recipes_has_a_grid() -> None:
    assert sorted(path.name for path in (ROOT / "recipes").iterdir()) == GRIDS


@pytest.mark.parametrize("grid", GRIDS)
def test_committed_recipes_are_what_their_template_gives(grid: str) -> None:
    drift = compare(render_grid(TEMPLATES, grid), ROOT / "recipes" / grid)
    assert not drift and not drift.unsealed, f"runner render {grid}\n{drift}"


@pytest.mark.parametrize("grid", GRIDS)
def test_committed_recipes_load_under_their_own_names(grid: str) -> None:
    for name, recipe in recipes_of(grid).items():
        assert (recipe.run.grid, recipe.run.name) == (grid, name)


def test_committed_recipes_keep_their_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise existing runs would become other experiments. The second number covers everything
    else that must be equal for a checkpoint to be resumed, except versions; both are of 0.1.0,
    which drew and masked rows by rules 1.
    """
    monkeypatch.chdir(ROOT)
    lines = []
    for path in sorted(Path("recipes").rglob("*.yaml")):
        recipe = load_recipe(path)
        digest = derive_digest(recipe, {}, rules=1)
        fingerprint = build_resume_fingerprint(
            recipe, digest, recipe.launch.num_processes, threads=None
        )
        del fingerprint["versions"], fingerprint["recipe_digest"]
        lines.append(f"{digest} {hash_json(fingerprint)[:16]} {path}")
    kept = (ROOT / "tests" / "golden" / "digests.txt").read_text().splitlines()
    assert lines == kept, "if this is meant, CHANGELOG says which runs must start from step 0"


@pytest.mark.parametrize("grid", GRIDS)
def test_committed_recipes_fit_on_a_page_and_name_files_that_exist(grid: str) -> None:
    for path in (ROOT / "recipes" / grid).glob("*.yaml"):
        assert len(path.read_text().splitlines()) < 120
    for recipe in recipes_of(grid).values():
        assert (ROOT / recipe.launch.accelerate_config).is_file()
        assert recipe.model.chat_template is None or (ROOT / recipe.model.chat_template).is_file()


def test_the_summaries_grid_is_whole() -> None:
    recipes = recipes_of("summaries")
    axes: dict[str, tuple[Any, ...]] = {
        "model": MODELS,
        "loss": ("full", "completion"),
        "summary": ("auto", "manual"),
        "num_train_samples": (60, 120, 180),
        "task": ("task-1", "task-2", "task-3"),
        "gradient_accumulation_steps": (8, 16),
    }
    assert len(recipes) == 216
    found = Counter(tuple(recipe.run.axes.values()) for recipe in recipes.values())
    assert found == Counter(itertools.product(*axes.values()))
    assert all(list(recipe.run.axes) == list(axes) for recipe in recipes.values())


def test_the_axes_of_the_summaries_grid_are_what_the_recipe_does() -> None:
    prompts: dict[Any, set[str]] = {}
    cards = load_cards(TEMPLATES)
    for name, recipe in recipes_of("summaries").items():
        axes, task = recipe.run.axes, recipe.data.task
        assert (recipe.loss, recipe.data.num_train_samples) == (
            axes["loss"],
            axes["num_train_samples"],
        )
        assert recipe.training.gradient_accumulation_steps == axes["gradient_accumulation_steps"]
        assert recipe.model.path == cards[axes["model"]]["path"]
        assert recipe.data.train.path == f"data/summaries/{axes['summary']}/{axes['task']}.jsonl"
        assert recipe.tracking.hub_model_id == f"your-organisation/{name}"
        assert recipe.global_batch_size <= axes["num_train_samples"]
        assert recipe.quantization.method == "4bit" and recipe.adapter.method == "lora"
        assert task.name == "summarization"
        prompts.setdefault(axes["task"], set()).add(task.prompt)
    assert all(len(texts) == 1 for texts in prompts.values())
    assert len(set.union(*prompts.values())) == 3


# Keys that each axis changes, in addition to `run` and `tracking`; a key covers all below it.
AXIS_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    # Its cells have separate seeds.
    "demo": {
        "model": ("model.path", "training.seed"),
        "loss": ("loss", "training.seed"),
        "num_train_samples": ("data.num_train_samples", "training.seed"),
        "seed": ("training.seed",),
    },
    "secret_word": {"loss": ("loss",), "seed": ("training.seed",)},
    "math_tools": {"model": ("model",), "learning_rate": ("training.learning_rate",)},
    "oasst_phi2": {"weights": ("quantization",), "loss": ("loss",)},
    "glue_squad": {
        "task": ("data", "evaluation.generation.max_new_tokens"),
        "target_modules": ("adapter.target_modules",),
    },
    "summaries": {
        "model": ("model",),
        "loss": ("loss",),
        "summary": ("data.train.path",),
        "num_train_samples": ("data.num_train_samples",),
        "task": ("data.train.path", "data.validation.path", "data.test.path", "data.task.prompt"),
        "gradient_accumulation_steps": ("training.gradient_accumulation_steps",),
    },
}


@pytest.mark.parametrize("grid", GRIDS)
def test_arms_of_an_axis_differ_in_what_it_declares_and_in_nothing_else(grid: str) -> None:
    recipes = {
        name: recipe.model_dump(mode="json", exclude={"tracking"})
        for name, recipe in recipes_of(grid).items()
    }
    for axis, keys in AXIS_KEYS[grid].items():
        arms: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for recipe in recipes.values():
            others = tuple(label for name, label in recipe["run"]["axes"].items() if name != axis)
            arms.setdefault(others, []).append(
                {key: value for key, value in recipe.items() if key != "run"}
            )
        changed = {
            line.partition(":")[0]
            for first, *rest in arms.values()
            for one in rest
            for line in diff_payloads(first, one)
        }
        assert changed, axis
        assert {
            key for key in changed if not any(f"{key}.".startswith(f"{known}.") for known in keys)
        } == set(), axis
    assert {frozenset(recipe["run"]["axes"]) for recipe in recipes.values()} == {
        frozenset(AXIS_KEYS[grid])
    }


# Choices of which another one is stated, or that only say where a run runs.
MAY_BE_ABSENT = {
    "evaluation.metrics",
    *("run.overrides", "launch.num_cpu_threads_per_process"),
    *("training.global_batch_size", "training.gradient_accumulation_steps", "training.max_steps"),
    *(
        "training.bf16",
        "training.fp16",
        "evaluation.eval_steps",
        "checkpoints.save_steps",
        "checkpoints.save_epochs",
    ),
    *("model.chat_template_kwargs", "model.template_date", "model.end_of_turn"),
    *(
        f"data.{split}.{name}"
        for split in ("train", "validation", "test")
        for name in ("config_name", "revision")
    ),
    # A local file has only one.
    *(f"data.{split}.split" for split in ("train", "validation", "test")),
    "run.declared",  # of a grid that declares no contrast
    "data.num_validation_samples",  # if validation rows have their own file
    "data.num_test_samples",
    *_BEHAVIOUR_BEFORE,  # keys that were added since the recipes were written
    "launch.stall_minutes",
    "launch.retries.stalled",
    "tracking.hub_push",
    "data.task.system",  # of a task whose prompt needs no system text
}


def list_unstated(stated: Any, parsed: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys that a section could state and leaves to a default; a section that is off states
    one key.
    """
    if (
        not isinstance(parsed, Section)
        or (len(stated) == 1 and not any(stated.values()))
        or stated.get("method") == "none"
    ):
        return
    own = (
        type(parsed)._declared_fields()
        if isinstance(parsed, PassThrough)
        else set(type(parsed).model_fields)
    )
    yield from (f"{prefix}{name}" for name in sorted(own) if name not in stated)
    for name in own & set(stated):
        yield from list_unstated(stated[name], getattr(parsed, name), f"{prefix}{name}.")


# Which is short, to be read first.
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "demo"])
def test_committed_recipes_state_every_choice(grid: str) -> None:
    for name, recipe in recipes_of(grid).items():
        stated = yaml.safe_load((ROOT / "recipes" / grid / f"{name}.yaml").read_text())
        assert set(list_unstated(stated, recipe)) <= MAY_BE_ABSENT, name


def test_the_demo_grid_is_whole() -> None:
    found = Counter(tuple(recipe.run.axes.values()) for recipe in recipes_of("demo").values())
    axes = (("gemma", "llama"), ("full", "completion"), (60, 180), (1, 2, 3))
    assert found == Counter(itertools.product(*axes))


def test_the_cards_are_those_that_the_grids_and_the_readme_speak_of() -> None:
    cards = load_cards(TEMPLATES)
    others = {"gemma-1.1-2b-it", "gemma-2b-it", "gemma-7b-it", "llama-3.1-8b", "phi-2"}
    assert set(cards) == others | set(MODELS)
    # No SDPA for Gemma 2 in Transformers 5.
    assert cards["gemma-2-9b-it"]["attn_implementation"] == "eager"
    assert all(
        card["chat_template"] is None or (ROOT / card["chat_template"]).is_file()
        for card in cards.values()
    )


CHAT = [
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def render_chat(name: str, messages: list[dict[str, str]]) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # As Transformers has it.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((TEMPLATES / "chat" / name).read_text())
    return template.render(
        messages=messages, bos_token="<bos>", eos_token="<eos>", add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gemma.jinja",
            (
                "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
                "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
            ),
        ),
        (
            "llama-3.jinja",
            (
                "<bos><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
        ),
        ("human_assistant.jinja", "Human: Hi\nAssistant: Hello.<eos>\nHuman: Bye\nAssistant:"),
    ],
)
def test_a_supplied_chat_template_writes_its_format(name: str, expected: str) -> None:
    assert render_chat(name, CHAT) == expected


def test_every_supplied_chat_template_is_tested_and_refuses_what_it_cannot_say() -> None:
    assert {path.name for path in (TEMPLATES / "chat").iterdir()} == {
        "gemma.jinja",
        "llama-3.jinja",
        "human_assistant.jinja",
    }
    for name in ("gemma.jinja", "llama-3.jinja", "human_assistant.jinja"):
        with pytest.raises(TemplateError):
            render_chat(name, [{"role": "wizard", "content": "x"}])
    with pytest.raises(TemplateError, match="no system role"):
        render_chat("gemma.jinja", [{"role": "system", "content": "x"}, *CHAT])
    with pytest.raises(TemplateError, match="alternate"):
        render_chat("gemma.jinja", [CHAT[0], CHAT[0]])


def run_sweep(script: Path, tmp_path: Path, *arguments: str, **variables: str) -> list[str]:
    """The runs that a sweep script selects, from the words that it calls `runner` with."""
    fake = tmp_path / "runner"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
    subprocess.run([script, *arguments, "--dry-run"], env=environment, check=True)
    selected: list[str] = []
    for call in (tmp_path / "calls").read_text().splitlines():
        words = call.split()
        if words[0] == "sweep":
            assert words[-1] == "--dry-run"
            conditions = dict(word.split("=", 1) for word in words if "=" in word)
            chosen = [
                name
                for name, recipe in recipes_of(Path(words[1]).name).items()
                if all(
                    str(recipe.run.axes[axis]) in labels.split(",")
                    for axis, labels in conditions.items()
                )
            ]
            assert chosen
            selected += chosen
    return selected


@pytest.mark.parametrize(
    "script", sorted((ROOT / "sweeps").glob("*.sh")), ids=lambda path: str(path.name)
)
def test_a_sweep_is_short_bash_that_leaves_yaml_alone(script: Path, tmp_path: Path) -> None:
    assert len(script.read_text().splitlines()) < 25
    assert Counter(run_sweep(script, tmp_path)) == Counter(list(recipes_of(script.stem)))


@pytest.mark.parametrize(
    "script", sorted((ROOT / "sweeps").glob("*.sh")), ids=lambda path: str(path.name)
)
def test_the_slice_that_a_sweep_shows_is_a_slice(script: Path, tmp_path: Path) -> None:
    if shown := re.search(r"^# A slice of the axes:  (.*)$", script.read_text(), re.MULTILINE):
        variables, arguments = shown[1].split(f"sweeps/{script.name}")
        environment = dict(word.split("=") for word in shlex.split(variables))
        selected = run_sweep(script, tmp_path, *shlex.split(arguments), **environment)
        assert len(set(selected)) == len(selected) < len(recipes_of(script.stem))
    else:
        assert script.stem == "demo"


def test_rendering_never_imports_torch() -> None:
    code = (
        "import sys, runner.grid.render; sys.exit('torch' in sys.modules or 'transformers' in"
        " sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
