from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RecipeError
from runner.recipe.cache import RecipeCache
from runner.recipe.parse import load_recipe
from tests.conftest import RECIPE_TEXT, ROOT, build_environment


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    write_recipe(tmp_path, "a")
    return tmp_path


def write_recipe(root: Path, name: str, text: str = RECIPE_TEXT) -> Path:
    path = root / f"{name}.yaml"
    path.write_text(text.replace("name: base", f"name: {name}"))
    return path


def open_cache(root: Path) -> RecipeCache:
    return RecipeCache(root / "runs" / ".recipes.json", num_plain=0)


def fill(root: Path, *names: str) -> dict[str, Any]:
    """The content of the cache after somebody has read these recipes."""
    cache = open_cache(root)
    for name in names:
        cache.load(root / f"{name}.yaml")
    cache.save()
    content: dict[str, Any] = json.loads((root / "runs" / ".recipes.json").read_text())
    return content


def test_a_recipe_is_the_same_from_the_cache(root: Path) -> None:
    text = RECIPE_TEXT.replace("name: gemma", "name: 'grün \\${x} \"'")
    for number, path in enumerate(
        [
            root / "a.yaml",
            write_recipe(root, "b", text),
            *sorted(ROOT.glob("recipes/*/*.yaml"))[:20],
        ]
    ):
        first = open_cache(root)
        recipes = [load_recipe(path), first.load(path)]
        first.save()
        again = open_cache(root)
        recipes.append(again.load(path))
        plain, *others = [(one, one.training.model_fields_set) for one in recipes]
        assert others == [plain, plain], f"recipe {number}"
        before = (root / "runs" / ".recipes.json").stat()
        again.save()
        assert (root / "runs" / ".recipes.json").stat() == before, "nothing was new"


def test_what_the_cache_holds_is_used_for_the_very_same_bytes_only(root: Path) -> None:
    path, name = root / "a.yaml", str(root / "a.yaml")
    other = write_recipe(root, "b", RECIPE_TEXT.replace("seed: 3", "seed: 5"))
    content = fill(root, "a", "b")
    assert set(content["recipes"]) == {name, str(other)}
    state = path.stat()
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert open_cache(root).load(path).training.seed == 4
    path.write_text(other.read_text())
    assert open_cache(root).load(path).training.seed == 5


def flip(content: dict[str, Any], name: str) -> object:
    entry = content["recipes"][name]
    entry[2] = entry[2].replace('"seed": 3', '"seed": 4')
    return content


def swap(content: dict[str, Any], name: str) -> object:
    """The entry of another file, under the hash of this one."""
    other = next(entry for key, entry in content["recipes"].items() if key != name)
    content["recipes"][name] = [content["recipes"][name][0], *other[1:]]
    return content


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        swap,
        lambda content, name: content | {"recipes": content["recipes"] | {name: ["x"]}},
        lambda content, name: content | {"recipes": content["recipes"] | {name: None}},
        lambda content, name: content | {"recipes": [1]},
        lambda content, name: [content],
        lambda content, name: None,
        lambda content, name: json.dumps(content)[:-500],
        lambda content, name: "",
        lambda content, name: "[" * 100_000,
    ],
)
def test_a_damaged_cache_costs_time_only(
    root: Path, damage: Callable[[dict[str, Any], str], object]
) -> None:
    path, cache_path = root / "a.yaml", root / "runs" / ".recipes.json"
    write_recipe(root, "b", RECIPE_TEXT.replace("seed: 3", "seed: 5"))
    whole = fill(root, "a", "b")
    damaged = damage(json.loads(json.dumps(whole)), str(path))
    cache_path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    assert open_cache(root).load(path) == load_recipe(path)
    assert fill(root, "a", "b") == whole, "and it is written again"


def test_bytes_that_are_no_text_are_no_cache(root: Path) -> None:
    (root / "runs" / ".recipes.json").write_bytes(b"\xff\x00" * 100)
    assert open_cache(root).load(root / "a.yaml") == load_recipe(root / "a.yaml")


def test_a_cache_of_another_version_is_not_read(root: Path) -> None:
    content = fill(root, "a")
    entries = {str(root / "gone.yaml"): ["x", "y", "z"]}
    other = content | {"made_by": "0" * 64, "recipes": entries}
    (root / "runs" / ".recipes.json").write_text(json.dumps(other))
    assert fill(root, "a") == content


