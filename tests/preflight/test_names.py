"""Names on the hub before device time: recipes at the commits that their runs load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runner.files import write_json_atomic
from runner.recipe.identity import RULES, derive_digest
from runner.recipe.parse import Recipe
from runner.run.record import StoredRecipe
from tests.recipe.test_identity import parse
from tests.support.moving_hub import moving_hub

A, B = "a" * 40, "b" * 40
# The revisions at which recipes are checked, and the messages.
LOOK = """
import json, sys
from pathlib import Path
from runner.preflight.names import pin_recipes
from runner.recipe.parse import Recipe
recipes = [Recipe.model_validate_json(text) for text in json.loads(sys.argv[1])]
found = pin_recipes(recipes, Path("runs"))
said = [[str(one), name] for one, name in [*found.errors, *found.warnings]]
print(json.dumps([[one.model.revision for one in found.recipes], said]))
"""


def write_run(root: Path, recipe: Recipe, commits: dict[str, str]) -> None:
    stored = StoredRecipe(
        recipe=recipe,
        recipe_digest=derive_digest(recipe, {}),
        contents={},
        rules=RULES,
        commits=commits,
    )
    run_dir = root / "runs" / recipe.run.grid / recipe.run.name
    run_dir.mkdir(parents=True)
    write_json_atomic(run_dir / "recipe.json", stored.model_dump(mode="json"))


def test_what_a_run_will_load_is_looked_at_and_compared_with_its_siblings(tmp_path: Path) -> None:
    def recipe(name: str, revision: str) -> Recipe:
        return parse("model.path=org/tiny", f"model.revision={revision}", f"run.name={name}")

    old, new = recipe("old", "null"), recipe("new", "null")
    old_stated, new_stated = recipe("old-main", "main"), recipe("new-main", "main")
    pasted = recipe("old", A)
    write_run(tmp_path, old, {"model.path": A})
    write_run(tmp_path, old_stated, {"model.path": A})
    with moving_hub() as hub:
        hub.commit("models", "org/tiny", B, {"config.json": b"{}"})
        recipes = [old, new, old_stated, new_stated, pasted, recipe("fixed", B)]
        done = subprocess.run(
            [sys.executable, "-c", LOOK, json.dumps([one.model_dump_json() for one in recipes])],
            cwd=tmp_path,
            env={**os.environ, **hub.environment(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(hub.take_requests()) == 2, "for `main` and for nothing stated"
    revisions, said = json.loads(done.stdout)
    assert revisions == [A, B, A, B, A, B]
    (refused, name), *warned = said
    assert name == new_stated.run.full_name and f"is the commit {B} now" in refused
    assert f"hint: to load the same commit, state it next to the name:\n  revision: {A}" in refused
    assert {name for _, name in warned} == {one.run.full_name for one in (old, new, old_stated)}
    assert all(f"\n  revision: {A}" in text for text, _ in warned)
