"""`runner check` suggests larger batches if the memory of a device is known, and not otherwise; the
lines for a template keep every global batch.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from runner.grid.render import render_grid
from runner.preflight.check import print_check
from runner.preflight.sizes import Measures, estimate_sizes, warn_of_shortage
from runner.preflight.suggestions import find_suggestions
from runner.preflight.survey import CheckedRun, check_recipes
from runner.recipe.parse import Recipe, parse_recipe
from tests.conftest import ROOT, Project

GIB = 2**30
ON_GPU = "launch.accelerate_config=accelerate_configs/single_gpu.yaml"
ANSWERING = "evaluation.generation={enabled: true, max_new_tokens: 8}"
NF4 = (
    "quantization={method: 4bit, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: false,"
    " bnb_4bit_compute_dtype: bfloat16}",
    "model.dtype=bfloat16",
)
OFF = "quantization.method=none"


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project, with one tiny model, as the current folder."""
    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    return project


def suggest(*recipes: Recipe, device_bytes: int = 4 * GIB) -> list[str]:
    result = check_recipes(recipes)
    assert len(result.runs) == len(recipes), result.errors
    found = list(find_suggestions(result.runs, Measures(result), device_bytes))
    return [line.strip() for one in found for line in one.lines]


def starting(lines: list[str], words: str) -> str | None:
    return next((line for line in lines if line.startswith(words)), None)


def test_batches_grow_and_what_saves_memory_goes(here: Project) -> None:
    recipe = here.recipe(
        ON_GPU,
        ANSWERING,
        *NF4,
        "training.global_batch_size=24",  # 22 rows
        "training.gradient_checkpointing=true",
        "evaluation.per_device_eval_batch_size=4",
    )
    lines = suggest(recipe)
    assert lines[0].startswith("suggestions for tests, from estimates")
    assert lines[1] == "models/gemma"
    assert starting(lines, "micro-batch 12 instead of 2: 6 times fewer passes; about 0.8 of 4 GiB")
    assert starting(lines, "gradient checkpointing off: ")
    assert starting(lines, "bfloat16 instead of 4 bits: ")
    assert starting(lines, "15 answers at a time instead of 4: 4 times fewer batches; about")
    assert starting(lines, "another micro-batch keeps the digest")
    assert starting(lines, "changing checkpointing, quantization or the answer batch makes another")
    assert not starting(lines, "or ")


