"""What is written, compared and removed under recipes/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.errors import GridError, RunnerError
from runner.grid.render import (
    build_header,
    compare,
    prune_recipes,
    render_grid,
    render_grids,
    write_recipes,
)
from tests.support.toy_grid import GRID, Toy, build_toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return build_toy(tmp_path)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_second_run_writes_nothing_and_gives_the_same_bytes(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toy()
    assert render_grids("toy", check=False, prune=False, root=root) == 0
    assert "8 written, 0 unchanged" in capsys.readouterr().out
    before = snapshot(root / "recipes/toy")
    assert len(before) == 8
    assert all(content.startswith(build_header("toy").encode()) for content, _ in before.values())
    assert all(
        content.endswith(b"\n") and not content.endswith(b"\n\n") for content, _ in before.values()
    )

    assert render_grids(None, check=False, prune=True, root=root) == 0
    assert snapshot(root / "recipes/toy") == before
    assert "0 written, 8 unchanged" in capsys.readouterr().out
    assert render_grids("toy", check=True, prune=False, root=root) == 0
    assert "is up to date" in capsys.readouterr().out


def test_check_shows_each_kind_of_drift_and_writes_nothing(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    recipes = root / "recipes/toy"
    edited = recipes / "phi_full_060.yaml"
    edited.write_text(edited.read_text().replace("max_steps: 2", "max_steps: 3"))
    (recipes / "phi_full_180.yaml").unlink()
    (recipes / "old.yaml").write_text(build_header("toy"))
    (recipes / "mine.yaml").write_text("by: hand\n")
    before = snapshot(recipes)
    capsys.readouterr()

    assert render_grids("toy", check=True, prune=False, root=root) == 1
    assert snapshot(recipes) == before
    out = capsys.readouterr().out
    assert f"{edited} differs from its template" in out
    assert "phi_full_180.yaml is missing" in out
    assert "old.yaml is stale" in out
    assert "mine.yaml was not generated" in out
    assert "-  max_steps: 3" in out and "+  max_steps: 2" in out
    assert "runner render toy --prune" in out


@pytest.mark.parametrize("change", ["edit", "remove", "stale", "foreign", "newlines"])
def test_each_kind_of_drift_alone_fails_the_check(toy: Toy, change: str) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    path = root / "recipes/toy/phi_full_060.yaml"
    match change:
        case "edit":
            path.write_text(path.read_text() + "#\n")
        case "remove":
            path.unlink()
        case "stale":
            path.with_name("old.yaml").write_text(build_header("toy"))
        case "foreign":
            path.with_name("mine.yaml").write_text("")
        case "newlines":
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert render_grids("toy", check=True, prune=False, root=root) == 1


def test_stale_recipes_are_named_and_removed_only_on_request(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    recipes = root / "recipes/toy"
    (recipes / "mine.yaml").write_text("by: hand\n")
    toy(GRID.replace("[60, 180]", "[60]"))

    assert render_grids("toy", check=False, prune=False, root=root) == 0
    assert "phi_full_180.yaml is stale" in capsys.readouterr().out
    assert len(list(recipes.iterdir())) == 9
    assert render_grids("toy", check=False, prune=True, root=root) == 0
    out = capsys.readouterr().out
    assert "phi_full_180.yaml removed" in out and "mine.yaml was not generated" in out
    assert sorted(path.stem for path in recipes.iterdir()) == [
        "gemma_completion_060",
        "gemma_full_060",
        "mine",
        "phi_completion_060",
        "phi_full_060",
    ]


def test_only_the_file_that_changed_is_written(toy: Toy) -> None:
    root = toy()
    recipes = root / "recipes/toy"
    rendered = render_grid(root / "recipe_templates", "toy")
    write_recipes(rendered, recipes, compare(rendered, recipes))
    (recipes / "phi_full_060.yaml").write_text("edited")
    for path in recipes.iterdir():
        os.utime(path, ns=(1, 1))
    drift = compare(rendered, recipes)
    assert (drift.changed, drift.missing) == (("phi_full_060",), ())
    write_recipes(rendered, recipes, drift)
    prune_recipes(recipes, drift)
    assert [path.stem for path in recipes.iterdir() if path.stat().st_mtime_ns != 1] == [
        "phi_full_060"
    ]
    assert not compare(rendered, recipes)


def test_a_long_list_of_changes_shows_a_few_diffs_and_every_name(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    toy(old="max_steps: 2", new="max_steps: 3")
    capsys.readouterr()
    assert render_grids("toy", check=True, prune=False, root=root) == 1
    out = capsys.readouterr().out
    assert out.count("differs from its template") == 8
    assert out.count("+  max_steps: 3") == 3 and "(5 more files differ)" in out


def test_nothing_is_written_when_one_cell_fails(toy: Toy) -> None:
    root = toy(
        old="{{ num_train_samples | yaml }}", new="{{ (60 - num_train_samples + 1) | yaml }}"
    )
    with pytest.raises(GridError, match="num_train_samples=180"):
        render_grids("toy", check=False, prune=False, root=root)
    assert not (root / "recipes").exists()


def test_check_and_prune_contradict_each_other(toy: Toy) -> None:
    with pytest.raises(RunnerError, match="does not go with --prune"):
        render_grids("toy", check=True, prune=True, root=toy())
