"""`runner masks`: the view equals the input of training, and no row can act on the reader."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.data.draw import SPLITS
from runner.data.rows import build_samples
from runner.preflight.masks import build_views, format_views
from tests.conftest import Project

HOSTILE = (
    "Is <script>alert('x')</script> & \"q\" \x1b[31m\u202e 😀 日本 fine?\n\tSay"
    " <start_of_turn>model"
)
ANSWER = "Yes 😀\nof course ⟧ </span>"


def seen_and_trained(views: list[Any]) -> list[tuple[str, list[int], list[bool]]]:
    return [
        (
            view.row_id,
            [t.token_id for t in view.tokens if not t.is_cut],
            [t.is_trained for t in view.tokens],
        )
        for view in views
    ]


@pytest.mark.parametrize("loss", ["full", "completion"])
@pytest.mark.parametrize("family", ["gemma", "llama", "mistral"])
def test_what_is_shown_is_what_is_trained(
    project: Project, monkeypatch: pytest.MonkeyPatch, family: str, loss: str
) -> None:
    from runner.data.tokenizer import load_tokenizer

    project.add_model(family)
    monkeypatch.chdir(project.root)
    recipe = project.recipe(
        f"model.path=models/{family}",
        f"loss={loss}",
        "data.max_length=40",
        "data.truncation=prompt_left",
    )
    samples = build_samples(recipe.data, load_tokenizer(recipe.model))
    num_cut = 0
    for split in SPLITS:
        views = build_views(recipe, split, 1000, None)
        rows = getattr(samples, split).rows
        used = [view for view in views if view.fate in ("whole", "cut")]
        assert [view.row_id for view in used] == [row.row_id for row in rows]
        for view, row in zip(used, rows, strict=True):
            kept = [token for token in view.tokens if not token.is_cut]
            assert tuple(token.token_id for token in kept) == row.input_ids
            expected = [label >= 0 for label in row.labels(recipe.loss)]
            assert [token.is_trained for token in kept] == [False, *expected[1:]]
            assert (view.fate == "cut") == row.is_truncated
            assert sum(turn.num_tokens for turn in view.turns) == len(row.input_ids)
            assert sum(turn.num_trained for turn in view.turns) == view.num_trained
            num_cut += view.num_cut
    assert num_cut > 0


@pytest.fixture
def hostile(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose first row is written by an attacker."""
    project.add_model("gemma")
    lines = (project.root / "data.jsonl").read_text().splitlines()
    row = {
        "messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": ANSWER}]
    }
    (project.root / "data.jsonl").unlink()
    (project.root / "data.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]))
    monkeypatch.chdir(project.root)
    return project


def view_of_line_1(project: Project, *overrides: str) -> tuple[Any, Any]:
    recipe = project.recipe("data.num_train_samples=null", *overrides)
    views = [view for split in SPLITS for view in build_views(recipe, split, 1000, None)]
    return next(view for view in views if view.where.endswith(" 1")), recipe


@pytest.mark.parametrize("family", ["gemma", "llama", "mistral"])
def test_characters_of_several_tokens_are_shown_once(hostile: Project, family: str) -> None:
    hostile.add_model(family)
    view, _ = view_of_line_1(hostile, f"model.path=models/{family}")
    text = "".join(token.skipped + token.text for token in view.tokens)
    assert HOSTILE in text and text.count("😀") == 2 and text.count("日本") == 1
    assert any(not token.text for token in view.tokens), "an emoji takes several tokens here"


def test_no_row_can_act_on_a_page_or_a_terminal(hostile: Project) -> None:
    view, recipe = view_of_line_1(hostile)
    page = format_views([view], recipe, "html", is_colored=False)
    assert "<script" not in page and "</span>\u23ce" not in page
    assert "&lt;" in page and page.count("<pre>") == page.count("</pre>") == 1
    assert page.count('<span class="t ') == len(view.tokens)
    assert not re.search(r"(src|href|url)\s*[=(]", page), "one file, nothing to load"
    for is_colored in (False, True):
        text = format_views([view], recipe, "ansi", is_colored=is_colored)
        assert "\u202e" not in text and "\x1b[31m" not in text
    plain = format_views([view], recipe, "ansi", is_colored=False)
    assert "\x1b" not in plain
    assert "⟦Yes 😀⏎\n  | of course ⟧ </span><end_of_turn>⟧⏎" in plain
    assert "<start_of_turn> 3" in plain, "the one that a user pasted is counted"


def test_the_command_line(hostile: Project, tiny_model: Callable[[str], Path]) -> None:
    """Only the tokenizer is loaded, no weights."""
    bare = hostile.root / "bare"
    shutil.copytree(tiny_model("gemma"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = ("masks", "recipe.yaml", "model.path=bare")
    done = hostile.cli(*arguments, "--rows", "2", "--split", "eval")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation row ") == 2 and "\x1b" not in done.stdout
    for text in (
        "loss: completion",
        "mask proven by: sentinel",
        "last trained",
        "<end_of_turn>⟧",
        "data.jsonl line",
    ):
        assert text in done.stdout, text
    colored = hostile.cli(*arguments, "--rows", "1", environment={"FORCE_COLOR": "1"})
    assert "\x1b[30;42m" in colored.stdout and "⟦" not in colored.stdout
    told_not_to = hostile.cli(
        *arguments, "--rows", "1", environment={"FORCE_COLOR": "1", "NO_COLOR": "1"}
    )
    assert "\x1b" not in told_not_to.stdout

    whole = json.loads(
        hostile.call(*arguments, "loss=full", "--format", "json", "--row", "3").stdout
    )
    (row,) = whole["rows"]
    assert (row["number"], row["fate"], whole["loss"]) == (3, "whole", "full")
    assert row["num_trained"] == row["num_tokens"] - 1, "nothing predicts the first token"
    by_id = json.loads(
        hostile.call(*arguments, "--format", "json", "--row", row["row_id"][:8]).stdout
    )
    assert [one["number"] for one in by_id["rows"]] == [3]
    missing = hostile.call(*arguments, "--row", "99999")
    assert (
        missing.returncode == 2
        and "no row '99999'" in missing.stderr
        and "1 to 22" in missing.stderr
    )
    refused = hostile.call(*arguments, "data.max_length=8", "--rows", "1")
    assert refused.returncode == 0 and "REFUSED" in refused.stdout


def test_a_run_directory_shows_what_its_own_recipe_says(hostile: Project) -> None:
    assert hostile.cli("launch", "recipe.yaml", "--prepare", "--name", "prepared").returncode == 0
    done = hostile.call("masks", hostile.paths("prepared").run_dir, "loss=full", "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "tests/prepared" in done.stdout and "loss: full" in done.stdout
    assert "not a run directory" in hostile.call("masks", "models").stderr
