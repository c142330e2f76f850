"""`runner init --axis`: axes that nobody has to write into the grid, the name pattern and the
template.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from runner.cli.main import main
from runner.recipe.parse import Recipe, load_recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*axes: str) -> int:
    return main(["init", "study", *(word for axis in axes for word in ("--axis", axis))])


def render() -> dict[str, Recipe]:
    """The recipes of the new project, which is the current folder from now on."""
    os.chdir("study")
    assert main(["render"]) == main(["render", "--check"]) == 0
    assert main(["check", "recipes/first", "--schema-only"]) == 0
    return {path.stem: load_recipe(path) for path in sorted(Path("recipes/first").iterdir())}


def test_axes_reach_the_grid_the_names_and_the_recipes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("seed=1,2,3", "training.learning_rate=1e-4,3e-4", "adapter.r=8,16") == 0
    said = capsys.readouterr().out
    assert "48 recipes (1 model x 2 loss x 2 num_train_samples x 2 learning_rate x 2 r x 3" in said
    assert "axis learning_rate: training.learning_rate=1e-4,3e-4" in said
    recipes = render()
    assert len(recipes) == 48
    for name, recipe in recipes.items():
        axes = recipe.run.axes
        values = recipe.training.model_dump() | recipe.adapter.model_dump()
        assert (values["learning_rate"], values["r"]) == (axes["learning_rate"], axes["r"])
        rate = {0.0001: "lr1e-4", 0.0003: "lr3e-4"}[axes["learning_rate"]]
        assert f"_{rate}_r{axes['r']}_seed{axes['seed']}" in name
        assert [one.axis for one in recipe.run.declared] == ["loss"]
    assert len({recipe.training.seed for recipe in recipes.values()}) == 48
    grid = yaml.safe_load(Path("recipe_templates/first/grid.yaml").read_text())
    assert list(grid["axes"])[3:] == ["learning_rate", "r", "seed"]
    assert (
        "learning_rate: [1e-4, 3e-4] # training"
        in Path("recipe_templates/first/grid.yaml").read_text()
    )


def test_the_axes_of_the_starter_get_other_values(place: Path) -> None:
    assert init("seed=7", "loss=full", "samples=10,20,300", "model=phi-2,gemma-2b-it") == 0
    recipes = render()
    assert {tuple(recipe.run.axes.values()) for recipe in recipes.values()} == {
        (model, "full", count, 7) for model in ("phi-2", "gemma-2b-it") for count in (10, 20, 300)
    }
    assert not any(recipe.run.declared for recipe in recipes.values())
    assert {recipe.training.max_steps for recipe in recipes.values()} == {114}
    assert "for num_train_samples in 10 20 300; do" in Path("sweeps/first.sh").read_text()


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        (["training.num_train_epochs=1,2.5"], ("epochs1_", "epochs2.5_")),
        (["training.gradient_accumulation_steps=2,4"], ("acc2_", "acc4_")),
        (["training.weight_decay=0,0.01,1e-5"], ("wd0_", "wd0.01_", "wd1e-5_")),
        (["training.learning_rate=1e-4,1.5e-4"], ("lr1.0e-4_", "lr1.5e-4_")),
        (["training.lr_scheduler_type=cosine,linear"], ("_cosine_", "_linear_")),
        (["adapter.use_rslora=true,false"], ("use_rslora-true_", "use_rslora-false_")),
        (["data.seed=1,2"], ("data_seed-1_", "data_seed-2_")),
        (["tracking.project=a b,a/b"], ("project-a-b_", "project-a-b-2_")),
        (["model.dtype=float32,bfloat16"], ("dtype-float32_", "dtype-bfloat16_")),
        (
            ["evaluation.generation.enabled=true", "evaluation.generation.max_new_tokens=8,16"],
            ("max_new_tokens-8_", "max_new_tokens-16_"),
        ),
    ],
)
def test_names_are_short_and_each_value_has_one(
    axes: list[str], names: tuple[str, ...], place: Path
) -> None:
    assert init("seed=1", "samples=8", *axes) == 0
    recipes = render()
    assert len(recipes) == 2 * len(names)
    for part in names:
        assert sum(part in name for name in recipes) == 2
    for recipe in recipes.values():
        training = recipe.training
        assert training.bf16 == (recipe.model.dtype == "bfloat16")
        # If two keys exclude each other, the stated one is the axis.
        assert ("num_train_epochs" in recipe.run.axes) == (training.max_steps is None)
        assert ("gradient_accumulation_steps" in recipe.run.axes) == (
            training.global_batch_size is None
        )


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["lr=1e-4,3e-4"], ("lr: unknown key", "--axis training.learning_rate=1e-4,3e-4")),
        (["learning_rate=1e-4"], ("unknown key", "--axis training.learning_rate=1e-4")),
        (["training.learning_rat=1"], ("did you mean `learning_rate`?",)),
        (
            ["adapter.r=8,x", "adapter.lora_alhpa=3"],
            ("r: got the text 'x', expected a whole number", "did you mean `lora_alpha`?"),
        ),
        (["training.learning_rate=1e-4,0.0001"], ("has 0.0001 twice",)),
        (["adapter.r=8,8.0"], ("has 8.0 twice",)),
        (["loss=ful"], ("loss: got the text 'ful'", "did you mean `full`?")),
        (["seed=1.5"], ("training.seed: got 1.5, expected a whole number",)),
        (
            ["samples=10,400"],
            (
                "`--axis samples=...`: got 400 for `data.num_train_samples`, but 320 rows are left"
                " to train on",
            ),
        ),
        (["sample=10"], ("sample: unknown key", "hint: --axis samples=10\n")),
        (["seed=1", "training.seed=2"], ("`training.seed` is already an axis",)),
        (["seed"], ("`--axis seed`: expected a key", "--axis training.learning_rate=1e-4,3e-4")),
        (["seed="], ("expected a key of the recipe and its values",)),
        (["a b=1"], ("expected a key of the recipe and its values",)),
        (["seed=1], x: [2"], ("`--axis seed=1], x: [2`: did not",)),
        (["training.optim=no"], ("YAML reads the plain no as false",)),
        (["run.name=x"], ("the grid itself sets the keys of `run`",)),
        (["adapter.target_modules=[q_proj],all-linear"], ("got a list, expected texts",)),
        (
            ["training.per_device_train_batch_size=4,3"],
            ("size=3: a global batch of 8 is not divisible by 1 process x 3",),
        ),
        (
            ["quantization.method=4bit"],
            (
                "quantization.bnb_4bit_quant_type: is missing with quantization.method=",
                "hint: add --axis quantization.bnb_4bit_quant_type=nf4 --axis quantization.bnb_4",
            ),
        ),
        (
            ["evaluation.generation.enabled=true"],
            (
                "max_new_tokens: is missing with evaluation.generation.enabled=true\n",
                "hint: add --axis evaluation.generation.max_new_tokens=64\n",
            ),
        ),
        (
            ["evaluation.generation.enabled=false,true"],
            ("max_new_tokens: is missing with evaluation.generation.enabled=true\n", "{% if %}"),
        ),
        (["adapter.method=none"], ("error: recipe_templates/first/recipe.yaml.j2", "{% if %}")),
        (["training.max_steps=2", "training.num_train_epochs=1"], ("cannot both be axes",)),
        (["model=1"], ("`--axis model=...`: got 1, expected a model",)),
        (["model=phi-3x y"], ("it is not a hub id",)),
        ([f"seed={','.join(map(str, range(101)))}"], ("101 values, expected at most 100",)),
    ],
)
def test_what_no_recipe_can_take_is_refused_before_anything_is_written(
    axes: list[str], words: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(*axes) == 2
    said = capsys.readouterr().err
    assert all(one in said for one in words), said
    assert ".init-" not in said and not list(place.iterdir())


def test_a_stock_grid_takes_no_axes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "study", "--from", "demo", "--axis", "seed=1"]) == 2
    said = capsys.readouterr().err
    assert "--axis goes with the starter grid" in said and "edit recipe_templates/demo" in said
    assert main(["init", "study", "--model", "phi-2", "--axis", "model=phi-2"]) == 2
    assert "mean the same" in capsys.readouterr().err and not list(place.iterdir())


@pytest.mark.parametrize(
    "axis",
    [
        "evaluation.generation.enabled=true",
        "early_stopping.enabled=true",
        "quantization.method=4bit",
    ],
)
def test_the_keys_that_a_value_needs_can_be_pasted(
    axis: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(axis) == 2
    added = capsys.readouterr().err.partition("hint: add ")[2].split()
    assert added and init(axis, *added[1::2]) == 0
    render()