def test_what_does_not_fit_is_not_suggested(here: Project) -> None:
    overrides = (ON_GPU, ANSWERING, *NF4, "evaluation.per_device_eval_batch_size=1")
    overrides += ("training.global_batch_size=16", "training.gradient_checkpointing=true")
    result = check_recipes([here.recipe(*overrides)])
    [run] = result.runs
    # So much that its width dominates.
    long = replace(run.splits["train"], length_percentiles={"max": 50_000})
    run = replace(run, splits={**run.splits, "train": long})
    measures = Measures(result)

    def total(micro_batch: int, **changes: bool) -> int:
        training = run.recipe.training.model_copy(
            update={"per_device_train_batch_size": micro_batch, **changes}
        )
        return measures.estimate(run, run.recipe.model_copy(update={"training": training})).total

    sizes = [total(size) for size in (2, 4, 8, 16)]
    assert sizes == sorted(sizes) and sizes[1] < 0.6 * sizes[2]
    for index, size in enumerate((4, 8, 16), start=1):
        device_bytes = round(sizes[index] / 0.8) + 1
        [found] = find_suggestions([run], measures, device_bytes)
        assert any(f"micro-batch {size} instead of 2" in line for line in found.lines)
    # The largest micro-batch leaves no room for an end of checkpointing, a smaller one does.
    free = sizes[3] + 1
    without = {size: total(size, gradient_checkpointing=False) for size in (2, 4, 8, 16)}
    expected = max(size for size, needed in without.items() if needed <= free)
    assert 2 < expected < 16
    [found] = find_suggestions([run], measures, round(free / 0.8) + 1)
    text = "\n".join(found.lines)
    assert f"or micro-batch {expected} and gradient checkpointing off" in text
    assert "gradient_checkpointing: false" not in text
    assert not list(find_suggestions([run], measures, device_bytes=GIB // 2))


def test_nothing_is_said_where_nothing_is_to_be_gained(here: Project) -> None:
    best = here.recipe(ON_GPU, "training.per_device_train_batch_size=4")
    assert suggest(best) == []
    answers = "evaluation.generation={enabled: true, max_new_tokens: 8, batch_size: 15}"
    assert suggest(here.recipe(ON_GPU, answers, "training.per_device_train_batch_size=4")) == []


def test_what_differs_within_a_model_is_left_alone(here: Project) -> None:
    """It may be what the grid compares."""
    arms = [here.recipe(ON_GPU, f"run.name=w{n}", *one) for n, one in enumerate((NF4, (OFF,)))]
    assert starting(suggest(*arms), "micro-batch 4 instead of 2")
    assert not starting(suggest(*arms), "bfloat16 instead")
    sizes = [
        here.recipe(ON_GPU, f"run.name=m{size}", f"training.per_device_train_batch_size={size}")
        for size in (1, 2)
    ]
    assert suggest(*sizes) == []


def list_template_lines(lines: list[str]) -> str:
    """The lines under "for all arms", as they would be in a template."""
    start = next(at for at, line in enumerate(lines) if "for all arms, replace" in line)
    indented = [line for line in lines[start + 1 :] if line.startswith("    ")]
    return "\n".join(line[4:] for line in indented)


def test_the_lines_for_a_template_keep_the_global_batch(here: Project) -> None:
    recipes = [
        here.recipe(
            ON_GPU,
            ANSWERING,
            f"run={{name: acc{accumulation}, axes: {{accumulation: {accumulation}}}}}",
            "training.global_batch_size=null",
            f"training.gradient_accumulation_steps={accumulation}",
        )
        for accumulation in (4, 6)  # 8 and 12 rows: 4 divides both
    ]
    result = check_recipes(recipes)
    [found] = find_suggestions(result.runs, Measures(result), 4 * GIB)
    text = list_template_lines(list(found.lines))
    assert "gradient_accumulation_steps: {{ (accumulation * 2 // 4) | yaml }}" in text
    for recipe, accumulation in zip(recipes, (2, 3), strict=True):
        rendered = yaml.safe_load(text.replace("{{ (accumulation * 2 // 4) | yaml }}", "X"))
        rendered["training"]["gradient_accumulation_steps"] = accumulation
        changed = parse_recipe(
            json.dumps(merge(recipe.model_dump(mode="json"), rendered)), where="r.yaml"
        )
        assert changed.global_batch_size == recipe.global_batch_size
        assert changed.training.per_device_train_batch_size == 4
        assert getattr(changed.evaluation.generation, "batch_size", None) == 15
    [run] = [run for run in result.runs if run.recipe is recipes[0]]
    [alone] = find_suggestions([run], Measures(result), 4 * GIB)
    assert "gradient_accumulation_steps: 1" in list_template_lines(list(alone.lines))


def merge(before: dict, changes: dict) -> dict:  # type: ignore[type-arg]
    return {
        **before,
        **{
            key: merge(before[key], value) if isinstance(value, dict) else value
            for key, value in changes.items()
        },
    }


def test_the_line_for_the_accumulation_of_the_summaries_grid_renders(tmp_path: Path) -> None:
    templates = tmp_path / "recipe_templates"
    shutil.copytree(ROOT / "recipe_templates", templates)
    path = templates / "summaries" / "recipe.yaml.j2"
    text = path.read_text()
    for old, new in (
        ("per_device_train_batch_size: 1", "per_device_train_batch_size: 8"),
        (
            "{{ gradient_accumulation_steps | yaml }}",
            "{{ (gradient_accumulation_steps // 8) | yaml }}",
        ),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)

    def batches(folder: Path) -> dict[str, int]:
        rendered = render_grid(folder, "summaries")
        return {
            name: parse_recipe(content, where=name).global_batch_size
            for name, content in list(rendered.texts.items())[:4]
        }

    assert batches(templates) == batches(ROOT / "recipe_templates")


def test_rows_and_processes_bound_a_batch(here: Project) -> None:
    result = check_recipes(
        [here.recipe(ON_GPU, "training.global_batch_size=32", "launch.num_processes=2")]
    )
    [run] = result.runs
    assert micro_batch_of(run, Measures(result)) == 8, "11 rows a process"


def micro_batch_of(run: CheckedRun, measures: Measures) -> int:
    [found] = find_suggestions([run], measures, 8 * GIB)
    line = next(line for line in found.lines if "micro-batch" in line)
    return int(line.split()[1])


def test_check_prints_suggestions_for_a_device_and_writes_nothing(project: Project) -> None:
    project.add_model("gemma")
    path = project.write_recipe("recipes/tests/a.yaml", ON_GPU, ANSWERING)
    project.write_recipe("recipes/tests/cpu.yaml", "run.grid=cpu")
    before = path.read_bytes()
    done = project.call("check", "recipes/tests", "--device-gib", "8")
    assert done.returncode == 0, done.stderr
    assert "micro-batch 4 instead of 2: 2 times fewer passes; about" in done.stdout
    assert "and 8 answers at a time: about" in done.stdout
    assert "suggestions for tests, " in done.stdout and "suggestions for cpu, " not in done.stdout
    assert path.read_bytes() == before
    done = project.call("check", "recipes/tests/cpu.yaml", "--device-gib", "8")
    assert "no suggestions: `--device-gib` has no effect: the launch configs" in done.stdout


def test_the_json_holds_suggestions_and_what_answers_need(
    here: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = here.recipe(ON_GPU, ANSWERING)

    def check(device_gib: int | None) -> dict[str, Any]:
        print_check([recipe], Path("runs"), [], is_json=True, device_gib=device_gib)
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        return content

    [one] = check(8)["suggestions"]
    assert one["runs"] == ["tests/base"] and "micro-batch 4 instead of 2" in one["text"]
    assert check(8)["runs"][0]["size"]["answer_memory_bytes"] > 0
    if not torch.cuda.is_available():
        content = check(None)
        assert content["suggestions"] == []
        assert content["runs"][0]["size"]["answer_memory_bytes"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device-gib", "0"), "'0' is not a whole number above zero"),
        (("--device-gib", "80GiB"), "'80GiB' is not a whole number above zero"),
        (("--device-gib", "80", "--schema-only"), "`--schema-only` loads none"),
    ],
)
def test_a_device_that_is_none(project: Project, flags: tuple[str, ...], words: str) -> None:
    done = project.cli("check", "recipe.yaml", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_more_answers_than_fit_are_a_warning(here: Project) -> None:
    many = "evaluation.generation={enabled: true, max_new_tokens: 8, batch_size: 2000000}"
    result = check_recipes([here.recipe(ON_GPU, many)])
    sizes = estimate_sizes(result, with_answers=True)
    warn_of_shortage(result, sizes, [], Path("runs"), device_bytes=2 * GIB)
    [text] = [text for text in result.warnings if "memory for answers" in text]
    assert text.endswith("of device memory for answers, the device has 2.00 GiB")
