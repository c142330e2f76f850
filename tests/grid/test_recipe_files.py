"""Files under recipes/ are written, compared and removed, and edits there are found."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.errors import GridError, RefusedError, RunnerError
from runner.grid.recipe_files import compare, prune_recipes, seal, was_edited, write_recipes
from runner.grid.render import render_grid, render_grids
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
    assert not any(was_edited(content) for content, _ in before.values())
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
    (recipes / "old.yaml").write_text(seal("toy", ""))
    (recipes / "mine.yaml").write_text("by: hand\n")
    before = snapshot(recipes)
    capsys.readouterr()

    assert render_grids("toy", check=True, prune=False, root=root) == 1
    assert snapshot(recipes) == before
    out = capsys.readouterr().out
    assert f"{edited} was edited by hand" in out and "differs from its template" not in out
    assert "phi_full_180.yaml is missing" in out
    assert "old.yaml is stale" in out
    assert "mine.yaml was not generated" in out
    assert "phi_full_060.yaml: line 25\n    -   max_steps: 3\n    +   max_steps: 2\n" in out
    assert "runner render toy --prune --force" in out


@pytest.mark.parametrize("change", ["edit", "template", "remove", "stale", "foreign", "newlines"])
def test_each_kind_of_drift_alone_fails_the_check(toy: Toy, change: str) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    path = root / "recipes/toy/phi_full_060.yaml"
    match change:
        case "edit":
            path.write_text(path.read_text() + "#\n")
        case "template":
            toy(old="max_steps: 2", new="max_steps: 3")
        case "remove":
            path.unlink()
        case "stale":
            path.with_name("old.yaml").write_text(seal("toy", ""))
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
    with pytest.raises(RunnerError, match="does not go with --force"):
        render_grids("toy", check=True, prune=False, force=True, root=toy())


OLD_HEADER = "# Generated from recipe_templates/toy by `runner render toy`; do not edit."


def strip_sum(path: Path) -> None:
    """The recipe as a version without checksums wrote it."""
    header, _, rest = path.read_text().partition("\n")
    assert header.startswith(f"{OLD_HEADER} sha256 ")
    path.write_text(f"{OLD_HEADER}\n{rest}")


def test_the_first_line_holds_the_sum_of_the_rest(toy: Toy) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    for path in (root / "recipes/toy").iterdir():
        header, _, rest = path.read_bytes().partition(b"\n")
        assert header.endswith(f" {hashlib.sha256(rest).hexdigest()}".encode())
        assert not was_edited(path.read_bytes())
        assert not was_edited(path.read_bytes().replace(b"\n", b"\r\n"))
        assert was_edited(path.read_bytes() + b"\n")


def test_edited_recipes_are_all_named_and_nothing_is_written(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one file of another grid too, and although the template has changed since."""
    root = toy()
    other = root / "recipe_templates/a_first"
    other.mkdir()
    for name in ("grid.yaml", "recipe.yaml.j2"):
        (other / name).write_text((root / "recipe_templates/toy" / name).read_text())
    monkeypatch.chdir(root)
    assert main(["render"]) == 0
    recipes = root / "recipes/toy"
    for name in ("phi_full_060", "gemma_full_180"):
        path = recipes / f"{name}.yaml"
        text = path.read_text().replace("learning_rate: 1e-5", "learning_rate: 3e-5")
        path.write_text(text.replace("  seed: 1\n", "", 1) + "# mine\n")
    toy(old="max_steps: 2", new="max_steps: 3")
    (other / "recipe.yaml.j2").write_bytes(
        (root / "recipe_templates/toy/recipe.yaml.j2").read_bytes()
    )
    before = snapshot(recipes), snapshot(root / "recipes/a_first")
    capsys.readouterr()

    assert main(["render"]) == 2
    said = capsys.readouterr().err
    assert "2 recipes were edited after rendering, so nothing was written" in said
    assert "recipes/toy/phi_full_060.yaml: after line " in said
    assert "recipes/toy/gemma_full_180.yaml: after line " in said
    for row in ("-   learning_rate: 3e-5", "+   learning_rate: 1e-5", "+   seed: 1", "- # mine"):
        assert said.count(f"    {row}") == 2
    assert said.endswith("runner render toy --force\n") and "recipe_templates/toy" in said
    assert (snapshot(recipes), snapshot(root / "recipes/a_first")) == before

    assert main(["render", "--force"]) == 0
    said = capsys.readouterr().out
    assert said.count("was edited by hand: overwritten (--force)") == 2
    assert main(["render", "--check"]) == 0


def test_many_edited_recipes_are_all_named_and_a_few_are_quoted(toy: Toy) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    for path in (root / "recipes/toy").iterdir():
        path.write_text(path.read_text().replace("run:", "run: # " + "x" * 999) + "#\n" * 999)
    with pytest.raises(RefusedError) as caught:
        render_grids("toy", check=False, prune=False, root=root)
    said = str(caught.value)
    assert len(re.findall(r"\.yaml: line 2, lines 33 to 1031\n", said)) == 8
    assert said.count("(993 more rows)") == 3 and len(said) < 4_000


