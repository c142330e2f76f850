"""Names of trackers, and what is said about one that is not installed."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest

from runner.errors import RecipeError, RunnerError
from runner.recipe.schema import Tracker
from runner.recipe.trackers import PACKAGES, require_trackers
from tests.conftest import Project


def test_names_are_those_of_the_installed_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(get_args(Tracker)) == set(INTEGRATION_TO_CALLBACK) == set(PACKAGES)


def test_an_unknown_tracker_is_refused_when_the_recipe_loads(project: Project) -> None:
    for name in ("wandbb", "all", "none"):
        with pytest.raises(
            RecipeError, match=rf"tracking\.report_to.*'{name}', (did you mean|expected)"
        ):
            project.recipe(f"tracking.report_to=[{name}]")


def test_a_missing_tracker_is_named_with_its_command(project: Project) -> None:
    missing = [
        name
        for name, (modules, _) in PACKAGES.items()
        if modules and not importlib.util.find_spec(modules[0])
    ]
    for name in missing:
        with pytest.raises(RunnerError, match=f"{name}, which is not installed") as caught:
            require_trackers(project.recipe(f"tracking.report_to=[{name}]"))
        assert f"pip install {PACKAGES[name][1]}" in str(caught.value)
    assert PACKAGES["wandb"][1] == "'recipe-runner[wandb]'"
    require_trackers(project.recipe("tracking.report_to=[tensorboard, wandb]"))


def test_check_names_a_missing_tracker(project: Project) -> None:
    missing = [
        name
        for name, (modules, _) in PACKAGES.items()
        if modules and not importlib.util.find_spec(modules[0])
    ]
    if not missing:
        pytest.skip("every tracker is installed here")
    project.add_model()
    recipe_path = project.write_recipe("recipes/tracked.yaml", f"tracking.report_to=[{missing[0]}]")
    checked = project.cli("check", recipe_path)
    assert (
        checked.returncode == 2
        and f"{missing[0]}, which is not installed" in checked.stdout + checked.stderr
    )
