"""A trainer looks at the run that it is to train before it does anything."""

from __future__ import annotations

import json

import pytest

from runner.errors import RefusedError
from runner.recipe.identity import derive_digest
from runner.run.record import load_stored_recipe
from runner.sft.context import RunContext
from runner.sft.preemption import Preemption
from tests.conftest import Project
from tests.support.contexts import ALONE


def test_a_run_prepared_under_other_rules_or_changed_by_hand_is_not_trained(
    project: Project,
) -> None:
    """It was prepared by an older runner, say, and is started by hand under this one."""
    project.add_model()
    assert project.cli("launch", "recipe.yaml", "--prepare", "--name", "prepared").returncode == 0
    paths = project.paths("prepared")

    def open_run() -> RunContext:
        return RunContext.open(paths.run_dir, ALONE, Preemption(paths, 1, ALONE))

    assert open_run().recipe_digest
    stored = load_stored_recipe(paths)
    content = json.loads(paths.recipe_path.read_text())
    assert stored is not None
    older = derive_digest(stored.recipe, stored.contents, rules=1)
    paths.recipe_path.write_text(json.dumps(content | {"rules": 1, "recipe_digest": older}))
    with pytest.raises(RefusedError, match="\n  rules of rows and masks: 1 -> 2 ") as refused:
        open_run()
    assert "`runner launch`" in str(refused.value)
    content["recipe"]["training"]["learning_rate"] = 1.0
    paths.recipe_path.write_text(json.dumps(content))
    with pytest.raises(RefusedError, match="and no key differs: recipe"):
        open_run()