def test_what_the_template_gives_is_no_edit(toy: Toy) -> None:
    """An edit that the template has taken over, and a recipe without a checksum."""
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    path = root / "recipes/toy/phi_full_060.yaml"
    text = path.read_text()
    path.write_text(text.replace("max_steps: 2", "max_steps: 3"))
    toy(old="max_steps: 2", new="max_steps: 3")
    assert render_grids("toy", check=False, prune=False, root=root) == 0
    right = path.read_text()
    for same in (right.partition("\n")[2], right.replace("\n", "\r\n")):
        path.write_bytes(same.encode())
        assert render_grids("toy", check=False, prune=False, root=root) == 0
        assert path.read_bytes() == right.encode()
    # Another line before it is a user's.
    path.write_text(right.replace("# Generated", "# mine, generated"))
    with pytest.raises(RefusedError):
        render_grids("toy", check=False, prune=False, root=root)


def test_a_recipe_of_an_older_version_gets_its_sum(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    before = {path: path.read_bytes() for path in (root / "recipes/toy").iterdir()}
    for path in before:
        strip_sum(path)
    capsys.readouterr()
    assert render_grids("toy", check=True, prune=False, root=root) == 0
    assert "8 recipes with no checksum in the first line yet" in capsys.readouterr().out
    assert render_grids("toy", check=False, prune=False, root=root) == 0
    assert {path: path.read_bytes() for path in before} == before

    # It is unknown if that text was rendered.
    edited = root / "recipes/toy/phi_full_060.yaml"
    strip_sum(edited)
    edited.write_text(edited.read_text().replace("max_steps: 2", "max_steps: 4"))
    with pytest.raises(RefusedError, match="1 recipe was edited after rendering"):
        render_grids("toy", check=False, prune=False, root=root)


def test_prune_leaves_what_was_edited(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    root = toy()
    render_grids("toy", check=False, prune=False, root=root)
    recipes = root / "recipes/toy"
    edited, old = recipes / "phi_full_180.yaml", recipes / "phi_completion_180.yaml"
    edited.write_text(edited.read_text() + "# mine\n")
    strip_sum(old)
    toy(GRID.replace("[60, 180]", "[60, 200]"))
    before = snapshot(recipes)
    with pytest.raises(RefusedError) as caught:
        render_grids("toy", check=False, prune=True, root=root)
    said = str(caught.value)
    assert snapshot(recipes) == before and said.endswith("runner render toy --prune --force")
    for path in (edited, old):
        assert (
            f"{path}: no cell produces it any more, and the checksum in its first line is wrong"
            in said
        )
    assert render_grids("toy", check=True, prune=False, root=root) == 1
    assert f"{edited} is stale: no cell produces it, and was edited" in capsys.readouterr().out
    # Nothing is lost without --prune.
    assert render_grids("toy", check=False, prune=False, root=root) == 0 and edited.exists()
    assert render_grids("toy", check=False, prune=True, force=True, root=root) == 0
    assert not edited.exists() and not old.exists()


def test_a_grid_that_fails_leaves_the_others_unwritten(toy: Toy) -> None:
    root = toy()
    bad = root / "recipe_templates/z_bad"
    bad.mkdir()
    (bad / "grid.yaml").write_text(GRID)
    (bad / "recipe.yaml.j2").write_text("{{ none | yaml }}")
    with pytest.raises(GridError):
        render_grids(None, check=False, prune=False, root=root)
    assert not (root / "recipes").exists()


def test_check_names_what_was_edited(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy())
    assert main(["render", "toy"]) == main(["check", "--schema-only", "recipes/toy"]) == 0
    assert capsys.readouterr().err == ""
    for path in sorted(Path("recipes/toy").iterdir())[:4]:
        path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
    assert main(["check", "--schema-only", "recipes/toy"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("note: edited after rendering: recipes/toy/gemma_completion_060.yaml, ")
    assert "gemma_full_060.yaml and 1 more; `runner render` does not overwrite" in said


def test_what_has_the_name_of_a_recipe_and_is_no_file_is_refused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy())
    assert main(["render", "toy"]) == 0
    path = Path("recipes/toy/zz.yaml")
    for make, kind in ((os.mkfifo, "a pipe"), (os.mkdir, "a folder")):
        make(path)
        for options in ([], ["--check"], ["--prune"], ["--force"]):
            assert main(["render", "toy", *options]) == 2
            said = capsys.readouterr().err
            assert f"error: {path} is {kind}, and should be a file\n" in said
            assert f"mv {path} {path}.aside" in said
        path.rename(f"{kind}.aside")


def test_check_says_that_force_drops_the_edit(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy())
    assert main(["render", "toy"]) == 0
    path = next(Path("recipes/toy").iterdir())
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
    capsys.readouterr()
    assert main(["render", "toy", "--check"]) == 1
    assert capsys.readouterr().out.endswith(
        "\nhint: make your edits in recipe_templates/toy, then render again;"
        " to drop them: runner render toy --force\n"
    )


def test_the_templates_of_all_edited_grids_are_named(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy())
    templates = Path("recipe_templates")
    shutil.copytree(templates / "toy", templates / "zoo")
    assert main(["render"]) == 0
    for grid in ("toy", "zoo"):
        path = next(Path("recipes", grid).iterdir())
        path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
    assert main(["render"]) == 2
    said = capsys.readouterr().err
    assert "change in recipe_templates/toy and recipe_templates/zoo, then render again" in said
