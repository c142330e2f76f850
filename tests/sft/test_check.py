"""`runner check`: every recipe, then every distinct pair of model and data, once."""

from __future__ import annotations

from conftest import Project


def test_a_good_grid_is_described_once_per_data(project: Project) -> None:
    project.add_model("gemma")
    for loss in ("full", "completion"):
        project.write_recipe(f"recipes/tests/{loss}.yaml", f"loss={loss}")
    done = project.cli("check", "recipes/tests")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train: 22 rows of") == 1
    for text in ("2 recipes are well-formed", "loss full:", "loss completion:", "6 optimizer updates an epoch"):
        assert text in done.stdout, text


def test_one_mistake_of_many_recipes_is_said_once(project: Project) -> None:
    project.add_model("gemma")
    for seed in (1, 2):
        project.write_recipe(f"recipes/tests/seed-{seed}.yaml", f"training.seed={seed}", "data.max_length=8")
    done = project.cli("check", "recipes/tests")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "2 of 2 recipes cannot be trained" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_schema(project: Project) -> None:
    project.write_recipe("recipes/tests/a.yaml", "model.path=nowhere")
    assert project.cli("check", "recipes/tests", "--schema-only").returncode == 0
