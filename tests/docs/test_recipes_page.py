"""The grids and parts of templates on docs/recipes.md give the recipes shown there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.grid.render import RenderedGrid, render_grid
from runner.recipe.parse import parse_recipe
from tests.conftest import ROOT
from tests.support.toy_grid import TEMPLATE

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"^```\w*\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FIXED = {
    "{{ model.path | yaml }}": "demo_models/gemma",
    "{{ num_train_samples | yaml }}": "60",
    "{{ loss | yaml }}": "full",
}


def find_blocks(first_words: str) -> list[str]:
    """The code blocks of the page that begin like this, in order."""
    return [block for block in BLOCKS if block.startswith(first_words)]


def render_page(folder: Path, grid: str, adapter: str | None) -> RenderedGrid:
    """The recipes of a grid on the page; with `adapter` in place of that section of a template
    whose other sections are the same in every cell.
    """
    templates = folder / "recipe_templates"
    for block in find_blocks("# recipe_templates/"):
        name = block.splitlines()[0].removeprefix("# ")
        if name.endswith(".yaml"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    template = TEMPLATE
    if adapter is not None:
        template = template.replace("adapter: {method: none}\n", adapter)
        for old, new in FIXED.items():
            template = template.replace(old, new)
    (templates / grid / "recipe.yaml.j2").write_text(template)
    return render_grid(templates, grid)


def test_exclusions_and_inclusions_give_the_summary_on_the_page(tmp_path: Path) -> None:
    rendered = render_page(tmp_path, "sizes", None)
    assert find_blocks("sizes\n") == [rendered.summary + "\n"]
    recipe = parse_recipe(rendered.texts["llama_020_full"], where="")
    assert (recipe.model.path, recipe.data.num_train_samples) == ("demo_models/llama", 20)
    assert len(rendered.texts) == 7 and "llama_060_full" not in rendered.texts


@pytest.mark.parametrize("number", [0, 1])
def test_a_conditional_axis_with_if_and_with_include(tmp_path: Path, number: int) -> None:
    sections = find_blocks("# recipe_templates/ranks/recipe.yaml.j2")
    assert len(sections) == 2
    rendered = render_page(tmp_path, "ranks", sections[number])
    assert find_blocks("ranks\n") == [rendered.summary + "\n"]
    assert list(rendered.texts) == ["none", "lora_r8", "lora_r16"]
    for name, rank in (("lora_r8", 8), ("lora_r16", 16)):
        recipe = parse_recipe(rendered.texts[name], where="")
        assert recipe.adapter.model_dump()["r"] == rank
        assert dict(recipe.run.axes) == {"method": "lora", "r": rank}
    plain = parse_recipe(rendered.texts["none"], where="")
    assert plain.adapter.method == "none" and dict(plain.run.axes) == {"method": "none"}