EDITS = {
    "__init__.py": ('__version__ = "0.1.0"', '__version__ = "0.1.1"'),
    "recipe/schema.py": ('"nll_per_completion_token"', '"nll_per_completion_tok"'),
    "recipe/problems.py": ("_MAX_DEPTH: Final = 100", "_MAX_DEPTH: Final = 101"),
    "secrets.py": ("def find_secret(", "def find_secret( "),
}


def test_other_code_is_another_maker(root: Path) -> None:
    """The version of the runner, and its source where somebody works on it."""
    shutil.copytree(ROOT / "runner", root / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from pathlib import Path; from runner.recipe.cache import _describe_maker;"
        " print(_describe_maker(Path('runs')))"
    )

    def ask() -> str:
        environment = build_environment({"PYTHONPATH": str(root)})
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=True
        ).stdout

    makers = [ask(), ask()]
    assert len(set(makers)) == 1
    for name, (before, after) in EDITS.items():
        path = root / "runner" / name
        text = path.read_text()
        assert before in text, name
        path.write_text(text.replace(before, after))
        makers.append(ask())
    shutil.move(root / "runs", root / "before")
    shutil.copytree(root / "before", root / "runs")
    makers.append(ask())  # a copy of the runs, perhaps by another user
    assert len(set(makers)) == 2 + len(EDITS)


def test_wrong_recipes_are_told_as_without_a_cache(root: Path) -> None:
    for text in ("run: [", "run: {}", RECIPE_TEXT.replace("seed: 3", "sead: 3")):
        path = write_recipe(root, "wrong", text)
        with pytest.raises(RecipeError) as told:
            load_recipe(path)
        cache = open_cache(root)
        with pytest.raises(RecipeError) as told_again:
            cache.load(path)
        assert str(told_again.value) == str(told.value)
        cache.save()
    path.write_bytes(b"\xff")
    for missing in (path, root / "none.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            open_cache(root).load(missing)
    assert not (root / "runs" / ".recipes.json").exists()


def test_a_secret_of_today_is_refused_also_from_the_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled = 'gemma, secret: "\\x73omething-long-and-private"'
    path = write_recipe(root, "b", RECIPE_TEXT.replace("gemma, loss", f"{spelled}, loss"))
    fill(root, "a", "b")
    monkeypatch.setenv("SOME_API_KEY", "something-long-and-private")
    with pytest.raises(RecipeError) as told:
        load_recipe(path)
    with pytest.raises(RecipeError) as told_again:
        open_cache(root).load(path)
    assert str(told_again.value) == str(told.value)
    assert open_cache(root).load(root / "a.yaml") == load_recipe(root / "a.yaml")


def test_no_folder_is_made_and_what_cannot_be_written_is_let_be(root: Path) -> None:
    (root / "runs").rmdir()
    cache = open_cache(root)
    assert cache.load(root / "a.yaml") == load_recipe(root / "a.yaml")
    cache.save()
    assert not (root / "runs").exists()
    (root / "runs" / ".recipes.json").mkdir(parents=True)  # as if others owned it
    cache = open_cache(root)
    assert cache.load(root / "a.yaml") == load_recipe(root / "a.yaml")
    cache.save()
    assert [path.name for path in (root / "runs").iterdir()] == [".recipes.json"]


def test_two_that_write_keep_what_both_read_and_nothing_of_files_that_are_gone(root: Path) -> None:
    for name in ("b", "c"):
        write_recipe(root, name)
    fill(root, "c")
    first, second = open_cache(root), open_cache(root)
    first.load(root / "a.yaml")
    second.load(root / "b.yaml")
    (root / "c.yaml").unlink()
    first.save()
    second.save()
    content = json.loads((root / "runs" / ".recipes.json").read_text())
    assert {Path(name).stem for name in content["recipes"]} == {"a", "b"}


def test_few_recipes_are_read_without_it(root: Path) -> None:
    cache = RecipeCache(root / "runs" / ".recipes.json")
    assert cache.load(root / "a.yaml") == load_recipe(root / "a.yaml")
    cache.save()
    assert not (root / "runs" / ".recipes.json").exists()


def test_nothing_that_starts_a_run_reads_it() -> None:
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "runner").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "runner.recipe.cache"
    ]
    assert sorted(importers) == [
        "runner/api.py",
        "runner/cli/completion.py",
        "runner/cli/reading.py",
    ]
    taken = [
        alias.name
        for verb in ("launch", "sweep")
        for node in ast.walk(ast.parse((ROOT / "runner" / "cli" / f"{verb}.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "runner.cli.reading"
        for alias in node.names
    ]
    noted = {"note_edited", "note_idle_overrides", "note_unrendered"}
    assert set(taken) == noted, "the others select by the cache"
