"""Recipes under overrides: a run of another name, unless they change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import RecipeError, RefusedError
from runner.plan.variants import is_override, load_variant
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]

A = Path("recipes/toy/a.yaml")


@pytest.mark.parametrize(
    ("overrides", "kept", "name"),
    [
        ([], [], "a"),
        (["loss=full"], [], "a"),
        (["loss=completion"], ["loss=completion"], "a--loss-completion"),
        (["loss=full", "data.seed=2"], ["data.seed=2"], "a--data.seed-2"),
        (["launch.num_processes=1"], [], "a"),
        (["training.max_steps=2"], [], "a"),
        (["tracking.report_to=none", "tracking.tags=[]"], [], "a"),
        (["tracking.report_to=wandb"], ["tracking.report_to=wandb"], "a--tracking.report_to-wandb"),
        (
            ["training.max_steps=null", "training.num_train_epochs=1"],
            ["training.max_steps=null", "training.num_train_epochs=1"],
            "a--training.max_steps-null--training.num_train_epochs-1",
        ),
    ],
)
def test_what_changes_nothing_is_in_no_name(
    fake: FakeLauncher, overrides: list[str], kept: list[str], name: str
) -> None:
    fake.add("a")
    recipe, found = load_variant(A, overrides)
    assert [*found] == kept == [*recipe.run.overrides] and recipe.run.name == name
    assert (recipe == load_variant(A, [])[0]) == (not kept)
    named, found = load_variant(A, overrides, "mine")
    assert named.run.name == "mine" and [*found] == kept


def test_a_wrong_override_is_a_wrong_recipe(fake: FakeLauncher) -> None:
    fake.add("a")
    with pytest.raises(RecipeError, match="state exactly one of `num_train_epochs`"):
        load_variant(A, ["training.num_train_epochs=1"])


@pytest.mark.parametrize("other", ["data.seed=3", "data.seed=1", "data.seed=2"])
def test_a_key_that_is_given_twice_is_refused(fake: FakeLauncher, other: str) -> None:
    fake.add("a")
    with pytest.raises(RefusedError, match=f"data.seed is given twice: data.seed=2, {other}"):
        load_variant(A, ["data.seed=2", "loss=full", other])


def test_words_that_are_overrides(fake: FakeLauncher) -> None:
    (fake.root / "loss=full").write_text("a file")
    assert is_override("loss=completion") and is_override("a.b=[1, 2]") and is_override("a=b\nc")
    assert not is_override("loss=full") and not is_override("recipes/a") and not is_override("x")
