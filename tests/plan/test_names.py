"""Names of runs and grids on a command line: the same to every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import RunnerError
from runner.plan.names import MAX_NAMED, Prefer, find_named, find_one

RUNS = Path("runs")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two grids: `a` is in both, with a run directory in one; `old` has no recipe any more."""
    monkeypatch.chdir(tmp_path)
    for recipe in ("toy/a", "toy/b", "toy/toy2", "other/a"):
        path = tmp_path / "recipes" / f"{recipe}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for run in ("toy/b", "toy/old", ".changed/b"):
        path = tmp_path / "runs" / run / "recipe.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path


def find(text: str, prefer: Prefer, grid: str | None = None) -> list[str]:
    return [str(path) for path in find_named(text, RUNS, prefer, grid)]


@pytest.mark.parametrize(
    ("text", "recipe", "run", "both"),
    [
        ("toy/b", "recipes/toy/b.yaml", "runs/toy/b", ["recipes/toy/b.yaml", "runs/toy/b"]),
        ("b", "recipes/toy/b.yaml", "runs/toy/b", ["recipes/toy/b.yaml", "runs/toy/b"]),
        ("b.yaml", "recipes/toy/b.yaml", "recipes/toy/b.yaml", ["recipes/toy/b.yaml"]),
        ("toy", "recipes/toy", "runs/toy", ["recipes/toy", "runs/toy"]),
        ("other", "recipes/other", "recipes/other", ["recipes/other"]),
        ("toy/a", "recipes/toy/a.yaml", "recipes/toy/a.yaml", ["recipes/toy/a.yaml"]),
        ("old", "runs/toy/old", "runs/toy/old", ["runs/toy/old"]),
        ("recipes/toy/a", "recipes/toy/a.yaml", "recipes/toy/a.yaml", ["recipes/toy/a.yaml"]),
        ("runs/toy/a", "recipes/toy/a.yaml", "recipes/toy/a.yaml", ["recipes/toy/a.yaml"]),
        ("recipes/toy/a.yaml", "recipes/toy/a.yaml", "recipes/toy/a.yaml", ["recipes/toy/a.yaml"]),
        ("runs/toy/b", "runs/toy/b", "runs/toy/b", ["runs/toy/b"]),
    ],
)
def test_what_a_name_means(
    project: Path, text: str, recipe: str, run: str, both: list[str]
) -> None:
    assert find(text, "recipe") == [recipe]
    assert find(text, "run") == [run]
    assert find(text, "both") == both


def test_globs_are_paths(project: Path) -> None:
    assert find("recipes/toy/*.yaml", "recipe") == [
        "recipes/toy/a.yaml",
        "recipes/toy/b.yaml",
        "recipes/toy/toy2.yaml",
    ]
    with pytest.raises(RunnerError, match="names 2 recipes or runs: recipes"):
        find_one("recipes/toy/[ab].yaml", RUNS, "recipe")


def test_a_name_of_several_is_not_guessed(project: Path) -> None:
    with pytest.raises(RunnerError, match="'a' is the name of 2 runs or grids: recipes") as caught:
        find("a", "recipe")
    assert "recipes/other/a.yaml, recipes/toy/a.yaml" in caught.value.message
    assert caught.value.hint == "name one of them: recipes/other/a.yaml"
    assert find("a", "recipe", grid="toy") == ["recipes/toy/a.yaml"]
    (project / "recipes" / "b").mkdir()
    with pytest.raises(RunnerError, match="'b' is the name of 2 runs or grids: recipes/b, runs/t"):
        find("b", "run")
    for number in range(20):
        (project / "recipes" / f"grid{number}").mkdir()
        (project / "recipes" / f"grid{number}" / "a.yaml").write_text("")
    with pytest.raises(RunnerError, match=f"22 runs or grids: .* and {22 - MAX_NAMED} more"):
        find("a", "recipe")


def test_a_folder_of_that_name_without_recipes_is_not_meant(project: Path) -> None:
    (project / "toy").mkdir()
    assert find("toy", "recipe") == ["recipes/toy"]
    (project / "toy" / "mine.yaml").write_text("")
    assert find("toy", "recipe") == ["toy"]


@pytest.mark.parametrize(
    "text",
    [
        "recipes/toy/old.yaml",  # gone: what ran once does not take its place
        "elsewhere/toy/a.yaml",
        "/elsewhere/toy/a",
        "../recipes/toy/c",
        ".changed",
        ".changed/b",
        "toy/.hidden",
        "*",
        "toy/[ab]",
        "c",
        "",
    ],
)
def test_nothing_else_is_taken_for_a_name(project: Path, text: str) -> None:
    with pytest.raises(RunnerError) as caught:
        found = find(text, "recipe")
        assert found in (["."], ["recipes", "runs"]), "a path"
        raise RunnerError("a path", hint="`runner status`")
    assert "runner status" in str(caught.value.hint)


def test_the_nearest_name_is_suggested(project: Path) -> None:
    for text, close in (
        ("toyyy", "toy"),
        ("toy/toy3", "toy/toy2"),
        ("oy2", "toy2"),
        ("recipes/toy/toy3.yaml", "recipes/toy/toy2.yaml"),
    ):
        with pytest.raises(RunnerError, match="no recipe, run or grid is named") as caught:
            find(text, "recipe")
        assert f"did you mean {close}?" in str(caught.value.hint)
    with pytest.raises(RunnerError) as caught:
        find("something", "recipe")
    assert "the grids are other, toy;" in str(caught.value.hint)
