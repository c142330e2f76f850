"""Recipes of grids with declared contrasts, and with separate seeds per cell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.grid.design import derive_cell_seed
from runner.grid.render import render_grid
from runner.grid.spec import GridSpec, load_grid
from runner.recipe.parse import Recipe, dump_recipe, parse_recipe
from tests.support.toy_grid import CONDITIONAL, GRID, TEMPLATE, Toy, build_toy, grid_error

DECLARING = TEMPLATE.replace(
    "  axes: {{ axes | yaml }}\n", "  axes: {{ axes | yaml }}\n  declared: {{ declared | yaml }}\n"
)
SEEDED = DECLARING.replace("training:\n  seed: 1\n", "training:\n  seed: {{ cell_seed | yaml }}\n")
WITH_SEEDS = GRID.replace("_{{ loss }}_", "_{{ loss }}_{{ seed }}_") + "  seed: [1, 2, 3]\n"
LOSS = (
    "compare: [{axis: loss, from: full, to: completion, metric: nll_per_completion_token,"
    " margin: 0.02}]\n"
)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return build_toy(tmp_path)


def recipes_of(root: Path) -> dict[str, Recipe]:
    texts = render_grid(root / "recipe_templates", "toy").texts
    return {name: parse_recipe(text, where=name) for name, text in texts.items()}


# Declared contrasts


def test_every_recipe_of_a_grid_holds_its_contrasts(toy: Toy) -> None:
    count = "{axis: num_train_samples, from: 60, to: 180, metric: bits_per_byte}"
    root = toy(GRID + LOSS.replace("]", f", {count}]"), DECLARING)
    declared = [
        {
            "axis": "loss",
            "from": "full",
            "to": "completion",
            "metric": "nll_per_completion_token",
            "margin": 0.02,
        },
        {
            "axis": "num_train_samples",
            "from": 60,
            "to": 180,
            "metric": "bits_per_byte",
            "margin": None,
        },
    ]
    recipes = recipes_of(root)
    assert len(recipes) == 8
    for name, recipe in recipes.items():
        assert recipe.run.model_dump(mode="json")["declared"] == declared, name
        assert parse_recipe(dump_recipe(recipe), where=name) == recipe


def test_a_template_that_leaves_the_contrasts_out_is_told_the_line_to_write(toy: Toy) -> None:
    root = toy(GRID + LOSS)
    message = grid_error(root)
    assert "toy/recipe.yaml.j2: `run.declared` is [], but" in message
    assert "write `declared: {{ declared | yaml }}` below `run:`" in message
    toy(GRID + LOSS, DECLARING, "{{ declared | yaml }}", "[]")
    message = grid_error(root)
    assert "toy/recipe.yaml.j2, line 5: `run.declared` is []" in message
    assert "write `declared: {{ declared | yaml }}` there" in message


def contrast(**changes: str) -> str:
    parts = {"axis": "loss", "from": "full", "to": "completion", "metric": "nll_per_token"}
    stated = ", ".join(f"{key}: {value}" for key, value in {**parts, **changes}.items())
    return f"compare:\n  - {{{stated}}}\n"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (contrast(axis="los"), 9, "compare.0.axis  got 'los', expected an axis: model, loss, num_"),
        (contrast(axis="los"), 9, "did you mean `loss`?"),
        (
            contrast(to="complete"),
            9,
            'compare.0.to  got "complete", which is not a value of the axis: "full", "completion",'
            " did you mean `completion`?",
        ),
        (contrast(axis="num_train_samples", **{"from": "60", "to": "'180'"}), 9, 'got "180"'),
        (contrast(to="full"), 9, 'compare.0  `from` and `to` are both "full"'),
        (
            contrast(metric="nll_per_tokn"),
            9,
            "compare.0.metric  these runs do not measure `nll_per_tokn`, expected one of"
            " nll_per_completion_token, nll_per_token, bits_per_byte, did you mean `nll_per_token`",
        ),
        # A metric of answers, of runs that generate none
        (contrast(metric="rougeL"), 9, "compare.0.metric  these runs do not measure `rougeL`"),
        (contrast(margin="0"), 9, "compare.0.margin  got 0"),
        (contrast(margin="-0.1"), 9, "greater than 0"),
        (contrast(margin="small"), 9, "got the text 'small', expected a number"),
        (contrast(margn="0.1"), 9, "unknown key, did you mean `margin`?"),
        (contrast(form="full"), 9, "compare.0.form  unknown key, did you mean `from`?"),
        (contrast(**{"from": "[full]"}), 9, "compare.0.from  got "),
        ("compare:\n  - {axis: loss, from: full, to: completion}\n", 9, "metric  is missing"),
        (
            contrast() + contrast(**{"from": "completion", "to": "full"}).partition("\n")[2],
            10,
            "compare.1  is already declared by compare.0",
        ),
        ("comparing: []\n", 8, "unknown key, did you mean `compare`?"),
    ],
)
def test_a_wrong_contrast_is_refused_with_its_line(
    toy: Toy, text: str, line: int, expected: str
) -> None:
    message = grid_error(toy(GRID + text, DECLARING))
    assert expected in message, message
    assert f"line {line} " in message and "toy/grid.yaml has" in message, message


def test_a_contrast_needs_two_runs_that_differ_in_nothing_else(toy: Toy) -> None:
    only_of_one = "exclude: [{when: {loss: full, model: phi}, why: x}]\n"
    root = toy(GRID + only_of_one + LOSS, DECLARING)
    assert len(recipes_of(root)) == 6, "gemma has both"
    toy(GRID + "exclude: [{when: {loss: full}, why: x}]\n" + LOSS, DECLARING)
    message = grid_error(root)
    assert "line 9 " in message and "no two runs differ only in `loss`, with " in message

    # lora_r is there for LoRA only: no run without an adapter has the same one.
    template = DECLARING.replace("{{ model.path | yaml }}", "{{ model | yaml }}")
    template = template.replace("{{ num_train_samples | yaml }}", "9")
    template = template.replace("{{ loss | yaml }}", "full")
    toy(CONDITIONAL + contrast(axis="adapter", **{"from": "none", "to": "lora"}), template)
    assert "no two runs differ only in `adapter`" in grid_error(root)
    ranks = contrast(axis="lora_r", **{"from": "8", "to": "16"})
    toy(CONDITIONAL + ranks, template)
    assert len(recipes_of(root)) == 7, "b has both, in the cells where the axis applies"
    toy(CONDITIONAL + "exclude: [{when: {model: b}, why: x}]\n" + ranks, template)
    assert "no two runs differ only in `lora_r`" in grid_error(root), "only 16 is tied, or not"


def test_a_metric_of_answers_is_known_where_both_ends_are_measured_by_it(toy: Toy) -> None:
    on = "{enabled: true, max_new_tokens: 8}"
    evaluation = 'evaluation: {eval_strategy: "no", per_device_eval_batch_size: 4'
    template = DECLARING.replace(evaluation, f"{evaluation}, generation: {on}")
    template = template.replace("{name: conversations}", "{name: alpaca}")
    root = toy(GRID + contrast(metric="exact_match"), template)
    assert recipes_of(root)["gemma_full_060"].run.declared[0].metric == "exact_match"
    half = template.replace(
        on, f"{{% if loss == 'full' %}}{on}{{% else %}}{{enabled: false}}{{% endif %}}"
    )
    toy(GRID + contrast(metric="exact_match"), half)
    assert "and both measure `exact_match`" in grid_error(root)


def test_the_seed_is_not_compared(toy: Toy) -> None:
    axis = contrast(axis="seed", **{"from": "1", "to": "2"})
    message = grid_error(toy(WITH_SEEDS + axis, SEEDED))
    assert "compare.0.axis  `seed` repeats the other cells and cannot be compared" in message


def test_the_command_line_says_what_is_wrong_with_a_contrast(
    toy: Toy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy(GRID + contrast(to="complete"), DECLARING))
    assert main(["render", "toy"]) == 2
    message = capsys.readouterr().err
    assert "grid.yaml has 1 problem" in message and "did you mean `completion`?" in message
    assert not os.path.exists("recipes/toy")


# Seeds


def derive(spec: GridSpec, **labels: str | int) -> int | None:
    return derive_cell_seed(spec, "toy", labels)


def test_each_cell_has_its_own_seeds(toy: Toy) -> None:
    root = toy(WITH_SEEDS + "seeds: own\n", SEEDED)
    recipes = recipes_of(root)
    assert {recipe.run.axes["seed"] for recipe in recipes.values()} == {1, 2, 3}
    seeds = {recipe.training.seed for recipe in recipes.values()}
    assert len(seeds) == len(recipes) == 24
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert {recipe.data.seed for recipe in recipes.values()} == {1}, "all cells draw the same rows"

    spec = load_grid(root / "recipe_templates", "toy")
    labels = {"model": "gemma", "loss": "full", "num_train_samples": 60, "seed": 1}
    first = derive_cell_seed(spec, "toy", labels)
    assert first == recipes["gemma_full_1_060"].training.seed == 63038873
    # Another order of the axes, or further values on them, are the same cells.
    assert derive_cell_seed(spec, "toy", dict(reversed(labels.items()))) == first
    assert derive_cell_seed(spec, "other", labels) != first
    assert derive_cell_seed(spec, "toy", {**labels, "num_train_samples": "60"}) != first


def test_shared_seeds_are_the_numbers_of_the_axis(toy: Toy) -> None:
    root = toy(WITH_SEEDS, SEEDED)
    assert all(one.training.seed == one.run.axes["seed"] for one in recipes_of(root).values())
    spec = load_grid(root / "recipe_templates", "toy")
    assert derive(spec, seed=3) == 3
    assert derive(spec, seed="a") is derive(spec, model="gemma") is None


def test_a_grid_without_seeds_has_no_seed_of_a_cell(toy: Toy) -> None:
    message = grid_error(toy(GRID, SEEDED))
    assert "line 22: 'cell_seed' is undefined" in message


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (GRID + "seeds: own\n", "line 8    seeds  `own` needs an axis `seed` of whole numbers"),
        (WITH_SEEDS + "seeds: mine\n", "expected shared or own"),
        (WITH_SEEDS.replace("[1, 2, 3]", "[1, x]") + "seeds: own\n", 'axes.seed  got "x"'),
        (WITH_SEEDS.replace("[1, 2, 3]", "[-1]") + "seeds: own\n", "a whole number of 0 or more"),
        (WITH_SEEDS.replace("[1, 2, 3]", "[true]") + "seeds: own\n", "axes.seed  got true"),
        (
            WITH_SEEDS.replace("[1, 2, 3]", "{values: [1], when: {loss: full}}") + "seeds: own\n",
            "axes.seed.when  does not go with `seeds: own`",
        ),
        (
            WITH_SEEDS
            + "seeds: own\ninclude: [{model: phi, loss: full, num_train_samples: 1, seed: x}]\n",
            'include.0.seed  got "x"',
        ),
    ],
)
def test_seeds_that_cannot_be_own_are_refused(toy: Toy, grid: str, expected: str) -> None:
    assert expected in grid_error(toy(grid, SEEDED))


def test_a_template_that_trains_with_another_seed_is_refused(toy: Toy) -> None:
    message = grid_error(toy(WITH_SEEDS + "seeds: own\n", DECLARING))
    assert "toy/recipe.yaml.j2, line 22: `training.seed` is 1, but the seed" in message
    assert "of this run is 63038873 (`seeds: own`" in message
    assert "write `seed: {{ cell_seed | yaml }}` there" in message


def test_own_seeds_are_for_training_alone(toy: Toy) -> None:
    template = SEEDED.replace("  seed: 1\n  max_length", "  seed: {{ seed | yaml }}\n  max_length")
    message = grid_error(toy(WITH_SEEDS + "seeds: own\n", template))
    assert (
        "seeds  with `own`, seeds may change only `training.seed`, but gemma_full_1_060 and"
        " gemma_full_2_060" in message
    )
    assert "also differ in data.seed: 1 -> 2" in message
    assert len(recipes_of(toy(WITH_SEEDS, template))) == 24, "with shared seeds it may"
