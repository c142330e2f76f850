"""Names of trackers, and the message about one that is not installed."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest

from runner.errors import RecipeError, RunnerError
from runner.recipe.identity import derive_digest
from runner.recipe.launch_section import Tracker
from runner.recipe.parse import dump_recipe, parse_recipe
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


@pytest.mark.parametrize(
    ("text", "tracked"), [("wandb", ("wandb",)), ("none", ()), ("[wandb]", ("wandb",)), ("[]", ())]
)
def test_one_word_is_a_list(project: Project, text: str, tracked: tuple[str, ...]) -> None:
    recipe = project.recipe(f"tracking.report_to={text}")
    assert recipe.tracking.report_to == tracked
    again = parse_recipe(dump_recipe(recipe), where="again")
    assert again == recipe and list(again.tracking.report_to) == list(tracked)
    assert derive_digest(recipe, {}) == derive_digest(project.recipe(), {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all", "'all', which depends on what is installed: name the trackers"),
        ("tensorboard", "got the text 'tensorboard', expected a list such as [tensorboard]"),
        ("wandbb", "got the text 'wandbb', expected a list such as [wandb]"),
        ("None", "got the text 'None', expected a list"),
    ],
)
def test_other_words_are_no_list(project: Project, text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        project.recipe(f"tracking.report_to={text}")
    assert words in str(caught.value)


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
    checked = project.call("check", recipe_path)
    assert (
        checked.returncode == 2
        and f"{missing[0]}, which is not installed" in checked.stdout + checked.stderr
    )
