"""Code that is allowed to run: by content, in one folder, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from runner.errors import RefusedError
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.allowed_code import allow_code, load_code, require_allowed
from runner.run.paths import allowed_code_path
from tests.conftest import RECIPE_TEXT

RUNS = Path("runs")
OVERRIDES = (
    "data.task={name: python, function: 'rows.py:build', python_files: [lib/text.py]}",
    "evaluation.generation={enabled: true, max_new_tokens: 4}",
    "evaluation.metrics=[{name: short, function: 'scores.py:score', mode: max}]",
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    for path in ("rows.py", "lib/text.py", "scores.py"):
        (tmp_path / path).write_text(f"# {path}\n")
    return parse_recipe(RECIPE_TEXT, where="r.yaml", overrides=OVERRIDES)


def list_refused(recipe: Recipe, output_root: Path = RUNS) -> list[str]:
    """The lines of the refusal, none where all is allowed."""
    try:
        require_allowed([recipe], output_root, "the way on")
    except RefusedError as error:
        assert error.hint == "the way on"
        return error.message.split("\n")[1:]
    return []


def test_a_file_runs_once_its_content_was_allowed(recipe: Recipe) -> None:
    assert recipe.list_python_files() == {
        "data.task.function": "rows.py",
        "data.task.python_files.0": "lib/text.py",
        "evaluation.metrics.0.function": "scores.py",
    }
    assert len(list_refused(recipe)) == 3
    files = allow_code([recipe], RUNS)
    assert [file.path for file in files] == ["rows.py", "lib/text.py", "scores.py"]
    assert list_refused(recipe) == []
    Path("lib/text.py").write_text("# other\n")
    assert list_refused(recipe) == [
        "  lib/text.py  changed since it was allowed, 8 bytes, sha256"
        f" {sha256(Path('lib/text.py').read_bytes()).hexdigest()[:12]}..."
    ]
    Path("lib/text.py").write_text("# lib/text.py\n")
    assert list_refused(recipe) == [], "content that was read once may come back"
    Path("lib/text.py").write_text("# other\n")
    allow_code([recipe], RUNS)
    assert list_refused(recipe) == []


def test_what_was_allowed_in_one_folder_is_not_in_another(recipe: Recipe) -> None:
    """Nor in a copy of it: somebody else's runs bring no permission."""
    allow_code([recipe], RUNS)
    assert len(list_refused(recipe, Path("others"))) == 3
    shutil.copytree(RUNS, "copy")
    assert len(list_refused(recipe, Path("copy"))) == 3
    os.rename(RUNS, "moved")
    assert list_refused(recipe, Path("moved")) == [], "it is the same folder"
    os.symlink("moved", "runs")
    assert list_refused(recipe) == []


@pytest.mark.parametrize("content", ["", "[]", "{", '{"folder": 1}', "null", '{"allowed": {}}'])
def test_a_list_that_cannot_be_read_allows_nothing(recipe: Recipe, content: str) -> None:
    allow_code([recipe], RUNS)
    allowed_code_path(RUNS).write_text(content)
    assert len(list_refused(recipe)) == 3
    allow_code([recipe], RUNS)
    assert list_refused(recipe) == []


def test_recipes_without_functions_need_no_list(recipe: Recipe) -> None:
    plain = parse_recipe(RECIPE_TEXT, where="r.yaml")
    assert allow_code([plain], RUNS) == [] and not RUNS.exists()
    assert list_refused(plain) == []
    assert load_code(plain, RUNS, "") is plain


def test_a_run_goes_on_with_the_files_that_it_began_with(recipe: Recipe) -> None:
    contents = {file.path: file.sha256 for file in allow_code([recipe], RUNS)}
    assert load_code(recipe, RUNS, "", contents).data.task == load_code(recipe, RUNS, "").data.task
    Path("rows.py").write_text("# allowed, but another file\n")
    allow_code([recipe], RUNS)
    load_code(recipe, RUNS, "")
    with pytest.raises(RefusedError, match=r"rows.py changed since the run was prepared"):
        load_code(recipe, RUNS, "", contents)


def test_what_runs_is_what_was_read(recipe: Recipe) -> None:
    Path("rows.py").write_text("def build(row): return 'read'\n")
    allow_code([recipe], RUNS)
    loaded = load_code(recipe, RUNS, "")
    Path("rows.py").write_text("def build(row): return 'written later'\n")
    with loaded.data.task.open_function() as build:  # type: ignore[attr-defined]
        assert build("row 1", {}) == "read"
    assert loaded.model_dump_json() == recipe.model_dump_json()
    stored = json.loads(allowed_code_path(RUNS).read_text())
    assert {entry["path"] for entry in stored["allowed"].values()} == {
        "rows.py",
        "lib/text.py",
        "scores.py",
    }
